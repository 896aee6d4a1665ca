// Addition of sparse values into a dense weight.
namespace {

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

}  // namespace

extern "C" {

void rosa_scatter_add(void* weight, int weight_dtype, int64_t N, int64_t K, const void* values, int values_dtype,
                      const int32_t* row_offsets, const int32_t* cols, int threads) {
  auto* f = weight_dtype == F32 ? scatter_add_to<Float> : weight_dtype == BF16 ? scatter_add_to<BFloat> : scatter_add_to<Half>;
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, row_offsets[N] / 2048)));
  f(weight, N, K, values, values_dtype, row_offsets, cols, threads);
}

}  // extern "C"
