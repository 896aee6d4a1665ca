"""The low-rank term where its thin product with the activations exists already (see `passes/shared_input.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rosa_fx.kernels.terms.base import Region, Shape
from rosa_fx.kernels.terms.low_rank import LowRank


@dataclass(frozen=True)
class LowRankGiven(LowRank):
    """s·B A whose thin product with the activations is computed elsewhere, for several users at once.

    `product` [M, R] is x Aᵀ, or x (s B) where the weight itself is multiplied, in x's dtype; the activations of the operator
    are those rows. The meaning is that of `LowRank`: the product saves work and says nothing new.
    """

    kind: ClassVar[str] = "low_rank_given"
    tensor_names: ClassVar[tuple[str, ...]] = ("A", "B", "product")

    def dense(self, tensors: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        return super().dense(tensors[:2], shape, dtype)

    def fold_(self, weight: Tensor, tensors: Sequence[Tensor]) -> None:
        super().fold_(weight, tensors[:2])

    def cut(self, tensors: Sequence[Tensor], region: Region) -> Sequence[Tensor]:
        return [*super().cut(tensors[:2], region), tensors[2]]

    def thin(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[2]

    def factors(self, x: Tensor, tensors: Sequence[Tensor], transposed: bool) -> tuple[Tensor, Tensor]:
        A, B, product = tensors
        return product, A.to(x.dtype) if transposed else self._scaled(B, x.dtype).t()

    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return super().grads(dy, x, tensors[:2])

    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return super().grads_from_dense(dW, tensors[:2])
