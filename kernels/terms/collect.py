"""Mask collection as two terms that add nothing to the weight and whose "gradients" are what was collected.

RoSA picks, per layer, the top nnz entries of the dense weight gradient (or of its square) by size (paper section 4.2,
algorithm 1). A collecting term owns one hidden leaf tensor, `probe`, and answers for its gradient. Nothing is mutated
inside a graph, so eager mode, compiled graphs and checkpointing need no special case, and a compiled training step
carries the result out of the backward pass like any other gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rosa_fx.kernels.cpu.sparse import row_ids, select_topk
from rosa_fx.kernels.terms.base import Shape, Term


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ x [N, K] in float32: fp16 squares would underflow, and bf16 sums lose the order of close entries."""
    return dy.t().float() @ x.float()


@dataclass(frozen=True)
class CollectGradient(Term):
    """The gradient of `probe` [N, K] float32 is the dense weight gradient (several gradients to average)."""

    kind: ClassVar[str] = "collect_gradient"
    tensor_names: ClassVar[tuple[str, ...]] = ("probe",)
    trainable: ClassVar[tuple[str, ...]] = ("probe",)
    folds: ClassVar[bool] = True
    contributes: ClassVar[bool] = False

    def dense(self, tensors: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> None:
        return None

    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [weight_gradient(dy, x)]

    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [dW.to(torch.float32, copy=True, memory_format=torch.contiguous_format)]


@dataclass(frozen=True)
class CollectTopK(Term):
    """The gradient of `probe` [1 + 2·nnz] float32 is the mask itself: (1, rows, columns) of the top nnz entries.

    The dense gradient lives only inside the kernel, one layer at a time. Rows and columns below 2²⁴ are exact in
    float32. The leading 1 counts the calls that autograd summed up: anything but 1 means that the rest is no mask.
    Columns of -1 mean that the gradient held a NaN.
    """

    kind: ClassVar[str] = "collect_topk"
    tensor_names: ClassVar[tuple[str, ...]] = ("probe",)
    trainable: ClassVar[tuple[str, ...]] = ("probe",)
    folds: ClassVar[bool] = True
    contributes: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def dense(self, tensors: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> None:
        return None

    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._encode(weight_gradient(dy, x).abs_(), tensors[0])

    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._encode(dW.float().abs(), tensors[0])

    @staticmethod
    def _encode(score: Tensor, probe: Tensor) -> list[Tensor]:
        nnz = (probe.numel() - 1) // 2
        row_offsets, cols = select_topk(score, nnz)
        out = probe.new_empty(probe.shape)
        out[0] = 1
        out[1 : nnz + 1] = row_ids(row_offsets, nnz)
        out[nnz + 1 :] = cols
        return [out]

    @staticmethod
    def decode(grad: Tensor) -> tuple[int, Tensor, Tensor]:
        """(number of calls, rows int64 [nnz], columns int64 [nnz]) from a gradient of `probe`."""
        nnz = (grad.numel() - 1) // 2
        return int(grad[0].item()), grad[1 : nnz + 1].long(), grad[nnz + 1 :].long()
