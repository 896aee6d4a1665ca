"""The table of architectures: a fast subset of it, and the command that makes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from other_process import run_python

from rosa_fx import coverage
from rosa_fx.coverage_check import TOLERANCE, check, distance
from rosa_fx.coverage_models import architectures, tiny_config

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("transformers")


@pytest.mark.parametrize(("model_type", "targets"), [("gpt_neox", 8), ("distilbert", 13), ("vit", 12)])
def test_architecture_is_fused_whole_and_merges(model_type: str, targets: int) -> None:
    row = check(model_type, architectures()[model_type][1])
    assert row["stage"] == "done", row.get("error")
    assert (row["targets"], row["fused"], row["dense"], row["unused"]) == (targets, targets, 0, 0)
    assert row["breaks"] == row["breaks_bare"] == 0
    assert max(row["output_error"], row["gradient_error"], row["merge_error"]) <= TOLERANCE


def test_a_type_that_cannot_be_built_is_a_row_with_every_error() -> None:
    row = check("llama", "NoSuchClass")
    assert row["stage"] == "build"
    assert "tiny:" in row["error"]
    assert "light:" in row["error"]


def test_known_architectures_are_many_and_diverse_ones_come_first() -> None:
    known = architectures()
    assert len(known) > 300
    assert list(known)[:3] == ["llama", "gpt2", "gpt_neox"]
    assert {"causal", "masked", "seq2seq", "vision", "audio"} <= {family for family, _ in known.values()}


def test_small_configuration_keeps_every_kind_of_layer() -> None:
    config = tiny_config("qwen3_next")
    assert config.hidden_size == 32
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert config.num_hidden_layers == len(config.layer_types) <= 4


def test_distance_sees_missing_and_infinite_values() -> None:
    a = [torch.tensor([1.0, float("inf")])]
    assert distance(a, a) == 0
    assert distance(a, [torch.tensor([1.0, 2.0])]) == float("inf")
    assert distance(a, []) == float("inf")
    assert distance([torch.tensor([1.5])], [torch.tensor([1.0])]) == 0.5


def _row(name: str, **values: Any) -> dict[str, Any]:
    row = {"name": name, "family": "causal", "class": "X", "stage": "done", "targets": 2, "fused": 2, "dense": 0, "unused": 0}
    row |= {"stacked": 0, "breaks": 0, "breaks_bare": 0, "reasons": [], "seconds": 1.0}
    return row | {"output_error": 1e-7, "gradient_error": 1e-7, "merge_error": 0.0} | values


def test_document_counts_what_ran_and_groups_reasons() -> None:
    dense = {"fused": 1, "dense": 1, "reasons": [["w", [4, 4], "used by aten.clamp.default [2, 4]; rank capped from 2 to 1"]]}
    rows = [_row("a"), _row("b", **dense), _row("c", **dense, breaks=1), _row("d", stage="build", error="no | config")]
    text = coverage.document(rows)
    assert "3 architectures" in text
    assert "1 of them (33.3 %)" in text
    assert "1 have graph breaks" in text
    assert "- 2 architectures: used by aten.clamp.default […]. Example: b, `w` [4, 4]" in text
    assert "- d (build): no \\| config" in text


def test_rows_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    store = tmp_path / "rows.jsonl"
    store.write_text(json.dumps(_row("a", seconds=1)) + "\n" + json.dumps(_row("a", seconds=2)) + '\n{"name": "b", "fam')
    assert {name: row["seconds"] for name, row in coverage.load(store).items()} == {"a": 2}


def test_command_ends_a_slow_architecture_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    store = out.with_suffix(".jsonl")
    store.write_text(json.dumps(_row("llama")) + "\n")
    command = [
        "-m",
        "rosa_fx.coverage",
        "--out",
        str(out),
        "--resume",
        "--limit",
        "1",
        "--seconds-per-model",
        "0.05",
    ]
    done = run_python(*command, limit=120)
    assert done.returncode == 0, done.stderr
    rows = coverage.load(store)
    assert list(rows) == ["llama", "gpt2"]
    assert rows["gpt2"]["stage"] == "timeout"
    text = out.read_text()
    assert "1 architectures" in text
    assert "- gpt2 (timeout): took longer than 0.05 s" in text
