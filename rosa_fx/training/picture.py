"""The loss curve of a run as a picture."""

import itertools
from pathlib import Path

from rosa_fx.errors import RosaError
from rosa_fx.training.metrics import read_metrics


def save_loss_curve(metrics: Path | str, picture: Path | str, title: str = "") -> Path:
    """Draw the losses in a metrics.jsonl (training, its running mean, evaluation, phases) into a PNG file.

    Raises RosaError if there is no step in `metrics` or if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RosaError("drawing the loss curve needs matplotlib: pip install 'rosa-fx[hf]'") from error
    rows = read_metrics(metrics)
    rows = [row for row in rows if isinstance(row.get("loss"), (int, float))]  # null where a step was skipped
    steps = [row for row in rows if row["event"] == "step"]
    evals = [row for row in rows if row["event"] == "eval"]
    if not steps:
        raise RosaError(f"{metrics} holds no training step: train at least one step before drawing it")
    # Not pyplot: that would keep the figure in a global list and may pick a window system.
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x = [row["step"] for row in steps]
    y = [row["loss"] for row in steps]
    axes.plot(x, y, color="0.7", linewidth=0.8, label="training, each step")
    span = min(len(y), max(4, len(y) // 20))
    mean = [sum(y[max(0, i - span + 1) : i + 1]) / min(i + 1, span) for i in range(len(y))]
    axes.plot(x, mean, color="C0", label=f"training, mean of {span} steps")
    if evals:
        axes.plot([e["step"] for e in evals], [e["loss"] for e in evals], "o-", color="C3", label="held out")
    changes = [(before, after) for before, after in itertools.pairwise(steps) if before["phase"] != after["phase"]]
    for number, (before, after) in enumerate(changes):
        at = (before["step"] + after["step"]) / 2
        axes.axvline(at, color="0.4", linestyle=":", linewidth=1)
        # A phase may last one step: names go to different heights so that they never overlap.
        height = 0.99 - 0.04 * (number % 3)
        axes.annotate(f" {after['phase']}", (at, height), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    axes.legend()
    path = Path(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
