// Few rows of x in bf16 times 4-bit codes, in pairs of bf16 that are summed in fp32.
#if defined(FEW_FOUR_BIT) && defined(__AVX512BF16__)
namespace {

// Columns j and j + 1 of the words of a chunk.
INLINE __m512bh decoded_pairs(__m512i codes, int j, __m512 table, __m512 scale) {
  const __m512 a = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, code_shift(j)), table);
  const __m512 b = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, code_shift(j + 1)), table);
  return _mm512_cvtne2ps_pbh(_mm512_mul_ps(b, scale), _mm512_mul_ps(a, scale));
}

INLINE __m512bh pairs_at(const uint16_t* p) { return (__m512bh)_mm512_load_si512(p); }

template <int MG>
void few_pairs(const uint16_t* w, int64_t row, int64_t chunks, const uint16_t* x, __m512* sums, int64_t stride) {
  __m512 acc[4][MG];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int m = 0; m < MG; ++m) acc[i][m] = sums[i * stride + m];
  for (int64_t c = 0; c < chunks * 4; ++c, x += MG * 32, w += 32) {
    __m512bh wv[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) wv[i] = pairs_at(w + i * row);
#pragma GCC unroll 4
    for (int m = 0; m < MG; ++m) {
      const __m512bh xv = pairs_at(x + m * 32);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[i][m] = _mm512_dpbf16_ps(acc[i][m], xv, wv[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int m = 0; m < MG; ++m) sums[i * stride + m] = acc[i][m];
}

using FewPairs = void (*)(const uint16_t*, int64_t, int64_t, const uint16_t*, __m512*, int64_t);
constexpr FewPairs FEW_PAIRS[] = {nullptr, few_pairs<1>, few_pairs<2>, few_pairs<3>, few_pairs<4>};

template <int READING>
void few_decode(const FewProblem& p, int64_t e, int64_t begin, int64_t n, uint16_t* to) {
  const __m512 table = _mm512_loadu_ps(p.s->table);
  const __m512i blocks = blocks_of_words(p, e);
  for (int64_t c = begin; c < begin + n; ++c, to += CODES) {
    const int words = READING == ANY ? words_of(p, c) : 16;
    const __m512i codes = chunk_codes<READING>(p, e + c * CODES, words);
    expect_chunk(p, e + c * CODES, BF16_ROWS);
    const __m512 scale = chunk_scales<READING>(p, e + c * CODES, words, blocks);
#pragma GCC unroll 4
    for (int j = 0; j < 8; j += 2) _mm512_store_si512(to + j * 16, (__m512i)decoded_pairs(codes, j, table, scale));
  }
}

// As few_products, with x in bf16: decoded, scaled and rounded in registers for all of at most 8 rows of x.
template <int MG, int READING>
void few_pair_products(const FewProblem& p, const int64_t* e, int64_t begin, int64_t end, const uint16_t* x, __m512* sums) {
  const __m512 table = _mm512_loadu_ps(p.s->table);
  const __m512i blocks[2] = {blocks_of_words(p, e[0]), blocks_of_words(p, e[1])};
  __m512 acc[2][MG];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < MG; ++m) acc[i][m] = sums[i * MG + m];
  for (int64_t c = begin; c < end; ++c) {
    const int words = READING == ANY ? words_of(p, c) : 16;
    __m512i codes[2];
    __m512 scale[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      codes[i] = chunk_codes<READING>(p, e[i] + c * CODES, words);
      expect_chunk(p, e[i] + c * CODES, 2);
      scale[i] = chunk_scales<READING>(p, e[i] + c * CODES, words, blocks[i]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 8; j += 2, x += MG * 32) {
      __m512bh w[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) w[i] = decoded_pairs(codes[i], j, table, scale[i]);
#pragma GCC unroll 8
      for (int m = 0; m < MG; ++m) {
        const __m512bh xv = pairs_at(x + m * 32);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) acc[i][m] = _mm512_dpbf16_ps(acc[i][m], xv, w[i]);
      }
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < MG; ++m) sums[i * MG + m] = acc[i][m];
}

using FewPairProducts = void (*)(const FewProblem&, const int64_t*, int64_t, int64_t, const uint16_t*, __m512*);
#define FEW_PAIR_PRODUCTS_BY_ROWS(R) {few_pair_products<5, R>, few_pair_products<6, R>, few_pair_products<7, R>, few_pair_products<8, R>}
constexpr FewPairProducts FEW_PAIR_PRODUCTS[][4] = {FEW_PAIR_PRODUCTS_BY_ROWS(0), FEW_PAIR_PRODUCTS_BY_ROWS(1), FEW_PAIR_PRODUCTS_BY_ROWS(2)};

void few_bf16_at_once(const FewProblem& p, int64_t first, int64_t count, const uint16_t* x, __m512* sums) {
  for (int64_t begin = 0; begin < p.chunks; begin += 2 * SPAN_CHUNKS) {
    const int64_t end = std::min<int64_t>(p.chunks, begin + 2 * SPAN_CHUNKS);
    for (int64_t i = 0; i < count; i += 2) {
      const int64_t e[] = {(first + i) * p.s->K + p.c0, (first + std::min(i + 1, count - 1)) * p.s->K + p.c0};
      FEW_PAIR_PRODUCTS[reading_of(p, e[0], e[1], end)][p.M - 5](p, e, begin, end, x + begin * 4 * p.M * 32, sums + i * p.M);
    }
  }
}

using FewDecoder = void (*)(const FewProblem&, int64_t, int64_t, int64_t, uint16_t*);
constexpr FewDecoder FEW_DECODERS[] = {few_decode<SMALL_BLOCKS>, few_decode<LARGE_BLOCKS>, few_decode<ANY>};

void few_bf16(const FewProblem& p, int64_t first, int64_t count, const uint16_t* x, uint16_t* decoded, __m512* sums) {
  constexpr int64_t row = SPAN_CHUNKS * CODES;
  for (int64_t at = 0; at < count; at += BF16_ROWS) {
    const int64_t rows = std::min<int64_t>(BF16_ROWS, count - at);
    for (int64_t begin = 0; begin < p.chunks; begin += SPAN_CHUNKS) {
      const int64_t n = std::min<int64_t>(SPAN_CHUNKS, p.chunks - begin);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t e = (first + at + i) * p.s->K + p.c0;
        FEW_DECODERS[reading_of(p, e, e, begin + n)](p, e, begin, n, decoded + i * row);
      }
      for (int64_t m = 0; m < p.M; m += 4)
        for (int64_t i = 0; i < rows; i += 4)  // rows beyond the last: what is left there; their sums land in padding
          FEW_PAIRS[std::min<int64_t>(4, p.M - m)](decoded + i * row, row, n, x + few_place(p, m, begin, 4, 4) * 32,
                                                   sums + (at + i) * p.M + m, p.M);
    }
  }
}

}  // namespace
#endif
