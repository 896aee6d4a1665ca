"""Checkpoints that survive accidents: pruning, failed and half-written writes, damage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_models import config, make_data, make_model

from rosa_fx import RosaError, train
from rosa_fx.training import checkpoint as checkpoints
from rosa_fx.training import read_metrics


def test_checkpoints_are_pruned_to_the_newest(tmp_path: Path) -> None:
    train(make_model(), make_data(), config(checkpoint_every=2, keep_checkpoints=3), out=tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-4", "step-6", "step-8"]
    files = {p.suffix for p in (tmp_path / "checkpoints" / "step-8").iterdir()}
    assert files == {".json", ".safetensors"}


def test_what_a_killed_run_had_no_time_to_prune_goes_on_resuming(tmp_path: Path) -> None:
    """Between the newest checkpoint's coming and the oldest one's going, at the end of a run, where no other is written."""
    settings = config(checkpoint_every=2, keep_checkpoints=2)
    train(make_model(), make_data(), settings, out=tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-6", folder / "step-4")
    train(make_model(), make_data(), settings, out=tmp_path, resume=True)
    assert sorted(p.name for p in folder.iterdir()) == ["step-6", "step-8"]
    # One that was not written to its end takes nobody's place.
    (folder / "step-8" / "manifest.json").unlink()
    shutil.copytree(folder / "step-6", folder / "step-5")
    checkpoints.prune(folder, 2)
    assert sorted(p.name for p in folder.iterdir()) == ["step-5", "step-6", "step-8"]


def test_a_failed_write_keeps_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(make_model(), make_data(), config(stop_at_step=2, keep_checkpoints=1), out=tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(RosaError, match="No space left"):
        train(make_model(), make_data(), config(keep_checkpoints=1), out=tmp_path, resume=True)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_half_written_checkpoints_are_ignored(tmp_path: Path) -> None:
    whole = train(make_model(), make_data(), config(), out=tmp_path / "whole")
    out = tmp_path / "out"
    train(make_model(), make_data(), config(stop_at_step=3), out=out)
    folder = out / "checkpoints"
    (folder / ".step-5.new-123").mkdir()
    (folder / ".step-5.new-123" / "adapter.safetensors").write_bytes(b"half")
    shutil.copytree(folder / "step-3", folder / "step-5")
    (folder / "step-5" / "manifest.json").unlink()
    with (out / "metrics.jsonl").open("a") as stream:  # rows of steps that were made after the checkpoint
        stream.write(json.dumps({"event": "step", "step": 4, "loss": 1.0}) + '\n{"event": "st')
    events: list[dict[str, Any]] = []
    resumed = train(make_model(), make_data(), config(), out=out, resume=True, on_event=events.append)
    assert resumed.losses == whole.losses
    texts = [e["text"] for e in events if e["event"] == "message"]
    assert any("half-written" in t for t in texts)
    assert any("step-5" in t and "not written to its end" in t for t in texts)
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl") if r["event"] == "step"] == list(range(1, 9))
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", ["adapter", "optimizer", "random", "metrics", "state", "manifest"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_checkpoints_are_named(tmp_path: Path, name: str, damage: str) -> None:
    train(make_model(), make_data(), config(stop_at_step=2), out=tmp_path)
    file = next((tmp_path / "checkpoints" / "step-2").glob(f"{name}.*"))
    content = bytearray(file.read_bytes())
    if damage == "remove":
        if name == "manifest":
            return  # this is what half-written means
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-3])
    else:
        content[-1] ^= 0xFF
        file.write_bytes(content)
    with pytest.raises(RosaError, match=rf"{name}\.(json|safetensors) is damaged"):
        train(make_model(), make_data(), config(), out=tmp_path, resume=True)
