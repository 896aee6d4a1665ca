"""What Inductor generates for the fused operators, executed by Triton's interpreter. Run by `test_triton.py`.

Every output and scratch buffer starts as NaN. Results are compared with float64: small shapes, where an RMS is not stable,
element by element under the bound of rounding analysis; larger ones under the error budget of the other operator tests.
"""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from triton_device import INTERPRETED
from triton_layers import FORMATS, Layer, build, calls, check, kernels

from rosa_fx.kernels import cost, inductor, ops, tiling
from rosa_fx.kernels.bases.base import BaseFormat, base_format

SIZES = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 32, 33, 61])
EVEN = st.sampled_from([2, 16, 32, 34, 62, 64, 66, 128])


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@given(
    form=st.sampled_from(list(FORMATS.values())),
    rows=SIZES,
    n=SIZES,
    k=st.one_of(SIZES, EVEN),
    rank=st.sampled_from([0, 1, 5, 16, 33, 64]),
    entries=st.sampled_from(["none", "random", "one row", "empty rows"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_any_shape(
    form: BaseFormat, rows: int, n: int, k: int, rank: int, entries: str, dtype: torch.dtype, bias: bool, transposed: bool
) -> None:
    layer = build(form, rows, (n, k), rank=rank, entries=entries, dtype=dtype, bias=bias, transposed=transposed)
    code = check(layer)
    single = (n, k) == (1, 1) or (rows, k if transposed else n) == (1, 1)
    assert single or not calls(code, "torch.ops.rosa_fx"), "the operator was called instead of lowered"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("blocksize", [32, 256, 4096])
@pytest.mark.parametrize("columns", [48, 128])
def test_any_blocksize(blocksize: int, columns: int, transposed: bool) -> None:
    """Scales per row, per group of a tile, and per pair of codes; absmax decoded in the kernel."""
    form = base_format("nf4", blocksize=blocksize, double_quant=columns == 48)
    check(build(form, 3, (40, columns), entries="none", transposed=transposed))


def within_budget(layer: Layer) -> None:
    """RMS error at most 1.1 times that of the plain computation in the same dtype.

    In float32 twice that on a GPU, whose library splits sums as it finds best for their lengths.
    """
    out, _ = layer.compiled()
    exact = layer.exact()
    ours, plain = ((result.double() - exact).square().mean().sqrt().item() for result in (out, layer.plain()))
    times = 1.1 if INTERPRETED or layer.x.dtype != torch.float32 else 2.0
    assert ours <= times * plain, f"RMS error {ours:.3e}, plain {plain:.3e}"


BUDGETS = [(name, dtype) for name in ("dense", "nf4", "int8") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("entries", ["none", "random"])
@pytest.mark.parametrize(("name", "dtype"), [*BUDGETS, ("nf4", torch.float16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_error_budget(name: str, dtype: torch.dtype, entries: str, transposed: bool) -> None:
    # Sums of 128: the rounding of D(Q) + S to float32 would show beside the roundings of a shorter one.
    shape = (128, 64) if transposed else (64, 128)
    layer = build(FORMATS[name], 16, shape, rank=12, entries=entries, dtype=dtype, transposed=transposed)
    within_budget(layer)


def test_fused_and_scratch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, whatever the heuristic thinks: more rows than a tile has, several tiles in each direction."""
    tiles = tiling.Tiles(16, 16, 32, 2, 2, group_m=2)
    monkeypatch.setattr(tiling, "tile_choices", lambda product: [tiles])
    for fused in (True, False):
        monkeypatch.setattr(cost, "fuse", lambda product, fused=fused: fused)
        for transposed in (False, True):
            code = check(build(FORMATS["nf4"], 70, (50, 66), transposed=transposed))
            # x Aᵀ is the library's either way; from a scratch buffer also the large product and, in float32, (x Aᵀ) Bᵀ.
            assert len(calls(code, "extern_kernels")) == (1 if fused else 3)


@pytest.mark.parametrize(
    ("name", "dtype", "rows", "entries", "transposed"),
    [
        ("nf4", torch.bfloat16, 17, "random", False),
        ("nf4", torch.bfloat16, 70, "one row", False),
        ("fp4", torch.float32, 33, "empty rows", False),
        ("int8", torch.bfloat16, 33, "random", False),
        ("dense", torch.float16, 40, "random", False),
        ("nf4", torch.bfloat16, 17, "random", True),
        ("int8", torch.float32, 33, "one row", True),
        ("dense", torch.bfloat16, 40, "empty rows", True),
    ],
)
def test_many_rows_start_from_the_sparse_part(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, rows: int, entries: str, transposed: bool
) -> None:
    """Rows and columns that no tile divides, a row longer than a step, rows without an entry: S xᵀ of a kernel of its own."""
    monkeypatch.setattr(cost, "fuse", lambda product: True)
    code = check(build(FORMATS[name], rows, (50, 66), entries=entries, dtype=dtype, transposed=transposed))
    assert sum("_tem_" in kernel for kernel in kernels(code)) == 2
    assert len(calls(code, "extern_kernels")) == 1
    assert len(calls(code, "torch.ops.rosa_fx.by_column")) == transposed


@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_error_budget_of_a_sparse_part_of_its_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, transposed: bool
) -> None:
    """S xᵀ is rounded to the dtype once, as adapter libraries round it."""
    monkeypatch.setattr(cost, "fuse", lambda product: True)
    shape = (128, 64) if transposed else (64, 128)
    within_budget(build(FORMATS["nf4"], 64, shape, rank=12, entries="random", dtype=dtype, transposed=transposed))


def test_layers_with_one_input_transpose_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "fuse", lambda product: True)
    first, second = (build(FORMATS["nf4"], 20, (24, 32), rank=0, bias=False, seed=seed) for seed in (1, 2))
    second.x = first.x

    key = first.layout.key

    def run(x: Tensor, layers: list[list[Tensor]]) -> list[Tensor]:
        return [ops.linear(x, None, part[:2], part[2:], key) for part in layers]

    torch._dynamo.reset()
    operands = [[*each.weight, each.A, each.B, each.values, each.mask.row_offsets, each.mask.cols] for each in (first, second)]
    with torch.no_grad():
        outs, codes = run_and_get_code(torch.compile(run, fullgraph=True), first.x, operands)
    for layer, out in zip((first, second), outs, strict=True):
        assert ((out.double() - layer.exact()).abs() <= layer.bound()).all()
    # The transpose, and for each layer S xᵀ and the product; those of a kind are one kernel, launched twice.
    launched = re.findall(r"(triton_\w+)\.run\(", "\n".join(codes))
    assert len([name for name in launched if "_tem_" in name]) == 4
    assert len([name for name in launched if "_tem_" not in name]) == 1


def test_batches_and_strides() -> None:
    """3-D activations, and rows that do not lie one after the other, without a copy of the result."""
    layer = build(FORMATS["nf4"], 12, (20, 32), entries="random")
    exact, bound, flat = layer.exact(), layer.bound(), layer.x
    layer.x = flat.view(3, 4, 32)
    out, _ = layer.compiled()
    assert out.shape == (3, 4, 20)
    assert ((out.double().view(12, 20) - exact).abs() <= bound).all()
    layer.x = flat.t().contiguous().t()
    out, _ = layer.compiled()
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("sizes", [(9, 5, 33), (33, 20, 5)])
def test_dynamic_rows(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    """One graph for every number of rows, made for few or for many."""
    monkeypatch.setattr(cost, "fuse", lambda product: True)
    first = build(FORMATS["nf4"], sizes[0], (20, 32))
    op, key = ops.linear, first.layout.key
    delta = [first.A, first.B, first.values, first.mask.row_offsets, first.mask.cols]
    torch._dynamo.reset()
    function = torch.compile(lambda x: op(x, first.bias, list(first.weight), delta, key), fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in sizes:
            first.x = torch.randn(rows, 32)
            out = function(first.x)
            assert ((out.double() - first.exact()).abs() <= first.bound()).all()


def test_other_devices_keep_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Inductor does not generate Triton, and for float64, the operator itself is called."""
    layer = build(FORMATS["nf4"], 3, (8, 32))
    layer.x = layer.x.double()
    _, code = layer.compiled()
    assert calls(code, "torch.ops.rosa_fx.linear")
    layer = build(FORMATS["nf4"], 3, (8, 32))
    monkeypatch.setattr(inductor, "generates_triton", lambda device: False)
    assert calls(check(layer), "torch.ops.rosa_fx.linear")
