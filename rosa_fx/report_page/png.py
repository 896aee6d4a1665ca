"""A mask's picture as a PNG of one colour whose opacity says how many entries a cell holds, so that it fits any background."""

from __future__ import annotations

import base64
import struct
import zlib

from torch import Tensor

COLOUR = (217, 108, 20)  # in the middle between light and dark
LEVELS = 16


def mask_uri(cells: Tensor) -> str:
    """A data URI for counts [H, W]: opacity 0 for an empty cell, full for the fullest one, in 15 steps by square root."""
    counts = cells.double()
    top = float(counts.max()) or 1.0
    levels = ((counts / top).sqrt() * (LEVELS - 1)).ceil().long().clamp(0, LEVELS - 1)
    height, width = levels.shape
    rows = b""
    for row in levels.tolist():
        padded = row + [0] * (width % 2)
        rows += b"\0" + bytes(padded[i] << 4 | padded[i + 1] for i in range(0, len(padded), 2))
    opacity = bytes(round(255 * level / (LEVELS - 1)) for level in range(LEVELS))
    data = b"\x89PNG\r\n\x1a\n"
    data += _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0))  # 4 bits, palette
    data += _chunk(b"PLTE", bytes(COLOUR) * LEVELS) + _chunk(b"tRNS", opacity)
    data += _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
