"""The low-rank term s·B A (LoRA; RoSA paper section 4, arXiv 2401.04679)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rosa_fx.kernels.terms.base import Shape, Term


@dataclass(frozen=True)
class LowRank(Term):
    """s·B A with A [R, K] and B [N, R]; `scale` is s = alpha / R, or alpha / sqrt(R) if rank-stabilised.

    The scale is folded into B before B is rounded to the dtype of the product: one rounding, not two.
    """

    scale: float

    kind: ClassVar[str] = "low_rank"
    tensor_names: ClassVar[tuple[str, ...]] = ("A", "B")
    trainable: ClassVar[tuple[str, ...]] = ("A", "B")
    folds: ClassVar[bool] = False

    def dense(self, tensors: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        A, B = tensors
        return (B.to(dtype) * self.scale) @ A.to(dtype)

    def fold_(self, weight: Tensor, tensors: Sequence[Tensor]) -> None:
        A, B = tensors
        if weight.dtype == torch.float32:
            weight.addmm_(B.float(), A.float(), alpha=self.scale)
        else:
            super().fold_(weight, tensors)

    def add_product_(self, out: Tensor, x: Tensor, tensors: Sequence[Tensor], transposed: bool) -> None:
        A, B = tensors[0].to(x.dtype), (tensors[1] * self.scale).to(x.dtype)
        if transposed:
            out.addmm_(x @ B, A)
        else:
            out.addmm_(x @ A.t(), B.t())

    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        A, B = tensors
        dA = (dy @ (B * self.scale).to(dy.dtype)).t() @ x
        dB = dy.t() @ (x @ A.to(x.dtype).t())
        return [dA.to(A.dtype), dB.to(B.dtype).mul_(self.scale)]

    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        A, B = tensors
        dA = (B * self.scale).to(dW.dtype).t() @ dW
        dB = dW @ A.to(dW.dtype).t()
        return [dA.to(A.dtype), dB.to(B.dtype).mul_(self.scale)]
