// The low-rank part of what a product of bf16 starts from, where the processor multiplies and adds pairs of bf16: half the
// instructions of terms_low_rank.cpp. Its factors and its thin product are rounded to bf16, as a product of that dtype has them;
// sums are made in fp32.
namespace {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
constexpr bool PAIRS_OF_RANKS = true;

// Two rows of fp32 as pairs of bf16: the first in the low halves.
INLINE vu pairs_of(vf low, vf high) {
  const auto words = [](vf v) { return (vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)); };
  return words(low) | words(high) << 16;
}

INLINE vf at_most(const float* from, int64_t count) {  // VL elements with zeros behind `count`
  return (vf)_mm512_maskz_loadu_ps(__mmask16(count >= VL ? 0xffff : count > 0 ? (1 << count) - 1 : 0), from);
}

// `in` by rows in bf16, [R][pitch] with zeros behind `inputs`: as the rows of x are multiplied with it.
void narrow_inner(const Terms& t, int64_t inputs, int64_t pitch, uint16_t* to) {
  for (int64_t r0 = 0; r0 < t.R; r0 += VL)
    for (int64_t c = 0; c < pitch; c += VL) {
      vu square[VL];
      if (t.in.stride == 1) {
        for (int i = 0; i < VL; ++i) square[i] = r0 + i < t.R ? (vu)at_most(t.in.data + (r0 + i) * t.in.stride_r + c, inputs - c) : vu{};
      } else {  // rows of `in` are adjacent elements
        for (int i = 0; i < VL; ++i) square[i] = c + i < inputs ? (vu)at_most(t.in.data + (c + i) * t.in.stride + r0, t.R - r0) : vu{};
        transpose_square(square);
      }
      for (int64_t i = 0; i < VL && r0 + i < t.R; ++i)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (r0 + i) * pitch + c), (__m256i)_mm512_cvtneps_pbh((__m512)square[i]));
    }
}

// `right` by outputs in bf16, [outputs][R rounded up to VL] with zeros behind R: two ranks are a word.
void narrow_outer(const Terms& t, int64_t outputs, int64_t padded, uint16_t* to) {
  for (int64_t o = 0; o < outputs; o += VL)
    for (int64_t r0 = 0; r0 < t.R; r0 += VL) {
      vu square[VL];
      if (t.right.stride == 1) {
        for (int i = 0; i < VL; ++i)
          square[i] = r0 + i < t.R ? (vu)at_most(t.right.data + (r0 + i) * t.right.stride_r + o, outputs - o) : vu{};
        transpose_square(square);
      } else {  // rows of `right` are adjacent elements
        for (int i = 0; i < VL; ++i)
          square[i] = o + i < outputs ? (vu)at_most(t.right.data + (o + i) * t.right.stride + r0, t.R - r0) : vu{};
      }
      for (int64_t i = 0; i < VL && o + i < outputs; ++i)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (o + i) * padded + r0), (__m256i)_mm512_cvtneps_pbh((__m512)square[i]));
    }
}

// `left` out of rows of x whose elements are adjacent, `count` from m0 on: 4 rows with 4 of `in`, so that 16 sums cost 8 loads. Half
// the multiply-adds of `left_of_panel`, for which `in` is rounded, as a product of that dtype has it.
void left_of_rows(const Terms& t, const uint16_t* in, int64_t pitch, int64_t inputs, int64_t m0, int64_t count, float* left) {
  const auto* x = static_cast<const uint16_t*>(t.x) + m0 * t.x_stride_m;
  const __mmask32 rest = (uint32_t(1) << inputs % (2 * VL)) - 1;
  for (int64_t m = 0; m < TILE_ROWS; m += 4)
    for (int64_t r = 0; r < t.R; r += 4) {
      vf acc[16] = {};
      const uint16_t *rows[4], *factors[4];
      for (int64_t i = 0; i < 4; ++i) {
        rows[i] = x + std::min(m + i, count - 1) * t.x_stride_m;
        factors[i] = in + std::min(r + i, t.R - 1) * pitch;
      }
      const auto step = [&](int64_t c, __mmask32 mask) __attribute__((always_inline)) {
        __m512bh factor[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) factor[k] = (__m512bh)_mm512_loadu_si512(factors[k] + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(mask, rows[i] + c);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) acc[4 * i + k] = (vf)_mm512_dpbf16_ps((__m512)acc[4 * i + k], row, factor[k]);
        }
      };
      int64_t c = 0;
      for (; c + 2 * VL <= inputs; c += 2 * VL) step(c, ~__mmask32(0));
      if (rest) step(c, rest);
      const vf sums = lane_sums(acc) * float(t.scale);
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 4 && r + k < t.R; ++k) left[(r + k) * TILE_ROWS + m + i] = m + i < count ? sums[4 * i + k] : 0.0f;
    }
}

// left [R][TILE_ROWS] as pairs of ranks, [R / 2][TILE_ROWS].
void pair_left(const float* left, int64_t R, uint32_t* words) {
  for (int64_t r = 0; r < R; r += 2)
    for (int64_t m = 0; m < TILE_ROWS; m += VL) {
      const vf low = *reinterpret_cast<const vf*>(left + r * TILE_ROWS + m);
      *reinterpret_cast<vu*>(words + r / 2 * TILE_ROWS + m) =
          pairs_of(low, r + 1 < R ? *reinterpret_cast<const vf*>(left + (r + 1) * TILE_ROWS + m) : vf{});
    }
}

// As low_rank_sums, in pairs of ranks; `right` as `narrow_outer` makes it.
void low_rank_sums_of_pairs(const Terms& t, const uint32_t* left, const uint16_t* right, int64_t padded, int64_t o0, int64_t count,
                            vf (*sums)[GROUPS]) {
  const int64_t pairs = (t.R + 1) / 2;
  for (int64_t o = 0; o < count; o += 4) {
    vf acc[4][GROUPS] = {};
    const uint16_t* factors[4];  // the last one again where there are fewer; their sums land in padding
    for (int64_t i = 0; i < 4; ++i) factors[i] = right + (o0 + std::min(o + i, count - 1)) * padded;
    for (int64_t r = 0; r < pairs; ++r) {
      const vu* words = reinterpret_cast<const vu*>(left + r * TILE_ROWS);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        uint32_t word;
        std::memcpy(&word, factors[i] + 2 * r, sizeof word);
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(int(word));
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) acc[i][g] = (vf)_mm512_dpbf16_ps((__m512)acc[i][g], (__m512bh)words[g], factor);
      }
    }
    for (int i = 0; i < 4; ++i)
      for (int g = 0; g < GROUPS; ++g) sums[o + i][g] = acc[i][g];
  }
}
#else
constexpr bool PAIRS_OF_RANKS = false;
void narrow_inner(const Terms&, int64_t, int64_t, uint16_t*) {}
void left_of_rows(const Terms&, const uint16_t*, int64_t, int64_t, int64_t, int64_t, float*) {}
void pair_left(const float*, int64_t, uint32_t*) {}
void narrow_outer(const Terms&, int64_t, int64_t, uint16_t*) {}
void low_rank_sums_of_pairs(const Terms&, const uint32_t*, const uint16_t*, int64_t, int64_t, int64_t, vf (*)[GROUPS]) {}
#endif

}  // namespace
