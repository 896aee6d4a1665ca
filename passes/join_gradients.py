"""Rewrite 4: on the CPU in low precision, grad-input and the gradient of S's values come out of one pass over dy.

    linear_t(dy), linear_grads(dy, x) of S alone  -> product_with_grad(dy, x), transposed
    linear(dy), linear_grads(x, dy) of S alone    -> product_with_grad(dy, x)     (weights stored [in, out])

Conditions: a product of the backward pass, which is to say that it depends on a gradient that the graph is given; the same
rows, the same S, the whole weight, no bias; more rows than are multiplied without a tile. In float32 S is part of the decoded
weight, and no pass over dy is made for it. It goes last: what thin products take of `linear_grads` is gone by then.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

import rosa_fx.kernels.backward_ops  # noqa: F401  (registers the operator)
from rosa_fx.kernels import composition
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.sparse import Sparse
from rosa_fx.passes.fuse_linear import emit
from rosa_fx.passes.order import hoist
from rosa_fx.passes.rows import row_count, rows_identity
from rosa_fx.passes.views import is_getitem, value

ops = torch.ops.rosa_fx


def join_gradients(graph: Graph) -> int:
    """Rewrite `graph` in place; how many pairs were joined."""
    products: dict[Any, Node] = {}
    backward = _backward(graph)
    for target, transposed in ((ops.linear_t.default, True), (ops.linear.default, False)):
        for node in graph.find_nodes(op="call_function", target=target):
            x: Any = node.args[0]
            bias, _, delta, key = node.args[1:]
            tensors, val = _sparse(delta, str(key)), value(x)
            assert val is not None
            if node in backward and tensors is not None and bias is None and composition.starts_from_terms(val, row_count(x)):
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
    # Only now: identities are told by nodes, which go.
    return sum(_join(graph, *pair) for pair in pairs)


def _backward(graph: Graph) -> set[Node]:
    """What depends on an upstream gradient; AOTAutograd calls those `tangents`, as its partitioner does."""
    found: set[Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and "tangents" in str(node.target)) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _sparse(delta: Any, key: str) -> tuple[Node, ...] | None:
    """The tensors of the sparse term of a whole weight, if it has exactly one."""
    layout = Layout.parse(key)
    found = [tensors for item, tensors in layout.split(delta) if type(item) is Sparse]
    return tuple(found[0]) if len(found) == 1 and layout.region is None and layout.stack == 1 else None  # type: ignore[arg-type]


def _join(graph: Graph, product: Node, grads: Node, transposed: bool) -> bool:
    x: Any = product.args[0]
    other: Any = grads.args[1 if transposed else 0]
    if value(other).dtype != value(x).dtype or not hoist([other], product):  # type: ignore[union-attr]
        return False
    with graph.inserting_before(product):
        node = emit(graph, ops.product_with_grad.default, x, other, *product.args[2:], transposed)
        node.meta.update({k: v for k, v in product.meta.items() if k not in ("val", "tensor_meta")})
        out, gradient = emit(graph, operator.getitem, node, 0), emit(graph, operator.getitem, node, 1)
    product.replace_all_uses_with(out)
    graph.erase_node(product)
    for item in list(grads.users):
        assert is_getitem(item)
        item.replace_all_uses_with(gradient)
        graph.erase_node(item)
    graph.erase_node(grads)
    return True
