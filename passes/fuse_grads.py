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

import torch
from torch.fx import Graph, Node

from rosa_fx.kernels.layout import Layout
from rosa_fx.passes.fuse_experts import StackProduct
from rosa_fx.passes.fuse_linear import emit
from rosa_fx.passes.views import SAME_ELEMENTS, is_getitem, is_view, value
from rosa_fx.passes.weight_gradient import Product, Summand, summands, unviewed

aten = torch.ops.aten
ops = torch.ops.rosa_fx


def fuse_gradients(graph: Graph, node: Node) -> tuple[int, tuple[str, Node] | None]:
    """Rewrite one `materialize_backward` node: (fused products, reason and place if something stayed dense)."""
    dW, delta, key = node.args
    assert isinstance(dW, Node)
    layout = Layout.parse(str(key))
    fused: list[Product | StackProduct] = []
    rest: list[Summand] = []
    for summand in summands(unviewed(dW)):
        products = summand.products(layout)
        if products is None:
            rest.append(summand)
        else:
            fused += products
    if not fused:
        return 0, _describe(rest[0].node)
    if not layout.additive and (rest or len(fused) > 1):
        return 0, (f"mask selection over {len(fused) + len(rest)} uses of one weight takes the dense gradient", node)
    results: list[Node] = []
    with graph.inserting_before(node):
        for product in fused:
            results.append(product.gradients(graph, delta, layout))
        if rest:
            total = rest[0].emit(graph, layout.shape)
            for other in rest[1:]:
                total = emit(graph, aten.add.Tensor, total, other.emit(graph, layout.shape))
            results.append(emit(graph, ops.materialize_backward.default, total, delta, key))
    _replace_items(graph, node, results)
    return len(fused), _describe(rest[0].node) if rest else None


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


def _describe(node: Node) -> tuple[str, Node]:
    while node.op == "call_function" and (is_view(node) or node.target in SAME_ELEMENTS) and isinstance(node.args[0], Node):
        node = node.args[0]
    val = value(node)
    shape = "" if val is None else f" {list(val.shape)}"
    return f"weight gradient comes from {node.target}{shape}", node
