"""Tiles, warps and stages of every kernel: pure functions of sizes, format and capability. What does not fit is not offered."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from rosa_fx.kernels.product import AMD, DECODE_ROWS, Product, power_of_two

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


def gradient_tiles(n: int, k: int, rows: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[int, int, int]:
    """Tile of the weight gradient, and rows per step: 96 KiB of shared memory at most in three stages.

    Before sm_80, where Triton uses no tensor cores, every thread holds operands of its own: larger tiles were seen to spill.
    """
    scalar = AMD < capability < (8, 0)
    most = 64 if dtype == torch.float32 or scalar else 128
    return power_of_two(n, 16, most), power_of_two(k, 16, most), power_of_two(rows, 16, 16 if scalar else 32)
