// Rows of D(Q) + S: decoded into a tile for a GEMM, or multiplied in the L1 cache with a few rows of x.
//
// Cost per element of the weight: a 4-bit code is looked up among 16 registers' lanes, about 5 instructions per vector, so
// decoding runs at the speed at which the tile is stored; a sparse entry lands in the row just written, a cache hit.
// Every product of a code and its scale is rounded to fp32 once, as bitsandbytes does: the values are the same bits.
namespace {

enum Kind { DENSE_F32 = 0, DENSE_BF16 = 1, DENSE_F16 = 2, INT8 = 3, FOUR_BIT = 4 };

struct Rows {
  int64_t kind, N, K;
  const void* data;      // dense: [N, K]; int8: codes [N, K]; 4-bit: two codes per byte, the first in the high half
  const float* scales;   // int8: per row; 4-bit: per block of the flat weight, or null: they are quantised themselves
  const float* table;    // 4-bit: values of the 16 codes
  int64_t blocksize;     // 4-bit
  const uint8_t* scale_codes;  // scale of a block = scale_table[code] nested_scales[block / nested_blocksize] + nested_offset
  const float *scale_table, *nested_scales, *nested_offset;
  int64_t nested_blocksize;
  const void* values;    // of S, or null
  int64_t values_dtype;
  const int32_t *row_offsets, *cols;
};

typedef float vf_unaligned __attribute__((vector_size(VEC_BYTES), aligned(4), may_alias));

// Scales of the blocks first .. first + count, decoded from 8 bits: rounded twice, as bitsandbytes does it, the same bits.
void decode_scales(const Rows& s, int64_t first, int64_t count, float* to) {
  const int shift = __builtin_ctzll(s.nested_blocksize);
  const float offset = *s.nested_offset;
  for (int64_t i = 0; i < count;) {
    const int64_t nested = (first + i) >> shift, stop = std::min(count, ((nested + 1) << shift) - first);
    const float scale = s.nested_scales[nested];
#if defined(__AVX512F__)
    // The table is 16 registers: pairs of them are looked up by 5 bits of a code, and 3 bits choose among the pairs.
    for (; i + 16 <= stop; i += 16) {
      const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.scale_codes + first + i)));
      const auto pair = [&](int p) {
        return _mm512_permutex2var_ps(_mm512_loadu_ps(s.scale_table + p * 32), code, _mm512_loadu_ps(s.scale_table + p * 32 + 16));
      };
      const auto bit = [&](int b) { return _mm512_test_epi32_mask(code, _mm512_set1_epi32(b)); };
      const __mmask16 b32 = bit(32), b64 = bit(64);
      const auto four = [&](int p) {
        return _mm512_mask_blend_ps(b64, _mm512_mask_blend_ps(b32, pair(p), pair(p + 1)), _mm512_mask_blend_ps(b32, pair(p + 2), pair(p + 3)));
      };
      _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_mask_blend_ps(bit(128), four(0), four(4)), _mm512_set1_ps(scale)));
    }
#endif
    for (; i < stop; ++i) to[i] = s.scale_table[s.scale_codes[first + i]] * scale;
  }
  for (int64_t i = 0; i < count; ++i) to[i] += offset;  // apart: in one expression it would be one rounding
}

// Scales of blocks that are asked for one after another, before block `last`.
class Scales {
 public:
  Scales(const Rows& s, int64_t last) : s_(s), last_(last) {}
  inline float of(int64_t block) {
    if (s_.scales) return s_.scales[block];
    if (block >= end_) {
      first_ = block, end_ = std::min(last_, block + SOME);
      decode_scales(s_, first_, end_ - first_, some_);
    }
    return some_[block - first_];
  }

 private:
  static constexpr int SOME = 64;
  const Rows& s_;
  int64_t last_, first_ = 0, end_ = 0;
  float some_[SOME];
};

template <class E>
INLINE void widen_span(const typename E::T* p, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) *reinterpret_cast<vu_unaligned*>(dst + i) = E::widen(E::load(p + i));
  for (; i < n; ++i) dst[i] = bits_float(E::widen(p[i]));
}

