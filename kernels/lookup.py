"""The sixteen values of a 4-bit code, looked up in registers: as a tree of selections, and as byte permutes in PTX.

A table in global memory costs a load per element, in shared memory a bank conflict or two. Here the table is in the
instructions. The tree is portable and exact: 15 selections per code. The permutes are for NVIDIA GPUs: 35 instructions
for the 8 codes in 4 bytes. `prmt` picks four of eight bytes by four selectors of 4 bits, which is what four packed codes
are: two permutes give one byte of the values of codes below and above 8, and the sign bits of the codes choose between them.
"""

from __future__ import annotations

import functools
import struct

import torch

# Bytes of a float32 that the permutes deliver, from the top: 16 bits of mantissa, far below the rounding to bf16 or fp16.
PLANES = (3, 2, 1)


@functools.cache
def table(kind: str) -> tuple[float, ...]:
    """The values of the codes 0..15 of "nf4" or "fp4", in float32, as the codec defines them."""
    from bitsandbytes import functional

    with torch.inference_mode(False), torch.device("cpu"):
        return tuple(float(value) for value in functional.get_4bit_type(kind, device="cpu"))


def select_tree(values: tuple[float, ...], code: str) -> str:
    """A Triton expression for `values[code]`; `code` names an integer tensor."""
    if len(values) == 1:
        return f"{values[0]!r}"
    half = len(values) // 2
    low, high = (select_tree(part, code) for part in (values[:half], values[half:]))
    return f"tl.where(({code} & {half}) != 0, {high}, {low})"


def permuted_value(value: float) -> int:
    """The bits of the float32 nearest to `value` whose lowest byte repeats the byte above it, as the permutes deliver it."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0] >> 8
    candidates = [((top << 8) | (top & 0xFF)) for top in (bits - 1, bits, bits + 1) if 0 <= top < 1 << 24]
    return min(candidates, key=lambda c: abs(struct.unpack("<f", struct.pack("<I", c))[0] - value))


def permute_asm(values: tuple[float, ...]) -> str:
    """PTX from one register of four bytes ($8) to float32 values: of their high halves ($0..$3) and low halves ($4..$7)."""
    bits = [permuted_value(value) for value in values]
    lines = [
        ".reg .b32 s, t, u, m0, m1, x, y, c01, c23, "
        + ", ".join(f"p{plane}{half}" for plane in PLANES for half in (0, 1))
        + ";",
        "and.b32 s, $8, 0x77777777;",
        "shr.u32 t, s, 16;",
        "shl.b32 u, $8, 4;",
        # 0xff where a code is 8 or more: a permute with bit 3 of a selector set spreads a byte's sign.
        "prmt.b32 m0, u, $8, 0xd9c8;",
        "prmt.b32 m1, u, $8, 0xfbea;",
    ]
    for plane in PLANES:
        data = [(word >> 8 * plane) & 0xFF for word in bits]
        words = [f"0x{int.from_bytes(bytes(data[i : i + 4]), 'little'):08x}" for i in range(0, 16, 4)]
        for half, selector in enumerate("st"):
            lines += [
                f"prmt.b32 x, {words[0]}, {words[1]}, {selector};",
                f"prmt.b32 y, {words[2]}, {words[3]}, {selector};",
                f"lop3.b32 p{plane}{half}, m{half}, y, x, 0xca;",
            ]
    for half in (0, 1):
        # Codes lie low half first: the four of this half are low, high, low, high.
        high, low = 2 * half, 4 + 2 * half
        lines += [
            f"prmt.b32 c01, p2{half}, p3{half}, 0x5140;",
            f"prmt.b32 c23, p2{half}, p3{half}, 0x7362;",
            f"prmt.b32 ${low}, p1{half}, c01, 0x5400;",
            f"prmt.b32 ${high}, p1{half}, c01, 0x7611;",
            f"prmt.b32 ${low + 1}, p1{half}, c23, 0x5422;",
            f"prmt.b32 ${high + 1}, p1{half}, c23, 0x7633;",
        ]
    return "{ " + " ".join(lines) + " }"
