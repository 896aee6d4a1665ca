"""Rewrite 4: on the CPU, gradients of the delta come out of the pass over dy that grad-input makes in low precision anyway.

    linear(x) ... linear_t(dy), linear_grads(dy, x)  -> product_with_left(x), product_with_grads(dy, x, left)
    linear_t(dy), linear_grads(dy, x) of S alone     -> product_with_grads(dy, x)

Weights stored [in, out] have `linear` and `linear_t`, and the factors of `linear_grads`, exchanged. Conditions: the second
product is one of the backward pass, which is to say that it depends on a gradient that the graph is given, and has no bias; all
have the same rows, the same terms and the whole weight, and more rows than are multiplied without a tile. In float32 S is part
of the decoded weight, and the pass over dy is made for small weights only.

The first needs a low-rank term of small rank, of which all gradients are asked for, and a product of the forward pass that is
not computed again in the backward pass: for a thin product alone that would be too much. It goes before thin products are
shared. The second goes after that: what thin products take of `linear_grads` is gone by then.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

import rosa_fx.kernels.backward_ops  # noqa: F401  (registers the operators)
from rosa_fx.kernels import composition
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.low_rank import LowRank
from rosa_fx.kernels.terms.sparse import Sparse
from rosa_fx.passes.fuse_linear import emit
from rosa_fx.passes.order import hoist
from rosa_fx.passes.rows import row_count, rows_identity
from rosa_fx.passes.views import is_getitem, value

ops = torch.ops.rosa_fx

Delta = tuple[Node, ...]
"""The tensors of a weight's terms, by which a layer is known in a graph."""


def join_all_gradients(graph: Graph) -> list[Delta]:
    """The first rewrite, in place; the delta of each layer that it joined."""
    forward: dict[Any, Node] = {}
    backward: dict[Any, Node] = {}
    for transposed, node, behind in _products(graph):
        delta, rank = _terms(node)
        x: Any = node.args[0]
        shape = Layout.parse(str(node.args[-1])).shape
        if delta is None or not composition.joins_all(value(x), row_count(x), rank, shape):  # type: ignore[arg-type]
            continue
        if behind and node.args[1] is None:
            backward[transposed, rows_identity(node.args[0]), delta] = node
        elif not behind and "recompute" not in node.meta:
            forward[transposed, rows_identity(node.args[0]), delta] = node
    found: list[tuple[Delta, Node, Node, Node, bool]] = []
    for node in graph.find_nodes(op="call_function", target=ops.linear_grads.default) if forward and backward else ():
        delta, _ = _terms(node)
        wanted = {item.args[1] for item in node.users if item.users}
        if delta is None or len(wanted) < len(Layout.parse(str(node.args[-1])).trainable):
            continue
        dy, x = map(rows_identity, node.args[:2])
        for transposed, first, second in ((True, x, dy), (False, dy, x)):
            keys = (not transposed, first, delta), (transposed, second, delta)
            if keys[0] in forward and keys[1] in backward:
                found.append((delta, forward.pop(keys[0]), backward.pop(keys[1]), node, transposed))
                break
    # Only now: identities are told by nodes, which go.
    return [delta for delta, first, second, grads, transposed in found if _join_all(graph, first, second, grads, transposed)]


def join_gradients(graph: Graph) -> list[Delta]:
    """The second rewrite, in place; the delta of each layer that it joined."""
    products: dict[Any, Node] = {}
    for transposed, node, behind in _products(graph):
        delta, key = node.args[3:]
        tensors = _sparse(delta, str(key))
        x: Any = node.args[0]
        if behind and tensors and node.args[1] is None and composition.joins_values(value(x), row_count(x)):  # type: ignore[arg-type]
            products[transposed, rows_identity(x), tensors] = node
    pairs: list[tuple[Node, Node, bool]] = []
    for node in graph.find_nodes(op="call_function", target=ops.linear_grads.default) if products else ():
        dy, x, delta, key = node.args
        tensors = _sparse(delta, str(key))
        if tensors is None or len(Layout.parse(str(key)).terms) > 1:
            continue
        for transposed, source in ((True, dy), (False, x)):
            product = products.pop((transposed, rows_identity(source), tensors), None)
            if product is not None:
                pairs.append((product, node, transposed))
                break
    deltas: list[Delta] = [tuple(product.args[3]) for product, _, _ in pairs]  # type: ignore[arg-type]  # products go
    return [delta for delta, (product, node, transposed) in zip(deltas, pairs) if _join(graph, product, node, None, transposed)]


