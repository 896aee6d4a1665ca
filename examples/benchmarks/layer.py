"""Forward and backward of one layer, against the floor: y and dx of a frozen dense linear in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rosa_fx
from benchmarks import common
from benchmarks.common import Bar, Part
from benchmarks.reference import replace_linears
from rosa_fx.state import state_of

FLOOR, FOUR_BIT, QLORA, REFERENCE = "floor: frozen dense", "Linear4bit", "Linear4bit + LoRA", "reference RoSA NF4 (transcribed)"
RANDOM, CLUSTERED, DENSE = "QRoSA NF4, random mask", "QRoSA NF4, clustered mask", "RoSA dense base, random mask"


def linear4bit(weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' NF4 linear with that weight [N, K], computing in `dtype`."""
    import bitsandbytes as bnb

    rows, columns = weight.shape
    module = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=False)
    module.weight = bnb.nn.Params4bit(
        weight.to(dtype).clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    return module.to(weight.device)


def dense4bit(model: nn.Module) -> Tensor:
    """The weight [N, K] of the only `linear4bit` in the model, which has not been called, in float32."""
    import bitsandbytes as bnb

    (weight,) = (module.weight for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()


def with_lora(model: nn.Module, rank: int, targets: Any = "all-linear") -> nn.Module:
    """PEFT's LoRA on every linear of the model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=targets)
    return get_peft_model(model, config)  # type: ignore[arg-type, no-any-return]


def rosa(weight: Tensor, dtype: torch.dtype, base: str, rank: int, density: float, clustered: bool = False) -> nn.Module:
    """A transformed model of one linear, its mask set and its adapters not zero."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = rosa_fx.transform(nn.Sequential(linear), rosa_fx.RosaSpec(base=base, rank=rank, alpha=rank, density=density))
    rosa_fx.set_masks(model, common.random_masks(model, density, clustered))
    rosa_fx.MaskSchedule(model, "wl0").begin_step()
    common.randomise(model)
    return model


def step(call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: Sequence[Tensor]) -> Callable[[], None]:
    """One forward and backward: grad-input, and the gradients of `parameters`."""

    def run() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        call(x).backward(dy)

    return run


def verify(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> None:
    """Output and gradients of a transformed single layer against float64, on at most 512 rows that are not zero.

    Raises SystemExit where the error is above 1.1 times that of the plain computation in x's dtype.
    """
    (weight,) = state_of(model).weights.values()
    assert weight.low_rank is not None
    assert weight.sparse is not None
    assert weight.sparse.mask is not None
    rows, cols = weight.sparse.mask.rows(), weight.sparse.cols.long()
    keep = min(512, len(x))
    x, dy = x.detach().clone(), dy.clone()
    x[keep:], dy[keep:] = 0, 0
    x.requires_grad_()
    y = call(x)
    leaves = [weight.low_rank.A, weight.low_rank.B, weight.sparse.values]
    ours = [y, *torch.autograd.grad(y, [x, *leaves], dy)]
    results = []
    for dtype in (torch.float64, x.dtype):
        a = x.detach()[:keep].to(dtype).requires_grad_()
        A, B, values = (leaf.detach().to(dtype) for leaf in leaves)
        W = weight.base.format.dequantize(weight.base.tensors(), weight.shape, dtype)
        S = torch.zeros_like(W)
        S[rows, cols] = values
        g = dy[:keep].to(dtype)
        low = F.linear(a.detach(), A)
        out = F.linear(a.detach(), W) + F.linear(a.detach(), S) + weight.scale * F.linear(low, B)
        dlow = weight.scale * (g @ B)
        dx = g @ W + g @ S + dlow @ A
        results.append([out, dx, dlow.t() @ a.detach(), weight.scale * (g.t() @ low), (g.t() @ a.detach())[rows, cols]])
    for name, exact, mine, plain in zip(("y", "dx", "dA", "dB", "dS"), results[0], ours, results[1], strict=True):
        common.compare(name, exact, mine[:keep] if name in ("y", "dx") else mine, plain)


def run(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    rank: int = 16,
    density: float = 0.006,
    compile_ours: bool = True,
) -> Part:
    part = Part("layer", "One layer, forward + backward: time over that of a frozen dense linear of the same dtype")
    part.notes = [
        f"NF4 in blocks of 64, rank {rank}, {density:.1%} sparse, adapters float32. The reference is a transcription of its "
        "algorithm. Ratios are medians over rounds of the ratio within a round."
    ]
    for shape in shapes:
        weight = common.random_weight(shape)
        for name in dtypes:
            for count in rows:
                _one(part, weight, common.DTYPES[name], count, rounds, rank, density, compile_ours)
        torch._dynamo.reset()
    return part


def _one(
    part: Part, weight: Tensor, dtype: torch.dtype, rows: int, rounds: int, rank: int, density: float, compile_ours: bool
) -> None:
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(rows, outputs, generator=generator).to(dtype)
    frozen = weight.to(dtype)
    ours = {
        RANDOM: rosa(weight, dtype, "nf4", rank, density),
        CLUSTERED: rosa(weight, dtype, "nf4", rank, density, clustered=True),
        DENSE: rosa(weight, dtype, "keep", rank, density),
    }
    qlora = with_lora(nn.Sequential(linear4bit(weight, dtype)), rank, ["0"])
    common.randomise(qlora)
    source = ours[RANDOM]
    reference = replace_linears(nn.Sequential(nn.Linear(1, 1, bias=False)), source)
    models: dict[str, nn.Module] = {QLORA: qlora, REFERENCE: reference} | ours
    cases = {
        FLOOR: step(lambda x: F.linear(x, frozen), x, dy, []),
        FOUR_BIT: step(linear4bit(weight, dtype), x, dy, []),
    }
    for name, model in models.items():
        call: Any = torch.compile(model, dynamic=False) if name in ours and compile_ours else model
        if name in ours:
            verify(model, call, x, dy)
        cases[name] = step(call, x, dy, [p for p in model.parameters() if p.requires_grad])
    seconds = common.interleaved(cases, rounds)
    floor = common.quartiles(seconds[FLOOR])[0]
    tflops = 4 * rows * outputs * inputs / floor / 1e12
    kind = str(dtype).removeprefix("torch.")
    columns = {"weight": f"{outputs}x{inputs}", "rows": rows, "dtype": kind, "floor TFLOP/s": round(tflops, 3)}
    part.add(common.timing_rows(seconds, FLOOR, "x floor", **columns))
    where = f"{columns['weight']}, {rows} rows, {kind}"
    short = rows < 1024
    for name, limit in (
        (RANDOM, 1.45 if short else 1.2),
        (CLUSTERED, 1.45 if short else 1.2),
        (DENSE, 1.25 if short else 1.12),
    ):
        part.bars.append(Bar(f"{name}, {where}: x floor", common.quartiles(common.ratios(seconds, name, FLOOR))[0], limit))
    for name in (RANDOM, CLUSTERED):
        ratio = common.quartiles(common.ratios(seconds, name, QLORA))[0]
        part.bars.append(Bar(f"{name}, {where}: x {QLORA}", ratio, 1.0))
    ratio = {name: common.quartiles(common.ratios(seconds, name, FLOOR))[0] for name in cases}
    part.panels[where] = {"x floor": [(name, value) for name, value in reversed(ratio.items())]}
