"""What Inductor generates for the fused operators, executed by Triton's interpreter. Run by `test_triton.py`.

Every output and scratch buffer starts as NaN. Results are compared with float64: small shapes, where an RMS is not stable,
element by element under the bound of rounding analysis; larger ones under the error budget of the other operator tests.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import rosa_fx
from rosa_fx.kernels import heuristics, inductor, lowering, ops
from rosa_fx.kernels.bases.base import BaseFormat, base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.registry import term
from rosa_fx.mask import Mask


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_load("triton_cpu")
lowering.register()

FORMATS = {
    "dense": base_format("dense"),
    "int8": base_format("int8"),
    "nf4": base_format("nf4"),
    "nf4 nested": base_format("nf4", blocksize=32, double_quant=True),
    "fp4": base_format("fp4", blocksize=128),
}
SCALE = 1.3


@dataclass
class Layer:
    """Operands of one product and its exact result."""

    form: BaseFormat
    x: Tensor
    weight: tuple[Tensor, ...]
    A: Tensor
    B: Tensor
    values: Tensor
    mask: Mask
    bias: Tensor | None
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def layout(self) -> Layout:
        return Layout(self.shape, self.x.dtype, self.form, (term("low_rank", scale=SCALE), term("sparse")))

    def compiled(self, after: Callable[[Tensor], Tensor] = lambda y: y, **options: Any) -> tuple[Tensor, str]:
        """The result of generated code with `after` as epilogue, and the code."""
        op, key = (ops.linear_t if self.transposed else ops.linear), self.layout.key

        def run(x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor]) -> Tensor:
            return after(op(x, bias, base, delta, key))

        torch._dynamo.reset()
        delta = [self.A, self.B, self.values, self.mask.row_offsets, self.mask.cols]
        with torch.no_grad():
            function = torch.compile(run, fullgraph=True, **options)
            out, code = run_and_get_code(function, self.x, self.bias, list(self.weight), delta)
        return out, "\n".join(code)

    def parts(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """x, D(Q), S, A, B as factors of the forward product, in `dtype`."""
        base = self.form.dequantize(self.weight, self.shape, dtype)
        sparse = torch.zeros_like(base).index_put((self.mask.rows(), self.mask.cols.long()), self.values.to(dtype))
        A, B = self.A.to(dtype), self.B.to(dtype)
        if self.transposed:
            base, sparse, A, B = base.t(), sparse.t(), B.t(), A.t()
        return self.x.to(dtype), base, sparse, A, B

    def exact(self) -> Tensor:
        x, base, sparse, A, B = self.parts()
        out = x @ (base + sparse + SCALE * (B @ A)).t()
        return out if self.bias is None else out + self.bias.double()

    def plain(self) -> Tensor:
        """What adapter libraries compute in x's dtype."""
        x, base, sparse, A, B = self.parts(self.x.dtype)
        out = F.linear(x, base) + F.linear(x, sparse) + F.linear(F.linear(x, A), B) * SCALE
        return out if self.bias is None else out + self.bias.to(x.dtype)

    def bound(self) -> Tensor:
        """Largest error of each element: roundings times the sum of magnitudes.

        Five roundings to the dtype on the longest way (A, x Aᵀ, B, its scaling, the result), and float32 sums in any order.
        """
        x, base, sparse, A, B = (part.abs() for part in self.parts())
        out = x @ (base + sparse + SCALE * (B @ A)).t()
        out = out if self.bias is None else out + self.bias.double().abs()
        low = torch.finfo(self.x.dtype).eps / 2
        # Decoding and scaling of a weight take a few float32 operations more.
        sums = (base.shape[1] + A.shape[0] + self.values.numel() + 8) * torch.finfo(torch.float32).eps / 2
        return out * (5 * low + sums) + torch.finfo(self.x.dtype).tiny


