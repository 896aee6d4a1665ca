"""Taking a dense weight gradient apart: which matrix products, where in the weight, it is the sum of.

Autograd builds dW from products dyᵀ x by adding (several uses), scaling, transposing, summing over a batch, and placing:
`slice_scatter` into zeros and `cat` are the backward of slicing and splitting a packed weight, `select_scatter` that of
choosing one of a stack. Each step is undone here, so that none of the dense pieces has to exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.base import Region, Shape
from rosa_fx.passes.fuse_experts import StackProduct, stack_product, zeros
from rosa_fx.passes.fuse_linear import emit, emit_transpose
from rosa_fx.passes.straighten import FLATTENS, axes_of, reorder, split_axes
from rosa_fx.passes.views import SAME_ELEMENTS, Traced, matrix_region, trace, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx


@dataclass(frozen=True)
class Product:
    """`region` of dW gains scale · left @ right, or its transpose if `turned`; batched factors are summed over the batch."""

    left: Node
    right: Node
    turned: bool
    scale: float
    region: Region

    def gradients(self, graph: Graph, delta: Any, layout: Layout) -> Node:
        """The gradients of the delta's parameters, from dy [*, rows of the region] and x [*, columns of the region]."""
        # As stored: left = dyᵀ, right = x. Turned: (left right)ᵀ = rightᵀ leftᵀ, so left = xᵀ and right = dy.
        flipped = emit_transpose(graph, self.left)
        dy, x = (self.right, flipped) if self.turned else (flipped, self.right)
        if self.scale != 1:
            dy = emit(graph, aten.mul.Tensor, dy, self.scale)
        return emit(graph, ops.linear_grads.default, dy, x, delta, layout.part(self.region).key)


@dataclass(frozen=True)
class Summand:
    """scale · node, one summand of a weight gradient."""

    node: Node
    scale: float

    def emit(self, graph: Graph, shape: Shape) -> Node:
        """The summand as a matrix [N, K]."""
        node, val = self.node, value(self.node)
        if val is None or tuple(val.shape) != shape:
            node = emit(graph, aten.reshape.default, node, list(shape))
        return node if self.scale == 1 else emit(graph, aten.mul.Tensor, node, self.scale)

    def products(self, layout: Layout) -> list[Product | StackProduct] | None:
        """The products that make up this summand; None if any part of it is something else."""
        whole = (0, layout.shape[0], 0, layout.shape[1])
        ways: list[Iterator[Product | StackProduct | None]] = [_products(self.node, False, whole, self.scale)]
        if layout.stack > 1:
            rows, columns = layout.each_shape
            ways.insert(0, _of_stack(self.node, layout, False, (0, rows, 0, columns), self.scale))
        for way in ways:
            found = list(way)
            if None not in found:
                return [product for product in found if product is not None]
        return None


def unviewed(node: Node) -> Node:
    """The weight gradient in the parameter's own shape, where it was flattened into a matrix."""
    while (node.target in FLATTENS or node.target in SAME_ELEMENTS) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def summands(node: Node, scale: float = 1.0) -> list[Summand]:
    """The summands of a weight gradient, looking through additions and constant factors, under casts and copies."""
    inner = node
    while inner.target in SAME_ELEMENTS and isinstance(inner.args[0], Node):
        inner = inner.args[0]
    factor = _constant_factor(inner)
    if factor is not None:
        return summands(inner.args[0], scale * factor)  # type: ignore[arg-type]
    added = _added(inner)
    return [Summand(node, scale)] if added is None else [part for side in added for part in summands(side, scale)]


def _constant_factor(node: Node) -> float | None:
    if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(node.args[0], Node):
        factor = node.args[1]
        return float(factor) if isinstance(factor, (int, float)) else None
    return None


def _added(node: Node) -> tuple[Node, Node] | None:
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    left, right = node.args[:2]
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    sizes = {tuple(v.shape) if (v := value(n)) is not None else None for n in (left, right, node)}
    return (left, right) if len(sizes) == 1 else None


