"""`rosa-fx train` under `torchrun`, on a tiny Llama in two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_models import save_chat_model
from other_process import ROOT, run_python

from rosa_fx.training import read_metrics

OPTIONS = ["--rank", "2", "--density", "0.05", "--dtype", "float32", "--device", "cpu", "--no-download", "--no-compile"]
OPTIONS += ["--max-steps", "4", "--schedule", "wl1", "--batch", "2", "--max-length", "64", "--eval-share", "0.2"]


def train(processes: int, model: Path, data: Path, out: Path, *options: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = ["-m", str(model), "-d", str(data), "-o", str(out), *OPTIONS, *options]
    program = [str(ROOT / "tests" / "test_cli_processes.py"), "train", *arguments]
    done = run_python(*(launcher if processes > 1 else []), *program, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_train(tmp_path: Path) -> None:
    model, data = save_chat_model(tmp_path / "model"), tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1 = ", "completion": str(i + 1)}) + "\n" for i in range(20)))
    printed = train(2, model, data, tmp_path / "two")
    train(1, model, data, tmp_path / "one", "--accumulate", "2")
    two, one = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert [(row["event"], row["step"]) for row in two] == [(row["event"], row["step"]) for row in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        if ours["event"] == "step":
            assert (ours["tokens"], ours["targets"], ours["phase"]) == (theirs["tokens"], theirs["targets"], theirs["phase"])
    assert (tmp_path / "two" / "adapter" / "adapter_config.json").is_file()
    assert printed.count("rosa-fx train: 4 steps") == 1
    assert printed.count("training data: ") == 1


if __name__ == "__main__":
    from rosa_fx.cli import app

    app()
