// Few rows of x times 4-bit codes: the parts in their order, by blocks of rows of the weight.
#if defined(FEW_FOUR_BIT)
namespace {

// Columns of a chunk of x, transposed.
void few_turn(const FewProblem& p, const float* x, int64_t x_stride, int64_t chunk, const FewColumns& to) {
  const int64_t columns = p.c1 - p.c0;
  for (int64_t k = chunk * CODES; k < std::min(columns, (chunk + 1) * CODES); k += VL)
    for (int64_t m = 0; m < p.M; m += VL) {
      const __mmask16 within = __mmask16(k + VL <= columns ? 0xffff : 0xff);
      const __mmask16 fits = __mmask16(to.pitch - m >= VL ? 0xffff : 0xff);
      vu square[VL];
      for (int i = 0; i < VL; ++i)
        square[i] = m + i < p.M ? (vu)_mm512_maskz_loadu_ps(within, x + (m + i) * x_stride + k) : vu{};
      transpose_square(square);
      for (int i = 0; i < VL && k + i < columns; ++i) {
        const int64_t at = (k + i) * to.pitch + m;
        if (to.bf16) _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(to.data) + at, fits, (__m512i)(square[i] >> 16));
        else _mm512_mask_storeu_ps(static_cast<float*>(to.data) + at, fits, (__m512)square[i]);
      }
    }
}

// Where the scales of the blocks are 8-bit codes: those of the rows first .. first + count, in scratch memory that they share with
// the loads beyond the last. False without it.
bool few_scales(FewProblem& p, int64_t first, int64_t count) {
  if (p.s->scales) return true;
  p.first_block = (first * p.s->K + p.c0) >> p.shift;
  const int64_t wanted = std::min(p.blocks, (((first + count) * p.s->K) >> p.shift) + VL) - p.first_block;
  float* own = few_scales_scratch.get<float>(wanted);
  if (own) decode_scales(*p.s, p.first_block, wanted, own);
  p.scales = own;
  return own;
}

// What row `first + i`, which does not have to exist, needs of each tensor: asked for while S keeps the memory idle, where there
// are several rows of x (for one, S is too short: expect_beside). Of the codes the beginning of the rows that are read together;
// of S, entries of some rows at a time.
INLINE void expect_row(const FewProblem& p, int64_t first, int64_t i) {
  constexpr int CODE_ROWS = 8, LINES = 16, ENTRY_ROWS = 4;
  const int64_t r = first + i, e = r * p.s->K + p.c0;
  if (r >= p.r1) return;
  if (i < CODE_ROWS)
    for (int64_t k = 0; k < std::min<int64_t>(LINES * CODES, p.c1 - p.c0); k += CODES)
      _mm_prefetch(static_cast<const char*>(p.s->data) + (e + k) / 2, _MM_HINT_T1);
  if (p.s->scales) ask(p.s->scales + (e >> p.shift), 1);
  else ask(p.s->scale_codes + (e >> p.shift), 1);
  if (p.part->R) ask(p.part->B + (r - p.part->first) * p.part->b_stride, 1);
  if (!p.s->values || i % ENTRY_ROWS) return;
  const int64_t size = p.s->values_dtype == F32 ? 4 : 2;
  for (int64_t j = p.s->row_offsets[r], end = p.s->row_offsets[std::min(r + ENTRY_ROWS, p.r1)]; j < end; j += VL) {
    ask(p.s->cols + j, 1);
    ask(static_cast<const char*>(p.s->values) + j * size, 1);
  }
}

// Rows of the weight per task: more for one row of x, as far as every thread still finds some. Always the same groups of 8, so
// that no sum depends on threads.
int64_t few_block(int64_t M, int64_t rows, int threads) {
  const int64_t shared = rows / (8 * threads) / 8 * 8;
  return M > 1 ? FEW_BLOCK : std::min<int64_t>(ONE_BLOCK, std::max<int64_t>(FEW_BLOCK, shared));
}

// call(E{}) with the element type of the values of S.
template <class F>
INLINE void by_values(const Rows& s, const F& call) {
  const int64_t dtype = s.values ? s.values_dtype : F32;
  if (dtype == F32) call(Float{});
  else if (dtype == BF16) call(BFloat{});
  else call(Half{});
}

