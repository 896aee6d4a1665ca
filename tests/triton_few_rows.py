"""The kernel for few rows and 4-bit weights, executed by Triton's interpreter. Run by `test_triton.py`."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu
from triton_device import seeded
from triton_layers import build, check

from rosa_fx.kernels import ops, tiling
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.tiling import Tiles


@pytest.fixture(params=[Tiles(8, 16, 64, 4, 3), Tiles(16, 32, 128, 4, 3)], ids=["8 rows", "16 rows"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tiles:
    """Small ones, so that a weight has several in each direction."""
    monkeypatch.setattr(tiling, "tile_choices", lambda product: [request.param])
    assert isinstance(request.param, Tiles)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("blocksize", "columns", "nested"),
    [(32, 224, True), (64, 192, False), (64, 256, True), (128, 288, False), (4096, 320, True)],
)
def test_scales_of_every_step(tiles: Tiles, blocksize: int, columns: int, nested: bool, dtype: torch.dtype) -> None:
    """Blocks shorter and longer than a step, tiles beyond the last row and column, scales of a row that end with the weight."""
    form = base_format("nf4" if nested else "fp4", blocksize=blocksize, double_quant=nested)
    code = check(build(form, 7, (40, columns), rank=3, dtype=dtype))
    assert "GROUPS" in code


def test_error_is_no_larger_than_that_of_scaled_weights(tiles: Tiles) -> None:
    """RMS error at most 1.1 times that of the plain computation in the same dtype."""
    form = base_format("nf4")
    layer = build(form, 16, (64, 512), rank=12, entries="none", dtype=torch.bfloat16)
    out, code = layer.compiled()
    assert "GROUPS" in code
    exact = layer.exact()
    ours, plain = ((result.double() - exact).square().mean().sqrt().item() for result in (out, layer.plain()))
    assert ours <= 1.1 * plain, f"RMS error {ours:.3e}, plain {plain:.3e}"


def test_rows_beyond_the_hint(tiles: Tiles) -> None:
    """A graph that was made for few rows of any number takes more of them: several tiles of rows."""
    layer = build(base_format("nf4"), 5, (48, 128), rank=4, entries="none", dtype=torch.bfloat16, bias=False)
    op, key, delta = (
        ops.linear,
        layer.layout.key,
        [layer.A, layer.B, layer.values, layer.mask.row_offsets, layer.mask.cols],
    )

    def run(x: torch.Tensor) -> torch.Tensor:
        return silu(op(x, None, list(layer.weight), delta, key))

    torch._dynamo.reset()
    function = torch.compile(run, fullgraph=True, dynamic=True)
    for rows in (5, 19, 33):
        layer.x = torch.randn(rows, 128, generator=seeded(rows)).to(torch.bfloat16)
        with torch.no_grad():
            out = function(layer.x)
        exact = silu(layer.exact())
        # The slope of SiLU is at most 1.1, and its result is rounded once more.
        assert ((out.double() - exact).abs() <= 1.1 * layer.bound() + 2.0**-8 * exact.abs()).all()
