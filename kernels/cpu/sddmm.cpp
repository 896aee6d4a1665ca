// Sampled dense-dense product, and the transposition that it reads its operands through.
namespace {

// ---- transposition ----------------------------------------------------------------------------------------------

// VL x VL, by log2(VL) shuffles of each vector. On AVX-512 half of them within 128 bits, which are twice as fast as those across.
INLINE void transpose_square(vu* v) {
  vu t[VL];
#if defined(__AVX512F__)
#pragma GCC unroll 8
  for (int i = 0; i < VL; i += 2) {
    t[i] = (vu)_mm512_unpacklo_epi32((__m512i)v[i], (__m512i)v[i + 1]);
    t[i + 1] = (vu)_mm512_unpackhi_epi32((__m512i)v[i], (__m512i)v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < VL; i += 4)
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      v[i + 2 * k] = (vu)_mm512_unpacklo_epi64((__m512i)t[i + k], (__m512i)t[i + k + 2]);
      v[i + 2 * k + 1] = (vu)_mm512_unpackhi_epi64((__m512i)t[i + k], (__m512i)t[i + k + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // 128 bits of v[i + 4 q] are rows 4 q .. 4 q + 3 of the columns i, i + 4, i + 8, i + 12
    const __m512i a = (__m512i)v[i], b = (__m512i)v[i + 4], c = (__m512i)v[i + 8], d = (__m512i)v[i + 12];
    const __m512i even[] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(c, d, 0x88)};
    const __m512i odd[] = {_mm512_shuffle_i32x4(a, b, 0xdd), _mm512_shuffle_i32x4(c, d, 0xdd)};
    v[i] = (vu)_mm512_shuffle_i32x4(even[0], even[1], 0x88);
    v[i + 4] = (vu)_mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
    v[i + 8] = (vu)_mm512_shuffle_i32x4(even[0], even[1], 0xdd);
    v[i + 12] = (vu)_mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
  }
#else
  for (int width = 1; width < VL; width *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < VL / 2; ++i) {
      t[2 * i] = SHUFFLE(v[i], v[i + VL / 2], ZIP_LO);
      t[2 * i + 1] = SHUFFLE(v[i], v[i + VL / 2], ZIP_HI);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) v[i] = t[i];
  }
#endif
}

// The sums of the lanes of VL vectors, each in the lane of its number; the vectors are lost. On AVX-512 by shuffles within 128
// bits as long as there are several vectors, which are twice as fast as those across.
INLINE vf lane_sums(vf* v) {
#if defined(__AVX512F__)
  __m512 quad[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512d pair[2];
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const __m512 a = (__m512)v[4 * i + 2 * k], b = (__m512)v[4 * i + 2 * k + 1];
      pair[k] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    }
    quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pair[0], pair[1])), _mm512_castpd_ps(_mm512_unpackhi_pd(pair[0], pair[1])));
  }
  const auto halves = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); };
  const __m512 low = halves(quad[0], quad[1]), high = halves(quad[2], quad[3]);
  return (vf)_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
#else
#pragma GCC unroll 4
  for (int half = VL / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] = SHUFFLE(v[i], v[i + half], ZIP_LO) + SHUFFLE(v[i], v[i + half], ZIP_HI);
  return v[0];
#endif
}

struct Matrix {  // [M, C] with any strides, in elements
  const void* data;
  int64_t stride_m, stride_c, M;
};

constexpr int LINE = 16;  // 32-bit words in a cache line; also the granularity of `used`

// One word of a transposed tile. A word is one fp32 value; or, packed, the bf16 of row m below the bf16 of row m + LINE:
// half the cache traffic and half the shuffles.
template <class E, bool PACKED>
INLINE uint32_t load_word(const Matrix& a, int64_t m, int64_t c) {
  const typename E::T* p = static_cast<const typename E::T*>(a.data) + m * a.stride_m + c * a.stride_c;
  uint32_t low = m < a.M ? p[0] : 0;
  if (!PACKED) return E::widen(typename E::T(low));
  uint32_t high = m + LINE < a.M ? p[LINE * a.stride_m] : 0;
  return low | high << 16;
}

// The same for VL words in a row, `next` elements before the pairs of packed words.
template <class E, bool PACKED>
INLINE vu load_words(const typename E::T* p, int64_t next) {
  if (PACKED) return E::load(p) | E::load(p + next) << 16;
  return E::widen(E::load(p));
}

// At the edges of the matrix, and for strides that are not 1.
template <class E, bool PACKED>
__attribute__((noinline)) void transpose_edge(const Matrix& a, int64_t m, int64_t c, int64_t n, uint32_t* dst, int64_t pitch) {
  for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 1
    for (int l = 0; l < VL; ++l) dst[i * pitch + l] = load_word<E, PACKED>(a, m + l, c + i);
}

