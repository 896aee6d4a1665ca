"""The graph pass: every pair (materialised weight, linear consumer) in Inductor's joint graph becomes a fused operator.

The joint graph is ATen after autograd: every spelling of a linear is `mm`, `addmm`, `bmm` or `baddbmm` plus views, and
the backward pass is plain algebra. Order: join what must be seen whole, fuse products (y and dx), fuse gradients,
account for what is left. What is left stays right: the dense weight is computed for it, and the report says why. Last, products
that share the ends of groups read them once, layers with one input share what they have in common, and gradients join products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from rosa_fx.errors import RosaError
from rosa_fx.kernels.layout import Layout
from rosa_fx.passes.fuse_conv import fuse_convolution, fuse_convolution_backward
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
from rosa_fx.passes.group_ends import read_ends_once
from rosa_fx.passes.join_gradients import join_all_gradients, join_gradients
from rosa_fx.passes.report import GraphReport, Use, weight_name
from rosa_fx.passes.shared_input import share_inputs
from rosa_fx.passes.split_cat import split_concatenations
from rosa_fx.passes.straighten import straighten_product
from rosa_fx.passes.views import SAME_ELEMENTS, is_view, value
from rosa_fx.passes.work import count_work

aten = torch.ops.aten
ops = torch.ops.rosa_fx


def rewrite(graph: Graph, *, strict: bool = True, work: bool = False) -> GraphReport:
    """Rewrite `graph` in place. With `work` the report also says how much arithmetic is left, see `Use.work`.

    Raises RosaError where a weight of a strict layout has a use that cannot be fused, unless `strict` is off.
    """
    report = GraphReport()
    weights = graph.find_nodes(op="call_function", target=ops.materialize.default)
    if not weights and not work:
        return report
    _merge_equal(weights)
    weights = [node for node in weights if not node._erased]
    join_backwards(graph)
    split_concatenations(graph)
    names = {node: weight_name(node) for node in weights}
    by_delta = {_identity(node): names[node] for node in weights}
    for node in weights:
        report.use(names[node], str(node.args[2]))

    def use_of(node: Node) -> Use:
        """The use that a fused node, or one with a dense weight or gradient, belongs to."""
        delta, layout = node.args[-2:]
        key = replace(Layout.parse(str(layout)), region=None).key
        return report.use(by_delta.get((tuple(delta), key)) or weight_name(node), key)  # type: ignore[arg-type]

    for target in (aten.mm.default, aten.bmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            straighten_product(graph, node)
    for target, fuse in _rewrites():
        for node in graph.find_nodes(op="call_function", target=target):
            found = fuse(graph, node)
            if found is not None:
                weight, operator = found
                report.counts[operator] += 1
                report.use(names[weight], str(weight.args[2])).products += 1
    for node in graph.find_nodes(op="call_function", target=ops.materialize_backward.default):
        use = use_of(node)
        count, reason = fuse_gradients(graph, node)
        report.counts["linear_grads"] += count
        use.gradients += count
        if reason is not None:
            use.leave(*reason)
    graph.eliminate_dead_code()
    for node in weights:
        if not node._erased and node.users:
            report.counts["dense"] += 1
            use = report.use(names[node], str(node.args[2]))
            for consumer, last in _consumers(node):
                use.leave(_reason(consumer), last)
    if work:
        count_work(graph, report, use_of)
    if strict:
        _check_strict(report)
    read_ends_once(graph)
    _share(graph, report, {delta: name for (delta, _), name in by_delta.items()})
    graph.lint()
    return report


def _share(graph: Graph, report: GraphReport, names: dict[Any, str]) -> None:
    joined = join_all_gradients(graph)
    shared = share_inputs(graph)
    report.shared = {"stacked": shared.stacked, "reused": shared.reused, "gradients": shared.gradients}
    for delta in shared.deltas:
        if delta in names:
            report.uses[names[delta]].shared += 1
    graph.eliminate_dead_code()
    joined += join_gradients(graph)
    report.joined = len(joined)
    for delta in joined:
        if delta in names:
            report.uses[names[delta]].joined += 1


def _rewrites() -> Iterator[tuple[Any, Callable[[Graph, Node], tuple[Node, str] | None]]]:
    """(target, what may rewrite a node with that target), in order."""
    yield from ((target, fuse_product) for target in PRODUCTS)
    yield aten.sum.dim_IntList, fuse_vector_product
    yield aten.convolution.default, fuse_convolution
    yield aten.convolution_backward.default, fuse_convolution_backward
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


def _consumers(node: Node) -> list[tuple[Node, Node]]:
    """What reads a weight through views and casts, and the node whose line in the source says so."""
    found: list[tuple[Node, Node]] = []
    for user in node.users:
        if user.op == "call_function" and (is_view(user) or user.target in SAME_ELEMENTS):
            found += _consumers(user)
        else:
            found.append((user, node if user.op == "output" else user))
    return found


def _reason(node: Node) -> str:
    val = value(node)
    shape = "" if val is None else f" -> {list(val.shape)}"
    if node.op == "output":
        return "the weight itself leaves the graph"
    return f"read by {node.target}{shape}, which is not a product that can be fused"


def _check_strict(report: GraphReport) -> None:
    for use in report.uses.values():
        if use.dense and Layout.parse(use.layout).strict:
            raise RosaError(
                f"{use.name} {list(Layout.parse(use.layout).shape)} cannot be fused: {use.dense[0]}. "
                "Exclude this weight, or transform with strict=False"
            )
