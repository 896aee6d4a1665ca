"""How a parameter with any number of dimensions is read: as one matrix, or as a stack of equal matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """A parameter as `stack` matrices [rows, columns] that lie one after the other in its contiguous storage.

    Base and sparse term are those of the one matrix [stack · rows, columns]; each matrix of a stack has a low-rank term
    of its own, so a stack of experts is as many linear layers.
    """

    stack: int
    rows: int
    columns: int

    @property
    def matrix(self) -> tuple[int, int]:
        """The whole parameter as one matrix [stack · rows, columns], a plain view of it."""
        return self.stack * self.rows, self.columns

    def __str__(self) -> str:
        matrix = f"{self.rows} x {self.columns}"
        return f"a matrix {matrix}" if self.stack == 1 else f"{self.stack} matrices {matrix}"


def read(shape: Sequence[int], stacked: int | None = None, rows: int = 1) -> Reading:
    """The reading of a parameter of `shape`: its first `stacked` dimensions number the matrices (all but the last two if
    not given), the next `rows` are the rows of each, the others its columns."""
    stacked = len(shape) - 2 if stacked is None else stacked
    parts = shape[:stacked], shape[stacked : stacked + rows], shape[stacked + rows :]
    return Reading(*(math.prod(part) for part in parts))
