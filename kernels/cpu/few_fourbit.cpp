// A few rows of x times 4-bit codes in registers, on AVX-512.
//
// 128 codes are one vector of 16 words: word i holds the columns 8 i .. 8 i + 7, and a shift and a look-up take the j-th column of
// every word. x is brought into that order once per call, so codes are never put into theirs. Cost per 16 elements of the weight:
// a load of 8 bytes, a shift, a look-up, and
//   M = 1        one multiply-add; the sum of 8 is scaled, not every element.
//   fp32         a multiplication by the scale, and per row of x a load and a multiply-add; decoded anew for each 8 rows of x, which
//                other ports do while the multiply-adds take 8 cycles.
//   bf16         scaling and half a rounding, and half a load and half a `vdpbf16ps` per row of x; beyond 8 rows decoded once, and stored.
// S is added apart: nnz entries times M, from x transposed.
#if defined(__AVX512F__) && defined(__AVX512BW__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FEW_FOUR_BIT 1
namespace {

constexpr int CODES = 128;       // columns in a vector of codes
constexpr int SPAN_CHUNKS = 8;   // columns gone through at once: 8 rows of x, or 16 decoded rows in bf16, are 32 KiB
constexpr int GROUP_ROWS = 8;    // rows of x that share a decoded vector of fp32
constexpr int FEW_BLOCK = 32;    // rows of the weight per task
constexpr int BF16_ROWS = 16;    // of those, decoded together

thread_local Scratch few_x_scratch, few_columns_scratch, few_sums_scratch, few_totals_scratch, few_block_scratch;

// The j-th column of a word is in the high half of byte j / 2 if j is even.
constexpr int code_shift(int j) { return j / 2 * 8 + (j % 2 ? 0 : 4); }

bool fits_few_fourbit(const Rows& s, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
  return s.kind == FOUR_BIT && s.K % 8 == 0 && c0 % 8 == 0 && c1 % 8 == 0 && c1 > c0 && r1 > r0 && s.blocksize >= 8;
}

struct FewProblem {
  const Rows* s;
  int64_t r0, r1, c0, c1, M, chunks, blocks;
  int shift;  // log2 of the blocksize
};

// How the codes and scales of a run of chunks are read.
enum Reading {
  SMALL_BLOCKS,  // of 128 elements or less: the blocks of the words are the same in each chunk, from its first block on
  LARGE_BLOCKS,  // one block per chunk
  ANY,           // and what ends within a chunk or near the end of the scales
};

INLINE __m512i blocks_of_words(const FewProblem& p, int64_t e) {
  const __m512i words = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int64_t offset = (e & ((int64_t(1) << p.shift) - 1)) >> 3;
  return _mm512_srl_epi32(_mm512_add_epi32(words, _mm512_set1_epi32(int(offset))), _mm_cvtsi32_si128(p.shift - 3));
}

// Codes of a chunk, whose flat weight begins at element e; `words` of 16 belong to the row.
template <int READING>
INLINE __m512i chunk_codes(const FewProblem& p, int64_t e, int words) {
  const void* at = static_cast<const uint8_t*>(p.s->data) + e / 2;
  return READING != ANY || words >= 16 ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi32(__mmask16((1u << words) - 1), at);
}

template <int READING>
INLINE __m512 chunk_scales(const FewProblem& p, int64_t e, int words, __m512i blocks) {
  const float* at = p.s->scales + (e >> p.shift);
  if (READING == LARGE_BLOCKS) return _mm512_set1_ps(*at);
  if (READING == SMALL_BLOCKS) return _mm512_permutexvar_ps(blocks, _mm512_loadu_ps(at));
  const int64_t have = p.blocks - (e >> p.shift);
  const __m512 scales = have >= 16 ? _mm512_loadu_ps(at) : _mm512_maskz_loadu_ps(__mmask16((1u << have) - 1), at);
  // A scale that is NaN, of the next row, would spoil the sum.
  return _mm512_maskz_permutexvar_ps(__mmask16((1u << words) - 1), blocks_of_words(p, e), scales);
}

// For the chunks begin .. end of rows that begin at element `first`, the last of them at `last`.
Reading reading_of(const FewProblem& p, int64_t first, int64_t last, int64_t end) {
  const bool whole = end * CODES <= p.c1 - p.c0;
  if (whole && p.shift >= 7 && first % CODES == 0 && p.s->K % CODES == 0) return LARGE_BLOCKS;
  return whole && p.shift <= 7 && ((last + (end - 1) * CODES) >> p.shift) + 16 <= p.blocks ? SMALL_BLOCKS : ANY;
}

INLINE int words_of(const FewProblem& p, int64_t chunk) { return int(std::min<int64_t>(CODES, p.c1 - p.c0 - chunk * CODES) / 8); }

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

using FewProducts = void (*)(const FewProblem&, const int64_t*, int64_t, int64_t, const float*, __m512*, int64_t);
#define FEW_PRODUCTS_BY_ROWS(R)                                                                                          \
  {nullptr,               few_products<1, 8, R>, few_products<2, 4, R>, few_products<3, 4, R>, few_products<4, 4, R>, \
   few_products<5, 2, R>, few_products<6, 2, R>, few_products<7, 2, R>, few_products<8, 2, R>}
constexpr FewProducts FEW_PRODUCTS[][GROUP_ROWS + 1] = {FEW_PRODUCTS_BY_ROWS(0), FEW_PRODUCTS_BY_ROWS(1), FEW_PRODUCTS_BY_ROWS(2)};

// Where x lies in the order of the codes: groups of `group` rows, within one by chunks, by j, by rows.
INLINE int64_t few_place(const FewProblem& p, int64_t m, int64_t chunk, int per_chunk, int group) {
  const int64_t first = m / group * group, rows = std::min<int64_t>(group, p.M - first);
  return first * p.chunks * per_chunk + chunk * per_chunk * rows + (m - first);
}

// Rows of x in a group. In bf16 up to 8 rows are multiplied with what is decoded in registers, and more with 4 decoded rows.
INLINE int few_group(const FewProblem& p, bool pairs) { return pairs && p.M > GROUP_ROWS ? 4 : GROUP_ROWS; }

template <bool BF16_PAIRS>
void few_arrange(const FewProblem& p, const float* x, int64_t m, int64_t chunk, void* to) {
  const int words = words_of(p, chunk);
  const __m512i at = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
  const int64_t group = few_group(p, BF16_PAIRS), rows = std::min<int64_t>(group, p.M - m / group * group);
  __m512 v[8];
  for (int j = 0; j < 8; ++j)
    v[j] = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), __mmask16((1u << words) - 1), at, x + chunk * CODES + j, 4);
  const int64_t place = few_place(p, m, chunk, BF16_PAIRS ? 4 : 8, int(group));
  if (!BF16_PAIRS) {
    for (int j = 0; j < 8; ++j) _mm512_store_ps(static_cast<float*>(to) + (place + j * rows) * 16, v[j]);
    return;
  }
