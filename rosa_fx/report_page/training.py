"""The charts of a run over its optimizer steps."""

from __future__ import annotations

import json
import math
from typing import Any

from rosa_fx.report_page.gather import RunData
from rosa_fx.report_page.svg import Band, Line, Point, line_chart, thinned

PHASES = {
    "low_rank": "low-rank only",
    "collect": "collecting for the masks",
    "joint": "low-rank + sparse",
    "sparse": "sparse only",
}
_HOVER = ("step", "phase", "loss", "lr", "lr_sparse", "grad_norm", "tokens_per_s")


def number(value: Any) -> float:
    """A figure of a row; NaN where it is null or missing."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else math.nan


def charts(data: RunData) -> str:
    """The section with all curves; says so where there is no step yet."""
    steps = data.steps
    if not steps:
        return '<section><h2>Training</h2><p class="empty">No step has been made yet.</p></section>'
    bands = _bands(data)
    losses = _points(data, "loss")
    span = min(len(losses), max(4, len(losses) // 20)) or 1
    held = [(float(row["step"]), number(row.get("loss"))) for row in data.evals]
    skipped = [row["step"] for row in steps if row.get("skipped")]
    loss_lines = [
        Line("each step", "raw", losses),
        Line(f"mean of {span} steps", "mean", _running_mean(losses, span) if span > 1 else []),
        Line("held out", "held", held, dots=True),
    ]
    rates = [Line("low-rank", "low", _points(data, "lr")), Line("sparse", "sparse", _points(data, "lr_sparse"))]
    kinds = data.run.get("parameters")
    if isinstance(kinds, dict):
        rates = [line for line, key in zip(rates, ("low_rank", "sparse")) if key in kinds]
    memory = "device_memory" if any("device_memory" in row for row in steps) else "rss"
    gib = [(x, y / 2**30) for x, y in _points(data, memory)]
    norm, speed = _points(data, "grad_norm"), _points(data, "tokens_per_s")
    where = "on the GPU" if memory == "device_memory" else "resident"
    figures = [
        _figure("Loss", loss_lines, bands, _skipped(skipped), wide=True),
        _figure("Learning rate", rates, bands, wide=True, zero=True),
        _figure("Gradient norm, before clipping", [Line("", "raw", norm)], bands, zero=True),
        _figure("Speed, tokens per second", [Line("", "raw", speed)], bands, zero=True),
        _figure(f"Memory, GiB {where}", [Line("", "raw", gib)], bands, zero=True),
    ]
    present = {band.style: band.label for band in bands}
    legend = "".join(f'<span><i class="swatch {style}"></i>{label}</span>' for style, label in present.items())
    return (
        f'<section><h2>Training</h2><p class="legend" id="phases">Phases: {legend}</p>'
        f'<div class="figures">{"".join(figures)}</div></section>'
    )


def hover_data(data: RunData) -> str:
    """The rows that the page's script shows under the pointer, as JSON that is safe inside a script element."""
    chosen = data.steps
    if len(chosen) > 2000:
        chosen = chosen[:: math.ceil(len(chosen) / 2000)]
    rows = [[row.get(key) if key in ("step", "phase") else _short(row.get(key)) for key in _HOVER] for row in chosen]
    text = json.dumps({"names": _HOVER, "rows": rows}, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _short(value: Any) -> float | None:
    figure = number(value)
    return float(f"{figure:.5g}") if math.isfinite(figure) else None


def _points(data: RunData, key: str) -> list[Point]:
    return [(float(row["step"]), number(row.get(key))) for row in data.steps]


def _running_mean(points: list[Point], span: int) -> list[Point]:
    known = [point for point in points if math.isfinite(point[1])]
    means, total = [], 0.0
    for index, (x, y) in enumerate(known):
        total += y - (known[index - span][1] if index >= span else 0.0)
        means.append((x, total / min(index + 1, span)))
    return means


def _bands(data: RunData) -> list[Band]:
    """Stretches of equal phase."""
    bands: list[Band] = []
    for row in data.steps:
        phase, step = str(row.get("phase")), float(row["step"])
        if bands and bands[-1].style == f"phase-{phase}":
            bands[-1] = Band(bands[-1].label, bands[-1].style, bands[-1].first, step)
        else:
            style = f"phase-{phase}" if phase in PHASES else "phase-other"
            bands.append(Band(PHASES.get(phase, "other"), style, step, step))
    return bands


def _figure(
    name: str, lines: list[Line], bands: list[Band], note: str = "", *, wide: bool = False, zero: bool = False
) -> str:  # fmt: skip
    width, height = (580, 230) if wide else (380, 170)
    chart = line_chart(name, lines, bands, width=width, height=height, zero=zero)
    if not chart:
        return f'<figure><figcaption>{name}</figcaption><p class="empty">No figures.</p></figure>'
    shown = [line for line in lines if line.label and any(math.isfinite(y) for _, y in thinned(list(line.points)))]
    keys = "".join(f'<span><i class="key {line.style}"></i>{line.label}</span>' for line in shown)
    legend = f'<p class="legend">{keys}{note}</p>' if keys or note else ""
    return f'<figure class="{"wide" if wide else "small"}"><figcaption>{name}</figcaption>{legend}{chart}</figure>'


def _skipped(steps: list[int]) -> str:
    if not steps:
        return ""
    listed = ", ".join(map(str, steps[:8])) + (", …" if len(steps) > 8 else "")
    return f"<span>{len(steps)} skipped, not finite: step {listed}</span>"
