"""The sparse term S in CSR (RoSA paper section 4, arXiv 2401.04679).

Cost model on the CPU, per weight [N, K] with nnz entries and M rows: folding S into the dequantised weight touches nnz
random elements of a buffer that was just written, against a separate x Sᵀ of 2·M·nnz scattered operations. Folding
rounds D(Q)+S once to the dtype of the product, like the working copy of a weight in mixed-precision training whose
master copy is float32: here `values` is that master copy and keeps every small step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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

    def split(self, tensors: Sequence[Tensor], stack: int) -> list[Sequence[Tensor]]:
        values, row_offsets, cols = tensors
        return [
            (values[start:stop], row_offsets[row : row_stop + 1] - start, cols[start:stop])
            for row, row_stop, start, stop in self._bounds(row_offsets, stack)
        ]

    @staticmethod
    def _bounds(row_offsets: Tensor, stack: int) -> list[tuple[int, int, int, int]]:
        """Rows [start, stop) and entries [start, stop) of each matrix of a stack. Waits for the device."""
        rows = (row_offsets.numel() - 1) // stack
        bounds = row_offsets[::rows].tolist()
        return [(i * rows, (i + 1) * rows, start, stop) for i, (start, stop) in enumerate(pairwise(bounds))]

    def grads_of_stack(
        self, pieces: Sequence[tuple[int, Tensor, Tensor]], tensors: Sequence[Tensor], shape: Shape, stack: int
    ) -> list[Tensor]:
        parts, bounds = self.split(tensors, stack), self._bounds(tensors[1], stack)
        out = torch.zeros_like(tensors[0], memory_format=torch.contiguous_format)
        for index, dy, x in pieces:
            _, _, start, stop = bounds[index]
            out[start:stop] += self.grads(dy, x, parts[index])[0]
        return [out]

    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        values, row_offsets, cols = tensors
        return [sddmm(dy, x, row_offsets, cols, values.dtype)]

    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        values, row_offsets, cols = tensors
        return [dW[row_ids(row_offsets, values.numel()), cols.long()].to(values.dtype)]