#if defined(__AVX512BF16__)
  for (int j = 0; j < 4; ++j)
    _mm512_store_si512(static_cast<uint16_t*>(to) + (place + j * rows) * 32, (__m512i)_mm512_cvtne2ps_pbh(v[2 * j + 1], v[2 * j]));
#endif
}

void few_fp32(const FewProblem& p, int64_t first, int64_t count, const float* x, __m512* sums) {
  const int64_t span = SPAN_CHUNKS * GROUP_ROWS / std::min<int64_t>(GROUP_ROWS, p.M);
  for (int64_t begin = 0; begin < p.chunks; begin += span) {
    const int64_t end = std::min(p.chunks, begin + span);
    for (int64_t m = 0; m < p.M; m += GROUP_ROWS) {
      const int rows = int(std::min<int64_t>(GROUP_ROWS, p.M - m)), step = rows == 1 ? 8 : rows > 4 ? 2 : 4;
      for (int64_t i = 0; i < count; i += step) {
        int64_t e[8];  // the last rows again where there are fewer; their sums land in padding
        for (int k = 0; k < step; ++k) e[k] = (first + std::min(i + k, count - 1)) * p.s->K + p.c0;
        FEW_PRODUCTS[reading_of(p, e[0], e[step - 1], end)][rows](p, e, begin, end, x + few_place(p, m, begin, 8, GROUP_ROWS) * 16, sums + i * p.M + m, p.M);
      }
    }
  }
}

#if defined(__AVX512BF16__)

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
#endif

