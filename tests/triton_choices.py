"""What Inductor decides around the fused operators, executed by Triton's interpreter. Run by `test_triton.py`.

Epilogues, autotuning, and whole models from `transform` to gradients. Every output and scratch buffer starts as NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from triton_layers import FORMATS, build, calls, check, kernels

import rosa_fx
from rosa_fx.kernels import inductor, tiling
from rosa_fx.kernels.triton_templates import template


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
    choices = [tiling.Tiles(16, 32, 32, 4, 2), tiling.Tiles(16, 16, 64, 4, 2)]
    monkeypatch.setattr(tiling, "tile_choices", lambda product: choices)
    layer = build(FORMATS["nf4"], 5, (33, 64), rank=0)
    code = check(layer, options={"max_autotune": True, "autotune_local_cache": False})
    assert len(kernels(code)) == 1


@pytest.mark.parametrize(
    ("name", "entries", "transposed"),
    [("nf4 nested", "none", False), ("int8", "none", True), ("nf4", "random", False), ("fp4", "random", True)],
)
def test_autotuning_decides_between_the_loop_and_a_scratch_buffer(
    monkeypatch: pytest.MonkeyPatch, name: str, entries: str, transposed: bool
) -> None:
    """Both ways are timed on codes that are not all 0, and the faster one is what is generated: each in its turn."""
    monkeypatch.setattr(tiling, "tile_choices", lambda product: [tiling.Tiles(16, 32, 32, 4, 2)])
    spread = []
    template_timer = inductor.template_timer
    scratch = template("scratch", FORMATS[name].kind)

    def watched(*arguments: Any) -> Callable[..., float]:
        timer = template_timer(*arguments)

        def run(*tensors: Tensor, out: Tensor) -> float:
            spread.extend(int(tensor.unique().numel()) for tensor in tensors if tensor.dtype in (torch.uint8, torch.int8))
            taken = timer(*tensors, out=out)
            assert taken > 0
            assert not out.isnan().any(), "what was timed wrote only a part"
            return taken * (scale if arguments[0] is scratch else 1e-9)

        return run

    monkeypatch.setattr(inductor, "template_timer", watched)
    layer = build(FORMATS[name], 20, (24, 32), entries=entries, dtype=torch.bfloat16, transposed=transposed)
    for scale, products in ((1e6, 1), (1e-6, 2)):
        spread.clear()
        if scale < 1:
            monkeypatch.setattr(inductor, "time_call", lambda function, device: 1e-6 * (function() is None))
        code = check(layer, options={"max_autotune": True, "max_autotune_gemm_backends": "ATEN", "autotune_local_cache": False})
        # x Aᵀ is the library's either way.
        assert len(calls(code, "extern_kernels")) == products
        assert spread
        assert min(spread) > 8


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
