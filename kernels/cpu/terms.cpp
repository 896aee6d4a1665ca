// What is added to a product of low precision, before it: out = x Sᵀ + s (x Aᵀ) Bᵀ, or out = x S + s (x B) A.
//
// Rounded into a bf16 weight an early step of S would be lost, and added to a y that was rounded so would be most of it. So
// both terms are summed in fp32 and rounded by themselves, which keeps a small step as well as a large one, and the GEMM
// starts its sums from there: y is rounded once. A low-rank term inside the GEMM would need a copy of a dense weight with B
// beside it. M is cut into tiles of 64 rows: a column of x is 4 cache lines of a transposed panel, or 2 of bf16 pairs (half a
// MiB for 4096 columns, which stays in L2). An entry of S is 64 multiply-adds with it, about 4 cycles (Zen 5); the low-rank
// term is 64 R per column and per output, at the speed of the multipliers. Outputs are transposed back by squares, in blocks
// of a cache line: the rows of out lie in few sets of the cache, and half a line would be evicted before the other is written.
// Cost beyond that: one transposition of x, and one pass over out. Gradients of the delta may come with it
// (terms_gradient.cpp).
namespace {

thread_local Scratch offset_scratch, index_scratch, value_scratch, origin_scratch;

struct Entries {  // S by outputs: those of output r are offsets[r] .. offsets[r + 1], with the input and the value of each
  int64_t outputs, inputs;
  const int32_t *offsets, *index;
  const float* value;
  const int32_t* origin;  // the place of each in the mask; null where they are in the mask's order, or nobody asked
};

// The entries of rows r0 .. r1 and columns c0 .. c1, by rows, or by columns if `transposed` (a counting sort).
bool collect(const Rows& s, int64_t r0, int64_t r1, int64_t c0, int64_t c1, bool transposed, bool origins, Entries& e) {
  e.outputs = transposed ? c1 - c0 : r1 - r0;
  e.inputs = transposed ? r1 - r0 : c1 - c0;
  e.offsets = e.origin = nullptr;
  if (!s.values || s.row_offsets[r0] == s.row_offsets[r1]) return true;
  if (!transposed && s.values_dtype == F32 && c0 == 0 && c1 == s.K) {
    e.offsets = s.row_offsets + r0;
    e.index = s.cols;
    e.value = static_cast<const float*>(s.values);
    return true;
  }
  const int64_t most = s.row_offsets[r1] - s.row_offsets[r0];
  auto* offsets = offset_scratch.get<int32_t>(e.outputs + 2);
  auto* index = index_scratch.get<int32_t>(most + 1);
  auto* value = value_scratch.get<float>(most + 1);
  auto* origin = origins ? origin_scratch.get<int32_t>(most + 1) : nullptr;
  if (!offsets || !index || !value || (origins && !origin)) return false;
  std::fill(offsets, offsets + e.outputs + 2, 0);
  const auto each = [&](auto f) {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t j = s.row_offsets[r]; j < s.row_offsets[r + 1]; ++j)
        if (s.cols[j] >= c0 && s.cols[j] < c1) f(transposed ? s.cols[j] - c0 : r - r0, transposed ? r - r0 : s.cols[j] - c0, j);
  };
  each([&](int64_t output, int64_t, int64_t) { ++offsets[output + 2]; });
  for (int64_t i = 0; i < e.outputs; ++i) offsets[i + 2] += offsets[i + 1];
  each([&](int64_t output, int64_t input, int64_t j) {
    const int32_t to = offsets[output + 1]++;
    index[to] = int32_t(input);
    value[to] = element(s.values, s.values_dtype, j);
    if (origin) origin[to] = int32_t(j);
  });
  e.offsets = offsets;
  e.index = index;
  e.value = value;
  e.origin = origin;
  return true;
}

void write_span(const float* from, int64_t n, int dtype, void* to, int64_t at) {
  if (dtype == F32) {
    std::memcpy(static_cast<float*>(to) + at, from, n * sizeof(float));
    return;
  }
  uint16_t* low = static_cast<uint16_t*>(to) + at;
  if (dtype == BF16) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 2 * VL <= n; i += 2 * VL) {  // takes what is below 2^-126 for 0
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + VL), _mm512_loadu_ps(from + i));
      std::memcpy(low + i, &both, sizeof both);
    }
#endif
    narrow_bf16(from + i, n - i, low + i);
    return;
  }
  for (int64_t i = 0; i < n; ++i) low[i] = Half::narrow(from[i]);
}

