"""Sizes for the kernels of gradients, and the width of their addresses in generated CUDA code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from other_process import run_python

from rosa_fx.kernels.lower_grads import chunks, search_steps
from rosa_fx.kernels.product import AMD
from rosa_fx.kernels.tiling import gradient_tiles


@given(rows=st.integers(1, 1 << 20), nnz=st.integers(1, 1 << 31))
def test_chunks_fit_registers_and_fill_the_device(rows: int, nnz: int) -> None:
    found = chunks(rows, nnz)
    assert len(found) == len(set(found)) >= 1
    for chunk in found:
        for size in (chunk.entries, chunk.rows):
            assert size & (size - 1) == 0, "blocks are powers of two"
        assert chunk.entries * chunk.rows <= 32 * chunk.warps * 32, "32 sums a lane"
        assert chunk.rows < 2 * max(rows, 16)
        assert chunk.entries <= 4 or nnz // chunk.entries >= 132, "a program for each multiprocessor of a large device"


@given(rows=st.integers(1, 1 << 24))
def test_search_leaves_one_row(rows: int) -> None:
    left = rows
    for _ in range(search_steps(rows)):
        left = max(left // 2, left - left // 2)
    assert left == 1


@given(
    st.integers(1, 1 << 17), st.integers(1, 1 << 17), st.integers(1, 1 << 17), st.sampled_from([torch.bfloat16, torch.float32])
)
def test_gradient_tiles_fit(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    tile_n, tile_k, step = gradient_tiles(n, k, rows, dtype, (8, 0))
    assert min(tile_n, tile_k, step) >= 16
    assert 3 * (tile_n + tile_k) * step * dtype.itemsize <= 64 << 10, "on every capability since 7.5"
    assert tile_n * tile_k <= 8 * 32 * 64
    small = gradient_tiles(n, k, rows, dtype, (7, 5))
    assert small[0] * small[1] <= 8 * 32 * 16, "without tensor cores"
    assert gradient_tiles(n, k, rows, dtype, AMD) == (tile_n, tile_k, step)


_GENERATE = """
import torch
from rosa_fx.kernels import inductor_offline as offline, lowering, ops
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.report.architectures import ARCHITECTURES
from rosa_fx.kernels.terms.registry import term

lowered = []
for rows in (2048, 65536):
    columns, nnz = 40000, 1000
    key = Layout((16, columns), torch.bfloat16, base_format("dense"), (term("sparse"),)).key

    def make():
        factors = [torch.empty(rows, size, dtype=torch.bfloat16, device="cuda") for size in (16, columns)]
        mask = [torch.empty(size, dtype=torch.int32, device="cuda") for size in (17, nnz)]
        return [*factors, torch.empty(nnz, device="cuda"), *mask]

    with offline.present(ARCHITECTURES["sm_90"].device):
        lowering.register()
        run = lambda dy, x, *delta: ops.linear_grads(dy, x, list(delta), key)[0]
        module = offline.generate(run, make, lambda name, choices: choices[0])
    (kernel,) = [item for item in offline.kernels(module) if item.is_template]
    lowered.append(kernel.constants()["INDEX_DTYPE"])
print(*lowered)
"""


def test_addresses_are_as_wide_as_the_operands_need() -> None:
    """More than 2³¹ elements of x: generated for a GPU that is not there, and not executed."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    done = run_python("-c", _GENERATE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == ["tl.int32", "tl.int64"]