def build(
    form: BaseFormat,
    rows: int,
    shape: tuple[int, int],
    *,
    rank: int = 4,
    entries: str = "random",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    transposed: bool = False,
    seed: int = 0,
) -> Layer:
    """Random operands. `entries`: "none", "random" (a fifth), "one row" or "empty rows" (every other)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    n, k = shape
    chosen = torch.rand(shape, generator=generator) < 0.2
    if entries == "none":
        chosen[:] = False
    elif entries == "one row":
        chosen[:] = False
        chosen[n // 2] = True
    elif entries == "empty rows":
        chosen[::2] = False
    mask = Mask.from_dense(chosen)
    return Layer(
        form,
        randn(rows, n if transposed else k).to(dtype),
        form.quantize((randn(n, k) * k**-0.5).to(dtype)),
        randn(rank, k) * k**-0.5,
        randn(n, rank) * 0.1,
        randn(mask.nnz) * 0.1,
        mask,
        randn(k if transposed else n) if bias else None,
        transposed,
    )


def check(layer: Layer, **options: Any) -> str:
    """Compare with the exact result, element by element; the generated code."""
    out, code = layer.compiled(**options)
    exact = layer.exact()
    assert out.dtype == layer.x.dtype
    assert out.shape == exact.shape
    worst = ((out.double() - exact).abs() / layer.bound()).max().item()
    assert worst <= 1, f"{worst:.3g} times the bound of rounding"
    return code


def kernels(code: str) -> list[str]:
    """Names of the Triton kernels that generated code defines."""
    return re.findall(r"^def (triton_\w+)\(", code, re.MULTILINE)


def calls(code: str, prefix: str) -> list[str]:
    """What generated code calls of the names that start so."""
    return re.findall(re.escape(prefix) + r"[\w.]*\(", code)


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


BUDGETS = [(name, dtype) for name in ("dense", "nf4", "int8") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("entries", ["none", "random"])
@pytest.mark.parametrize(("name", "dtype"), [*BUDGETS, ("nf4", torch.float16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_error_budget(name: str, dtype: torch.dtype, entries: str, transposed: bool) -> None:
    """RMS error at most 1.1 times that of the plain computation in the same dtype."""
    # Sums of 128: the rounding of D(Q) + S to float32 would show beside the roundings of a shorter one.
    shape = (128, 64) if transposed else (64, 128)
    layer = build(FORMATS[name], 16, shape, rank=12, entries=entries, dtype=dtype, transposed=transposed)
    out, _ = layer.compiled()
    exact = layer.exact()
    ours, plain = ((result.double() - exact).square().mean().sqrt().item() for result in (out, layer.plain()))
    assert ours <= 1.1 * plain, f"RMS error {ours:.3e}, plain {plain:.3e}"


def test_fused_and_scratch_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, whatever the heuristic thinks: more rows than a tile has, several tiles in each direction."""
    tiles = heuristics.Tiles(16, 16, 32, 2, 2, group_m=2)
    monkeypatch.setattr(heuristics, "tile_choices", lambda product: [tiles])
    for fused in (True, False):
        monkeypatch.setattr(heuristics, "fuse", lambda product, fused=fused: fused)
        for transposed in (False, True):
            entries = "none" if fused and transposed else "random"
            code = check(build(FORMATS["nf4"], 70, (50, 66), entries=entries, transposed=transposed))
            # x Aᵀ is the library's either way; from a scratch buffer also the large product and, in float32, (x Aᵀ) Bᵀ.
            assert len(calls(code, "extern_kernels")) == (1 if fused else 3)


@pytest.mark.parametrize("transposed", [False, True])
def test_epilogue_is_inside_the_template(transposed: bool) -> None:
    """Activation and residual are part of the one kernel that multiplies; nothing else touches the result."""
    layer = build(FORMATS["nf4"], 5, (33, 64), rank=0, entries="none", transposed=transposed)
    residual = torch.randn(5, layer.exact().shape[1])
    out, code = layer.compiled(lambda y: F.silu(y) * 2 + residual)
    assert len(kernels(code)) == 1, kernels(code)
    assert kernels(code)[0].startswith("triton_tem_fused")
    assert not calls(code, "extern_kernels")
    exact = F.silu(layer.exact()) * 2 + residual
    # The slope of SiLU is at most 1.1; the epilogue adds a few roundings of its own.
    bound = 2.2 * layer.bound() + 8 * 2.0**-24 * (exact.abs() + residual.abs())
    assert ((out.double() - exact).abs() <= bound).all()


