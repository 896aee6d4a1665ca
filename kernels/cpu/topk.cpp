// Exact top-k by radix selection on the bits of non-negative fp32.
namespace {

struct Scores {
  const uint32_t* data;
  int64_t N, K, stride_n, stride_k;
};

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

// 0: done; 1: there is a NaN or an infinity (cols and row_offsets untouched); 2: out of memory. `cols` holds nnz entries.
int rosa_select_topk(const float* score, int64_t N, int64_t K, int64_t stride_n, int64_t stride_k, int64_t nnz,
                     int32_t* row_offsets, int32_t* cols, int threads) {
  const Scores s{reinterpret_cast<const uint32_t*>(score), N, K, stride_n, stride_k};
  if (N * K < 65536) threads = 1;
  const int64_t batch = std::max<int64_t>(1, (int64_t(1) << 18) / std::max<int64_t>(K, 1)), batches = (N + batch - 1) / batch;
  constexpr int COPIES = 4;  // neighbours often share a bin; separate counters avoid waiting for the last increment
  uint32_t prefix = 0;       // the key of the nnz-th largest score, found 11 + 11 + 10 bits at a time
  int64_t remaining = nnz;   // how many of the scores that share `prefix` so far are wanted
  bool unusable = false;
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
        unusable |= worst_tail >= 0x7f800000u;
        for (int i = 0; i < COPIES * bins; ++i) total[i & (bins - 1)] += count[i];
      }
    }
    if (unusable) return 1;
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
