"""What the known-answer runs say: curves over samples, a table of the other properties, and paired differences."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from accuracy_study.known_answer import CHANGES, METHODS, MIDDLE, Problem
from accuracy_study.results import Row
from accuracy_study.statistics import mean_interval, shown

COLOURS = dict(zip(METHODS, ("#1f6fb4", "#8fbbe0", "#d9822b", "#2f8f5b", "#9ccfb2")))
METRIC = {"linear": "error", "transformer": "output_error"}
LABEL = {
    "error": "relative error of the weights",
    "output_error": "relative error of the outputs",
    "f1": "F1 of the mask",
}


def collect(rows: list[Row], metric: str, **wanted: Any) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """(method, samples) -> (seed, value) of the runs whose settings are the wanted ones."""
    found: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        problem = Problem(**row["key"]["problem"])
        if metric in row and all(getattr(problem, name) == value for name, value in wanted.items()):
            found[row["key"]["method"], problem.samples].append((problem.seed, row[metric]))
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Curves over samples with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("linear", "error"), ("linear", "f1"), ("transformer", "output_error")]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    for axis, (kind, metric) in zip(axes, panels):
        values = collect(rows, metric, kind=kind, **MIDDLE)
        for method in METHODS:
            counts = sorted(samples for name, samples in values if name == method)
            if counts:
                points = [mean_interval([value for _, value in values[method, n]]) for n in counts]
                means, halves = [p[0] for p in points], [p[1] for p in points]
                axis.errorbar(counts, means, halves, marker="o", ms=4, capsize=3, label=method, color=COLOURS[method])
        axis.set_xscale("log", base=2)
        axis.set_xlabel("samples")
        axis.set_title(f"{kind}: {LABEL[metric]}", fontsize=10)
        axis.set_ylim(0)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(rows: list[Row]) -> list[str]:
    """A Markdown table: the middle case, and each property changed, at the middle number of samples."""
    lines = ["| teacher | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for kind, change in [("linear", {}), *(("linear", c) for c in CHANGES), ("transformer", {})]:
        values = collect(rows, METRIC[kind], kind=kind, **(MIDDLE | change))
        cells = [shown([v for _, v in values[method, 512]]) if values.get((method, 512)) else "" for method in METHODS]
        named = ", ".join(f"{name} {value:g}" for name, value in change.items()) or "middle case"
        lines.append(f"| {kind}, {named} | " + " | ".join(cells) + " |")
    return lines


def paired(rows: list[Row]) -> list[str]:
    """How much worse each method is than RoSA with a gradient mask, on the same teachers."""
    lines = ["| compared with RoSA | linear | transformer |", "|---|---|---|"]
    for method in METHODS[1:]:
        cells = []
        for kind in ("linear", "transformer"):
            values = collect(rows, METRIC[kind], kind=kind, **MIDDLE)
            ours, theirs = dict(values.get((METHODS[0], 512), [])), dict(values.get((method, 512), []))
            seeds = sorted(ours.keys() & theirs.keys())
            cells.append(f"{shown([theirs[s] - ours[s] for s in seeds])} ({len(seeds)} seeds)" if seeds else "")
        lines.append(f"| {method} | " + " | ".join(f"+{c}" if c and c[0] != "-" else c for c in cells) + " |")
    return lines
