"""Rows of D(Q) + S on the CPU: written into a tile that a GEMM reads, or multiplied on the spot with a few rows of x.

The C++ is in rows.cpp. Where it cannot be had (no compiler), or a weight is stored as it cannot read, `source` is None and
the caller dequantises the whole weight instead.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rosa_fx.kernels.bases.base import Stored
from rosa_fx.kernels.cpu import sparse
from rosa_fx.kernels.terms.base import Region, Shape

_INT8, _FOUR_BIT = 3, 4  # the kinds of rows.cpp; below are dense weights, by dtype


class _Rows(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("blocksize", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("values_dtype", ctypes.c_int64),
        ("row_offsets", ctypes.c_void_p),
        ("cols", ctypes.c_void_p),
    )


class Source:
    """D(Q) + S of one weight, ready to be read by rows. Holds its tensors as long as it lives."""

    def __init__(self, library: ctypes.CDLL, shape: Shape, stored: Stored, csr: Sequence[Tensor] | None) -> None:
        self._library = library
        self._tensors = [stored, csr]
        kind = {"int8": _INT8, "4bit": _FOUR_BIT}.get(stored.kind) or sparse.DTYPES[stored.data.dtype]
        self._rows = _Rows(kind, *shape, stored.data.data_ptr(), blocksize=stored.blocksize)
        if stored.scales is not None:
            self._rows.scales = stored.scales.data_ptr()
        if stored.table is not None:
            self._rows.table = stored.table.data_ptr()
        self.nnz = 0
        if csr is not None:
            values, row_offsets, cols = csr
            self.nnz = values.numel()
            self._rows.values, self._rows.values_dtype = values.data_ptr(), sparse.DTYPES[values.dtype]
            self._rows.row_offsets, self._rows.cols = row_offsets.data_ptr(), cols.data_ptr()

    def write(self, region: Region, out: Tensor) -> None:
        """out = that part of D(Q) + S, summed in float32 and rounded once. out: float32, bfloat16 or float16; rows apart by
        any pitch, elements of a row adjacent; or panels [P, rows, columns of one] that hold the columns one after another.
        Raises MemoryError without scratch memory."""
        failed = self._library.rosa_write_rows(
            ctypes.byref(self._rows),
            *region,
            out.data_ptr(),
            sparse.DTYPES[out.dtype],
            out.stride(-2),
            out.shape[-1],
            out.stride(0) if out.dim() == 3 else 0,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no scratch memory for a row of {region[3] - region[2]} weights")

    def terms(
        self,
        region: Region,
        x: Tensor,
        out: Tensor,
        transposed: bool,
        pair: tuple[Tensor, Tensor, float] | None = None,
        left: Tensor | None = None,
        other: Tensor | None = None,
    ) -> Tensor | None:
        """out [M, rows] = x [M, columns] times the transpose of that part of S alone; x [M, rows] and out [M, columns] with
        S itself if `transposed`. `pair`: A [R, columns], B [rows, R] and s, by which s (x Aᵀ) Bᵀ is added, or s (x B) A if
        `transposed`; `left` [M, R], where given, is x Aᵀ or s (x B). Summed in float32 and rounded once. x of any
        strides, rows of out and of left adjacent elements; float32, bfloat16 or float16. Raises as `write`.

        `other`, like out in shape and like x in dtype, asks for the gradient of S's values as well, [nnz] float32: for each
        the sum over M of x and `other` in its column and row. The region has to be the whole weight then."""
        factors: tuple[Any, ...] = (0, None, 0, 0, None, 0, 0, None, 0, 0, 0.0)
        if pair is not None and pair[0].numel() and pair[1].numel():
            A, B, scale = pair[0].float(), pair[1].float().t(), pair[2]
            inner, outer = (B, A) if transposed else (A, B)  # [R, inputs] and [R, outputs]
            factors = (len(A), *_by_column(inner), *_by_column(outer))
            if left is None:
                factors += (None, 0, 0, scale)
            else:
                left = left if left.stride(1) == 1 else left.contiguous()
                factors += (left.data_ptr(), sparse.DTYPES[left.dtype], left.stride(0), 1.0 if transposed else scale)
        gradient = None
        if other is not None:
            assert region == (0, self._rows.N, 0, self._rows.K)
            assert other.dtype == x.dtype
            gradient = torch.empty(self.nnz, dtype=torch.float32)
        failed = self._library.rosa_terms(
            ctypes.byref(self._rows),
            *region,
            transposed,
            x.data_ptr(),
            sparse.DTYPES[x.dtype],
            *x.stride(),
            x.shape[0],
            out.data_ptr(),
            sparse.DTYPES[out.dtype],
            out.stride(0),
            *factors,
            *((None, 0, 0, None) if other is None or gradient is None else _gradient(other, gradient)),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no scratch memory for 64 rows of {x.shape[1]} elements and their sparse entries")
        return gradient

    def few(self, region: Region, x: Tensor, out: Tensor, pair: tuple[Tensor, Tensor, float] | None = None) -> None:
        """out [M, rows] = x [M, columns] times the transpose of that part of D(Q) + S, summed in float32 and rounded once.

        float32, bfloat16 or float16, elements of a row of x and of out adjacent. For few rows of x: the weight is decoded in
        the L1 cache and never stored. Where x is bfloat16, D(Q), though not S, may be rounded to that too. `pair`: A [R,
        columns], B [rows, R] and s, by which s (x Aᵀ) Bᵀ is added; of other dtypes than float32 they are converted. Raises
        as `write`."""
        A = B = None
        factors: tuple[Any, ...] = (None, 0, None, 0, 0, 0.0)
        if pair is not None and pair[0].numel():
            A, B = _wide(pair[0]), _wide(pair[1])
            factors = (A.data_ptr(), A.stride(0), B.data_ptr(), B.stride(0), A.shape[0], pair[2])
        failed = self._library.rosa_few_rows(
            ctypes.byref(self._rows),
            *region,
            x.data_ptr(),
            sparse.DTYPES[x.dtype],
            x.shape[0],
            x.stride(0),
            out.data_ptr(),
            sparse.DTYPES[out.dtype],
            out.stride(0),
            *factors,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no scratch memory for the sums of {x.shape[0]} rows")


def _by_column(matrix: Tensor) -> tuple[int, int, int]:
    """Address of a matrix, elements from column to column, and from row to row."""
    return matrix.data_ptr(), matrix.stride(1), matrix.stride(0)


def _gradient(other: Tensor, gradient: Tensor) -> tuple[int, int, int, int]:
    return other.data_ptr(), other.stride(0), other.stride(1), gradient.data_ptr()


def _wide(matrix: Tensor) -> Tensor:
    """In float32, the elements of a row adjacent."""
    wide = matrix.float()
    return wide if wide.stride(1) == 1 else wide.contiguous()


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    ptr, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.rosa_write_rows.argtypes = [ptr, i64, i64, i64, i64, ptr, i32, i64, i64, i64, i32]
    library.rosa_write_rows.restype = i32
    library.rosa_terms.argtypes = [
        *(ptr, i64, i64, i64, i64, i32, ptr, i32, i64, i64, i64, ptr, i32, i64),
        *(i64, ptr, i64, i64, ptr, i64, i64, ptr, i32, i64, ctypes.c_float),
        *(ptr, i64, i64, ptr, i32),
    ]
    library.rosa_terms.restype = i32
    library.rosa_few_rows.argtypes = [
        *(ptr, i64, i64, i64, i64, ptr, i32, i64, i64, ptr, i32, i64),
        *(ptr, i64, ptr, i64, i64, ctypes.c_float, i32),
    ]
    library.rosa_few_rows.restype = i32
    return library


def source(shape: Shape, stored: Stored | None, csr: Sequence[Tensor] | None) -> Source | None:
    """D(Q) + S [N, K] with S given as (values, row_offsets, cols) or None; None if the kernels cannot read it.

    Raises RosaError for a mask that does not fit the weight or does not hold as many entries as there are values.
    """
    if stored is None or stored.data.device.type != "cpu" or not stored.data.is_contiguous():
        return None
    operands = [] if csr is None else [csr[0]]
    library = sparse.native(*operands, *([stored.data] if stored.kind == "dense" else []))
    if library is None:
        return None
    if csr is not None:
        row_offsets, cols = sparse.checked_mask("linear", csr[1], csr[2], shape[0])
        sparse.check_filled("linear", row_offsets, cols)
        csr = (csr[0].detach().contiguous(), row_offsets, cols) if cols.numel() else None
    return Source(_declared(library), shape, stored, csr)
