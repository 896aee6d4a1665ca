"""A dense weight gradient [N, K] that is not there: what a graph gives away of one in the midst of its backward pass.

Who takes it says what becomes of it. Added to a sum, squared or not, it goes there tile by tile, and of the size of the weight
there is the sum alone. Only who has to see it whole (to send it to other processes) asks for it `dense`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rosa_fx.kernels.cpu import gradient as plain
from rosa_fx.kernels.terms.base import Region, Shape

_CHUNK = 1 << 20  # elements that are converted at a time


class Gradient(Protocol):
    """A weight gradient, which lives no longer than the call that it is handed to."""

    def dense(self) -> Tensor:
        """The gradient, contiguous [N, K] float32, in memory of its own."""
        ...

    def add_to(self, total: Tensor, *, squared: bool) -> None:
        """total [N, K] float32, contiguous: += the gradient, or its square element by element, in place."""
        ...


@dataclass(frozen=True)
class Given:
    """A gradient that somebody computed: [N, K], floating. It is neither changed nor kept."""

    values: Tensor

    def dense(self) -> Tensor:
        return self.values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def add_to(self, total: Tensor, *, squared: bool) -> None:
        # Pieces of other dtypes are converted: in float16 squares would underflow.
        step = max(1, _CHUNK // max(1, total.shape[1]))
        for part, into in zip(self.values.split(step), total.split(step), strict=True):
            exact = part.float()
            into.addcmul_(exact, exact) if squared else into.add_(exact)


@dataclass(frozen=True)
class Products:
    """dyᵀ x in each of `parts`, (region, dy [M, rows], x [M, columns]), whose regions of [N, K] = `shape` share nothing.

    Zeros elsewhere. At least one part; factors of any strides.
    """

    shape: Shape
    parts: Sequence[tuple[Region, Tensor, Tensor]]

    def dense(self) -> Tensor:
        (region, dy, x), *others = self.parts
        if not others and region == (0, self.shape[0], 0, self.shape[1]) and not _by_triton(dy, x):
            return plain.weight_gradient(dy, x)
        out = dy.new_zeros(self.shape, dtype=torch.float32)
        self.add_to(out, squared=False)
        return out

    def add_to(self, total: Tensor, *, squared: bool) -> None:
        for (row, row_stop, column, column_stop), dy, x in self.parts:
            add_product(total[row:row_stop, column:column_stop], dy, x, squared=squared)


def add_product(total: Tensor, dy: Tensor, x: Tensor, *, squared: bool) -> None:
    """total += dyᵀ x, or its square element by element, in place and in float32; tile by tile, by what the device has.

    total [N, K] float32 with adjacent columns; dy [M, N] and x [M, K] floating, of any strides. Raises RosaError for shapes
    that do not fit.
    """
    if _by_triton(dy, x):
        from rosa_fx.kernels.triton_accumulate import add_weight_gradient

        add_weight_gradient(total, dy, x, squared=squared)
    else:
        plain.add_weight_gradient(total, dy, x, squared=squared)


def _by_triton(dy: Tensor, x: Tensor) -> bool:
    # Imported here: only who compiles graphs gives gradients away, and importing Inductor takes a while.
    from rosa_fx.kernels import inductor

    supported = dy.dtype == x.dtype and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and 0 not in dy.shape
    return supported and bool(x.numel()) and inductor.triton_devices() and inductor.generates_triton(x.device)
