// Sparse pieces of a RoSA layer on the CPU. Plain C++17 + OpenMP, no torch headers: it compiles in a few seconds and is
// called through ctypes with raw pointers. Vector code is GCC/Clang vector extensions, so one source serves every
// -march. Preconditions (checked by the Python caller or by Mask, not here): row_offsets starts at 0, never
// decreases and ends at nnz; columns are in [0, K) and strictly increasing within a row.
//
// One compilation unit: the loader puts the parts below in the place of their #include.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#else
inline int omp_get_num_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "vectors.h"
#include "crew.h"

#include "rows.cpp"
#include "scatter.cpp"
#include "sddmm.cpp"
#include "gradient.cpp"
#include "few_low_rank.cpp"
#include "few_codes.cpp"
#include "few_fp32.cpp"
#include "few_bf16.cpp"
#include "few_beside.cpp"
#include "few_fourbit.cpp"
#include "few.cpp"
#include "terms_panel.cpp"
#include "terms_low_rank.cpp"
#include "terms_pairs.cpp"
#include "terms_gradient.cpp"
#include "terms.cpp"
#include "thin.cpp"
#include "topk.cpp"