// totals[i][m] = the lanes of sums[i][m] in one, 16 at a time.
void few_totals(const __m512* sums, int64_t count, float* totals) {
  for (int64_t f = 0; f < count; f += VL) {
    vu square[VL];
    for (int i = 0; i < VL; ++i) square[i] = (vu)sums[f + i];
    transpose_square(square);
    for (int half = VL / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) square[i] = (vu)((vf)square[i] + (vf)square[i + half]);
    _mm512_storeu_ps(totals + f, (__m512)square[0]);
  }
}

// y[m][i] = totals[i][m], by squares: single elements of rows that are far apart would be slower than the products.
void few_store(const float* totals, int64_t count, int64_t M, float* y, int64_t y_stride) {
  if (M == 1) {
    std::memcpy(y, totals, count * sizeof(float));
    return;
  }
  for (int64_t n = 0; n < count; n += VL)
    for (int64_t m = 0; m < M; m += VL) {
      const __mmask16 rows = __mmask16(M - m >= VL ? 0xffff : (1 << (M - m)) - 1);
      const __mmask16 outputs = __mmask16(count - n >= VL ? 0xffff : (1 << (count - n)) - 1);
      vu square[VL];
      for (int i = 0; i < VL; ++i) square[i] = n + i < count ? (vu)_mm512_maskz_loadu_ps(rows, totals + (n + i) * M + m) : vu{};
      transpose_square(square);
      for (int64_t i = 0; i < VL && m + i < M; ++i) _mm512_mask_storeu_ps(y + (m + i) * y_stride + n, outputs, (__m512)square[i]);
    }
}

// x transposed, [columns][pitch], as fp32 or as bf16 that it is: half the lines that an entry touches.
struct FewColumns {
  void* data;
  int64_t pitch;
  bool bf16;
  INLINE __m512 load(const FewColumns& c, int64_t column, int64_t m) {
    const int64_t at = column * c.pitch + m;
    if (!c.bf16) return _mm512_loadu_ps(static_cast<const float*>(c.data) + at);
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(c.data) + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
};

// totals[m] += S x for row r of the weight.
template <class E>
void few_sparse(const FewProblem& p, int64_t r, const float* x, const FewColumns& columns, float* totals) {
  const Rows& s = *p.s;
  const auto* values = static_cast<const typename E::T*>(s.values);
  int64_t j = s.row_offsets[r], end = s.row_offsets[r + 1];
  if (p.c0 > 0) j = std::lower_bound(s.cols + j, s.cols + end, int32_t(p.c0)) - s.cols;
  if (p.c1 < s.K) end = std::lower_bound(s.cols + j, s.cols + end, int32_t(p.c1)) - s.cols;
  if (j == end) return;
  if (p.M == 1) {
    float sum[4] = {};
    for (; j + 4 <= end; j += 4)
      for (int i = 0; i < 4; ++i) sum[i] += bits_float(E::widen(values[j + i])) * x[s.cols[j + i] - p.c0];
    for (; j < end; ++j) sum[0] += bits_float(E::widen(values[j])) * x[s.cols[j] - p.c0];
    totals[0] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return;
  }
  for (int64_t m = 0; m < p.M; m += 2 * VL) {
    __m512 low = _mm512_setzero_ps(), high = low;
    const bool both = m + VL < p.M;
    for (int64_t k = j; k < end; ++k) {
      const __m512 value = _mm512_set1_ps(bits_float(E::widen(values[k])));
      low = _mm512_fmadd_ps(value, FewColumns::load(columns, s.cols[k] - p.c0, m), low);
      if (both) high = _mm512_fmadd_ps(value, FewColumns::load(columns, s.cols[k] - p.c0, m + VL), high);
    }
    const auto add = [&](int64_t at, __m512 sum) {
      const __mmask16 rows = __mmask16(p.M - at >= VL ? 0xffff : (1 << (p.M - at)) - 1);
      _mm512_mask_storeu_ps(totals + at, rows, _mm512_add_ps(sum, _mm512_maskz_loadu_ps(rows, totals + at)));
    };
    add(m, low);
    if (both) add(m + VL, high);
  }
}

// Columns of a chunk of x, transposed.
void few_turn(const FewProblem& p, const float* x, int64_t x_stride, int64_t chunk, const FewColumns& to) {
  const int64_t columns = p.c1 - p.c0;
  for (int64_t k = chunk * CODES; k < std::min(columns, (chunk + 1) * CODES); k += VL)
    for (int64_t m = 0; m < p.M; m += VL) {
      const __mmask16 within = __mmask16(k + VL <= columns ? 0xffff : 0xff);
      const __mmask16 fits = __mmask16(to.pitch - m >= VL ? 0xffff : 0xff);
      vu square[VL];
      for (int i = 0; i < VL; ++i)
        square[i] = m + i < p.M ? (vu)_mm512_maskz_loadu_ps(within, x + (m + i) * x_stride + k) : vu{};
      transpose_square(square);
      for (int i = 0; i < VL && k + i < columns; ++i) {
        const int64_t at = (k + i) * to.pitch + m;
        if (to.bf16) _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(to.data) + at, fits, (__m512i)(square[i] >> 16));
        else _mm512_mask_storeu_ps(static_cast<float*>(to.data) + at, fits, (__m512)square[i]);
      }
    }
}

