// x rowsᵀ with few rows, all fp32: the thin product of a low-rank part.
//
// M·R·K multiply-adds out of tiles of 4 x 4 sums, so that 16 of them cost 8 loads; x is read once for each 4 of the R rows, from the
// cache after the first. MKL takes two to four times as long where it has no AVX-512 code for the processor.
namespace {

constexpr int THIN = 4;

// sums[m][r] += the products of THIN rows of x and THIN of `rows` over n columns, n a multiple of VL.
INLINE void thin_tile(const float* const* x, const float* const* rows, int64_t from, int64_t n, float* sums) {
  vf acc[THIN * THIN] = {};
  for (int64_t k = from; k < from + n; k += VL) {
    vf right[THIN];
#pragma GCC unroll 4
    for (int r = 0; r < THIN; ++r) right[r] = *reinterpret_cast<const vf_unaligned*>(rows[r] + k);
#pragma GCC unroll 4
    for (int m = 0; m < THIN; ++m) {
      const vf left = *reinterpret_cast<const vf_unaligned*>(x[m] + k);
#pragma GCC unroll 4
      for (int r = 0; r < THIN; ++r) acc[m * THIN + r] += left * right[r];
    }
  }
  if (VL == THIN * THIN) {
    const vf totals = lane_sums(acc);
    for (int i = 0; i < THIN * THIN; ++i) sums[i] += totals[i];
  } else {
    for (int i = 0; i < THIN * THIN; ++i) sums[i] += lane_sum(acc[i]);
  }
}

}  // namespace

extern "C" {

// out [M, R] = x [M, K] rows [R, K]ᵀ; elements of a row adjacent in each. No element depends on `threads`.
void rosa_thin_product(const float* x, int64_t x_stride, const float* rows, int64_t rows_stride, int64_t M, int64_t R, int64_t K, float* out,
                       int threads) {
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, M * R * K / (1 << 19))));
  const int64_t tiles = (M + THIN - 1) / THIN;
  Crew crew;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 16) nowait
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * THIN, down = std::min<int64_t>(THIN, M - first);
    const float* left[THIN];
    for (int64_t m = 0; m < THIN; ++m) left[m] = x + (first + std::min(m, down - 1)) * x_stride;
    for (int64_t r = 0; r < R; r += THIN) {
      const int64_t across = std::min<int64_t>(THIN, R - r);
      const float* right[THIN];
      for (int64_t i = 0; i < THIN; ++i) right[i] = rows + (r + std::min(i, across - 1)) * rows_stride;
      float sums[THIN * THIN] = {};
      // Long sums in parts, for the sake of their error.
      const int64_t whole = K / VL * VL;
      for (int64_t k = 0; k < whole; k += SPAN) thin_tile(left, right, k, std::min<int64_t>(SPAN, whole - k), sums);
      for (int64_t m = 0; m < down; ++m)
        for (int64_t i = 0; i < across; ++i) {
          float total = sums[m * THIN + i];
          for (int64_t k = whole; k < K; ++k) total += left[m][k] * right[i][k];
          out[(first + m) * R + r + i] = total;
        }
    }
  }
  crew.finish();
  }
}

}  // extern "C"
