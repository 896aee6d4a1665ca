"""How many programs of a kernel one multiprocessor holds at a time."""

from __future__ import annotations

from rosa_fx.kernels.report.architectures import Architecture


def resident_programs(architecture: Architecture, registers: int, shared: int, warps: int) -> int:
    """Programs (CUDA: blocks) resident per multiprocessor; 0 if one does not fit.

    `registers` per thread, `shared` bytes per program, `warps` per program. Registers are handed out per warp in units of 256
    (NVIDIA), or of 8 per lane of a SIMD that runs at most 8 waves (AMD, vector and accumulation registers together).
    """
    if architecture.amd:
        per_simd = min(8, architecture.registers // max(8, -(registers // -8) * 8))
        by_registers = 4 * per_simd // warps
    else:
        # No thread has more than 255; a scheduler serves every fourth warp and has a quarter of the registers.
        per_warp = max(256, -(registers * 32 // -256) * 256)
        by_registers = 4 * (architecture.registers // 4 // per_warp) // warps if registers <= 255 else 0
    by_shared = architecture.shared // max(shared + architecture.reserved, 1)
    return min(by_registers, by_shared, architecture.warps // warps, architecture.programs)


def warpgroups(programs: int, warps: int) -> float:
    """Resident warpgroups: four warps, one for each scheduler."""
    return programs * warps / 4


def programs_in_flight(architecture: Architecture, resident: int, grid: int) -> int:
    """Programs that run at the same time on the whole GPU."""
    return min(grid, resident * architecture.device.processors)
