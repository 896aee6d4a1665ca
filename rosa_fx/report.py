"""`explain`: what becomes of every target when the model is compiled, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rosa_fx.distributed.shard import refuse_sharded
from rosa_fx.estimate import flops, weight_bytes
from rosa_fx.passes.report import GraphReport
from rosa_fx.state import RosaState, state_of, unwrap
from rosa_fx.untouched import Untouched, untouched_weights


@dataclass(frozen=True)
class TargetReport:
    """One rewritten weight: `status` is "fused", "dense" (right, but the dense weight is computed) or "unused".

    `shape` is that of the parameter. For one with more than two dimensions `reason` says how it is read as matrices; `rank`
    is that of each matrix, `nnz` counts the entries of all.
    `source`: the line of the model where the first thing that stays dense happens, `file.py:12: text`. `bytes_before`,
    `bytes_after`: the dense weight; its base and adapter. `flops_before`, `flops_after`: forward and backward of the
    captured call, with the weight dense and trained whole, and as it is now (see :mod:`rosa_fx.estimate`).
    `products` and `gradients` were fused; `shared` of the products take a part that is computed once for several users, and
    `joined` of the gradients come out of a product of the backward pass.
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
    source: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    flops_before: int = 0
    flops_after: int = 0
    shared: int = 0
    joined: int = 0


@dataclass(frozen=True)
class RewriteReport:
    """Every target, and what capture met: `graph_breaks` and `recompiles`. Prints as a table; `to_dict` gives JSON values.

    `counts` are the rewrites over all graphs: products with the weight transposed (`linear`) and as stored (`linear_t`),
    gradients (`linear_grads`), and weights that are computed densely (`dense`). `untouched` are the model's other weights
    with two or more dimensions, with the reason. `saved_bytes` is what the captured graphs keep for the backward pass,
    parameters and buffers aside. `totals` sums the estimates over the targets.
    """

    targets: tuple[TargetReport, ...]
    graph_breaks: int
    recompiles: int
    counts: dict[str, int]
    untouched: tuple[Untouched, ...] = ()
    saved_bytes: int = 0

    @property
    def fused(self) -> int:
        return sum(target.status == "fused" for target in self.targets)

    @property
    def dense(self) -> int:
        return sum(target.status == "dense" for target in self.targets)

    @property
    def totals(self) -> dict[str, int]:
        """Sums over the targets: bytes_before, bytes_after, flops_before, flops_after."""
        names = ("bytes_before", "bytes_after", "flops_before", "flops_after")
        return {name: sum(getattr(target, name) for target in self.targets) for name in names}

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["targets"] = [{**target, "shape": list(target["shape"])} for target in data["targets"]]
        data["untouched"] = [{**each, "shape": list(each["shape"])} for each in data["untouched"]]
        return data | {"totals": self.totals}

    def picture(self, path: str | Path) -> Path:
        """Draw the model's linear weights into an .svg or .png file: coloured by what became of them, sized by FLOPs.

        Raises RosaError for another ending, or if matplotlib is not installed.
        """
        from rosa_fx.report_picture import draw

        return draw(self, Path(path))

    def __str__(self) -> str:
        rows = [("weight", "shape", "base", "rank", "nnz", "status", "reason")]
        for t in self.targets:
            rows.append((t.name, "x".join(map(str, t.shape)), t.base, str(t.rank), str(t.nnz), t.status, t.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[6]]).rstrip() for row in rows]
        return "\n".join([*lines, *self.summary()])

    def summary(self) -> list[str]:
        """What is said below the table: weights left alone by reason, bytes and FLOPs before and after, counts."""
        lines = []
        for reason in dict.fromkeys(each.reason for each in self.untouched):
            named = [f"{each.name} {list(each.shape)}" for each in self.untouched if each.reason == reason]
            more = f" and {len(named) - 4} more" if len(named) > 4 else ""
            lines.append(f"left alone ({reason}): {', '.join(named[:4])}{more}")
        total = self.totals
        if total["flops_before"]:
            size = f"{_bytes(total['bytes_before'])} -> {_bytes(total['bytes_after'])}"
            work = f"{scaled_flops(total['flops_before'])} -> {scaled_flops(total['flops_after'])}"
            lines.append(
                f"weights of the targets {size}; forward and backward {work} (estimated, before: trained densely); "
                f"saved for backward {_bytes(self.saved_bytes)}"
            )
        unused = len(self.targets) - self.fused - self.dense
        lines.append(
            f"{len(self.targets)} targets: {self.fused} fused, {self.dense} dense, {unused} unused; "
            f"{self.graph_breaks} graph breaks, {self.recompiles} recompiles"
        )
        return lines