def test_autotuning_times_the_tiles_and_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice is executed on a valid sparse part: random row offsets would make it read anywhere."""
    choices = [heuristics.Tiles(16, 32, 32, 4, 2), heuristics.Tiles(16, 16, 64, 4, 2)]
    monkeypatch.setattr(heuristics, "tile_choices", lambda product: choices)
    layer = build(FORMATS["nf4"], 5, (33, 64), rank=0)
    code = check(layer, options={"max_autotune": True, "autotune_local_cache": False})
    assert len(kernels(code)) == 1


@pytest.mark.parametrize(("name", "transposed"), [("nf4 nested", False), ("int8", True)])
def test_autotuning_decides_between_the_loop_and_a_scratch_buffer(
    monkeypatch: pytest.MonkeyPatch, name: str, transposed: bool
) -> None:
    """Both ways are timed on codes that are not all 0, and the faster one is what is generated: each in its turn."""
    monkeypatch.setattr(heuristics, "tile_choices", lambda product: [heuristics.Tiles(16, 32, 32, 4, 2)])
    spread = []
    template_timer = inductor.template_timer

    def watched(*arguments: Any) -> Callable[..., float]:
        timer = template_timer(*arguments)

        def run(*tensors: Tensor, out: Tensor) -> float:
            spread.extend(int(tensor.unique().numel()) for tensor in tensors if tensor.dtype in (torch.uint8, torch.int8))
            taken = timer(*tensors, out=out)
            assert taken > 0
            assert not out.isnan().any(), "what was timed wrote only a part"
            return taken * scale

        return run

    monkeypatch.setattr(inductor, "template_timer", watched)
    layer = build(FORMATS[name], 20, (24, 32), entries="none", dtype=torch.bfloat16, transposed=transposed)
    for scale, products in ((1e6, 1), (1e-6, 2)):
        spread.clear()
        if scale < 1:
            monkeypatch.setattr(inductor, "time_call", lambda function, device: 1e-6 * (function() is None))
        code = check(layer, options={"max_autotune": True, "max_autotune_gemm_backends": "ATEN", "autotune_local_cache": False})
        # x Aᵀ is the library's either way.
        assert len(calls(code, "extern_kernels")) == products
        assert spread
        assert min(spread) > 8


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


def test_dynamic_rows() -> None:
    """One graph for every number of rows."""
    first = build(FORMATS["nf4"], 9, (20, 32))
    op, key = ops.linear, first.layout.key
    delta = [first.A, first.B, first.values, first.mask.row_offsets, first.mask.cols]
    torch._dynamo.reset()
    function = torch.compile(lambda x: op(x, first.bias, list(first.weight), delta, key), fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (9, 5, 33):
            first.x = torch.randn(rows, 32)
            out = function(first.x)
            assert ((out.double() - first.exact()).abs() <= first.bound()).all()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("rows", [4, 20])
def test_from_transform_to_gradients(rows: int) -> None:
    """transform, torch.compile, forward and backward: generated Triton throughout, and the gradients of eager mode."""
    torch.manual_seed(0)
    model = Block()
    spec = rosa_fx.RosaSpec(base="nf4", rank=4, density=0.05)
    rosa_fx.transform(model, spec)
    weights = {name: rosa_fx.adapter(model, name) for name in ("up.weight", "down.weight")}
    chosen = {}
    for name, weight in weights.items():
        count = weight.sparse.values.numel()
        flat = torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.bool)
        chosen[name] = flat.index_fill_(0, torch.randperm(flat.numel())[:count], True).view(weight.shape)
    rosa_fx.set_masks(model, chosen)
    with torch.no_grad():
        for weight in weights.values():
            weight.low_rank.B.normal_(0, 0.1)
            weight.sparse.values.normal_(0, 0.1)
    for weight in weights.values():
        weight.set_phase("joint")
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(rows, 32, requires_grad=True)

    def step(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = run(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]

    torch._dynamo.reset()
    eager = step(model)
    ours, code = run_and_get_code(lambda: step(torch.compile(model, fullgraph=True)))
    # The exact result: the same computation on dense weights in float64.
    exact = reference(model, weights, chosen, x)
    for got, want, plain in zip(ours, exact, eager, strict=True):
        error, usual = ((result.double() - want).square().mean().sqrt().item() for result in (got, plain))
        # Two float32 sums of up to 64 products, in different order: their errors differ by chance.
        assert error <= max(1.1 * usual, 8 * 2.0**-24 * want.square().mean().sqrt().item())
    joined = "\n".join(code)
    assert not calls(joined, "torch.ops.rosa_fx")
    # y, dx and the gradient of the sparse values of each layer.
    assert sum("_tem_" in name for name in kernels(joined)) == 6


def reference(model: Block, weights: dict[str, Any], chosen: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The block's output and gradients in float64, in the order of the model's parameters."""
    leaves: dict[int, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, weight in weights.items():
        own = (weight.low_rank.A, weight.low_rank.B, weight.sparse.values)
        A, B, values = (tensor.detach().double().requires_grad_() for tensor in own)
        sparse = torch.zeros(weight.shape, dtype=torch.float64).masked_scatter(chosen[name], values)
        dense[name] = weight.base.format.dequantize(weight.base.tensors(), weight.shape, torch.float64)
        dense[name] = dense[name] + sparse + weight.scale * (B @ A)
        leaves |= {id(tensor): leaf for tensor, leaf in zip(own, (A, B, values), strict=True)}
    x64 = x.detach().double().requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        leaves.setdefault(id(p), p.detach().double().requires_grad_())
    bias = leaves.get(id(model.up.bias), model.up.bias.detach().double())
    y = x64 + F.linear(F.gelu(F.linear(x64, dense["up.weight"], bias)), dense["down.weight"])
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x64, *(leaves[id(p)] for p in parameters)])]


def test_other_devices_keep_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Inductor does not generate Triton, and for float64, the operator itself is called."""
    layer = build(FORMATS["nf4"], 3, (8, 32))
    layer.x = layer.x.double()
    _, code = layer.compiled()
    assert calls(code, "torch.ops.rosa_fx.linear")
    layer = build(FORMATS["nf4"], 3, (8, 32))
    monkeypatch.setattr(inductor, "generates_triton", lambda device: False)
    assert calls(check(layer), "torch.ops.rosa_fx.linear")
