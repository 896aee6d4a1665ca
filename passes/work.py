"""How much arithmetic a rewritten graph does for each weight, from the shapes of its products.

A product of M rows with a weight [N, K] is 2·M·N·K FLOPs: forward, grad-input and weight gradient alike. What a delta adds
depends on its terms and is not counted here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node

import rosa_fx.kernels.grouped_ops  # noqa: F401  (registers the operators)
from rosa_fx.kernels.layout import Layout
from rosa_fx.passes.fuse_linear import PRODUCTS
from rosa_fx.passes.report import GraphReport, Other, Use, Work, module_path
from rosa_fx.passes.views import trace, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx

_FUSED = {ops.linear.default: "product", ops.linear_t.default: "product", ops.linear_grads.default: "gradient"}
# Every row of a grouped product meets one matrix of the stack.
_GROUPED = {
    ops.grouped_linear.default: "product",
    ops.grouped_linear_t.default: "product",
    ops.grouped_linear_grads.default: "gradient",
}
_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


def count_work(graph: Graph, report: GraphReport, use_of: Callable[[Node], Use]) -> None:
    """Fill in `Use.work` of every weight, and `report.others`: products with weights that are none of ours.

    `use_of` finds the use that a node with a layout (fused, materialise or its backward) belongs to.
    """
    dense: dict[Node, tuple[Use, str]] = {}
    for node in graph.find_nodes(op="call_function", target=ops.materialize.default):
        dense |= dict.fromkeys(_products_near(node, lambda n: n.users), (use_of(node), "dense product"))
    for node in graph.find_nodes(op="call_function", target=ops.materialize_backward.default):
        dense |= dict.fromkeys(_products_near(node, lambda n: n.all_input_nodes), (use_of(node), "dense gradient"))
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _FUSED:
            rows, columns = Layout.parse(str(node.args[-1])).out_shape
            use_of(node).work.append(Work(_FUSED[node.target], _rows(node.args[0]), rows, columns))
        elif node.target in _GROUPED:
            rows, columns = Layout.parse(str(node.args[-1])).each_shape
            use_of(node).work.append(Work(_GROUPED[node.target], _rows(node.args[0]), rows, columns))
        elif node in dense:
            use, kind = dense[node]
            rows, columns = Layout.parse(use.layout).shape
            # A product with a part of the weight, or of it with itself, counts as that many rows of the whole.
            use.work.append(Work(kind, -(-_flops(node) // (2 * rows * columns)), rows, columns))
        elif node.target in PRODUCTS or node.target in _CONVOLUTIONS:
            other = _other(node)
            if other is not None:
                report.others.append(other)


def _hint(size: Any) -> int:
    """A size as a number; for a dynamic one what it was at capture, without guarding on it."""
    return size if isinstance(size, int) else int(size.node.hint)


def _shape(node: object) -> list[int]:
    val = value(node)
    return [] if val is None else [_hint(size) for size in val.shape]


def _rows(node: object) -> int:
    return prod(_shape(node)[:-1])


def _flops(node: Node) -> int:
    """Of a product: 2 · outputs · length of the contraction. Of a convolution: each filter at every position."""
    if node.target in PRODUCTS:
        _, left, _ = PRODUCTS[node.target]
        return 2 * prod(_shape(node)) * _shape(node.args[left])[-1]
    if node.target is aten.convolution.default:
        (given, weight), transposed, out, times = node.args[:2], node.args[6], _shape(node), 1
    else:
        (_, given, weight), transposed, out = node.args[:3], node.args[7], _shape(node.args[0])
        times = sum(bool(wanted) for wanted in node.args[10][:2])  # type: ignore[index, union-attr]
    positions = _shape(given) if transposed else out
    return 2 * times * positions[0] * prod(positions[2:]) * prod(_shape(weight))


def _products_near(start: Node, neighbours: Callable[[Node], Any]) -> list[Node]:
    """Products reached from a dense weight or its gradient through tensors of the weight's size (clamped, cast, ...)."""
    size = prod(Layout.parse(str(start.args[2])).shape)
    found, seen, pending = [], {start}, deque(neighbours(start))
    while pending:
        node = pending.popleft()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in PRODUCTS or node.target in _CONVOLUTIONS:
            found.append(node)
        elif prod(_shape(node)) == size:
            pending += neighbours(node)
    return found


def _other(node: Node) -> Other | None:
    """A product one of whose factors is an input of the graph as it is, as a parameter is."""
    for operand in node.all_input_nodes[:3]:
        traced = trace(operand)
        if traced is None or traced.source.op != "placeholder" or "tangents" in traced.source.name:
            continue
        shape = _shape(traced.source)
        filters = node.target in _CONVOLUTIONS and operand is not node.args[1 if len(node.args) == 9 else 2]
        if len(shape) >= 2 and not filters:
            return Other(module_path(node), tuple(shape), _flops(node))
    return None