#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
// The 16 values of a block's codes in registers, and VL codes from an even element on looked up there.
struct Values {
  vf low, high;  // high: the upper 8 where VL is 8
  Values(const float* table, float scale) {
    low = *reinterpret_cast<const vf_unaligned*>(table) * scale;
    high = *reinterpret_cast<const vf_unaligned*>(table + 16 - VL) * scale;
  }
  inline vf look_up(const uint8_t* p) const {
#if defined(__AVX512F__)
    // Lane pair j of 64 bits: byte j of p, whose high half is element 2 j. Broadcast from memory: no shuffle port.
    typedef uint64_t vq __attribute__((vector_size(VEC_BYTES), may_alias));
    uint64_t w;
    std::memcpy(&w, p, 8);
    const vq words = vq{} + w, first = {4, 12, 20, 28, 36, 44, 52, 60}, at = {32, 24, 16, 8, 0, 0, 0, 0}, second = {0, 0, 0, 0, 0, 8, 16, 24};
    const vq odd = vq{} + (uint64_t(15) << 32);
    return __builtin_shuffle(low, (vi)((words >> first & 15u) | (words << at >> second & odd)));
#else
    uint32_t w;
    std::memcpy(&w, p, 4);
    const vu shifts = {4, 0, 12, 8, 20, 16, 28, 24};
    return __builtin_shuffle(low, high, (vi)(splat(w) >> shifts & 15u));
#endif
  }
};
#else
struct Values {
  float values[16];
  Values(const float* table, float scale) {
    for (int c = 0; c < 16; ++c) values[c] = table[c] * scale;
  }
  inline vf look_up(const uint8_t* p) const {
    vf out;
    for (int k = 0; k < VL; ++k) out[k] = values[k & 1 ? p[k / 2] & 15 : p[k / 2] >> 4];
    return out;
  }
};
#endif

// The elements begin .. end of the flat weight.
INLINE void decode_span(const Rows& s, int64_t begin, int64_t end, float* dst) {
  const auto* packed = static_cast<const uint8_t*>(s.data);
  const int shift = __builtin_ctzll(s.blocksize);  // a power of two
  Scales scales(s, ((end - 1) >> shift) + 1);
  for (int64_t i = begin; i < end;) {
    const int64_t block = i >> shift, stop = std::min(end, (block + 1) << shift);
    const float scale = scales.of(block);
    const Values values(s.table, scale);
    const auto one = [&] { dst[i - begin] = s.table[i & 1 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4] * scale, ++i; };
    if (i & 1) one();
    for (; i + 4 * VL <= stop; i += 4 * VL)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        *reinterpret_cast<vf_unaligned*>(dst + (i - begin) + v * VL) = values.look_up(packed + (i >> 1) + v * VL / 2);
    for (; i + VL <= stop; i += VL) *reinterpret_cast<vf_unaligned*>(dst + (i - begin)) = values.look_up(packed + (i >> 1));
    while (i < stop) one();
  }
}

// Columns c0 .. c1 of row r of D(Q) + S, in fp32.
void decode_row(const Rows& s, int64_t r, int64_t c0, int64_t c1, float* dst) {
  const int64_t at = r * s.K + c0, n = c1 - c0;
  switch (s.kind) {
    case DENSE_F32: std::memcpy(dst, static_cast<const float*>(s.data) + at, n * sizeof(float)); break;
    case DENSE_BF16: widen_span<BFloat>(static_cast<const uint16_t*>(s.data) + at, n, dst); break;
    case DENSE_F16: widen_span<Half>(static_cast<const uint16_t*>(s.data) + at, n, dst); break;
    case INT8: {
      const auto* codes = static_cast<const int8_t*>(s.data) + at;
      const float scale = s.scales[r];
      for (int64_t i = 0; i < n; ++i) dst[i] = float(codes[i]) * scale * 7.874015718698502e-3f;  // 1 / 127, as the codec has it
      break;
    }
    default: decode_span(s, at, at + n, dst);
  }
  if (!s.values) return;
  int64_t j = s.row_offsets[r];
  const int64_t end = s.row_offsets[r + 1];
  if (c0 > 0) j = std::lower_bound(s.cols + j, s.cols + end, int32_t(c0)) - s.cols;
  for (; j < end && s.cols[j] < c1; ++j) dst[s.cols[j] - c0] += element(s.values, s.values_dtype, j);
}

void narrow_bf16(const float* from, int64_t n, uint16_t* to) {  // as BFloat::narrow
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    const vu u = *reinterpret_cast<const vu_unaligned*>(from + i);
    const vu nan = (vu)((vi)(u & 0x7fffffffu) > (vi)splat(0x7f800000u));
    const vu rounded = select(nan, u >> 16 | 0x40u, (u + 0x7fffu + (u >> 16 & 1u)) >> 16);
    *reinterpret_cast<vh_unaligned*>(to + i) = __builtin_convertvector(rounded, vh);
  }
  for (; i < n; ++i) to[i] = BFloat::narrow(from[i]);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