int few_fourbit(const Rows& s, int64_t r0, int64_t r1, int64_t c0, int64_t c1, const FewInput& input, const FewOutput& output,
                const LowRankPart& part, int threads) {
  const int64_t M = input.M, x_stride = input.stride;
  const float* x = input.x;
  const int shift = __builtin_ctzll(s.blocksize);
  const int64_t chunks = (c1 - c0 + CODES - 1) / CODES;
  const FewProblem problem{&s, r0, r1, c0, c1, M, chunks, (s.N * s.K + s.blocksize - 1) >> shift, shift, s.scales};
#if defined(__AVX512BF16__)
  // Below, decoding takes most of the time, and it is in fp32 anyway.
  const bool pairs = (input.dtype == BF16 || input.low) && M > 4;
#else
  const bool pairs = false;
#endif
  const int64_t columns = c1 - c0, block = few_block(M, r1 - r0, threads), tasks = (r1 - r0 + block - 1) / block;
  float* arranged = few_x_scratch.get<float>(M * chunks * CODES);
  // 8 rows are read together with 8 of the next column.
  FewColumns turned{nullptr, M <= 8 ? 8 : (M + VL - 1) / VL * VL, input.dtype == BF16};
  const bool turns = s.values && M > 1;
  if (turns) turned.data = few_columns_scratch.get<float>(columns * turned.pitch + VL);
  if (!arranged || (turns && !turned.data)) return 1;
  const auto arrange = [&](int64_t chunk) {
    for (int64_t m = 0; m < M; ++m)
      (pairs ? few_arrange<true> : few_arrange<false>)(problem, x + m * x_stride, m, chunk, arranged);
    if (turns) few_turn(problem, x, x_stride, chunk, turned);
  };
  int failed = 0;
  Prologue rows_of_x, chunks_of_x;
  std::atomic<int64_t> next{0};
  Crew crew;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    rows_of_x.run(M, [&](int64_t m) { few_row(input, m, part); });
    chunks_of_x.run(chunks, arrange);
    FewProblem p = problem;
    p.part = &part;
    int64_t following = 0;
    // Before what asks for memory ahead: the products of one row of x do, and otherwise S.
    const auto claim = [&] {
      following = next.fetch_add(1);
      p.next_first = r0 + following * block;
      if (s.values && p.next_first < r1) ask(s.row_offsets + p.next_first, (block + 1) * sizeof(int32_t));
    };
    for (int64_t task = next.fetch_add(1); task < tasks; task = following) {
      const int64_t first = r0 + task * block, count = std::min(block, r1 - first), padded = (block * M + VL) / VL * VL;
      if (M == 1) claim();
      __m512* sums = few_sums_scratch.get<__m512>(padded);
      float* totals = few_totals_scratch.get<float>(padded);
      uint16_t* decoded = pairs ? few_block_scratch.get<uint16_t>(BF16_ROWS * SPAN_CHUNKS * CODES) : nullptr;
      const int64_t entries = s.values && M == 1 ? s.row_offsets[first + count] - s.row_offsets[first] : 0;
      float* products = entries ? few_products_scratch.get<float>(entries) : nullptr;
      if (!sums || !totals || (entries && !products) || (pairs && !decoded) || !few_scales(p, first, count)) {
#pragma omp atomic write
        failed = 1;
        break;
      }
      std::memset(static_cast<void*>(sums), 0, padded * sizeof(__m512));
#if defined(__AVX512BF16__)
      if (pairs && M <= GROUP_ROWS) few_bf16_at_once(p, first, count, reinterpret_cast<const uint16_t*>(arranged), sums);
      else if (pairs) few_bf16(p, first, count, reinterpret_cast<const uint16_t*>(arranged), decoded, sums);
#endif
      if (!pairs) few_fp32(p, first, count, arranged, sums);
      if (M > 1) claim();
      if (M == 1) by_values(s, [&](auto e) { few_beside_one<decltype(e)>(p, first, count, x, products, sums); });
      few_totals(sums, count * M, totals);
      for (int64_t i = 0; M > 1 && i < count; ++i) {
        expect_row(p, p.next_first, i);
        by_values(s, [&](auto e) { few_beside<decltype(e)>(p, first + i, turned, totals + i * M); });
      }
      few_store(totals, count, M, output, first - r0);
    }
    crew.finish();
  }
  return failed;
}

}  // namespace
#endif
