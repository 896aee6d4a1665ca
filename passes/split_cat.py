"""Before the rewrites: a product with a concatenation of which a materialised weight is a part becomes products with the parts.

    mm(x, cat([W, V], 1)) -> cat([mm(x, W), mm(x, V)], 1)      the parts lie side by side
    mm(x, cat([W, V], 0)) -> mm(x[:, :k], W) + mm(x[:, k:], V)  the parts lie along the contraction

with the weight on either side, transposed or not. The weight gradient, a slice of one product, is taken apart likewise by
`weight_gradient`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from rosa_fx.passes.fuse_linear import emit
from rosa_fx.passes.views import matrix_region, trace, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx


def split_concatenations(graph: Graph) -> None:
    """Take products apart, in place. Others than of two matrices are left as they are."""
    for target, at in ((aten.mm.default, 0), (aten.addmm.default, 1)):
        for node in graph.find_nodes(op="call_function", target=target):
            for weight_at in (at + 1, at):
                found = _concatenated(node.args[weight_at])
                if found is not None:
                    _split(graph, node, at, weight_at, *found)
                    break


def _concatenated(operand: Any) -> tuple[Node, int, bool] | None:
    """(the cat, its dimension, whether the operand is its transpose) if a materialised weight is among its parts."""
    traced = trace(operand) if isinstance(operand, Node) else None
    val = None if traced is None else value(traced.source)
    if traced is None or traced.source.target is not aten.cat.default or val is None or val.dim() != 2:
        return None
    cat = traced.source
    parts: Any = cat.args[0]
    if not any(isinstance(part, Node) and _is_weight(part) for part in parts):
        return None
    rows, columns = (int(size) for size in val.shape)
    shown = matrix_region(traced, (rows, columns))
    if shown is None or shown[1] != (0, rows, 0, columns):
        return None
    dim = cat.args[1] if len(cat.args) > 1 else 0
    assert isinstance(dim, int)
    return cat, dim % 2, shown[0]


def _is_weight(node: Node) -> bool:
    traced = trace(node)
    return traced is not None and traced.source.target is ops.materialize.default


def _split(graph: Graph, node: Node, at: int, weight_at: int, cat: Node, dim: int, turned: bool) -> None:
    other = node.args[at if weight_at == at + 1 else at + 1]
    on_left = weight_at == at
    # Of the operand as the product sees it: its contracted dimension is 1 on the left and 0 on the right.
    contracted = (dim != turned) == on_left
    parts: Any = cat.args[0]
    with graph.inserting_before(node):
        results, start = [], 0
        for part in parts:
            stop = start + int(value(part).shape[dim])  # type: ignore[union-attr]
            piece = emit(graph, aten.permute.default, part, [1, 0]) if turned else part
            factor = other
            if contracted:
                factor = emit(graph, aten.slice.Tensor, other, 0 if on_left else 1, start, stop)
            results.append(emit(graph, aten.mm.default, *((piece, factor) if on_left else (factor, piece))))
            results[-1].meta.update({k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")})
            start = stop
        if contracted:
            new = results[0]
            for result in results[1:]:
                new = emit(graph, aten.add.Tensor, new, result)
        else:
            new = emit(graph, aten.cat.default, results, 0 if on_left else 1)
        if at == 1:
            bias, alpha, beta = node.args[0], node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
            new = new if alpha == 1 else emit(graph, aten.mul.Tensor, new, alpha)
            bias = bias if beta == 1 else emit(graph, aten.mul.Tensor, bias, beta)
            new = emit(graph, aten.add.Tensor, new, bias)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
