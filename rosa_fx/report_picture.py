"""The picture of a `RewriteReport`: every linear weight of the model as a square, in the order of the module tree.

Weights of repeated blocks stand in a grid, a row per block and a column per weight; the others in a list. The area of a
square is proportional to the FLOPs of the captured call, its colour says what became of the weight.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosa_fx.errors import RosaError

if TYPE_CHECKING:
    from rosa_fx.report import RewriteReport

COLOURS = {"fused": "#2b6cb0", "dense": "#e07b00", "unused": "#ffffff", "untouched": "#c3c9d2"}
_MEANING = {
    "fused": "fused",
    "dense": "dense (reason in the table)",
    "unused": "unused (not read in this call)",
    "untouched": "untouched (no target)",
}
_INCHES = 0.3  # per cell
_CHARACTER = 0.2  # of a cell, at the size of the text
_MOST_COLUMNS = 24
_MOST_ROWS = 36
_WIDEST = 44.0
_LARGEST = 6.0


@dataclass(frozen=True)
class Node:
    """A linear weight: `status` is a key of COLOURS."""

    name: str
    shape: tuple[int, ...]
    flops: int
    status: str


@dataclass(frozen=True)
class Grid:
    """Weights of repeated blocks: `nodes` by (row, column)."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    nodes: dict[tuple[int, int], Node]


@dataclass(frozen=True)
class Listing:
    """Weights outside repeated blocks, one below the other."""

    nodes: tuple[Node, ...]


def nodes_of(report: RewriteReport) -> list[Node]:
    """The linear weights: targets first, in model order, then those that were left alone."""
    targets = [Node(t.name, t.shape, t.flops_after, t.status) for t in report.targets]
    return targets + [Node(u.name, u.shape, u.flops, "untouched") for u in report.untouched if u.linear]


