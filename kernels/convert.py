"""Signed bytes as 16-bit floats, in PTX: two integer instructions and one addition for two codes, without conversions.

A number of bfloat16 in [128, 256) has a unit of 1 in its last place: 0x4300 + l is 128 + l for 7 bits l. A byte is l - 128 h
with h its highest bit, and -128 - 128 h is 0xc300 + 0x80 h: the sum of the two is the byte, exactly. float16 has 10 bits:
0x6400 + u is 1024 + u for the byte u with its highest bit turned, from which 1152 is subtracted.
"""

from __future__ import annotations

import torch


def byte_asm(dtype: torch.dtype, scaled: bool) -> str:
    """PTX from one register of four signed bytes ($2) to two of pairs of `dtype` ($0, $1), in order.

    `scaled`: bytes are multiplied by the scale that $3 holds rounded to `dtype` and $7 what that rounding left, each twice in a
    register: b · high + (b · low) is rounded as b · (high + low) would be.
    """
    suffix = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}[dtype]
    one = {torch.bfloat16: "0x3f803f80", torch.float16: "0x3c003c00"}[dtype]
    lines = [".reg .b32 a, c, o, z;", f"mov.b32 o, {one};", "mov.b32 z, 0x80008000;"]
    for pair in (0, 1):
        lines.append(f"prmt.b32 a, $2, 0, {'0x4342' if pair else '0x4140'};")
        if dtype == torch.bfloat16:
            # "a & b | c", bit by bit.
            lines += ["lop3.b32 c, a, 0x00800080, 0xc300c300, 0xea;", "lop3.b32 a, a, 0x007f007f, 0x43004300, 0xea;"]
        else:
            # "(a ^ b) | c".
            lines += ["mov.b32 c, 0xe480e480;", "lop3.b32 a, a, 0x00800080, 0x64006400, 0xbe;"]
        target = "a" if scaled else f"${pair}"
        lines.append(f"fma.rn.{suffix} {target}, a, o, c;")
        if scaled:
            lines += [f"fma.rn.{suffix} c, a, $7, z;", f"fma.rn.{suffix} ${pair}, a, $3, c;"]
    return "{ " + " ".join(lines) + " }"
