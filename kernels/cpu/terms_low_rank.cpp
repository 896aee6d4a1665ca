// The low-rank part of what a product starts from: both of its products in fp32, out of a panel of x and into the sums.
namespace {

thread_local Scratch left_scratch, right_scratch;

struct Factor {  // element (i, r) lies at data[i * stride + r * stride_r]
  const float* data;
  int64_t stride, stride_r;
};

struct LowRankTerm {  // scale (x in) outᵀ, or scale left outᵀ where x in is given: in [inputs, R], out [outputs, R]
  int64_t R;
  Factor in, out;
  const void* left;  // [M, R], or null
  int64_t left_dtype, left_stride;
  float scale;
};

// Rows m0 .. m0 + TILE_ROWS of scale left, transposed: [R][TILE_ROWS], with zeros below the last row.
void given_left(const LowRankTerm& part, int64_t m0, int64_t M, float* left) {
  for (int64_t m = 0; m < TILE_ROWS; ++m)
    for (int64_t r = 0; r < part.R; ++r)
      left[r * TILE_ROWS + m] = m0 + m < M ? part.scale * element(part.left, part.left_dtype, (m0 + m) * part.left_stride + r) : 0.0f;
}

// The same out of the transposed panel of x: 4 columns of `in` at once, so that every vector of x is unpacked for 4 of them.
template <bool PACKED>
void left_of_panel(const LowRankTerm& part, const uint32_t* panel, int64_t inputs, float* left) {
  for (int64_t r = 0; r < part.R; r += 4) {
    const int64_t count = std::min<int64_t>(4, part.R - r);
    const float* at[4];
    for (int64_t i = 0; i < 4; ++i) at[i] = part.in.data + (r + std::min(i, count - 1)) * part.in.stride_r;
    vf acc[4][GROUPS] = {};
    for (int64_t c = 0; c < inputs; ++c) {
      vf column[GROUPS];
      unpack<PACKED>(panel, c, column);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const vf factor = vf{} + at[i][c * part.in.stride];
#pragma GCC unroll 16
        for (int g = 0; g < GROUPS; ++g) acc[i][g] += factor * column[g];
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int g = 0; g < GROUPS; ++g) *reinterpret_cast<vf*>(left + (r + i) * TILE_ROWS + g * VL) = part.scale * acc[i][g];
  }
}

// sums[i] = left times row o0 + i of `out`, for `count` outputs. `copy` has room for [R][BLOCK].
void low_rank_sums(const LowRankTerm& part, const float* left, float* copy, int64_t o0, int64_t count, vf (*sums)[GROUPS]) {
  Factor out = part.out;
  out.data += o0 * out.stride;
  if (out.stride == 1) {  // rows far apart would lie in one set of the cache
    for (int64_t r = 0; r < part.R; ++r) std::memcpy(copy + r * BLOCK, out.data + r * out.stride_r, count * sizeof(float));
    out = {copy, 1, BLOCK};
  }
  for (int64_t o = 0; o < count; o += 4) {
    const float* at[4];
    for (int64_t i = 0; i < 4; ++i) at[i] = out.data + std::min(o + i, count - 1) * out.stride;
    vf acc[4][GROUPS] = {};
    for (int64_t r = 0; r < part.R; ++r)
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

}  // namespace
