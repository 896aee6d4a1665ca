"""NF4 and FP4 bases with bitsandbytes' codecs (QLoRA, arXiv 2305.14314), with or without double quantisation.

Flat blocks of `blocksize` weights share one float32 absmax; two 4-bit codes go into a byte, the first in the high half.
With double quantisation the absmax values, less their mean, are themselves stored in 8 bits in blocks of 256.

Tensors carry the names of bitsandbytes' `QuantState`; its lookup tables are constants and are not stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rosa_fx.errors import RosaError
from rosa_fx.kernels import lookup
from rosa_fx.kernels.bases.base import BaseFormat, NestedScales, Stored, TensorLayout
from rosa_fx.kernels.bases.dense import DenseFormat

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256

# The largest block that bitsandbytes' CPU kernel decodes itself, and the elements in one of its vectors.
_CPU_BLOCKSIZE = 1024
_CPU_VECTOR = 16


@dataclass(frozen=True)
class FourBitFormat(BaseFormat):
    """What NF4 and FP4 share. blocksize: 32 to 4096, a power of two; double_quant: 8-bit absmax.

    Tensors: `packed` uint8 [ceil(NK / 2), 1] and `absmax` float32 [ceil(NK / blocksize)]; with double_quant `absmax` is
    uint8, followed by `nested_absmax` float32 [ceil(blocks / 256)] and `nested_offset` float32 [].
    """

    blocksize: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.blocksize, bool) or self.blocksize not in BLOCKSIZES:
            raise RosaError(f"blocksize is {self.blocksize!r}; use one of {', '.join(map(str, BLOCKSIZES))}")
        if not isinstance(self.double_quant, bool):
            raise RosaError(f"double_quant is {self.double_quant!r}; use True or False")

    def layout(self, shape: Sequence[int], weight_dtype: torch.dtype = torch.float32) -> tuple[TensorLayout, ...]:
        rows, columns = shape
        blocks = -(rows * columns // -self.blocksize)
        packed = TensorLayout("packed", ((rows * columns + 1) // 2, 1), torch.uint8)
        if not self.double_quant:
            return packed, TensorLayout("absmax", (blocks,), torch.float32)
        return (
            packed,
            TensorLayout("absmax", (blocks,), torch.uint8),
            TensorLayout("nested_absmax", (-(blocks // -NESTED_BLOCKSIZE),), torch.float32),
            TensorLayout("nested_offset", (), torch.float32),
        )

    def _quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        from bitsandbytes import functional

        if weight.dtype == torch.float64:
            weight = weight.float()
            if not bool(weight.isfinite().all()):
                raise RosaError("weight exceeds float32, in which 4-bit scales are stored; rescale it or use base keep")
        # The library builds tables on the default device; make that the weight's own, whatever the caller set.
        with torch.device(weight.device):
            packed, state = functional.quantize_4bit(
                weight, blocksize=self.blocksize, compress_statistics=self.double_quant, quant_type=self.kind
            )
        if not self.double_quant:
            return packed, state.absmax
        return packed, state.absmax, state.state2.absmax, state.offset

    def plain(self, tensors: Sequence[Tensor]) -> tuple[BaseFormat, tuple[Tensor, ...]]:
        if not self.double_quant:
            return self, tuple(tensors)
        return replace(self, double_quant=False), (tensors[0], self.block_scales(tensors))

    def part(
        self, tensors: Sequence[Tensor], shape: Sequence[int], start: int, stop: int
    ) -> tuple[BaseFormat, tuple[Tensor, ...]]:
        packed, absmax = tensors
        columns = shape[1]
        first, last, blocksize = start * columns, stop * columns, self.blocksize
        block, end = first // blocksize, -(last // -blocksize)
        scales = absmax[block:end]
        if first == block * blocksize:
            return self, (packed[first // 2 : (last + 1) // 2], scales)
        # The rows begin inside a block: decode from its beginning and leave out what is before them.
        count = min(end * blocksize, shape[0] * columns) - block * blocksize
        codes = packed[block * blocksize // 2 :][: (count + 1) // 2]
        flat = self.dequantize((codes, scales), (1, count), torch.float32).view(-1)
        return DenseFormat(), (flat[first - block * blocksize :][: last - first].view(stop - start, columns),)

    def block_scales(self, tensors: Sequence[Tensor]) -> Tensor:
        """The absmax of every block, float32 [ceil(NK / blocksize)], read only: decoded if it is double-quantised."""
        if not self.double_quant:
            return tensors[1]
        _, absmax, nested_absmax, offset = tensors
        ops = _ops()
        scales = ops.dequantize_blockwise.default(
            absmax, nested_absmax, _dynamic_map(absmax.device), NESTED_BLOCKSIZE, torch.float32
        )
        return scales.add_(offset)

    def stored(self, tensors: Sequence[Tensor]) -> Stored | None:
        nested = None
        if self.double_quant:
            nested = NestedScales(_dynamic_map(tensors[1].device), tensors[2], tensors[3], NESTED_BLOCKSIZE)
        return Stored("4bit", tensors[0], tensors[1], _table(self.kind), self.blocksize, nested)

    def _dequantize(self, tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        rows, columns = shape
        count = rows * columns
        packed, scales, blocksize = tensors[0], self.block_scales(tensors), self.blocksize
        narrow = torch.float32 if dtype == torch.float64 else dtype
        decode = _ops().dequantize_4bit.default
        if packed.device.type != "cpu":
            return decode(packed, scales, blocksize, self.kind, (rows, columns), narrow).to(dtype)
        # The CPU library's vector kernel looks scales up per row, and takes wrong ones where a row is not whole blocks;
        # for larger blocks than 1024 and for odd rows it compiles a generic kernel per shape instead. A block is also a
        # run of smaller blocks with the same scale, and blocks do not care for rows: so decode a matrix whose rows are
        # whole blocks.
        whole = math.gcd(columns, blocksize, _CPU_BLOCKSIZE)
        if whole == blocksize:
            return decode(packed, scales, blocksize, self.kind, (rows, columns), narrow).to(dtype)
        whole = math.gcd(count, blocksize, _CPU_BLOCKSIZE)
        if whole >= _CPU_VECTOR:
            scales = scales.repeat_interleave(blocksize // whole)[: count // whole]
            out = decode(packed, scales, whole, self.kind, (count // whole, whole), narrow)
        else:
            # One flat row, with the padding code of the last byte where the count is odd; no vectors, no rows.
            if blocksize > _CPU_BLOCKSIZE:
                scales = scales.repeat_interleave(blocksize // _CPU_BLOCKSIZE)
            padded = (count + count % 2,)
            out = decode(packed, scales, min(blocksize, _CPU_BLOCKSIZE), self.kind, padded, narrow).view(-1)[:count]
        return out.view(rows, columns).to(dtype)


class NF4Format(FourBitFormat):
    """4-bit NormalFloat."""

    kind = "nf4"


class FP4Format(FourBitFormat):
    """4-bit float: one sign, two exponent bits and one mantissa bit."""

    kind = "fp4"


def _ops() -> Any:
    # Importing the library registers its operators; the name is looked up here because it exists only then.
    import bitsandbytes  # noqa: F401

    return torch.ops.bitsandbytes


@functools.cache
def _table(kind: str) -> Tensor:
    return torch.tensor(lookup.table(kind), device="cpu")


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    from bitsandbytes import functional

    with torch.inference_mode(False), torch.device("cpu"):
        return functional.create_dynamic_map().to(device)