struct Out {
  void* data;
  int dtype;
  int64_t stride, M;
};

#if defined(__AVX512BF16__)
// As `write_block`, a whole block in bf16: rounded to pairs of outputs first, which is half as much to transpose.
void write_pairs(const vf (*sums)[GROUPS], const Out& out, int64_t m0, int64_t o) {
  const __m512i mixed = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int g = 0; g < GROUPS && m0 + g * VL < out.M; ++g) {
    vu square[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i)  // takes what is below 2^-126 for 0
      square[i] = (vu)_mm512_permutexvar_epi16(mixed, (__m512i)_mm512_cvtne2ps_pbh((__m512)sums[2 * i + 1][g], (__m512)sums[2 * i][g]));
    transpose_square(square);
    uint16_t* to = static_cast<uint16_t*>(out.data) + (m0 + g * VL) * out.stride + o;
    const int64_t rows = std::min<int64_t>(VL, out.M - m0 - g * VL);
    for (int64_t i = 0; i < rows; ++i) *reinterpret_cast<vu_unaligned*>(to + i * out.stride) = square[i];
  }
}
#endif

// out[m0 ..][o .. o + count] = the transpose of sums.
void write_block(const vf (*sums)[GROUPS], const Out& out, int64_t m0, int64_t o, int64_t count) {
#if defined(__AVX512BF16__)
  if (out.dtype == BF16 && count == BLOCK) return write_pairs(sums, out, m0, o);
#endif
  alignas(VEC_BYTES) float rows[VL][BLOCK];
  for (int g = 0; g < GROUPS && m0 + g * VL < out.M; ++g) {
    for (int64_t first = 0; first < count; first += VL) {
      vu square[VL];
      for (int i = 0; i < VL; ++i) square[i] = (vu)sums[first + i][g];
      transpose_square(square);
      for (int i = 0; i < VL; ++i) *reinterpret_cast<vu*>(&rows[i][first]) = square[i];
    }
    for (int i = 0; i < VL && m0 + g * VL + i < out.M; ++i)
      write_span(rows[i], count, out.dtype, out.data, (m0 + g * VL + i) * out.stride + o);
  }
}

// rows [count][R] of `dtype` = the transpose of `left` [R][TILE_ROWS].
void store_left(const float* left, int64_t R, int64_t count, int64_t dtype, void* rows) {
  for (int64_t m = 0; m < count; m += VL)
    for (int64_t r = 0; r < R; r += VL) {
      vu square[VL];
      for (int i = 0; i < VL; ++i) square[i] = r + i < R ? *reinterpret_cast<const vu*>(left + (r + i) * TILE_ROWS + m) : vu{};
      transpose_square(square);
      for (int64_t i = 0; i < VL && m + i < count; ++i)
        write_span(reinterpret_cast<const float*>(&square[i]), std::min<int64_t>(VL, R - r), int(dtype), rows, (m + i) * R + r);
    }
}

// What one thread works with: a panel of x, TILE_ROWS rows of the low-rank product, and for gradients a block of the other
// matrix and the factors of those of the low-rank part.
struct Buffers {
  uint32_t *panel, *block, *left_pairs;
  uint16_t *inner, *outer;  // factors of the low-rank term in bf16, where they are multiplied as such
  float *left, *copy, *left_factor, *kept_factor, *rows;
  bool by_rows;  // whether the low-rank product is made of rows of x

  bool get(const Terms& t, int64_t inputs, int64_t outputs, bool pairs) {
    const auto need = [](auto& pointer, Scratch& scratch, int64_t count) {
      using T = std::remove_reference_t<decltype(*pointer)>;
      pointer = count ? scratch.get<T>(count) : nullptr;
      return !count || pointer;
    };
    const int64_t padded = padded_rank(t.R), thin = t.kept ? padded * TILE_ROWS : 0;
    by_rows = pairs && !t.left && t.x_stride_k == 1 && (t.in.stride == 1 || t.in.stride_r == 1);
    return need(panel, panel_scratch, inputs * TILE_ROWS) && need(left_pairs, left_pairs_scratch, (t.R + 1) / 2 * TILE_ROWS) &&
           need(inner, inner_scratch, by_rows ? t.R * narrow_pitch(inputs) : 0) &&
           need(outer, outer_scratch, pairs ? padded * outputs : 0) && need(left, left_scratch, t.R * TILE_ROWS) &&
           need(copy, right_scratch, (t.R + 1) * BLOCK) && need(block, other_scratch, t.other ? BLOCK * TILE_ROWS : 0) &&
           need(rows, rows_scratch, thin) && need(left_factor, left_factor_scratch, thin) && need(kept_factor, kept_scratch, thin);
  }
};

