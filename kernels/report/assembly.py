"""Machine code as a list of instructions, and its main loop: what NVIDIA's and AMD's listings have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """`opcode` with its modifiers ("LDGSTS.E.BYPASS.128"), the rest of the line, the source line, and what it means.

    macs: multiply-adds of a matrix instruction per warp, 0 for others (and for those whose listing does not say: `matrix`).
    loads: bytes per thread loaded from global memory. vector: whether it takes a scheduler's slot of the vector pipes.
    """

    opcode: str
    operands: str
    line: int = 0
    target: str = ""
    matrix: bool = False
    macs: int = 0
    loads: int = 0
    spill: bool = False
    vector: bool = True
    half_rate: bool = False

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Listing:
    """Instructions in order, and the index that each label stands before."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]

    def main_loop(self) -> Sequence[Instruction]:
        """The loop with most matrix instructions, and of those the shortest; empty if no loop has any."""
        best: Sequence[Instruction] = ()
        most = 0
        for index, instruction in enumerate(self.instructions):
            start = self.labels.get(instruction.target, index + 1)
            if start > index:
                continue
            body = self.instructions[start : index + 1]
            count = sum(item.matrix for item in body)
            if count > most or (count and count == most and len(body) < len(best)):
                best, most = body, count
        return best

    def matrix_instructions(self) -> int:
        return sum(item.matrix for item in self.instructions)

    def spills(self) -> int:
        """Loads and stores of spilled registers."""
        return sum(item.spill for item in self.instructions)

    def opcodes(self) -> Counter[str]:
        return Counter(item.base for item in self.instructions)


def steps(loop: Sequence[Instruction], tile_macs: int, warps: int, loaded: int, tile_bytes: int) -> int:
    """How many k-steps of a tile one turn of the loop does.

    `tile_macs` multiply-adds and `tile_bytes` of weights make a step; `loaded` bytes of weights are loaded per turn. Small
    tiles are multiplied or loaded by several warps at once, so the smaller count is right. 1 where neither is known.
    """
    counts = [sum(item.macs for item in loop) * warps / tile_macs if tile_macs else 0, loaded / tile_bytes if tile_bytes else 0]
    return max(1, round(min((count for count in counts if count), default=1)))


def pressure(issued: float, warps: int, tile_macs: int, mma_rate: int, issue_cycles: int) -> float:
    """Issue pressure: warp instructions per k-step over those that four schedulers issue while the tensor cores work.

    `issued` per warp and k-step, `tile_macs` multiply-adds of a k-step, `mma_rate` of them per cycle. Below about 0.6 the
    instructions hide behind the tensor cores; near or above 1 issuing them is what the kernel takes.
    """
    return issued * issue_cycles * warps / (4 * tile_macs / mma_rate)


def loads_at(loop: Sequence[Instruction], lines: set[int]) -> list[int]:
    """Bytes per thread of each load from global memory that stands on one of these source lines."""
    return [item.loads for item in loop if item.loads and item.line in lines]