def _products(node: Node, turned: bool, region: Region, scale: float) -> Iterator[Product | None]:
    """The products in `node`, which fills `region` of dW (its transpose does if `turned`); None for what is none."""
    rows, columns = region[1] - region[0], region[3] - region[2]
    wanted = (columns, rows) if turned else (rows, columns)
    alone = _placed_matrices(node, 1)
    if alone is not None and len(alone) == 1 and value(node).shape[0] == 1:  # type: ignore[union-attr]
        node = alone[0][0]  # the one of a part of a stack
    traced = _traced(node, wanted)
    val = None if traced is None else value(traced.source)
    if traced is None:
        yield _reordered(node, turned, region, wanted, scale)
        return
    if val is None or val.dim() < 2:
        yield None
        return
    source = traced.source
    shown = matrix_region(traced, (int(val.shape[-2]), int(val.shape[-1])))
    if shown is None:
        yield None
        return
    if val.numel() != rows * columns:
        part = _part(source, shown[1])
        yield None if part is None else Product(*part, turned != shown[0], scale, region)
        return
    turned = turned != shown[0]
    factor, added, placed = _constant_factor(source), _added(source), _placed(source)
    if factor is not None:
        yield from _products(source.args[0], turned, region, scale * factor)  # type: ignore[arg-type]
    elif added is not None:
        for side in added:
            yield from _products(side, turned, region, scale)
    elif placed is not None:
        for piece, (row, row_stop, column, column_stop) in placed:
            if turned:
                row, row_stop, column, column_stop = column, column_stop, row, row_stop
            inside = (region[0] + row, region[0] + row_stop, region[2] + column, region[2] + column_stop)
            yield from _products(piece, turned, inside, scale)
    else:
        factors = _matrix_product(source)
        yield None if factors is None else Product(*factors, turned, scale, region)


def _reordered(node: Node, turned: bool, region: Region, wanted: Shape, scale: float) -> Product | None:
    """A product [(d n), h] that was permuted into [h, (n d)]: the product of its factors in the order of the weight."""
    traced = trace(node)
    val = None if traced is None else value(traced.source)
    if traced is None or val is None or val.dim() < 2 or val.numel() != math.prod(wanted):
        return None
    shadow, split = traced.shadow, split_axes(traced.shadow, wanted[0])
    factors = _matrix_product(traced.source)
    if split is None or factors is None or shadow.numel() != val.numel():
        return None
    below = int(val.shape[-1])  # a stride from here on moves along the rows of the product, a smaller one along its columns
    sides = [{shadow.stride(dim) >= below for dim in dims} for dims in split]
    if sides not in ([{True}, {False}], [{False}, {True}]):
        return None
    flipped = sides[0] == {False}
    # Features in the order of the product become those in the order of the weight: back from what sorting makes of them.
    rows, columns = (axes_of([shadow.shape[d] for d in dims], [shadow.stride(d) for d in dims]).inverse for dims in split)
    left, right = factors
    with node.graph.inserting_before(node):
        left = reorder(node.graph, left, -2, columns if flipped else rows)
        right = reorder(node.graph, right, -1, rows if flipped else columns)
    return Product(left, right, turned != flipped, scale, region)


def _part(node: Node, region: Region) -> tuple[Node, Node] | None:
    """The factors of part of a product of two matrices: rows of the left one, columns of the right one."""
    left, right = node.args[:2] if node.target is aten.mm.default else (None, None)
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    with node.graph.inserting_after(node):
        columns = emit(node.graph, aten.slice.Tensor, right, 1, region[2], region[3])
        rows = emit(node.graph, aten.slice.Tensor, left, 0, region[0], region[1])
    return rows, columns


def _traced(node: Node, shape: tuple[int, ...]) -> Traced | None:
    """`trace` with the shadow in `shape`; None if it cannot be viewed so."""
    traced = trace(node)
    if traced is None or traced.shadow.numel() != math.prod(shape):
        return None
    try:
        return Traced(traced.source, traced.shadow.view(shape))
    except (RuntimeError, ValueError):
        return None


def _of_stack(
    node: Node, layout: Layout, turned: bool, region: Region, scale: float
) -> Iterator[Product | StackProduct | None]:
    """The products in `node`, which fills `region` of the gradient of each matrix of a stack, as in `_products`."""
    rows, columns = region[1] - region[0], region[3] - region[2]
    wanted = (layout.stack, columns, rows) if turned else (layout.stack, rows, columns)
    traced = _traced(node, wanted)
    val = None if traced is None else value(traced.source)
    if traced is None or val is None or val.dim() < 3 or val.numel() != layout.stack * rows * columns:
        yield None
        return
    source, one = traced.source, (int(val.shape[-2]), int(val.shape[-1]))
    shown = matrix_region(Traced(source, traced.shadow[0]), one)
    if shown is None or traced.shadow.stride(0) != rows * columns:
        yield None
        return
    turned = turned != shown[0]
    factor, added = _constant_factor(source), _added(source)
    if factor is not None:
        yield from _of_stack(source.args[0], layout, turned, region, scale * factor)  # type: ignore[arg-type]
    elif added is not None:
        for side in added:
            yield from _of_stack(side, layout, turned, region, scale)
    elif (placed := _placed_matrices(source, layout.stack)) is not None:
        for piece, index in placed:
            start = index * layout.each_shape[0]
            yield from _products(piece, turned, (start + region[0], start + region[1], *region[2:]), scale)
    elif (placed_blocks := _placed_blocks(source)) is not None:
        for piece, (row, row_stop, column, column_stop) in placed_blocks:
            if turned:
                row, row_stop, column, column_stop = column, column_stop, row, row_stop
            inside = (region[0] + row, region[0] + row_stop, region[2] + column, region[2] + column_stop)
            yield from _of_stack(piece, layout, turned, inside, scale)
    else:
        yield stack_product(source, turned, scale, region)


