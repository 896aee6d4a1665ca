"""Sparse pieces of a RoSA layer: scatter into a dense weight, sampled dense-dense product, exact top-k selection.

Each function has two implementations: C++ for CPU tensors (rosa_cpu.cpp and its parts, compiled on first use through
Inductor's code cache), and plain torch for other devices, other dtypes and machines without a compiler; `native` alone
chooses.

Precondition of everything that takes a mask: row_offsets (int32 [N+1]) starts at 0, never decreases and ends at
nnz; cols (int32 [nnz]) is strictly increasing within a row and within [0, K). This is *not* checked here, where it would cost a
pass over the mask in every step: an invalid mask reads and writes out of bounds. Check masks where they enter.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from rosa_fx.errors import RosaError
from rosa_fx.kernels import topk

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT32_MAX = 2**31 - 1
_CHUNK = 1 << 20  # elements of a temporary in the torch implementations
_lock = threading.Lock()


def _source(name: str) -> str:
    """One compilation unit, whose hash covers all of it: every `#include "part"` replaced by the part."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda include: _source(include[1]), text, flags=re.MULTILINE)


@functools.cache
def _compile() -> ctypes.CDLL | None:
    try:
        # Imported here: importing Inductor takes a while, and only this needs it.
        from rosa_fx.kernels.inductor import load_cpp

        library = load_cpp(_source("rosa_cpu.cpp"))
    except Exception as error:  # whatever a missing or broken compiler raises must cost speed only
        reason = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            "rosa_fx could not compile its CPU kernels and uses slower torch operations instead: "
            f"{type(error).__name__}: {reason}. Install a C++ compiler (or set CXX) for full speed.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    ptr, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.rosa_scatter_add.argtypes = [ptr, i32, i64, i64, ptr, i32, ptr, ptr, i32]
    library.rosa_scatter_add.restype = None
    library.rosa_sddmm.argtypes = [ptr, i32, i64, i64, ptr, i32, i64, i64, i64, i64, i64, ptr, ptr, ptr, i32]
    library.rosa_sddmm.restype = i32
    library.rosa_select_topk.argtypes = [ptr, i64, i64, i64, i64, i64, ptr, ptr, i32]
    library.rosa_select_topk.restype = i32
    return library


def native(*tensors: Tensor) -> ctypes.CDLL | None:
    """The compiled library if it can work on these tensors, else None."""
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype not in DTYPES:
            return None
    if _compile.cache_info().currsize:
        return _compile()
    with _lock:  # functools.cache alone would let two threads compile, and warn, at once
        return _compile()


