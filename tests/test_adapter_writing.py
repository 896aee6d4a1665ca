"""Adapters are written whole or not at all: interruptions anywhere, full disks, replaced folders."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import inputs, plain, trained
from safetensors.torch import save_file

import rosa_fx
from rosa_fx import RosaError, adapter_format
from rosa_fx.adapter_format import CONFIG, PENDING, TENSORS


def test_replacing_keeps_other_files_and_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    rosa_fx.save_adapter(trained(masks=False), tmp_path / "link")
    (tmp_path / "real" / "notes.md").write_text("mine")
    (tmp_path / "real" / "plots").mkdir()
    model = trained()
    rosa_fx.save_adapter(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == [CONFIG, TENSORS, "notes.md", "plots"]
    assert torch.equal(rosa_fx.load_adapter(plain(), tmp_path / "real")(inputs()), model(inputs()))


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Like a power cut at the `count`-th change of a directory or wait for the disk: no clean-up comes after it."""
    steps = [0]

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            steps[0] += 1
            if steps[0] >= count:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return run

    for name in ("mkdir", "replace", "rename", "rmdir", "write_text"):
        monkeypatch.setattr(Path, name, guarded(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", guarded(os.fsync))
    monkeypatch.setattr(adapter_format, "save_file", guarded(save_file))
    monkeypatch.setattr(shutil, "rmtree", guarded(shutil.rmtree))
    return steps


def _steps_of_a_save(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        steps = _interrupt_at(patch, 10**9)
        rosa_fx.save_adapter(trained(), folder)
    return steps[0]


def test_old_or_new_after_an_interruption_anywhere(tmp_path: Path) -> None:
    old, new = trained(masks=False), trained()
    expected = {"old": old(inputs()), "new": new(inputs())}
    folder, seen = tmp_path / "a", []
    rosa_fx.save_adapter(old, folder)
    (folder / "notes.md").write_text("mine")
    for at in range(1, _steps_of_a_save(folder) + 1):
        shutil.rmtree(folder)
        rosa_fx.save_adapter(old, folder)
        (folder / "notes.md").write_text("mine")
        with pytest.MonkeyPatch.context() as patch:
            _interrupt_at(patch, at)
            with pytest.raises(KeyboardInterrupt):
                rosa_fx.save_adapter(new, folder)
        found = rosa_fx.load_adapter(plain(), folder)(inputs())
        seen.append(next(name for name, output in expected.items() if torch.equal(output, found)))
        # A second interruption, in the save that follows, loses nothing either.
        for again in (2, 4):
            with pytest.MonkeyPatch.context() as patch:
                _interrupt_at(patch, again)
                with pytest.raises(KeyboardInterrupt):
                    rosa_fx.save_adapter(new, folder)
            rosa_fx.load_adapter(plain(), folder)
        rosa_fx.save_adapter(new, folder)
        assert torch.equal(rosa_fx.load_adapter(plain(), folder)(inputs()), expected["new"])
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS, "notes.md"]
    assert sorted(seen, reverse=True) == seen  # first the old, from some moment on the new
    assert set(seen) == {"old", "new"}


def test_new_directory_is_whole_or_absent(tmp_path: Path) -> None:
    folder, seen = tmp_path / "b", []
    for at in range(1, _steps_of_a_save(tmp_path / "a") + 1):
        with pytest.MonkeyPatch.context() as patch:
            _interrupt_at(patch, at)
            with pytest.raises(KeyboardInterrupt):
                rosa_fx.save_adapter(trained(), folder)
        seen.append(folder.exists())
        if folder.exists():
            rosa_fx.load_adapter(plain(), folder)
            shutil.rmtree(folder)
    assert True in seen
    assert False in seen
    rosa_fx.save_adapter(trained(), folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_failed_write_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = trained(masks=False)
    rosa_fx.save_adapter(old, tmp_path / "a")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for name in ("a", "b"):
            with pytest.raises(RosaError, match=f"could not write the adapter .*{name}: .*No space left"):
                rosa_fx.save_adapter(trained(), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert not (tmp_path / "a" / PENDING).exists()
    assert torch.equal(rosa_fx.load_adapter(plain(), tmp_path / "a")(inputs()), old(inputs()))


def test_interrupted_replacement_loads_where_nothing_can_be_written(tmp_path: Path) -> None:
    rosa_fx.save_adapter(trained(masks=False), tmp_path / "a")
    rosa_fx.save_adapter(trained(), tmp_path / "b")
    pending = tmp_path / "a" / PENDING
    pending.mkdir()
    (tmp_path / "b" / CONFIG).rename(pending / CONFIG)
    (tmp_path / "b" / TENSORS).replace(tmp_path / "a" / TENSORS)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    assert torch.equal(rosa_fx.load_adapter(plain(), tmp_path / "a")(inputs()), trained()(inputs()))
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
