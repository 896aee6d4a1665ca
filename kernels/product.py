"""A product with a rewritten weight, as the choice of a kernel and of its tiles sees it: sizes, format and capability."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DECODE_ROWS = 16

# What stands for the capability of an AMD GPU, which has fewer and different limits than the number would say.
AMD = (0, 0)


@dataclass(frozen=True)
class Product:
    """A product of M rows with the weight [N, K] as stored; `kind` is the base format's.

    `transposed` sums over N, else over K. `rows` is M, or its hint where it is dynamic. `blocksize` of a 4-bit base, else 0.
    """

    rows: int
    n: int
    k: int
    kind: str
    dtype: torch.dtype
    rank: int = 0
    nnz: int = 0
    transposed: bool = False
    capability: tuple[int, int] = (8, 0)
    blocksize: int = 0

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return self.k if self.transposed else self.n

    @property
    def depth(self) -> int:
        """What is summed over."""
        return self.n if self.transposed else self.k


def power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two that is at least `value`, between `least` and `most`."""
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)