// What is read from a row at once: a cache line, where the code for it exists. Rows that are far apart lie in one set of the L1
// cache: half a line would be evicted before the other half is read.
constexpr int AHEAD = 256;  // bytes: so far along its rows a matrix is fetched before it is transposed

template <class E, bool PACKED>
INLINE bool transpose_line(const typename E::T* p, int64_t stride_m, uint32_t* to, int64_t pitch) {
#if defined(__AVX512BW__)
  if (PACKED) {  // 2 VL columns of LINE pairs of rows
    vu low[VL], high[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
      const __m512i a = _mm512_loadu_si512(p + i * stride_m), b = _mm512_loadu_si512(p + (i + LINE) * stride_m);
      __builtin_prefetch(reinterpret_cast<const char*>(p + i * stride_m) + AHEAD, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(p + (i + LINE) * stride_m) + AHEAD, 0, 2);
      low[i] = (vu)_mm512_unpacklo_epi16(a, b);
      high[i] = (vu)_mm512_unpackhi_epi16(a, b);
    }
    transpose_square(low);
    transpose_square(high);
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
      uint32_t* column = to + (i / 4 * 8 + i % 4) * pitch;
      *reinterpret_cast<vu*>(column) = low[i];
      *reinterpret_cast<vu*>(column + 4 * pitch) = high[i];
    }
    return true;
  }
#endif
  return false;
}

// dst[c - c0][lines * LINE] = columns c0 .. c1 of rows m0 .. of `a`, with zeros below the last row. `used`, where given,
// says which groups of LINE columns (counted from column 0; c0 is a multiple of LINE) anybody will read.
template <class E, bool PACKED>
void transpose_tile(const Matrix& a, int64_t m0, int lines, int64_t c0, int64_t c1, const uint8_t* used, uint32_t* dst) {
  using T = typename E::T;
  const int64_t pitch = int64_t(lines) * LINE, step = PACKED ? 2 : 1;
  for (int64_t w = 0; w < pitch; w += VL) {  // words w .. w + VL of every column
    const int64_t m = m0 + (w / LINE) * LINE * step + w % LINE;
    const bool rows_fit = m + (PACKED ? LINE : 0) + VL <= a.M;
    for (int64_t c = c0; c < c1; c += VL) {
      if (used && !used[c / LINE]) continue;
      if (PACKED && rows_fit && a.stride_c == 1 && c + 2 * VL <= c1 &&
          transpose_line<E, PACKED>(static_cast<const T*>(a.data) + m * a.stride_m + c, a.stride_m, dst + (c - c0) * pitch + w, pitch)) {
        c += VL;
        continue;
      }
      const T* p = static_cast<const T*>(a.data) + m * a.stride_m + c * a.stride_c;
      uint32_t* to = dst + (c - c0) * pitch + w;
      const int64_t n = std::min<int64_t>(VL, c1 - c);
      if (rows_fit && a.stride_c == 1 && n == VL) {
        vu v[VL];
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) v[i] = load_words<E, PACKED>(p + i * a.stride_m, LINE * a.stride_m);
        transpose_square(v);
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) *reinterpret_cast<vu*>(to + i * pitch) = v[i];
      } else if (rows_fit && a.stride_m == 1) {
#pragma GCC unroll 1
        for (int64_t i = 0; i < n; ++i)
          *reinterpret_cast<vu*>(to + i * pitch) = load_words<E, PACKED>(p + i * a.stride_c, LINE);
      } else {
        transpose_edge<E, PACKED>(a, m, c, n, to, pitch);
      }
    }
  }
}

using Transpose = void (*)(const Matrix&, int64_t, int, int64_t, int64_t, const uint8_t*, uint32_t*);

Transpose pick_transpose(int dtype, bool packed) {
  if (packed) return transpose_tile<BFloat, true>;
  return dtype == F32 ? transpose_tile<Float, false> : dtype == BF16 ? transpose_tile<BFloat, false>
                                                                     : transpose_tile<Half, false>;
}

// ---- SDDMM: out[j] = sum_m dy[m, row_j] x[m, col_j] --------------------------------------------------------------
//
// M is cut into tiles of 64 rows (128 for packed bf16): in a tile each nonzero is a contiguous dot product between a column
// of x (in a panel that stays in L2) and a column of dy (in a block that stays in L1). VL nonzeros are reduced across lanes
// together. A task is (a chunk of tiles) x (a range of nonzeros) and shares nothing: no barriers. The number of chunks
// depends on the shape only, each chunk sums its tiles in order, and the chunks are added in order, so the result does
// not depend on the number of threads, while splitting the nonzeros (which does depend on it) cannot change a sum.

