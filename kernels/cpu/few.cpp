// A few rows of x times D(Q) + S: the weight is decoded in the L1 cache and never stored.
//
// A low-rank term goes with it: M R K multiply-adds before and M R per row of the weight, where calls of the vendor's library
// would wake its threads twice more.
//
// Any base, by vectors of fp32: every element is decoded once, stored to L1 and read by M / 4 groups of rows. 4-bit codes on
// AVX-512 have code of their own (few_codes.cpp and what follows it in rosa_cpu.cpp).
namespace {

constexpr int WEIGHT_ROWS = 4;  // decoded together: each vector of x serves them all

thread_local Scratch sum_scratch;

// sums[MG][WEIGHT_ROWS] += the products of MG rows of x with WEIGHT_ROWS rows of the weight, over n columns.
template <int MG>
void dot_products(const float* w, const float* x, int64_t x_stride, int64_t n, vf* sums) {
  vf acc[MG][WEIGHT_ROWS];
  for (int m = 0; m < MG; ++m)
    for (int i = 0; i < WEIGHT_ROWS; ++i) acc[m][i] = sums[m * WEIGHT_ROWS + i];
  int64_t k = 0;
  for (; k + VL <= n; k += VL) {
    vf wv[WEIGHT_ROWS];
    for (int i = 0; i < WEIGHT_ROWS; ++i) wv[i] = *reinterpret_cast<const vf*>(w + i * SPAN + k);
    for (int m = 0; m < MG; ++m) {
      const vf xv = *reinterpret_cast<const vf_unaligned*>(x + m * x_stride + k);
      for (int i = 0; i < WEIGHT_ROWS; ++i) acc[m][i] += xv * wv[i];
    }
  }
  for (; k < n; ++k)
    for (int m = 0; m < MG; ++m)
      for (int i = 0; i < WEIGHT_ROWS; ++i) acc[m][i][0] += x[m * x_stride + k] * w[i * SPAN + k];
  for (int m = 0; m < MG; ++m)
    for (int i = 0; i < WEIGHT_ROWS; ++i) sums[m * WEIGHT_ROWS + i] = acc[m][i];
}

struct FewCall {
  int64_t r0, r1, c0, c1;  // the part of the weight
  const void* x;           // [M, c1 - c0]
  int64_t x_dtype, M, x_stride;
  void* y;  // [M, r1 - r0]
  int64_t y_dtype, y_stride;
  const float* A;  // [R, c1 - c0]
  int64_t a_stride;
  const float* B;  // [r1 - r0, R]
  int64_t b_stride, R;
  double scale;
  int64_t threads;
  int64_t low;  // whether fp32 rows may be multiplied in bf16, with D(Q) though not with S
};

using DotProducts = void (*)(const float*, const float*, int64_t, int64_t, vf*);

}  // namespace

extern "C" {

// y[m][r - r0] = sum over c0 <= k < c1 of x[m][k - c0] (D(Q) + S)[r][k], summed in fp32 and rounded once. Where x is bf16, D(Q)
// may be rounded to it too, as a product of that dtype has it. To it comes scale (x Aᵀ) Bᵀ. No element depends on `threads`.
int rosa_few_rows(const Rows* rows, const FewCall* call) {
  const FewCall& c = *call;
  const int64_t r0 = c.r0, r1 = c.r1, c0 = c.c0, c1 = c.c1, M = c.M, R = c.R;
  const DotProducts kernels[] = {nullptr, dot_products<1>, dot_products<2>, dot_products<3>, dot_products<4>};
  if (M == 0) return 0;
  const int64_t columns = c1 - c0;
  LowRankPart part{c.A, c.B, c.a_stride, c.b_stride, R, M, r0, float(c.scale), few_left_scratch.get<float>(R * M + 1)};
  // Rows in fp32 stay where they are.
  const bool low = c.low && c.x_dtype == F32;
  FewInput input{c.x, int(c.x_dtype), c.x_stride, M, columns, static_cast<const float*>(c.x), c.x_stride, nullptr, low};
  if (c.x_dtype != F32) {
    input.stride = (columns + 2 * VL - 1) / VL * VL;
    input.own = few_input_scratch.get<float>(M * input.stride);
    input.x = input.own;
  }
  if (!part.left || (c.x_dtype != F32 && !input.own)) return 1;
  // Zen 5, codes: 40 ns for 1,000 elements and a row of x, 130 for 8, 600 for 64; other bases take longer.
  const int threads = threads_for(9e-6 * double(r1 - r0) * double(columns) * double(4 + M), c.threads);
  const FewOutput output{c.y, int(c.y_dtype), c.y_stride};
#if defined(FEW_FOUR_BIT)
  if (fits_few_fourbit(*rows, r0, r1, c0, c1)) return few_fourbit(*rows, r0, r1, c0, c1, input, output, part, threads);
#endif
  const int64_t blocks = (r1 - r0 + WEIGHT_ROWS - 1) / WEIGHT_ROWS;
  int failed = 0;
  Prologue rows_of_x;
  Crew crew;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
  rows_of_x.run(M, [&](int64_t m) { few_row(input, m, part); });
#pragma omp for schedule(dynamic, 8) nowait
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = r0 + b * WEIGHT_ROWS, count = std::min<int64_t>(WEIGHT_ROWS, r1 - first);
    float* w = row_scratch.get<float>(WEIGHT_ROWS * SPAN);
    vf* sums = sum_scratch.get<vf>(M * WEIGHT_ROWS);
    if (!w || !sums) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    std::memset(sums, 0, M * WEIGHT_ROWS * sizeof(vf));
    if (count < WEIGHT_ROWS) std::memset(w, 0, WEIGHT_ROWS * SPAN * sizeof(float));
    for (int64_t column = c0; column < c1; column += SPAN) {
      const int64_t n = std::min<int64_t>(SPAN, c1 - column);
      for (int64_t i = 0; i < count; ++i) decode_row(*rows, first + i, column, column + n, w + i * SPAN);
      for (int64_t m = 0; m < M; m += 4)
        kernels[std::min<int64_t>(4, M - m)](w, input.x + m * input.stride + (column - c0), input.stride, n, sums + m * WEIGHT_ROWS);
    }
    for (int64_t m = 0; m < M; ++m)
      for (int64_t i = 0; i < count; ++i) {
        float total = lane_sum(sums[m * WEIGHT_ROWS + i]);
        for (int64_t k = 0; k < R; ++k) total += c.B[(first - r0 + i) * c.b_stride + k] * part.left[k * M + m];
        output.put(m, first - r0 + i, total);
      }
  }
  crew.finish();
  }
  return failed;
}

}  // extern "C"
