"""What the runs on the real task say: one row per cell, paired differences, and the loss against what a method costs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accuracy_study.methods import BUDGETS, METHODS
from accuracy_study.results import Row
from accuracy_study.statistics import mean_interval, shown

COLOURS = {
    "full": "#444444",
    "low-rank": "#d9822b",
    "sparse": "#2f8f5b",
    "sparse, random mask": "#9ccfb2",
    "rosa 3/4": "#8fbbe0",
    "rosa 1/2": "#1f6fb4",
    "rosa 1/4": "#0b3d66",
    "rosa 1/2, random mask": "#a98fd0",
}
MARKERS = {"nf4": "o", "keep": "s"}


@dataclass
class Found:
    """The runs of one cell: `trials` with seed 0 by learning rate, `seeds` at the best of them."""

    method: str
    budget: str
    base: str
    change: str
    planned: int
    trials: dict[float, float] = field(default_factory=dict)
    rows: dict[tuple[float, int], Row] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.method}, {self.change}" if self.change else self.method

    @property
    def tuned(self) -> bool:
        return len(self.trials) >= self.planned

    @property
    def lr(self) -> float:
        return min(self.trials, key=lambda lr: self.trials[lr])

    @property
    def seeds(self) -> dict[int, Row]:
        return {seed: row for (lr, seed), row in sorted(self.rows.items()) if lr == self.lr}

    def values(self, metric: str) -> list[float]:
        return [row[metric] for row in self.seeds.values() if metric in row]


def cells_of(rows: Sequence[Row], planned: dict[str, int]) -> list[Found]:
    """Cells by base, budget and method. `planned`: learning rates tried, by the method's name."""
    found: dict[str, Found] = {}
    for row in rows:
        key = row["key"]
        change = key.get("variant", "")
        cell = found.setdefault(
            json.dumps([key["method"], key["budget"], key["base"], change]),
            Found(key["method"], key["budget"], key["base"], change, 1 if change else planned[key["method"]]),
        )
        cell.rows[key["lr"], key["seed"]] = row
        if key["seed"] == 0:
            cell.trials[key["lr"]] = row["loss"]
    budgets, methods = ("all", *reversed(BUDGETS)), [method.name for method in METHODS]
    return sorted(found.values(), key=lambda c: (c.base, budgets.index(c.budget), bool(c.change), methods.index(c.method)))


def table(cells: Sequence[Found]) -> list[str]:
    """Markdown: what ran, at which rates, and what it gave."""
    columns = ("method", "base", "trainable", "held-out loss by learning rate, seed 0", "seeds", "held-out loss")
    columns += ("exact match", "same answers", "merged")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for cell in cells:
        rates = ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in sorted(cell.trials.items()))
        rates += "" if cell.tuned else " (not all)"
        some = next(iter(cell.seeds.values()))
        metrics = [cell.values(name) for name in ("exact_match", "execution_match", "merged_loss")]
        shares = [f"{100 * sum(v) / len(v):.0f} % ({len(v)})" if v else "" for v in metrics[:2]]
        merged = f"{sum(metrics[2]) / len(metrics[2]):.4f} ({len(metrics[2])})" if metrics[2] else ""
        lines.append(
            f"| {cell.label} | {cell.base} | {some['parameters']:,} | {rates} | {len(cell.seeds)} | "
            f"{shown(cell.values('loss'), 4)} | {' | '.join(shares)} | {merged} |"
        )
    return lines


