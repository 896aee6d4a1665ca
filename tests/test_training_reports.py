"""What the user of the trainer sees: progress, metrics, pictures, memory."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from other_process import run_python
from rich.console import Console
from training_models import config, make_data, make_model

from rosa_fx import RosaError, train
from rosa_fx.training import read_metrics, save_loss_curve, tune_allocator
from rosa_fx.training.metrics import current_rss, peak_rss


def test_quiet_lines_and_bar() -> None:
    shown = {}
    for kind, progress, terminal in (("quiet", False, True), ("lines", True, False), ("bar", True, True)):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=140)
        data = make_data()
        train(make_model(), data, config(progress=progress, log_every=4), eval_batches=data, console=console)
        shown[kind] = file.getvalue()
    assert shown["quiet"] == ""
    lines = shown["lines"].splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step") and "lr" in line] == ["1/8", "4/8", "8/8"]
    assert sum("held-out loss" in line for line in lines) == 2
    assert "tokens/s" in shown["bar"]
    assert "joint" in shown["bar"]


def test_metrics_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    train(make_model(), make_data(), config(eval_every=3), eval_batches=make_data(2), out=tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    expected = {"step", "phase", "loss", "lr", "lr_sparse", "grad_norm", "tokens", "tokens_per_s", "seconds", "rss"}
    assert all(expected <= row.keys() for row in rows if row["event"] == "step")
    assert [row["step"] for row in rows if row["event"] == "eval"] == [0, 3, 6, 8]
    picture = save_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "pictures" / "loss.png", title="tiny")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(RosaError, match="no training step"):
        save_loss_curve(tmp_path / "none.jsonl", picture)


def test_memory_figures_are_bytes() -> None:
    psutil = pytest.importorskip("psutil")
    now = psutil.Process().memory_info().rss
    assert 0.5 * now < current_rss() < 2 * now
    assert current_rss() <= peak_rss() * 1.01


def test_allocator_keeps_large_blocks() -> None:
    """In a process of its own, because it cannot be undone: after tuning, a freed block's pages stay mapped."""

    code = (
        "import resource, torch\n"
        "from rosa_fx.training import tune_allocator\n"
        "def faults():\n"
        "    torch.empty(4096, 4096).fill_(1)\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5): torch.empty(4096, 4096).fill_(1)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "a = faults(); tuned = tune_allocator(); b = faults()\n"
        "assert not tuned or b < a / 2 or a < 100, (a, b)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert isinstance(tune_allocator(), bool)


def test_a_skipped_step_is_shown_as_such() -> None:
    file, calls = io.StringIO(), [0]

    def loss_fn(model: Any, batch: Any) -> Any:
        calls[0] += 1
        return model(**batch)["loss"] * (math.nan if calls[0] == 2 else 1.0)

    console = Console(file=file, width=140)
    train(make_model(), make_data(), config(progress=True, on_nonfinite="skip"), loss_fn=loss_fn, console=console)
    assert "step 2 (low_rank) is skipped: the loss is nan" in file.getvalue()
    assert "step 2/8  low_rank  loss not finite (skipped)" in file.getvalue()


def test_run_json_says_what_was_run(tmp_path: Path) -> None:
    train(make_model(), make_data(), config(stop_at_step=3), out=tmp_path)
    train(make_model(), make_data(), config(), out=tmp_path, resume=True)
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["spec"]["rank"] == 2
    assert document["config"]["lr"] == 0.01
    assert document["planned"] == 8
    assert document["weights"]["up.weight"] == {
        "shape": [32, 16],
        "matrix": [32, 16],
        "base": "dense",
        "scale": 2.0,
    }
    assert document["versions"]["torch"] == torch.__version__
    assert [part["after_step"] for part in document["parts"]] == [0, 3]


class Writer:
    """Stands for TensorBoard's SummaryWriter."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: dict[tuple[str, int], float] = {}
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_what_metrics_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its writer, so that it need not be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("Module", (), {"SummaryWriter": Writer}))
    monkeypatch.setattr(Writer, "made", [])
    data = make_data()
    train(make_model(), data, config(stop_at_step=3), out=tmp_path, eval_batches=data)
    result = train(make_model(), data, config(tensorboard=True), out=tmp_path, eval_batches=data, resume=True)
    train(make_model(), data, config(tensorboard=False), out=tmp_path / "b")
    first, second = Writer.made
    assert (first.purge_step, second.purge_step) == (1, 4)
    assert first.folder == second.folder == str(tmp_path / "tensorboard")
    assert first.closed
    assert second.closed
    assert [second.scalars["loss/train", step] for step in range(4, 9)] == result.losses[3:]
    assert first.scalars["loss/held_out", 0] == result.evals[0]
    assert second.scalars["loss/held_out", 8] == result.evals[8]
    assert {name for name, _ in first.scalars} >= {"rate/low_rank", "rate/sparse", "gradient/norm", "memory/resident_bytes"}


def test_tensorboard_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train(make_model(), make_data(), config(), out=tmp_path / "a").steps == 8
    assert not (tmp_path / "a" / "tensorboard").exists()
    with pytest.raises(RosaError, match="tensorboard is True: pip install tensorboard"):
        train(make_model(), make_data(), config(tensorboard=True), out=tmp_path / "b")


def test_tensorboard_itself_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(make_model(), make_data(), config(tensorboard=True), out=tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss/train")] == pytest.approx(result.losses, rel=1e-6)
