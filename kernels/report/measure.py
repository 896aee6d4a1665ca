"""Compile a kernel for an architecture in every config that the heuristics offer, and read what the compiler made of it."""

from __future__ import annotations

import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rosa_fx.kernels import inductor_offline as offline
from rosa_fx.kernels import lowering
from rosa_fx.kernels.report import amdgcn, assembly, sass, tools
from rosa_fx.kernels.report.architectures import Architecture
from rosa_fx.kernels.report.kernels import SIDE, Kernel, operand_dtype
from rosa_fx.kernels.report.rows import Row
from rosa_fx.kernels.report.source_lines import entry_lines, load_lines


@dataclass
class _Pick:
    """Takes choice number `wanted` of the product of that name, and a library's kernel or the first for every other."""

    product: str
    wanted: int
    count: int = 0

    def __call__(self, name: str, choices: Sequence[Any]) -> Any:
        templates = [choice for choice in choices if offline.is_template(choice)]
        if name.startswith(self.product) and templates:
            self.count = len(templates)
            return templates[self.wanted]
        return next((choice for choice in choices if not offline.is_template(choice)), choices[0])


def measure(kernel: Kernel, architecture: Architecture, only_default: bool = False) -> Iterator[Row]:
    """A row per config, best first as the heuristics order them. What does not compile is a row with an error."""
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    number, count = 0, 1
    while number < count:
        pick = _Pick(kernel.product, number)
        try:
            with ExitStack() as stack:
                stack.enter_context(offline.present(architecture.device))
                stack.enter_context(kernel.lowering())
                lowering.register()
                yield _row(kernel, architecture, _found(kernel, architecture, pick), number == 0)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            yield Row(kernel.name, kernel.phase, architecture.name, f"choice {number}", number == 0, error=text)
        count = pick.count if kernel.every_config and not only_default else 1
        number += 1


def _found(kernel: Kernel, architecture: Architecture, pick: _Pick) -> offline.Kernel:
    if kernel.launched is not None:
        return kernel.launched(architecture)
    assert kernel.graph is not None
    module = offline.generate(*kernel.graph(architecture), pick)
    (found,) = [item for item in offline.kernels(module) if item.is_template and kernel.marker in item.source]
    return found


def _number(constants: dict[str, str], name: str) -> int:
    value = constants.get(name, "0")
    return int(value) if re.fullmatch(r"\d+", value) else 0


def _row(kernel: Kernel, architecture: Architecture, found: offline.Kernel, default: bool) -> Row:
    constants = found.constants()
    m, n, k = (_number(constants, f"BLOCK_{axis}") for axis in "MNK")
    tile = (m, k, n) if constants.get("TRANSPOSED") == "True" else (m, n, k)
    lines = load_lines(found.source)
    at = set().union(*(lines.get(name, set()) for name in kernel.packed))
    row, packed = _compiled(found, architecture, tile, at, kernel.bits)
    row = replace(
        row,
        kernel=kernel.name,
        phase=kernel.phase,
        config=_config(constants, tile, row),
        default=default,
        width=min(packed) if packed else None,
        grid=found.grid[0] * found.grid[1] * found.grid[2] if found.grid else 0,
        traffic=kernel.traffic(operand_dtype(architecture)) if kernel.traffic else None,
    )
    if kernel.matches_dense and row.issue_pressure and not architecture.amd:
        theirs = _inductor_mm(architecture, tile, row, kernel.rows)
        if theirs.issue_pressure:
            row = replace(row, dense_ratio=row.issue_pressure / theirs.issue_pressure)
    return row


def _config(constants: dict[str, str], tile: tuple[int, int, int], row: Row) -> str:
    if not all(tile):
        blocks = [f"{name} {value}" for name, value in constants.items() if name.startswith("BLOCK_")]
        return f"{', '.join(blocks)}, {row.warps} warps"
    splits = {name: value for name, value in sorted(constants.items()) if "SPLIT" in name and value != "1"}
    extra = "".join(f", {name.lower()} {value}" for name, value in splits.items())
    return f"{'×'.join(map(str, tile))}, {row.warps} warps, {row.stages} stages{extra}"


