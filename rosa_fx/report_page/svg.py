"""Line charts with phase bands and small bar charts as inline SVG. Colours are CSS classes, so a page can be light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 22, 26
_POINTS = 800  # of one line at most: more than pixels can show


@dataclass(frozen=True)
class Line:
    """`style` is a CSS class; `dots` marks each point. Points that are not finite are left out."""

    label: str
    style: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """A phase from one step to another, both included."""

    label: str
    style: str
    first: float
    last: float


def line_chart(name: str, lines: Sequence[Line], bands: Sequence[Band], *, width: int, height: int, zero: bool = False) -> str:
    """One chart over the optimizer steps; `zero` makes the axis begin at 0. Empty text if there is no finite point."""
    kept = [(line, [p for p in line.points if math.isfinite(p[0]) and math.isfinite(p[1])]) for line in lines]
    kept = [(line, thinned(points)) for line, points in kept if points]
    if not kept:
        return ""
    xs = [x for _, points in kept for x, _ in points] + [x for band in bands for x in (band.first, band.last)]
    left, right = min(xs), max(xs)
    low, high = _range([[y for _, y in points] for _, points in kept], zero)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    wide, tall = width - LEFT - RIGHT, height - TOP - BOTTOM
    span = right - left

    def px(x: float) -> float:
        return LEFT + wide * ((x - left + 0.5) / (span + 1))

    def py(y: float) -> float:
        return TOP + tall * (1 - (min(max(y, low), high) - low) / (high - low))

    axis = f'data-first="{left:g}" data-last="{right:g}" data-left="{LEFT}" data-wide="{wide}"'  # for the page's script
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}" {axis}>']
    for band in bands:
        x0, x1 = px(band.first - 0.5), px(band.last + 0.5)
        parts.append(f'<rect class="band {band.style}" x="{x0:.1f}" y="{TOP}" width="{max(x1 - x0, 1):.1f}" height="{tall}"/>')
        if x1 - x0 >= 6.6 * len(band.label) + 8:  # where it fits; the legend below names them all
            parts.append(f'<text class="band-label" x="{(x0 + x1) / 2:.1f}" y="{TOP - 8}">{escape(band.label)}</text>')
    for tick in ticks:
        y = py(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{width - RIGHT}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 7}" y="{y + 4:.1f}">{compact(tick)}</text>')
    for tick in nice_ticks(left, right, width // 60, whole=True):
        if left <= tick <= right:
            parts.append(f'<text class="tick x" x="{px(tick):.1f}" y="{height - 10}">{compact(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP + tall}H{width - RIGHT}"/>')
    for line, points in kept:
        path = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)
        if len(points) > 1:
            parts.append(f'<path class="line {line.style}" d="M{path}"/>')
        if line.dots or len(points) == 1:
            parts += [f'<circle class="dot {line.style}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5"/>' for x, y in points]
    parts.append("</svg>")
    return "".join(parts)


def bars(
    values: Sequence[float], style: str, *, width: int, height: int, across: bool = False, line: float | None = None
) -> str:
    """Bars without axes, from the bottom up or, `across`, from the left; `line` marks a level. One path in all."""
    known = [value if math.isfinite(value) and value > 0 else 0.0 for value in values]
    top = max([*known, line or 0.0]) or 1.0
    thick = (height if across else width) / max(1, len(known))
    path = []
    for index, value in enumerate(known):
        long = value / top * (width if across else height)
        at, gap = index * thick, thick * (0.15 if thick > 4 else 0.0)
        if long <= 0:
            continue
        if across:
            path.append(f"M0 {at + gap:.1f}h{long:.1f}v{thick - 2 * gap:.1f}h-{long:.1f}z")
        else:
            path.append(f"M{at + gap:.1f} {height}v-{long:.1f}h{thick - 2 * gap:.1f}v{long:.1f}z")
    mark = ""
    if line is not None:
        at = line / top * (width if across else height)
        mark = f'<path class="level" d="{f"M{at:.1f} 0V{height}" if across else f"M0 {height - at:.1f}H{width}"}"/>'
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg class="bars" {size} preserveAspectRatio="none"><path class="fill {style}" d="{"".join(path)}"/>{mark}</svg>'


def thinned(points: list[Point]) -> list[Point]:
    """At most about `_POINTS` points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(points) <= _POINTS:
        return points
    size = math.ceil(2 * len(points) / _POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def nice_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers that cover [low, high]; `whole` allows no fractions."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def compact(value: float) -> str:
    """A number in at most about six characters."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    if size < 1e-3:
        text = f"{value:.2g}"
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else text
    return f"{value:.4g}"


def _range(series: Sequence[Sequence[float]], zero: bool) -> tuple[float, float]:
    """Lowest and highest value to show; single spikes far off may be cut at the edge."""
    values = sorted(y for ys in series for y in ys)
    low, high = values[0], values[-1]
    if len(values) >= 40:
        common = values[int(0.98 * (len(values) - 1))]
        if high - low > 4 * (common - low) > 0:
            high = common + 0.5 * (common - low)
    if zero:
        low = min(0.0, low)
    if low == high:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    return low, high
