"""The table lookups that GPUs do by byte permutes, as their instructions are defined."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import pytest
import torch

from rosa_fx.kernels.convert import byte_asm
from rosa_fx.kernels.lookup import few_asm, few_words, pair_asm, pair_words, permute_asm, select_tree, stretched, table


def prmt(a: int, b: int, selectors: int) -> int:
    """PTX's prmt.b32: four bytes of the eight in b:a; bit 3 of a selector spreads the sign of its byte."""
    data = [((b << 32 | a) >> 8 * i) & 0xFF for i in range(8)]
    out = 0
    for i in range(4):
        selector = selectors >> 4 * i & 0xF
        byte = data[selector & 7]
        if selector & 8:
            byte = 0xFF if byte & 0x80 else 0
        out |= byte << 8 * i
    return out


def fma(dtype: torch.dtype) -> Callable[[int, int, int], int]:
    """fma.rn.bf16x2 or f16x2: two products of 16 bits in a register and two summands, each rounded once."""

    def pair(word: int) -> torch.Tensor:
        bits = [half - (half >> 15 << 16) for half in (word & 0xFFFF, word >> 16)]
        return torch.tensor(bits, dtype=torch.int16).view(dtype).double()

    def run(a: int, b: int, c: int) -> int:
        # Exact in float64, but for a summand so small that it cannot matter to the rounding.
        exact = pair(a) * pair(b) + pair(c)
        low, high = (int(half) & 0xFFFF for half in exact.to(dtype).view(torch.int16))
        return high << 16 | low

    return run


