"""Rewrite 1: the product of an activation with a materialised weight becomes the fused product.

    mm(x, Wᵀ) -> linear(x)       mm(x, W) -> linear_t(x)         with or without bias, batched with one or an expanded W
    mm(W, x)  -> linear(xᵀ)ᵀ     mm(Wᵀ, x) -> linear_t(xᵀ)ᵀ      mv likewise

It holds for forward and backward alike: grad-input is dy W. The weight may reach the product through any chain of
views and casts; the fused operator computes in the dtype of the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

import rosa_fx.kernels.ops  # noqa: F401  (registers the operators)
from rosa_fx.kernels.layout import Layout
from rosa_fx.passes.views import matrix_region, trace, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx

# target -> position of (bias or None, left, right)
PRODUCTS: dict[Any, tuple[int | None, int, int]] = {
    aten.mm.default: (None, 0, 1),
    aten.bmm.default: (None, 0, 1),
    aten.mv.default: (None, 0, 1),
    aten.addmm.default: (0, 1, 2),
    aten.baddbmm.default: (0, 1, 2),
    aten.addmv.default: (0, 1, 2),
}


def emit(graph: Graph, target: Callable[..., Any], *args: Any) -> Node:
    """A call whose fake value is computed like every other node's."""
    node = graph.call_function(target, args)
    fakes = torch.fx.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*fakes)
    return node


def emit_transpose(graph: Graph, node: Node) -> Node:
    """The last two dimensions swapped, as the permute that a decomposed graph holds."""
    dims = list(range(value(node).dim()))  # type: ignore[union-attr]
    return emit(graph, aten.permute.default, node, [*dims[:-2], dims[-1], dims[-2]])


def fuse_product(graph: Graph, node: Node) -> tuple[Node, str] | None:
    """Replace `node`, a product in `PRODUCTS`, if one side is a materialised weight; (that weight, operator's name)."""
    bias_at, left_at, right_at = PRODUCTS[node.target]
    for weight_at, other_at in ((right_at, left_at), (left_at, right_at)):
        operand, other = node.args[weight_at], node.args[other_at]
        if not (isinstance(operand, Node) and isinstance(other, Node)):
            continue
        traced = trace(operand)
        if traced is None or traced.source.target is not ops.materialize.default:
            continue
        base, delta, key = traced.source.args
        layout = Layout.parse(str(key))
        shown = matrix_region(traced, layout.shape)
        x, out = value(other), value(node)
        if shown is None or x is None or out is None or x.dtype != out.dtype or not x.dtype.is_floating_point:
            continue
        transposed, region = shown
        key = layout.part(region).key
        on_left = weight_at == left_at
        # Right of x the operator wants Wᵀ for `linear`; left of x, in out = W x = (xᵀ Wᵀ)ᵀ, it wants W.
        target = ops.linear.default if transposed != on_left else ops.linear_t.default
        bias = None if bias_at is None else node.args[bias_at]
        with graph.inserting_before(node):
            inside = _foldable_bias(node, bias, on_left)
            new = _call(graph, target, other, bias if inside else None, on_left, (base, delta, key), node)
            if bias is not None and not inside:
                new = add_bias(graph, node, bias, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return traced.source, "linear" if target is ops.linear.default else "linear_t"
    return None


def _call(graph: Graph, target: Any, x: Node, bias: Any, on_left: bool, weight: tuple[Any, ...], like: Node) -> Node:
    vector = value(x).dim() == 1  # type: ignore[union-attr]
    if vector:
        x = emit(graph, aten.unsqueeze.default, x, 0)
    elif on_left:
        x = emit_transpose(graph, x)
    new = emit(graph, target, x, bias, *weight)
    new.meta.update({k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta")})
    if vector:
        return emit(graph, aten.squeeze.dim, new, 0)
    return emit_transpose(graph, new) if on_left else new


def _foldable_bias(node: Node, bias: Any, on_left: bool) -> bool:
    """A [columns] bias, unscaled, goes into the operator; anything else is added after it."""
    val = value(bias)
    unscaled = node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1
    if val is None or on_left or node.target is not aten.addmm.default:
        return False
    return bool(unscaled) and val.dim() == 1


def add_bias(graph: Graph, node: Node, bias: Any, product: Node) -> Node:
    """`product` plus the first argument of `node`, with the factors that `node` has."""
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if alpha != 1:
        product = emit(graph, aten.mul.Tensor, product, alpha)
    if beta != 1:
        bias = emit(graph, aten.mul.Tensor, bias, beta)
    return emit(graph, aten.add.Tensor, product, bias)
