"""Models of other libraries: a fast part of `python -m rosa_fx.coverage --others`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from rosa_fx import coverage
from rosa_fx.coverage_check import TOLERANCE, check_other
from rosa_fx.coverage_others import OTHERS, installed

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("transformers")


@pytest.mark.parametrize(("name", "targets"), [("mixer", 6), ("geometric", 6), ("linear-attention", 12)])
def test_model_of_another_library_is_fused_whole_and_merges(name: str, targets: int) -> None:
    if not installed(name):
        pytest.skip(f"{OTHERS[name][1]} is not installed")
    row = check_other(name, OTHERS[name][2])
    assert row["stage"] == "done", row.get("error")
    assert (row["targets"], row["fused"], row["dense"], row["unused"]) == (targets, targets, 0, 0)
    assert row["breaks"] == row["breaks_bare"]
    assert max(row["output_error"], row["gradient_error"], row["merge_error"]) <= TOLERANCE


def test_every_library_is_in_the_extra() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["others"]
    assert {requirement.split(">=")[0] for requirement in extra} == {library for _, library, _, _ in OTHERS.values()}
    assert len(extra) >= 8


def test_command_names_and_skips_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: Any) -> None:
        return None

    monkeypatch.setattr("rosa_fx.coverage_others.installed", none)
    monkeypatch.setattr(coverage, "_warm_up", none)
    out = tmp_path / "others.md"
    assert coverage.main(["--others", "--out", str(out), "--only", "mixer"]) == 1
    assert "mlp-mixer-pytorch is not installed" in capsys.readouterr().out
    assert "0 models of 0 libraries" in out.read_text()


def test_document_names_library_and_version() -> None:
    row = {"name": "mixer", "family": "vision", "class": "MLPMixer", "version": "0.3.1", "stage": "done", "targets": 6}
    row |= {"fused": 6, "dense": 0, "unused": 0, "stacked": 0, "breaks": 0, "breaks_bare": 0, "reasons": [], "seconds": 1.0}
    text = coverage.document([row], others=True)
    assert "1 models of 1 libraries that are not transformers ran; 1 of them (100.0 %)" in text
    assert "| mixer: MLPMixer | mlp-mixer-pytorch 0.3.1, vision | 6 | 6 |" in text
