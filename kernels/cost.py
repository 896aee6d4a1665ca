"""Which kernel for a product with a rewritten weight: a cost model of sizes, format and capability (`tiling` has its tiles).

Two ways to compute y = x (D(Q)+S)ᵀ + s (x Aᵀ) Bᵀ + b (and dx = dy (D(Q)+S) + s (dy B) A, `transposed`):

- fused: one kernel decodes tiles of the packed weight in its main loop and keeps the low-rank part in the accumulator;
- scratch: one kernel writes [D(Q)+S, s B] densely into a scratch buffer, then the vendor's GEMM multiplies [x, x Aᵀ] by it.

Cost model (P: peak rate of the tensor cores; W: memory bandwidth; predictions, not measurements):

- fused, few rows: bytes of the packed weight over W. Many rows: M·N·K over e·P, where e is what decoding in the loop leaves
  of the tensor cores. The compiled NF4 loops issue 0.5 of the instructions that fit beside the products (0.2 of them in the
  dense loop already). They would hide if all ran beside products; but a step's tile is decoded before its products, and of
  those only half run beside the next step's decoding on sm_90, none on sm_80. So e is taken as 0.75.
- scratch: M·N·K over 0.95 P, and (0.5 + 2 + 2) bytes · N·K over W: packed weight, scratch buffer written and read.
  The two meet at M = 4.5 (P / W) / 2 (1 / e - 1 / 0.95) with P in FLOP/s: `CROSSOVER`.
- The sparse part costs the scratch buffer nothing. Beside the fused kernel there are two ways for y:
  - up to 16 rows the kernel gathers it from x after its loop: few elements beside the packed bytes, of which the scratch
    buffer would make eight times as many. For a tile of 256×128 that took as many steps as the longest of 128 rows has
    entries, spilled, and read 32 bytes of x for each 2. What "few" hides: in masks that gradients chose (docs/accuracy,
    SmolLM2-135M at 0.6 %) the longest of 32 rows has 13 to 16 times the entries of a mean row in q, k, gate and up, 3 to 9
    times in v, o and down, twice in a random mask; and the longest of all rows up to 87 times. The program of such rows
    ends as much later. A time taken with random masks does not show it;
  - for more rows a kernel of its own writes S xᵀ, from which the sums of the fused kernel start: its loop and its registers
    stay those of a product without a sparse part. S xᵀ reads M·nnz elements of xᵀ, coalesced, from caches that deliver at
    least `CACHE_RATE` times what memory does; x is transposed and S xᵀ written and read, 2 M (K + N) elements more. At 0.6 % of
    4096×4096 that alone would meet the scratch buffer's cost at 360 rows on an A100 and 440 on an H100. But the longest row
    (`LONGEST` mean ones, see above) is a chain of steps of two loads each that wait for each other, which takes longer than
    that scratch buffer; for [28672, 8192] it does not, and up to 250 rows on an A100 and 310 on an H100 are gathered.
  In the loop itself it does not pay. To put entries into a decoded tile takes a comparison of every weight with the column of
  each entry of its row, or products of one-hot matrices for as many k-steps again; registers cannot be addressed by column,
  and 0.6 % are too many to skip what has none: 49 in a tile of 128×64, of whose 1024 words of codes a warp decodes 128.
- For dx rows of CSR run along the sum, and Sᵀ dyᵀ needs the entries by column. To sort them in every step takes some ten
  kernels, 30 µs or 1e8 bytes from memory, and 150 bytes an entry; to keep them sorted, as many bytes again as the sparse term
  has. (Scattering into dx would need atomics, whose order no two runs share, or a thread for each row of dx, too few.) So dx of
  a very large weight and few rows is fused; else scratch, for up to 16 rows as well.
"""

from __future__ import annotations

from rosa_fx.kernels.product import DECODE_ROWS, Product
from rosa_fx.kernels.tiling import gather_tile

# Rows above which decoding once beats decoding in the loop, by major capability: A100 (312 TFLOP/s, 2.0 TB/s: 1250) and H100
# (989, 3.35: 2370), rounded down to powers of two.
CROSSOVER = {8: 1024, 9: 2048, 10: 2048}

# Bytes per weight as stored, where that is not the product's dtype.
_STORED_BYTES = {"nf4": 0.5, "fp4": 0.5, "int8": 1}

# Rate of the caches over that of memory, for reads of rows of xᵀ: 4 to 5.5 TB/s from L2 on A100 and H100, more from L1.
CACHE_RATE = 2.0

# Entries of the longest row over those of the mean one, in masks that gradients chose (docs/accuracy): up to 87. A step waits
# for the column and then for what it names: in seconds, and in bytes from memory.
LONGEST = 87

STEP = 1e-6

_STEP_BYTES = 3e6

# What sorting the entries by column costs, as bytes from memory: in all, and an entry.
_SORTING = (1e8, 150)


def choose_by_time(product: Product) -> bool:
    """Whether an autotuner has both ways to time: it is not a matter of bytes alone."""
    return product.rows > DECODE_ROWS


def fuse(product: Product) -> bool:
    """Whether to decode in the main loop (True) or once into a scratch buffer. See the cost model above."""
    if gathers(product):
        fixed = _STEP_BYTES * LONGEST * product.nnz / product.outputs / gather_tile(product).entries
        if product.transposed:
            fixed += _SORTING[0] + _SORTING[1] * product.nnz
        return product.rows * _bytes_per_row(product) + fixed <= _scratch_bytes(product)
    if product.nnz and product.transposed:
        return False
    if product.kind == "dense":
        # Nothing to decode: the fused kernel saves the copies of weight and activations that the low-rank part would need.
        return True
    return product.rows <= _crossover(product)


def gathers(product: Product) -> bool:
    """Whether the sparse part of the fused kernel is computed by a kernel of its own, S xᵀ or Sᵀ dyᵀ."""
    return bool(product.nnz) and product.rows > DECODE_ROWS


def _crossover(product: Product) -> int:
    return CROSSOVER.get(product.capability[0], CROSSOVER[8])


def _scratch_bytes(product: Product) -> float:
    """Bytes that the scratch buffer costs: the stored weight read, and the buffer written and read."""
    size = product.dtype.itemsize
    return (_STORED_BYTES.get(product.kind, size) + 2 * size) * product.n * product.k


def _bytes_per_row(product: Product) -> float:
    """What a row costs that the scratch buffer does not: gathering S xᵀ, and decoding in the loop, as bytes from memory."""
    size = product.dtype.itemsize
    gathered = product.nnz * size / CACHE_RATE + 2 * size * (product.n + product.k)
    return gathered + (0 if product.kind == "dense" else _scratch_bytes(product) / _crossover(product))
