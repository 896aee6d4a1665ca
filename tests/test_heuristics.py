"""Kernel choices as pure functions, and the table lookups that GPUs do by byte permutes."""

from __future__ import annotations

import re
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rosa_fx.kernels.heuristics import (
    DECODE_ROWS,
    Product,
    Tiles,
    fits,
    fuse,
    power_of_two,
    rank_block,
    scales_per_row,
    shared_bytes,
    shared_limit,
    sparse_block,
    tile_choices,
)
from rosa_fx.kernels.lookup import permute_asm, select_tree, table

CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]

products = st.builds(
    Product,
    rows=st.integers(1, 70000),
    n=st.integers(1, 60000),
    k=st.integers(1, 60000),
    kind=st.sampled_from(["dense", "nf4", "fp4", "int8"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    rank=st.integers(0, 256),
    nnz=st.integers(0, 10**6),
    transposed=st.booleans(),
    capability=st.sampled_from(CAPABILITIES),
)


@given(products)
def test_choices_fit_every_device(product: Product) -> None:
    choices = tile_choices(product)
    assert choices
    assert len(set(choices)) == len(choices)
    for tiles in choices:
        assert shared_bytes(product, tiles) <= shared_limit(product.capability)
        sizes = (tiles.block_m, tiles.block_out, tiles.block_sum, tiles.warps)
        assert all(size & (size - 1) == 0 for size in sizes)
        assert min(sizes[:3]) >= 16
        assert tiles.block_m * tiles.block_out // (32 * tiles.warps) <= 128


@given(products)
def test_no_tile_is_far_larger_than_the_matrix(product: Product) -> None:
    for tiles in tile_choices(product):
        assert tiles.block_m < 2 * max(product.rows, 16)
        assert tiles.block_out < 2 * max(product.outputs, 16)
        assert tiles.block_sum < 2 * max(product.depth, 16)


def test_what_does_not_fit_is_refused() -> None:
    large = Tiles(256, 128, 64, 8, 3)
    product = Product(4096, 4096, 4096, "dense", torch.bfloat16, capability=(9, 0))
    assert shared_bytes(product, large) == 3 * (256 + 128) * 64 * 2
    assert fits(product, large)
    older = Product(4096, 4096, 4096, "dense", torch.bfloat16, capability=(8, 6))
    assert not fits(older, large)
    assert large not in tile_choices(older)
    # The accumulator: 256 × 128 values are 256 registers in each of 128 threads.
    assert not fits(product, Tiles(256, 128, 64, 4, 3))
    # Decoding before sm_90 leaves a quarter of the registers to it.
    assert not fits(Product(4096, 4096, 4096, "nf4", torch.bfloat16, capability=(8, 0)), large)
    assert fits(Product(4096, 4096, 4096, "nf4", torch.bfloat16, capability=(9, 0)), large)


def test_an_unknown_capability_has_the_limit_of_the_one_below() -> None:
    assert shared_limit((9, 5)) == shared_limit((9, 0))
    assert shared_limit((7, 0)) == 48 << 10


def product(
    rows: int, kind: str = "nf4", nnz: int = 0, transposed: bool = False, capability: tuple[int, int] = (8, 0)
) -> Product:
    return Product(rows, 4096, 4096, kind, torch.bfloat16, 16, nnz, transposed, capability)


def test_few_rows_are_decoded_in_the_loop() -> None:
    assert fuse(product(1, nnz=100_000))
    assert fuse(product(DECODE_ROWS, nnz=100_000))
    assert tile_choices(product(1))[0].block_m == 16


def test_a_sparse_part_goes_through_the_scratch_buffer() -> None:
    assert not fuse(product(DECODE_ROWS + 1, nnz=100_000))
    assert not fuse(product(1, nnz=100_000, transposed=True))
    assert not fuse(product(4096, "dense", nnz=1))


def test_many_rows_decode_once() -> None:
    """The crossover lies higher where tensor cores are faster against memory; a dense weight has nothing to decode."""
    assert fuse(product(256))
    assert not fuse(product(257))
    assert fuse(product(257, capability=(9, 0)))
    assert not fuse(product(2049, capability=(9, 0)))
    assert fuse(product(100_000, "dense"))


@given(columns=st.integers(1, 300), log_blocksize=st.integers(5, 12), log_tile=st.integers(4, 9), rows=st.integers(1, 9))
def test_scales_per_row(columns: int, log_blocksize: int, log_tile: int, rows: int) -> None:
    """Against counting: whatever is promised holds for every tile of every row."""
    blocksize, tile = 1 << log_blocksize, 1 << log_tile
    groups = scales_per_row(columns, blocksize, tile)
    if groups == 0:
        return
    width = tile // groups if groups > 1 else tile
    assert groups == 1 or width == blocksize
    for row in range(rows):
        for start in range(0, columns, tile):
            for part in range(start, min(start + tile, columns), width):
                inside = range(part, min(part + width, columns))
                assert {(row * columns + k) // blocksize for k in inside} == {(row * columns + part) // blocksize}


def test_aligned_weights_have_few_scales() -> None:
    assert scales_per_row(4096, 64, 64) == 1
    assert scales_per_row(4096, 64, 256) == 4
    assert scales_per_row(64, 4096, 64) == 1
    assert scales_per_row(48, 256, 64) == 0


@given(st.integers(0, 10**6))
def test_powers_of_two(value: int) -> None:
    found = power_of_two(value, 16, 1 << 30)
    assert found >= max(value, 16)
    assert found == 16 or found < 2 * value
    assert 16 <= rank_block(value) <= 64


@given(st.sampled_from([16, 32, 64, 128, 256]), st.sampled_from([16, 32, 64, 128, 256]))
def test_gathers_are_bounded(rows: int, columns: int) -> None:
    block = sparse_block(rows, columns)
    assert 1 <= block <= 16
    assert block == 1 or rows * columns * block <= 8192
    assert block & (block - 1) == 0


# --- lookups ----------------------------------------------------------------------------------------------------------


def prmt(a: int, b: int, selectors: int) -> int:
    """PTX's prmt.b32: four bytes of the eight in b:a; bit 3 of a selector spreads the sign of its byte."""
    data = [((b << 32 | a) >> 8 * i) & 0xFF for i in range(8)]
    out = 0
    for i in range(4):
        selector = selectors >> 4 * i & 0xF
        byte = data[selector & 7]
        if selector & 8:
            byte = 0xFF if byte & 0x80 else 0
        out |= byte << 8 * i
    return out


def run_ptx(source: str, value: int) -> list[int]:
    """Registers $0 to $7 after the instructions of `permute_asm`, for $8 = value."""
    registers = {"$8": value}

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    instructions = {
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
        "prmt.b32": prmt,
        # The table 0xca is "a ? b : c", bit by bit.
        "lop3.b32": lambda a, b, c, truth: (a & b) | (~a & c) & 0xFFFFFFFF if truth == 0xCA else None,
    }
    for line in source.strip("{} ").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            name, operands = line.strip().split(" ", 1)
            target, *sources = [operand.strip() for operand in operands.split(",")]
            registers[target] = instructions[name](*(read(operand) for operand in sources))
    return [registers[f"${i}"] for i in range(8)]


def as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_byte_permutes_look_up_every_code(kind: str) -> None:
    """Each byte in each of the four places: 16 bits of mantissa, and exact where the codec is (0, ±1, halves)."""
    values, source = table(kind), permute_asm(table(kind))
    for byte in range(256):
        others = (0x00, 0x7E, 0xF1, 0x98)
        for place in range(4):
            packed = [byte if i == place else other for i, other in enumerate(others)]
            found = [as_float(bits) for bits in run_ptx(source, int.from_bytes(bytes(packed), "little"))]
            wanted = [values[b >> 4] for b in packed] + [values[b & 15] for b in packed]
            for got, want in zip(found, wanted, strict=True):
                assert abs(got - want) <= 2.0**-16 * abs(want)
                assert got == want or want not in (0.0, 1.0, -1.0, 0.5, 0.25)


def test_permutes_are_few() -> None:
    """35 instructions for eight codes, as the cost model counts."""
    lines = [line for line in permute_asm(table("nf4")).split(";") if re.match(r"\s*(\{ )?(and|shr|shl|prmt|lop3)", line)]
    assert len(lines) == 35


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_select_tree_is_the_table(kind: str) -> None:
    class Language:
        where = staticmethod(lambda condition, yes, no: yes if condition else no)

    tree = compile(select_tree(table(kind), "code"), "tree", "eval")
    assert [eval(tree, {"tl": Language, "code": code}) for code in range(16)] == list(table(kind))
