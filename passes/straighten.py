"""Before rewrite 1: a weight whose axes a contraction takes in another order than they are stored in.

einsum("ibnd,hnd->ibh", x, W) multiplies by W permuted to [(d n), h], which is no region of the matrix [h, (n d)]. The order of
a summed axis is free, that of a free one can be restored afterwards:

    mm(x, W[(d n), h])       -> mm(x with its features as (n d), W[(n d), h])
    mm(y, W[h, (d n)])       -> mm(y, W[h, (n d)]) with its features as (d n)
    gradient of W[(d n), h]  -> that of W[(n d), h], from reordered factors
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from rosa_fx.passes.fuse_linear import emit
from rosa_fx.passes.views import SAME_ELEMENTS, Traced, trace, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx

FLATTENS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SWAPS = ([1, 0], [0, 2, 1])


@dataclass(frozen=True)
class Axes:
    """Axes that were flattened into one: their sizes in that order, and the order in which they are stored."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def straight(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    @property
    def inverse(self) -> Axes:
        """From the stored order back."""
        back = tuple(self.order.index(position) for position in range(len(self.order)))
        return Axes(tuple(self.sizes[position] for position in self.order), back)


def axes_of(sizes: Sequence[int], strides: Sequence[int]) -> Axes:
    """How axes with these strides, given without those of size 1, are stored: the one with the largest stride first."""
    return Axes(tuple(sizes), tuple(sorted(range(len(sizes)), key=lambda position: -strides[position])))


def reorder(graph: Graph, node: Node, dim: int, axes: Axes) -> Node:
    """`node` with its dimension `dim`, counted from the end, taken apart and put together in the stored order."""
    if axes.straight:
        return node
    shape = list(value(node).shape)  # type: ignore[union-attr]
    first = len(shape) + dim
    count = len(axes.sizes)
    wide = emit(graph, aten.reshape.default, node, [*shape[:first], *axes.sizes, *shape[first + 1 :]])
    order = [*range(first), *(first + position for position in axes.order), *range(first + count, len(shape) + count - 1)]
    return emit(graph, aten.reshape.default, emit(graph, aten.permute.default, wide, order), shape)


def straighten_product(graph: Graph, node: Node) -> None:
    """Rewrite `node`, an `mm` or `bmm`, if one side is a materialised weight with axes out of order."""
    left, right = node.args
    for operand, other, on_left in ((right, left, False), (left, right, True)):
        if not isinstance(operand, Node) or not isinstance(other, Node):
            continue
        found = _flattened(operand)
        if found is None:
            continue
        flat, inner, traced, turned = found
        groups = _groups(traced, value(flat))
        if groups is None or all(axes.straight for axes, _ in groups):
            continue
        rows, columns = groups[::-1] if turned else groups
        # Of the right side the rows are summed over and the columns are free, of the left side the other way round.
        summed, free = (columns[0], rows[0]) if on_left else (rows[0], columns[0])
        with graph.inserting_before(node):
            dims = [dim for axes, dims in groups for dim in (dims[position] for position in axes.order)]
            ones = [dim for dim in range(traced.shadow.dim()) if dim not in dims]
            straight = emit(graph, aten.permute.default, inner, [*ones, *dims])
            straight = emit(graph, aten.reshape.default, straight, list(value(flat).shape))  # type: ignore[union-attr]
            if turned:
                straight = emit(graph, aten.permute.default, straight, [0, 2, 1] if straight.meta["val"].dim() == 3 else [1, 0])
            other = reorder(graph, other, -2 if on_left else -1, summed)
            new = emit(graph, node.target, *((straight, other) if on_left else (other, straight)))  # type: ignore[arg-type]
            new.meta.update({k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")})
            new = reorder(graph, new, -2 if on_left else -1, free.inverse)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return


def _flattened(node: Node) -> tuple[Node, Node, Traced, bool] | None:
    """(flattening node, what it flattens, that traced to a materialised weight, whether it is transposed afterwards)."""
    if trace(node) is not None:
        return None  # as it is stored
    turned = False
    while node.target in SAME_ELEMENTS or (node.target is aten.permute.default and node.args[1] in _SWAPS):
        turned ^= node.target is aten.permute.default
        if not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    inner = node.args[0] if node.target in FLATTENS else None
    while isinstance(inner, Node) and inner.target in SAME_ELEMENTS:
        inner = inner.args[0]
    traced = trace(inner) if isinstance(inner, Node) else None
    if traced is None or traced.source.target is not ops.materialize.default:
        return None
    assert isinstance(inner, Node)
    return node, inner, traced, turned


def _groups(traced: Traced, flat: torch.Tensor | None) -> list[tuple[Axes, list[int]]] | None:
    """The axes that became the rows and the columns of `flat`, with their dimensions in what was flattened."""
    if flat is None or flat.dim() < 2 or math.prod(flat.shape[:-2]) != 1:
        return None
    split = split_axes(traced.shadow, int(flat.shape[-2]))
    if split is None:
        return None
    shadow = traced.shadow
    return [(axes_of([shadow.shape[d] for d in dims], [shadow.stride(d) for d in dims]), dims) for dims in split]


def split_axes(shadow: torch.Tensor, rows: int) -> tuple[list[int], list[int]] | None:
    """The dimensions, without those of size 1, whose product is `rows`, and the rest; None if they do not come apart so."""
    dims = [dim for dim in range(shadow.dim()) if shadow.shape[dim] != 1]
    size, count = 1, 0
    while count < len(dims) and size < rows:
        size *= int(shadow.shape[dims[count]])
        count += 1
    return (dims[:count], dims[count:]) if size == rows else None
