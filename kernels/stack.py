"""Products with a stack of matrices, one matrix at a time: the scratch that is needed is that of one of them.

Matrix e of a stack [E · N, K] is a weight [N, K] like any other: its rows of the base, its part of each term. So whatever
computes a product with a weight computes it with a matrix of a stack, and a matrix that nobody asks for costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rosa_fx.kernels.definition import whole_factors
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.base import Region

Piece = tuple[int, Tensor, Tensor]
"""(matrix e, dy [M, N], x [M, K]): a summand of a gradient."""


class Stack:
    """The matrices of a stack, by their number."""

    def __init__(self, base: Sequence[Tensor], delta: Sequence[Tensor], layout: Layout) -> None:
        self.layout = layout
        self.rows, self.columns = replace(layout, region=None).each_shape
        self._form, self._base = layout.base.plain(base)
        self._delta = [item.split(tensors, layout.stack) for item, tensors in layout.split(delta)]

    def matrix(self, index: int, region: Region | None) -> tuple[list[Tensor], list[Tensor], Layout]:
        """(base, delta, layout) of one matrix, or of the part of it that `region` says."""
        start, stop = index * self.rows, (index + 1) * self.rows
        form, base = self._form.part(self._base, self.layout.shape, start, stop)
        delta = [tensor for matrix in self._delta for tensor in matrix(index)]
        layout = self.layout
        one = Layout((self.rows, self.columns), layout.dtype, form, layout.terms, layout.strict)
        return list(base), delta, one if region is None else one.part(region)


def pieces_of_region(layout: Layout) -> Iterator[tuple[int, Region]]:
    """The matrices that the layout's region of [E · N, K] touches, and the part of each."""
    rows, columns = layout.shape[0] // layout.stack, layout.shape[1]
    row, row_stop, column, column_stop = layout.region or (0, layout.shape[0], 0, columns)
    for index in range(row // rows, -(row_stop // -rows)):
        start = index * rows
        yield index, (max(row - start, 0), min(row_stop - start, rows), column, column_stop)


def grads_of_pieces(pieces: Sequence[Piece], delta: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Gradients of the delta's parameters from factors for whole matrices; zeros where no piece is."""
    if not pieces:
        return [torch.zeros_like(grad) for item, tensors in layout.split(delta) for grad in item.grad_shapes(tensors)]
    grads: list[Tensor] = []
    for item, tensors in layout.split(delta):
        grads += item.grads_of_stack(pieces, tensors, layout.shape, layout.stack)
    return grads


def whole_piece(index: int, dy: Tensor, x: Tensor, region: Region | None, layout: Layout) -> Piece:
    """A piece whose factors are those of the part `region` of the matrix."""
    one = Layout((layout.shape[0] // layout.stack, layout.shape[1]), layout.dtype, layout.base)
    return index, *whole_factors(dy, x, one if region is None else one.part(region))
