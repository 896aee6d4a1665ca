// Gradients of the delta in the same pass over x as the product with S, whose other factor is `other` (x beside dy in the backward
// pass). dS at an entry is the dot product of its column of x and its column of `other`: the product reads the one anyway, and
// goes through the others in order, so that dS costs its multiply-adds alone, without a second pass over panels. An entry takes
// two instructions on 64 rows of bf16, and about three to add up the lanes, VL entries at a time.
//
// The gradients of the low-rank factors are dot products of the same columns with R thin ones: 2 R + 3 VL instructions for 64
// rows of a column. A product of a vendor's library reads the matrix once more for each, and wakes its threads.
namespace {

thread_local Scratch other_scratch, gradient_scratch, rows_scratch, left_words_scratch, kept_scratch;

// Sums of entries that follow one another.
struct Dots {
  vf pending[VL];
  int count;
  float* to;  // where the next VL go

  INLINE_MEMBER void add(vf sums) {
    pending[count++] = sums;
    if (count < VL) return;
    *reinterpret_cast<vf_unaligned*>(to) += lane_sums(pending);
    to += VL;
    count = 0;
  }
  void flush() {  // in the same order, or a sum would depend on where its group ends
    for (int i = count; i < VL; ++i) pending[i] = vf{};
    const vf sums = lane_sums(pending);
    for (int i = 0; i < count; ++i) to[i] += sums[i];
    count = 0;
  }
};

// TILE_ROWS products of a column of x, as words of its panel and unpacked, and of one of the other matrix, in VL sums.
template <bool PACKED>
INLINE vf column_dots(const uint32_t* words, const vf* column, const uint32_t* other) {
  vf sum{};
#if defined(__AVX512BF16__)
  if (PACKED) {
#pragma GCC unroll 16
    for (int g = 0; g < GROUPS / 2; ++g)
      sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh) reinterpret_cast<const vu*>(words)[g],
                                 (__m512bh) reinterpret_cast<const vu*>(other)[g]);
    return sum;
  }
#endif
  vf beside[GROUPS];
  unpack<PACKED>(other, 0, beside);
#pragma GCC unroll 16
  for (int g = 0; g < GROUPS; ++g) sum += column[g] * beside[g];
  return sum;
}

// to[r] += the products of a column, as words of its panel, and of each of the factors' columns.
template <bool PACKED>
INLINE void factor_gradient(const uint32_t* words, const uint32_t* factors, int64_t padded, float* to) {
  constexpr int WORDS = PACKED ? TILE_ROWS / 2 : TILE_ROWS;
  vf column[GROUPS];
  unpack<PACKED>(words, 0, column);  // dropped where pairs are multiplied
  for (int64_t r = 0; r < padded; r += VL) {
    vf sums[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) sums[i] = column_dots<PACKED>(words, column, factors + (r + i) * WORDS);
    *reinterpret_cast<vf*>(to + r) += lane_sums(sums);
  }
}

int64_t padded_rank(int64_t R) { return (R + VL - 1) / VL * VL; }

struct ChunkSums {  // of the values [nnz], in the order of `Entries`, and of the factors [outputs][padded] and [inputs][padded]
  float *values, *outer, *inner;
};

// Sums over M by chunks, each in order: their number goes by the shape alone, so that no sum depends on the number of threads.
struct Gradients {
  int64_t chunks = 1, nnz = 0, outputs = 0, inputs = 0, padded = 0, size = 0;
  float* sums = nullptr;

  bool get(const Terms& t, int64_t to, int64_t from, int64_t entries, int64_t tiles) {
    if (!t.other) return true;
    nnz = entries, outputs = to, inputs = from, padded = t.kept ? padded_rank(t.R) : 0;
    size = (nnz + VL - 1) / VL * VL + (outputs + inputs) * padded;
    chunks = 8;
    while (chunks > 1 && (2 * chunks > tiles || (chunks - 1) * size > PARTIAL_LIMIT)) chunks /= 2;
    sums = gradient_scratch.get<float>(chunks * size + 1);
    return sums;
  }

  ChunkSums sums_of(int64_t chunk) const {
    float* at = sums ? sums + chunk * size : nullptr;
    return {at, at + (size - (outputs + inputs) * padded), at + (size - inputs * padded)};
  }

  void finish(const Terms& t, const int32_t* origin) const {
    const int64_t spans = (nnz + SPAN - 1) / SPAN;
#pragma omp parallel num_threads(int(t.threads)) if (t.threads > 1 && chunks * size > 1 << 16)
    {
#pragma omp for schedule(static) nowait
      for (int64_t span = 0; span < spans; ++span) {
        const int64_t j0 = span * SPAN, j1 = std::min(nnz, j0 + SPAN);
        float total[SPAN] = {};
        for (int64_t c = 0; c < chunks; ++c)
          for (int64_t j = j0; j < j1; ++j) total[j - j0] += sums[c * size + j];
        for (int64_t j = j0; j < j1; ++j) t.values_grad[origin ? origin[j] : j] = total[j - j0];
      }
      if (padded) {
        factor_sums(sums_of(0).outer, outputs, t.R, t.outer_grad);
        factor_sums(sums_of(0).inner, inputs, t.R, t.inner_grad);
      }
    }
  }

 private:
  void factor_sums(const float* first, int64_t count, int64_t R, const MutableFactor& to) const {
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < (count + VL - 1) / VL; ++block)
      for (int64_t r = 0; r < R; r += VL) {
        const int64_t i0 = block * VL, down = std::min<int64_t>(VL, count - i0), across = std::min<int64_t>(VL, R - r);
        alignas(VEC_BYTES) float total[VL][VL];
        for (int64_t i = 0; i < down; ++i) {
          vf sum{};
          for (int64_t c = 0; c < chunks; ++c) sum += *reinterpret_cast<const vf*>(first + c * size + (i0 + i) * padded + r);
          *reinterpret_cast<vf*>(total[i]) = sum;
        }
        for (int64_t k = 0; k < across; ++k)
          for (int64_t i = 0; i < down; ++i) to.data[(i0 + i) * to.stride + (r + k) * to.stride_r] = total[i][k];
      }
  }
};

}  // namespace
