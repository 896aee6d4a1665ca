// What comes to the products of few rows of x with 4-bit codes: S, the low-rank term, and the way to y.
#if defined(FEW_FOUR_BIT)
namespace {

// totals[i][m] = the lanes of sums[i][m] in one, 16 at a time.
void few_totals(const __m512* sums, int64_t count, float* totals) {
  for (int64_t f = 0; f < count; f += VL) {
    vf vectors[VL];
    for (int i = 0; i < VL; ++i) vectors[i] = (vf)sums[f + i];
    _mm512_storeu_ps(totals + f, (__m512)lane_sums(vectors));
  }
}

// y[m][first + i] = totals[i][m], by squares: single elements of rows that are far apart would be slower than the products.
void few_store(const float* totals, int64_t count, int64_t M, const FewOutput& output, int64_t first) {
  for (int64_t n = 0; n < count; n += VL)
    for (int64_t m = 0; m < M; m += VL) {
      const __mmask16 rows = __mmask16(M - m >= VL ? 0xffff : (1 << (M - m)) - 1);
      const __mmask16 outputs = __mmask16(count - n >= VL ? 0xffff : (1 << (count - n)) - 1);
      vu square[VL];
      for (int i = 0; i < VL; ++i) square[i] = n + i < count ? (vu)_mm512_maskz_loadu_ps(rows, totals + (n + i) * M + m) : vu{};
      transpose_square(square);
      for (int64_t i = 0; i < VL && m + i < M; ++i) {
        const int64_t at = (m + i) * output.stride + first + n;
        if (output.dtype == F32) {
          _mm512_mask_storeu_ps(static_cast<float*>(output.y) + at, outputs, (__m512)square[i]);
          continue;
        }
        uint16_t narrow[VL];
        const float* from = reinterpret_cast<const float*>(&square[i]);
        if (output.dtype == BF16) narrow_bf16(from, VL, narrow);
        else
          for (int k = 0; k < VL; ++k) narrow[k] = Half::narrow(from[k]);
        std::memcpy(static_cast<uint16_t*>(output.y) + at, narrow, std::min<int64_t>(VL, count - n) * sizeof(uint16_t));
      }
    }
}

// x transposed, [columns][pitch], as fp32 or as bf16 that it is: half the lines that an entry touches.
struct FewColumns {
  void* data;
  int64_t pitch;
  bool bf16;
  INLINE __m512 load(const FewColumns& c, int64_t column, int64_t m) {
    const int64_t at = column * c.pitch + m;
    if (!c.bf16) return _mm512_loadu_ps(static_cast<const float*>(c.data) + at);
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(c.data) + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
};

// The entries j .. end of S in row r and the columns c0 .. c1.
INLINE void few_entries(const FewProblem& p, int64_t r, int64_t& j, int64_t& end) {
  const Rows& s = *p.s;
  j = end = 0;
  if (!s.values) return;
  j = s.row_offsets[r], end = s.row_offsets[r + 1];
  if (p.c0 > 0) j = std::lower_bound(s.cols + j, s.cols + end, int32_t(p.c0)) - s.cols;
  if (p.c1 < s.K) end = std::lower_bound(s.cols + j, s.cols + end, int32_t(p.c1)) - s.cols;
}

// x[cols[0]] .. x[cols[15]]. A gather takes 1.7 times as long.
INLINE __m512 few_elements(const float* x, const int32_t* cols) {
  __m128 four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, cols += 4) {
    four[i] = _mm_load_ss(x + cols[0]);
    four[i] = _mm_insert_ps(four[i], _mm_load_ss(x + cols[1]), 0x10);
    four[i] = _mm_insert_ps(four[i], _mm_load_ss(x + cols[2]), 0x20);
    four[i] = _mm_insert_ps(four[i], _mm_load_ss(x + cols[3]), 0x30);
  }
  const __m512 low = _mm512_castps256_ps512(_mm256_set_m128(four[1], four[0]));
  return _mm512_insertf32x8(low, _mm256_set_m128(four[3], four[2]), 1);
}

// to[j - begin] = entry j of S times its element of x; column 0 of S is at x.
template <class E>
INLINE void few_entry_products(const Rows& s, int64_t begin, int64_t end, const float* x, float* to) {
  const auto* values = static_cast<const typename E::T*>(s.values);
  int64_t j = begin;
  for (; j + VL <= end; j += VL, to += VL)
    _mm512_storeu_ps(to, _mm512_mul_ps((__m512)E::widen(E::load(values + j)), few_elements(x, s.cols + j)));
  for (; j < end; ++j, ++to) *to = bits_float(E::widen(values[j])) * x[s.cols[j]];
}

// sum += n products, by lanes. As many steps for 1 as for 32: rows differ, and a wrong guess of the branch takes longer.
INLINE void few_add(const float* products, int64_t n, __m512& sum) {
  const auto lanes = [&](int64_t k) { return __mmask16(n - k >= VL ? 0xffff : n > k ? (1 << (n - k)) - 1 : 0); };
  for (int64_t k = 0; k < n; k += 2 * VL) {
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(k), products + k));
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(k + VL), products + k + VL));
  }
}

