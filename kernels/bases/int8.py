"""The rowwise int8 base of LLM.int8 (arXiv 2208.07339), with bitsandbytes' codec and no outlier columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rosa_fx.errors import RosaError
from rosa_fx.kernels.bases.base import BaseFormat, Stored, TensorLayout


@dataclass(frozen=True)
class Int8Format(BaseFormat):
    """One float32 absmax per row. Tensors: `CB` int8 [N, K] and `SCB` float32 [N], named as in `Int8Params`.

    A weight of any dtype is first rounded to float16, as bitsandbytes' `Int8Params` does: the codec is defined for
    float16 (the CUDA kernel takes nothing else). Larger magnitudes than float16's 65504 raise RosaError; magnitudes
    below about 3e-8 become 0.
    """

    kind: ClassVar[str] = "int8"

    def layout(self, shape: Sequence[int], weight_dtype: torch.dtype = torch.float32) -> tuple[TensorLayout, ...]:
        rows, columns = shape
        return TensorLayout("CB", (rows, columns), torch.int8), TensorLayout("SCB", (rows,), torch.float32)

    def part(
        self, tensors: Sequence[Tensor], shape: Sequence[int], start: int, stop: int
    ) -> tuple[BaseFormat, tuple[Tensor, ...]]:
        return self, (tensors[0][start:stop], tensors[1][start:stop])

    def stored(self, tensors: Sequence[Tensor]) -> Stored | None:
        return Stored("int8", tensors[0], tensors[1])

    def _quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        from bitsandbytes import functional

        half = weight.to(torch.float16)
        codes, scales, _ = functional.int8_vectorwise_quant(half)
        if not bool(scales.isfinite().all()):
            largest = float(weight.abs().max())
            raise RosaError(f"weight holds {largest:.6g}, above float16's 65504, which int8 needs; use base nf4 or keep")
        return codes, scales

    def _dequantize(self, tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        from bitsandbytes import functional

        # Codes times absmax over 127, in float32. In one piece: chunks save temporaries but lose more to thread starts.
        codes, scales = tensors
        return functional.int8_vectorwise_dequant(codes, scales).to(dtype)