def run_ptx(source: str, inputs: dict[str, int], outputs: int = 8) -> list[int]:
    """Registers $0 to $`outputs - 1` after the instructions of `permute_asm` or `pair_asm`."""
    registers = dict(inputs)

    def read(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    instructions: dict[str, Callable[..., int]] = {
        "and.b32": lambda a, b: a & b,
        "mul.hi.u32": lambda a, b: a * b >> 32,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
        "prmt.b32": prmt,
        "mov.b32": lambda a: a,
        "fma.rn.bf16x2": fma(torch.bfloat16),
        "fma.rn.f16x2": fma(torch.float16),
        # Bit by bit, the table 0xca is "a ? b : c", 0xea "a & b | c" and 0xbe "(a ^ b) | c".
        "lop3.b32": lambda a, b, c, truth: {0xCA: (a & b) | (~a & c) & 0xFFFFFFFF, 0xEA: (a & b) | c, 0xBE: (a ^ b) | c}[truth],
    }
    for line in source.strip("{} ").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            name, operands = line.strip().split(" ", 1)
            target, *sources = [operand.strip() for operand in operands.split(",")]
            registers[target] = instructions[name](*(read(operand) for operand in sources))
    return [registers[f"${i}"] for i in range(outputs)]


def as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_byte_permutes_look_up_every_code(kind: str) -> None:
    """Each byte in each of the four places: 16 bits of mantissa, and exact where the codec is (0, ±1, halves)."""
    values, source = table(kind), permute_asm(table(kind))
    for byte in range(256):
        others = (0x00, 0x7E, 0xF1, 0x98)
        for place in range(4):
            packed = [byte if i == place else other for i, other in enumerate(others)]
            found = [as_float(bits) for bits in run_ptx(source, {"$8": int.from_bytes(bytes(packed), "little")})]
            wanted = [values[b >> 4] for b in packed] + [values[b & 15] for b in packed]
            for got, want in zip(found, wanted, strict=True):
                assert abs(got - want) <= 2.0**-16 * abs(want)
                assert got == want or want not in (0.0, 1.0, -1.0, 0.5, 0.25)


def instructions(source: str) -> int:
    return len(re.findall(r"\b(?:and|shr|shl|prmt|lop3|fma)\.", source))


def test_permutes_are_few() -> None:
    """Instructions for eight codes, as the cost model counts: 35 to look them up, 29 to look up and scale pairs."""
    assert instructions(permute_asm(table("nf4"))) == 35
    for dtype in (torch.bfloat16, torch.float16):
        assert instructions(pair_asm(stretched("nf4", dtype)[0], dtype)) == 29


def half_table(values: tuple[float, ...], dtype: torch.dtype) -> dict[str, int]:
    """The registers in which `pair_asm` expects the words of its table that are no constants of its own."""
    return dict(zip(("$13", "$17", "$21", "$25"), pair_words(values, dtype), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_pairs_are_the_tree_in_order(kind: str, dtype: torch.dtype) -> None:
    """All 256 bytes in each place: with a scale of 1, bit by bit what the tree of selections gives to the other devices."""
    values = stretched(kind, dtype)[0]
    assert torch.tensor(values, dtype=torch.float64).to(dtype).tolist() == list(values)
    bits = [int(value) & 0xFFFF for value in torch.tensor(values, dtype=dtype).view(torch.int16)]
    one = int(torch.ones((), dtype=dtype).view(torch.int16)) * 0x10001
    source = pair_asm(values, dtype)
    scales = {f"${i}": one for i in range(5, 9)} | {f"${i}": 0 for i in range(9, 13)} | half_table(values, dtype)
    for byte in range(256):
        packed = [byte, byte ^ 0x5A, (byte * 7) & 0xFF, 255 - byte]
        packed = packed[byte % 4 :] + packed[: byte % 4]
        found = run_ptx(source, {"$4": int.from_bytes(bytes(packed), "little")} | scales, 4)
        for pair, code in zip(found, packed, strict=True):
            assert (pair & 0xFFFF, pair >> 16) == (bits[code >> 4], bits[code & 15])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_few_rows_look_up_the_same_pairs(kind: str, dtype: torch.dtype) -> None:
    """All 256 bytes in each place: bit by bit what `pair_asm` makes of them, with scales and, for a scale of 1, without any."""
    values = stretched(kind, dtype)[0]
    words = few_words(values, dtype)
    one, high, low = (int(torch.tensor(v, dtype=dtype).view(torch.int16)) & 0xFFFF for v in (1.0, 0.777, 0.0013))
    ones, scales = (
        {f"${i}": a * 0x10001 for i in range(5, 9)} | {f"${i}": b * 0x10001 for i in range(9, 13)}
        for a, b in ((one, 0), (high, low))
    )
    known, scaled, plain = pair_asm(values, dtype), few_asm(values, dtype, True), few_asm(values, dtype, False)
    after_scales, at_once = ({f"${first + 4 * i}": word for i, word in enumerate(words)} for first in (13, 5))
    for byte in range(256):
        packed = [byte, byte ^ 0x5A, (byte * 7) & 0xFF, 255 - byte]
        codes = {"$4": int.from_bytes(bytes(packed[byte % 4 :] + packed[: byte % 4]), "little")}
        table_words = half_table(values, dtype)
        assert run_ptx(plain, codes | at_once, 4) == run_ptx(known, codes | ones | table_words, 4)
        assert run_ptx(scaled, codes | scales | after_scales, 4) == run_ptx(known, codes | scales | table_words, 4)


def test_few_rows_spare_the_pipe_of_permutes() -> None:
    """Of eight codes: 18 permutes and logic instructions where there were 20, not counting a shift on either side."""
    slow = re.compile(r"\b(?:and|prmt|lop3)\.")
    for dtype in (torch.bfloat16, torch.float16):
        values = stretched("nf4", dtype)[0]
        assert len(slow.findall(pair_asm(values, dtype))) == 19
        assert len(slow.findall(few_asm(values, dtype, False))) == 18
        assert not re.search(r"\bsh[lr]\.", few_asm(values, dtype, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_pairs_are_rounded_once(dtype: torch.dtype) -> None:
    """Against the exact product of value and scale: half a unit in the last place, and what splitting the scale may leave."""
    values, factor = stretched("nf4", dtype)
    source, step = pair_asm(values, dtype), torch.finfo(dtype).eps
    for scale in (0.0312, 1.0, 0.777, 3.1415, 0.0009):
        exact = torch.tensor(scale * factor, dtype=torch.float32)
        high = exact.to(dtype)
        low = (exact - high.float()).to(dtype)
        words = [(int(part.view(torch.int16)) & 0xFFFF) * 0x10001 for part in (high, low)]
        scales = {f"${i}": words[0] for i in range(5, 9)} | {f"${i}": words[1] for i in range(9, 13)}
        scales |= half_table(values, dtype)
        for code in range(16):
            found = run_ptx(source, {"$4": code * 0x11111111} | scales, 4)[0] & 0xFFFF
            got = float(torch.tensor(found - (found >> 15 << 16), dtype=torch.int16).view(dtype))
            want = values[code] * float(exact)
            assert abs(got - want) <= step / 2 * abs(want) * (1 + 4 * step) + float(torch.finfo(dtype).smallest_normal) * step


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.6), ("fp4", 1e-3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stretching_the_table_makes_up_for_its_rounding(kind: str, share: float, dtype: torch.dtype) -> None:
    """The share that is left of the root mean square of rounding the table as it is."""
    exact = torch.tensor(table(kind), dtype=torch.float64)
    values, factor = stretched(kind, dtype)
    left = (torch.tensor(values, dtype=torch.float64) * factor - exact).square().mean().sqrt()
    assert left <= share * (exact.to(dtype).double() - exact).square().mean().sqrt()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_select_tree_is_the_table(kind: str) -> None:
    class Language:
        where = staticmethod(lambda condition, yes, no: yes if condition else no)

    tree = compile(select_tree(table(kind), "code"), "tree", "eval")
    assert [eval(tree, {"tl": Language, "code": code}) for code in range(16)] == list(table(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bytes_are_exact(dtype: torch.dtype) -> None:
    """All 256 bytes in each place; with a scale, what float32 makes of the product, rounded once."""
    scale = torch.tensor(0.0123456, dtype=torch.float32)
    high = scale.to(dtype)
    low = (scale - high.float()).to(dtype)
    words = {f"${at}": (int(part.view(torch.int16)) & 0xFFFF) * 0x10001 for at, part in ((3, high), (7, low))}
    for byte in range(256):
        packed = bytes([byte, byte ^ 0x5A, (byte * 7) & 0xFF, 255 - byte])
        wanted = torch.tensor(list(packed), dtype=torch.uint8).view(torch.int8)
        register = {"$2": int.from_bytes(packed, "little")}
        for scaled, exact in ((False, wanted.float()), (True, wanted.float() * (high.float() + low.float()))):
            pairs = run_ptx(byte_asm(dtype, scaled), register | (words if scaled else {}), 2)
            bits = [half for pair in pairs for half in (pair & 0xFFFF, pair >> 16)]
            found = torch.tensor([b - (b >> 15 << 16) for b in bits], dtype=torch.int16).view(dtype)
            step = torch.finfo(dtype).eps
            assert ((found.float() - exact).abs() <= (step / 2 * (1 + 4 * step) * exact.abs() if scaled else 0)).all()
