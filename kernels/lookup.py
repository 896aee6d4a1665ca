"""The sixteen values of a 4-bit code, looked up in registers: as a tree of selections, and as byte permutes in PTX.

A table in global memory costs a load per element, in shared memory a bank conflict or two. Here the table is in the
instructions. The tree is portable and exact: 15 selections per code. The permutes are for NVIDIA GPUs: 35 instructions
for the 8 codes in 4 bytes. `prmt` picks four of eight bytes by four selectors of 4 bits, which is what four packed codes
are: two permutes give one byte of the values of codes below and above 8, and the sign bits of the codes choose between them.

A main loop cannot afford those, nor the multiplications and conversions after them. It takes 29 instructions for 8 scaled
weights if the values have 16 bits: 21 look them up as pairs in the order of the weight, 8 scale them in that dtype. Two
things make up for the bits. The scale is split into two numbers of the dtype, so that the product is rounded once. And since
a factor common to all scales is free, the table is stretched by the one that brings it nearest to numbers of the dtype:
that halves the root mean square of the table's rounding for NF4 in bfloat16, and makes FP4 exact.

Permutes, logic and shifts share a pipe of half rate, and with few rows that pipe is the limit. `few_asm` gives it 18 of the 21
instructions of a lookup: it shifts by multiplications, which another pipe does, and chooses between the two halves of the table
by a permute whose selectors one logic instruction makes for all eight codes.
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


# Selectors s and t of the codes in the low and the high half of a register, and masks m0 and m1 of those that are 8 or more:
# a permute with bit 3 of a selector set spreads a byte's sign.
_MASKS = """and.b32 s, {source}, 0x77777777;
shr.u32 t, s, 16;
shl.b32 u, {source}, 4;
prmt.b32 m0, u, {source}, 0xd9c8;
prmt.b32 m1, u, {source}, 0xfbea;"""


def _words(bits: list[int], plane: int) -> list[int]:
    """One byte of the sixteen values, in four registers."""
    data = bytes((word >> 8 * plane) & 0xFF for word in bits)
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, 16, 4)]


def _plane(words: list[str], target: str) -> list[str]:
    """One byte of the values of all eight codes, to `target`0 and `target`1; `words` hold that byte of the sixteen values."""
    lines = []
    for half, selector in enumerate("st"):
        lines += [
            f"prmt.b32 x, {words[0]}, {words[1]}, {selector};",
            f"prmt.b32 y, {words[2]}, {words[3]}, {selector};",
            f"lop3.b32 {target}{half}, m{half}, y, x, 0xca;",
        ]
    return lines


@functools.cache
def stretched(kind: str, dtype: torch.dtype) -> tuple[tuple[float, ...], float]:
    """Sixteen numbers of `dtype` and a factor that multiplies them to the codec's table, as nearly as one factor can.

    Nearest in the sum of squared differences. For float32 the table itself, and 1.
    """
    if dtype == torch.float32:
        return table(kind), 1.0
    values = torch.tensor(table(kind), dtype=torch.float64, device="cpu")
    # A denser search finds nothing better to two digits.
    factors = 1 + torch.arange(1 << 14, dtype=torch.float64, device="cpu")[:, None] / (1 << 14)
    rounded = (values * factors).float().to(dtype).double()
    best = int(((rounded / factors - values) ** 2).sum(dim=1).argmin())
    return tuple(rounded[best].tolist()), 1.0 / float(factors[best])


def _bits(values: tuple[float, ...], dtype: torch.dtype) -> list[int]:
    return [int(value) & 0xFFFF for value in torch.tensor(values, dtype=dtype, device="cpu").view(torch.int16)]


def pair_words(values: tuple[float, ...], dtype: torch.dtype) -> list[int]:
    """The half of `pair_asm`'s table that has to be in registers: an instruction can hold one word of the two it permutes."""
    return [_words(_bits(values, dtype), plane)[i] for plane in (0, 1) for i in (0, 2)]


