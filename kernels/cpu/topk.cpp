// Exact top-k of non-negative fp32.
//
// A sample gives a floor that somewhat more than nnz scores reach. One pass over all of them checks that they are finite and
// keeps those that reach it; a histogram of what was kept finds the last one wanted. Where too few or too many reach the
// floor (the sample missed them, or many are equal), and for dense masks, the radix selection goes over all scores, five times.
// Zen 5, two cores, 0.6 %, 4096x4096: 4.3 to 5.8 ms, more than half of it the pass over all scores, against 14.8 in five passes.
namespace {

INLINE uint32_t score_key(uint32_t bits) { return bits >> 31 ? 0u : bits; }  // -0.0 and below count as 0

struct Scores {
  const uint32_t* data;
  int64_t N, K, stride_n, stride_k;
};

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

INLINE bool any_lane(vi mask) {
  typedef uint64_t vq __attribute__((vector_size(VEC_BYTES), may_alias));
  const vq q = (vq)mask;
  uint64_t any = 0;
#pragma GCC unroll 8
  for (int w = 0; w < VEC_BYTES / 8; ++w) any |= q[w];
  return any;
}

INLINE vi load_keys(const uint32_t* p) { return (vi)*reinterpret_cast<const vu_unaligned*>(p); }

// f(index, key) for those scores of a span with lo <= key: mostly none in a vector, which is then one comparison.
template <class F>
INLINE void for_at_least(const uint32_t* p, int n, uint32_t lo, F f) {
  int i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    // As signed integers negative scores are below every key.
    if (lo > 0 && !any_lane((load_keys(p + i) >= (vi)splat(lo)) | (load_keys(p + i + VL) >= (vi)splat(lo)))) continue;
    for (int e = i; e < i + 2 * VL; ++e)
      if (score_key(p[e]) >= lo) f(e, score_key(p[e]));
  }
  for (; i < n; ++i)
    if (score_key(p[i]) >= lo) f(i, score_key(p[i]));
}

struct Largest {  // bits without their sign: 0x7f800000 and above is not finite
  vi lanes{};
  uint32_t rest = 0;

  INLINE_MEMBER void see(const uint32_t* p) {
    const vi key = load_keys(p) & 0x7fffffff;
    lanes = (vi)select((vu)(key > lanes), (vu)key, (vu)lanes);
  }
  INLINE_MEMBER void see_one(uint32_t bits) { rest = std::max(rest, bits & 0x7fffffffu); }
  bool finite() const {
    uint32_t worst = rest;
    for (int i = 0; i < VL; ++i) worst = std::max(worst, uint32_t(lanes[i]));
    return worst < 0x7f800000u;
  }
};

// A key that probably somewhat more than nnz scores reach; 0 if there is none to be had.
uint32_t sampled_floor(const Scores& s, int64_t nnz) {
  const int64_t run = std::min<int64_t>(s.K, 16), runs = std::max<int64_t>(256, std::min<int64_t>(2048, s.N * s.K / 1024));
  std::vector<uint32_t> sample;
  sample.reserve(runs * run);
  for (int64_t i = 0; i < runs; ++i) {
    const uint64_t anywhere = (uint64_t(i) * 0x9e3779b97f4a7c15u) >> 33;
    const uint32_t* p = s.data + i * s.N / runs * s.stride_n + int64_t(anywhere % (s.K - run + 1)) * s.stride_k;
    for (int64_t e = 0; e < run; ++e) sample.push_back(score_key(p[e * s.stride_k]));
  }
  // Scores of a run resemble each other, so more than the few standard deviations of independent ones are added.
  const double expected = double(sample.size()) * nnz / (double(s.N) * s.K), rank = 1.25 * expected + 6 * std::sqrt(expected) + 8;
  if (rank >= sample.size()) return 0;
  const auto at = sample.begin() + int64_t(rank);
  std::nth_element(sample.begin(), at, sample.end(), std::greater<uint32_t>());
  return *at;
}

enum Outcome { DONE = 0, NOT_FINITE = 1, OUT_OF_MEMORY = 2, NONE = 3 };

struct Kept {  // of a batch of rows
  std::vector<uint32_t> keys;
  std::vector<int32_t> columns, ends;  // of the rows' parts in the two others
};

