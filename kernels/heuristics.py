"""Which kernel and which tiles for a product with a rewritten weight: pure functions of sizes, format and capability.

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

import math
from dataclasses import dataclass, replace

import torch

DECODE_ROWS = 16

# What stands for the capability of an AMD GPU, which has fewer and different limits than the number would say.
AMD = (0, 0)

# Shared memory that one program may use, in bytes, by compute capability.
SHARED_MEMORY = {
    AMD: 64 << 10,
    (7, 5): 64 << 10,
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 7): 163 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}

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


@dataclass(frozen=True)
class Product:
    """A product of M rows with the weight [N, K] as stored; `kind` is the base format's.

    `transposed` sums over N, else over K. `rows` is M, or its hint where it is dynamic. `blocksize` of a 4-bit base, else 0.
    """

    rows: int
    n: int
    k: int
    kind: str
    dtype: torch.dtype
    rank: int = 0
    nnz: int = 0
    transposed: bool = False
    capability: tuple[int, int] = (8, 0)
    blocksize: int = 0

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return self.k if self.transposed else self.n

    @property
    def depth(self) -> int:
        """What is summed over."""
        return self.n if self.transposed else self.k


@dataclass(frozen=True)
class Tiles:
    """BLOCK_M rows by `block_out` outputs per program, `block_sum` of the sum per step of the main loop."""

    block_m: int
    block_out: int
    block_sum: int
    warps: int
    stages: int
    group_m: int = 8


def shared_limit(capability: tuple[int, int]) -> int:
    """Shared memory per program on that capability, or of the nearest older one that is known."""
    known = [item for item in SHARED_MEMORY if AMD < item <= capability or item == capability]
    return SHARED_MEMORY[max(known)] if known else 48 << 10


def shared_bytes(product: Product, tiles: Tiles) -> int:
    """An upper estimate of a program's shared memory: operands of each stage, the decoded tile, the low-rank operands.

    Packed weights count as they are stored. The decoded tile is counted once: the product may want it in shared memory. The
    transposition of the result reuses the space of the main loop.
    """
    size = product.dtype.itemsize
    weights = tiles.block_out * tiles.block_sum
    stored = {"nf4": weights // 2, "fp4": weights // 2, "int8": weights}.get(product.kind, weights * size)
    decoded = 0 if product.kind == "dense" else weights * size
    loop = tiles.stages * (tiles.block_m * tiles.block_sum * size + stored) + decoded
    low_rank = rank_block(product.rank) * (tiles.block_m + tiles.block_out) * max(size, 4) if product.rank else 0
    result = tiles.block_m * tiles.block_out * 4
    return max(loop, low_rank, result)


def fits(product: Product, tiles: Tiles) -> bool:
    """Whether the tiles fit shared memory, and the float32 accumulator its share of the 255 registers of a thread.

    That is a half, and a quarter where a long step's weights are decoded and every warp holds the operands of its own products
    too (before sm_90), or where operands are float32: larger tiles were seen to spill.
    """
    accumulator = tiles.block_m * tiles.block_out // (32 * tiles.warps)
    short = product.kind == "dense" or product.capability >= (9, 0) or tiles.block_sum <= 32
    most = 128 if short and product.dtype.itemsize == 2 else 64
    return shared_bytes(product, tiles) <= shared_limit(product.capability) and accumulator <= most


def power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two that is at least `value`, between `least` and `most`."""
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)


def rank_block(rank: int) -> int:
    """Ranks per step of the low-rank product."""
    return power_of_two(rank, 16, 64)


