// Sparse pieces of a RoSA layer on the CPU. Plain C++17 + OpenMP, no torch headers: it compiles in a second or two and
// is called through ctypes with raw pointers. Vector code is GCC/Clang vector extensions, so one source serves every
// -march. Preconditions (checked by the Python caller or by Mask, not here): row_offsets starts at 0, never
// decreases and ends at nnz; columns are in [0, K) and strictly increasing within a row.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__AVX512F__)
#define VEC_BYTES 64
#define ZIP_LO 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HI 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define VEC_BYTES 32
#define ZIP_LO 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HI 4, 12, 5, 13, 6, 14, 7, 15
#else
#define VEC_BYTES 16
#define ZIP_LO 0, 4, 1, 5
#define ZIP_HI 2, 6, 3, 7
#endif

namespace {

constexpr int VL = VEC_BYTES / 4;  // fp32 lanes
typedef float vf __attribute__((vector_size(VEC_BYTES), may_alias));
typedef uint32_t vu __attribute__((vector_size(VEC_BYTES), may_alias));
typedef int32_t vi __attribute__((vector_size(VEC_BYTES), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(VEC_BYTES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VEC_BYTES / 2)));
typedef uint16_t vh_unaligned __attribute__((vector_size(VEC_BYTES / 2), aligned(2), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE vu splat(uint32_t v) { return vu{} + v; }
INLINE vu select(vu mask, vu yes, vu no) { return (mask & yes) | (~mask & no); }

// ---- element types -----------------------------------------------------------------------------------------------

enum DType { F32 = 0, BF16 = 1, F16 = 2 };

INLINE float bits_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
INLINE uint32_t float_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

struct Float {
  using T = uint32_t;
  static inline uint32_t widen(T v) { return v; }  // the bits of the fp32 value
  static inline vu widen(vu v) { return v; }
  static inline vu load(const T* p) { return *reinterpret_cast<const vu_unaligned*>(p); }
  static inline T narrow(float f) { return float_bits(f); }
};

struct Half16 {
  using T = uint16_t;
  static inline vu load(const T* p) {
    vh v = *reinterpret_cast<const vh_unaligned*>(p);
    return __builtin_convertvector(v, vu);
  }
};

struct BFloat : Half16 {
  static inline uint32_t widen(T v) { return uint32_t(v) << 16; }
  static inline vu widen(vu v) { return v << 16; }
  static inline T narrow(float f) {  // round to nearest even; a NaN stays a (quiet) NaN
    uint32_t u = float_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return T((u >> 16) | 0x40u);
    return T((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};

struct Half : Half16 {
  // Scaling by 2^112 re-biases the exponent and normalises subnormals; infinities and NaNs get the full exponent back.
  static inline uint32_t widen(T h) {
    uint32_t u = float_bits(bits_float(uint32_t(h & 0x7fffu) << 13) * bits_float(0x77800000u));
    if ((h & 0x7c00u) == 0x7c00u) u |= 0x7f800000u;
    return u | (uint32_t(h & 0x8000u) << 16);
  }
  static inline vu widen(vu h) {
    vf scaled = (vf)((h & 0x7fffu) << 13) * (vf)splat(0x77800000u);
    vu special = (vu)((h & 0x7c00u) == splat(0x7c00u)) & 0x7f800000u;
    return (vu)scaled | special | ((h & 0x8000u) << 16);
  }
  static inline T narrow(float f) {  // round to nearest even
    uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return T(sign | 0x7e00u);
    if (u >= 0x477ff000u) return T(sign | 0x7c00u);  // rounds to 65536 or more
    if (u < 0x38800000u)  // subnormal result: let the fp32 adder round at 2^-24
      return T(sign | (float_bits(bits_float(u) + 0.5f) - 0x3f000000u));
    return T(sign | ((u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13));
  }
};

// ---- per-thread scratch, kept between calls: fresh large blocks would be page-faulted in every time ---------------

class Scratch {
 public:
  template <class T>
  T* get(size_t count) {
    size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(4096, bytes);
      size_ = data_ ? bytes : 0;
    }
    return static_cast<T*>(data_);
  }
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

thread_local Scratch panel_scratch, block_scratch, cursor_scratch, partial_scratch;

// ---- transposition ----------------------------------------------------------------------------------------------

INLINE void transpose_square(vu* v) {  // VL x VL, by log2(VL) perfect shuffles
  vu t[VL];
  for (int width = 1; width < VL; width *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < VL / 2; ++i) {
      t[2 * i] = SHUFFLE(v[i], v[i + VL / 2], ZIP_LO);
      t[2 * i + 1] = SHUFFLE(v[i], v[i + VL / 2], ZIP_HI);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) v[i] = t[i];
  }
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

// Kept out of line so that its VL accumulators own the register file.
template <bool PACKED, int LINES>
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
      if (PACKED) {
        const vf* d = dp + (v / PER_LINE) * 2 * PER_LINE + v % PER_LINE;
        a += d[0] * (vf)(xp[v] << 16);
        a += d[PER_LINE] * (vf)(xp[v] & 0xffff0000u);
      } else {
        a += dp[v] * (vf)xp[v];
      }
    }
    acc[i] = a;
  }
#pragma GCC unroll 4
  for (int half = VL / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      acc[i] = SHUFFLE(acc[i], acc[i + half], ZIP_LO) + SHUFFLE(acc[i], acc[i + half], ZIP_HI);
  alignas(VEC_BYTES) float sums[VL];
  *reinterpret_cast<vf*>(sums) = acc[0];
#pragma GCC unroll 1
  for (int i = 0; i < g.count; ++i) out[g.out[i]] += sums[i];
  g.count = 0;
}

using Flush = void (*)(Group&, const float*, const uint32_t*, float*);

template <bool PACKED>
Flush pick_flush(int lines) {
  return lines == 1 ? flush<PACKED, 1> : lines == 2 ? flush<PACKED, 2> : flush<PACKED, 4>;
}

struct Sddmm {
  Matrix dy, x;
  int64_t N, K;
  const int32_t *row_offsets, *cols;
  Transpose transpose_dy, transpose_x;
  bool packed;
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
  const int step = s.packed ? 2 : 1, tile = MAX_LINES * LINE * step, block = s.packed ? 32 : 64;
  uint32_t* panel = panel_scratch.get<uint32_t>(width * MAX_LINES * LINE);
  float* dyt = block_scratch.get<float>(block * tile);
  int32_t* cursor = panels > 1 ? cursor_scratch.get<int32_t>(end_row - first_row) : nullptr;
  if (!panel || !dyt || (panels > 1 && !cursor)) return false;
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t m0 = t * tile, rows = std::min<int64_t>(tile, s.x.M - m0);
    int lines = int((rows + LINE * step - 1) / (LINE * step));
    if (lines == 3) lines = 4;
    const int64_t xpitch = lines * LINE, dpitch = xpitch * step;
    const Flush flush_group = s.packed ? pick_flush<true>(lines) : pick_flush<false>(lines);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t c0 = p * width, c1 = std::min(s.K, c0 + width);
      if (c0 >= c1) break;
      s.transpose_x(s.x, m0, lines, c0, c1, s.used, panel);
      Group g;
      for (int64_t r0 = first_row; r0 < end_row; r0 += block) {
        const int64_t r1 = std::min(r0 + block, end_row);
        if (ro[r0] == ro[r1]) continue;
        s.transpose_dy(s.dy, m0, int(lines * step), r0, r1, nullptr, reinterpret_cast<uint32_t*>(dyt));
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

// ---- scatter ----------------------------------------------------------------------------------------------------

template <class W, class V>
void scatter_add(typename W::T* weight, int64_t N, int64_t K, const typename V::T* values, const int32_t* ro,
                 const int32_t* cols, int threads) {
  const int64_t nnz = ro[N];
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    int64_t j = nnz * part / threads;
    const int64_t j1 = nnz * (part + 1) / threads;
    if (j >= j1) continue;
    int64_t r = std::upper_bound(ro, ro + N + 1, int32_t(j)) - ro - 1;
    for (; j < j1; ++r) {
      typename W::T* row = weight + r * K;
      const int64_t end = std::min<int64_t>(ro[r + 1], j1);
      // Every entry is a cache and a TLB miss: start those of the next row early.
      const int64_t next_end = std::min<int64_t>(ro[std::min(r + 2, N)], j1);
      for (int64_t a = end; a < next_end; ++a) __builtin_prefetch(row + K + cols[a], 1);
      for (; j < end; ++j)
        row[cols[j]] = W::narrow(bits_float(W::widen(row[cols[j]])) + bits_float(V::widen(values[j])));
    }
  }
}

template <class W>
void scatter_add_to(void* weight, int64_t N, int64_t K, const void* values, int dtype, const int32_t* ro,
                    const int32_t* cols, int threads) {
  auto* w = static_cast<typename W::T*>(weight);
  if (dtype == F32) scatter_add<W, Float>(w, N, K, static_cast<const uint32_t*>(values), ro, cols, threads);
  else if (dtype == BF16) scatter_add<W, BFloat>(w, N, K, static_cast<const uint16_t*>(values), ro, cols, threads);
  else scatter_add<W, Half>(w, N, K, static_cast<const uint16_t*>(values), ro, cols, threads);
}

// ---- exact top-k by radix selection on the bits of non-negative fp32 ------------------------------------------------

struct Scores {
  const uint32_t* data;
  int64_t N, K, stride_n, stride_k;
};

constexpr int SPAN = 1024;  // scores looked at at once

INLINE uint32_t score_key(uint32_t bits) { return bits >> 31 ? 0u : bits; }  // -0.0 and below count as 0

// f(first column, count, pointer to contiguous scores) over row r; rows that are not contiguous go through a buffer.
template <class F>
INLINE void for_spans(const Scores& s, int64_t r, F f) {
  uint32_t buffer[SPAN];
  for (int64_t k = 0; k < s.K; k += SPAN) {
    const int n = int(std::min<int64_t>(SPAN, s.K - k));
    const uint32_t* p = s.data + r * s.stride_n + k * s.stride_k;
    if (s.stride_k != 1) {
      for (int i = 0; i < n; ++i) buffer[i] = p[i * s.stride_k];
      p = buffer;
    }
    f(k, n, p);
  }
}

// f(index, key) for those scores of a span with lo <= key: mostly none in a vector, which is then one comparison.
template <class F>
INLINE void for_at_least(const uint32_t* p, int n, uint32_t lo, F f) {
  int i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    vi a = (vi)*reinterpret_cast<const vu_unaligned*>(p + i), b = (vi)*reinterpret_cast<const vu_unaligned*>(p + i + VL);
    if (lo > 0) {  // as signed integers negative scores are below every key
      vi hit = (a >= (vi)splat(lo)) | (b >= (vi)splat(lo));
      uint64_t any = 0;
      typedef uint64_t vq __attribute__((vector_size(VEC_BYTES), may_alias));
      vq q = (vq)hit;
#pragma GCC unroll 8
      for (int w = 0; w < VEC_BYTES / 8; ++w) any |= q[w];
      if (!any) continue;
    }
    for (int e = i; e < i + 2 * VL; ++e)
      if (score_key(p[e]) >= lo) f(e, score_key(p[e]));
  }
  for (; i < n; ++i)
    if (score_key(p[i]) >= lo) f(i, score_key(p[i]));
}

}  // namespace

extern "C" {

void rosa_scatter_add(void* weight, int weight_dtype, int64_t N, int64_t K, const void* values, int values_dtype,
                      const int32_t* row_offsets, const int32_t* cols, int threads) {
  auto* f = weight_dtype == F32 ? scatter_add_to<Float> : weight_dtype == BF16 ? scatter_add_to<BFloat> : scatter_add_to<Half>;
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, row_offsets[N] / 2048)));
  f(weight, N, K, values, values_dtype, row_offsets, cols, threads);
}

// Returns 0, or 1 when scratch memory could not be had (out is then undefined).
int rosa_sddmm(const void* dy, int dy_dtype, int64_t dy_stride_m, int64_t dy_stride_n, const void* x, int x_dtype,
               int64_t x_stride_m, int64_t x_stride_k, int64_t M, int64_t N, int64_t K, const int32_t* row_offsets,
               const int32_t* cols, float* out, int threads) {
  const int64_t nnz = row_offsets[N];
  if (nnz == 0) return 0;
  if (M == 0) { std::fill(out, out + nnz, 0.0f); return 0; }
  const bool packed = x_dtype == BF16;
  Sddmm s{{dy, dy_stride_m, dy_stride_n, M}, {x, x_stride_m, x_stride_k, M}, N, K, row_offsets, cols,
          pick_transpose(dy_dtype, false), pick_transpose(x_dtype, packed), packed, nullptr};
  const int64_t tile = MAX_LINES * LINE * (packed ? 2 : 1), tiles = (M + tile - 1) / tile;
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
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < chunks * ranges; ++task) {
      const int64_t c = task / ranges, i = task % ranges;
      float* target = c == 0 ? out : partial + (c - 1) * nnz;
      if (!sddmm_task(s, tiles * c / chunks, tiles * (c + 1) / chunks, nnz * i / ranges, nnz * (i + 1) / ranges, target))
#pragma omp atomic write
        failed = 1;
    }
    if (chunks > 1) {
#pragma omp for schedule(static)
      for (int64_t j0 = 0; j0 < nnz; j0 += SPAN) {
        const int64_t j1 = std::min(nnz, j0 + SPAN);
        for (int64_t c = 0; c < chunks - 1; ++c)
          for (int64_t j = j0; j < j1; ++j) out[j] += partial[c * nnz + j];
      }
    }
  }
  return failed;
}

