// The low-rank part of what a product starts from: both of its products in fp32, out of a panel of x and into the sums.
namespace {

thread_local Scratch left_scratch, right_scratch, left_pairs_scratch, inner_scratch, outer_scratch;

template <class T>
struct FactorOf {  // element (i, r) lies at data[i * stride + r * stride_r]
  T* data;
  int64_t stride, stride_r;
};
using Factor = FactorOf<const float>;
using MutableFactor = FactorOf<float>;

// A call: out [M, outputs] = x [M, inputs] S[r0 .. r1, c0 .. c1]ᵀ, or S itself if `transposed`, plus scale (x in) outᵀ with `in`
// [inputs, R] and `right` [outputs, R] of any strides, or plus scale left rightᵀ with `left` [M, R] given, elements of a row
// adjacent. Rows of out are adjacent elements. `made` [M, R], where given, becomes scale (x in), in x's dtype.
//
// Gradients, where `other` [M, outputs] of x's dtype is given, of the whole weight: values_grad[j] = the sum over M of x in the
// input of entry j of S times `other` in its output. With `kept` [M, R] of x's dtype also inner_grad [inputs, R] = xᵀ kept, that of
// `in`, and outer_grad [outputs, R] = otherᵀ scale (x in), that of `right`.
//
// `tile`, where given, becomes that part of D(Q): it is written by the threads that are there anyway.
struct Terms {
  int64_t r0, r1, c0, c1, transposed, M;
  const void* x;
  int64_t x_dtype, x_stride_m, x_stride_k;
  void* out;
  int64_t out_dtype, out_stride, R;
  Factor in, right;  // of the inputs and of the outputs
  const void* left;
  int64_t left_dtype, left_stride;
  double scale;
  void* made;
  const void* other;
  int64_t other_stride_m, other_stride_o;
  const void* kept;
  float* values_grad;
  MutableFactor inner_grad, outer_grad;
  DecodedTile tile;
  int64_t threads;
};

// Rows m0 .. m0 + TILE_ROWS of scale left, transposed: [R][TILE_ROWS], with zeros below the last row.
void given_left(const Terms& t, int64_t m0, float* left) {
  for (int64_t m = 0; m < TILE_ROWS; ++m)
    for (int64_t r = 0; r < t.R; ++r)
      left[r * TILE_ROWS + m] = m0 + m < t.M ? float(t.scale) * element(t.left, t.left_dtype, (m0 + m) * t.left_stride + r) : 0.0f;
}

// The same out of the transposed panel of x: 4 columns of `in` at once, so that every vector of x is unpacked for 4 of them.
template <bool PACKED>
void left_of_panel(const Terms& t, const uint32_t* panel, int64_t inputs, float* left) {
  for (int64_t r = 0; r < t.R; r += 4) {
    const int64_t count = std::min<int64_t>(4, t.R - r);
    const float* at[4];
    for (int64_t i = 0; i < 4; ++i) at[i] = t.in.data + (r + std::min(i, count - 1)) * t.in.stride_r;
    vf acc[4][GROUPS] = {};
    for (int64_t c = 0; c < inputs; ++c) {
      vf column[GROUPS];
      unpack<PACKED>(panel, c, column);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const vf factor = vf{} + at[i][c * t.in.stride];
#pragma GCC unroll 16
        for (int g = 0; g < GROUPS; ++g) acc[i][g] += factor * column[g];
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int g = 0; g < GROUPS; ++g) *reinterpret_cast<vf*>(left + (r + i) * TILE_ROWS + g * VL) = float(t.scale) * acc[i][g];
  }
}

// sums[i] = left times row o0 + i of `out`, for `count` outputs. `copy` has room for [R][BLOCK].
void low_rank_sums(const Terms& t, const float* left, float* copy, int64_t o0, int64_t count, vf (*sums)[GROUPS]) {
  Factor out = t.right;
  out.data += o0 * out.stride;
  if (out.stride == 1) {  // rows far apart would lie in one set of the cache
    for (int64_t r = 0; r < t.R; ++r) std::memcpy(copy + r * BLOCK, out.data + r * out.stride_r, count * sizeof(float));
    out = {copy, 1, BLOCK};
  }
  for (int64_t o = 0; o < count; o += 4) {
    const float* at[4];
    for (int64_t i = 0; i < 4; ++i) at[i] = out.data + std::min(o + i, count - 1) * out.stride;
    vf acc[4][GROUPS] = {};
    for (int64_t r = 0; r < t.R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const vf factor = vf{} + at[i][r * out.stride_r];
#pragma GCC unroll 16
        for (int g = 0; g < GROUPS; ++g) acc[i][g] += factor * *reinterpret_cast<const vf*>(left + r * TILE_ROWS + g * VL);
      }
    for (int i = 0; i < 4; ++i)
      for (int g = 0; g < GROUPS; ++g) sums[o + i][g] = acc[i][g];
  }
}

int64_t narrow_pitch(int64_t inputs) { return (inputs + 2 * VL - 1) / (2 * VL) * 2 * VL; }

int64_t bytes_of(int64_t dtype) { return dtype == F32 ? 4 : 2; }

}  // namespace
