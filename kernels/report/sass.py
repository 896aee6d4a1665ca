"""NVIDIA's machine code, as `nvdisasm -c -g` prints it."""

from __future__ import annotations

import re

from rosa_fx.errors import RosaError
from rosa_fx.kernels.report.assembly import Instruction, Listing

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*(?:\}\s*)?;?\s*$")
_LABEL = re.compile(r"^(\.L\w+):")
_LINE = re.compile(r'^\s*//## File "(.*?)", line (\d+)')
_MATRIX = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA", "QMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA", "OMMA")

# Pipes with 16 lanes per scheduler: a warp takes two cycles. (Guide, throughput of 64 results per cycle and multiprocessor.)
_CONVERSIONS = ("F2F", "F2FP", "F2I", "I2F", "I2FP", "I2I")
_LOGIC = ("BMSK", "LOP3", "PLOP3", "PRMT", "SGXT", "SHF")
_ADD_COMPARE_SELECT = ("FMNMX", "FSEL", "FSETP", "IADD3", "IMNMX", "ISETP", "LEA", "SEL", "VIADD", "VIMNMX")
HALF_RATE = frozenset((*_CONVERSIONS, *_LOGIC, *_ADD_COMPARE_SELECT))


def _macs(opcode: str) -> int:
    """Multiply-adds per warp of HMMA.16816 or HGMMA.64x128x16 (four warps together); 0 if the opcode does not say."""
    wide = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
    if wide:
        m, n, k = map(int, wide.groups())
        return m * n * k // 4
    narrow = re.search(r"MMA\.(?:SP\.)?(\d+)", opcode)
    shapes = {"1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32, "884": 8 * 8 * 4, "8816": 8 * 8 * 16}
    return shapes.get(narrow.group(1), 0) if narrow else 0


def _loads(opcode: str) -> int:
    """Bytes per thread that a load from global memory brings; 0 for other instructions."""
    if not re.match(r"(LDG|LDGSTS)(\.|$)", opcode):
        return 0
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((size for part, size in widths.items() if part in opcode.split(".")), 4)


def parse(text: str, file: str = "") -> Listing:
    """The listing of one kernel. Lines count for instructions whose innermost source file's name ends with `file`."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    line = 0
    for row in text.splitlines():
        if at := _LINE.match(row):
            line = int(at.group(2)) if at.group(1).endswith(file) else 0
        elif label := _LABEL.match(row):
            labels[label.group(1)] = len(found)
        elif match := _INSTRUCTION.match(row):
            predicate, opcode, operands = match.groups()
            base = opcode.split(".")[0]
            target = re.search(r"`\((\.L\w+)\)", operands) if base in ("BRA", "BRX", "JMP", "JMX") else None
            matrix = base in _MATRIX
            loads = _loads(opcode)
            # A masked load is written as lines of PTX, one for each register that it may leave 0, and LLVM counts them.
            shift = loads // 4 - 1 if predicate and base == "LDG" and loads > 4 and line else 0
            found.append(
                Instruction(
                    opcode,
                    operands,
                    line - shift,
                    target.group(1) if target else "",
                    matrix,
                    _macs(opcode) if matrix else 0,
                    loads,
                    base in ("LDL", "STL"),
                    half_rate=base in HALF_RATE,
                )
            )
    return Listing(found, labels)


def usage(text: str) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as `cuobjdump -res-usage` prints them."""
    registers, stack = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK"))
    if registers is None or stack is None:
        raise RosaError(f"cuobjdump printed no resource usage: {text.strip()[:200]!r}; is its version that of ptxas?")
    return int(registers.group(1)), int(stack.group(1))
