// The low-rank term of a product with few rows of x.
namespace {

thread_local Scratch few_left_scratch;

float lane_sum(vf v) {
  float lanes[VL];
  *reinterpret_cast<vf_unaligned*>(lanes) = v;
  for (int half = VL / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

struct LowRankPart {
  float* left;     // scale (x Aᵀ), transposed: [R][M]
  const float* B;  // [N, R], from row `first` of the weight on
  int64_t b_stride, R, M, first;
};

// part.left for x [M, n] and A [R, n]; false without memory.
bool low_rank_left(const float* x, int64_t M, int64_t x_stride, int64_t n, const float* A, int64_t a_stride, float scale, int threads,
                   LowRankPart& part) {
  part.left = few_left_scratch.get<float>(part.R * M);
  if (!part.left) return false;
  const bool shared = threads > 1 && M * part.R * n > (1 << 21);  // else it is done before the threads are awake
#pragma omp parallel for num_threads(threads) schedule(static) if (shared)
  for (int64_t m = 0; m < M; ++m)
    for (int64_t r = 0; r < part.R; r += 4) {
      const int64_t count = std::min<int64_t>(4, part.R - r);
      const float* rows[4];
      for (int64_t i = 0; i < 4; ++i) rows[i] = A + (r + std::min(i, count - 1)) * a_stride;
      const float* at = x + m * x_stride;
      vf sums[8] = {};
      int64_t k = 0;
      for (; k + 2 * VL <= n; k += 2 * VL)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
          sums[i] += *reinterpret_cast<const vf_unaligned*>(at + k + i / 4 * VL) * *reinterpret_cast<const vf_unaligned*>(rows[i % 4] + k + i / 4 * VL);
      for (int64_t i = 0; i < count; ++i) {
        float total = lane_sum(sums[i] + sums[i + 4]);
        for (int64_t rest = k; rest < n; ++rest) total += at[rest] * rows[i][rest];
        part.left[(r + i) * M + m] = total * scale;
      }
    }
  return true;
}

}  // namespace
