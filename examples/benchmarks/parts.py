"""Where the time of one layer goes: the GEMMs and what there is beyond them, forward and backward."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common, layer
from benchmarks.common import Part
from rosa_fx.kernels import composition
from rosa_fx.kernels.cpu import rows as decoder
from rosa_fx.kernels.terms import sparse

BASES = {"nf4": "QRoSA NF4", "keep": "RoSA dense base"}
WATCHED: tuple[tuple[Any, str, str], ...] = (
    (composition.gemm, "product", "GEMM"),
    (decoder.Source, "terms", "pass with S and the low-rank term, and what comes with it"),
    (decoder.Source, "write", "decoding apart"),
    (sparse, "sddmm", "gradient of the values apart"),
)
REST = "rest: calls, allocation, thin products apart"


@contextmanager
def watched(seconds: dict[str, float]) -> Iterator[None]:
    """Adds the time of each call of what is watched to `seconds`."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in WATCHED]

    def timed(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[label] += time.perf_counter() - begin

        return call

    try:
        for owner, name, label in WATCHED:
            setattr(owner, name, timed(getattr(owner, name), label))
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def run(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    rank: int = 16,
    density: float = 0.006,
    compile_ours: bool = True,
) -> Part:
    part = Part("parts", "One layer: what its time is spent on, in ms")
    part.notes = [
        f"Rank {rank}, {density:.1%} sparse, random mask; medians of {rounds} rounds, interleaved. Floor: y and dx "
        "of a frozen dense linear. In bfloat16 the pass also decodes the weight, where that is one tile, and backward it "
        "makes the gradients; so it does in float32 for small weights."
    ]
    for shape in shapes:
        weight = common.random_weight(shape)
        for kind in dtypes:
            dtype = common.DTYPES[kind]
            models = {label: layer.rosa(weight, dtype, base, rank, density) for base, label in BASES.items()}
            dense = weight.to(dtype)
            calls: dict[str, Callable[[Tensor], Tensor]] = {layer.FLOOR: lambda x, W=dense: F.linear(x, W)}
            calls |= {label: torch.compile(m, dynamic=False) if compile_ours else m for label, m in models.items()}
            for count in rows:
                generator = torch.Generator().manual_seed(count)
                x = torch.randn(count, shape[1], generator=generator).to(dtype).requires_grad_()
                dy = torch.randn(count, shape[0], generator=generator).to(dtype)
                for label, model in models.items():
                    layer.verify(model, calls[label], x, dy)
                part.add(_one(calls, models, x, dy, rounds, weight=f"{shape[0]}x{shape[1]}", rows=count, dtype=kind))
        torch._dynamo.reset()
    return part


def _one(
    calls: dict[str, Callable[[Tensor], Tensor]], models: Any, x: Tensor, dy: Tensor, rounds: int, **columns: Any
) -> list[dict[str, Any]]:
    taken: dict[tuple[str, str], list[list[float]]] = defaultdict(lambda: [[], []])
    for turn in range(rounds + 1):
        for label, call in calls.items():
            x.grad = None
            for parameter in models[label].parameters() if label in models else ():
                parameter.grad = None
            y: Any = None
            for direction in (0, 1):
                seconds: dict[str, float] = defaultdict(float)
                with watched(seconds):
                    begin = time.perf_counter()
                    if direction == 0:
                        y = call(x)
                    else:
                        y.backward(dy)
                    total = time.perf_counter() - begin
                if turn == 0:
                    continue
                taken[label, "all"][direction].append(total)
                if label in models:
                    seconds[REST] = total - sum(seconds.values())
                    for name in (*(name for _, _, name in WATCHED), REST):
                        taken[label, name][direction].append(seconds[name])
    out = []
    for (label, name), (forward, backward) in taken.items():
        times = [1e3 * statistics.median(values) for values in (forward, backward)]
        if any(times):
            out.append(columns | {"layer": label, "part": name, "forward": round(times[0], 2), "backward": round(times[1], 2)})
    return out
