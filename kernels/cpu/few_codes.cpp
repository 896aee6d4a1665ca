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
// Rows of the weight are read some at a time, so pieces of them are asked for before their turn: the processor's own prefetching
// stops at the end of each, and a weight of more than the L2 cache took up to a third longer.
#if defined(__AVX512F__) && defined(__AVX512BW__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define FEW_FOUR_BIT 1
namespace {

constexpr int CODES = 128;       // columns in a vector of codes
constexpr int SPAN_CHUNKS = 8;   // columns gone through at once: 8 rows of x, or 16 decoded rows in bf16, are 32 KiB
constexpr int GROUP_ROWS = 8;    // rows of x that share a decoded vector of fp32
constexpr int FEW_BLOCK = 32;    // rows of the weight per task
constexpr int ONE_BLOCK = 128;   // or so many: codes and S each bring their own order of the one row of x into the L1 cache
constexpr int BF16_ROWS = 16;    // of those, decoded together

thread_local Scratch few_x_scratch, few_columns_scratch, few_sums_scratch, few_totals_scratch, few_block_scratch;
thread_local Scratch few_scales_scratch, few_products_scratch;

// The j-th column of a word is in the high half of byte j / 2 if j is even.
constexpr int code_shift(int j) { return j / 2 * 8 + (j % 2 ? 0 : 4); }

bool fits_few_fourbit(const Rows& s, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
  return s.kind == FOUR_BIT && s.K % 8 == 0 && c0 % 8 == 0 && c1 % 8 == 0 && c1 > c0 && r1 > r0 && s.blocksize >= 8;
}

struct FewProblem {
  const Rows* s;
  int64_t r0, r1, c0, c1, M, chunks, blocks;
  int shift;  // log2 of the blocksize
  const float* scales;  // of the blocks from `first_block` on: all, or those of a task, decoded
  int64_t first_block = 0;
  const LowRankPart* part = nullptr;
  int64_t next_first = 0;  // where the task behind this one begins
  INLINE_MEMBER const float* scales_at(int64_t e) const { return scales + ((e >> shift) - first_block); }
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

// The chunk of a row `ahead` below, which does not have to exist.
INLINE void expect_chunk(const FewProblem& p, int64_t e, int64_t ahead) {
  _mm_prefetch(static_cast<const char*>(p.s->data) + (e + ahead * p.s->K) / 2, _MM_HINT_NTA);
}

// In line, as whatever only prefetches: GCC takes such a function for one that does nothing, and drops calls of it.
INLINE void ask(const void* at, int64_t bytes) {
  for (int64_t k = 0; k < bytes; k += 64) _mm_prefetch(static_cast<const char*>(at) + k, _MM_HINT_T0);
}

// What the rows r .. end need besides their codes.
INLINE void expect_beside(const FewProblem& p, int64_t r, int64_t end) {
  const Rows& s = *p.s;
  const int64_t block = (r * s.K + p.c0) >> p.shift, blocks = ((end - r) * s.K) >> p.shift;
  if (s.scales) ask(s.scales + block, blocks * sizeof(float));
  else ask(s.scale_codes + block, blocks);
  for (int64_t i = r; i < end; ++i) ask(p.part->B + (i - p.part->first) * p.part->b_stride, p.part->R * sizeof(float));
  if (!s.values) return;
  const int64_t j = s.row_offsets[r], entries = s.row_offsets[end] - j, size = s.values_dtype == F32 ? 4 : 2;
  ask(s.cols + j, entries * sizeof(int32_t));
  ask(static_cast<const char*>(s.values) + j * size, entries * size);
}

template <int READING>
INLINE __m512 chunk_scales(const FewProblem& p, int64_t e, int words, __m512i blocks) {
  const float* at = p.scales_at(e);
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

}  // namespace
#endif