def panels(nodes: Iterable[Node]) -> list[Grid | Listing]:
    """The grids and the list that the weights stand in. A grid holds at least two blocks; long ones come in several."""
    grids, listed = _blocks(list(nodes), 0)
    out: list[Grid | Listing] = []
    for title, members in grids.items():
        names = list(dict.fromkeys(row for row, _, _ in members))
        columns = list(dict.fromkeys(column for _, column, _ in members))
        parts = -(-len(names) // _MOST_ROWS)
        size = -(-len(names) // parts)
        for start in range(0, len(names), size):
            rows = names[start : start + size]
            held = {(rows.index(row), columns.index(column)): node for row, column, node in members if row in rows}
            out.append(Grid(title, tuple(rows), tuple(columns), held))
    return [*out, Listing(tuple(listed))] if listed else out


def _blocks(nodes: list[Node], depth: int) -> tuple[dict[str, list[tuple[str, str, Node]]], list[Node]]:
    """Weights grouped by the number at `depth` in their names: container -> (row, column, weight); and those without one.

    Blocks with too many weights for a row (experts, stages) are taken apart at the next number.
    """
    grids: dict[str, list[tuple[str, str, Node]]] = defaultdict(list)
    listed: list[Node] = []
    for node in nodes:
        parts = node.name.split(".")
        at = [i for i, part in enumerate(parts) if part.isdigit()]
        if len(at) <= depth or (depth and at[depth] == len(parts) - 1):
            listed.append(node)
            continue
        last = at[depth]
        title = ".".join("*" if i in at[:depth] else part for i, part in enumerate(parts[:last]))
        row = ".".join(parts[i] for i in at[: depth + 1])
        column = re.sub(r"\.weight$|^weight$", "", ".".join(parts[last + 1 :]))
        grids[title].append((row, column, node))
    kept: dict[str, list[tuple[str, str, Node]]] = {}
    for title, members in grids.items():
        if len({row for row, _, _ in members}) < 2:
            listed += [node for _, _, node in members]
        elif len({column for _, column, _ in members}) > _MOST_COLUMNS:
            inner, rest = _blocks([node for _, _, node in members], depth + 1)
            kept |= inner
            left = {node.name for node in rest}
            kept |= {title: again} if (again := [member for member in members if member[2].name in left]) else {}
        else:
            kept[title] = members
    order = {node.name: i for i, node in enumerate(nodes)}
    return kept, sorted(listed, key=lambda node: order[node.name])


def check_ending(path: Path) -> None:
    """Raises RosaError for a file that is neither .svg nor .png."""
    if path.suffix not in (".svg", ".png"):
        raise RosaError(f"a picture is an .svg or a .png file, not {path.name!r}: give it one of these endings")


def draw(report: RewriteReport, path: Path) -> Path:
    """See `RewriteReport.picture`."""
    check_ending(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RosaError("a picture needs matplotlib: pip install 'rosa-fx[hf]'") from error
    nodes = nodes_of(report)
    shown = panels(nodes)
    scale = _scale(shown)
    places, width, height = _places(shown, scale)
    *estimates, title = report.summary()[-2:] if report.totals["flops_before"] else report.summary()[-1:]
    lines = [title, *(line for estimate in estimates for line in estimate.split("; "))]
    top = 1.0 * len(lines) + 4.0
    width = max(width, 24.0, sum(map(_entry, _entries(nodes).values())), max(len(line) for line in lines) * _CHARACTER * 1.1)
    # Not pyplot: that would keep the figure in a global list and may pick a window system.
    figure = Figure(figsize=((width + 1) * _INCHES, (height + top + 1) * _INCHES), dpi=130, facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-0.5, width + 0.5), ylim=(height + 0.5, -top - 0.5))
    axes.axis("off")
    axes.text(0, -top + 0.5, lines[0], fontsize=10, weight="bold", va="center")
    for i, line in enumerate(lines[1:]):
        axes.text(0, -top + 1.8 + i, line, fontsize=8, va="center")
    _legend(axes, nodes, -2.4, scale)
    for panel, (x, y) in zip(shown, places, strict=True):
        if isinstance(panel, Grid):
            _draw_grid(axes, panel, x, y, scale)
        else:
            _draw_list(axes, panel, x, y, scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=path.suffix[1:])
    return path


def _scale(shown: list[Grid | Listing]) -> float:
    """FLOPs of a square that fills its cell: the largest in a grid, or of all if there is none."""
    gridded = [node.flops for panel in shown if isinstance(panel, Grid) for node in panel.nodes.values()]
    listed = [node.flops for panel in shown if isinstance(panel, Listing) for node in panel.nodes]
    return float(max(gridded or listed, default=0) or 1)


def _side(node: Node, scale: float) -> float:
    return min(_LARGEST, max(0.14, 0.9 * sqrt(node.flops / scale)))


def _label(node: Node) -> str:
    from rosa_fx.report import scaled_flops

    shape = " x ".join(map(str, node.shape))
    return f"{node.name}  {shape}" + (f"  {scaled_flops(node.flops)}" if node.flops else "")


def _header(panel: Grid) -> float:
    """Cells above the first row: the title, and the columns' names, which stand upright."""
    return 1.6 + max(len(column) for column in panel.columns) * _CHARACTER


def _extent(panel: Grid | Listing, scale: float) -> tuple[float, float]:
    if isinstance(panel, Listing):
        largest = max(_side(node, scale) for node in panel.nodes)
        longest = max(len(_label(node)) for node in panel.nodes)
        return largest + 0.6 + longest * _CHARACTER, sum(max(1.0, _side(node, scale) + 0.2) for node in panel.nodes)
    columns = _row_labels(panel) + len(panel.columns)
    return max(columns, len(panel.title) * _CHARACTER), _header(panel) + len(panel.rows)


def _row_labels(panel: Grid) -> float:
    return 0.4 + max(len(row) for row in panel.rows) * _CHARACTER


def _places(shown: list[Grid | Listing], scale: float) -> tuple[list[tuple[float, float]], float, float]:
    """Where panels stand, left to right and in lines, and the size of the whole."""
    places, x, y, line, widest = [], 0.0, 0.0, 0.0, 0.0
    for panel in shown:
        width, height = _extent(panel, scale)
        if x and x + width > _WIDEST:
            x, y, line = 0.0, y + line + 1.2, 0.0
        places.append((x, y))
        x, line = x + width + 1.6, max(line, height)
        widest = max(widest, x - 1.6)
    return places, widest, y + line


def _square(axes: Any, node: Node, x: float, y: float, scale: float) -> None:
    """Centred on (x, y)."""
    from matplotlib.patches import Rectangle

    side = _side(node, scale)
    edge = "#7a828e" if node.status == "unused" else "none"
    axes.add_patch(
        Rectangle((x - side / 2, y - side / 2), side, side, facecolor=COLOURS[node.status], edgecolor=edge, linewidth=0.8)
    )


def _draw_grid(axes: Any, panel: Grid, x: float, y: float, scale: float) -> None:
    axes.text(x, y + 0.4, panel.title or "blocks", fontsize=8, weight="bold", va="center")
    left, first = x + _row_labels(panel), y + _header(panel)
    for column, name in enumerate(panel.columns):
        axes.text(left + column + 0.5, first - 0.2, name, fontsize=7, rotation=90, va="bottom", ha="center", color="#333333")
    for row, name in enumerate(panel.rows):
        axes.text(left - 0.2, first + row + 0.5, name, fontsize=7, va="center", ha="right", color="#333333")
    for (row, column), node in panel.nodes.items():
        _square(axes, node, left + column + 0.5, first + row + 0.5, scale)


def _draw_list(axes: Any, panel: Listing, x: float, y: float, scale: float) -> None:
    largest = max(_side(node, scale) for node in panel.nodes)
    for node in panel.nodes:
        height = max(1.0, _side(node, scale) + 0.2)
        _square(axes, node, x + largest / 2, y + height / 2, scale)
        axes.text(x + largest + 0.4, y + height / 2, _label(node), fontsize=7, va="center", color="#333333")
        y += height


def _entries(nodes: list[Node]) -> dict[str, str]:
    """The legend's texts, empty for what does not occur."""
    counts = {status: sum(node.status == status for node in nodes) for status in _MEANING}
    return {status: f"{counts[status]} {meaning}" if counts[status] else "" for status, meaning in _MEANING.items()}


def _entry(text: str) -> float:
    return 2.2 + len(text) * _CHARACTER if text else 0.0


def _legend(axes: Any, nodes: list[Node], y: float, scale: float) -> None:
    from rosa_fx.report import scaled_flops

    x = 0.0
    for status, text in _entries(nodes).items():
        if text:
            sample = Node("", (), int(scale * 0.6), status)
            _square(axes, sample, x + 0.5, y, scale)
            axes.text(x + 1.2, y, text, fontsize=8, va="center")
            x += _entry(text)
    sample = Node("", (), int(scale), "untouched")
    _square(axes, sample, 0.5, y + 1.3, scale)
    size = scaled_flops(int(scale)) if scale > 1 else "none counted"
    axes.text(1.2, y + 1.3, f"area: FLOPs of the captured forward and backward; this is {size}", fontsize=8, va="center")
