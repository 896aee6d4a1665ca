// Product with a sparse matrix, added to what a GEMM of low precision made: out += x Sᵀ, or out += x S.
//
// Rounded into a bf16 weight an early step of S would be lost, and the GEMM takes nothing wider. So the product is made in
// fp32 and the sum rounded once. M is cut into tiles of 64 rows: a column of x is 4 cache lines of a transposed panel, or 2 of
// bf16 pairs (half a MiB for 4096 columns, which stays in L2), and an entry is 64 multiply-adds with it; outputs are
// transposed back by squares of VL. Cost beyond that: one transposition of x, and one pass over out.
namespace {

thread_local Scratch offset_scratch, index_scratch, value_scratch;

constexpr int TILE_ROWS = 64;

struct Entries {  // S by outputs: those of output r are offsets[r] .. offsets[r + 1], with the input and the value of each
  int64_t outputs, inputs;
  int32_t *offsets, *index;
  float* value;
};

float value_at(const Rows& s, int64_t j) {
  return bits_float(s.values_dtype == F32 ? static_cast<const uint32_t*>(s.values)[j]
                    : s.values_dtype == BF16 ? BFloat::widen(static_cast<const uint16_t*>(s.values)[j])
                                             : Half::widen(static_cast<const uint16_t*>(s.values)[j]));
}

// The entries of rows r0 .. r1 and columns c0 .. c1, by rows, or by columns if `transposed` (a counting sort).
bool collect(const Rows& s, int64_t r0, int64_t r1, int64_t c0, int64_t c1, bool transposed, Entries& e) {
  e.outputs = transposed ? c1 - c0 : r1 - r0;
  e.inputs = transposed ? r1 - r0 : c1 - c0;
  const int64_t most = s.row_offsets[r1] - s.row_offsets[r0];
  e.offsets = offset_scratch.get<int32_t>(e.outputs + 2);
  e.index = index_scratch.get<int32_t>(most + 1);
  e.value = value_scratch.get<float>(most + 1);
  if (!e.offsets || !e.index || !e.value) return false;
  std::fill(e.offsets, e.offsets + e.outputs + 2, 0);
  const auto each = [&](auto f) {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t j = s.row_offsets[r]; j < s.row_offsets[r + 1]; ++j)
        if (s.cols[j] >= c0 && s.cols[j] < c1) f(transposed ? s.cols[j] - c0 : r - r0, transposed ? r - r0 : s.cols[j] - c0, j);
  };
  each([&](int64_t output, int64_t, int64_t) { ++e.offsets[output + 2]; });
  for (int64_t i = 0; i < e.outputs; ++i) e.offsets[i + 2] += e.offsets[i + 1];
  each([&](int64_t output, int64_t input, int64_t j) {
    const int32_t to = e.offsets[output + 1]++;
    e.index[to] = int32_t(input);
    e.value[to] = value_at(s, j);
  });
  return true;
}

template <class E>
INLINE void add_span(typename E::T* to, const float* from, int64_t n) {
  float sums[VL];
  for (int64_t i = 0; i < n; ++i) sums[i] = bits_float(E::widen(to[i])) + from[i];
  for (int64_t i = 0; i < n; ++i) to[i] = E::narrow(sums[i]);
}

void add_span_bf16(uint16_t* to, const float* from, int64_t n) {
  float sums[VL];
  if (n < VL) return add_span<BFloat>(to, from, n);
  *reinterpret_cast<vf_unaligned*>(sums) = (vf)BFloat::widen(BFloat::load(to)) + *reinterpret_cast<const vf_unaligned*>(from);
  narrow_bf16(sums, VL, to);
}

