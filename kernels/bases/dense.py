"""The base that stays as it is: D(Q) is the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rosa_fx.kernels.bases.base import BaseFormat, Stored, TensorLayout


@dataclass(frozen=True)
class DenseFormat(BaseFormat):
    """The weight in its own dtype. Tensors: `weight` [N, K]."""

    kind: ClassVar[str] = "dense"

    def layout(self, shape: Sequence[int], weight_dtype: torch.dtype = torch.float32) -> tuple[TensorLayout, ...]:
        rows, columns = shape
        return (TensorLayout("weight", (rows, columns), weight_dtype),)

    def read(self, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The stored weight itself where it has `dtype` already: no copy. Never write into it."""
        if len(tensors) == 1 and tensors[0].dtype == dtype and tensors[0].is_contiguous():
            return tensors[0]
        return self.dequantize(tensors, shape, dtype)

    def part(
        self, tensors: Sequence[Tensor], shape: Sequence[int], start: int, stop: int
    ) -> tuple[BaseFormat, tuple[Tensor, ...]]:
        return self, (tensors[0][start:stop],)

    def stored(self, tensors: Sequence[Tensor]) -> Stored | None:
        return Stored("dense", tensors[0])

    def _quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (weight.clone(memory_format=torch.contiguous_format),)

    def _dequantize(self, tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return tensors[0].to(dtype, memory_format=torch.contiguous_format, copy=True).view(shape)
