"""Kernel choices as pure functions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rosa_fx.kernels.cost import choose_by_time, fuse, gathers
from rosa_fx.kernels.product import AMD, DECODE_ROWS, Product, power_of_two
from rosa_fx.kernels.tiling import (
    Tiles,
    fits,
    gather_tile,
    group_columns,
    permutes,
    rank_block,
    scales_per_row,
    scales_sums,
    scratch_tile,
    shared_bytes,
    shared_limit,
    sparse_block,
    tile_choices,
    upright,
)

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
    blocksize=st.sampled_from([0, 32, 64, 256, 4096]),
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
        assert tiles.block_m >= 8
        assert min(sizes[1:3]) >= 16
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
    assert choose_by_time(product(17, nnz=100, transposed=True))
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
    """The rows that the cost model names; fewer entries are worth gathering for more rows."""
    nnz = int(0.006 * 4096 * 4096)
    assert not fuse(product(DECODE_ROWS + 1, nnz=nnz))
    assert not fuse(product(1, nnz=1, transposed=True))
    assert not fuse(product(2048, "dense", nnz=nnz))
    large = Product(64, 28672, 8192, "nf4", torch.bfloat16, 16, int(0.006 * 28672 * 8192))
    for capability, rows in (((8, 0), 253), ((9, 0), 316)):
        most = replace(large, rows=rows, capability=capability)
        assert fuse(most)
        assert not fuse(replace(most, rows=rows + 1))
        assert fuse(replace(most, rows=rows + 1, nnz=large.nnz // 2))
        # To sort the entries by column takes longer than the scratch buffer of a weight this wide.
        assert not fuse(replace(most, transposed=True))
        assert fuse(replace(most, rows=rows // 2, n=8192, k=28672, transposed=True))


@given(products)
def test_what_many_rows_gather_is_worth_it_for_fewer(product: Product) -> None:
    assert gathers(product) == (product.nnz > 0 and product.rows > DECODE_ROWS)
    if gathers(product) and fuse(product):
        assert fuse(replace(product, nnz=product.nnz // 2))
        assert fuse(replace(product, rows=max(product.rows // 2, DECODE_ROWS + 1)))


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


def test_few_rows_of_four_bits_scale_sums() -> None:
    """Products of columns with one scale, at least one for each of four warps; any other product scales its weights."""

    def product(**fields: Any) -> Product:
        given: dict[str, Any] = {"rows": 16, "n": 4096, "k": 4096, "kind": "nf4", "dtype": torch.bfloat16, "blocksize": 64}
        return Product(**(given | fields))

    for blocksize, k in ((32, 4096), (64, 96), (128, 11008), (4096, 64)):
        taken = product(blocksize=blocksize, k=k)
        assert scales_sums(taken)
        for tiles in tile_choices(taken):
            columns = group_columns(taken, tiles.block_sum)
            assert columns >= 16
            assert math.gcd(k, blocksize) % columns == 0
            assert tiles.block_sum // columns >= tiles.warps
    refused: list[dict[str, Any]] = [
        {"rows": 17},
        {"k": 4104},
        {"k": 32},
        {"kind": "int8", "blocksize": 0},
        {"transposed": True},
    ]
    refused += [{"dtype": torch.float32}, {"capability": (7, 5)}, {"capability": AMD}]
    assert not any(scales_sums(product(**fields)) for fields in refused)
    assert {tiles.block_m for tiles in tile_choices(product(rows=8))} == {8}
    assert {tiles.block_m for tiles in tile_choices(product(rows=9))} == {16}
