// Dense weight gradient: dyᵀ x [N, K] of dy [M, N] and x [M, K]; stored, with or without its signs, or added to a sum, as it is
// or squared. Included after sddmm.cpp, whose reading of matrices of any strides it shares.
//
// Both factors lie as an outer product wants them, so packing only widens. A task is a block of out; its sums stay in L2 while
// M goes by in chunks, and nothing else of out's size exists. Packing costs some 3 cycles for each vector of x and dy, which
// then takes part in 256 and 384 products: about 5 % of the time. What is left is the kernel, 24 multiply-adds for 11 loads:
// 430 GFLOP/s in float32 and 850 in bfloat16 (Zen 5, two cores, 4096x4096 with 2048 rows: 155 and 81 ms; oneDNN, into a new
// tensor, 191 and, rounding to bfloat16, 89; MKL 336).
//
// Pairs of bfloat16 (see `Words` in sddmm.cpp) take products below 2^-126 for 0; in all else the products of 16-bit factors
// are exact, and sums are float32. Each element is summed in the same order wherever blocks and threads are cut.
namespace {

// ---- packing ------------------------------------------------------------------------------------------------------
//
// A step is one row of M, or two where the CPU multiplies pairs of bf16. A word is the fp32 value of a step, or the bf16 of its
// first row below that of its second. Columns lie in groups of `GROUP` vectors, one after another, each [steps][GROUP][VL].

template <class E, bool PAIRS>
INLINE uint32_t step_word(const Matrix& a, int64_t m, int64_t c) {
  const typename E::T* p = static_cast<const typename E::T*>(a.data) + m * a.stride_m + c * a.stride_c;
  if (!PAIRS) return E::widen(p[0]);
  return uint32_t(p[0]) | (m + 1 < a.M ? uint32_t(p[a.stride_m]) << 16 : 0u);
}

// Columns c0 .. c1 of rows m0 .. m1 of `a`; zeros after the last column and the last row.
template <class E, bool PAIRS, int GROUP>
void pack(const Matrix& a, int64_t m0, int64_t m1, int64_t c0, int64_t c1, uint32_t* dst) {
  using T = typename E::T;
  constexpr int64_t STEP = PAIRS ? 2 : 1, WIDTH = GROUP * VL;
  const int64_t steps = (m1 - m0 + STEP - 1) / STEP, whole = (m1 - m0) / STEP;
  const auto to = [&](int64_t s, int64_t c) { return dst + (c - c0) / WIDTH * WIDTH * steps + s * WIDTH + (c - c0) % WIDTH; };
  const auto edge = [&](int64_t s0, int64_t s1, int64_t c, int64_t end) {  // end: of the vector that begins at c
    for (int64_t s = s0; s < s1; ++s)
      for (int64_t e = c; e < end; ++e) *to(s, e) = e < c1 ? step_word<E, PAIRS>(a, m0 + s * STEP, e) : 0u;
  };
  const int64_t padded = c0 + (c1 - c0 + WIDTH - 1) / WIDTH * WIDTH, full = c0 + (c1 - c0) / VL * VL;
  const T* data = static_cast<const T*>(a.data) + m0 * a.stride_m;
  int64_t done = 0;  // steps of the full vectors
  if (a.stride_c == 1) {
    for (; done < whole; ++done) {
      const T* p = data + done * STEP * a.stride_m + c0;
      uint32_t* q = dst + done * WIDTH;
      int64_t c = c0;
      for (; c + WIDTH <= full; c += WIDTH, p += WIDTH, q += WIDTH * steps)
#pragma GCC unroll 4
        for (int v = 0; v < GROUP; ++v) *reinterpret_cast<vu*>(q + v * VL) = load_words<E, PAIRS>(p + v * VL, a.stride_m);
      for (; c < full; c += VL, p += VL, q += VL) *reinterpret_cast<vu*>(q) = load_words<E, PAIRS>(p, a.stride_m);
    }
  } else if (a.stride_m == 1) {
    for (; done + VL <= whole; done += VL)
      for (int64_t c = c0; c < full; c += VL) {
        vu v[VL];
        for (int i = 0; i < VL; ++i) {
          const T* p = data + done * STEP + (c + i) * a.stride_c;
          if (PAIRS) std::memcpy(&v[i], p, sizeof(vu));
          else v[i] = E::widen(E::load(p));
        }
        transpose_square(v);
        for (int i = 0; i < VL; ++i) *reinterpret_cast<vu*>(to(done + i, c)) = v[i];
      }
  }
  for (int64_t c = c0; c < full; c += VL) edge(done, steps, c, c + VL);
  if (full < padded) edge(0, steps, full, padded);
}

using Pack = void (*)(const Matrix&, int64_t, int64_t, int64_t, int64_t, uint32_t*);

template <int GROUP>
Pack pick_pack(int dtype, bool pairs) {
  if (pairs) return pack<BFloat, true, GROUP>;
  return dtype == F32 ? pack<Float, false, GROUP> : dtype == BF16 ? pack<BFloat, false, GROUP> : pack<Half, false, GROUP>;
}

// ---- products -----------------------------------------------------------------------------------------------------

enum Finish { STORE = 0, ADD = 1, ADD_SQUARE = 2, STORE_SIZE = 3 };

// Sums in registers: TILE_N rows of TILE_V vectors, beside which there is room for the vectors of x and one value of dy.
constexpr int TILE_N = VEC_BYTES == 64 ? 8 : 4, TILE_V = 3, TILE_K = TILE_V * VL;
// Sums of CHUNK rows in registers, of GROUP_OF_CHUNKS such sums, and of these: three short sums err less than a long one. A
// chunk of TILE_K columns of x is 24 KiB, in L1.
constexpr int64_t CHUNK = 128, GROUP_OF_CHUNKS = 32;
constexpr int64_t BLOCK_N = 256, BLOCK_K = 8 * TILE_K;  // of out to a task: its sums and the packed factors are 0.7 MiB, in L2

INLINE vf load_floats(const float* p) { return (vf)*reinterpret_cast<const vu_unaligned*>(p); }
INLINE void store_floats(float* p, vf v) { *reinterpret_cast<vu_unaligned*>(p) = (vu)v; }

INLINE bool adds(Finish how) { return how == ADD || how == ADD_SQUARE; }
INLINE vf finished(Finish how, vf old, vf sum) {
  return how == STORE ? sum : how == ADD ? old + sum : how == ADD_SQUARE ? old + sum * sum : (vf)((vu)sum & 0x7fffffffu);
}

struct Tile {  // where the sums [TILE_N][TILE_K] of a chunk go
  const float *sums, *totals;  // of the chunks before in its group and of the groups before, where there are any
  float* to;                   // the sum of all three, or null: it is the last chunk, and the sum goes to
  float* out;                  // rows x columns, `pitch` elements from row to row
  int64_t pitch, rows, columns;
  Finish how;
};

// Kept out of line so that its sums own the register file. dy: [steps][VL], of which TILE_N are used; x: [steps][TILE_K].
template <bool PAIRS>
__attribute__((noinline)) void multiply(const uint32_t* dy, const uint32_t* x, int64_t steps, const Tile& t) {
  vf acc[TILE_N * TILE_V];
#pragma GCC unroll 32
  for (int i = 0; i < TILE_N * TILE_V; ++i) acc[i] = vf{};
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s, dy += VL, x += TILE_K) {
    vu row[TILE_V];
#pragma GCC unroll 4
    for (int v = 0; v < TILE_V; ++v) row[v] = reinterpret_cast<const vu*>(x)[v];
#pragma GCC unroll 8
    for (int n = 0; n < TILE_N; ++n) {
      const vu factor = splat(dy[n]);
#pragma GCC unroll 4
      for (int v = 0; v < TILE_V; ++v) {
        vf& a = acc[n * TILE_V + v];
#if defined(__AVX512BF16__)
        if (PAIRS) a = (vf)_mm512_dpbf16_ps((__m512)a, (__m512bh)factor, (__m512bh)row[v]);
        else a += (vf)factor * (vf)row[v];
#else
        a += (vf)factor * (vf)row[v];
#endif
      }
    }
  }
  for (const float* before : {t.sums, t.totals})
    if (before) {
#pragma GCC unroll 32
      for (int i = 0; i < TILE_N * TILE_V; ++i) acc[i] += reinterpret_cast<const vf*>(before)[i];
    }
  if (!t.to && t.rows == TILE_N && t.columns == TILE_K) {
#pragma GCC unroll 8
    for (int n = 0; n < TILE_N; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < TILE_V; ++v) {
        float* p = t.out + n * t.pitch + v * VL;
        store_floats(p, finished(t.how, adds(t.how) ? load_floats(p) : vf{}, acc[n * TILE_V + v]));
      }
    return;
  }
  alignas(VEC_BYTES) float edge[TILE_N * TILE_K];
  float* to = t.to ? t.to : edge;
#pragma GCC unroll 32
  for (int i = 0; i < TILE_N * TILE_V; ++i) reinterpret_cast<vf*>(to)[i] = acc[i];
  if (t.to) return;
  for (int64_t n = 0; n < t.rows; ++n)
    for (int64_t k = 0; k < t.columns; ++k) {
      float* p = t.out + n * t.pitch + k;
      *p = finished(t.how, adds(t.how) ? vf{} + *p : vf{}, vf{} + edge[n * TILE_K + k])[0];
    }
}

