// What is added to a product of low precision, before it: out = x Sᵀ + s (x Aᵀ) Bᵀ, or out = x S + s (x B) A.
//
// Rounded into a bf16 weight an early step of S would be lost, and added to a y that was rounded so would be most of it. So
// both terms are summed in fp32 and rounded by themselves, which keeps a small step as well as a large one, and the GEMM
// starts its sums from there: y is rounded once. A low-rank term inside the GEMM would need a copy of a dense weight with B
// beside it. M is cut into tiles of 64 rows: a column of x is 4 cache lines of a transposed panel, or 2 of bf16 pairs (half a
// MiB for 4096 columns, which stays in L2). An entry of S is 64 multiply-adds with it, about 4 cycles (Zen 5); the low-rank
// term is 64 R per column and per output, at the speed of the multipliers. Outputs are transposed back by squares, in blocks
// of a cache line: the rows of out lie in few sets of the cache, and half a line would be evicted before the other is written.
// Cost beyond that: one transposition of x, and one pass over out. The gradient of S's values may come with it
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

// out[m0 ..][o .. o + count] = the transpose of sums.
void write_block(const vf (*sums)[GROUPS], const Out& out, int64_t m0, int64_t o, int64_t count) {
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

// Rows m0 .. m0 + TILE_ROWS of out, outputs o0 .. o1. `left` and `copy` are null where there is no low-rank part. The gradient is
// added to sums[j] for every entry j of these outputs; `block` has room for BLOCK columns of its other matrix.
template <bool PACKED, bool GRADIENT>
void terms_tile(const Entries& e, const LowRankTerm& part, const uint32_t* panel, const float* left, float* copy, int64_t m0,
                int64_t o0, int64_t o1, const Out& out, const Matrix& other, Transpose transpose, uint32_t* block, float* gradient) {
  constexpr int WORDS = PACKED ? TILE_ROWS / 2 : TILE_ROWS;
  vf sums[BLOCK][GROUPS];
  Dots dots;
  dots.count = 0;
  if (GRADIENT) dots.to = gradient + e.offsets[o0];
  for (int64_t o = o0; o < o1; o += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, o1 - o);
    if (left) low_rank_sums(part, left, copy, o, count, sums);
    else std::memset(sums, 0, sizeof sums);
    if (GRADIENT && e.offsets[o] < e.offsets[o + count]) transpose(other, m0, WORDS / LINE, o, o + count, nullptr, block);
    for (int64_t i = 0; e.offsets && i < count; ++i) {
      const int32_t end = e.offsets[o + i + 1];
      int32_t j = e.offsets[o + i];
      if (j == end) continue;
      vf acc[GROUPS], column[GROUPS];
      for (int g = 0; g < GROUPS; ++g) acc[g] = sums[i][g];
      for (; j < end; ++j) {
        unpack<PACKED>(panel, e.index[j], column);
        const vf value = vf{} + e.value[j];
#pragma GCC unroll 16
        for (int g = 0; g < GROUPS; ++g) acc[g] += value * column[g];
        if (GRADIENT) dots.add(column_dots<PACKED>(panel + int64_t(e.index[j]) * WORDS, column, block + i * WORDS));
      }
      for (int g = 0; g < GROUPS; ++g) sums[i][g] = acc[g];
    }
    write_block(sums, out, m0, o, count);
  }
  if (GRADIENT) dots.flush();
}

using TermsTile = decltype(&terms_tile<false, false>);

}  // namespace