// Keeps the scores of rows r0 .. r1 that reach `floor`; more than `most` need not be kept.
void keep_rows(const Scores& s, int64_t r0, int64_t r1, uint32_t floor, size_t most, Kept& kept, Largest& largest) {
  uint32_t keys[SPAN];
  int32_t columns[SPAN];
  for (int64_t r = r0; r < r1; ++r) {
    for_spans(s, r, [&](int64_t column, int n, const uint32_t* p) {
      int found = 0;
      const auto look = [&](int e) {  // without a branch that nobody could predict
        keys[found] = p[e];
        columns[found] = int32_t(column + e);
        found += int32_t(p[e]) >= int32_t(floor);
      };
      int i = 0;
      for (; i + VL <= n; i += VL) {
        largest.see(p + i);
        if (any_lane(load_keys(p + i) >= (vi)splat(floor)))
          for (int e = i; e < i + VL; ++e) look(e);
      }
      for (; i < n; ++i) {
        largest.see_one(p[i]);
        look(i);
      }
      if (kept.keys.size() > most) return;
      kept.keys.insert(kept.keys.end(), keys, keys + found);
      kept.columns.insert(kept.columns.end(), columns, columns + found);
    });
    kept.ends.push_back(int32_t(kept.keys.size()));
  }
}

// Keeps what reaches `floor`. NONE unless that is nnz scores or somewhat more.
Outcome keep(const Scores& s, uint32_t floor, int64_t nnz, int64_t batch, std::vector<Kept>& kept, int threads) {
  const size_t most = 5 * nnz / 2 + 4096;
  size_t total = 0;
  bool finite = true;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t b = 0; b < int64_t(kept.size()); ++b) {
    Largest largest;
    size_t found = most + 1;
    try {
      keep_rows(s, b * batch, std::min(s.N, (b + 1) * batch), floor, most, kept[b], largest);
      found = kept[b].keys.size();
    } catch (const std::bad_alloc&) {
    }
    const bool good = largest.finite();
#pragma omp critical(rosa_topk)
    {
      total += found;
      finite &= good;
    }
  }
  return total > most || int64_t(total) < nnz ? NONE : finite ? DONE : NOT_FINITE;
}

// The nnz-th largest key, and how many of those that are equal to it belong to the nnz largest.
struct Threshold {
  uint32_t key = 0;
  int64_t ties = 0;
};

Outcome find_threshold(const Scores& s, int64_t batch, int64_t nnz, Threshold& threshold, int threads) {
  const int64_t N = s.N, batches = (N + batch - 1) / batch;
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
      Largest largest;
      for (int64_t r = b * batch; r < std::min(N, (b + 1) * batch); ++r)
        for_spans(s, r, [&](int64_t, int n, const uint32_t* p) {
          if (pass == 0) {
            int i = 0;
            for (; i + VL <= n; i += VL) {
              largest.see(p + i);
#pragma GCC unroll 16
              for (int e = 0; e < VL; ++e) ++count[(e % COPIES) * bins + (score_key(p[i + e]) >> shift)];
            }
            for (; i < n; ++i) {
              largest.see_one(p[i]);
              ++count[score_key(p[i]) >> shift];
            }
          } else {
            for_at_least(p, n, prefix, [&](int e, uint32_t key) {
              if (key >> (shift + widths[pass]) == top) ++count[(e % COPIES) * bins + ((key >> shift) & (bins - 1))];
            });
          }
        });
      const bool bad = !largest.finite();
#pragma omp critical(rosa_topk)
      {
        unusable |= bad;
        for (int i = 0; i < COPIES * bins; ++i) total[i & (bins - 1)] += count[i];
      }
    }
    if (unusable) return NOT_FINITE;
    int bin = bins - 1;
    for (; bin > 0 && total[bin] < remaining; --bin) remaining -= total[bin];
    prefix |= uint32_t(bin) << shift;
  }
  threshold = {prefix, remaining};
  return DONE;
}

// The same of kept keys, all at least `floor`, in one thread: they are few. One histogram, and its one bin sorted.
Threshold kept_threshold(const std::vector<Kept>& kept, uint32_t floor, int64_t nnz) {
  uint32_t largest = floor;
  for (const Kept& k : kept)
    for (uint32_t key : k.keys) largest = std::max(largest, key);
  int shift = 0;
  while ((largest - floor) >> shift >= 4096) ++shift;
  std::vector<int64_t> count(((largest - floor) >> shift) + 1, 0);
  for (const Kept& k : kept)
    for (uint32_t key : k.keys) ++count[(key - floor) >> shift];
  uint32_t bin = uint32_t(count.size() - 1);
  for (; count[bin] < nnz; --bin) nnz -= count[bin];
  std::vector<uint32_t> keys;
  keys.reserve(count[bin]);
  for (const Kept& k : kept)
    for (uint32_t key : k.keys)
      if ((key - floor) >> shift == bin) keys.push_back(key);
  std::nth_element(keys.begin(), keys.begin() + (nnz - 1), keys.end(), std::greater<uint32_t>());
  const uint32_t key = keys[nnz - 1];
  return {key, nnz - std::count_if(keys.begin(), keys.end(), [&](uint32_t k) { return k > key; })};
}