def _placed_matrices(node: Node, stack: int) -> list[tuple[Node, int]] | None:
    """The matrices that a stack is put together from, with their numbers; the others are zeros."""
    val = value(node)
    if val is None or val.dim() != 3:
        return None
    if node.target is aten.select_scatter.default:
        into, piece, dim, index = node.args
        if not zeros(into) or dim != 0 or not isinstance(piece, Node) or not isinstance(index, int):
            return None
        return [(piece, index % stack)]
    found = _pieces(node, 3)
    if found is None or any(dim != 0 or stop != start + 1 for _, dim, start, stop in found):
        return None
    return [(piece, start) for piece, _, start, _ in found]


def _placed_blocks(node: Node) -> list[tuple[Node, Region]] | None:
    """As `_placed`, for blocks that lie alike in each of a batch of matrices."""
    val = value(node)
    if val is None or val.dim() != 3:
        return None
    found = _pieces(node, 3)
    if found is None or any(dim == 0 for _, dim, _, _ in found):
        return None
    rows, columns = int(val.shape[1]), int(val.shape[2])
    return [(p, (start, stop, 0, columns) if dim == 1 else (0, rows, start, stop)) for p, dim, start, stop in found]


def _placed(node: Node) -> list[tuple[Node, Region]] | None:
    """The pieces of a matrix that is put together from blocks, with the rows and columns each fills."""
    val, found = value(node), _pieces(node, 2)
    if val is None or found is None:
        return None
    rows, columns = int(val.shape[0]), int(val.shape[1])
    return [(p, (start, stop, 0, columns) if dim == 0 else (0, rows, start, stop)) for p, dim, start, stop in found]


def _pieces(node: Node, dimensions: int) -> list[tuple[Node, int, int, int]] | None:
    """(piece, dimension, start, stop) of what a tensor is put together from along one dimension; the rest is zeros."""
    val = value(node)
    if val is None or val.dim() != dimensions:
        return None
    if node.target is aten.slice_scatter.default:
        arguments: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 2 :]]
        into, piece, dim, start, _, step = arguments
        part = value(piece)
        if part is None or not zeros(into) or step != 1:
            return None
        begin = (start or 0) + (int(val.shape[dim]) if (start or 0) < 0 else 0)
        return [(piece, dim % dimensions, begin, begin + int(part.shape[dim]))]
    if node.target is aten.cat.default:
        pieces: Any = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else 0
        assert isinstance(dim, int)
        placed, begin = [], 0
        for piece in pieces:
            part = value(piece)
            if part is None or part.dim() != dimensions:
                return None
            stop = begin + int(part.shape[dim])
            if not zeros(piece):
                placed.append((piece, dim % dimensions, begin, stop))
            begin = stop
        return placed
    return None


def _matrix_product(node: Node) -> tuple[Node, Node] | None:
    """The factors of a matrix product, of a batched one that is summed over its batch, or of an outer product."""
    if node.target is aten.mul.Tensor:
        return _outer_product(node)
    if node.target is aten.sum.dim_IntList:
        inner = node.args[0]
        if node.args[1] != [0] or not isinstance(inner, Node) or inner.target is not aten.bmm.default:
            return None
        node = inner
    elif node.target is aten.bmm.default:
        batched = value(node)
        if batched is None or batched.shape[0] != 1:
            return None
    elif node.target is not aten.mm.default:
        return None
    left, right = node.args
    return (left, right) if isinstance(left, Node) and isinstance(right, Node) else None


def _outer_product(node: Node) -> tuple[Node, Node] | None:
    """A column [N, 1] times a row [K] or [1, K], in either order: the gradient of a product with one vector."""
    out = value(node)
    for column, row in (node.args[:2], node.args[1::-1]):
        c, r = value(column), value(row)
        if out is None or c is None or r is None or not isinstance(column, Node) or not isinstance(row, Node):
            continue
        if tuple(c.shape) == (out.shape[0], 1) and tuple(r.shape) in ((out.shape[1],), (1, out.shape[1])) and out.dim() == 2:
            with node.graph.inserting_before(node):
                return column, emit(node.graph, aten.reshape.default, row, [1, int(out.shape[1])])
    return None
