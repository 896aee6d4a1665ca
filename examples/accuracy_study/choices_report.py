"""What the variants of the recipe and the places of masks say, as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from accuracy_study.recipe import BASE, VARIANTS
from accuracy_study.results import Row
from accuracy_study.statistics import mean_interval, shown
from accuracy_study.structure import FULLEST, TILE

METRIC = {"linear": "error", "transformer": "output_error"}
AGAINST = {"4 gradients, mean": "4 gradients, squared", "bf16, S exact": "bf16, S folded"}
"""Variants that are compared with another than the base case."""


def recipe_table(rows: Sequence[Row]) -> list[str]:
    """Per variant and kind of teacher: the error, and its difference teacher by teacher from what it is compared with."""
    values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        problem = row["key"]["problem"]
        values[problem["kind"], row["key"]["variant"]][problem["seed"]] = row[METRIC[problem["kind"]]]
    kinds = [kind for kind in METRIC if any(kind == k for k, _ in values)]
    lines = ["| variant | compared with | " + " | ".join(f"{kind}: error | difference" for kind in kinds) + " |"]
    lines.append("|---" * (2 + 2 * len(kinds)) + "|")
    for name in VARIANTS:
        if not any((kind, name) in values for kind in kinds):
            continue
        other = AGAINST.get(name, BASE)
        cells = []
        for kind in kinds:
            ours, theirs = values[kind, name], values[kind, other]
            both = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
            difference = "" if name == BASE or not both else signed(both)
            cells += [f"{shown(list(ours.values()))} ({len(ours)})" if ours else "", difference]
        lines.append(f"| {name} | {'' if name == BASE else other} | " + " | ".join(cells) + " |")
    return lines


def signed(values: Sequence[float], digits: int = 4) -> str:
    """`+0.0123 ± 0.0045`; bold where the 95 % interval leaves zero out."""
    mean, half = mean_interval(values)
    text = f"{mean:+.{digits}f}" + ("" if half != half else f" ± {half:.{digits}f}")
    return f"**{text}**" if abs(mean) > half else text


def structure_table(rows: Sequence[Row]) -> list[str]:
    """Per kind of layer, rows in the batch and density; means over the layers."""
    percent = f"{100 * FULLEST:g} %"
    columns = ["layer", "density", "rows in the batch", "empty rows", "empty columns", f"in the fullest {percent} of rows"]
    columns += [
        "… of columns",
        "longest row / mean",
        f"longest of {TILE} rows / mean",
        "same in another batch",
        "same over bf16",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    shares = ("empty_rows", "empty_columns", "top_rows", "top_columns")
    for row in rows:
        key = row["key"]
        cells = [key["kind"], f"{100 * key['density']:g} %", str(key["batch_rows"])]
        cells += [f"{100 * row[name]:.0f} %" for name in shares]
        cells += [f"{row['longest_row']:.0f}", f"{row['longest_in_tile']:.0f}"]
        cells += [f"{100 * row[name]:.0f} %" for name in ("overlap_batches", "overlap_bases")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
