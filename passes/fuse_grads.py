"""Rewrite 2: gradients of the delta from the factors of the weight gradient, which is then never computed.

    materialize_backward(mm(dyᵀ, x))        -> linear_grads(dy, x)
    materialize_backward(mm(...) + mm(...)) -> sum of linear_grads       (several uses of one weight)
    materialize_backward(mm(...) + rest)    -> linear_grads + materialize_backward(rest)

A layout whose terms do not add up over uses (mask selection) is fused for a single product only: then its several backward
nodes are first joined into one, because a mask belongs to the whole gradient of a weight.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.fx import Graph, Node

from rosa_fx.kernels.layout import Layout
from rosa_fx.passes.fuse_linear import emit, emit_transpose
from rosa_fx.passes.views import SAME_ELEMENTS, _is_view, is_getitem, matrix_orientation, trace, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx

Factors = tuple[Node, Node]


def fuse_gradients(graph: Graph, node: Node) -> tuple[int, str] | None:
    """Rewrite one `materialize_backward` node: (fused products, reason if something stayed dense)."""
    dW, delta, key = node.args
    assert isinstance(dW, Node) and isinstance(delta, (list, tuple))
    layout = Layout.parse(str(key))
    fused: list[Factors] = []
    rest: list[Node] = []
    for summand in _summands(dW):
        factors = _factors(summand, layout.shape)
        if factors is None:
            rest.append(summand)
        else:
            fused.append(factors)
    if not fused:
        return 0, _describe(rest[0])
    if not layout.additive and (rest or len(fused) > 1):
        return 0, f"mask selection over {len(fused) + len(rest)} uses of one weight takes the dense gradient"
    results: list[Node] = []
    with graph.inserting_before(node):
        for left, right in fused:
            dy, x = _rows(graph, left, swap=True), _rows(graph, right, swap=False)
            results.append(emit(graph, ops.linear_grads.default, dy, x, delta, key))
        if rest:
            total = rest[0]
            for other in rest[1:]:
                total = emit(graph, aten.add.Tensor, total, other)
            results.append(emit(graph, ops.materialize_backward.default, total, delta, key))
    _replace_items(graph, node, results)
    return len(fused), _describe(rest[0]) if rest else ""


def _summands(node: Node) -> list[Node]:
    """The summands of a weight gradient, looking through additions under casts that do not move elements."""
    inner = node
    while inner.target in SAME_ELEMENTS and isinstance(inner.args[0], Node):
        inner = inner.args[0]
    if inner.target is aten.add.Tensor and not inner.kwargs:
        left, right = inner.args[:2]
        if isinstance(left, Node) and isinstance(right, Node):
            sizes = {tuple(v.shape) if (v := value(n)) is not None else None for n in (left, right, inner)}
            if len(sizes) == 1:
                return _summands(left) + _summands(right)
    return [node]


def _factors(node: Node, shape: tuple[int, int]) -> Factors | None:
    """(left [N, M], right [M, K]) nodes with node = left @ right, each 2-D or with one batch dimension of size 1.

    A transposed product is turned round: dW = (a b)ᵀ = bᵀ aᵀ, which the caller's `_rows` undoes without a copy.
    """
    traced = trace(node)
    if traced is None or traced.source.target not in (aten.mm.default, aten.bmm.default):
        return None
    product = traced.source
    val = value(product)
    left, right = product.args
    if val is None or not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    if val.dim() == 3 and val.shape[0] != 1:
        return None
    rows, columns = val.shape[-2], val.shape[-1]
    shadow_shape = traced.shadow.shape
    if tuple(shadow_shape[-2:]) != tuple(shape) or traced.shadow.numel() != shape[0] * shape[1]:
        return None
    orientation = matrix_orientation(traced, (rows, columns))
    if orientation is False:
        return left, right
    if orientation is True:
        graph = product.graph
        with graph.inserting_before(product):
            return emit_transpose(graph, right), emit_transpose(graph, left)
    return None


def _rows(graph: Graph, node: Node, *, swap: bool) -> Node:
    """A factor as [M, ·]: batch dimension of 1 dropped, dyᵀ turned back to dy."""
    val = value(node)
    if val is not None and val.dim() == 3:
        node = emit(graph, aten.squeeze.dim, node, 0)
    return emit_transpose(graph, node) if swap else node


def _replace_items(graph: Graph, node: Node, results: list[Node]) -> None:
    for item in list(node.users):
        assert is_getitem(item)
        with graph.inserting_before(item):
            total = emit(graph, item.target, results[0], item.args[1])
            for other in results[1:]:
                total = emit(graph, aten.add.Tensor, total, emit(graph, item.target, other, item.args[1]))
        item.replace_all_uses_with(total)
        graph.erase_node(item)
    graph.erase_node(node)


def join_backwards(graph: Graph) -> None:
    """One `materialize_backward` per weight where gradients of its uses must not be computed apart."""
    groups: dict[tuple[object, ...], list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=ops.materialize_backward.default):
        _, delta, key = node.args
        if not Layout.parse(str(key)).additive:
            groups[(tuple(delta), key)].append(node)  # type: ignore[arg-type]
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
                        new = emit(graph, item.target, joined, item.args[1])
                    else:
                        new = emit(
                            graph, aten.zeros_like.default, _like(delta=node.args[1], key=node.args[2], item=item)
                        )
                item.replace_all_uses_with(new)
                graph.erase_node(item)
            graph.erase_node(node)


def _like(delta: object, key: object, item: Node) -> Node:
    position = Layout.parse(str(key)).trainable[item.args[1]]  # type: ignore[index]
    return delta[position]  # type: ignore[index]


def _describe(node: Node) -> str:
    while (
        node.op == "call_function"
        and (_is_view(node) or node.target in SAME_ELEMENTS)
        and isinstance(node.args[0], Node)
    ):
        node = node.args[0]
    val = value(node)
    shape = "" if val is None else f" {list(val.shape)}"
    return f"weight gradient comes from {node.target}{shape}"
