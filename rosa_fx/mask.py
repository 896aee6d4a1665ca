"""The mask of a sparse adapter: which entries of a weight [N, K] are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rosa_fx.errors import RosaError
from rosa_fx.kernels.cpu.sparse import row_ids


@dataclass(frozen=True)
class Mask:
    """A mask in CSR: `row_offsets` int32 [N + 1], `cols` int32 [nnz] ascending within a row, `shape` (N, K).

    The mask of a weight with more than two dimensions is that of its matrix: [E · N, K] for a stack of E matrices [N, K].

    Built with `Mask.from_dense`, `Mask.from_indices` or directly; `validate` checks what kernels rely on.
    """

    row_offsets: Tensor
    cols: Tensor
    shape: tuple[int, int]

    @property
    def nnz(self) -> int:
        return self.cols.numel()

    def to_dense(self) -> Tensor:
        """The mask as bool [N, K]."""
        dense = torch.zeros(self.shape, dtype=torch.bool, device=self.cols.device)
        dense[self.rows(), self.cols.long()] = True
        return dense

    def rows(self) -> Tensor:
        """Row of each entry, int64 [nnz]."""
        return row_ids(self.row_offsets, self.nnz)

    @staticmethod
    def from_dense(dense: Tensor) -> Mask:
        """From bool [N, K]."""
        if dense.dim() != 2 or dense.dtype != torch.bool:
            raise RosaError(f"a dense mask must be bool [N, K], got {dense.dtype} {list(dense.shape)}")
        rows, cols = dense.nonzero(as_tuple=True)
        return Mask.from_indices(rows, cols, (dense.shape[0], dense.shape[1]))

    @staticmethod
    def from_indices(rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> Mask:
        """From row and column of each entry, integers [nnz] in any order."""
        order = torch.argsort(rows.long() * shape[1] + cols.long())
        counts = torch.bincount(rows.long(), minlength=shape[0])
        offsets = torch.zeros(shape[0] + 1, dtype=torch.int32, device=cols.device)
        offsets[1:] = counts.cumsum(0)
        return Mask(offsets, cols[order].to(torch.int32), shape)

    def validate(self, name: str, shape: tuple[int, int], nnz: int) -> None:
        """Raises RosaError, naming the weight `name`, unless this is a sorted CSR mask of `shape` with `nnz` entries."""
        if tuple(self.shape) != tuple(shape):
            raise RosaError(f"{name}: the mask has shape {list(self.shape)}, the weight {list(shape)}")
        offsets, cols = self.row_offsets, self.cols
        if offsets.dtype != torch.int32 or cols.dtype != torch.int32:
            raise RosaError(f"{name}: mask indices must be int32, got {offsets.dtype} and {cols.dtype}")
        if offsets.shape != (shape[0] + 1,) or cols.dim() != 1:
            raise RosaError(f"{name}: row_offsets must have {shape[0] + 1} entries, got {list(offsets.shape)}")
        if self.nnz != nnz:
            raise RosaError(
                f"{name}: the mask has {self.nnz} entries, the weight trains {nnz} (= int(density * N * K)); "
                "make the mask with that many, or transform with another density"
            )
        if int(offsets[0]) != 0 or int(offsets[-1]) != nnz or bool((offsets.long().diff() < 0).any()):
            raise RosaError(f"{name}: row_offsets must rise from 0 to nnz = {nnz}")
        if nnz and (int(cols.min()) < 0 or int(cols.max()) >= shape[1]):
            raise RosaError(f"{name}: column {int(cols.min())}..{int(cols.max())} outside 0..{shape[1] - 1}")
        flat = self.rows() * shape[1] + cols.long()
        if bool((flat.diff() <= 0).any()):
            raise RosaError(f"{name}: columns must be ascending and unique within each row")
