"""Why a kernel misses a limit, from the figures that its machine code gives."""

from __future__ import annotations

from rosa_fx.kernels.report.architectures import ARCHITECTURES
from rosa_fx.kernels.report.occupancy import resident_programs
from rosa_fx.kernels.report.rows import Row
from rosa_fx.kernels.report.sass import HALF_RATE

# A weight in 16 bits, which is what a kernel for few rows moves where nothing is quantised.
_DENSE_BYTES = 2.0


def of_issue(row: Row) -> str:
    """Which pipe takes longer than memory, with how many instructions for a weight, and what that leaves of a dense product."""
    over, pressure = row.issue_over_bytes, row.pressure
    if over is None or pressure is None or row.traffic is None:
        return "nothing is known of its loop"
    lanes = 32 * row.warps / (row.tile[1] * row.tile[2])
    issued = row.instructions * lanes
    if (row.pipe_pressure or 0) > (row.issue_pressure or 0):
        count, shown = row.half_rate * lanes, [item for item in row.loop_opcodes.items() if item[0] in HALF_RATE]
        share = over * (row.issue_pressure or 0) / pressure
        name, others = "the half-rate integer pipe", f" (all {issued:.1f} are issued in {share:.2f} of it)"
    else:
        count, shown, name, others = issued, list(row.loop_opcodes.items()), "issuing", ""
    most = ", ".join(f"{opcode} {number:.0f}" for opcode, number in shown[:5])
    dense = over * row.traffic[0] / _DENSE_BYTES
    return (
        f"{name} has {count:.1f} instructions for each weight, of which memory leaves time for {count / over:.1f}{others}; "
        f"per warp and step of {row.tile[1]}×{row.tile[2]} weights: {most}. "
        f"That is {dense:.2f} of the time in which memory delivers a weight in 16 bits"
    )


def of_warpgroups(row: Row) -> str:
    """Whether registers or shared memory keep a second program from being resident."""
    architecture = ARCHITECTURES[row.arch]
    by_registers = resident_programs(architecture, row.registers, 0, row.warps)
    if by_registers <= row.resident:
        return f"{row.registers} registers for each of {32 * row.warps} threads leave room for {by_registers} programs"
    return (
        f"{row.stages} stages take {row.shared / 1024:.0f} KiB of {architecture.shared >> 10} KiB of shared memory; "
        f"registers alone would let {by_registers} programs in"
    )


def of_cover(row: Row) -> str:
    """Whether the weight has no more tiles, or multiprocessors hold no more programs; and what each asks for."""
    architecture = ARCHITECTURES[row.arch]
    ahead = f"each asks for {row.stages - 1} steps of {row.step_bytes / 1024:g} KiB ahead, in {row.shared / 1024:.0f} KiB"
    if row.in_flight == row.grid:
        return f"a weight of 4096×4096 has {row.grid} tiles for {architecture.device.processors} multiprocessors; {ahead}"
    return f"a multiprocessor holds {row.resident} programs; {ahead}"
