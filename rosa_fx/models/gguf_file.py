"""A reader for the container part of a GGUF file: metadata and a table of still-quantised tensors.

`gguf.GGUFReader` slices a memory map for every string, which takes ten seconds for a vocabulary of 50,000 tokens; this
one walks the header once and takes a fraction of a second. The codecs stay gguf's own (`gguf.dequantize`).
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 2 and 3, little endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rosa_fx.errors import RosaError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: name, shape in PyTorch's order (slowest dimension first), ggml type and byte range."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensor table of a GGUF file; `dequantize` reads one tensor's data."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor] = field(repr=False)

    def dequantize(self, name: str) -> np.ndarray:
        """The tensor's values, float32 in the tensor's shape; only this tensor's bytes are read from the file."""
        import gguf

        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        raw = np.fromfile(self.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.start)
        rows = raw.reshape(*tensor.shape[:-1], -1)
        if kind == gguf.GGMLQuantizationType.F32:
            return rows.view(np.float32)
        try:
            return gguf.dequantize(rows, kind)
        except NotImplementedError as error:
            raise RosaError(f"{self.path}: tensor {name!r} has type {kind.name}, which gguf cannot dequantise") from error


class _Cursor:
    """Reads values one after the other; running off the end of the file is an error that says so."""

    def __init__(self, data: mmap.mmap | bytes, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0

    def scalar(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack("<" + code, self.take(size))[0]

    def take(self, size: int) -> bytes:
        start, stop = self.position, self.position + size
        if stop > len(self.data):
            raise RosaError(
                f"{self.path}: the GGUF header ends after {len(self.data)} bytes but needs {stop} or more: "
                "the file is truncated or damaged; fetch it again"
            )
        self.position = stop
        return self.data[start:stop]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalar("I"), self.scalar("Q")
            if item in _SCALARS:
                code = _SCALARS[item]
                raw = self.take(struct.calcsize("<" + code) * count)
                return list(struct.unpack(f"<{count}{code}", raw))
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise RosaError(f"{self.path}: metadata value of unknown type {kind}: the file is damaged")
        return self.scalar(_SCALARS[kind])


def read_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file and check that every tensor lies within it. Tensor data is not read.

    Raises RosaError for a file that is no GGUF, of an unknown version, truncated or damaged.
    """
    import gguf

    path = Path(path)
    size = path.stat().st_size
    if size < 24:
        raise RosaError(f"{path}: {size} bytes are too few for a GGUF file: it is truncated; fetch it again")
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        if cursor.take(4) != b"GGUF":
            raise RosaError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise RosaError(f"{path}: GGUF version {version}; versions 2 and 3 (little endian) can be read")
        tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(field_count):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("I"))
        table = []
        for _ in range(tensor_count):
            name = cursor.string()
            dimensions = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))]
            table.append((name, tuple(reversed(dimensions)), cursor.scalar("I"), cursor.scalar("Q")))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        base = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in table:
        try:
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise RosaError(f"{path}: tensor {name!r} has unknown type {kind}: upgrade gguf") from error
        nbytes = int(np.prod(shape, dtype=np.int64)) // block * block_bytes
        if base + offset + nbytes > size:
            raise RosaError(
                f"{path}: tensor {name!r} ends at byte {base + offset + nbytes} but the file has {size} bytes: "
                "it is truncated; fetch it again"
            )
        tensors[name] = GgufTensor(name, shape, kind, base + offset, nbytes)
    return GgufFile(path, metadata, tensors)