// Rows m0 .. m0 + TILE_ROWS of out, outputs o0 .. o1. Gradients are added to those of the chunk: of the values to values[j] for
// every entry j of these outputs, of the outer factor to outer[o].
template <bool PACKED, bool GRADIENT>
void terms_tile(const Terms& t, const Entries& e, const Buffers& b, Transpose transpose, int64_t m0, int64_t o0, int64_t o1,
                const ChunkSums& chunk) {
  constexpr int WORDS = PACKED ? TILE_ROWS / 2 : TILE_ROWS;
  const Out out{t.out, int(t.out_dtype), t.out_stride, t.M};
  const Matrix other{t.other, t.other_stride_m, t.other_stride_o, t.M};
  const int64_t padded = padded_rank(t.R);
  vf sums[BLOCK][GROUPS];
  Dots dots;
  dots.count = 0;
  if (GRADIENT) dots.to = chunk.values + (e.offsets ? e.offsets[o0] : 0);
  for (int64_t o = o0; o < o1; o += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, o1 - o);
    if (b.outer) low_rank_sums_of_pairs(t, b.left_pairs, b.outer, padded, o, count, sums);
    else if (t.R) low_rank_sums(t, b.left, b.copy, o, count, sums);
    else std::memset(sums, 0, sizeof sums);
    if (GRADIENT && (t.kept || (e.offsets && e.offsets[o] < e.offsets[o + count])))
      transpose(other, m0, WORDS / LINE, o, o + count, nullptr, b.block);
    for (int64_t i = 0; e.offsets && i < count; ++i) {
      const int32_t end = e.offsets[o + i + 1];
      int32_t j = e.offsets[o + i];
      if (j == end) continue;
      vf acc[GROUPS], column[GROUPS];
      for (int g = 0; g < GROUPS; ++g) acc[g] = sums[i][g];
      for (; j < end; ++j) {
        unpack<PACKED>(b.panel, e.index[j], column);
        const vf value = vf{} + e.value[j];
#pragma GCC unroll 16
        for (int g = 0; g < GROUPS; ++g) acc[g] += value * column[g];
        if (GRADIENT) dots.add(column_dots<PACKED>(b.panel + int64_t(e.index[j]) * WORDS, column, b.block + i * WORDS));
      }
      for (int g = 0; g < GROUPS; ++g) sums[i][g] = acc[g];
    }
    if (GRADIENT && t.kept) factor_gradients<PACKED>(b.block, count, b.left_factor, padded, chunk.outer + o * padded);
    write_block(sums, out, m0, o, count);
  }
  if (GRADIENT) dots.flush();
}