constexpr int MAX_LINES = 4;            // cache lines of an x column in a tile
constexpr int64_t PANEL_COLUMNS = 4096; // x 256 B = 1 MiB
constexpr int64_t PARTIAL_LIMIT = int64_t(1) << 21;  // floats in the chunks' partial sums: 8 MiB

struct Group {  // up to VL nonzeros whose dot products are made together
  int64_t x[VL];
  int32_t dy[VL];
  int64_t out[VL];
  int count = 0;
};

// What the words of a tile hold: one fp32 value each; pairs of bf16 in the tile of x alone; or pairs in both, where the CPU
// multiplies and adds them in one instruction. That one takes products below 2^-126 for 0. It saves the unpacking and half of
// dy's tile: 6.3 ms against 8.1 (Zen 5, two cores, 4096x4096, 0.6 %, 2048 rows).
enum Words { SINGLE, PAIRS_OF_X, PAIRS };

// Kept out of line so that its VL accumulators own the register file.
template <Words WORDS, int LINES>
__attribute__((noinline)) void flush(Group& g, const float* dy, const uint32_t* x, float* out) {
#pragma GCC unroll 1
  for (int i = g.count; i < VL; ++i) { g.x[i] = g.x[0]; g.dy[i] = g.dy[0]; }
  vf acc[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) {
    const vu* xp = reinterpret_cast<const vu*>(x + g.x[i]);
    const vf* dp = reinterpret_cast<const vf*>(dy + g.dy[i]);
    constexpr int PER_LINE = LINE / VL;
    vf a{};
#pragma GCC unroll 16
    for (int v = 0; v < LINES * PER_LINE; ++v) {
      if (WORDS == PAIRS) {
#if defined(__AVX512BF16__)
        a = (vf)_mm512_dpbf16_ps((__m512)a, (__m512bh)reinterpret_cast<const vu*>(dp)[v], (__m512bh)xp[v]);
#endif
      } else if (WORDS == PAIRS_OF_X) {
        const vf* d = dp + (v / PER_LINE) * 2 * PER_LINE + v % PER_LINE;
        a += d[0] * (vf)(xp[v] << 16);
        a += d[PER_LINE] * (vf)(xp[v] & 0xffff0000u);
      } else {
        a += dp[v] * (vf)xp[v];
      }
    }
    acc[i] = a;
  }
  alignas(VEC_BYTES) float sums[VL];
  *reinterpret_cast<vf*>(sums) = lane_sums(acc);
#pragma GCC unroll 1
  for (int i = 0; i < g.count; ++i) out[g.out[i]] += sums[i];
  g.count = 0;
}

using Flush = void (*)(Group&, const float*, const uint32_t*, float*);

template <Words WORDS>
Flush pick_flush(int lines) {
  return lines == 1 ? flush<WORDS, 1> : lines == 2 ? flush<WORDS, 2> : flush<WORDS, 4>;
}

struct Sddmm {
  Matrix dy, x;
  int64_t N, K;
  const int32_t *row_offsets, *cols;
  Transpose transpose_dy, transpose_x;
  Words words;
  const uint8_t* used;
};