// Rows of a mask: how many are above the threshold and at it, and the columns of the first that fit.
struct AllRows {
  const Scores& s;

  void count(int64_t r, uint32_t key, int32_t& above, int32_t& equal) const {
    for_spans(s, r, [&](int64_t, int n, const uint32_t* p) {
      for_at_least(p, n, key, [&](int, uint32_t k) { k == key ? ++equal : ++above; });
    });
  }
  void write(int64_t r, uint32_t key, int32_t ties, int32_t* to, int32_t* end) const {
    for_spans(s, r, [&](int64_t column, int n, const uint32_t* p) {
      for_at_least(p, n, key, [&](int e, uint32_t k) {
        if (k == key && ties-- <= 0) return;
        if (to < end) *to++ = int32_t(column + e);
      });
    });
  }
};

struct KeptRows {
  const std::vector<Kept>& kept;
  int64_t batch;

  template <class F>
  INLINE_MEMBER void each(int64_t r, F f) const {
    const Kept& k = kept[r / batch];
    const int64_t row = r % batch;
    for (int32_t i = row ? k.ends[row - 1] : 0; i < k.ends[row]; ++i) f(k.keys[i], k.columns[i]);
  }
  void count(int64_t r, uint32_t key, int32_t& above, int32_t& equal) const {
    each(r, [&](uint32_t k, int32_t) { above += k > key; equal += k == key; });
  }
  void write(int64_t r, uint32_t key, int32_t ties, int32_t* to, int32_t* end) const {
    each(r, [&](uint32_t k, int32_t column) {
      if (to == end) return;
      *to = column;
      to += int(k > key) | int(k == key && ties-- > 0);
    });
  }
};

// The mask of what is above the threshold, and of the first of what is at it.
template <class Rows>
Outcome write_mask(const Rows& rows, int64_t N, int64_t batch, Threshold threshold, int32_t* row_offsets, int32_t* cols,
                   int threads) {
  const int64_t batches = (N + batch - 1) / batch;
  // row_offsets[r + 1] first holds what row r has above the threshold, ties[r] what it has at the threshold.
  std::unique_ptr<int32_t[]> ties(new (std::nothrow) int32_t[N]);
  if (!ties) return OUT_OF_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t r = b * batch; r < std::min(N, (b + 1) * batch); ++r) {
      row_offsets[r + 1] = ties[r] = 0;
      rows.count(r, threshold.key, row_offsets[r + 1], ties[r]);
    }
  row_offsets[0] = 0;
  for (int64_t r = 0; r < N; ++r) {  // ties go to the smallest flat indices
    ties[r] = int32_t(std::min<int64_t>(ties[r], threshold.ties));
    threshold.ties -= ties[r];
    row_offsets[r + 1] += row_offsets[r] + ties[r];
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t r = b * batch; r < std::min(N, (b + 1) * batch); ++r)
      rows.write(r, threshold.key, ties[r], cols + row_offsets[r], cols + row_offsets[r + 1]);
  return DONE;
}

}  // namespace

extern "C" {

// An `Outcome` but NONE: where there is a NaN or an infinity cols and row_offsets are untouched. `cols` holds nnz entries.
int rosa_select_topk(const float* score, int64_t N, int64_t K, int64_t stride_n, int64_t stride_k, int64_t nnz,
                     int32_t* row_offsets, int32_t* cols, int threads) {
  const Scores s{reinterpret_cast<const uint32_t*>(score), N, K, stride_n, stride_k};
  const auto rows = [&](int64_t scores) { return std::max<int64_t>(1, scores / std::max<int64_t>(K, 1)); };
  if (N * K < 65536) {
    threads = 1;
  } else if (nnz > 0 && nnz <= N * K / 64) {  // else what is kept takes a tenth of the scores' memory, and saves less
    const int64_t batch = rows(1 << 15);
    const uint32_t floor = sampled_floor(s, nnz);
    std::vector<Kept> kept((N + batch - 1) / batch);
    const Outcome how = floor ? keep(s, floor, nnz, batch, kept, threads) : NONE;
    if (how == NOT_FINITE) return how;
    if (how == DONE) {
      const Threshold threshold = kept_threshold(kept, floor, nnz);
      return write_mask(KeptRows{kept, batch}, N, batch, threshold, row_offsets, cols, nnz < 65536 ? 1 : threads);
    }
  }
  const int64_t batch = rows(1 << 18);
  Threshold threshold;
  const Outcome how = find_threshold(s, batch, nnz, threshold, threads);
  if (how != DONE) return how;
  if (nnz == 0) { std::fill(row_offsets, row_offsets + N + 1, 0); return DONE; }
  return write_mask(AllRows{s}, N, batch, threshold, row_offsets, cols, threads);
}

}  // extern "C"
