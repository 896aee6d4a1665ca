"""Dense weight gradients dyᵀ x in float32, and sums of them or of their squares that need no second dense matrix.

The C++ is in gradient.cpp. On other devices, for float64 and without a compiler the work is torch's.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from rosa_fx.errors import RosaError
from rosa_fx.kernels.cpu.sparse import DTYPES, native

_CHUNK = 1 << 20  # elements of a temporary in the torch implementations
_STORE, _ADD, _ADD_SQUARE, _STORE_SIZE = range(4)  # `Finish` in gradient.cpp


def weight_gradient(dy: Tensor, x: Tensor, *, absolute: bool = False) -> Tensor:
    """dyᵀ x, contiguous [N, K] float32, of dy [M, N] and x [M, K] of any strides; |dyᵀ x| if `absolute`.

    float32 throughout: fp16 squares would underflow, and bf16 sums lose the order of close entries. No converted copy of a
    factor is made as large as the result. On the CPU the result does not depend on the number of threads.
    Raises RosaError for shapes that do not fit, MemoryError without scratch memory (0.7 MiB a thread).
    """
    _check(dy, x)
    library = native(dy, x)
    if library is None:
        out = _torch(dy, x)
        return out.abs_() if absolute else out
    out = torch.empty(dy.shape[1], x.shape[1], dtype=torch.float32, device="cpu")
    _run(library, dy, x, out, _STORE_SIZE if absolute else _STORE)
    return out


def add_weight_gradient(total: Tensor, dy: Tensor, x: Tensor, *, squared: bool) -> None:
    """total += dyᵀ x, or its square element by element, in place; a square is that of the whole sum over M.

    total [N, K] float32, rows apart by any pitch, elements of a row adjacent; dy and x as for `weight_gradient`. Of the size
    of `total` nothing else is made. Raises as `weight_gradient`, and RosaError for another kind of total.
    """
    check_sum(total, dy, x)
    library = native(total, dy, x)
    if library is None:
        _add_torch(total, dy, x, squared)
    else:
        _run(library, dy, x, total, _ADD_SQUARE if squared else _ADD)


def check_sum(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """Raises RosaError unless dyᵀ x can be added to `total` in place."""
    _check(dy, x)
    wanted = (dy.shape[1], x.shape[1])
    if total.dtype != torch.float32 or total.shape != wanted or (wanted[1] > 1 and total.stride(1) != 1):
        raise RosaError(
            f"add_weight_gradient: total must be float32 {list(wanted)} with adjacent columns, got {total.dtype} "
            f"{list(total.shape)} with strides {list(total.stride())}"
        )


def _check(dy: Tensor, x: Tensor) -> None:
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise RosaError(f"weight_gradient: dy [M, N] and x [M, K] must share M, got {list(dy.shape)} and {list(x.shape)}")


def _run(library: ctypes.CDLL, dy: Tensor, x: Tensor, out: Tensor, finish: int) -> None:
    failed = _declared(library).rosa_weight_gradient(
        dy.data_ptr(),
        DTYPES[dy.dtype],
        *dy.stride(),
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.stride(),
        x.shape[0],
        *out.shape,
        out.data_ptr(),
        out.stride(0),
        finish,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no scratch memory for a block of the weight gradient {list(out.shape)}")


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    ptr, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.rosa_weight_gradient.argtypes = [ptr, i32, i64, i64, ptr, i32, i64, i64, i64, i64, i64, ptr, i64, i32, i32]
    library.rosa_weight_gradient.restype = i32
    return library


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


def _add_torch(total: Tensor, dy: Tensor, x: Tensor, squared: bool) -> None:
    rows = max(1, _CHUNK // max(1, x.shape[1]))
    for start in range(0, dy.shape[1], rows):
        part, into = _torch(dy[:, start : start + rows], x), total[start : start + rows]
        if squared:
            into.addcmul_(part, part)
        else:
            into.add_(part)