def checked_mask(what: str, row_offsets: Tensor, cols: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    for name, tensor in (("row_offsets", row_offsets), ("cols", cols)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise RosaError(f"{what}: {name} must be a 1-D int32 tensor, got {tensor.dtype} {list(tensor.shape)}")
    if row_offsets.numel() != rows + 1:
        raise RosaError(f"{what}: row_offsets has {row_offsets.numel()} entries, {rows} rows need {rows + 1}")
    return row_offsets.contiguous(), cols.contiguous()


def check_filled(what: str, row_offsets: Tensor, cols: Tensor) -> None:
    # A mask that was never set (offsets all 0) would otherwise leave outputs unwritten. Read without torch: a hundredth of a
    # call with one row of x.
    entries = ctypes.c_int32.from_address(row_offsets.data_ptr() + (row_offsets.numel() - 1) * 4).value
    if entries != cols.numel():
        raise RosaError(f"{what}: row_offsets ends at {entries}, but cols has {cols.numel()} entries; set a mask first")


def row_ids(row_offsets: Tensor, nnz: int) -> Tensor:
    """Row of each entry of a CSR mask, int64 [nnz], without a host sync."""
    rows = torch.arange(row_offsets.numel() - 1, device=row_offsets.device)
    return torch.repeat_interleave(rows, row_offsets.diff().long(), output_size=nnz)  # output_size: no host sync


def _accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def scatter_add_(weight: Tensor, values: Tensor, row_offsets: Tensor, cols: Tensor) -> None:
    """weight[row_j, cols[j]] += values[j], in place.

    weight: [N, K], contiguous; values: [nnz]; row_offsets: int32 [N+1]; cols: int32 [nnz] (see the module for what makes a
    mask valid). float32, bfloat16 and float16 in any mix: the sum is made in fp32 and rounded once, to nearest even, to
    weight's dtype (float64 operands are summed in float64, by torch). No host synchronisation.
    Raises RosaError for a weight that is not contiguous, for shapes that do not fit, and on the CPU for a mask that does
    not hold nnz entries.
    """
    if weight.dim() != 2 or not weight.is_contiguous():
        raise RosaError(f"scatter_add_: weight must be contiguous and 2-D, got {list(weight.shape)}; use .contiguous()")
    row_offsets, cols = checked_mask("scatter_add_", row_offsets, cols, weight.shape[0])
    if values.shape != cols.shape:
        raise RosaError(f"scatter_add_: {list(values.shape)} values for {cols.numel()} mask entries")
    library = native(weight, values)
    if library is None:
        _scatter_add_torch(weight, values, row_offsets, cols)
        return
    check_filled("scatter_add_", row_offsets, cols)
    values = values.detach().contiguous()
    library.rosa_scatter_add(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        *weight.shape,
        values.data_ptr(),
        DTYPES[values.dtype],
        row_offsets.data_ptr(),
        cols.data_ptr(),
        torch.get_num_threads(),
    )


def _scatter_add_torch(weight: Tensor, values: Tensor, row_offsets: Tensor, cols: Tensor) -> None:
    index = row_ids(row_offsets, cols.numel()) * weight.shape[1] + cols
    flat = weight.detach().view(-1)
    dtype = _accumulate_dtype(weight, values)
    total = flat.index_select(0, index).to(dtype) + values.detach().to(dtype)
    flat.scatter_(0, index, total.to(weight.dtype))  # positions are unique: deterministic


def sddmm(dy: Tensor, x: Tensor, row_offsets: Tensor, cols: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """out[j] = sum over m of dy[m, row_j] * x[m, cols[j]]: the gradient of the sparse values. Returns [nnz], out_dtype.

    dy: [M, N] and x: [M, K] with any strides, float32, bfloat16 or float16 in any mix; row_offsets: int32 [N+1]; cols:
    int32 [nnz] (see the module for what makes a mask valid). Products and sums are fp32 (float64 if an operand is),
    rounded once to out_dtype. On the CPU the result does not depend on the number of threads, and extra memory is about
    1 MiB per thread plus at most 8 MiB (elsewhere: transposed copies of dy and x). No host synchronisation.
    Raises RosaError for shapes that do not fit, and on the CPU for a mask that does not hold nnz entries.
    """
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise RosaError(f"sddmm: dy [M, N] and x [M, K] must share M, got {list(dy.shape)} and {list(x.shape)}")
    row_offsets, cols = checked_mask("sddmm", row_offsets, cols, dy.shape[1])
    library = native(dy, x)
    if library is None:
        return _sddmm_torch(dy, x, row_offsets, cols).to(out_dtype)
    check_filled("sddmm", row_offsets, cols)
    dy, x = dy.detach(), x.detach()
    if cols.numel() == 0:
        return x.new_empty(0, dtype=out_dtype)
    out = torch.empty(cols.numel(), dtype=torch.float32, device="cpu")
    failed = library.rosa_sddmm(
        dy.data_ptr(),
        DTYPES[dy.dtype],
        *dy.stride(),
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.stride(),
        x.shape[0],
        dy.shape[1],
        x.shape[1],
        row_offsets.data_ptr(),
        cols.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"sddmm: no scratch memory for {cols.numel()} mask entries")
    return out.to(out_dtype)


def _sddmm_torch(dy: Tensor, x: Tensor, row_offsets: Tensor, cols: Tensor) -> Tensor:
    dtype = _accumulate_dtype(dy, x)
    rows = row_ids(row_offsets, cols.numel())
    # Whole rows of the transposes are gathered, a bounded number of them at a time: never a dense [N, K] gradient.
    dy_t, x_t = dy.detach().t().contiguous(), x.detach().t().contiguous()
    out = torch.zeros(cols.numel(), dtype=dtype, device=x.device)
    # On a GPU short pieces would be launches and little else.
    step = max(1, (_CHUNK if x.is_cpu else 4 * _CHUNK) // max(1, x.shape[0]))
    for j in range(0, cols.numel(), step):
        left, right = dy_t.index_select(0, rows[j : j + step]), x_t.index_select(0, cols[j : j + step])
        torch.sum(left.to(dtype) * right.to(dtype), dim=1, out=out[j : j + step])
    return out


def select_topk(score: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """The mask of the nnz largest scores: (row_offsets int32 [N+1], cols int32 [nnz]), columns ascending in each row.

    score: [N, K] float32, any strides, not negative (a negative score counts as 0). Exact and
    deterministic: of equal scores those with the smaller flat index n * K + k are taken. Extra memory is a few
    MiB or, where that is more, less than a tenth of the scores.
    A NaN or an infinity anywhere gives cols full of -1, with row_offsets as if all entries were in row 0: the caller says
    whose it is.
    Raises RosaError when score is not a float32 matrix, or nnz is not in 0 .. N * K or does not fit in int32.
    """
    if score.dim() != 2 or score.dtype != torch.float32:
        raise RosaError(f"select_topk: score must be a float32 matrix, got {score.dtype} {list(score.shape)}")
    rows, columns = score.shape
    if not 0 <= nnz <= min(rows * columns, _INT32_MAX) or columns > _INT32_MAX:
        raise RosaError(
            f"select_topk: nnz={nnz} for a score of shape [{rows}, {columns}]; choose 0 .. "
            f"{min(rows * columns, _INT32_MAX)} (indices are int32)"
        )
    score = score.detach()
    library = native(score)
    if library is None:
        return topk.select_topk(score, nnz)
    row_offsets = torch.empty(rows + 1, dtype=torch.int32, device="cpu")
    cols = torch.empty(nnz, dtype=torch.int32, device="cpu")
    status = library.rosa_select_topk(
        score.data_ptr(),
        rows,
        columns,
        *score.stride(),
        nnz,
        row_offsets.data_ptr(),
        cols.data_ptr(),
        torch.get_num_threads(),
    )
    if status == 2:
        raise MemoryError(f"select_topk: no scratch memory for a score of shape [{rows}, {columns}]")
    if status == 1:
        cols.fill_(-1)
        row_offsets.fill_(nnz)
        row_offsets[0] = 0
    return row_offsets, cols