struct Gradient {
  Matrix dy, x;
  Pack pack_dy, pack_x;
  bool pairs;
  Finish how;
  float* out;
  int64_t pitch;
};

// Rows n0 .. n1, columns k0 .. k1 of out. False when out of memory.
bool gradient_block(const Gradient& g, int64_t n0, int64_t n1, int64_t k0, int64_t k1) {
  const int64_t step = g.pairs ? 2 : 1, most = CHUNK / step, M = g.x.M, groups = (n1 - n0 + VL - 1) / VL;
  const int64_t tiles_n = (n1 - n0 + TILE_N - 1) / TILE_N, tiles_k = (k1 - k0 + TILE_K - 1) / TILE_K, tile = TILE_N * TILE_K;
  const bool several = M > CHUNK * GROUP_OF_CHUNKS;
  uint32_t* x = panel_scratch.get<uint32_t>(tiles_k * TILE_K * most);
  uint32_t* dy = block_scratch.get<uint32_t>(groups * VL * most);
  float* sums = partial_scratch.get<float>(tiles_n * tiles_k * tile * (several ? 2 : 1));
  if (!x || !dy || !sums) return false;
  float* totals = sums + tiles_n * tiles_k * tile;
  for (int64_t m0 = 0; m0 < M; m0 += CHUNK) {
    const int64_t m1 = std::min(M, m0 + CHUNK), steps = (m1 - m0 + step - 1) / step, chunk = m0 / CHUNK;
    const bool last = m1 == M, group_ends = (chunk + 1) % GROUP_OF_CHUNKS == 0;
    g.pack_dy(g.dy, m0, m1, n0, n1, dy);
    g.pack_x(g.x, m0, m1, k0, k1, x);
    for (int64_t k = 0; k < tiles_k; ++k)
      for (int64_t n = 0; n < tiles_n; ++n) {
        const int64_t row = n0 + n * TILE_N, column = k0 + k * TILE_K, at = (k * tiles_n + n) * tile;
        const Tile where{chunk % GROUP_OF_CHUNKS ? sums + at : nullptr,
                         chunk >= GROUP_OF_CHUNKS && (last || group_ends) ? totals + at : nullptr,
                         last ? nullptr : (group_ends ? totals : sums) + at,
                         g.out + row * g.pitch + column,
                         g.pitch,
                         std::min<int64_t>(TILE_N, n1 - row),
                         std::min<int64_t>(TILE_K, k1 - column),
                         g.how};
        const uint32_t* left = dy + n * TILE_N / VL * VL * steps + n * TILE_N % VL;
        (g.pairs ? multiply<true> : multiply<false>)(left, x + k * TILE_K * steps, steps, where);
      }
  }
  return true;
}

}  // namespace

