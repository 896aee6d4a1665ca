// Panels of 64 rows of x, transposed, for the terms that a product starts from.
namespace {

constexpr int TILE_ROWS = 64, GROUPS = TILE_ROWS / VL;
constexpr int BLOCK = 32;  // outputs whose sums are made before they are written: a cache line of bf16

// The TILE_ROWS values of column c of a panel; PACKED: of pairs of bf16, as the transposition makes them.
template <bool PACKED>
INLINE void unpack(const uint32_t* panel, int64_t c, vf* column) {
  const vu* words = reinterpret_cast<const vu*>(panel + c * (PACKED ? TILE_ROWS / 2 : TILE_ROWS));
  constexpr int PER_LINE = LINE / VL;  // a line holds the rows of 2 * PER_LINE groups
#pragma GCC unroll 16
  for (int g = 0; g < (PACKED ? GROUPS / 2 : GROUPS); ++g) {
    if (!PACKED) {
      column[g] = (vf)words[g];
      continue;
    }
    const int low = g / PER_LINE * 2 * PER_LINE + g % PER_LINE;
    column[low] = (vf)(words[g] << 16);
    column[low + PER_LINE] = (vf)(words[g] & 0xffff0000u);
  }
}

}  // namespace
