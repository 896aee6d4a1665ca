"""The sparse term S in CSR (RoSA paper section 4, arXiv 2401.04679).

Cost model on the CPU, per weight [N, K] with nnz entries and M rows: folding S into the dequantised weight touches nnz
random elements of a buffer that was just written, against a separate x Sᵀ of 2·M·nnz scattered operations. Folding
rounds D(Q)+S once to the dtype of the product, like the working copy of a weight in mixed-precision training whose
master copy is float32: here `values` is that master copy and keeps every small step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rosa_fx.kernels.cpu.sparse import row_ids, scatter_add_, sddmm
from rosa_fx.kernels.terms.base import Shape, Term


@dataclass(frozen=True)
class Sparse(Term):
    """S with `values` [nnz], `row_offsets` int32 [N + 1] and `cols` int32 [nnz], sorted within a row."""

    kind: ClassVar[str] = "sparse"
    tensor_names: ClassVar[tuple[str, ...]] = ("values", "row_offsets", "cols")
    trainable: ClassVar[tuple[str, ...]] = ("values",)
    folds: ClassVar[bool] = True

    def dense(self, tensors: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        values, row_offsets, cols = tensors
        out = values.new_zeros(shape, dtype=dtype)
        return out.index_put((row_ids(row_offsets, values.numel()), cols.long()), values.to(dtype))

    def fold_(self, weight: Tensor, tensors: Sequence[Tensor]) -> None:
        scatter_add_(weight, *tensors)

    def split(self, tensors: Sequence[Tensor], stack: int) -> Callable[[int], Sequence[Tensor]]:
        return self._matrices(tensors, stack)[0]

    @staticmethod
    def _matrices(tensors: Sequence[Tensor], stack: int) -> tuple[Callable[[int], Sequence[Tensor]], list[int]]:
        """The tensors of a matrix by its number, and where the entries of each begin and the last one's end.

        Waits for the device once.
        """
        values, row_offsets, cols = tensors
        rows = (row_offsets.numel() - 1) // stack
        bounds: list[int] = row_offsets[::rows].tolist()

        def matrix(index: int) -> Sequence[Tensor]:
            start, stop = bounds[index : index + 2]
            offsets = row_offsets[index * rows : (index + 1) * rows + 1] - start
            return values[start:stop], offsets, cols[start:stop]

        return matrix, bounds

    def grads_of_stack(
        self, pieces: Sequence[tuple[int, Tensor, Tensor]], tensors: Sequence[Tensor], shape: Shape, stack: int
    ) -> list[Tensor]:
        matrix, bounds = self._matrices(tensors, stack)
        out = torch.zeros_like(tensors[0], memory_format=torch.contiguous_format)
        for index, dy, x in pieces:
            out[bounds[index] : bounds[index + 1]] += self.grads(dy, x, matrix(index))[0]
        return [out]

    def csr(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors

    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        values, row_offsets, cols = tensors
        return [sddmm(dy, x, row_offsets, cols, values.dtype)]

    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        values, row_offsets, cols = tensors
        return [dW[row_ids(row_offsets, values.numel()), cols.long()].to(values.dtype)]


@torch.library.custom_op("rosa_fx::by_column", mutates_args=())
def by_column(values: Tensor, row_offsets: Tensor, cols: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sᵀ in CSR for S [N, columns]: values [nnz], offsets int32 [columns + 1], and the row of each entry, int32 [nnz].

    Entries of a column are in order of their rows. Those behind the last offset, as of a mask that was never set, are in none.
    Does not wait for the device.
    """
    entry = torch.arange(cols.numel(), dtype=row_offsets.dtype, device=cols.device)
    key, order = torch.where(entry < row_offsets[-1], cols, columns).sort(stable=True)
    rows = torch.searchsorted(row_offsets[1:], order.to(row_offsets.dtype), right=True, out_int32=True)
    bounds = torch.arange(columns + 1, dtype=key.dtype, device=key.device)
    return values[order], torch.searchsorted(key, bounds, out_int32=True), rows


@by_column.register_fake
def _(values: Tensor, row_offsets: Tensor, cols: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(values), row_offsets.new_empty(columns + 1), torch.empty_like(cols)
