"""Dense weight gradients dyᵀ x in float32, and sums of them or of their squares that need no second dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from rosa_fx.errors import RosaError

_CHUNK = 1 << 20  # elements of a temporary in the torch implementations


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ x, contiguous [N, K] float32, of dy [M, N] and x [M, K] of any strides.

    float32 throughout: fp16 squares would underflow, and bf16 sums lose the order of close entries. No converted copy of a
    factor is made as large as the result. Raises RosaError for shapes that do not fit.
    """
    _check(dy, x)
    return _torch(dy, x)


def add_weight_gradient(total: Tensor, dy: Tensor, x: Tensor, *, squared: bool) -> None:
    """total += dyᵀ x, or its square element by element, in place; a square is that of the whole sum over M.

    total [N, K] float32, rows apart by any pitch, elements of a row adjacent; dy and x as for `weight_gradient`. Of the size
    of `total` nothing else is made. Raises RosaError for shapes that do not fit.
    """
    _check(dy, x)
    wanted = (dy.shape[1], x.shape[1])
    if total.dtype != torch.float32 or total.shape != wanted or (wanted[1] > 1 and total.stride(1) != 1):
        raise RosaError(
            f"add_weight_gradient: total must be float32 {list(wanted)} with adjacent columns, got {total.dtype} "
            f"{list(total.shape)} with strides {list(total.stride())}"
        )
    rows = max(1, _CHUNK // max(1, wanted[1]))
    for start in range(0, wanted[0], rows):
        part, into = _torch(dy[:, start : start + rows], x), total[start : start + rows]
        if squared:
            into.addcmul_(part, part)
        else:
            into.add_(part)


def _check(dy: Tensor, x: Tensor) -> None:
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise RosaError(f"weight_gradient: dy [M, N] and x [M, K] must share M, got {list(dy.shape)} and {list(x.shape)}")


def _torch(dy: Tensor, x: Tensor) -> Tensor:
    """Factors that are not float32 are converted some rows at a time: of the size of the result there is the result alone."""
    if dy.dtype == x.dtype == torch.float32:
        return dy.t() @ x
    n, k = dy.shape[1], x.shape[1]
    out = dy.new_zeros(n, k, dtype=torch.float32)
    step = max(32, n * k // (16 * max(1, n + k)))
    for left, right in zip(dy.split(step), x.split(step), strict=True):
        out.addmm_(left.t().float(), right.float())
    return out
