"""AMD's machine code, as LLVM's assembler reads it."""

from __future__ import annotations

import re
from typing import NamedTuple

from rosa_fx.kernels.report.assembly import Instruction, Listing

_INSTRUCTION = re.compile(r"^\s+([a-z]\w*)\s*(.*?)\s*(?:;.*)?$")
_LABEL = re.compile(r"^(\.L\w+):")
_LINE = re.compile(r"^\s+\.loc\s+\d+\s+(\d+)\s")


def _macs(opcode: str) -> int:
    """Multiply-adds per wave of v_mfma_f32_32x32x8_bf16 and its like."""
    shape = re.search(r"_(\d+)x(\d+)x(\d+)", opcode)
    if not shape:
        return 0
    m, n, k = map(int, shape.groups())
    return m * n * k


def _loads(opcode: str) -> int:
    match = re.match(r"(?:buffer|global)_load_(\w+)", opcode)
    if not match:
        return 0
    kind = match.group(1)
    words = re.search(r"dword(?:x(\d))?", kind)
    if words:
        return 4 * int(words.group(1) or 1)
    return 2 if "short" in kind or "16" in kind else 1


def parse(text: str) -> Listing:
    """The listing of one kernel, with the lines of its own source file."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    line = 0
    for row in text.splitlines():
        if at := _LINE.match(row):
            line = int(at.group(1))
        elif label := _LABEL.match(row):
            labels[label.group(1)] = len(found)
        elif match := _INSTRUCTION.match(row):
            opcode, operands = match.groups()
            matrix = opcode.startswith(("v_mfma", "v_smfma"))
            found.append(
                Instruction(
                    opcode,
                    operands,
                    line,
                    operands.strip() if opcode.startswith(("s_cbranch", "s_branch")) else "",
                    matrix,
                    _macs(opcode) if matrix else 0,
                    _loads(opcode),
                    opcode.startswith("scratch_"),
                    # Scalar instructions, waits and matrix products are issued beside the vector instructions.
                    vector=opcode.startswith(("v_", "ds_", "buffer_", "global_")) and not matrix,
                )
            )
    return Listing(found, labels)


class Usage(NamedTuple):
    """Registers per lane (vector and accumulation), spilled registers, scratch memory in bytes per lane."""

    registers: int
    spilled: int
    scratch: int


def usage(text: str) -> Usage:
    """What the metadata at the end of the listing says."""

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found.group(1)) if found else 0

    registers = number(r"\.amdhsa_next_free_vgpr (\d+)")
    return Usage(registers, number(r"\.vgpr_spill_count:\s+(\d+)"), number(r"\.private_segment_fixed_size:\s+(\d+)"))
