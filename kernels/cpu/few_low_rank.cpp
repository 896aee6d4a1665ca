// What comes before a product with few rows of x: they are widened, and multiplied with the low-rank term's A.
namespace {

thread_local Scratch few_left_scratch, few_input_scratch;

float lane_sum(vf v) {
  float lanes[VL];
  *reinterpret_cast<vf_unaligned*>(lanes) = v;
  for (int half = VL / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

struct LowRankPart {
  const float *A, *B;  // [R, n] and [N, R], the latter from row `first` of the weight on
  int64_t a_stride, b_stride, R, M, first;
  float scale;
  float* left;  // scale (x Aᵀ), transposed: [R][M]
};

// part.left for row m of x, which has n elements; A [R, n].
void low_rank_left(const float* x, int64_t m, int64_t n, const LowRankPart& part) {
  for (int64_t r = 0; r < part.R; r += 4) {
    const int64_t count = std::min<int64_t>(4, part.R - r);
    const float* rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = part.A + (r + std::min(i, count - 1)) * part.a_stride;
    vf sums[8] = {};
    int64_t k = 0;
    for (; k + 2 * VL <= n; k += 2 * VL)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        sums[i] += *reinterpret_cast<const vf_unaligned*>(x + k + i / 4 * VL) * *reinterpret_cast<const vf_unaligned*>(rows[i % 4] + k + i / 4 * VL);
    for (int64_t i = 0; i < count; ++i) {
      float total = lane_sum(sums[i] + sums[i + 4]);
      for (int64_t rest = k; rest < n; ++rest) total += x[rest] * rows[i][rest];
      part.left[(r + i) * part.M + m] = total * part.scale;
    }
  }
}

struct FewInput {
  const void* given;  // [M, n] of any dtype, elements of a row adjacent
  int dtype;
  int64_t given_stride, M, n;
  const float* x;  // the same in fp32
  int64_t stride;
  float* own;  // where that is to be written, or null where x is what was given
  bool low;    // whether products with D(Q) may be those of bf16
};

struct FewOutput {  // [M, N]
  void* y;
  int dtype;
  int64_t stride;
  void put(int64_t m, int64_t n, float v) const {
    const int64_t at = m * stride + n;
    if (dtype == F32) static_cast<float*>(y)[at] = v;
    else static_cast<uint16_t*>(y)[at] = dtype == BF16 ? BFloat::narrow(v) : Half::narrow(v);
  }
};

void few_row(const FewInput& input, int64_t m, const LowRankPart& part) {
  if (input.own) {
    const auto* from = static_cast<const uint16_t*>(input.given) + m * input.given_stride;
    float* to = input.own + m * input.stride;
    if (input.dtype == BF16) widen_span<BFloat>(from, input.n, to);
    else widen_span<Half>(from, input.n, to);
  }
  low_rank_left(input.x + m * input.stride, m, input.n, part);
}

}  // namespace
