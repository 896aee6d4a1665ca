"""Rows of D(Q) + S on the CPU: written into a tile that a GEMM reads, or multiplied on the spot with a few rows of x.

The C++ is in rows.cpp. Where it cannot be had (no compiler), or a weight is stored as it cannot read, `source` is None and
the caller dequantises the whole weight instead.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rosa_fx.kernels.bases.base import Stored
from rosa_fx.kernels.cpu import sparse
from rosa_fx.kernels.terms.base import Region, Shape

_INT8, _FOUR_BIT = 3, 4  # the kinds of rows.cpp; below are dense weights, by dtype


# What every call passes is packed: ctypes takes three times as long to fill a structure, and ten times to pass as many
# arguments.
# kind, N, K; data, scales, table; blocksize; codes of scales, table, nested scales, offset; their blocksize; values; their
# dtype; row_offsets, cols
_ROWS = struct.Struct("3q3Pq4PqPq2P")
# The part of the weight; x, its dtype, M, stride; y, its dtype and stride; A, its stride; B, its stride, R; s; threads; whether
# in bfloat16
_FEW = struct.Struct("4qP3qP2qPqP2qd2q")


# `Terms` of terms_low_rank.cpp: the part of the weight, transposed, M; x, its dtype and strides; out, its dtype and stride; R;
# the factors of the inputs and of the outputs, each with its stride and that from rank to rank; left, its dtype and stride; s;
# made; other and its strides; kept; the gradients of the values and of both factors, these with strides; the tile; threads
_TERMS = struct.Struct("6qP3qP3qP2qP2qP2qdPP2qPPP2qP2qP4qq")

_NOTHING: tuple[int, ...] = (0, 0, 0)
_NO_TILE = (0, 0, 0, 0, 0)


class Source:
    """D(Q) + S of one weight, ready to be read by rows. Holds its tensors as long as it lives."""

    def __init__(self, library: ctypes.CDLL, shape: Shape, stored: Stored, csr: Sequence[Tensor] | None) -> None:
        self._library = library
        self._shape, self._stored, self._csr = shape, stored, csr
        kind = {"int8": _INT8, "4bit": _FOUR_BIT}.get(stored.kind) or sparse.DTYPES[stored.data.dtype]
        self.nnz, entries = 0, (0, 0, 0, 0)
        if csr is not None:
            values, row_offsets, cols = csr
            self.nnz = values.numel()
            entries = values.data_ptr(), sparse.DTYPES[values.dtype], row_offsets.data_ptr(), cols.data_ptr()
        scales, nested = _pointer(stored.scales), (0, 0, 0, 0, 0)
        if stored.nested is not None:
            table, absmax, offset, blocksize = stored.nested
            scales, nested = 0, (scales, table.data_ptr(), absmax.data_ptr(), offset.data_ptr(), blocksize)
        self._rows = _ROWS.pack(
            kind, *shape, stored.data.data_ptr(), scales, _pointer(stored.table), stored.blocksize, *nested, *entries
        )

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether D(Q) lies in memory as a matrix of that dtype."""
        return self._stored.kind == "dense" and self._stored.data.dtype == dtype

    def base_only(self) -> Source:
        """D(Q) without S."""
        return Source(self._library, self._shape, self._stored, None)

    def write(self, region: Region, out: Tensor) -> None:
        """out = that part of D(Q) + S, summed in float32 and rounded once. out: float32, bfloat16 or float16; rows apart by
        any pitch, elements of a row adjacent; or panels [P, rows, columns of one] that hold the columns one after another.
        Raises MemoryError without scratch memory."""
        failed = self._library.rosa_write_rows(
            self._rows,
            *region,
            *_tile(out),
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
        *,
        made: Tensor | None = None,
        other: Tensor | None = None,
        kept: Tensor | None = None,
        tile: Tensor | None = None,
    ) -> list[Tensor]:
        """out [M, rows] = x [M, columns] times the transpose of that part of S alone; x [M, rows] and out [M, columns] with
        S itself if `transposed`. `pair`: A [R, columns], B [rows, R] and s, by which s (x Aᵀ) Bᵀ is added, or s (x B) A if
        `transposed`; `left` [M, R], where given, is x Aᵀ or s (x B). Summed in float32 and rounded once. x of any
        strides, rows of out and of left adjacent elements; float32, bfloat16 or float16. Raises as `write`.

        `made` [M, R], contiguous and of x's dtype, becomes s (x Aᵀ) or s (x B). `other`, like out in shape and like x in
        dtype, asks for gradients as well, of the whole weight: those of S's values, [nnz], for each the sum over M of x and
        `other` in its column and row. With `kept`, what the product with `other` left in `made`, those of A and of B follow.

        `tile` becomes that part of D(Q), without S, as `write` has it: the threads are there already.
        """
        R, scale, inner, outer, given = 0, 0.0, _NOTHING, _NOTHING, _NOTHING
        if pair is not None and pair[0].numel() and pair[1].numel():
            A, B, scale = _adjacent(pair[0]), _adjacent(pair[1]), pair[2]
            R = A.shape[0]
            inner, outer = _factors(A, B, transposed)
            if left is not None:
                left = left if left.stride(1) == 1 else left.contiguous()
                given = left.data_ptr(), sparse.DTYPES[left.dtype], left.stride(0)
                scale = 1.0 if transposed else scale
        if made is not None:
            assert made.dtype == x.dtype
            assert made.is_contiguous()
        gradients: list[Tensor] = []
        second, inner_grad, outer_grad = _NOTHING, _NOTHING, _NOTHING
        if other is not None:
            assert region == (0, self._shape[0], 0, self._shape[1])
            assert other.dtype == x.dtype
            second = other.data_ptr(), *other.stride()
            gradients.append(torch.empty(self.nnz, dtype=torch.float32, device="cpu"))
        kept = kept.contiguous() if kept is not None and other is not None and R else None
        if kept is not None:
            assert kept.dtype == x.dtype
            gradients += [torch.empty(size, device="cpu") for size in ((R, self._shape[1]), (self._shape[0], R))]
            inner_grad, outer_grad = _factors(gradients[1], gradients[2], transposed)
        if x.shape[0] == 0:
            return [gradient.zero_() for gradient in gradients]
        call = _TERMS.pack(
            *region,
            transposed,
            x.shape[0],
            x.data_ptr(),
            sparse.DTYPES[x.dtype],
            *x.stride(),
            out.data_ptr(),
            sparse.DTYPES[out.dtype],
            out.stride(0),
            R,
            *inner,
            *outer,
            *given,
            scale,
            _pointer(made),
            *second,
            _pointer(kept),
            _pointer(gradients[0] if gradients else None),
            *inner_grad,
            *outer_grad,
            *(_NO_TILE if tile is None else _tile(tile)),
            torch.get_num_threads(),
        )
        if self._library.rosa_terms(self._rows, call):
            raise MemoryError(f"no scratch memory for 64 rows of {x.shape[1]} elements and their sparse entries")
        return gradients

    def few(
        self, region: Region, x: Tensor, out: Tensor, pair: tuple[Tensor, Tensor, float] | None = None, *, low: bool = False
    ) -> None:
        """out [M, rows] = x [M, columns] times the transpose of that part of D(Q) + S, summed in float32 and rounded once.

        float32, bfloat16 or float16, elements of a row of x and of out adjacent. For few rows of x: the weight is decoded in
        the L1 cache and never stored. Where x is bfloat16, D(Q), though not S, may be rounded to that too; `low` allows it for
        float32, and for x with it, if the processor multiplies bfloat16. `pair`: A [R, columns], B [rows, R] and s, by which
        s (x Aᵀ) Bᵀ is added; of other dtypes than float32 they are converted. Raises as `write`."""
        A = B = None
        factors: tuple[Any, ...] = (0, 0, 0, 0, 0, 0.0)
        if pair is not None and pair[0].numel():
            A, B = _wide(pair[0]), _wide(pair[1])
            factors = (A.data_ptr(), A.stride(0), B.data_ptr(), B.stride(0), A.shape[0], pair[2])
        call = _FEW.pack(
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
            low,
        )
        if self._library.rosa_few_rows(self._rows, call):
            raise MemoryError(f"no scratch memory for the sums of {x.shape[0]} rows")


