"""The limits that compiled kernels are held to. `missed` names each that a table of rows does not keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rosa_fx.kernels.report import reasons
from rosa_fx.kernels.report.rows import Row

# Issue pressure of NF4 at the default training config, by architecture.
PRESSURE = {"sm_80": 0.75, "sm_90": 0.55}
DENSE_RATIO = 1.15
WARPGROUPS = 2.0
# Bytes per weight that a decode kernel moves, adapters not counted: 4 bits, a scale in 64, x and y of 16 rows.
TRAFFIC = 0.58
# Widths of loads of packed weights, bytes per thread.
TRAINING_WIDTH = 8
DECODE_WIDTH = 16
# Share of a memory latency's bytes that a decode kernel keeps under way.
LATENCY_COVER = 1.0
# Time to issue a decode kernel's loop over time to move its bytes.
ISSUE_OVER_BYTES = 1.0


def missed(rows: Iterable[Row], pressure_bar: frozenset[str]) -> list[str]:
    """A sentence per limit that a row misses, with its reason where machine code tells one.

    `pressure_bar`: names of kernels that the limits on issue pressure hold for.
    Every config has to compile without spills. The others hold for the config that is taken without timing, on NVIDIA GPUs:
    configs beside it exist for autotuning to refuse.
    """
    return [f"{row.arch}: {row.kernel} ({row.config}): {text}" for row in rows for text in _of(row, pressure_bar)]


def _of(row: Row, pressure_bar: frozenset[str]) -> Iterator[str]:
    if row.error:
        yield f"does not compile: {row.error}"
        return
    if row.spills or row.stack:
        yield f"spills: {row.stack} bytes of stack per thread, {row.spills} loads and stores of spilled registers"
    if row.resident == 0:
        yield f"does not fit: {row.registers} registers × {row.warps} warps, {row.shared} bytes of shared memory"
    if not row.default or row.arch not in ("sm_80", "sm_90", "sm_100"):
        return
    limit = PRESSURE.get(row.arch)
    if row.kernel in pressure_bar and limit is not None and (row.issue_pressure is None or row.issue_pressure > limit):
        shown = "unknown" if row.issue_pressure is None else f"{row.issue_pressure:.2f}"
        yield f"issue pressure {shown}, limit {limit:.2f}"
    if row.dense_ratio is not None and row.dense_ratio > DENSE_RATIO:
        yield f"{row.dense_ratio:.2f} times the issue pressure of Inductor's own product, limit {DENSE_RATIO:.2f}"
    if row.warpgroups < WARPGROUPS:
        yield (
            f"{row.warpgroups:g} resident warpgroups per multiprocessor, at least {WARPGROUPS:g} wanted: "
            f"{reasons.of_warpgroups(row)}"
        )
    yield from _loads(row)


def _loads(row: Row) -> Iterator[str]:
    width = DECODE_WIDTH if row.phase == "decode" else TRAINING_WIDTH
    if row.width is not None and row.width < width:
        yield f"stored weights are loaded {row.width} bytes wide, at least {width} wanted"
    if row.phase != "decode" or row.traffic is None:
        return
    if row.kernel.split(",")[0].endswith(("nf4", "fp4", "double quant")) and row.traffic[0] > TRAFFIC:
        yield f"{row.traffic[0]:.3f} bytes moved per weight, limit {TRAFFIC}"
    if row.issue_over_bytes is not None and row.issue_over_bytes > ISSUE_OVER_BYTES:
        share = f"{row.issue_over_bytes:.2f} times as long as moving the bytes"
        yield f"issuing takes {share}, limit {ISSUE_OVER_BYTES:g}: {reasons.of_issue(row)}"
    if row.latency_cover is not None and row.latency_cover < LATENCY_COVER:
        share = f"{row.latency_cover:.2f} of a latency's bytes"
        yield f"{row.in_flight} programs in flight ask for {share}, limit {LATENCY_COVER:g}: {reasons.of_cover(row)}"
