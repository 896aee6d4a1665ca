"""Taking a dense weight gradient apart: which matrix products, where in the weight, it is the sum of.

Autograd builds dW from products dyᵀ x by adding (several uses), scaling, transposing, summing over a batch, and placing:
`slice_scatter` into zeros and `cat` are the backward of slicing and splitting a packed weight. Each step is undone here, so
that none of the dense pieces has to exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from rosa_fx.kernels.terms.base import Region, Shape
from rosa_fx.passes.fuse_linear import emit, emit_transpose
from rosa_fx.passes.views import SAME_ELEMENTS, matrix_region, trace, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """`region` of dW gains scale · left @ right, or its transpose if `turned`; batched factors are summed over the batch."""

    left: Node
    right: Node
    turned: bool
    scale: float
    region: Region

    def emit(self, graph: Graph) -> tuple[Node, Node]:
        """(dy, x), of shapes [*, rows of the region] and [*, columns of the region]."""
        # As stored: left = dyᵀ, right = x. Turned: (left right)ᵀ = rightᵀ leftᵀ, so left = xᵀ and right = dy.
        flipped = emit_transpose(graph, self.left)
        dy, x = (self.right, flipped) if self.turned else (flipped, self.right)
        if self.scale != 1:
            dy = emit(graph, aten.mul.Tensor, dy, self.scale)
        return dy, x


@dataclass(frozen=True)
class Summand:
    """scale · node, one summand of a weight gradient."""

    node: Node
    scale: float

    def emit(self, graph: Graph) -> Node:
        return self.node if self.scale == 1 else emit(graph, aten.mul.Tensor, self.node, self.scale)

    def products(self, shape: Shape) -> list[Product] | None:
        """The products that make up this summand [N, K]; None if any part of it is something else."""
        found = list(_products(self.node, False, (0, shape[0], 0, shape[1]), self.scale))
        return None if None in found else [product for product in found if product is not None]


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
    traced = trace(node)
    if traced is None or tuple(traced.shadow.shape[-2:]) != wanted or traced.shadow.numel() != rows * columns:
        yield None
        return
    source = traced.source
    val = value(source)
    if val is None or val.dim() < 2 or val.numel() != rows * columns:
        yield None
        return
    shown = matrix_region(traced, (int(val.shape[-2]), int(val.shape[-1])))
    if shown is None:
        yield None
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


def _placed(node: Node) -> list[tuple[Node, Region]] | None:
    """The pieces of a matrix that is put together from blocks, with the rows and columns each fills."""
    val = value(node)
    if val is None or val.dim() != 2:
        return None
    rows, columns = int(val.shape[0]), int(val.shape[1])

    def block(dim: int, start: int, stop: int) -> Region:
        return (start, stop, 0, columns) if dim % 2 == 0 else (0, rows, start, stop)

    placed: list[tuple[Node, Region]] = []
    if node.target is aten.slice_scatter.default:
        arguments: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 2 :]]
        into, piece, dim, start, _, step = arguments
        part = value(piece)
        if part is None or not _zeros(into) or step != 1:
            return None
        begin = (start or 0) + ((rows, columns)[dim % 2] if (start or 0) < 0 else 0)
        placed.append((piece, block(dim, begin, begin + int(part.shape[dim]))))
        return placed
    if node.target is aten.cat.default:
        pieces: Any = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else 0
        assert isinstance(dim, int)
        begin = 0
        for piece in pieces:
            part = value(piece)
            if part is None or part.dim() != 2:
                return None
            stop = begin + int(part.shape[dim])
            if not _zeros(piece):
                placed.append((piece, block(dim, begin, stop)))
            begin = stop
        return placed
    return None


def _zeros(node: object) -> bool:
    if not isinstance(node, Node):
        return False
    made = node.target in (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
    return made or bool(node.target is aten.full.default and node.args[1] == 0)


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
