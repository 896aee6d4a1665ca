"""Rewrite 1c: a convolution whose kernel has size 1 is a product over the channel axis.

    convolution(x, W[:, :, None])           -> linear(x with channels last), channels back in place
    convolution_backward(dy, x, W[:, :, None]) -> linear_t(dy), mm(dyᵀ, x), sum(dy)

where nothing is strided, padded or grouped. The product of the weight gradient is then fused like every other.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node

import rosa_fx.kernels.ops  # noqa: F401  (registers the operators)
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.base import Region
from rosa_fx.passes.fuse_linear import emit
from rosa_fx.passes.views import Traced, is_getitem, matrix_region, trace, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx


def fuse_convolution(graph: Graph, node: Node) -> tuple[Node, str] | None:
    """Replace a forward convolution if it is a product with a materialised weight; (that weight, operator's name)."""
    x, weight, bias, *geometry = node.args
    found = _pointwise(weight, geometry)
    val, out = value(x), value(node)
    if found is None or not isinstance(x, Node) or val is None or out is None or val.dtype != out.dtype:
        return None
    source, transposed, region = found
    base, delta, key = source.args
    layout = Layout.parse(str(key))
    target = ops.linear_t.default if transposed else ops.linear.default
    with graph.inserting_before(node):
        new = emit(graph, target, _channels_last(graph, x), bias, base, delta, layout.part(region).key)
        new.meta.update({k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")})
        new = _channels_second(graph, new, out)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return source, "linear_t" if transposed else "linear"


def fuse_convolution_backward(graph: Graph, node: Node) -> tuple[Node, str] | None:
    """Replace the backward of such a convolution; (weight, operator's name) if it computed the gradient of the input."""
    dy, x, weight, _, *geometry = node.args
    found = _pointwise(weight, geometry[:-1])
    val = value(dy)
    if found is None or not isinstance(dy, Node) or not isinstance(x, Node) or val is None:
        return None
    source, transposed, region = found
    base, delta, key = source.args
    layout = Layout.parse(str(key))
    target = ops.linear.default if transposed else ops.linear_t.default
    operator: str | None = None
    for item in list(node.users):
        assert is_getitem(item)
        out = value(item)
        with graph.inserting_before(item):
            if item.args[1] == 0 and out is not None:
                new = emit(graph, target, _channels_last(graph, dy), None, base, delta, layout.part(region).key)
                new.meta.update({k: v for k, v in item.meta.items() if k not in ("val", "tensor_meta")})
                new = _channels_second(graph, new, out)
                operator = "linear" if transposed else "linear_t"
            elif item.args[1] == 1 and out is not None:
                left, right = (_rows(graph, factor) for factor in (dy, x))
                left = emit(graph, aten.permute.default, left, [1, 0])
                new = emit(graph, aten.reshape.default, emit(graph, aten.mm.default, left, right), list(out.shape))
            else:
                new = emit(graph, aten.sum.dim_IntList, dy, [0, *range(2, val.dim())])
        item.replace_all_uses_with(new)
        graph.erase_node(item)
    graph.erase_node(node)
    return None if operator is None else (source, operator)


def _pointwise(weight: object, geometry: list[Any]) -> tuple[Node, bool, Region] | None:
    """(materialised weight, whether the filters are its transpose, their region) of a convolution with kernel size 1."""
    stride, padding, _, transposed, _, groups = geometry
    if not isinstance(weight, Node) or transposed or groups != 1 or set(stride) != {1} or set(padding) != {0}:
        return None
    traced = trace(weight)
    if traced is None or traced.source.target is not ops.materialize.default:
        return None
    shadow = traced.shadow
    if prod(shadow.shape[2:]) != 1:
        return None
    matrix = shadow.as_strided(shadow.shape[:2], shadow.stride()[:2])
    shown = matrix_region(Traced(traced.source, matrix), Layout.parse(str(traced.source.args[2])).shape)
    return None if shown is None else (traced.source, *shown)


def _channels_last(graph: Graph, x: Node) -> Node:
    dim = value(x).dim()  # type: ignore[union-attr]
    return emit(graph, aten.permute.default, x, [0, *range(2, dim), 1])


def _channels_second(graph: Graph, y: Node, like: torch.Tensor) -> Node:
    """Channels back in place, in the memory order that readers of the convolution were captured with."""
    dim = like.dim()
    y = emit(graph, aten.permute.default, y, [0, dim - 1, *range(1, dim - 1)])
    if value(y).stride() == like.stride():  # type: ignore[union-attr]
        return y
    order = (
        torch.channels_last if dim == 4 and like.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    )
    copy = graph.call_function(aten.clone.default, (y,), {"memory_format": order})
    copy.meta["val"] = aten.clone.default(y.meta["val"], memory_format=order)
    return copy


def _rows(graph: Graph, x: Node) -> Node:
    """[positions, channels]."""
    moved = _channels_last(graph, x)
    shape = value(moved).shape  # type: ignore[union-attr]
    return emit(graph, aten.reshape.default, moved, [prod(shape[:-1]), shape[-1]])
