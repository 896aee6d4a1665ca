"""One row of the report: a kernel in one config on one architecture, as the compiler left it."""

from __future__ import annotations

from dataclasses import dataclass, field

from rosa_fx.kernels.report.architectures import ARCHITECTURES, LATENCY
from rosa_fx.kernels.report.occupancy import programs_in_flight, resident_programs, warpgroups


@dataclass(frozen=True)
class Row:
    """Counts are of the machine code; bytes and registers as the vendors' tools say; nothing is timed.

    kernel, phase, arch, and `default`: whether the heuristics take this config without timing. tile: (rows, outputs, step of
    the sum). mma, instructions, half_rate: matrix instructions, warp instructions, and those of pipes at half rate, per k-step
    of the main loop. stack: bytes per thread; spills: loads and stores of spilled registers. width: bytes per thread of the
    narrowest load of stored weights in the main loop (outside loops where nothing is multiplied), step_bytes: what they bring
    per program and k-step. grid: programs at the size compiled. traffic: bytes moved per weight by count, without and with the
    adapters. opcodes: the most frequent of the kernel; loop_opcodes: those of the vector pipes per k-step, most first.
    dense_ratio: issue pressure over that of Inductor's own mm at the same tile. error: why there is nothing else.
    """

    kernel: str
    phase: str
    arch: str
    config: str
    default: bool
    error: str = ""
    tile: tuple[int, int, int] = (0, 0, 0)
    warps: int = 0
    stages: int = 0
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    mma: int = 0
    mma_opcode: str = ""
    instructions: float = 0
    half_rate: float = 0
    issue_pressure: float | None = None
    pipe_pressure: float | None = None
    width: int | None = None
    step_bytes: int = 0
    grid: int = 0
    traffic: tuple[float, float] | None = None
    dense_ratio: float | None = None
    opcodes: dict[str, int] = field(default_factory=dict)
    loop_opcodes: dict[str, float] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        """Programs resident per multiprocessor."""
        return 0 if self.error else resident_programs(ARCHITECTURES[self.arch], self.registers, self.shared, self.warps)

    @property
    def warpgroups(self) -> float:
        return warpgroups(self.resident, self.warps)

    @property
    def in_flight(self) -> int:
        """Programs that run at a time on the whole GPU."""
        return programs_in_flight(ARCHITECTURES[self.arch], self.resident, self.grid)

    @property
    def pressure(self) -> float | None:
        """The larger of issue and pipe pressure."""
        return None if self.issue_pressure is None else max(self.issue_pressure, self.pipe_pressure or 0)

    @property
    def issue_over_bytes(self) -> float | None:
        """Few rows: time to issue the main loop over time to move its bytes, both at peak. Below 1 bytes are the bound."""
        if self.pressure is None or self.traffic is None:
            return None
        architecture = ARCHITECTURES[self.arch]
        # Pressure is relative to the products of a whole tile, of which few rows are used.
        issue = self.pressure * 2 * self.tile[0] / architecture.flops
        return issue / (self.traffic[0] / architecture.bandwidth)

    @property
    def latency_cover(self) -> float | None:
        """Bytes of packed weights asked for ahead over what memory delivers in one latency. From 1 on it can be kept busy."""
        if not self.step_bytes:
            return None
        architecture = ARCHITECTURES[self.arch]
        ahead = self.in_flight * self.step_bytes * max(self.stages - 1, 1)
        return ahead / (architecture.bandwidth * LATENCY)
