"""Kernel choices as pure functions, and the table lookups that GPUs do by byte permutes."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rosa_fx.kernels.heuristics import (
    AMD,
    DECODE_ROWS,
    Product,
    Tiles,
    choose_by_time,
    fits,
    fuse,
    gather_tile,
    gathers,
    permutes,
    power_of_two,
    rank_block,
    scales_per_row,
    scratch_tile,
    shared_bytes,
    shared_limit,
    sparse_block,
    tile_choices,
    upright,
)
from rosa_fx.kernels.lookup import pair_asm, pair_words, permute_asm, select_tree, stretched, table

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
    # Decoding a long step before sm_90 leaves a quarter of the registers to it.
    assert not fits(Product(4096, 4096, 4096, "nf4", torch.bfloat16, capability=(8, 0)), large)
    assert fits(Product(4096, 4096, 4096, "nf4", torch.bfloat16, capability=(9, 0)), large)
    assert fits(Product(4096, 4096, 4096, "nf4", torch.bfloat16, capability=(8, 0)), Tiles(256, 128, 32, 8, 3))
    # So do operands of 32 bits.
    assert not fits(Product(4096, 4096, 4096, "nf4", torch.float32, capability=(9, 0)), Tiles(256, 128, 32, 8, 2))


def test_training_tiles_share_a_decoded_weight_among_many_rows() -> None:
    for capability, steps in (((8, 0), 32), ((9, 0), 64), ((10, 0), 64)):
        first = tile_choices(Product(4096, 4096, 4096, "nf4", torch.bfloat16, 16, capability=capability))[0]
        assert (first.block_m, first.block_out, first.block_sum) == (256, 128, steps)


@pytest.mark.parametrize("outputs", [1024, 4096, 11008])
def test_few_rows_keep_bytes_under_way(outputs: int) -> None:
    """16 bytes of codes a thread and load; 16 KiB under way on each multiprocessor that has a program."""
    first = tile_choices(Product(1, outputs, 4096, "nf4", torch.bfloat16, 16, capability=(9, 0)))[0]
    packed = first.block_out * first.block_sum // 2
    assert packed >= 16 * 32 * first.warps
    programs = -(-outputs // first.block_out)
    assert programs >= min(128, outputs // 16)
    assert max(1, programs // 128) * first.stages * packed >= (16 << 10 if outputs >= 4096 else 12 << 10)


def test_an_autotuner_times_both_ways_where_both_exist() -> None:
    assert choose_by_time(product(17, nnz=100))
    assert choose_by_time(product(17, transposed=True))
    assert not choose_by_time(product(17, nnz=100, transposed=True))
    assert not choose_by_time(product(DECODE_ROWS))


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        (torch.bfloat16, (8, 0), True),
        (torch.bfloat16, (7, 5), False),
        (torch.float16, (7, 5), True),
        (torch.float32, (9, 0), False),
    ],
)
def test_pairs_need_packed_arithmetic(dtype: torch.dtype, capability: tuple[int, int], expected: bool) -> None:
    assert permutes(Product(64, 64, 64, "nf4", dtype, capability=capability)) is expected


def test_an_unknown_capability_has_the_limit_of_the_one_below() -> None:
    assert shared_limit((9, 5)) == shared_limit((9, 0))
    assert shared_limit((7, 0)) == 48 << 10
    assert shared_limit(AMD) == 64 << 10


def product(
    rows: int, kind: str = "nf4", nnz: int = 0, transposed: bool = False, capability: tuple[int, int] = (8, 0)
) -> Product:
    return Product(rows, 4096, 4096, kind, torch.bfloat16, 16, nnz, transposed, capability)


def test_few_rows_are_decoded_in_the_loop() -> None:
    assert fuse(product(1, nnz=100_000))
    assert fuse(product(DECODE_ROWS, nnz=100_000))
    assert tile_choices(product(1))[0].block_m == 16


def test_a_sparse_part_goes_through_the_scratch_buffer_where_gathering_it_costs_more() -> None:
    """The rows that the cost model names; fewer entries are worth gathering for more rows; never for grad input."""
    nnz = int(0.006 * 4096 * 4096)
    for capability, rows in (((8, 0), 364), ((9, 0), 442)):
        assert fuse(product(rows, nnz=nnz, capability=capability))
        assert not fuse(product(rows + 10, nnz=nnz, capability=capability))
        assert fuse(product(rows + 10, nnz=nnz // 2, capability=capability))
        assert not fuse(product(2048, nnz=nnz, capability=capability))
    assert not fuse(product(1, nnz=1, transposed=True))
    assert fuse(product(512, "dense", nnz=nnz))
    assert not fuse(product(4096, "dense", nnz=nnz))


@given(products)
def test_only_what_is_summed_over_columns_for_many_rows_is_gathered_apart(product: Product) -> None:
    assert gathers(product) == (product.nnz > 0 and not product.transposed and product.rows > DECODE_ROWS)
    if gathers(product) and fuse(product):
        assert fuse(replace(product, nnz=product.nnz // 2))
        assert fuse(replace(product, rows=product.rows // 2 + 1))


@given(products)
def test_gathers_of_their_own_read_whole_sectors(product: Product) -> None:
    """At least 32 bytes of xᵀ an entry where x has as many rows, and work for every lane."""
    tile = gather_tile(replace(product, nnz=product.nnz + 1))
    assert tile.rows * product.dtype.itemsize >= 32
    assert tile.rows < 2 * max(product.rows, 16)
    assert 32 * tile.warps <= tile.rows * tile.entries
    assert tile.rows * tile.entries <= 64 * 32 * tile.warps
    for size in (tile.rows, tile.entries, tile.warps):
        assert size & (size - 1) == 0


@given(st.integers(1, 100_000))
def test_the_scratch_buffer_is_written_from_wide_loads(columns: int) -> None:
    """16 weights a thread or more: 8 bytes of 4-bit codes; no block twice as long as the row."""
    tile = scratch_tile(columns)
    assert tile.columns < 2 * max(columns, 16)
    assert tile.columns >= min(16 * 32 * tile.warps, 16)
    assert tile.warps == 1 or tile.columns >= 16 * 32 * tile.warps


def test_only_a_dense_weight_is_the_right_operand() -> None:
    assert upright(product(2048, "dense", transposed=True))
    assert not upright(product(2048, "nf4", transposed=True))
    assert not upright(product(2048, "dense"))


def test_many_rows_decode_once() -> None:
    """The crossover lies higher where tensor cores are faster against memory; a dense weight has nothing to decode."""
    assert fuse(product(1024))
    assert not fuse(product(1025))
    assert fuse(product(1025, capability=(9, 0)))
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


def fma(dtype: torch.dtype) -> Callable[[int, int, int], int]:
    """fma.rn.bf16x2 or f16x2: two products of 16 bits in a register and two summands, each rounded once."""

    def pair(word: int) -> torch.Tensor:
        bits = [half - (half >> 15 << 16) for half in (word & 0xFFFF, word >> 16)]
        return torch.tensor(bits, dtype=torch.int16).view(dtype).double()

    def run(a: int, b: int, c: int) -> int:
        # Exact in float64, but for a summand so small that it cannot matter to the rounding.
        exact = pair(a) * pair(b) + pair(c)
        low, high = (int(half) & 0xFFFF for half in exact.to(dtype).view(torch.int16))
        return high << 16 | low

    return run


def run_ptx(source: str, inputs: dict[str, int], outputs: int = 8) -> list[int]:
    """Registers $0 to $`outputs - 1` after the instructions of `permute_asm` or `pair_asm`."""
    registers = dict(inputs)

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    instructions = {
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
        "prmt.b32": prmt,
        "mov.b32": lambda a: a,
        "fma.rn.bf16x2": fma(torch.bfloat16),
        "fma.rn.f16x2": fma(torch.float16),
        # The table 0xca is "a ? b : c", bit by bit.
        "lop3.b32": lambda a, b, c, truth: (a & b) | (~a & c) & 0xFFFFFFFF if truth == 0xCA else None,
    }
    for line in source.strip("{} ").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            name, operands = line.strip().split(" ", 1)
            target, *sources = [operand.strip() for operand in operands.split(",")]
            registers[target] = instructions[name](*(read(operand) for operand in sources))
    return [registers[f"${i}"] for i in range(outputs)]


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
            found = [as_float(bits) for bits in run_ptx(source, {"$8": int.from_bytes(bytes(packed), "little")})]
            wanted = [values[b >> 4] for b in packed] + [values[b & 15] for b in packed]
            for got, want in zip(found, wanted, strict=True):
                assert abs(got - want) <= 2.0**-16 * abs(want)
                assert got == want or want not in (0.0, 1.0, -1.0, 0.5, 0.25)


def instructions(source: str) -> int:
    return len(re.findall(r"\b(?:and|shr|shl|prmt|lop3|fma)\.", source))


def test_permutes_are_few() -> None:
    """Instructions for eight codes, as the cost model counts: 35 to look them up, 29 to look up and scale pairs."""
    assert instructions(permute_asm(table("nf4"))) == 35
    for dtype in (torch.bfloat16, torch.float16):
        assert instructions(pair_asm(stretched("nf4", dtype)[0], dtype)) == 29


def half_table(values: tuple[float, ...], dtype: torch.dtype) -> dict[str, int]:
    """The registers in which `pair_asm` expects the words of its table that are no constants of its own."""
    return dict(zip(("$13", "$17", "$21", "$25"), pair_words(values, dtype), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_pairs_are_the_tree_in_order(kind: str, dtype: torch.dtype) -> None:
    """All 256 bytes in each place: with a scale of 1, bit by bit what the tree of selections gives to the other devices."""
    values = stretched(kind, dtype)[0]
    assert torch.tensor(values, dtype=torch.float64).to(dtype).tolist() == list(values)
    bits = [int(value) & 0xFFFF for value in torch.tensor(values, dtype=dtype).view(torch.int16)]
    one = int(torch.ones((), dtype=dtype).view(torch.int16)) * 0x10001
    source = pair_asm(values, dtype)
    scales = {f"${i}": one for i in range(5, 9)} | {f"${i}": 0 for i in range(9, 13)} | half_table(values, dtype)
    for byte in range(256):
        packed = [byte, byte ^ 0x5A, (byte * 7) & 0xFF, 255 - byte]
        packed = packed[byte % 4 :] + packed[: byte % 4]
        found = run_ptx(source, {"$4": int.from_bytes(bytes(packed), "little")} | scales, 4)
        for pair, code in zip(found, packed, strict=True):
            assert (pair & 0xFFFF, pair >> 16) == (bits[code >> 4], bits[code & 15])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_pairs_are_rounded_once(dtype: torch.dtype) -> None:
    """Against the exact product of value and scale: half a unit in the last place, and what splitting the scale may leave."""
    values, factor = stretched("nf4", dtype)
    source, step = pair_asm(values, dtype), torch.finfo(dtype).eps
    for scale in (0.0312, 1.0, 0.777, 3.1415, 0.0009):
        exact = torch.tensor(scale * factor, dtype=torch.float32)
        high = exact.to(dtype)
        low = (exact - high.float()).to(dtype)
        words = [(int(part.view(torch.int16)) & 0xFFFF) * 0x10001 for part in (high, low)]
        scales = {f"${i}": words[0] for i in range(5, 9)} | {f"${i}": words[1] for i in range(9, 13)}
        scales |= half_table(values, dtype)
        for code in range(16):
            found = run_ptx(source, {"$4": code * 0x11111111} | scales, 4)[0] & 0xFFFF
            got = float(torch.tensor(found - (found >> 15 << 16), dtype=torch.int16).view(dtype))
            want = values[code] * float(exact)
            assert abs(got - want) <= step / 2 * abs(want) * (1 + 4 * step) + float(torch.finfo(dtype).smallest_normal) * step


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.6), ("fp4", 1e-3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stretching_the_table_makes_up_for_its_rounding(kind: str, share: float, dtype: torch.dtype) -> None:
    """The share that is left of the root mean square of rounding the table as it is."""
    exact = torch.tensor(table(kind), dtype=torch.float64)
    values, factor = stretched(kind, dtype)
    left = (torch.tensor(values, dtype=torch.float64) * factor - exact).square().mean().sqrt()
    assert left <= share * (exact.to(dtype).double() - exact).square().mean().sqrt()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_select_tree_is_the_table(kind: str) -> None:
    class Language:
        where = staticmethod(lambda condition, yes, no: yes if condition else no)

    tree = compile(select_tree(table(kind), "code"), "tree", "eval")
    assert [eval(tree, {"tl": Language, "code": code}) for code in range(16)] == list(table(kind))
