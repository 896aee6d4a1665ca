"""Base formats: how the frozen base weight D(Q) of a linear node is stored, and how it is read back.

A format is a small frozen dataclass. It turns a weight [N, K] into a tuple of tensors once (`quantize`) and gives the
dense weight back whenever it is asked (`dequantize`). All codecs are bitsandbytes' own, bit for bit.

To add a format, write one file with a subclass of `BaseFormat` (`kind`, `layout`, `_quantize`, `_dequantize`) and add
one line to `_REGISTRY` below. Its dataclass fields are what `to_dict` stores; fields called `blocksize` and
`double_quant` are filled from the spec by `base_from_spec`.

Codec libraries are imported inside functions only: importing this package costs nothing beyond torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from rosa_fx.errors import RosaError

# kind -> "module:class"; strings, so that a format's file may import this one.
_REGISTRY: dict[str, str] = {
    "dense": "rosa_fx.kernels.bases.dense:DenseFormat",
    "nf4": "rosa_fx.kernels.bases.fourbit:NF4Format",
    "fp4": "rosa_fx.kernels.bases.fourbit:FP4Format",
    "int8": "rosa_fx.kernels.bases.int8:Int8Format",
}

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TensorLayout(NamedTuple):
    """Name, shape and dtype of one tensor that holds a part of D(Q)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class NestedScales(NamedTuple):
    """How the scales of blocks are stored in 8 bits: scale = table[code] · absmax + offset, each rounded to float32.

    table float32 [256]; absmax float32, one for each `blocksize` scales; offset float32 [].
    """

    table: Tensor
    absmax: Tensor
    offset: Tensor
    blocksize: int


class Stored(NamedTuple):
    """How D(Q) [N, K] lies in memory, for kernels that decode it themselves.

    kind "dense": data is the weight; "int8": data int8 [N, K], scales float32 [N], D(Q) = data · scale / 127; "4bit": data
    uint8 with two codes per byte, the first in the high half, scales float32 per block of `blocksize` elements of the flat
    weight, table float32 [16], D(Q) = table[code] · scale. With `nested`, scales holds uint8 codes instead.
    """

    kind: str
    data: Tensor
    scales: Tensor | None = None
    table: Tensor | None = None
    blocksize: int = 0
    nested: NestedScales | None = None