// Tiles t0 .. t1 of part `at` of `parts`: a share of the outputs, in whole blocks, and of the inputs for their gradients. Every
// part transposes the rows for itself.
template <bool PACKED>
void terms_chunk(const Terms& t, const Entries& e, const Buffers& b, Transpose transpose, int64_t t0, int64_t t1, int64_t at,
                 int64_t parts, const ChunkSums& chunk) {
  constexpr int WORDS = PACKED ? TILE_ROWS / 2 : TILE_ROWS;
  const Matrix x{t.x, t.x_stride_m, t.x_stride_k, t.M};
  const int64_t blocks = (e.outputs + BLOCK - 1) / BLOCK, padded = padded_rank(t.R);
  const int64_t o0 = blocks * at / parts * BLOCK, o1 = std::min(e.outputs, blocks * (at + 1) / parts * BLOCK);
  // In whole groups: code for one column may round other sums than code for several.
  const int64_t groups = (e.inputs + AT_ONCE - 1) / AT_ONCE;
  const int64_t i0 = std::min(e.inputs, groups * at / parts * AT_ONCE), i1 = std::min(e.inputs, groups * (at + 1) / parts * AT_ONCE);
  if (chunk.values && e.offsets) std::fill(chunk.values + e.offsets[o0], chunk.values + e.offsets[o1], 0.0f);
  if (t.kept) {
    std::fill(chunk.outer + o0 * padded, chunk.outer + o1 * padded, 0.0f);
    std::fill(chunk.inner + i0 * padded, chunk.inner + i1 * padded, 0.0f);
  }
  for (int64_t tile = t0; tile < t1; ++tile) {
    const int64_t m0 = tile * TILE_ROWS, used = std::min<int64_t>(TILE_ROWS, t.M - m0);
    if (e.offsets || t.kept || (t.R && !t.left && !b.by_rows)) transpose(x, m0, WORDS / LINE, 0, e.inputs, nullptr, b.panel);
    if (t.left) given_left(t, m0, b.left);
    else if (b.by_rows) left_of_rows(t, b.inner, narrow_pitch(e.inputs), e.inputs, m0, used, b.left);
    else if (t.R) left_of_panel<PACKED>(t, b.panel, e.inputs, b.left);
    if (b.outer) pair_left(b.left, t.R, b.left_pairs);
    if (t.made && at == 0) store_left(b.left, t.R, used, t.x_dtype, static_cast<char*>(t.made) + m0 * t.R * bytes_of(t.x_dtype));
    if (t.kept) {
      store_left(b.left, t.R, used, t.x_dtype, b.rows);
      pack_factor<PACKED>(b.rows, t.x_dtype, used, t.R, padded, b.left_factor);
      pack_factor<PACKED>(static_cast<const char*>(t.kept) + m0 * t.R * bytes_of(t.x_dtype), t.x_dtype, used, t.R, padded, b.kept_factor);
      factor_gradients<PACKED>(b.panel + i0 * WORDS, i1 - i0, b.kept_factor, padded, chunk.inner + i0 * padded);
    }
    if (t.other) terms_tile<PACKED, true>(t, e, b, transpose, m0, o0, o1, chunk);
    else terms_tile<PACKED, false>(t, e, b, transpose, m0, o0, o1, chunk);
  }
}

}  // namespace

extern "C" {

// What `Terms` says. Each sum is made in the same order whatever `threads`. Returns 0, or 1 without scratch memory.
int rosa_terms(const Rows* rows, const Terms* terms) {
  const Terms& t = *terms;
  Entries e;
  if (!collect(*rows, t.r0, t.r1, t.c0, t.c1, t.transposed, t.other != nullptr, e)) return 1;
  const bool packed = t.x_dtype == BF16;
  const Transpose transpose = pick_transpose(int(t.x_dtype), packed);
  const int64_t tiles = (t.M + TILE_ROWS - 1) / TILE_ROWS;
  Gradients gradients;
  if (!gradients.get(t, e.outputs, e.inputs, e.offsets ? e.offsets[e.outputs] : 0, tiles)) return 1;
  const int64_t chunks = t.other ? gradients.chunks : tiles;
  // Few chunks are shared out.
  const int64_t parts = chunks >= t.threads ? 1 : (t.threads + std::max<int64_t>(1, chunks) - 1) / std::max<int64_t>(1, chunks);
  Rows base = *rows;
  base.values = nullptr;
  int failed = 0;
  const auto check = [&](bool done) {
    if (done) return;
#pragma omp atomic write
    failed = 1;
  };
  Crew crew;
#pragma omp parallel num_threads(int(t.threads)) if (t.threads > 1)
  {
    if (t.tile.data) {
#pragma omp for schedule(static) nowait
      for (int64_t r = t.r0; r < t.r1; ++r) check(write_row(base, r, t.c0, t.c1, t.tile, r - t.r0));
    }
    const bool pairs = packed && PAIRS_OF_RANKS && t.R;
    Buffers buffers;
    const bool got = buffers.get(t, e.inputs, e.outputs, pairs);
    if (got && buffers.by_rows) narrow_inner(t, e.inputs, narrow_pitch(e.inputs), buffers.inner);
    if (got && pairs) narrow_outer(t, e.outputs, padded_rank(t.R), buffers.outer);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < chunks * parts; ++task) {
      const int64_t chunk = task / parts, at = task % parts;
      if (got)
        (packed ? terms_chunk<true> : terms_chunk<false>)(t, e, buffers, transpose, tiles * chunk / chunks, tiles * (chunk + 1) / chunks,
                                                          at, parts, gradients.sums_of(chunk));
      else check(false);
    }
    if (t.other) {
      crew.meet();
      gradients.finish(t, e.origin);  // of no use where something failed
    }
    crew.finish();
  }
  return failed;
}

}  // extern "C"