# Best first. Few rows: bound by the bytes of the weight, so long steps with 16 bytes of codes a thread and, on the 108 to 148
# multiprocessors of a large device, at least 16 KiB of them under way on each: programs of 32 outputs if there are 128.
_DECODE = (
    Tiles(16, 32, 512, 4, 3),
    Tiles(16, 16, 512, 4, 3),
    Tiles(16, 16, 256, 4, 4),
    Tiles(16, 64, 128, 4, 4),
    Tiles(16, 32, 128, 4, 4),
    Tiles(16, 32, 64, 4, 3),
    Tiles(16, 16, 32, 2, 2),
)
_PROGRAMS = 128
# A dense weight is copied as it is: half the step, so that two programs fit a multiprocessor of an A100. Other sizes spilled.
_DENSE_DECODE = (
    Tiles(16, 32, 256, 4, 4),
    Tiles(16, 16, 512, 4, 3),
    Tiles(16, 64, 128, 4, 4),
    Tiles(16, 32, 64, 4, 3),
    Tiles(16, 16, 32, 2, 2),
)
# Few rows by 4-bit weights whose sums are scaled (`scales_sums`): two programs fit a multiprocessor of an A100.
_GROUPED = (
    Tiles(16, 32, 512, 4, 3),
    Tiles(16, 16, 512, 4, 3),
    Tiles(16, 32, 256, 4, 4),
    Tiles(16, 16, 256, 4, 4),
    Tiles(16, 32, 128, 4, 4),
    Tiles(16, 16, 64, 4, 3),
)
# A B200 has twice an H100's bandwidth: 128 programs have to ask for more ahead.
_GROUPED_AHEAD = Tiles(16, 32, 256, 4, 9)
_GROUPED_AHEAD_HALF = Tiles(16, 32, 512, 4, 6)
# Many rows: a decoded weight is multiplied by as many rows as registers hold sums of.
_WIDE = (
    Tiles(256, 128, 64, 8, 3),
    Tiles(256, 64, 64, 8, 3),
)
_WIDE_BEFORE_HOPPER = (
    Tiles(256, 128, 32, 8, 4),
    Tiles(256, 128, 32, 8, 3),
    Tiles(256, 64, 64, 8, 3),
)
_DENSE = (
    Tiles(128, 256, 64, 8, 3),
    Tiles(256, 128, 64, 8, 3),
)
_LARGE = (
    Tiles(128, 128, 64, 8, 3),
    Tiles(128, 128, 32, 8, 3),
    Tiles(64, 128, 64, 4, 3),
    Tiles(64, 64, 32, 4, 3),
    Tiles(64, 64, 32, 4, 2),
    Tiles(32, 32, 32, 4, 2),
    Tiles(16, 16, 16, 2, 2),
)
# Without tensor cores for the dtype every thread holds operands of its own: what is larger was seen to spill.
_SCALAR_DECODE = (
    Tiles(16, 32, 64, 4, 2),
    Tiles(16, 16, 32, 2, 2),
)
_SCALAR = (
    Tiles(64, 64, 16, 4, 2),
    Tiles(32, 32, 32, 4, 2),
    Tiles(16, 16, 16, 2, 2),
)


def _candidates(product: Product) -> tuple[Tiles, ...]:
    hopper = product.capability >= (9, 0)
    before_ampere = AMD < product.capability < (8, 0)
    if product.dtype.itemsize > 2 or before_ampere:
        if product.rows <= DECODE_ROWS:
            return _SCALAR_DECODE
        return _SCALAR if before_ampere else (Tiles(64, 64, 32, 4, 2), *_SCALAR)
    if scales_sums(product):
        return _grouped(product)
    if product.rows <= DECODE_ROWS:
        return _decode(product)
    if product.kind == "dense":
        return (*_DENSE, *_LARGE) if hopper else (*_LARGE[:1], *_DENSE, *_LARGE[1:])
    return (*(_WIDE if hopper else _WIDE_BEFORE_HOPPER), *_LARGE)


def _wide_first(product: Product, tiles: tuple[Tiles, ...]) -> tuple[Tiles, ...]:
    """`tiles`, whose first has most outputs: last where that makes fewer programs than a large device has multiprocessors."""
    return tiles if product.outputs >= _PROGRAMS * tiles[0].block_out else (*tiles[1:], tiles[0])


def _decode(product: Product) -> tuple[Tiles, ...]:
    if product.kind == "dense":
        return _wide_first(product, _DENSE_DECODE)
    if (8, 0) <= product.capability < (9, 0):
        # Two programs of 72 KiB fit a multiprocessor of an A100, of which one step ahead asks for enough.
        return _wide_first(product, (replace(_DECODE[0], stages=2), *_DECODE[1:]))
    if product.transposed and product.kind != "int8" and product.capability >= (10, 0):
        return _wide_first(product, (replace(_GROUPED_AHEAD, stages=8), *_DECODE))
    return _wide_first(product, _DECODE)


def _grouped(product: Product) -> tuple[Tiles, ...]:
    half = product.rows <= DECODE_ROWS // 2
    found = _wide_first(product, _GROUPED)
    if product.capability >= (10, 0):
        found = (_GROUPED_AHEAD_HALF if half else _GROUPED_AHEAD, *found)
    return tuple(replace(tiles, block_m=8) for tiles in found) if half else found


