"""The GPUs that kernels are compiled for: what a multiprocessor holds and does in a cycle, by the vendors' documents.

NVIDIA: CUDA C++ Programming Guide, "Compute Capabilities" and "Arithmetic Instructions", and the data sheets of T4, A100 80 GB
SXM, H100 SXM and B200. AMD: CDNA 3 instruction set and white paper, MI300X data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass

from rosa_fx.kernels.inductor_offline import Device


@dataclass(frozen=True)
class Architecture:
    """One kind of GPU. A "multiprocessor" is an SM or a compute unit with four schedulers; memory in bytes.

    mma_rate: multiply-adds in 16-bit floats per multiprocessor and cycle. issue_cycles: cycles that a scheduler is busy with a
    vector instruction. registers: of 32 bits per multiprocessor (AMD: per lane of a SIMD). reserved: shared memory that each
    program costs beside its own. bandwidth in bytes/s, flops in dense 16-bit floats per second.
    """

    name: str
    device: Device
    mma_rate: int
    issue_cycles: int
    registers: int
    shared: int
    reserved: int
    warps: int
    programs: int
    bandwidth: float
    flops: float
    bfloat16: bool = True

    @property
    def amd(self) -> bool:
        return self.device.backend == "hip"


def _nvidia(
    gpu: str,
    arch: int,
    processors: int,
    warps: int,
    programs: int,
    shared_kib: int,
    mma_rate: int,
    bandwidth: float,
    flops: float,
) -> Architecture:
    reserved = 1024 if arch >= 80 else 0
    capability = divmod(arch, 10)
    most = (shared_kib << 10) - reserved
    device = Device(gpu, "cuda", arch, capability, processors, 32, 32 * warps, most, shared_kib << 10)
    return Architecture(
        f"sm_{arch}",
        device,
        mma_rate,
        1,
        65536,
        shared_kib << 10,
        reserved,
        warps,
        programs,
        bandwidth,
        flops,
        bfloat16=arch >= 80,
    )


ARCHITECTURES = {
    item.name: item
    for item in (
        _nvidia("T4", 75, 40, 32, 16, 64, 512, 0.32e12, 65e12),
        _nvidia("A100", 80, 108, 64, 32, 164, 1024, 2.04e12, 312e12),
        _nvidia("H100", 90, 132, 64, 32, 228, 2048, 3.35e12, 989e12),
        _nvidia("B200", 100, 148, 64, 32, 228, 4096, 8.0e12, 2250e12),
        Architecture(
            "gfx942",
            Device("MI300X", "hip", "gfx942", (9, 4), 304, 64, 2048, 64 << 10, 64 << 10),
            mma_rate=1024,
            issue_cycles=4,
            registers=512,
            shared=64 << 10,
            reserved=0,
            warps=32,
            programs=32,
            bandwidth=5.3e12,
            flops=1307e12,
        ),
    )
}

# Time from a load to its data when memory is not busy, in seconds. Microbenchmarks of A100 and H100 agree on 0.3 to 0.6 µs.
LATENCY = 0.5e-6