int few_fourbit(const Rows& s, int64_t r0, int64_t r1, int64_t c0, int64_t c1, const float* x, int64_t M, int64_t x_stride, float* y,
                int64_t y_stride, bool low, int threads) {
  const int shift = __builtin_ctzll(s.blocksize);
  const int64_t chunks = (c1 - c0 + CODES - 1) / CODES;
  const FewProblem p{&s, r0, r1, c0, c1, M, chunks, (s.N * s.K + s.blocksize - 1) >> shift, shift};
#if defined(__AVX512BF16__)
  const bool pairs = low && M > 4;  // below, decoding takes most of the time, and it is in fp32 anyway
#else
  const bool pairs = false;
#endif
  const int64_t columns = c1 - c0, tasks = (r1 - r0 + FEW_BLOCK - 1) / FEW_BLOCK;
  float* arranged = few_x_scratch.get<float>(M * chunks * CODES);
  // 8 rows are read together with 8 of the next column.
  FewColumns turned{nullptr, M <= 8 ? 8 : (M + VL - 1) / VL * VL, low};
  const bool turns = s.values && M > 1;
  if (turns) turned.data = few_columns_scratch.get<float>(columns * turned.pitch + VL);
  if (!arranged || (turns && !turned.data)) return 1;
  const auto arrange = [&](int64_t chunk) {
    for (int64_t m = 0; m < M; ++m)
      pairs ? few_arrange<true>(p, x + m * x_stride, m, chunk, arranged) : few_arrange<false>(p, x + m * x_stride, m, chunk, arranged);
    if (turns) few_turn(p, x, x_stride, chunk, turned);
  };
  int failed = 0;
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, (r1 - r0) * columns / 32768)));
  // Threads that sleep between regions take as long to wake as this takes for a row or two.
  const bool shared = M * columns > 32768;
  for (int64_t chunk = 0; !shared && chunk < chunks; ++chunk) arrange(chunk);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (shared) {
#pragma omp for schedule(static)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) arrange(chunk);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = r0 + task * FEW_BLOCK, count = std::min<int64_t>(FEW_BLOCK, r1 - first);
      const int64_t padded = (FEW_BLOCK * M + VL) / VL * VL;
      __m512* sums = few_sums_scratch.get<__m512>(padded);
      float* totals = few_totals_scratch.get<float>(padded);
      uint16_t* decoded = pairs ? few_block_scratch.get<uint16_t>(BF16_ROWS * SPAN_CHUNKS * CODES) : nullptr;
      if (!sums || !totals || (pairs && !decoded)) {
#pragma omp atomic write
        failed = 1;
        continue;
      }
      std::memset(static_cast<void*>(sums), 0, padded * sizeof(__m512));
#if defined(__AVX512BF16__)
      if (pairs && M <= GROUP_ROWS) few_bf16_at_once(p, first, count, reinterpret_cast<const uint16_t*>(arranged), sums);
      else if (pairs) few_bf16(p, first, count, reinterpret_cast<const uint16_t*>(arranged), decoded, sums);
#endif
      if (!pairs) few_fp32(p, first, count, arranged, sums);
      few_totals(sums, count * M, totals);
      for (int64_t i = 0; s.values && i < count; ++i) {
        if (s.values_dtype == F32) few_sparse<Float>(p, first + i, x, turned, totals + i * M);
        else if (s.values_dtype == BF16) few_sparse<BFloat>(p, first + i, x, turned, totals + i * M);
        else few_sparse<Half>(p, first + i, x, turned, totals + i * M);
      }
      few_store(totals, count, M, y + (first - r0), y_stride);
    }
  }
  return failed;
}

}  // namespace
#endif
