"""Which way of multiplying by a rewritten weight should win, from bytes and FLOPs: a prediction, not a measurement.

For y = x (D(Q) + S)ᵀ + s (x Aᵀ) Bᵀ with x [M, K] in bf16, NF4 with blocks of 64, rank 16, 0.6 % sparse. P: peak rate of
the tensor cores, W: memory bandwidth. A library's product reaches 95 % of P.

    floor       the larger of FLOPs / P and bytes / W, each operand moved once
    fused       the larger of FLOPs / (0.95 P) × max(1, pressure) and bytes / W: the loop also has to issue what decodes;
                and before it S xᵀ: M nnz elements of xᵀ from caches at 2 W, xᵀ and S xᵀ written and read, and the
                longest row, 87 mean ones, 32 entries in 1 µs;
                up to 16 rows, of FLOPs of 16 rows / P × pressure and bytes / W: such a kernel always decodes for 16
    materialise bytes of packed weight, scratch buffer written / W, then a library's product that reads the scratch buffer

`pressure` is that of the compiled default kernels for few and for many rows: the larger of issue and pipe pressure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rosa_fx.kernels.cost import CACHE_RATE, LONGEST, STEP
from rosa_fx.kernels.product import DECODE_ROWS
from rosa_fx.kernels.report.architectures import ARCHITECTURES

PREDICTION = "prediction, not a measurement"
ROWS = (1, 16, 256, 2048, 8192)
DEVICES = {"A100": "sm_80", "H100": "sm_90"}
LIBRARY = 0.95
RANK = 16
DENSITY = 0.006

# Linear weights [N, K] per decoder layer, Touvron et al. 2023 (arXiv 2302.13971, 2307.09288); 70B has 8 key-value heads.
SHAPES = {
    "7B": {"q, k, v, o": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)},
    "70B": {"q, o": (8192, 8192), "k, v": (1024, 8192), "gate, up": (28672, 8192), "down": (8192, 28672)},
}


class Pressures(NamedTuple):
    """Of the compiled kernel for up to 16 rows, and of the one for more."""

    few: float
    many: float


@dataclass(frozen=True)
class Prediction:
    """One product. Bytes, FLOPs; times in seconds; `wins` is "fused" or "materialise"."""

    moved: float
    flops: float
    floor: float
    fused: float
    materialise: float
    wins: str
    why: str


def predict(n: int, k: int, m: int, device: str, pressure: Pressures) -> Prediction:
    """The forward product of M rows with a weight [N, K] on "A100" or "H100"."""
    architecture = ARCHITECTURES[DEVICES[device]]
    weights = n * k
    packed = weights * (0.5 + 4 / 64)
    adapters = RANK * (n + k) * 4 + DENSITY * weights * 8 + (n + 1) * 4
    activations = 2 * m * (n + k)
    flops = 2.0 * m * weights + 2.0 * m * RANK * (n + k) + 2.0 * m * DENSITY * weights
    moved = packed + adapters + activations
    memory, compute = moved / architecture.bandwidth, flops / architecture.flops
    if m <= DECODE_ROWS:
        loop = 2.0 * DECODE_ROWS * weights / architecture.flops * pressure.few
        gather = 0.0
    else:
        loop = compute / LIBRARY * max(1.0, pressure.many)
        gather = m * (2 * DENSITY * weights / CACHE_RATE + 4 * (n + k)) / architecture.bandwidth
        gather += STEP * LONGEST * DENSITY * k / 32
    fused = max(memory, loop) + gather
    dense = 2.0 * weights
    decode = (packed + adapters + dense) / architecture.bandwidth
    multiply = max((dense + activations) / architecture.bandwidth, compute / LIBRARY)
    materialise = decode + multiply
    return Prediction(
        moved,
        flops,
        max(memory, compute),
        fused,
        materialise,
        "fused" if fused <= materialise else "materialise",
        _why(memory, loop, gather, multiply, decode, m <= DECODE_ROWS, fused <= materialise),
    )


def _why(memory: float, loop: float, gather: float, multiply: float, decode: float, few: bool, fused: bool) -> str:
    """In words. multiply: what the product from the scratch buffer takes, decode: what making the buffer does."""
    if few and memory >= loop:
        return "bound by bytes; a scratch buffer moves 8 times as many"
    if few:
        bound = "bound by issuing what decodes"
        return f"{bound}, in less time than a scratch buffer's bytes" if fused else f"{bound}; a scratch buffer takes less"
    cost = max(max(memory, loop) + gather - multiply, 0.0)
    less, more = sorted((cost, decode))
    ratio = f"{1e6 * less:.3g} µs < {1e6 * more:.3g} µs"
    first, second = ("S xᵀ beside the loop", "a scratch buffer") if fused else ("a scratch buffer", "S xᵀ beside the loop")
    return f"{first} costs less than {second}: {ratio}"


def table(pressures: Mapping[str, Pressures]) -> Iterator[Sequence[str]]:
    """Rows of text, under `HEAD`. `pressures` of the fused NF4 kernel, by name of the device."""
    for model, shapes in SHAPES.items():
        for label, (n, k) in shapes.items():
            for device in DEVICES:
                for m in ROWS:
                    found = predict(n, k, m, device, pressures[device])
                    yield [
                        f"{model} {label} [{n}, {k}]",
                        device,
                        str(m),
                        f"{found.moved / 1e6:.1f}",
                        f"{found.flops / 1e9:.2f}",
                        *(f"{1e6 * time:.1f}" for time in (found.floor, found.fused, found.materialise)),
                        f"{found.wins}: {found.why}",
                    ]


HEAD = ("weight [N, K]", "GPU", "M", "MB", "GFLOP", "floor µs", "fused µs", "materialise µs", "expected to win, and why")
