"""Rewrite 1b: matrix-vector products, which reach the graph as a broadcast multiplication and a sum.

sum(W * v, 1)          -> linear(v)        mv, and x @ W.T of a vector
sum(W * v[:, None], 0) -> linear_t(v)      tiny products that Inductor's decompositions take apart
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from rosa_fx.kernels.layout import Layout
from rosa_fx.passes.fuse_linear import emit
from rosa_fx.passes.views import matrix_region, trace, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx


def fuse_vector_product(graph: Graph, node: Node) -> tuple[Node, str] | None:
    """Replace `node`, a sum, if it sums a materialised weight times a vector; (that weight, operator's name)."""
    product = node.args[0]
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor or len(product.users) != 1:
        return None
    dims = node.args[1]
    keepdim = bool(node.args[2]) if len(node.args) > 2 else False
    out = value(node)
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or node.kwargs or out is None:
        return None
    assert isinstance(dims[0], int)
    dim = dims[0] % 2
    for operand, vector in (product.args[:2], product.args[1::-1]):
        if not (isinstance(operand, Node) and isinstance(vector, Node)):
            continue
        traced, wide, v = trace(operand), value(product), value(vector)
        if traced is None or traced.source.target is not ops.materialize.default or wide is None or v is None:
            continue
        rows, columns = traced.shadow.shape[-2:] if traced.shadow.dim() == 2 else (-1, -1)
        if tuple(wide.shape) != (rows, columns) or v.dtype != out.dtype:
            continue
        if tuple(v.shape) not in ([(columns,), (1, columns)] if dim == 1 else [(rows, 1)]):
            continue
        base, delta, key = traced.source.args
        layout = Layout.parse(str(key))
        shown = matrix_region(traced, layout.shape)
        if shown is None:
            continue
        transposed, region = shown
        # Summing over the columns of W multiplies by W from the left, over its rows by its transpose.
        target = ops.linear.default if transposed == (dim == 0) else ops.linear_t.default
        with graph.inserting_before(node):
            row = emit(graph, aten.reshape.default, vector, [1, columns if dim == 1 else rows])
            new = emit(graph, target, row, None, base, delta, layout.part(region).key)
            new.meta.update({k: m for k, m in node.meta.items() if k not in ("val", "tensor_meta")})
            shape = ([rows, 1] if dim == 1 else [1, columns]) if keepdim else [rows if dim == 1 else columns]
            new = emit(graph, aten.reshape.default, new, shape)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return traced.source, "linear" if target is ops.linear.default else "linear_t"
    return None
