"""The accuracy study: that its pieces measure what they say, and that its commands run and go on where they stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import save_chat_model
from torch import nn
from typer.testing import CliRunner

import rosa_fx
import rosa_fx.targets

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.append(str(EXAMPLES))

import accuracy  # noqa: E402
from accuracy_study import dense, grid, known_answer, methods, sql, statistics  # noqa: E402


def command(*arguments: str | Path) -> str:
    result = CliRunner().invoke(accuracy.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def test_low_rank_and_sparse_update_is_recovered_by_their_sum_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_answer, "LEARNING_RATES", (1e-2,))
    problem = known_answer.Problem("linear", samples=512, rank=4, nnz_per_rank=0.5, decay=1.0, noise=0.0, seed=0)
    found = {method: known_answer.run(problem, method) for method in ("rosa", "rosa, random mask", "low-rank", "sparse")}
    assert len({values["parameters"] for values in found.values()}) == 1, "equal budgets"
    assert found["rosa"]["f1"] > 10 * found["rosa, random mask"]["f1"]
    assert all(2 * found["rosa"]["error"] < values["error"] for name, values in found.items() if name != "rosa")


def test_every_method_spends_the_budget() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40))

    model = make()
    weights = [p for p in model.parameters() if p.dim() == 2]
    for budget, rank in methods.BUDGETS.items():
        for method in methods.METHODS:
            if method.full:
                continue
            copy = rosa_fx.transform(make(), methods.spec_of(method, model, budget, "keep", targets=["*.weight"]))
            spent = sum(p.numel() for group in rosa_fx.trainable_parameters(copy) for p in group["params"])  # type: ignore[attr-defined]
            assert spent == sum(rank * sum(p.shape) for p in weights)


def test_random_masks_are_set_and_differ_by_seed() -> None:
    def masks(seed: int) -> dict[str, rosa_fx.Mask]:
        spec = rosa_fx.RosaSpec(base="keep", rank=2, density=0.05, targets=["*.weight"])
        model = rosa_fx.transform(nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 40)), spec)
        methods.set_random_masks(model, seed)
        assert rosa_fx.MaskSchedule(model, "spa_only").phase == "sparse", "nothing is collected"
        return rosa_fx.masks(model)

    one, same, other = masks(0), masks(0), masks(1)
    assert one.keys() == {"0.weight", "1.weight"}
    assert all(torch.equal(one[name].cols, same[name].cols) for name in one)
    assert not any(torch.equal(one[name].cols, other[name].cols) for name in one)


def test_full_fine_tuning_trains_the_same_weights_in_float32(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_chat_model(tmp_path / "model"), dtype=torch.bfloat16)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    targets = {t.name for t in rosa_fx.targets.select_targets(model, rosa_fx.RosaSpec(base="keep"))}
    ids = torch.arange(16).reshape(2, 8) + 3
    batches = [{"input_ids": ids, "labels": ids}] * 12
    config = rosa_fx.TrainConfig(lr=1e-3, warmup_steps=2, bf16=True, progress=False)
    losses = dense.train_full(model, batches, config)
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.float(), before[name])}
    assert changed == targets
    assert all(p.dtype == (torch.float32 if name in targets else torch.bfloat16) for name, p in model.named_parameters())


def test_global_allocation_counts_the_largest_of_all() -> None:
    torch.manual_seed(0)
    scores = {"a": torch.rand(20, 30), "b": 3 * torch.rand(10, 10), "c": torch.zeros(4, 4)}
    cut = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[99]
    expected = {name: int((s >= cut).sum()) for name, s in scores.items()}
    assert methods.global_allocation(scores, 100) == expected


@pytest.mark.parametrize(
    ("found", "same"),
    [
        ("SELECT b FROM t WHERE a = 3", True),
        ("select b  from t where 3 = a", True),
        ("select B from T where A = 3", True),
        ("SELECT b FROM t", False),
        ("SELECT a FROM t WHERE a = 3", False),
        ("SELECT nothing FROM t", False),
        ("not a query", False),
    ],
)
def test_queries_are_compared_by_what_they_answer(found: str, same: bool) -> None:
    assert sql.same_answers("context: CREATE TABLE t (a INTEGER, b VARCHAR)", "SELECT b FROM t WHERE a = 3", found) is same


def test_queries_that_answer_nothing_say_nothing() -> None:
    assert sql.same_answers("CREATE TABLE t (a INTEGER)", "SELECT a FROM t WHERE 1 = 0", "SELECT a FROM t WHERE 1 = 0") is None
    assert sql.same_answers("CREATE TABLE t (a INTEGER)", "SELECT x FROM u", "SELECT a FROM t") is None


def test_normalised_text() -> None:
    assert sql.normalise('SELECT  a FROM t\nWHERE b = "x" ;') == sql.normalise("select a from t where b='x'")


def test_interval_is_that_of_students_t() -> None:
    mean, half = statistics.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5)


def test_task_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_chat_model(tmp_path / "model")
    question = "context: CREATE TABLE t (a INTEGER)"
    row: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "SELECT a FROM t"}]
    }
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    arguments = [
        "task",
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--model",
        model,
        "--method",
        "rosa 1/2",
        "--budget",
        "small",
    ]
    arguments += ["--base", "nf4", "--train-rows", "6", "--held-rows", "2", "--batch", "2", "--seeds", "2", "--no-compile"]
    arguments += ["--schedule", "wl1"]
    command(*arguments, "--limit", "2")
    lines = (tmp_path / "out" / "task.jsonl").read_text().splitlines()
    assert len(lines) == 2
    (tmp_path / "out" / "task.jsonl").write_text(lines[0] + "\n" + lines[1][:20])  # cut off while it was written
    command(*arguments)
    rows = [json.loads(line) for line in (tmp_path / "out" / "task.jsonl").read_text().splitlines()]
    assert rows[0] == json.loads(lines[0])
    # All learning rates, then the second seed at the best of them.
    trials = len(grid.LEARNING_RATES["rosa"])
    assert [row["key"]["seed"] for row in rows] == [0] * trials + [1]
    best = min(rows[:trials], key=lambda each: each["loss"])
    assert rows[trials]["key"]["lr"] == best["key"]["lr"]
    assert all({"loss", "losses", "parameters", "train_seconds"} <= row.keys() for row in rows)
    assert ["exact_match" in row for row in rows] == [False] * trials + [True]


def test_report_has_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_answer, "LEARNING_RATES", (1e-2,))
    monkeypatch.setattr(known_answer, "STEPS", 20)
    monkeypatch.setattr(known_answer, "WARM_UP", 5)
    threads = torch.get_num_threads()
    command("known-answer", "--out", tmp_path, "--seeds", "1", "--kind", "linear", "--limit", "20")
    torch.set_num_threads(threads)
    command("report", "--out", tmp_path)
    text = (tmp_path / "README.md").read_text()
    first = json.loads((tmp_path / "known_answer.jsonl").read_text().splitlines()[15])
    assert first["key"]["problem"]["samples"] == 512
    assert f"{first['error']:.3f}" in text
    assert (tmp_path / "known_answer.png").read_bytes().startswith(b"\x89PNG")
