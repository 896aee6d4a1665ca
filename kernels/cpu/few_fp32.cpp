// Few rows of x times 4-bit codes, in fp32.
#if defined(FEW_FOUR_BIT)
namespace {

// sums[i][m] += the products of MG rows of x with rows e[0] .. e[WR - 1] of the weight, over the chunks begin .. end.
template <int MG, int WR, int READING>
void few_products(const FewProblem& p, const int64_t* e, int64_t begin, int64_t end, const float* x, __m512* sums, int64_t stride) {
  const __m512 table = _mm512_loadu_ps(p.s->table);
  __m512 acc[WR][MG];
  __m512i blocks[WR];
#pragma GCC unroll 8
  for (int i = 0; i < WR; ++i) blocks[i] = blocks_of_words(p, e[i]);
#pragma GCC unroll 8
  for (int i = 0; i < WR; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < MG; ++m) acc[i][m] = sums[i * stride + m];
  for (int64_t c = begin; c < end; ++c) {
    const int words = READING == ANY ? words_of(p, c) : 16;
    __m512i codes[WR];
    __m512 scale[WR], part[WR];
#pragma GCC unroll 8
    for (int i = 0; i < WR; ++i) {
      codes[i] = chunk_codes<READING>(p, e[i] + c * CODES, words);
      expect_chunk(p, e[i] + c * CODES, WR);
      scale[i] = chunk_scales<READING>(p, e[i] + c * CODES, words, blocks[i]);
      part[i] = _mm512_setzero_ps();
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j, x += MG * 16) {
      __m512 w[WR];
#pragma GCC unroll 8
      for (int i = 0; i < WR; ++i) {
        w[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes[i], code_shift(j)), table);
        if (MG > 1) w[i] = _mm512_mul_ps(w[i], scale[i]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < MG; ++m) {
        const __m512 xv = _mm512_load_ps(x + m * 16);
#pragma GCC unroll 8
        for (int i = 0; i < WR; ++i) {
          if (MG > 1) acc[i][m] = _mm512_fmadd_ps(xv, w[i], acc[i][m]);
          else part[i] = _mm512_fmadd_ps(xv, w[i], part[i]);
        }
      }
    }
    if (MG == 1)
#pragma GCC unroll 8
      for (int i = 0; i < WR; ++i) acc[i][0] = _mm512_fmadd_ps(part[i], scale[i], acc[i][0]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < WR; ++i)
#pragma GCC unroll 8
    for (int m = 0; m < MG; ++m) sums[i * stride + m] = acc[i][m];
}

constexpr int CHUNKS_AHEAD = 16;  // further ahead, what is waited for drives x out of the L1 cache

// Bytes from the end of what is read of row first + i, the chunks begin .. end, to the beginning of what is read after it.
int64_t few_jump(const FewProblem& p, int64_t first, int64_t count, int64_t i, int64_t step, int64_t begin, int64_t end) {
  const int64_t row = p.s->K / 2, length = (end - begin) * CODES / 2;
  if (i + step < count) return step * row - length;
  if (end < p.chunks) return -i * row;
  return p.next_first < p.r1 ? (p.next_first - first - i) * row - end * CODES / 2 : -length;
}

// As few_products<1, 8>, of 8 rows that follow one another and begin alike within a block. jump: as few_jump has it.
template <int READING>
void few_products_of_one(const FewProblem& p, int64_t e, int64_t begin, int64_t end, const float* x, __m512* sums, int64_t jump) {
  constexpr int WR = 8;
  const __m512 table = _mm512_loadu_ps(p.s->table);
  const __m512i blocks = blocks_of_words(p, e);
  const int64_t row = p.s->K / 2, scale_row = p.s->K >> p.shift;
  const uint8_t* codes_at = static_cast<const uint8_t*>(p.s->data) + (e + begin * CODES) / 2;
  __m512 acc[WR];
#pragma GCC unroll 8
  for (int i = 0; i < WR; ++i) acc[i] = sums[i];
  for (int64_t c = begin; c < end; ++c, x += CODES, codes_at += CODES / 2) {
    const float* scales = p.scales_at(e + c * CODES);
    const int64_t ahead = CHUNKS_AHEAD * CODES / 2 + (c + CHUNKS_AHEAD < end ? 0 : jump);
    __m512i codes[WR];
    __m512 part[WR];
#pragma GCC unroll 8
    for (int i = 0; i < WR; ++i) {
      codes[i] = _mm512_loadu_si512(codes_at + i * row);
      _mm_prefetch(codes_at + i * row + ahead, _MM_HINT_NTA);
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512 xv = _mm512_load_ps(x + j * 16);
#pragma GCC unroll 8
      for (int i = 0; i < WR; ++i) {
        const __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(codes[i], code_shift(j)), table);
        part[i] = j ? _mm512_fmadd_ps(xv, w, part[i]) : _mm512_mul_ps(xv, w);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < WR; ++i) {
      const float* at = scales + i * scale_row;
      const __m512 scale = READING == LARGE_BLOCKS ? _mm512_set1_ps(*at) : _mm512_permutexvar_ps(blocks, _mm512_loadu_ps(at));
      acc[i] = _mm512_fmadd_ps(part[i], scale, acc[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < WR; ++i) sums[i] = acc[i];
}

using FewProducts = void (*)(const FewProblem&, const int64_t*, int64_t, int64_t, const float*, __m512*, int64_t);
#define FEW_PRODUCTS_BY_ROWS(R)                                                                                          \
  {nullptr,               few_products<1, 8, R>, few_products<2, 4, R>, few_products<3, 4, R>, few_products<4, 4, R>, \
   few_products<5, 2, R>, few_products<6, 2, R>, few_products<7, 2, R>, few_products<8, 2, R>}
constexpr FewProducts FEW_PRODUCTS[][GROUP_ROWS + 1] = {FEW_PRODUCTS_BY_ROWS(0), FEW_PRODUCTS_BY_ROWS(1), FEW_PRODUCTS_BY_ROWS(2)};

void few_fp32(const FewProblem& p, int64_t first, int64_t count, const float* x, __m512* sums) {
  const int64_t span = SPAN_CHUNKS * GROUP_ROWS / std::min<int64_t>(GROUP_ROWS, p.M);
  for (int64_t begin = 0; begin < p.chunks; begin += span) {
    const int64_t end = std::min(p.chunks, begin + span);
    for (int64_t m = 0; m < p.M; m += GROUP_ROWS) {
      const int rows = int(std::min<int64_t>(GROUP_ROWS, p.M - m)), step = rows == 1 ? 8 : rows > 4 ? 2 : 4;
      for (int64_t i = 0; i < count; i += step) {
        int64_t e[8];  // the last rows again where there are fewer; their sums land in padding
        for (int k = 0; k < step; ++k) e[k] = (first + std::min(i + k, count - 1)) * p.s->K + p.c0;
        const Reading reading = reading_of(p, e[0], e[step - 1], end);
        if (rows == 1 && p.M == 1 && i + step <= count && reading != ANY && p.s->K % p.s->blocksize == 0) {
          const bool last = i + step >= count;
          const int64_t next = last ? p.next_first : first + i + step;
          if (next < p.r1 && (last ? end == p.chunks : begin == 0)) expect_beside(p, next, std::min(next + step, p.r1));
          (reading == LARGE_BLOCKS ? few_products_of_one<LARGE_BLOCKS> : few_products_of_one<SMALL_BLOCKS>)(
              p, e[0], begin, end, x + few_place(p, m, begin, 8, GROUP_ROWS) * 16, sums + i,
              few_jump(p, first, count, i, step, begin, end));
          continue;
        }
        FEW_PRODUCTS[reading][rows](p, e, begin, end, x + few_place(p, m, begin, 8, GROUP_ROWS) * 16, sums + i * p.M + m, p.M);
      }
    }
  }
}

}  // namespace
#endif