@dataclasses.dataclass(frozen=True)
class BaseFormat(ABC):
    """How D(Q) is stored. Immutable and hashable; holds settings only, never data."""

    kind: ClassVar[str]

    @abstractmethod
    def layout(self, shape: Sequence[int], weight_dtype: torch.dtype = torch.float32) -> tuple[TensorLayout, ...]:
        """The stored tensors of a weight of `shape` = (N, K) which had `weight_dtype`, in order.

        The dtype matters to formats that keep the weight as it is; others ignore it.
        """

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names, in order, of the tensors that hold D(Q)."""
        return tuple(part.name for part in self.layout((1, 1)))

    def nbytes(self, shape: Sequence[int], weight_dtype: torch.dtype = torch.float32) -> int:
        """Resident bytes of D(Q) for a weight of `shape` = (N, K) that had `weight_dtype`."""
        return sum(part.nbytes for part in self.layout(shape, weight_dtype))

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The stored tensors of `weight` [N, K] (float16, bfloat16, float32 or float64; any strides), on its device.

        The result shares no memory with `weight`. Fake and meta tensors give fake and meta tensors.

        Raises RosaError if the weight is not a matrix of a supported dtype, is empty, or holds NaN or infinity.
        """
        if weight.ndim != 2 or weight.numel() == 0:
            raise RosaError(f"weight has shape {tuple(weight.shape)}; a base weight is a non-empty matrix [N, K]")
        if weight.dtype not in WEIGHT_DTYPES:
            raise RosaError(f"weight has dtype {weight.dtype}; cast it to float16, bfloat16, float32 or float64 first")
        weight = weight.detach()
        if _has_no_data(weight):
            parts = self.layout(tuple(weight.shape), weight.dtype)
            return tuple(weight.new_empty(part.shape, dtype=part.dtype) for part in parts)
        if not bool(weight.isfinite().all()):
            raise RosaError("weight contains NaN or infinity; repair or exclude it before it becomes a frozen base")
        return self._quantize(weight.contiguous())

    @torch.no_grad()
    def dequantize(self, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """D(Q): a fresh contiguous tensor of `shape` = (N, K) that the caller may write into.

        `tensors` are those of `quantize`, in order; `dtype` is float16, bfloat16, float32 or float64. float64 is the
        float32 result widened, which is exact: the codecs define D(Q) in float32 (a dense weight is widened or rounded
        from its own dtype). Values beyond the range of `dtype` become infinite. Fake and meta tensors give fake and
        meta tensors.

        Raises RosaError for another dtype or for a number of tensors that does not fit the format.
        """
        if dtype not in WEIGHT_DTYPES:
            raise RosaError(f"a base weight cannot be read as {dtype}; use float16, bfloat16, float32 or float64")
        names = self.tensor_names
        if len(tensors) != len(names):
            raise RosaError(f"{self.kind} needs {len(names)} tensors ({', '.join(names)}), got {len(tensors)}")
        rows, columns = shape
        if any(_has_no_data(tensor) for tensor in tensors):
            return tensors[0].new_empty((rows, columns), dtype=dtype)
        return self._dequantize(tuple(tensors), (int(rows), int(columns)), dtype)

    def read(self, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """D(Q) for reading only: as `dequantize`, but the result may be a stored tensor itself. Never write into it."""
        return self.dequantize(tensors, shape, dtype)

    def plain(self, tensors: Sequence[Tensor]) -> tuple[BaseFormat, tuple[Tensor, ...]]:
        """The same D(Q) in a format whose `part`s cost nothing: what belongs to all rows is decoded here, once."""
        return self, tuple(tensors)

    @abstractmethod
    def part(
        self, tensors: Sequence[Tensor], shape: Sequence[int], start: int, stop: int
    ) -> tuple[BaseFormat, tuple[Tensor, ...]]:
        """Rows [start, stop) of a D(Q) of `shape` as a weight of their own: a format and its tensors, views where possible.

        Takes and gives what `plain` gives.
        """

    def stored(self, tensors: Sequence[Tensor]) -> Stored | None:
        """How the tensors of `quantize` lie in memory; None if kernels have to go through `dequantize`."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": ..., **fields}`, of JSON values; `from_dict` takes it back."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> BaseFormat:
        """The format that `to_dict` described. Raises RosaError for unknown kinds or fields."""
        fields = dict(data)
        if "kind" not in fields:
            raise RosaError(f"a base format needs the field 'kind' (one of {', '.join(_REGISTRY)}), got {dict(data)}")
        return base_format(fields.pop("kind"), **fields)

    @abstractmethod
    def _quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """`quantize` for a contiguous, finite weight with data."""

    @abstractmethod
    def _dequantize(self, tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """`dequantize` for tensors with data and a supported dtype."""


def base_class(kind: str) -> type[BaseFormat]:
    """The class of a kind. Raises RosaError if there is none."""
    if kind not in _REGISTRY:
        raise RosaError(f"base {kind!r} is unknown; use one of {', '.join(_REGISTRY)}")
    module, _, name = _REGISTRY[kind].partition(":")
    return cast(type[BaseFormat], getattr(importlib.import_module(module), name))


def base_format(kind: str, **fields: Any) -> BaseFormat:
    """The format `kind` ("dense", "nf4", "fp4", "int8") with these fields.

    Raises RosaError for unknown kinds and fields.
    """
    cls = base_class(kind)
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        accepted = f"it takes {', '.join(known)}" if known else "it takes none"
        raise RosaError(f"base {kind!r} has no field {', '.join(unknown)}; {accepted}")
    return cls(**fields)


def base_from_spec(kind: str, blocksize: int, double_quant: bool) -> BaseFormat:
    """The format of a spec's `base` ("keep" means dense); fields that the format does not have are left out."""
    kind = "dense" if kind == "keep" else kind
    values: dict[str, Any] = {"blocksize": blocksize, "double_quant": double_quant}
    known = {field.name for field in dataclasses.fields(base_class(kind))}
    return base_format(kind, **{name: value for name, value in values.items() if name in known})


def _has_no_data(tensor: Tensor) -> bool:
    return tensor.is_meta or is_fake(tensor)