// Rows m0 .. m0 + TILE_ROWS of out, outputs o0 .. o1.
template <bool PACKED>
void spmm_tile(const Entries& e, const uint32_t* panel, int64_t m0, int64_t M, int64_t o0, int64_t o1, void* out, int dtype,
               int64_t out_stride) {
  constexpr int GROUPS = TILE_ROWS / VL;
  vf sums[VL][GROUPS];
  for (int64_t o = o0; o < o1; o += VL) {
    const int64_t count = std::min<int64_t>(VL, o1 - o);
    if (e.offsets[o] == e.offsets[o + count]) continue;
    for (int i = 0; i < VL; ++i) {
      vf acc[GROUPS] = {};
      if (i < count)
        for (int32_t j = e.offsets[o + i]; j < e.offsets[o + i + 1]; ++j) {
          const vu* column = reinterpret_cast<const vu*>(panel + int64_t(e.index[j]) * (PACKED ? TILE_ROWS / 2 : TILE_ROWS));
          const vf value = vf{} + e.value[j];
#pragma GCC unroll 16
          for (int g = 0; g < (PACKED ? GROUPS / 2 : GROUPS); ++g) {
            if (!PACKED) {
              acc[g] += value * (vf)column[g];
              continue;
            }
            constexpr int PER_LINE = LINE / VL;  // a line holds the rows of 2 * PER_LINE groups
            const int low = g / PER_LINE * 2 * PER_LINE + g % PER_LINE;
            acc[low] += value * (vf)(column[g] << 16);
            acc[low + PER_LINE] += value * (vf)(column[g] & 0xffff0000u);
          }
        }
      for (int g = 0; g < GROUPS; ++g) sums[i][g] = acc[g];
    }
    for (int g = 0; g < GROUPS; ++g) {
      vu square[VL];
      for (int i = 0; i < VL; ++i) square[i] = (vu)sums[i][g];
      transpose_square(square);
      for (int i = 0; i < VL && m0 + g * VL + i < M; ++i) {
        const int64_t at = (m0 + g * VL + i) * out_stride + o;
        const float* from = reinterpret_cast<const float*>(&square[i]);
        if (dtype == BF16) add_span_bf16(static_cast<uint16_t*>(out) + at, from, count);
        else if (dtype == F16) add_span<Half>(static_cast<uint16_t*>(out) + at, from, count);
        else add_span<Float>(static_cast<uint32_t*>(out) + at, from, count);
      }
    }
  }
}

}  // namespace

extern "C" {

// out [M, outputs] += x [M, inputs] S[r0 .. r1, c0 .. c1]ᵀ, or S itself if `transposed`; elements of a row of out adjacent.
// Each sum is made in the order of the entries, whatever `threads`. Returns 0, or 1 when scratch memory could not be had.
int rosa_spmm(const Rows* rows, int64_t r0, int64_t r1, int64_t c0, int64_t c1, int transposed, const void* x, int x_dtype,
              int64_t x_stride_m, int64_t x_stride_k, int64_t M, void* out, int out_dtype, int64_t out_stride, int threads) {
  if (M == 0 || !rows->values || rows->row_offsets[r0] == rows->row_offsets[r1]) return 0;
  Entries e;
  if (!collect(*rows, r0, r1, c0, c1, transposed, e)) return 1;
  const Matrix a{x, x_stride_m, x_stride_k, M};
  const bool packed = x_dtype == BF16;
  const Transpose transpose = pick_transpose(x_dtype, packed);
  const int64_t tiles = (M + TILE_ROWS - 1) / TILE_ROWS;
  // Few tiles are shared out by outputs, in whole squares, though each part then transposes the rows for itself.
  const int64_t parts = tiles >= threads ? 1 : (threads + tiles - 1) / tiles;
  int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t task = 0; task < tiles * parts; ++task) {
    const int64_t m0 = task / parts * TILE_ROWS, part = task % parts, squares = (e.outputs + VL - 1) / VL;
    uint32_t* panel = panel_scratch.get<uint32_t>(e.inputs * TILE_ROWS);
    if (!panel) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    transpose(a, m0, TILE_ROWS / LINE / (packed ? 2 : 1), 0, e.inputs, nullptr, panel);
    (packed ? spmm_tile<true> : spmm_tile<false>)(e, panel, m0, M, squares * part / parts * VL,
                                                  std::min(e.outputs, squares * (part + 1) / parts * VL), out, out_dtype, out_stride);
  }
  return failed;
}

}  // extern "C"