def _tile(out: Tensor) -> tuple[int, int, int, int, int]:
    """Address, dtype, elements from row to row, columns of a panel, elements from panel to panel."""
    return out.data_ptr(), sparse.DTYPES[out.dtype], out.stride(-2), out.shape[-1], out.stride(0) if out.dim() == 3 else 0


def _factors(A: Tensor, B: Tensor, transposed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A [R, columns] and B [rows, R], that of the inputs first: address, from one to the next, and from rank to rank."""
    of_A, of_B = (A.data_ptr(), *A.stride()[::-1]), (B.data_ptr(), *B.stride())
    return (of_B, of_A) if transposed else (of_A, of_B)


def _adjacent(matrix: Tensor) -> Tensor:
    """In float32, the elements of a row or of a column adjacent."""
    wide = _fp32(matrix)
    return wide if 1 in wide.stride() else wide.contiguous()


def _wide(matrix: Tensor) -> Tensor:
    """In float32, the elements of a row adjacent."""
    wide = _fp32(matrix)
    return wide if wide.stride(1) == 1 else wide.contiguous()


def _fp32(matrix: Tensor) -> Tensor:
    # `float` takes a microsecond to find that it has nothing to do.
    return matrix if matrix.dtype is torch.float32 else matrix.float()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    ptr, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.rosa_write_rows.argtypes = [ptr, i64, i64, i64, i64, ptr, i32, i64, i64, i64, i32]
    library.rosa_write_rows.restype = i32
    library.rosa_terms.argtypes = [ptr, ptr]
    library.rosa_terms.restype = i32
    library.rosa_few_rows.argtypes = [ptr, ptr]
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
        csr = (csr[0].contiguous(), row_offsets, cols) if cols.numel() else None
    return Source(_declared(library), shape, stored, csr)
