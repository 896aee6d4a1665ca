"""What the user of the trainer sees: progress, metrics, pictures, memory."""

import io
from pathlib import Path

import pytest
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
    import subprocess
    import sys

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
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    assert isinstance(tune_allocator(), bool)