extern "C" {

// out [M, outputs] = x [M, inputs] S[r0 .. r1, c0 .. c1]ᵀ, or S itself if `transposed`, plus scale (x in) outᵀ with `in`
// [inputs, R] and `out` [outputs, R] of any strides, or scale left outᵀ with `left` [M, R] given. Elements of a row of out and
// of left are adjacent. With `gradient`, for the whole of S: gradient[j] = the sum over M of x in the input of entry j times
// `other` [M, outputs], of x's dtype, in its output. Each sum is made in the same order whatever `threads`. Returns 0, or 1
// without scratch memory.
int rosa_terms(const Rows* rows, int64_t r0, int64_t r1, int64_t c0, int64_t c1, int transposed, const void* x, int x_dtype,
                   int64_t x_stride_m, int64_t x_stride_k, int64_t M, void* out, int out_dtype, int64_t out_stride, int64_t R,
                   const float* in, int64_t in_stride, int64_t in_stride_r, const float* right, int64_t right_stride,
                   int64_t right_stride_r, const void* left, int left_dtype, int64_t left_stride, float scale, const void* other,
                   int64_t other_stride_m, int64_t other_stride_o, float* gradient, int threads) {
  Entries e;
  if (!collect(*rows, r0, r1, c0, c1, transposed, gradient != nullptr, e)) return 1;
  const int64_t nnz = e.offsets ? e.offsets[e.outputs] : 0;
  if (nnz == 0) gradient = nullptr;
  if (M == 0) {
    if (gradient) std::fill(gradient, gradient + nnz, 0.0f);
    return 0;
  }
  const LowRankTerm part{R, {in, in_stride, in_stride_r}, {right, right_stride, right_stride_r}, left, left_dtype, left_stride, scale};
  const Matrix a{x, x_stride_m, x_stride_k, M}, beside{other, other_stride_m, other_stride_o, M};
  const Out target{out, out_dtype, out_stride, M};
  const bool packed = x_dtype == BF16;
  const Transpose transpose = pick_transpose(x_dtype, packed);
  const TermsTile run = packed ? gradient ? terms_tile<true, true> : terms_tile<true, false>
                               : gradient ? terms_tile<false, true> : terms_tile<false, false>;
  const int64_t tiles = (M + TILE_ROWS - 1) / TILE_ROWS, chunks = gradient ? gradient_chunks(tiles, nnz) : tiles;
  // Few chunks are shared out by outputs, in whole blocks, though each part then transposes the rows for itself.
  const int64_t parts = chunks >= threads ? 1 : (threads + chunks - 1) / chunks, blocks = (e.outputs + BLOCK - 1) / BLOCK;
  float* partial = gradient ? gradient_scratch.get<float>(chunks * nnz) : nullptr;
  if (gradient && !partial) return 1;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t task = 0; task < chunks * parts; ++task) {
    const int64_t chunk = task / parts, at = task % parts;
    const int64_t o0 = blocks * at / parts * BLOCK, o1 = std::min(e.outputs, blocks * (at + 1) / parts * BLOCK);
    uint32_t* panel = panel_scratch.get<uint32_t>(e.inputs * TILE_ROWS);
    float* tile_left = R ? left_scratch.get<float>(R * TILE_ROWS) : nullptr;
    float* copy = R ? right_scratch.get<float>(R * BLOCK) : nullptr;
    uint32_t* block = gradient ? other_scratch.get<uint32_t>(BLOCK * TILE_ROWS) : nullptr;
    if (!panel || (R && (!tile_left || !copy)) || (gradient && !block)) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    float* sums = gradient ? partial + chunk * nnz : nullptr;
    if (gradient) std::fill(sums + e.offsets[o0], sums + e.offsets[o1], 0.0f);
    for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; ++tile) {
      const int64_t m0 = tile * TILE_ROWS;
      if (e.offsets || (R && !left)) transpose(a, m0, TILE_ROWS / LINE / (packed ? 2 : 1), 0, e.inputs, nullptr, panel);
      if (left) given_left(part, m0, M, tile_left);
      else if (R) (packed ? left_of_panel<true> : left_of_panel<false>)(part, panel, e.inputs, tile_left);
      run(e, part, panel, tile_left, copy, m0, o0, o1, target, beside, transpose, block, sums);
    }
  }
  if (gradient && !failed) add_chunks(partial, chunks, nnz, e.origin, gradient, threads);
  return failed;
}

}  // extern "C"