def _compiled(
    found: offline.Kernel, architecture: Architecture, tile: tuple[int, int, int], weight_lines: set[int], bits: int
) -> tuple[Row, list[int]]:
    """The part of a row that machine code says, and the loads of weights, which stand on `weight_lines`, in the main loop."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiled = offline.compile_kernel(found, architecture.device, folder)
        if architecture.amd:
            text = compiled.stages["amdgcn"]
            listing, used = amdgcn.parse(text), amdgcn.usage(text)
            registers, stack, spills = used.registers, used.scratch, used.spilled
        else:
            binary = folder / "kernel.cubin"
            binary.write_bytes(compiled.stages["cubin"])
            listing = sass.parse(tools.run("nvdisasm", "-c", "-g", binary), found.file)
            registers, stack = sass.usage(tools.run("cuobjdump", "-res-usage", binary))
            spills = listing.spills()
    loop = listing.main_loop()
    if loop:
        loads = assembly.loads_at(loop, weight_lines)
    else:
        # A kernel without products decodes its tile once, and single entries of the sparse part again.
        loads = assembly.loads_at(listing.instructions, weight_lines - entry_lines(found.source))
    row = Row("", "", architecture.name, "", False, tile=tile, warps=compiled.warps, stages=compiled.pipeline)
    row = replace(row, registers=registers, stack=stack, spills=spills, shared=compiled.shared)
    row = replace(row, opcodes=dict(listing.opcodes().most_common(8)))
    macs = tile[0] * tile[1] * tile[2]
    if not loop or not macs:
        return row, loads
    loaded = sum(loads) * compiled.warps * architecture.device.warp_size
    turns = assembly.steps(loop, macs, compiled.warps, loaded, tile[1] * tile[2] * bits // 8)
    issued, half = (sum(getattr(item, kind) for item in loop) / turns for kind in ("vector", "half_rate"))
    rate, cycles = architecture.mma_rate, architecture.issue_cycles
    matrix = [item for item in loop if item.matrix]
    row = replace(
        row,
        mma=round(len(matrix) / turns),
        mma_opcode=matrix[0].opcode,
        instructions=issued,
        half_rate=half,
        loop_opcodes={name: count / turns for name, count in Counter(i.base for i in loop if i.vector).most_common(16)},
        issue_pressure=assembly.pressure(issued, compiled.warps, macs, rate, cycles),
        # Pipes of 16 lanes per scheduler take a warp's instruction in two cycles.
        pipe_pressure=None if architecture.amd else assembly.pressure(half, compiled.warps, macs, rate, 2),
        step_bytes=loaded // turns,
    )
    return row, loads


def _inductor_mm(architecture: Architecture, tile: tuple[int, int, int], row: Row, rows: int) -> Row:
    """Inductor's own product at the tile, warps and stages of `row`, with the same epilogue."""
    import torch

    dtype = operand_dtype(architecture)
    options: dict[str, Any] = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": tile[2], "GROUP_M": 8, "EVEN_K": True}
    options |= {"ALLOW_TF32": False, "USE_FAST_ACCUM": False, "ACC_TYPE": "tl.float32"}
    options |= {"num_warps": row.warps, "num_stages": row.stages}

    def make() -> list[torch.Tensor]:
        sizes = ((rows, SIDE), (SIDE, SIDE), (rows, SIDE))
        return [torch.empty(size, dtype=dtype, device="cuda") for size in sizes]

    def run(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ weight.t()) + residual

    with offline.inductor_mm(options):
        module = offline.generate(run, make, lambda name, choices: choices[0])
    (found,) = [item for item in offline.kernels(module) if item.is_template]
    return _compiled(found, architecture, tile, load_lines(found.source).get("B", set()), 16)[0]