constexpr int PRODUCT_ROWS = 32;  // of S, whose products are made together: they stay in the L1 cache

// sums[i] += (S + B A) x of row first + i, for one row of x, by lanes. Entries of S are gone through regardless of rows, which
// are too short and too different for loops of their own. products: room for one of each entry.
template <class E>
void few_beside_one(const FewProblem& p, int64_t first, int64_t count, const float* x, float* products, __m512* sums) {
  const LowRankPart& part = *p.part;
  const float* column_0 = x - p.c0;
  int64_t begin[PRODUCT_ROWS], end[PRODUCT_ROWS];
  for (int64_t done = 0; done < count; done += PRODUCT_ROWS) {
    const int64_t rows = std::min<int64_t>(PRODUCT_ROWS, count - done), r = first + done;
    for (int64_t i = 0; i < rows; ++i) few_entries(p, r + i, begin[i], end[i]);
    if (p.c0 == 0 && p.c1 == p.s->K) few_entry_products<E>(*p.s, begin[0], end[rows - 1], column_0, products);
    else
      for (int64_t i = 0; i < rows; ++i) few_entry_products<E>(*p.s, begin[i], end[i], column_0, products + (begin[i] - begin[0]));
    for (int64_t i = 0; i < rows; ++i) {
      const float* b = part.B + (r + i - part.first) * part.b_stride;
      __m512 sum = sums[done + i];
      for (int64_t k = 0; k < part.R; k += VL) {
        const __mmask16 ranks = __mmask16(part.R - k >= VL ? 0xffff : (1 << (part.R - k)) - 1);
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(ranks, b + k), _mm512_maskz_loadu_ps(ranks, part.left + k), sum);
      }
      few_add(products + (begin[i] - begin[0]), end[i] - begin[i], sum);
      sums[done + i] = sum;
    }
  }
}

// totals[m] += (S + B A) x of one row of the weight.
template <class E>
void few_beside(const FewProblem& p, int64_t r, const FewColumns& columns, float* totals) {
  const LowRankPart& part = *p.part;
  const auto* values = static_cast<const typename E::T*>(p.s->values);
  const float* b = part.B + (r - part.first) * part.b_stride;
  int64_t first, end;
  few_entries(p, r, first, end);
  for (int64_t m = 0; m < p.M; m += 2 * VL) {
    const auto rows = [&](int64_t at) { return __mmask16(at >= p.M ? 0 : p.M - at >= VL ? 0xffff : (1 << (p.M - at)) - 1); };
    const __mmask16 low_rows = rows(m), high_rows = rows(m + VL);
    __m512 low = _mm512_maskz_loadu_ps(low_rows, totals + m), high = _mm512_maskz_loadu_ps(high_rows, totals + m + VL);
    for (int64_t j = first; j < end; ++j) {
      const __m512 value = _mm512_set1_ps(bits_float(E::widen(values[j])));
      low = _mm512_fmadd_ps(value, FewColumns::load(columns, p.s->cols[j] - p.c0, m), low);
      if (high_rows) high = _mm512_fmadd_ps(value, FewColumns::load(columns, p.s->cols[j] - p.c0, m + VL), high);
    }
    for (int64_t k = 0; k < part.R; ++k) {
      const float* left = part.left + k * p.M + m;
      low = _mm512_fmadd_ps(_mm512_set1_ps(b[k]), _mm512_maskz_loadu_ps(low_rows, left), low);
      if (high_rows) high = _mm512_fmadd_ps(_mm512_set1_ps(b[k]), _mm512_maskz_loadu_ps(high_rows, left + VL), high);
    }
    _mm512_mask_storeu_ps(totals + m, low_rows, low);
    _mm512_mask_storeu_ps(totals + m + VL, high_rows, high);
  }
}

}  // namespace
#endif
