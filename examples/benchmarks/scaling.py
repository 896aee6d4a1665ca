"""Curves of one compiled QRoSA layer: time and memory against its size, rows, density and rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common, layer
from benchmarks.common import Part
from rosa_fx.state import state_of

DENSITIES = (0.001, 0.003, 0.006, 0.01, 0.02, 0.05)
RANKS = (4, 16, 64, 256)
ROWS = (1, 8, 32, 64, 128, 512, 2048)


def peak(call: Callable[[], Any]) -> int:
    """Bytes of torch's CPU allocations alive at once during `call`, above those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    profiler: Any = profile.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


def run(dtype_name: str, rounds: int, size: int = 2048, rows: int = 512, compile_ours: bool = True) -> Part:
    part = Part("scaling", "One compiled QRoSA layer, forward + backward: time and memory against its sizes")
    part.notes = [
        f"Around a {size}x{size} NF4 weight with {rows} rows, rank 16, 0.6 % sparse, {dtype_name}. `cost` is the operations "
        "of the layer's products over those of the floor; `resident` the base and the adapters, `peak` what a step "
        "allocates above it."
    ]
    at: dict[str, float] = {"size": size, "rows": rows, "density": 0.006, "rank": 16}
    curves: dict[str, tuple[float, ...]] = {
        "size": tuple(sorted({max(64, size // 8), max(64, size // 4), size // 2, size, 2 * size})),
        "rows": tuple(count for count in ROWS if count <= 4 * rows),
        "density": DENSITIES,
        "rank": tuple(rank for rank in RANKS if rank <= size // 2),
    }
    for name, values in curves.items():
        points = [_point(part, name, at | {name: value}, common.DTYPES[dtype_name], rounds, compile_ours) for value in values]
        part.panels[f"against {name}"] = {
            label: [(value, point[label]) for value, point in zip(values, points, strict=True)] for label in points[0]
        }
        torch._dynamo.reset()
    return part


def _point(
    part: Part, varied: str, at: dict[str, float], dtype: torch.dtype, rounds: int, compile_ours: bool
) -> dict[str, float]:
    size, rows, rank, density = int(at["size"]), int(at["rows"]), int(at["rank"]), at["density"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) * size**-0.5
    x = torch.randn(rows, size, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(rows, size, generator=generator).to(dtype)
    frozen: Tensor = weight.to(dtype)
    model = layer.rosa(weight, dtype, "nf4", rank, density)
    call: Any = torch.compile(model, dynamic=False) if compile_ours else model
    layer.verify(model, call, x, dy)
    (rewritten,) = state_of(model).weights.values()
    resident = sum(tensor.nbytes for tensor in [*rewritten.base.tensors(), *rewritten.delta_tensors()])
    ours = layer.step(call, x, dy, [p for p in model.parameters() if p.requires_grad])
    seconds = common.interleaved(
        {layer.FLOOR: layer.step(lambda x: F.linear(x, frozen), x, dy, []), layer.RANDOM: ours}, rounds
    )
    # What the last step left must not be freed inside the count.
    for leaf in (x, *model.parameters()):
        leaf.grad = None
    allocated = peak(ours)
    columns: dict[str, Any] = {"varied": varied, "size": size, "rows": rows, "density": density, "rank": rank}
    # Two products with the weight; five thin ones; one multiply-add per row and entry.
    cost = 1 + 5 * rank * 2 / (4 * size) + density / 2
    columns |= {"resident MB": round(resident / 1e6, 2), "peak MB": round(allocated / 1e6, 2), "cost": round(cost, 3)}
    part.add(common.timing_rows(seconds, layer.FLOOR, "x floor", **columns))
    milliseconds = {name: 1e3 * common.quartiles(times)[0] for name, times in seconds.items()}
    return {f"{name}, ms": milliseconds[name] for name in milliseconds} | {"peak, MB": math.ceil(allocated / 1e4) / 1e2}