def paired(cells: Sequence[Found]) -> list[str]:
    """Differences in held-out loss from RoSA over the same base with the same budget, seed by seed: the same order of rows, the
    same start of A. Full fine-tuning is compared with RoSA's largest budget."""
    lines = ["| base | R | compared with rosa 1/2 | difference in held-out loss | seed by seed |", "|---|---|---|---|---|"]
    references = [cell for cell in cells if cell.method == "rosa 1/2" and cell.tuned and not cell.change]
    for reference in references:
        first = next(other for other in references if other.base == reference.base)
        for cell in cells:
            comparable = cell.budget == reference.budget or (cell.budget == "all" and reference is first)
            if cell is reference or not cell.tuned or cell.base != reference.base or not comparable:
                continue
            common = sorted(cell.seeds.keys() & reference.seeds.keys())
            differences = [cell.seeds[s]["loss"] - reference.seeds[s]["loss"] for s in common]
            if differences:
                each = ", ".join(f"{d:+.4f}" for d in differences)
                text = shown(differences, 4)
                text = text if text[0] == "-" else "+" + text
                lines.append(f"| {cell.base} | {BUDGETS[reference.budget]} | {cell.label} | {text} | {each} |")
    return lines


def ranks(cells: Sequence[Found]) -> str:
    """The R of the budgets that were run: `16`, or `4 or 16`."""
    return " or ".join(str(rank) for name, rank in BUDGETS.items() if any(cell.budget == name for cell in cells))


def cost_rows(costs: Sequence[Row]) -> list[str]:
    """Table rows: bytes for all cells, seconds of a step where they were taken."""
    lines = []
    for row in costs:
        key = row["key"]
        seconds = f"{row['step_seconds']:.2f}" if "step_seconds" in row else ""
        budget = f"R = {BUDGETS[key['budget']]}" if key["budget"] in BUDGETS else "all"
        lines.append(f"| {key['method']} | {key['base']} | {budget} | {row['bytes'] / 2**20:,.0f} | {seconds} |")
    return lines


def draw(cells: Sequence[Found], costs: Sequence[Row], path: Path) -> None:
    """Held-out loss against trainable parameters, bytes and seconds, and the training loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cost = {(r["key"]["method"], r["key"]["budget"], r["key"]["base"]): r for r in costs}
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4), layout="constrained")
    labels: set[str] = set()
    for cell in cells:
        if not cell.tuned or cell.change:
            continue
        mean, half = mean_interval(cell.values("loss"))
        spent: Row = cost.get((cell.method, cell.budget, cell.base), {})
        steps = next(iter(cell.seeds.values()))["steps"]
        places: tuple[Any, ...] = (
            next(iter(cell.seeds.values()))["parameters"],
            spent.get("bytes") and spent["bytes"] / 2**20,
            spent.get("step_seconds") and spent["step_seconds"] * steps,
        )
        label = f"{cell.method}, {cell.base}"
        for axis, place in zip(axes, places):
            if place:
                axis.errorbar(
                    place,
                    mean,
                    None if half != half else half,
                    marker=MARKERS.get(cell.base, "^"),
                    ls="",
                    capsize=3,
                    color=COLOURS[cell.method],
                    label=None if label in labels else label,
                )
                labels.add(label)
        if cell.budget != "small":
            axes[3].plot(
                *_smooth([row["losses"] for row in cell.seeds.values()]),
                color=COLOURS[cell.method],
                ls="-" if cell.base == "nf4" else "--",
            )
    names = ("trainable parameters", "MiB: weights, adapters, gradients, Adam", "seconds of training, idle machine", "step")
    for axis, name in zip(axes, names):
        axis.set_xlabel(name)
        axis.grid(alpha=0.25)
    for axis in axes[:3]:
        axis.set_ylabel("held-out loss")
    axes[0].set_xscale("log")
    axes[3].set_ylabel("training loss, mean of 9 steps and of seeds")
    axes[3].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _smooth(curves: Sequence[Sequence[float]], width: int = 9) -> tuple[list[int], list[float]]:
    """Running mean over steps of the mean over runs."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        for step, value in enumerate(curve):
            by_step[step].append(value)
    means = [sum(v) / len(v) for _, v in sorted(by_step.items())]
    windows = range(len(means) - width + 1)
    return [start + width // 2 + 1 for start in windows], [sum(means[start : start + width]) / width for start in windows]
