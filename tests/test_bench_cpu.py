"""The benchmark runs: every subcommand, with tiny shapes, and what it writes and decides."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.append(str(EXAMPLES))

from benchmarks import app, common, decode, layer, memory, model, parts, scaling  # noqa: E402


def invoke(tmp_path: Path, *arguments: str, code: int = 0) -> list[dict[str, str]]:
    """The rows of the table that a subcommand wrote."""
    result = CliRunner().invoke(app.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == code, result.output
    with (tmp_path / f"{arguments[0]}.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    text = (tmp_path / f"{arguments[0]}.md").read_text(encoding="utf-8")
    assert all(f"| {row.get('peer', '')} |" in text for row in rows)
    assert (tmp_path / f"{arguments[0]}.png").stat().st_size > 1000
    return rows


@pytest.fixture(autouse=True)
def _keep_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "tune_allocator", lambda: True)  # it holds for the whole process


def test_layer(tmp_path: Path) -> None:
    rows = invoke(tmp_path, "layer", "--shape", "64x128", "--rows", "33", "--rounds", "2", "--no-compiled")
    assert [row["peer"] for row in rows] == 2 * [
        layer.FLOOR,
        layer.FOUR_BIT,
        layer.QLORA,
        layer.REFERENCE,
        layer.RANDOM,
        layer.CLUSTERED,
        layer.DENSE,
    ]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(float(row["x floor"]) == 1.0 for row in rows if row["peer"] == layer.FLOOR)
    assert "CPU: " in (tmp_path / "layer.md").read_text(encoding="utf-8")


def test_parts_of_a_layer_add_up(tmp_path: Path) -> None:
    arguments = ["parts", "--shape", "64x128", "--rows", "70", "--rounds", "1", "--no-compiled", "--out", str(tmp_path)]
    result = CliRunner().invoke(app.app, arguments)
    assert result.exit_code == 0, result.output
    with (tmp_path / "parts.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    for dtype in ("float32", "bfloat16"):
        for label in parts.BASES.values():
            times = {row["part"]: row for row in rows if (row["dtype"], row["layer"]) == (dtype, label)}
            assert {"all", "GEMM", parts.REST} <= times.keys()
            whole = times.pop("all")
            for direction in ("forward", "backward"):
                found = sum(float(row[direction]) for row in times.values())
                assert found == pytest.approx(float(whole[direction]), abs=0.05)  # each is rounded to 0.01 ms
    assert parts.composition.gemm.product.__name__ == "product"  # nothing is watched any more


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 64)
    net = layer.rosa(weight, torch.float32, "nf4", 4, 0.05)
    x, dy = torch.randn(5, 64).requires_grad_(), torch.randn(5, 32)
    layer.verify(net, net, x, dy)
    with pytest.raises(SystemExit, match="nothing is timed"):
        layer.verify(net, lambda x: net(x) * 1.001, x, dy)


def test_decode(tmp_path: Path) -> None:
    options = ["--shape", "64x128", "--model", "llama-tiny", "--rows", "2", "--rounds", "2", "--no-compiled"]
    rows = invoke(tmp_path, "decode", *options)
    whole = [model.QLORA, model.QLORA_COMPILED, decode.EAGER, model.QROSA]
    single = [decode.FLOOR, layer.QLORA, layer.RANDOM, decode.MERGED]
    assert [row["peer"] for row in rows] == 2 * whole + [*single, decode.MEDIUM] + single
    assert torch.get_float32_matmul_precision() == "highest"


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in (("DENSITIES", (0.01,)), ("RANKS", (4,)), ("ROWS", (1, 8))):
        monkeypatch.setattr(scaling, name, values)
    rows = invoke(tmp_path, "scaling", "--size", "64", "--rows", "8", "--rounds", "1", "--no-compiled")
    assert [row["varied"] for row in rows[::2]] == ["size"] * 3 + ["rows"] * 2 + ["density", "rank"]
    resident = [float(row["resident MB"]) for row in rows if row["varied"] == "size" and row["peer"] == layer.RANDOM]
    assert resident == sorted(resident)


def test_model(tmp_path: Path) -> None:
    options = ["--model", "llama-tiny", "--dtype", "float32", "--tokens", "2x8", "--rounds", "1", "--no-compiled"]
    rows = invoke(tmp_path, "model", *options)
    assert {row["peer"] for row in rows} >= {model.LORA, model.QLORA_COMPILED, model.REFERENCE, model.QROSA, model.MASK}


def test_memory_of_one_peer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rosa_fx.compile_blocks", lambda model: 0)
    memory.child(model.QROSA, "llama-tiny", "float32", (2, 8))
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["base"] == found["parameters"] * (1 / 2 + 4 / 64)
    assert found["replaced"] == 4 * found["parameters"]
    assert found["peak"] > 0


def test_mask_extra_is_one_gradient() -> None:
    assert 0.5 <= memory.mask_extra((512, 512), torch.float32) <= 1.5


def test_check_repeats_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([2.0, 0.5, 2.0, 2.0])

    def measure() -> common.Part:
        value = next(values)
        return common.Part("test", "Test", [{"peer": "a"}], [common.Bar("met at last", value, 1.0)])

    assert app.finish(measure, tmp_path, check=True, tries=2) == []
    assert app.finish(measure, tmp_path, check=True, tries=2) == ["met at last"]
    assert common.Bar("", 3.0, 2.8, at_least=True).met
    assert not common.Bar("", 2.0, 2.8, at_least=True).met


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", ["memory", "cold"])
def test_parts_with_processes_of_their_own(tmp_path: Path, part: str) -> None:
    invoke(tmp_path, part, "--model", "llama-tiny", "--tokens", "2x8")
