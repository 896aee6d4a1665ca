"""The graph pass: every pair (materialised weight, linear consumer) in Inductor's joint graph becomes a fused operator.

The joint graph is ATen after autograd: every spelling of a linear is `mm`, `addmm`, `bmm` or `baddbmm` plus views, and
the backward pass is plain algebra. Order: join what must be seen whole, fuse products (y and dx), fuse gradients,
account for what is left, share what layers with one input have in common. What is left stays right: the dense weight is computed for it, and the report says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from rosa_fx.errors import RosaError
from rosa_fx.kernels.layout import Layout
from rosa_fx.passes.fuse_experts import (
    fuse_batched_product,
    fuse_grouped_backward,
    fuse_grouped_product,
    grouped_backward_targets,
    grouped_targets,
)
from rosa_fx.passes.fuse_grads import fuse_gradients, join_backwards
from rosa_fx.passes.fuse_linear import PRODUCTS, fuse_product
from rosa_fx.passes.fuse_vector import fuse_vector_product
from rosa_fx.passes.report import GraphReport, source_line, weight_name
from rosa_fx.passes.shared_input import share_inputs
from rosa_fx.passes.views import SAME_ELEMENTS, is_view, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx


def rewrite(graph: Graph, *, strict: bool = True) -> GraphReport:
    """Rewrite `graph` in place.

    Raises RosaError where a weight of a strict layout has a use that cannot be fused, unless `strict` is off.
    """
    report = GraphReport()
    weights = graph.find_nodes(op="call_function", target=ops.materialize.default)
    if not weights:
        return report
    _merge_equal(weights)
    weights = [node for node in weights if not node._erased]
    join_backwards(graph)
    names = {node: weight_name(node) for node in weights}
    by_delta = {_identity(node): names[node] for node in weights}
    for node in weights:
        report.use(names[node], str(node.args[2]))
    for target, fuse in _rewrites():
        for node in graph.find_nodes(op="call_function", target=target):
            found = fuse(graph, node)
            if found is not None:
                weight, operator = found
                report.counts[operator] += 1
                report.use(names[weight], str(weight.args[2])).products += 1
    for node in graph.find_nodes(op="call_function", target=ops.materialize_backward.default):
        name = by_delta.get((tuple(node.args[1]), node.args[2])) or weight_name(node)
        use = report.use(name, str(node.args[2]))
        result = fuse_gradients(graph, node)
        if result is not None:
            count, reason = result
            report.counts["linear_grads"] += count
            use.gradients += count
            if reason:
                use.dense.append(reason)
    graph.eliminate_dead_code()
    for node in weights:
        if not node._erased and node.users:
            report.counts["dense"] += 1
            use = report.use(names[node], str(node.args[2]))
            use.dense += [_reason(consumer) for consumer in _consumers(node)]
    if strict:
        _check_strict(report)
    _share(graph, report, {delta: name for (delta, _), name in by_delta.items()})
    graph.lint()
    return report


def _share(graph: Graph, report: GraphReport, names: dict[Any, str]) -> None:
    shared = share_inputs(graph)
    report.shared = {"stacked": shared.stacked, "reused": shared.reused, "gradients": shared.gradients}
    for delta in shared.deltas:
        if delta in names:
            report.uses[names[delta]].shared += 1
    graph.eliminate_dead_code()


def _rewrites() -> Iterator[tuple[Any, Callable[[Graph, Node], tuple[Node, str] | None]]]:
    """(target, what may rewrite a node with that target), in order."""
    yield from ((target, fuse_product) for target in PRODUCTS)
    yield aten.sum.dim_IntList, fuse_vector_product
    yield from ((target, fuse_batched_product) for target in (aten.bmm.default, aten.baddbmm.default))
    yield from ((target, fuse_grouped_product) for target in grouped_targets())
    yield from ((target, fuse_grouped_backward) for target in grouped_backward_targets())


def _identity(node: Node) -> tuple[Any, Any]:
    return tuple(node.args[1]), node.args[2]  # type: ignore[arg-type]


def _merge_equal(weights: list[Node]) -> None:
    """A weight that is read several times in one graph is one node."""
    seen: dict[tuple[Any, ...], Node] = {}
    for node in weights:
        base, delta, key = node.args
        identity = (tuple(base), tuple(delta), key)  # type: ignore[arg-type]
        first = seen.setdefault(identity, node)
        if first is not node:
            node.replace_all_uses_with(first)
            node.graph.erase_node(node)


def _consumers(node: Node) -> list[Node]:
    found: list[Node] = []
    for user in node.users:
        if user.op == "call_function" and (is_view(user) or user.target in SAME_ELEMENTS):
            found += _consumers(user)
        else:
            found.append(user)
    return found


def _reason(node: Node) -> str:
    val = value(node)
    shape = "" if val is None else f" -> {list(val.shape)}"
    if node.op == "output":
        return "the weight itself leaves the graph"
    line = source_line(node)
    return f"read by {node.target}{shape}, which is not a product that can be fused" + (f" ({line})" if line else "")


def _check_strict(report: GraphReport) -> None:
    for use in report.uses.values():
        if use.dense and Layout.parse(use.layout).strict:
            raise RosaError(
                f"{use.name} {list(Layout.parse(use.layout).shape)} cannot be fused: {use.dense[0]}. "
                "Exclude this weight, or transform with strict=False"
            )