def _products(graph: Graph) -> Iterator[tuple[bool, Node, bool]]:
    """(whether it is `linear_t`, the product, whether it depends on an upstream gradient).

    AOTAutograd calls upstream gradients `tangents`, as its partitioner does.
    """
    behind: set[Node] = set()
    for node in list(graph.nodes):
        if (node.op == "placeholder" and "tangents" in str(node.target)) or not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
        if node.target in (ops.linear.default, ops.linear_t.default):
            yield node.target is ops.linear_t.default, node, node in behind


def _terms(node: Node) -> tuple[tuple[Node, ...] | None, int]:
    """The tensors of a whole weight with one low-rank term, at most one sparse one, and nothing else; and the rank."""
    delta: Any = node.args[-2]
    layout = Layout.parse(str(node.args[-1]))
    kinds = sorted(item.kind for item in layout.terms)
    if kinds not in ([LowRank.kind], [LowRank.kind, Sparse.kind]) or layout.region or layout.stack > 1:
        return None, 0
    ((A, *_),) = (own for item, own in layout.split(delta) if type(item) is LowRank)
    rank = int(value(A).shape[0])  # type: ignore[union-attr]
    return (tuple(delta), rank) if rank else (None, 0)


def _sparse(delta: Any, key: str) -> tuple[Node, ...] | None:
    """The tensors of the sparse term of a whole weight, if it has exactly one."""
    layout = Layout.parse(key)
    found = [tensors for item, tensors in layout.split(delta) if type(item) is Sparse]
    return tuple(found[0]) if len(found) == 1 and layout.region is None and layout.stack == 1 else None  # type: ignore[arg-type]


def _join_all(graph: Graph, first: Node, second: Node, grads: Node, transposed: bool) -> bool:
    with graph.inserting_before(first):
        node = emit(graph, ops.product_with_left.default, *first.args, not transposed)
        out, left = (_item(graph, node, index) for index in range(2))
    if not _join(graph, second, grads, left, transposed):
        return False
    _take_meta(node, first)
    first.replace_all_uses_with(out)
    graph.erase_node(first)
    return True


def _join(graph: Graph, product: Node, grads: Node, kept: Node | None, transposed: bool) -> bool:
    x: Any = product.args[0]
    other: Any = grads.args[1 if transposed else 0]
    if value(other).dtype != value(x).dtype or not hoist([other], product):  # type: ignore[union-attr]
        return False
    with graph.inserting_before(product):
        node = emit(graph, ops.product_with_grads.default, x, other, kept, *product.args[2:], transposed)
        _take_meta(node, product)
        out = _item(graph, node, 0)
        gradients = {item: _item(graph, node, int(item.args[1]) + 1) for item in grads.users if is_getitem(item)}  # type: ignore[arg-type]
    product.replace_all_uses_with(out)
    graph.erase_node(product)
    for item, gradient in gradients.items():
        item.replace_all_uses_with(gradient)
        graph.erase_node(item)
    graph.erase_node(grads)
    return True


def _item(graph: Graph, node: Node, index: int) -> Node:
    return emit(graph, operator.getitem, node, index)


def _take_meta(node: Node, old: Node) -> None:
    node.meta.update({k: v for k, v in old.meta.items() if k not in ("val", "tensor_meta")})
