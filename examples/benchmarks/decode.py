"""Inference with few rows: bitsandbytes' 4-bit path + LoRA against QRoSA, and a merged layer against a plain one.

Single layers, and the next token of whole models, where calls of the interpreter and of the compiler count as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rosa_fx
from benchmarks import common, layer, model
from benchmarks.common import Bar, Part
from rosa_fx.state import state_of

FLOOR, MERGED = "plain linear", "QRoSA merged"
MEDIUM = f"{layer.RANDOM}, medium precision"
EAGER = "QRoSA, eager"


def run(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    models: Sequence[str] = (),
    rank: int = 16,
    density: float = 0.006,
    compile_ours: bool = True,
) -> Part:
    part = Part("decode", "Inference: forward with few rows")
    part.notes = [
        f"NF4 in blocks of 64, rank {rank}, {density:.1%} sparse (the peer carries no sparse part). A call is repeated until "
        "20 ms have passed; times are per call. Error: RMS from float64 with the same quantised weight, over that of the "
        "result: the peer multiplies float32 rows in bfloat16 where the processor has that, and rosa_fx in float32 unless "
        '`torch.set_float32_matmul_precision("medium")` allows the same. Bars compare what is of one precision.',
        "Of a model: the next token of so many sequences, without a cache of keys; the better of QLoRA eager and compiled.",
    ]
    for name in models:
        for kind in dtypes:
            _model(part, name, kind, rows, rounds, compile_ours)
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
                layers = {FLOOR: plain, layer.QLORA: qlora, layer.RANDOM: call, MERGED: merged}
                if dtype == torch.float32:
                    layers[MEDIUM], dense[MEDIUM] = call, dense[layer.RANDOM]
                _one(part, layers, ours, dense, x, rounds, f"{shape[0]}x{shape[1]}", kind)
        torch._dynamo.reset()
    return part


@contextmanager
def _precision(peer: str) -> Iterator[None]:
    """That in which a peer's float32 products are made, for as long as it is called."""
    torch.set_float32_matmul_precision("medium" if peer == MEDIUM else "highest")
    yield
    torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def _model(part: Part, name: str, kind: str, rows: Sequence[int], rounds: int, compiled: bool) -> None:
    base = model.load(name, common.DTYPES[kind])
    built = {model.QLORA: model.QLORA, model.QLORA_COMPILED: model.QLORA, EAGER: model.QROSA, model.QROSA: model.QROSA}
    peers = tuple(built)
    models = {peer: model.build(what, name, common.DTYPES[kind], base, compiled=False).eval() for peer, what in built.items()}
    for peer in peers:
        # Once without a compiler: bitsandbytes then stores weights in another way, of which compiled code would not know.
        models[peer](model.batch(base, (1, 1))["input_ids"])
        if compiled and peer in (model.QLORA_COMPILED, model.QROSA):
            rosa_fx.compile_blocks(models[peer])
    for count in rows:
        ids = model.batch(base, (count, 1))["input_ids"]
        model.verify(base, {"input_ids": ids}, models)
        calls = {peer: _repeat(peer, models[peer], ids, 3) for peer in peers}
        seconds = {peer: [value / 3 for value in values] for peer, values in common.interleaved(calls, rounds).items()}
        best = min(peers[:2], key=lambda peer: common.quartiles(seconds[peer])[0])
        part.add(common.timing_rows(seconds, best, "x QLoRA", weight=name, rows=count, dtype=kind))
        where = f"{name}, {count} rows, {kind}"
        ratio = {peer: common.quartiles(common.ratios(seconds, peer, best))[0] for peer in peers}
        part.bars.append(Bar(f"{model.QROSA}, {where}: x {best}", ratio[model.QROSA], 1.0))
        part.panels[where] = {"x QLoRA": [(peer, value) for peer, value in reversed(ratio.items())]}
    torch._dynamo.reset()


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
    seconds = common.interleaved({name: _repeat(name, model, x, repeats) for name, model in models.items()}, rounds)
    seconds = {name: [value / repeats for value in values] for name, values in seconds.items()}
    rows = common.timing_rows(seconds, layer.QLORA, "x QLoRA", weight=shape, rows=len(x), dtype=kind)
    for row in rows:
        exact = F.linear(x.double(), dense[row["peer"]].double())
        with _precision(row["peer"]):
            row["error"] = f"{common.rms(models[row['peer']](x) - exact) / common.rms(exact):.1e}"
    part.add(rows)
    where = f"{shape}, {len(x)} rows, {kind}"
    ratio = {name: common.quartiles(common.ratios(seconds, name, layer.QLORA))[0] for name in models}
    alike = MEDIUM if MEDIUM in ratio else layer.RANDOM
    part.bars.append(Bar(f"{alike}, {where}: x {layer.QLORA}", ratio[alike], 1.0))
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


def _repeat(peer: str, model: Callable[[Tensor], Any], x: Tensor, repeats: int) -> Callable[[], None]:
    def run() -> None:
        with _precision(peer):
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