// 0: done; 1: there is a NaN (cols and row_offsets untouched); 2: out of memory. `cols` holds nnz entries.
int rosa_select_topk(const float* score, int64_t N, int64_t K, int64_t stride_n, int64_t stride_k, int64_t nnz,
                     int32_t* row_offsets, int32_t* cols, int threads) {
  const Scores s{reinterpret_cast<const uint32_t*>(score), N, K, stride_n, stride_k};
  if (N * K < 65536) threads = 1;
  const int64_t batch = std::max<int64_t>(1, (int64_t(1) << 18) / std::max<int64_t>(K, 1)), batches = (N + batch - 1) / batch;
  constexpr int COPIES = 4;  // neighbours often share a bin; separate counters avoid waiting for the last increment
  uint32_t prefix = 0;       // the key of the nnz-th largest score, found 11 + 11 + 10 bits at a time
  int64_t remaining = nnz;   // how many of the scores that share `prefix` so far are wanted
  bool nan = false;
  const int shifts[] = {21, 10, 0}, widths[] = {11, 11, 10};
  for (int pass = 0; pass < 3 && (nnz > 0 || pass == 0); ++pass) {
    const int shift = shifts[pass], bins = 1 << widths[pass];
    std::vector<int64_t> total(bins, 0);
    const uint32_t top = pass == 0 ? 0 : prefix >> (shift + widths[pass]);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t b = 0; b < batches; ++b) {
      uint32_t count[COPIES << 11];
      std::memset(count, 0, sizeof(uint32_t) * COPIES * bins);
      vi worst{};
      uint32_t worst_tail = 0;
      for (int64_t r = b * batch; r < std::min(N, (b + 1) * batch); ++r)
        for_spans(s, r, [&](int64_t, int n, const uint32_t* p) {
          if (pass == 0) {
            int i = 0;
            for (; i + VL <= n; i += VL) {
              const vi key = (vi)(*reinterpret_cast<const vu_unaligned*>(p + i) & 0x7fffffffu);
              worst = (vi)select((vu)(key > worst), (vu)key, (vu)worst);
#pragma GCC unroll 16
              for (int e = 0; e < VL; ++e) ++count[(e % COPIES) * bins + (score_key(p[i + e]) >> shift)];
            }
            for (; i < n; ++i) {
              worst_tail = std::max(worst_tail, p[i] & 0x7fffffffu);
              ++count[score_key(p[i]) >> shift];
            }
          } else {
            for_at_least(p, n, prefix, [&](int e, uint32_t key) {
              if (key >> (shift + widths[pass]) == top) ++count[(e % COPIES) * bins + ((key >> shift) & (bins - 1))];
            });
          }
        });
      for (int i = 0; i < VL; ++i) worst_tail = std::max(worst_tail, uint32_t(worst[i]));
#pragma omp critical(rosa_topk)
      {
        nan |= worst_tail > 0x7f800000u;
        for (int i = 0; i < COPIES * bins; ++i) total[i & (bins - 1)] += count[i];
      }
    }
    if (nan) return 1;
    int bin = bins - 1;
    for (; bin > 0 && total[bin] < remaining; --bin) remaining -= total[bin];
    prefix |= uint32_t(bin) << shift;
  }
  if (nnz == 0) { std::fill(row_offsets, row_offsets + N + 1, 0); return 0; }
  // row_offsets[r + 1] first holds what row r has above the threshold, ties[r] what it has at the threshold.
  std::unique_ptr<int32_t[]> ties(new (std::nothrow) int32_t[N]);
  if (!ties) return 2;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t r = b * batch; r < std::min(N, (b + 1) * batch); ++r) {
      int32_t above = 0, equal = 0;
      for_spans(s, r, [&](int64_t, int n, const uint32_t* p) {
        for_at_least(p, n, prefix, [&](int, uint32_t key) { key == prefix ? ++equal : ++above; });
      });
      row_offsets[r + 1] = above;
      ties[r] = equal;
    }
  row_offsets[0] = 0;
  for (int64_t r = 0; r < N; ++r) {  // ties go to the smallest flat indices
    ties[r] = int32_t(std::min<int64_t>(ties[r], remaining));
    remaining -= ties[r];
    row_offsets[r + 1] += row_offsets[r] + ties[r];
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t r = b * batch; r < std::min(N, (b + 1) * batch); ++r) {
      int32_t *to = cols + row_offsets[r], *end = cols + row_offsets[r + 1];
      int32_t left = ties[r];
      if (to == end) continue;
      for_spans(s, r, [&](int64_t k, int n, const uint32_t* p) {
        for_at_least(p, n, prefix, [&](int e, uint32_t key) {
          if (key == prefix && left-- <= 0) return;
          if (to < end) *to++ = int32_t(k + e);
        });
      });
    }
  return 0;
}

}  // extern "C"
