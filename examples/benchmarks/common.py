"""Interleaved timing, bars, and the files that a part of the benchmark writes."""

from __future__ import annotations

import csv
import gc
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

import rosa_fx
from rosa_fx.state import state_of
from rosa_fx.training.allocator import tune_allocator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]
console = Console()


@dataclass(frozen=True)
class Bar:
    """What a measured value has to be: at most `limit` (or at least, if `at_least`)."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{self.what}: {self.value:.3g}, bar {sign} {self.limit:.3g}: {'met' if self.met else 'MISSED'}"


@dataclass
class Part:
    """One part's rows, bars, and the values of its picture: {curve: [(x, y)]} per panel."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    panels: dict[str, dict[str, list[tuple[Any, float]]]] = field(default_factory=dict)
    keep: ClassVar[Callable[[Part], None] | None] = None
    """Called after each addition."""

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, show and write them at once: a long run that is stopped has not measured in vain."""
        self.rows += rows
        for row in rows:
            console.print(escape("  ".join(str(value) for value in row.values())), soft_wrap=True)
        if self.keep is not None:
            self.keep(self)


def start() -> None:
    """The same allocator setting for everything that this process runs."""
    tune_allocator()
    torch.manual_seed(0)


def interleaved(cases: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each case in each round; in every round all cases run once, from a different one on each time."""
    names = list(cases)
    for _ in range(warm_up):
        for name in names:
            cases[name]()
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, first quartile, third quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), low, high


def ratios(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> list[float]:
    """Of the two times of each round."""
    return [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]


def timing_rows(seconds: Mapping[str, Sequence[float]], to: str, ratio_name: str, **columns: Any) -> list[Row]:
    """One row per case: median and quartiles in ms, and those of the ratio to the case `to`."""
    rows = []
    for name, times in seconds.items():
        median, low, high = (1e3 * value for value in quartiles(times))
        ratio, ratio_low, ratio_high = quartiles(ratios(seconds, name, to))
        rows.append(
            columns
            | {
                "peer": name,
                "ms": round(median, 2),
                "ms q1": round(low, 2),
                "ms q3": round(high, 2),
                ratio_name: round(ratio, 3),
                f"{ratio_name} q1": round(ratio_low, 3),
                f"{ratio_name} q3": round(ratio_high, 3),
            }
        )
    return rows


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def compare(what: str, exact: Tensor, ours: Tensor, plain: Tensor) -> None:
    """Raise if ours is further from float64 than 1.1 times the plain computation in the same dtype.

    In float32, where errors of few rows are a matter of the order of summation, 2 times.
    """
    factor = 2.0 if plain.dtype == torch.float32 else 1.1
    error, allowed = rms(ours.double() - exact), factor * max(rms(plain.double() - exact), 2.0**-24 * rms(exact))
    if not error <= allowed:
        raise SystemExit(f"{what}: RMS error {error:.3e} against float64, {allowed:.3e} allowed; nothing is timed")


def random_weight(shape: tuple[int, int]) -> Tensor:
    """[N, K], of variance 1 / K; the same for every part."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * shape[1] ** -0.5


def random_masks(model: nn.Module, density: float, clustered: bool = False, seed: int = 0) -> dict[str, rosa_fx.Mask]:
    """One mask per rewritten weight: uniformly random, or with a quarter of the rows and of the columns favoured."""
    from rosa_fx.kernels.cpu.sparse import select_topk

    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, weight in state_of(model).weights.items():
        rows, columns = weight.shape
        score = torch.rand(rows, columns, generator=generator)
        if clustered:
            favoured = torch.rand(rows, 1, generator=generator) < 0.25
            score += 0.7 * density * favoured + 0.7 * density * (torch.rand(1, columns, generator=generator) < 0.25)
        masks[name] = rosa_fx.Mask(*select_topk(score, int(density * rows * columns)), weight.shape)
    return masks


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Adapters that are not zero, so that a wrong term shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


# --- files -------------------------------------------------------------------------------------------------------


def machine() -> list[str]:
    """CPU, flags that matter, threads, versions and settings, as lines."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in reversed(text.splitlines()) if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(values.get("flags", "").split())
    shown = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16") if f in flags]
    packages = ("torch", "bitsandbytes", "peft", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return [
        f"CPU: {values.get('model name', platform.processor())} (family {values.get('cpu family', '?')}, "
        f"model {values.get('model', '?')}), {torch.get_num_threads()} threads; flags: {' '.join(shown) or '?'}",
        f"Python {platform.python_version()}, {versions}, rosa_fx {rosa_fx.__version__}",
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', '')}; large blocks stay on the heap (mallopt), for all "
        "peers alike, except where memory is measured",
    ]


def write(part: Part, out: Path, command: str, name: str = "") -> None:
    """<out>/<name>.csv, .md and .png; the part's name if none is given."""
    name = name or part.name
    out.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in part.rows for key in row))
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(part.rows)
    lines = [f"# {part.title}", "", *(f"- {line}" for line in machine()), f"- `python {command}`", ""]
    lines += [*part.notes, ""] if part.notes else []
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in part.rows]
    if part.bars:
        lines += ["", "## Bars", "", "| what | measured | bar | |", "|---|---|---|---|"]
        for bar in part.bars:
            sign = "≥" if bar.at_least else "≤"
            lines.append(f"| {bar.what} | {bar.value:.3g} | {sign} {bar.limit:.3g} | {'met' if bar.met else '**missed**'} |")
    (out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if part.panels:
        _picture(part, out / f"{name}.png")


def _picture(part: Part, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(4, len(part.panels))
    down = -(-len(part.panels) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 4 * down), squeeze=False)
    for axis in axes.flat[len(part.panels) :]:
        axis.axis("off")
    for axis, (title, curves) in zip(axes.flat, part.panels.items()):
        for label, points in curves.items():
            xs, ys = zip(*points, strict=True)
            if all(isinstance(x, int | float) for x in xs):
                axis.plot(xs, ys, marker="o", label=label)
                axis.set_xscale("log")
                axis.set_yscale("log")
            else:
                axis.barh([str(x) for x in xs], ys, label=label, alpha=0.7)
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
    figure.suptitle(part.title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def command_line() -> str:
    return " ".join(["examples/bench_cpu.py", *sys.argv[1:]])
