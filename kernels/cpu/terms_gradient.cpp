// Gradients of the delta in the same pass over x as the product with S, whose other factor is `other` (x beside dy in the backward
// pass). dS at an entry is the dot product of its column of x and its column of `other`: the product reads the one anyway, and
// goes through the others in order, so that dS costs its multiply-adds alone, without a second pass over panels. An entry takes
// two instructions on 64 rows of bf16, and about three to add up the lanes, VL entries at a time.
//
// The gradients of the low-rank factors are products of the same columns with R thin ones: 2 R multiply-adds of vectors for 64
// rows of a column. A product of a vendor's library reads the matrix once more for each, and wakes its threads.
namespace {

thread_local Scratch other_scratch, gradient_scratch, rows_scratch, left_factor_scratch, kept_scratch;

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

int64_t padded_rank(int64_t R) { return (R + VL - 1) / VL * VL; }

// A thin factor of TILE_ROWS rows in the order of a panel's words, [words][padded] with zeros behind R: of pairs of bf16 the same
// pairs, where they are multiplied as such, else fp32 rows. `count` rows [count][R] of `dtype` are there.
template <bool PACKED>
void pack_factor(const void* rows, int64_t dtype, int64_t count, int64_t R, int64_t padded, float* to) {
  const bool pairs = PACKED && PAIRED;
  std::fill(to, to + (pairs ? TILE_ROWS / 2 : TILE_ROWS) * padded, 0.0f);
  for (int64_t m = 0; m < count; ++m) {
    if (!pairs) {
      for (int64_t r = 0; r < R; ++r) to[m * padded + r] = element(rows, dtype, m * R + r);
      continue;
    }
    // The second half of a word is the row LINE below.
    auto* half = reinterpret_cast<uint16_t*>(to + (m / (2 * LINE) * LINE + m % LINE) * padded) + m / LINE % 2;
    const auto* from = static_cast<const uint16_t*>(rows) + m * R;
    for (int64_t r = 0; r < R; ++r) half[2 * r] = from[r];
  }
}

constexpr int AT_ONCE = 8;  // columns: every vector of the factor serves them all

// to[i][r] += the products of column i of `count`, as words of a panel, and column r of the factor, for COUNT columns.
template <bool PACKED, int COUNT>
INLINE void factor_gradients(const uint32_t* columns, const float* factor, int64_t padded, float* to) {
  constexpr int WORDS = PACKED ? TILE_ROWS / 2 : TILE_ROWS;
  for (int64_t r = 0; r < padded; r += VL) {
    vf acc[COUNT] = {};
    for (int w = 0; w < WORDS; ++w) {
      const int low = PACKED && !PAIRED ? w / LINE * 2 * LINE + w % LINE : w;
      const vf first = *reinterpret_cast<const vf*>(factor + low * padded + r);
      [[maybe_unused]] const vf second = PACKED && !PAIRED ? *reinterpret_cast<const vf*>(factor + (low + LINE) * padded + r) : vf{};
#pragma GCC unroll 8
      for (int i = 0; i < COUNT; ++i) {
        const uint32_t word = columns[i * WORDS + w];
        if (!PACKED) acc[i] += bits_float(word) * first;
#if defined(__AVX512BF16__)
        else acc[i] = (vf)_mm512_dpbf16_ps((__m512)acc[i], (__m512bh)first, (__m512bh)_mm512_set1_epi32(int(word)));
#else
        else acc[i] += bits_float(word << 16) * first + bits_float(word & 0xffff0000u) * second;
#endif
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) *reinterpret_cast<vf*>(to + i * padded + r) += acc[i];
  }
}

template <bool PACKED>
void factor_gradients(const uint32_t* columns, int64_t count, const float* factor, int64_t padded, float* to) {
  constexpr int WORDS = PACKED ? TILE_ROWS / 2 : TILE_ROWS;
  int64_t i = 0;
  for (; i + AT_ONCE <= count; i += AT_ONCE) factor_gradients<PACKED, AT_ONCE>(columns + i * WORDS, factor, padded, to + i * padded);
  for (; i < count; ++i) factor_gradients<PACKED, 1>(columns + i * WORDS, factor, padded, to + i * padded);
}

struct ChunkSums {  // of the values [nnz], in the order of `Entries`, and of the factors [outputs][padded] and [inputs][padded]
  float *values, *outer, *inner;
};

constexpr int64_t CHUNK_WORK = int64_t(1) << 24;  // multiply-adds: what has less is not worth sums of its own

// Sums over M by chunks, each in order: their number goes by the shape alone, so that no sum depends on the number of threads.
struct Gradients {
  int64_t chunks = 1, nnz = 0, outputs = 0, inputs = 0, padded = 0, size = 0;
  float* sums = nullptr;

  bool get(const Terms& t, int64_t to, int64_t from, int64_t entries, int64_t tiles) {
    if (!t.other) return true;
    nnz = entries, outputs = to, inputs = from, padded = t.kept ? padded_rank(t.R) : 0;
    size = (nnz + VL - 1) / VL * VL + (outputs + inputs) * padded;
    const int64_t work = t.M * (nnz + 2 * padded * (outputs + inputs));
    chunks = 8;
    while (chunks > 1 && (2 * chunks > tiles || (chunks - 1) * size > PARTIAL_LIMIT || work < chunks * CHUNK_WORK)) chunks /= 2;
    sums = gradient_scratch.get<float>(chunks * size + 1);
    return sums;
  }

  ChunkSums sums_of(int64_t chunk) const {
    float* at = sums ? sums + chunk * size : nullptr;
    return {at, at + (size - (outputs + inputs) * padded), at + (size - inputs * padded)};
  }

  // Shared out among the threads that call it.
  void finish(const Terms& t, const int32_t* origin) const {
#pragma omp for schedule(static) nowait
    for (int64_t span = 0; span < (nnz + SPAN - 1) / SPAN; ++span) {
      const int64_t j0 = span * SPAN, j1 = std::min(nnz, j0 + SPAN);
      float total[SPAN] = {};
      for (int64_t c = 0; c < chunks; ++c)
        for (int64_t j = j0; j < j1; ++j) total[j - j0] += sums[c * size + j];
      for (int64_t j = j0; j < j1; ++j) t.values_grad[origin ? origin[j] : j] = total[j - j0];
    }
    if (!padded) return;
    factor_sums(sums_of(0).outer, outputs, t.R, t.outer_grad);
    factor_sums(sums_of(0).inner, inputs, t.R, t.inner_grad);
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