// Tiles t0 .. t1 of nonzeros j0 .. j1; out[j0 .. j1] is overwritten. False when out of memory.
bool sddmm_task(const Sddmm& s, int64_t t0, int64_t t1, int64_t j0, int64_t j1, float* out) {
  std::fill(out + j0, out + j1, 0.0f);
  const int32_t* ro = s.row_offsets;
  const int64_t first_row = std::upper_bound(ro, ro + s.N + 1, int32_t(j0)) - ro - 1;
  const int64_t end_row = std::lower_bound(ro, ro + s.N + 1, int32_t(j1)) - ro;
  const int64_t panels = (s.K + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
  const int64_t width = ((s.K + panels - 1) / panels + LINE - 1) / LINE * LINE;
  const int step = s.words == SINGLE ? 1 : 2, tile = MAX_LINES * LINE * step, block = s.words == PAIRS_OF_X ? 32 : 64;
  const int dy_step = s.words == PAIRS_OF_X ? 2 : 1;  // words of dy to one of x
  uint32_t* panel = panel_scratch.get<uint32_t>(width * MAX_LINES * LINE);
  float* dyt = block_scratch.get<float>(block * tile);
  int32_t* cursor = panels > 1 ? cursor_scratch.get<int32_t>(end_row - first_row) : nullptr;
  if (!panel || !dyt || (panels > 1 && !cursor)) return false;
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t m0 = t * tile, rows = std::min<int64_t>(tile, s.x.M - m0);
    int lines = int((rows + LINE * step - 1) / (LINE * step));
    if (lines == 3) lines = 4;
    const int64_t xpitch = lines * LINE, dpitch = xpitch * dy_step;
    const Flush flush_group = s.words == SINGLE  ? pick_flush<SINGLE>(lines)
                              : s.words == PAIRS ? pick_flush<PAIRS>(lines)
                                                 : pick_flush<PAIRS_OF_X>(lines);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t c0 = p * width, c1 = std::min(s.K, c0 + width);
      if (c0 >= c1) break;
      s.transpose_x(s.x, m0, lines, c0, c1, s.used, panel);
      Group g;
      for (int64_t r0 = first_row; r0 < end_row; r0 += block) {
        const int64_t r1 = std::min(r0 + block, end_row);
        if (ro[r0] == ro[r1]) continue;
        s.transpose_dy(s.dy, m0, lines * dy_step, r0, r1, nullptr, reinterpret_cast<uint32_t*>(dyt));
        for (int64_t r = r0; r < r1; ++r) {
          int64_t j = cursor && p > 0 ? cursor[r - first_row] : std::max<int64_t>(ro[r], j0);
          const int64_t end = std::min<int64_t>(ro[r + 1], j1);
          for (; j < end && (!cursor || s.cols[j] < c1); ++j) {
            g.x[g.count] = (s.cols[j] - c0) * xpitch;
            g.dy[g.count] = int32_t((r - r0) * dpitch);
            g.out[g.count] = j;
            if (++g.count == VL) flush_group(g, dyt, panel, out);
          }
          if (cursor) cursor[r - first_row] = int32_t(j);
        }
        if (g.count) flush_group(g, dyt, panel, out);  // the next block overwrites dyt
      }
    }
  }
  return true;
}

}  // namespace

extern "C" {

// Returns 0, or 1 when scratch memory could not be had (out is then undefined).
int rosa_sddmm(const void* dy, int dy_dtype, int64_t dy_stride_m, int64_t dy_stride_n, const void* x, int x_dtype,
               int64_t x_stride_m, int64_t x_stride_k, int64_t M, int64_t N, int64_t K, const int32_t* row_offsets,
               const int32_t* cols, float* out, int threads) {
  const int64_t nnz = row_offsets[N];
  if (nnz == 0) return 0;
  if (M == 0) { std::fill(out, out + nnz, 0.0f); return 0; }
  const Words words = x_dtype != BF16 ? SINGLE : PAIRED && dy_dtype == BF16 ? PAIRS : PAIRS_OF_X;
  Sddmm s{{dy, dy_stride_m, dy_stride_n, M}, {x, x_stride_m, x_stride_k, M}, N, K, row_offsets, cols,
          pick_transpose(dy_dtype, words == PAIRS), pick_transpose(x_dtype, words != SINGLE), words, nullptr};
  const int64_t tile = MAX_LINES * LINE * (words == SINGLE ? 1 : 2), tiles = (M + tile - 1) / tile;
  int64_t chunks = 8;
  while (chunks > 1 && (chunks > tiles || (chunks - 1) * nnz > PARTIAL_LIMIT)) chunks /= 2;
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, nnz * ((M + LINE - 1) / LINE) / 16384)));
  const int64_t ranges = chunks % threads == 0 ? 1 : std::min<int64_t>((2 * threads + chunks - 1) / chunks, nnz);
  std::unique_ptr<uint8_t[]> used;
  if (M > LINE) {  // below that transposing everything is cheaper than finding out
    used.reset(new (std::nothrow) uint8_t[(K + LINE - 1) / LINE]());
    if (!used) return 1;
    for (int64_t j = 0; j < nnz; ++j) used[cols[j] / LINE] = 1;
    s.used = used.get();
  }
  float* partial = chunks > 1 ? partial_scratch.get<float>((chunks - 1) * nnz) : nullptr;
  if (chunks > 1 && !partial) return 1;
  int failed = 0;
  Crew crew;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < chunks * ranges; ++task) {
      const int64_t c = task / ranges, i = task % ranges;
      float* target = c == 0 ? out : partial + (c - 1) * nnz;
      if (!sddmm_task(s, tiles * c / chunks, tiles * (c + 1) / chunks, nnz * i / ranges, nnz * (i + 1) / ranges, target))
#pragma omp atomic write
        failed = 1;
    }
    if (chunks > 1) {
      crew.meet();
#pragma omp for schedule(static) nowait
      for (int64_t j0 = 0; j0 < nnz; j0 += SPAN) {
        const int64_t j1 = std::min(nnz, j0 + SPAN);
        for (int64_t c = 0; c < chunks - 1; ++c)
          for (int64_t j = j0; j < j1; ++j) out[j] += partial[c * nnz + j];
      }
    }
    crew.finish();
  }
  return failed;
}

}  // extern "C"