// Elements begin .. begin + n of the flat weight, rounded to bf16, from an even one on. The 16 values of a block are scaled and
// rounded, not its elements, which are then looked up two to a byte: 32 take 6 instructions.
bool decode_bf16(const Rows& s, int64_t begin, int64_t n, uint16_t* to) {
  if (s.kind != FOUR_BIT || s.values || begin % 2) return false;
  const auto* packed = static_cast<const uint8_t*>(s.data);
  const int shift = __builtin_ctzll(s.blocksize);
  const __m512 table = _mm512_loadu_ps(s.table);
  Scales scales(s, ((begin + n - 1) >> shift) + 1);
  for (int64_t i = begin, end = begin + n; i < end;) {
    const int64_t block = i >> shift, stop = std::min(end, (block + 1) << shift);
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(table, _mm512_set1_ps(scales.of(block))));
    const __m512i values = _mm512_broadcast_i64x4(rounded);  // twice: the fifth bit of an index is of the neighbour's code
    const auto look_up = [&](__m128i bytes) __attribute__((always_inline)) {
      const __m512i codes = _mm512_cvtepu8_epi32(bytes);
      return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(codes, 4), _mm512_slli_epi32(codes, 16)), values);
    };
    for (; i + 32 <= stop; i += 32)
      _mm512_storeu_si512(to + (i - begin), look_up(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + (i >> 1)))));
    if (i < stop) {
      const int64_t rest = stop - i;
      const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1u << (rest + 1) / 2) - 1), packed + (i >> 1));
      _mm512_mask_storeu_epi16(to + (i - begin), __mmask32((1u << rest) - 1), look_up(bytes));
    }
    i = stop;
  }
  return true;
}
#else
bool decode_bf16(const Rows&, int64_t, int64_t, uint16_t*) { return false; }
#endif

thread_local Scratch row_scratch;

// Where rows are written: `pitch` elements from row to row. Columns lie in panels of `panel` columns, `panel_stride` elements
// apart: column j in panel j / panel.
struct DecodedTile {
  void* data;
  int64_t dtype, pitch, panel, panel_stride;
};

// Row i of the tile = columns c0 .. c1 of row r, rounded once. False without scratch memory.
bool write_row(const Rows& rows, int64_t r, int64_t c0, int64_t c1, const DecodedTile& tile, int64_t i) {
  const int64_t n = c1 - c0;
  if (tile.dtype == F32 && n <= tile.panel) {
    decode_row(rows, r, c0, c1, static_cast<float*>(tile.data) + i * tile.pitch);
    return true;
  }
  if (tile.dtype == BF16) {
    auto* to = static_cast<uint16_t*>(tile.data) + i * tile.pitch;
    int64_t c = 0;
    while (c < n && decode_bf16(rows, r * rows.K + c0 + c, std::min(tile.panel, n - c), to)) c += tile.panel, to += tile.panel_stride;
    if (c >= n) return true;
  }
  float* row = row_scratch.get<float>(n);
  if (!row) return false;
  decode_row(rows, r, c0, c1, row);
  for (int64_t p = 0, c = 0; c < n; ++p, c += tile.panel) {
    const int64_t at = p * tile.panel_stride + i * tile.pitch, count = std::min(tile.panel, n - c);
    if (tile.dtype == F32) std::memcpy(static_cast<float*>(tile.data) + at, row + c, count * sizeof(float));
    else if (tile.dtype == BF16) narrow_bf16(row + c, count, static_cast<uint16_t*>(tile.data) + at);
    else
      for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(tile.data)[at + k] = Half::narrow(row[c + k]);
  }
  return true;
}

}  // namespace

extern "C" {

// Rows r0 .. r1 and columns c0 .. c1 of D(Q) + S, rounded once to the dtype of `out`, as `DecodedTile` has it.
int rosa_write_rows(const Rows* rows, int64_t r0, int64_t r1, int64_t c0, int64_t c1, void* out, int out_dtype,
                    int64_t pitch, int64_t panel, int64_t panel_stride, int threads) {
  if (c1 == c0) return 0;
  const DecodedTile tile{out, out_dtype, pitch, panel, panel_stride};
  int failed = 0;
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, (r1 - r0) * (c1 - c0) / 32768)));
  const int64_t some = std::max<int64_t>(1, (r1 - r0) / (8 * threads));  // whoever is awake takes them
  Crew crew;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, some) nowait
  for (int64_t r = r0; r < r1; ++r)
    if (!write_row(*rows, r, c0, c1, tile, r - r0)) {
#pragma omp atomic write
      failed = 1;
    }
  crew.finish();
  }
  return failed;
}

}  // extern "C"