def scales_sums(product: Product) -> bool:
    """Whether a kernel for few rows multiplies by table values and scales their sums: forward, 4 bits, in a 16-bit dtype.

    A warp multiplies columns with one scale per row, at least 32 (or a quarter of a tile of 64 or less) in a row of the weight.
    """
    few = product.rows <= DECODE_ROWS and not product.transposed and product.dtype.itemsize == 2
    aligned = product.k >= 64 and math.gcd(product.k, product.blocksize) >= 32
    return few and product.blocksize > 0 and aligned and product.capability >= (8, 0)


def group_columns(product: Product, tile: int) -> int:
    """Columns of each product that `tile` columns are cut into, where `scales_sums`: one scale a row, one for each warp."""
    return min(math.gcd(product.k, product.blocksize, tile), tile // 4)


def tile_choices(product: Product) -> list[Tiles]:
    """Tiles for the fused kernel, best first, never empty: shrunk to small matrices, and only what fits the device."""
    found: list[Tiles] = []
    for tiles in _candidates(product):
        small = Tiles(
            block_m=min(tiles.block_m, power_of_two(product.rows, 16, 256)),
            block_out=min(tiles.block_out, power_of_two(product.outputs, 16, 256)),
            block_sum=min(tiles.block_sum, power_of_two(product.depth, 16, 512)),
            warps=tiles.warps,
            stages=tiles.stages if product.capability >= (8, 0) else min(tiles.stages, 2),
            group_m=tiles.group_m,
        )
        if fits(product, small) and small not in found:
            found.append(small)
    return found


def choose_by_time(product: Product) -> bool:
    """Whether an autotuner has both ways to time: it is not a matter of bytes alone."""
    return product.rows > DECODE_ROWS


def permutes(product: Product) -> bool:
    """Whether the device has the arithmetic on pairs that decoding uses: in float16 from sm_75, in bfloat16 from sm_80."""
    least = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}.get(product.dtype)
    return least is not None and product.capability >= least


def upright(product: Product) -> bool:
    """Whether grad input multiplies dx = dy W, rather than dxᵀ = Wᵀ dyᵀ as decoded weights want it.

    A dense weight lies in shared memory as it was loaded. As the right operand it is read there as it is; as the left one it
    was seen to be transposed through registers on sm_80 (1.27 times the issue pressure of Inductor's product, 1.02 now).
    """
    return product.transposed and product.kind == "dense" and product.rows > DECODE_ROWS


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


def scales_per_row(columns: int, blocksize: int, tile: int) -> int:
    """How many scales a row of `tile` columns has in a weight [*, columns] of flat blocks; 0 if that depends on the row.

    Rows start at multiples of g = gcd(columns, blocksize) in flat order, tiles at multiples of `tile`. If g is a multiple of
    `tile`, no tile crosses a block; neither does a row if a block is whole rows. If rows are whole blocks and a tile is, too,
    the tile has tile / blocksize of them.
    """
    if math.gcd(columns, blocksize) % tile == 0 or blocksize % columns == 0:
        return 1
    if columns % blocksize == 0 and tile % blocksize == 0:
        return tile // blocksize
    return 0


def sparse_block(rows: int, block_out: int) -> int:
    """Entries of each row per step of the gather, a power of two: at most 8192 gathered elements at a time."""
    return max(1, min(16, 8192 // (rows * block_out)))


@dataclass(frozen=True)
class Scratch:
    """Columns of a row that one program of the scratch buffer's kernel writes, and its warps."""

    columns: int
    warps: int


def scratch_tile(columns: int) -> Scratch:
    """Of a buffer of so many columns: 16 weights a thread, so that 4-bit codes are loaded 8 bytes wide."""
    block = power_of_two(columns, 16, 2048)
    return Scratch(block, min(max(block // 512, 1), 4))


@dataclass(frozen=True)
class Gather:
    """`entries` of a row per step of the kernel for S xᵀ, `rows` of x per program, and its warps."""

    entries: int
    rows: int
    warps: int


def gather_tile(product: Product) -> Gather:
    """128 bytes of xᵀ an entry, 16 a thread; entries at a time as a row has on average, within limits."""
    rows = min(128 // product.dtype.itemsize, power_of_two(product.rows, 16, 64))
    entries = power_of_two(product.nnz // product.outputs, 16, 32)
    return Gather(entries, rows, min(max(entries * rows // 512, 1), 4))
