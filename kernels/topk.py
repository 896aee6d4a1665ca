"""Exact top-k of a matrix in plain torch, for devices without a kernel of their own: no host synchronisation, little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Scores at a time: what is made beside them takes up to 20 bytes for each, of 4 N·K in all.
_SHARE = 64
_LEAST = 1 << 15
# To count takes five bytes for each: torch adds up what it has converted first.
_COUNTED_AT_ONCE = 4
_INFINITY = 0x7F800000


def select_topk(score: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """As `rosa_fx.kernels.cpu.sparse.select_topk`, whose checks have been made, on any device.

    Nothing is read by the host: not how many scores a piece gives, nor whether they are finite. Of the size of `score` nothing
    is made; memory beside the result is less than a tenth of it, or a megabyte. (Sorting, which `torch.topk` may do, takes a
    copy of the scores and one of their indices, and promises nothing about ties.)
    """
    rows, device = score.shape[0], score.device
    row_offsets = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    if nnz == 0:
        return row_offsets, torch.empty(0, dtype=torch.int32, device=device)
    bits = score.view(torch.int32)
    size = max(_LEAST, score.numel() // _SHARE)
    threshold = _threshold(bits, nnz, size * _COUNTED_AT_ONCE)
    # Of those at the threshold the first are taken, as many as those above it leave.
    ties = nnz - _count(bits, size * _COUNTED_AT_ONCE, lambda part: part > threshold)
    # What is not taken goes to a last place that nobody reads.
    cols = torch.empty(nnz + 1, dtype=torch.int32, device=device)
    filled = torch.zeros((), dtype=torch.int32, device=device)
    bad = torch.zeros((), dtype=torch.bool, device=device)
    for row, column, part in _pieces(bits, size):
        bad = bad | ((part & 0x7FFFFFFF) >= _INFINITY).any()
        place, ties = _take(part, column, threshold, ties, filled, cols)
        # A part of a row writes the end of that row so far, which the next part of it writes again.
        row_offsets[row + 1 : row + 1 + part.shape[0]] = filled + place[:, -1]
        filled = filled + place[-1, -1]
    row_offsets[1:] = torch.where(bad, nnz, row_offsets[1:])
    return row_offsets, torch.where(bad, -1, cols[:nnz])


def _take(part: Tensor, column: int, threshold: Tensor, ties: Tensor, filled: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Write the columns, counted from `column`, of what is taken of a piece to `cols` from place `filled` on.

    Returns how many are taken up to each element, as the piece is shaped, and how many `ties` are left to take.
    """
    key = part.clamp(min=0)
    equal = (key == threshold).flatten()
    rank = equal.cumsum(0, dtype=torch.int32)
    taken = (key > threshold).flatten() | (equal & (rank <= ties))
    left = (ties - rank[-1]).clamp(min=0)
    del key, equal, rank
    place = taken.cumsum(0, dtype=torch.int32)
    numbers = torch.arange(column, column + part.shape[1], dtype=torch.int32, device=part.device)
    index = torch.where(taken, filled + place - 1, cols.numel() - 1).long()
    cols.scatter_(0, index, numbers.expand(part.shape).flatten())
    return place.view(part.shape), left


def _threshold(bits: Tensor, nnz: int, size: int) -> Tensor:
    """The nnz-th largest key, int32 without dimensions, bit by bit: floats that are not negative order like their bits.

    Those of negative floats are negative integers, below every trial.
    """
    threshold = torch.zeros((), dtype=torch.int32, device=bits.device)
    for bit in range(30, -1, -1):
        trial = threshold | (1 << bit)
        enough = _count(bits, size, trial.le) >= nnz
        threshold = torch.where(enough, trial, threshold)
    return threshold


def _count(bits: Tensor, size: int, test: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([test(part).sum(dtype=torch.int32) for _, _, part in _pieces(bits, size)]).sum()


def _pieces(matrix: Tensor, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, first column, view) of at most `size` elements, in order of their flat index: whole rows, or parts of one."""
    rows, columns = matrix.shape
    if columns <= size:
        step = max(1, size // max(1, columns))
        for row in range(0, rows, step):
            yield row, 0, matrix[row : row + step]
        return
    for row in range(rows):
        for column in range(0, columns, size):
            yield row, column, matrix[row : row + 1, column : column + size]