def pair_asm(values: tuple[float, ...], dtype: torch.dtype) -> str:
    """PTX from one register of four bytes ($4) to their weights in order, a pair of `dtype` for each byte ($0..$3).

    `values` are numbers of `dtype`, which is bfloat16 or float16. $5..$8 hold the scale of each byte, rounded to `dtype`, and
    $9..$12 what the rounding left, both twice in a register: v · high + (v · low) is rounded as v · (high + low) would be.
    $13, $17, $21 and $25 hold `pair_words`.
    """
    bits = _bits(values, dtype)
    suffix = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}[dtype]
    lines = [".reg .b32 s, t, u, m0, m1, x, y, z, p00, p01, p10, p11;", *_MASKS.format(source="$4").splitlines()]
    for plane in (0, 1):
        _, second, _, fourth = (f"0x{word:08x}" for word in _words(bits, plane))
        lines += _plane([f"${13 + 8 * plane}", second, f"${17 + 8 * plane}", fourth], f"p{plane}")
    lines.append("mov.b32 z, 0x80008000;")
    for byte in range(4):
        half = byte // 2
        # Codes lie low half of a byte first; the first weight is in the high half.
        lines += [
            f"prmt.b32 x, p0{half}, p1{half}, {'0x6273' if byte % 2 else '0x4051'};",
            f"fma.rn.{suffix} y, x, ${9 + byte}, z;",
            f"fma.rn.{suffix} ${byte}, x, ${5 + byte}, y;",
        ]
    return "{ " + " ".join(lines) + " }"


def few_words(values: tuple[float, ...], dtype: torch.dtype) -> list[int]:
    """What `few_asm` needs in registers: `pair_words`, factors that shift right by 16 and by 1, and selectors of a permute."""
    return [*pair_words(values, dtype), 1 << 16, 1 << 31, 0x32103210]


def few_asm(values: tuple[float, ...], dtype: torch.dtype, scaled: bool) -> str:
    """As `pair_asm`, with fewer instructions for the pipe of permutes and logic, and `few_words` in registers.

    `scaled`: operands are those of `pair_asm`, $13, $17, ... $37 hold the words. Otherwise the values are not multiplied, there
    are no scales, and $5, $9, ... $29 hold the words.
    """
    bits = _bits(values, dtype)
    words = [f"${at}" for at in range(13 if scaled else 5, 41 if scaled else 33, 4)]
    lines = [
        ".reg .b32 s, t, u, v, x, y, z, p00, p01, p10, p11;",
        "and.b32 s, $4, 0x77777777;",
        # Selectors of bytes 0 to 3 of the lower half of the table, or of 4 to 7, the upper, where bit 3 of the code is set.
        f"mul.hi.u32 u, $4, {words[5]};",
        f"lop3.b32 u, u, 0x44444444, {words[6]}, 0xea;",
        f"mul.hi.u32 t, s, {words[4]};",
        f"mul.hi.u32 v, u, {words[4]};",
    ]
    for plane in (0, 1):
        _, second, _, fourth = (f"0x{word:08x}" for word in _words(bits, plane))
        for half, (codes, choice) in enumerate((("s", "u"), ("t", "v"))):
            lines += [
                f"prmt.b32 x, {words[2 * plane]}, {second}, {codes};",
                f"prmt.b32 y, {words[2 * plane + 1]}, {fourth}, {codes};",
                f"prmt.b32 p{plane}{half}, x, y, {choice};",
            ]
    suffix = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}[dtype]
    if scaled:
        lines.append("mov.b32 z, 0x80008000;")
    for byte in range(4):
        join = f"p0{byte // 2}, p1{byte // 2}, {'0x6273' if byte % 2 else '0x4051'};"
        if scaled:
            lines += [f"prmt.b32 x, {join}", f"fma.rn.{suffix} y, x, ${9 + byte}, z;"]
            lines.append(f"fma.rn.{suffix} ${byte}, x, ${5 + byte}, y;")
        else:
            lines.append(f"prmt.b32 ${byte}, {join}")
    return "{ " + " ".join(lines) + " }"


def permute_asm(values: tuple[float, ...]) -> str:
    """PTX from one register of four bytes ($8) to float32 values: of their high halves ($0..$3) and low halves ($4..$7)."""
    bits = [permuted_value(value) for value in values]
    planes = [f"p{plane}{half}" for plane in PLANES for half in (0, 1)]
    lines = [f".reg .b32 s, t, u, m0, m1, x, y, c01, c23, {', '.join(planes)};", *_MASKS.format(source="$8").splitlines()]
    for plane in PLANES:
        lines += _plane([f"0x{word:08x}" for word in _words(bits, plane)], f"p{plane}")
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
