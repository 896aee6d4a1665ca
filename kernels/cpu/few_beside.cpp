// What comes to the products of few rows of x with 4-bit codes: S, the low-rank term, and the way to y.
#if defined(FEW_FOUR_BIT)
namespace {

// totals[i][m] = the lanes of sums[i][m] in one, 16 at a time.
void few_totals(const __m512* sums, int64_t count, float* totals) {
  for (int64_t f = 0; f < count; f += VL) {
    vf vectors[VL];
    for (int i = 0; i < VL; ++i) vectors[i] = (vf)sums[f + i];
    _mm512_storeu_ps(totals + f, (__m512)lane_sums(vectors));
  }
}

// y[m][first + i] = totals[i][m], by squares: single elements of rows that are far apart would be slower than the products.
void few_store(const float* totals, int64_t count, int64_t M, const FewOutput& output, int64_t first) {
  for (int64_t n = 0; n < count; n += VL)
    for (int64_t m = 0; m < M; m += VL) {
      const __mmask16 rows = __mmask16(M - m >= VL ? 0xffff : (1 << (M - m)) - 1);
      const __mmask16 outputs = __mmask16(count - n >= VL ? 0xffff : (1 << (count - n)) - 1);
      vu square[VL];
      for (int i = 0; i < VL; ++i) square[i] = n + i < count ? (vu)_mm512_maskz_loadu_ps(rows, totals + (n + i) * M + m) : vu{};
      transpose_square(square);
      for (int64_t i = 0; i < VL && m + i < M; ++i) {
        const int64_t at = (m + i) * output.stride + first + n;
        if (output.dtype == F32) {
          _mm512_mask_storeu_ps(static_cast<float*>(output.y) + at, outputs, (__m512)square[i]);
          continue;
        }
        uint16_t narrow[VL];
        const float* from = reinterpret_cast<const float*>(&square[i]);
        if (output.dtype == BF16) narrow_bf16(from, VL, narrow);
        else
          for (int k = 0; k < VL; ++k) narrow[k] = Half::narrow(from[k]);
        std::memcpy(static_cast<uint16_t*>(output.y) + at, narrow, std::min<int64_t>(VL, count - n) * sizeof(uint16_t));
      }
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

// The entries j .. end of S in row r and the columns c0 .. c1.
INLINE void few_entries(const FewProblem& p, int64_t r, int64_t& j, int64_t& end) {
  const Rows& s = *p.s;
  j = end = 0;
  if (!s.values) return;
  j = s.row_offsets[r], end = s.row_offsets[r + 1];
  if (p.c0 > 0) j = std::lower_bound(s.cols + j, s.cols + end, int32_t(p.c0)) - s.cols;
  if (p.c1 < s.K) end = std::lower_bound(s.cols + j, s.cols + end, int32_t(p.c1)) - s.cols;
}

// sum += (S + B A) x of one row of the weight, for one row of x; the lanes of `sum` are added up later.
template <class E>
INLINE void few_beside_one(const FewProblem& p, int64_t r, const float* x, const LowRankPart& part, __m512& sum) {
  const auto* values = static_cast<const typename E::T*>(p.s->values);
  const float* b = part.B + (r - part.first) * part.b_stride;
  for (int64_t k = 0; k < part.R; k += VL) {
    const __mmask16 ranks = __mmask16(part.R - k >= VL ? 0xffff : (1 << (part.R - k)) - 1);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(ranks, b + k), _mm512_maskz_loadu_ps(ranks, part.left + k), sum);
  }
  int64_t j, end;
  few_entries(p, r, j, end);
  float some[4] = {};
  for (; j + 4 <= end; j += 4)
    for (int i = 0; i < 4; ++i) some[i] += bits_float(E::widen(values[j + i])) * x[p.s->cols[j + i] - p.c0];
  for (; j < end; ++j) some[0] += bits_float(E::widen(values[j])) * x[p.s->cols[j] - p.c0];
  sum = _mm512_add_ps(sum, _mm512_zextps128_ps512(_mm_loadu_ps(some)));
}

// totals[m] += (S + B A) x of one row of the weight.
template <class E>
void few_beside(const FewProblem& p, int64_t r, const FewColumns& columns, const LowRankPart& part, float* totals) {
  const auto* values = static_cast<const typename E::T*>(p.s->values);
  const float* b = part.B + (r - part.first) * part.b_stride;
  int64_t first, end;
  few_entries(p, r, first, end);
  for (int64_t m = 0; m < p.M; m += 2 * VL) {
    const auto rows = [&](int64_t at) { return __mmask16(at >= p.M ? 0 : p.M - at >= VL ? 0xffff : (1 << (p.M - at)) - 1); };
    const __mmask16 low_rows = rows(m), high_rows = rows(m + VL);
    __m512 low = _mm512_maskz_loadu_ps(low_rows, totals + m), high = _mm512_maskz_loadu_ps(high_rows, totals + m + VL);
    for (int64_t j = first; j < end; ++j) {
      const __m512 value = _mm512_set1_ps(bits_float(E::widen(values[j])));
      low = _mm512_fmadd_ps(value, FewColumns::load(columns, p.s->cols[j] - p.c0, m), low);
      if (high_rows) high = _mm512_fmadd_ps(value, FewColumns::load(columns, p.s->cols[j] - p.c0, m + VL), high);
    }
    for (int64_t k = 0; k < part.R; ++k) {
      const float* left = part.left + k * p.M + m;
      low = _mm512_fmadd_ps(_mm512_set1_ps(b[k]), _mm512_maskz_loadu_ps(low_rows, left), low);
      if (high_rows) high = _mm512_fmadd_ps(_mm512_set1_ps(b[k]), _mm512_maskz_loadu_ps(high_rows, left + VL), high);
    }
    _mm512_mask_storeu_ps(totals + m, low_rows, low);
    _mm512_mask_storeu_ps(totals + m + VL, high_rows, high);
  }
}

}  // namespace
#endif
