"""The report's tables: as text for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from rosa_fx.kernels.report.rows import Row

COLUMNS = (
    "config",
    "registers",
    "stack",
    "shared",
    "programs",
    "warpgroups",
    "MMA",
    "loop",
    "issue",
    "pipe",
    "load width",
    "mm ratio",
    "bytes/weight",
    "in flight",
    "cover",
    "issue/bytes",
)
LEGEND = """\
*config*: rows × outputs × step of the sum; the one in bold is taken without timing, the others are offered to autotuning.
*registers* and *stack* (spills, bytes) per thread. *shared*: KiB per program. *programs*, *warpgroups*: resident per
multiprocessor. *MMA*, *loop*: matrix instructions and all warp instructions per step of the main loop. *issue*: issue
pressure, warp instructions over what four schedulers issue while the tensor cores work on the step; below about 0.6 they hide
behind the products. *pipe*: the same for the instructions of the half-rate integer pipe alone (permutes, conversions, logic),
which takes two cycles for each. *load width*: bytes per thread of the narrowest load of stored weights in the main loop. *mm
ratio*: *issue* over that of Inductor's own `mm` template with the same tile, warps and stages. Few rows: *bytes/weight* that
move by count, without / with adapters (rank 16, 0.6 % sparse); *in flight*: programs running at once on the GPU, for weights
of 4096×4096; *cover*: bytes of packed weights that they ask for ahead over bandwidth × 0.5 µs; *issue/bytes*: time to issue
the main loop over time to move the bytes, both at peak: below 1 the kernel is bound by bytes."""


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    if row.error:
        return [row.config, f"does not compile: {row.error}", *[""] * (len(COLUMNS) - 2)]
    decode = row.traffic is not None
    return [
        row.config,
        str(row.registers),
        str(row.stack),
        f"{row.shared / 1024:g}",
        str(row.resident),
        f"{row.warpgroups:g}",
        f"{row.mma}" if row.mma else "",
        f"{row.instructions:.0f}" if row.mma else "",
        _number(row.issue_pressure) if not decode else "",
        _number(row.pipe_pressure) if not decode else "",
        "" if row.width is None else str(row.width),
        _number(row.dense_ratio),
        f"{row.traffic[0]:.3f} / {row.traffic[1]:.3f}" if row.traffic is not None else "",
        str(row.in_flight) if decode else "",
        _number(row.latency_cover) if decode else "",
        _number(row.issue_over_bytes) if decode else "",
    ]


def groups(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by architecture and kernel, in order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.arch, row.kernel), []).append(row)
    return found


def show(console: Console, rows: Sequence[Row]) -> None:
    """One table per architecture and kernel. Columns that are empty throughout are left out."""
    for (arch, kernel), part in groups(rows).items():
        text = [cells(row) for row in part]
        used = [i for i in range(len(COLUMNS)) if any(line[i] for line in text)]
        table = Table(title=f"{arch}: {kernel}", title_justify="left")
        for i in used:
            table.add_column(COLUMNS[i], justify="left" if i == 0 else "right")
        for row, line in zip(part, text, strict=True):
            table.add_row(*(line[i] for i in used), style="bold" if row.default else "")
        console.print(table)


def grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, text to the left in the first column and to the right in the others."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body)])


def markdown(rows: Sequence[Row]) -> str:
    """A table per architecture, a line per kernel and config."""
    out = []
    for arch in dict.fromkeys(row.arch for row in rows):
        mine = [row for row in rows if row.arch == arch]
        text = [cells(row) for row in mine]
        used = [i for i in range(len(COLUMNS)) if any(line[i] for line in text)]
        body, before = [], ""
        for row, line in zip(mine, text, strict=True):
            shown = [line[i] for i in used]
            if row.default:
                shown[0] = f"**{shown[0]}**"
            body.append(["" if row.kernel == before else row.kernel, *shown])
            before = row.kernel
        out.append(f"### {arch}\n\n" + grid(["kernel", *(COLUMNS[i] for i in used)], body))
    return "\n\n".join(out)