extern "C" {

// Returns 0, or 1 when scratch memory could not be had (out is then undefined). Rows of out are `pitch` elements apart.
int rosa_weight_gradient(const void* dy, int dy_dtype, int64_t dy_stride_m, int64_t dy_stride_n, const void* x, int x_dtype,
                         int64_t x_stride_m, int64_t x_stride_k, int64_t M, int64_t N, int64_t K, float* out, int64_t pitch,
                         int how, int threads) {
  if (N == 0 || K == 0) return 0;
  if (M == 0) {
    if (!adds(Finish(how)))
      for (int64_t n = 0; n < N; ++n) std::fill(out + n * pitch, out + n * pitch + K, 0.0f);
    return 0;
  }
#if defined(__AVX512BF16__)
  const bool pairs = dy_dtype == BF16 && x_dtype == BF16 && M > 1;
#else
  const bool pairs = false;
#endif
  const Gradient g{{dy, dy_stride_m, dy_stride_n, M}, {x, x_stride_m, x_stride_k, M}, pick_pack<1>(dy_dtype, pairs),
                   pick_pack<TILE_V>(x_dtype, pairs), pairs, Finish(how), out, pitch};
  // Blocks in whole tiles, of about one size, and enough of them for all threads. No sum depends on how they are cut.
  const int64_t tiles_n = (N + VL - 1) / VL, tiles_k = (K + TILE_K - 1) / TILE_K;
  int64_t blocks_n = (N + BLOCK_N - 1) / BLOCK_N, blocks_k = (K + BLOCK_K - 1) / BLOCK_K;
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, double(M) * double(N) * double(K) / (1 << 20))));
  while (threads > 1 && blocks_n * blocks_k < 2 * threads && (blocks_n < tiles_n || blocks_k < tiles_k)) {
    const bool by_rows = blocks_k == tiles_k || (blocks_n < tiles_n && N / blocks_n > K / blocks_k);
    int64_t& more = by_rows ? blocks_n : blocks_k;
    more = std::min(2 * more, by_rows ? tiles_n : tiles_k);
  }
  int failed = 0;
  Crew crew;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1) nowait
  for (int64_t task = 0; task < blocks_n * blocks_k; ++task) {
    const int64_t n = task % blocks_n, k = task / blocks_n;
    const int64_t n0 = tiles_n * n / blocks_n * VL, n1 = std::min(N, tiles_n * (n + 1) / blocks_n * VL);
    const int64_t k0 = tiles_k * k / blocks_k * TILE_K, k1 = std::min(K, tiles_k * (k + 1) / blocks_k * TILE_K);
    if (!gradient_block(g, n0, n1, k0, k1))
#pragma omp atomic write
      failed = 1;
  }
  crew.finish();
  }
  return failed;
}

}  // extern "C"
