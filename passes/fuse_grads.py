"""Rewrite 2: gradients of the delta from the factors of the weight gradient, which is then never computed.

    materialize_backward(mm(dyᵀ, x))        -> linear_grads(dy, x)
    materialize_backward(mm(...) + mm(...)) -> sum of linear_grads       (several uses of one weight)
    materialize_backward(mm(...) + rest)    -> linear_grads + materialize_backward(rest)

A layout whose terms do not add up over uses (mask selection) is fused for a single product only: its several backward
nodes are first joined into one, because a mask belongs to the whole gradient of a weight.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from rosa_fx.kernels.layout import Layout
from rosa_fx.passes.fuse_linear import emit, emit_transpose
from rosa_fx.passes.views import SAME_ELEMENTS, is_getitem, is_view, matrix_orientation, trace, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx


@dataclass(frozen=True)
class Factors:
    """dW = scale · left @ right, left [N, M] and right [M, K], or both with a batch dimension that is summed over."""

    left: Node
    right: Node
    scale: float = 1.0


@dataclass(frozen=True)
class Summand:
    """scale · node, one summand of a weight gradient."""

    node: Node
    scale: float = 1.0


def fuse_gradients(graph: Graph, node: Node) -> tuple[int, str] | None:
    """Rewrite one `materialize_backward` node: (fused products, reason if something stayed dense)."""
    dW, delta, key = node.args
    assert isinstance(dW, Node)
    assert isinstance(delta, (list, tuple))
    layout = Layout.parse(str(key))
    fused: list[Factors] = []
    rest: list[Summand] = []
    for summand in _summands(dW):
        factors = _factors(summand, layout.shape)
        if factors is None:
            rest.append(summand)
        else:
            fused.append(factors)
    if not fused:
        return 0, _describe(rest[0].node)
    if not layout.additive and (rest or len(fused) > 1):
        return 0, f"mask selection over {len(fused) + len(rest)} uses of one weight takes the dense gradient"
    results: list[Node] = []
    with graph.inserting_before(node):
        for factors in fused:
            dy, x = emit_transpose(graph, factors.left), factors.right
            if factors.scale != 1:
                dy = emit(graph, aten.mul.Tensor, dy, factors.scale)
            results.append(emit(graph, ops.linear_grads.default, dy, x, delta, key))
        if rest:
            total = _scaled(graph, rest[0])
            for other in rest[1:]:
                total = emit(graph, aten.add.Tensor, total, _scaled(graph, other))
            results.append(emit(graph, ops.materialize_backward.default, total, delta, key))
    _replace_items(graph, node, results)
    return len(fused), _describe(rest[0].node) if rest else ""


def _scaled(graph: Graph, summand: Summand) -> Node:
    return summand.node if summand.scale == 1 else emit(graph, aten.mul.Tensor, summand.node, summand.scale)


def _summands(node: Node, scale: float = 1.0) -> list[Summand]:
    """The summands of a weight gradient, looking through additions and constant factors, under casts and copies."""
    inner = node
    while inner.target in SAME_ELEMENTS and isinstance(inner.args[0], Node):
        inner = inner.args[0]
    if inner.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(inner.args[0], Node):
        factor = inner.args[1]
        if isinstance(factor, (int, float)):
            return _summands(inner.args[0], scale * factor)
    if inner.target is aten.add.Tensor and not inner.kwargs:
        left, right = inner.args[:2]
        if isinstance(left, Node) and isinstance(right, Node):
            sizes = {tuple(v.shape) if (v := value(n)) is not None else None for n in (left, right, inner)}
            if len(sizes) == 1:
                return _summands(left, scale) + _summands(right, scale)
    return [Summand(node, scale)]


def _factors(summand: Summand, shape: tuple[int, int]) -> Factors | None:
    """The factors of a summand that is a matrix product, seen through views, or a batched one summed over its batch.

    A transposed product is turned round, dW = (a b)ᵀ = bᵀ aᵀ, by views.
    """
    traced = trace(summand.node)
    if traced is None or tuple(_without_ones(traced.shadow.shape)) != tuple(shape):
        return None
    product = traced.source
    if product.target is aten.sum.dim_IntList and product.args[1] == [0] and isinstance(product.args[0], Node):
        summed = value(product)
        product = product.args[0]
        if product.target is not aten.bmm.default or summed is None:
            return None
    elif product.target is aten.bmm.default:
        batched = value(product)
        if batched is None or batched.shape[0] != 1:
            return None
    elif product.target is not aten.mm.default:
        return None
    left, right = product.args
    val = value(product)
    if val is None or not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    orientation = matrix_orientation(traced, (val.shape[-2], val.shape[-1]))
    if orientation is None:
        return None
    if orientation:
        with product.graph.inserting_before(product):
            left, right = emit_transpose(product.graph, right), emit_transpose(product.graph, left)
    return Factors(left, right, summand.scale)


def _without_ones(sizes: Sequence[int]) -> Sequence[int]:
    """Sizes without leading dimensions of 1."""
    return sizes[-2:] if len(sizes) >= 2 and all(size == 1 for size in sizes[:-2]) else sizes


def _replace_items(graph: Graph, node: Node, results: list[Node]) -> None:
    for item in list(node.users):
        assert is_getitem(item)
        with graph.inserting_before(item):
            total = emit(graph, operator.getitem, results[0], item.args[1])
            for other in results[1:]:
                total = emit(graph, aten.add.Tensor, total, emit(graph, operator.getitem, other, item.args[1]))
        item.replace_all_uses_with(total)
        graph.erase_node(item)
    graph.erase_node(node)


def join_backwards(graph: Graph) -> None:
    """One `materialize_backward` per weight where gradients of its uses must not be computed apart."""
    groups: dict[tuple[object, ...], list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=ops.materialize_backward.default):
        _, delta, key = node.args
        if not Layout.parse(str(key)).additive:
            groups[(tuple(delta), key)].append(node)
    for nodes in groups.values():
        if len(nodes) < 2:
            continue
        last = nodes[-1]
        with graph.inserting_before(last):
            total = nodes[0].args[0]
            for node in nodes[1:]:
                total = emit(graph, aten.add.Tensor, total, node.args[0])
            joined = emit(graph, ops.materialize_backward.default, total, *last.args[1:])
        joined.meta.update({k: v for k, v in last.meta.items() if k != "val"})
        for node in nodes:
            for item in list(node.users):
                with graph.inserting_before(item):
                    if node is last:
                        new = emit(graph, operator.getitem, joined, item.args[1])
                    else:
                        new = _zeros(graph, _like(delta=node.args[1], key=node.args[2], item=item))
                item.replace_all_uses_with(new)
                graph.erase_node(item)
            graph.erase_node(node)


def _zeros(graph: Graph, like: Node) -> Node:
    """Zeros as a decomposed graph spells them: Inductor has no lowering of `zeros_like`."""
    val = value(like)
    assert val is not None
    new = graph.call_function(aten.full.default, (list(val.shape), 0), {"dtype": val.dtype, "device": val.device})
    new.meta["val"] = aten.full.default(*new.args, **new.kwargs)
    return new


def _like(delta: object, key: object, item: Node) -> Node:
    position = Layout.parse(str(key)).trainable[item.args[1]]  # type: ignore[index]
    return delta[position]  # type: ignore[index]


def _describe(node: Node) -> str:
    while node.op == "call_function" and (is_view(node) or node.target in SAME_ELEMENTS) and isinstance(node.args[0], Node):
        node = node.args[0]
    val = value(node)
    shape = "" if val is None else f" {list(val.shape)}"
    return f"weight gradient comes from {node.target}{shape}"
