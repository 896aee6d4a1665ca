// dS in the same pass over x as the product with S: dS at an entry is the dot product of its column of x with its column of the
// other factor of the weight gradient (dy beside x in the forward direction, x beside dy in the backward one).
//
// The product reads that column of x anyway, and the columns of the other matrix are gone through in order, so that dS costs its
// multiply-adds alone: no second pass over panels, no gathering. An entry takes two instructions on 64 rows of bf16, and about
// three to add up the lanes, VL entries at a time.
namespace {

thread_local Scratch other_scratch, gradient_scratch;

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

// Parts in which M is summed, each in order: by the shape alone, so that no sum depends on the number of threads.
int64_t gradient_chunks(int64_t tiles, int64_t nnz) {
  int64_t chunks = 8;
  while (chunks > 1 && (chunks > tiles || (chunks - 1) * nnz > PARTIAL_LIMIT)) chunks /= 2;
  return chunks;
}

// out[origin[j]] = the sum over chunks of partial[chunk][j].
void add_chunks(const float* partial, int64_t chunks, int64_t nnz, const int32_t* origin, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t j0 = 0; j0 < nnz; j0 += SPAN) {
    const int64_t j1 = std::min(nnz, j0 + SPAN);
    float total[SPAN] = {};
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t j = j0; j < j1; ++j) total[j - j0] += partial[c * nnz + j];
    for (int64_t j = j0; j < j1; ++j) out[origin ? origin[j] : j] = total[j - j0];
  }
}

}  // namespace
