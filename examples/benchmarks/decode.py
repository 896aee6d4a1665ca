"""Inference with few rows: bitsandbytes' 4-bit path + LoRA against QRoSA, and a merged layer against a plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rosa_fx
from benchmarks import common, layer
from benchmarks.common import Bar, Part
from rosa_fx.state import state_of

FLOOR, MERGED = "plain linear", "QRoSA merged"


def run(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    rank: int = 16,
    density: float = 0.006,
    compile_ours: bool = True,
) -> Part:
    part = Part("decode", "Inference: forward of one layer with few rows")
    part.notes = [
        f"NF4 in blocks of 64, rank {rank}, {density:.1%} sparse (the peer carries no sparse part). A call is repeated until "
        "20 ms have passed; times are per call. Error: RMS from float64 with the same quantised weight, over that of the "
        "result: the peer multiplies float32 rows in bfloat16 where the processor has that, and rosa_fx in float32."
    ]
    for shape in shapes:
        weight = common.random_weight(shape)
        for kind in dtypes:
            dtype = common.DTYPES[kind]
            ours = layer.rosa(weight, dtype, "nf4", rank, density).eval()
            merged = rosa_fx.merge(layer.rosa(weight, dtype, "nf4", rank, density)).eval()
            qlora = layer.with_lora(nn.Sequential(layer.linear4bit(weight, dtype)), rank, ["0"]).eval()
            plain = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
            # Before the first call: the library then stores the weight in another way.
            dense = {
                layer.QLORA: layer.dense4bit(qlora),
                FLOOR: plain.weight,
                MERGED: _weight(merged),
                layer.RANDOM: _dense(ours),
            }
            for count in rows:
                call: Any = torch.compile(ours, dynamic=False) if compile_ours else ours
                x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count)).to(dtype)
                models = {FLOOR: plain, layer.QLORA: qlora, layer.RANDOM: call, MERGED: merged}
                _one(part, models, ours, dense, x, rounds, f"{shape[0]}x{shape[1]}", kind)
        torch._dynamo.reset()
    return part


@torch.no_grad()
def _one(
    part: Part,
    models: dict[str, Any],
    ours: nn.Module,
    dense: dict[str, Tensor],
    x: Tensor,
    rounds: int,
    shape: str,
    kind: str,
) -> None:
    _verify(ours, models[layer.RANDOM], x)
    repeats = 1
    while _seconds(lambda: models[layer.QLORA](x), repeats) < 0.02:
        repeats *= 2
    seconds = common.interleaved({name: _repeat(model, x, repeats) for name, model in models.items()}, rounds)
    seconds = {name: [value / repeats for value in values] for name, values in seconds.items()}
    rows = common.timing_rows(seconds, layer.QLORA, "x QLoRA", weight=shape, rows=len(x), dtype=kind)
    for row in rows:
        exact = F.linear(x.double(), dense[row["peer"]].double())
        row["error"] = f"{common.rms(models[row['peer']](x) - exact) / common.rms(exact):.1e}"
    part.add(rows)
    where = f"{shape}, {len(x)} rows, {kind}"
    ratio = {name: common.quartiles(common.ratios(seconds, name, layer.QLORA))[0] for name in models}
    part.bars.append(Bar(f"{layer.RANDOM}, {where}: x {layer.QLORA}", ratio[layer.RANDOM], 1.0))
    # Two equal modules: what differs is noise.
    equal = common.quartiles(common.ratios(seconds, MERGED, FLOOR))[0]
    part.bars.append(Bar(f"{MERGED}, {where}: x {FLOOR}", equal, 1.1))
    part.panels[where] = {f"x {layer.QLORA}": [(name, value) for name, value in reversed(ratio.items())]}


@torch.no_grad()
def _dense(ours: nn.Module) -> Tensor:
    """W + S + s B A [N, K] of a transformed model of one linear, in float64."""
    (name,) = state_of(ours).weights
    weight = state_of(ours).weights[name]
    base = weight.base.format.dequantize(weight.base.tensors(), weight.shape, torch.float64)
    return base + rosa_fx.delta(ours, name).double()


def _weight(model: nn.Module) -> Tensor:
    (weight,) = model.parameters()
    return weight


def _repeat(model: Callable[[Tensor], Tensor], x: Tensor, repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            model(x)

    return run


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    return common.interleaved({"": lambda: [call() for _ in range(repeats)]}, 1)[""][0]


def _verify(ours: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    (weight,) = state_of(ours).weights.values()
    assert weight.low_rank is not None
    assert weight.sparse is not None
    assert weight.sparse.mask is not None
    results = []
    for dtype in (torch.float64, x.dtype):
        W = weight.base.format.dequantize(weight.base.tensors(), weight.shape, dtype)
        A, B, values = (p.detach().to(dtype) for p in (weight.low_rank.A, weight.low_rank.B, weight.sparse.values))
        S = torch.zeros_like(W)
        S[weight.sparse.mask.rows(), weight.sparse.cols.long()] = values
        a = x.to(dtype)
        results.append(F.linear(a, W) + F.linear(a, S) + weight.scale * F.linear(F.linear(a, A), B))
    common.compare("y", results[0], call(x), results[1])
