"""Thin products of low-rank parts as `torch.library` operators, in float32 graphs on the CPU (see `passes/shared_input.py`).

    thin_product(x, rows) = x rowsᵀ [M, R]        x [M, K], rows [R, K]
    thin_gradient(thin, right) = thinᵀ right [R, K], or its transpose [K, R]    thin [M, R], right [M, K]

The vendors' libraries are not made for R of a few dozen: on two cores of a Zen 5 MKL takes about twice the time. They are
emitted after autograd and have no derivatives. Without a compiler, and in another dtype, they are plain products.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from rosa_fx.kernels.cpu.gradient import weight_gradient
from rosa_fx.kernels.cpu.sparse import native


@torch.library.custom_op("rosa_fx::thin_product", mutates_args=())
def thin_product(x: Tensor, rows: Tensor) -> Tensor:
    return x @ rows.t()


@torch.library.custom_op("rosa_fx::thin_gradient", mutates_args=())
def thin_gradient(thin: Tensor, right: Tensor, transposed: bool) -> Tensor:
    return right.t() @ thin if transposed else thin.t() @ right


@thin_product.register_fake
def _(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], rows.shape[0])


@thin_gradient.register_fake
def _(thin: Tensor, right: Tensor, transposed: bool) -> Tensor:
    shape = (right.shape[1], thin.shape[1]) if transposed else (thin.shape[1], right.shape[1])
    return thin.new_empty(shape)


@thin_product.register_kernel("cpu")
def thin_product_kernel(x: Tensor, rows: Tensor) -> Tensor:
    library = native(x, rows) if x.dtype == rows.dtype == torch.float32 else None
    if library is None:
        return x @ rows.t()
    x, rows = (matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in (x, rows))
    out = x.new_empty(x.shape[0], rows.shape[0])
    _declared(library).rosa_thin_product(
        x.data_ptr(),
        x.stride(0),
        rows.data_ptr(),
        rows.stride(0),
        x.shape[0],
        rows.shape[0],
        x.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@thin_gradient.register_kernel("cpu")
def thin_gradient_kernel(thin: Tensor, right: Tensor, transposed: bool) -> Tensor:
    if not thin.dtype == right.dtype == torch.float32:
        return right.t() @ thin if transposed else thin.t() @ right
    # The long side last also where the other order is wanted: it is that of the vectors.
    out = weight_gradient(thin, right)
    return out.t().contiguous() if transposed else out


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    ptr, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.rosa_thin_product.argtypes = [ptr, i64, ptr, i64, i64, i64, i64, ptr, i32]
    library.rosa_thin_product.restype = None
    return library
