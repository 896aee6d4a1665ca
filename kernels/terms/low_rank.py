"""The low-rank term s·B A (LoRA; RoSA paper section 4, arXiv 2401.04679)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rosa_fx.kernels.terms.base import Region, Shape, Term


@dataclass(frozen=True)
class LowRank(Term):
    """s·B A with A [R, K] and B [N, R]; `scale` is s = alpha / R, or alpha / sqrt(R) if rank-stabilised.

    A stack of E matrices [N, K] has A [E, R, K] and B [E, N, R]: one low-rank term per matrix.
    The scale is folded into B before B is rounded to the dtype of the product: one rounding, not two.
    """

    scale: float

    kind: ClassVar[str] = "low_rank"
    tensor_names: ClassVar[tuple[str, ...]] = ("A", "B")
    trainable: ClassVar[tuple[str, ...]] = ("A", "B")
    folds: ClassVar[bool] = False

    def dense(self, tensors: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        A, B = tensors
        return ((B.to(dtype) * self.scale) @ A.to(dtype)).view(shape)

    def _scaled(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """s·matrix, rounded to `dtype` once: a product in the matrix's own low precision would round before that."""
        wide = torch.promote_types(torch.promote_types(matrix.dtype, dtype), torch.float32)
        return (matrix.to(wide) * self.scale).to(dtype)

    def fold_(self, weight: Tensor, tensors: Sequence[Tensor]) -> None:
        A, B = tensors
        if weight.dtype in (torch.float32, torch.float64):
            A, B = A.to(weight.dtype), B.to(weight.dtype)
            if A.dim() == 3:
                weight.view(A.shape[0], -1, A.shape[2]).baddbmm_(B, A, alpha=self.scale)
            else:
                weight.addmm_(B, A, alpha=self.scale)
        else:
            super().fold_(weight, tensors)

    def split(self, tensors: Sequence[Tensor], stack: int) -> Callable[[int], Sequence[Tensor]]:
        return lambda index: [tensor[index] for tensor in tensors]

    def grads_of_stack(
        self, pieces: Sequence[tuple[int, Tensor, Tensor]], tensors: Sequence[Tensor], shape: Shape, stack: int
    ) -> list[Tensor]:
        grads = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        matrix = self.split(tensors, stack)
        for index, dy, x in pieces:
            for whole, part in zip(grads, self.grads(dy, x, matrix(index))):
                whole[index] += part
        return grads

    def cut(self, tensors: Sequence[Tensor], region: Region) -> Sequence[Tensor]:
        A, B = tensors
        row, row_stop, column, column_stop = region
        return A[:, column:column_stop], B[row:row_stop]

    def pair(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
        return tensors[0], tensors[1], self.scale

    def factors(self, x: Tensor, tensors: Sequence[Tensor], transposed: bool) -> tuple[Tensor, Tensor]:
        A, B = tensors[0].to(x.dtype), self._scaled(tensors[1], x.dtype)
        return (x @ B, A) if transposed else (x @ A.t(), B.t())

    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        A, B = tensors
        dA = (dy @ self._scaled(B, dy.dtype)).t() @ x
        # As (uᵀ dy)ᵀ, whose long side is that of the output's rows: half the time of dyᵀ u in fp32.
        dB = ((x @ A.to(x.dtype).t()).t() @ dy).t()
        return [dA.to(A.dtype), self._scaled(dB, B.dtype).contiguous()]

    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        A, B = tensors
        dW = dW.reshape(*A.shape[:-2], -1, A.shape[-1])
        dA = self._scaled(B, dW.dtype).mT @ dW
        dB = dW @ A.to(dW.dtype).mT
        return [dA.to(A.dtype), self._scaled(dB, B.dtype)]
