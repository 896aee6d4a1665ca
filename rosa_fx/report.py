"""`explain`: what becomes of every target when the model is compiled, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rosa_fx.passes.report import GraphReport
from rosa_fx.state import RosaState, state_of, unwrap


@dataclass(frozen=True)
class TargetReport:
    """One rewritten weight: `status` is "fused", "dense" (right, but the dense weight is computed) or "unused".

    `shape` is that of the parameter. For one with more than two dimensions `reason` says how it is read as matrices; `rank`
    is that of each matrix, `nnz` counts the entries of all.
    """

    name: str
    shape: tuple[int, ...]
    base: str
    rank: int
    nnz: int
    status: str
    reason: str
    products: int
    gradients: int


@dataclass(frozen=True)
class RewriteReport:
    """Every target, and what capture met: `graph_breaks` and `recompiles`. Prints as a table; `to_dict` gives JSON values.

    `counts` are the rewrites over all graphs: products with the weight transposed (`linear`) and as stored (`linear_t`),
    gradients (`linear_grads`), and weights that are computed densely (`dense`).
    """

    targets: tuple[TargetReport, ...]
    graph_breaks: int
    recompiles: int
    counts: dict[str, int]

    @property
    def fused(self) -> int:
        return sum(target.status == "fused" for target in self.targets)

    @property
    def dense(self) -> int:
        return sum(target.status == "dense" for target in self.targets)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["targets"] = [{**target, "shape": list(target["shape"])} for target in data["targets"]]
        return data

    def __str__(self) -> str:
        rows = [("weight", "shape", "base", "rank", "nnz", "status", "reason")]
        for t in self.targets:
            rows.append((t.name, "x".join(map(str, t.shape)), t.base, str(t.rank), str(t.nnz), t.status, t.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[6]]).rstrip() for row in rows]
        unused = len(self.targets) - self.fused - self.dense
        lines.append(
            f"{len(self.targets)} targets: {self.fused} fused, {self.dense} dense, {unused} unused; "
            f"{self.graph_breaks} graph breaks, {self.recompiles} recompiles"
        )
        return "\n".join(lines)


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> RewriteReport:
    """Capture `model(*args, **kwargs)` as `torch.compile` would, forward and backward, and account for every target.

    No code is generated and nothing of the model changes: buffers and random state are put back, and the graphs do not
    count as compilations of a model that is compiled already.

    Raises:
        RosaError: the model is not transformed.
    """
    from rosa_fx.kernels.inductor import capture_backend
    from rosa_fx.passes.joint import rewrite

    state = state_of(model)
    model = unwrap(model)
    graphs: list[GraphReport] = []
    backend = capture_backend(lambda graph: graphs.append(rewrite(graph, strict=False)))
    compile_: Any = torch.compile  # its stubs do not know isolate_recompiles
    captured = compile_(model, backend=backend, isolate_recompiles=True)
    with _unchanged(model), _counted() as counted, torch.enable_grad():
        captured(*args, **kwargs)
    counts: dict[str, int] = {}
    for graph in graphs:
        for key, number in graph.counts.items():
            counts[key] = counts.get(key, 0) + number
    targets = tuple(_target(name, state, graphs) for name in state.weights)
    return RewriteReport(targets, counted["graph_breaks"], counted["recompiles"], counts)


def _target(name: str, state: RosaState, graphs: list[GraphReport]) -> TargetReport:
    weight, target = state.weights[name], state.targets[name]
    aliases = {name, *weight.paths}  # a shared module or weight is met under several paths
    uses = [use for graph in graphs for key, use in graph.uses.items() if _means(key, aliases, state)]
    reasons = list(dict.fromkeys(reason for use in uses for reason in use.dense))
    products, gradients = sum(use.products for use in uses), sum(use.gradients for use in uses)
    if not uses:
        status, reasons = "unused", ["not read in this call"]
    elif reasons:
        status = "dense"
    else:
        status = "fused"
    notes = [*reasons, *([target.note] if target.note else [])]
    return TargetReport(
        name=name,
        shape=weight.shape,
        base=target.base,
        rank=0 if weight.low_rank is None else weight.low_rank.rank,
        nnz=0 if weight.sparse is None else weight.sparse.values.numel(),
        status=status,
        reason="; ".join(notes),
        products=products,
        gradients=gradients,
    )


def _means(key: str, aliases: set[str], state: RosaState) -> bool:
    """Whether a graph's name for a weight means the one with these aliases.

    After a graph break a part of the model is captured on its own and names its weights from there; alike parts share a graph.
    """
    if key in aliases:
        return True
    known = key in state.weights or any(key in weight.paths for weight in state.weights.values())
    return not known and any(alias.endswith("." + key) for alias in aliases)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back buffers (running statistics) and the random state of the CPU and the current device."""
    saved: list[tuple[Tensor, Tensor]] = [
        (buffer, buffer.clone()) for name, buffer in model.named_buffers() if ".parametrizations." not in f".{name}"
    ]
    devices = list({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield
    with torch.no_grad():
        for buffer, value in saved:
            buffer.copy_(value)


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    from torch._dynamo.utils import counters, get_compilation_metrics

    counted = {"graph_breaks": 0, "recompiles": 0}
    # Dynamo keeps the newest 64 compilations only: tell the new ones by identity, not by position.
    breaks, before = sum(counters["graph_break"].values()), get_compilation_metrics()
    yield counted
    counted["graph_breaks"] = sum(counters["graph_break"].values()) - breaks
    known = {id(metrics) for metrics in before}
    new = [metrics for metrics in get_compilation_metrics() if id(metrics) not in known]
    counted["recompiles"] = sum(metrics.recompile_reason is not None for metrics in new)