def _bytes(count: int) -> str:
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def scaled_flops(count: int) -> str:
    """`1.23 GFLOP`."""
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _scaled(count: float, units: tuple[str, ...]) -> str:
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {units[power]}"


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
    refuse_sharded(model, "rosa_fx.explain")
    model = unwrap(model)
    graphs: list[GraphReport] = []
    backend = capture_backend(lambda graph: graphs.append(rewrite(graph, strict=False, work=True)))
    compile_: Any = torch.compile  # its stubs do not know isolate_recompiles
    captured = compile_(model, backend=backend, isolate_recompiles=True)
    with _unchanged(model), compilations() as counted, torch.enable_grad(), _saved(model) as saved:
        captured(*args, **kwargs)
    counts: dict[str, int] = {}
    for graph in graphs:
        for key, number in graph.counts.items():
            counts[key] = counts.get(key, 0) + number
    return RewriteReport(
        targets=target_reports(state, graphs, broken=counted["graph_breaks"] > 0),
        graph_breaks=counted["graph_breaks"],
        recompiles=counted["recompiles"],
        counts=counts,
        untouched=untouched_weights(model, state, graphs),
        saved_bytes=sum(saved.values()),
    )


def target_reports(state: RosaState, graphs: Sequence[GraphReport], *, broken: bool = False) -> tuple[TargetReport, ...]:
    """What became of every target in these graphs. The FLOPs are those of graphs that were rewritten with `work`.

    `broken`: capture broke off somewhere, so that parts of the model may have run without a graph.
    """
    unread = "in no captured graph: not read in this call, or read where a graph break left it to eager mode"
    return tuple(_target(name, state, graphs, unread if broken else "not read in this call") for name in state.weights)


def _target(name: str, state: RosaState, graphs: Sequence[GraphReport], unread: str) -> TargetReport:
    weight, target = state.weights[name], state.targets[name]
    aliases = {name, *weight.paths}  # a shared module or weight is met under several paths
    uses = [use for graph in graphs for key, use in graph.uses.items() if _means(key, aliases, state)]
    reasons = list(dict.fromkeys(reason for use in uses for reason in use.dense))
    products, gradients = sum(use.products for use in uses), sum(use.gradients for use in uses)
    if not uses:
        status, reasons = "unused", [unread]
    elif reasons:
        status = "dense"
    else:
        status = "fused"
    notes = [*reasons, *([target.note] if target.note else [])]
    dense, base, adapter = weight_bytes(weight)
    before, after = flops(weight, (item for use in uses for item in use.work))
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
        source=next((line for use in uses for line in use.sources), ""),
        bytes_before=dense,
        bytes_after=base + adapter,
        flops_before=before,
        flops_after=after,
        shared=sum(use.shared for use in uses),
        joined=sum(use.joined for use in uses),
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
def _saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage of what is saved for the backward pass, parameters and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage takes the place of another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@contextmanager
def compilations() -> Iterator[dict[str, int]]:
    """Graph breaks and recompilations of `torch.compile` inside the block; the numbers are there when it ends."""
    from torch._dynamo.utils import counters, get_compilation_metrics

    counted = {"graph_breaks": 0, "recompiles": 0}
    # Dynamo keeps the newest 64 compilations only: tell the new ones by identity, not by position.
    breaks, before = sum(counters["graph_break"].values()), get_compilation_metrics()
    yield counted
    counted["graph_breaks"] = sum(counters["graph_break"].values()) - breaks
    known = {id(metrics) for metrics in before}
    new = [metrics for metrics in get_compilation_metrics() if id(metrics) not in known]
    counted["recompiles"] = sum(metrics.recompile_reason is not None for metrics in new)
