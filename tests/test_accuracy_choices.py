"""The accuracy study's second half: variants of the recipe, where masks lie, what a step costs, which runs are made."""

from __future__ import annotations

import copy
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
from rosa_fx.data import make_batches

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.append(str(EXAMPLES))

import accuracy  # noqa: E402
from accuracy_study import choices_report, cost, gradients, grid, known_answer, recipe, structure, task, task_report  # noqa: E402
from accuracy_study.results import Results  # noqa: E402


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_answer, "LEARNING_RATES", (1e-2,))
    monkeypatch.setattr(known_answer, "STEPS", 160)
    monkeypatch.setattr(known_answer, "WARM_UP", 60)
    monkeypatch.setattr(known_answer, "BATCH", 128)


def bench_of(folder: Path) -> task.Bench:
    """The study's bench over a model of two blocks and twelve different rows."""
    data = folder / "rows.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"context: CREATE TABLE t ({name} INTEGER)"},
                {"role": "assistant", "content": f"SELECT {name} FROM t"},
            ]
        }
        for name in "abcdefghijkl"
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return task.Bench(task.Setting("rows.jsonl", 8, 4, 2, 1, schedule="wl1"), data, str(save_chat_model(folder / "model")))


def test_variants_change_what_they_say(few_steps: None) -> None:
    problem = known_answer.middle("linear", 0, samples=256)
    found = {name: recipe.run_known_answer(problem, recipe.VARIANTS[name]) for name in recipe.VARIANTS}
    base = found[recipe.BASE]
    assert base == known_answer.run(problem, "rosa")
    assert found["warm-up 0"]["f1"] < base["f1"] - 0.05, "masks of the first gradient see L, not only S"
    assert found["4 gradients, squared"]["f1"] > base["f1"]
    # The only weight has the whole budget whichever way it is allocated; a restart keeps the mask but trains from zero again.
    assert found["masks over the model"] == base
    assert found["restart, whole run"]["f1"] == found["restart, same steps"]["f1"] == base["f1"]
    assert found["restart, whole run"]["error"] < found["restart, same steps"]["error"]
    assert len({values["parameters"] for values in found.values()}) == 1
    values = [found[name]["error"] for name in recipe.VARIANTS if name not in ("masks over the model",)]
    assert len(set(values)) == len(values), "no variant is another in disguise"


def test_masks_over_the_model_spend_the_same_budget(few_steps: None) -> None:
    problem = known_answer.middle("transformer", 0, samples=64)
    per_weight, over_model = (recipe.VARIANTS[name] for name in (recipe.BASE, "masks over the model"))
    one, other = recipe.run_known_answer(problem, per_weight), recipe.run_known_answer(problem, over_model)
    assert one["parameters"] == other["parameters"]
    assert one["output_error"] != other["output_error"]


def test_sparse_products_beside_are_nearer_to_the_exact_ones() -> None:
    torch.manual_seed(0)
    model = rosa_fx.transform(nn.Sequential(nn.Linear(64, 64)), rosa_fx.RosaSpec(base="keep", rank=0, density=0.1))
    weight = rosa_fx.adapter(model, "0.weight")
    flat = torch.randperm(64 * 64)[: weight.sparse.values.numel()]
    rosa_fx.set_masks(model, {"0.weight": rosa_fx.Mask.from_indices(flat // 64, flat % 64, (64, 64))})
    rosa_fx.MaskSchedule(model)  # the phase in which S counts
    # Small beside the weight: what folding into bfloat16 loses.
    weight.sparse.values.data.normal_().mul_(1e-3)
    x = torch.randn(256, 64).bfloat16()
    with torch.no_grad():
        kept = [t.bfloat16().double() for t in (rosa_fx.base_weight(model, "0.weight"), model[0].bias)]
        exact = x.double() @ (kept[0] + rosa_fx.delta(model, "0.weight").double()).T + kept[1]

    def right() -> float:
        """Share of results that are the exact ones rounded once."""
        with torch.autocast("cpu", torch.bfloat16):
            return float((model(x) == exact.bfloat16()).double().mean())

    folded = right()
    with recipe.exact_sparse():
        assert right() > 0.99
    assert right() == folded < 0.9


def test_shape_of_a_mask() -> None:
    dense = torch.zeros(200, 50, dtype=torch.bool)
    dense[0] = True  # the fullest row
    dense[1:51, 3] = True
    shape = structure.Shape.of(rosa_fx.Mask.from_dense(dense))
    assert shape.empty_rows == pytest.approx(149 / 200)
    assert shape.empty_columns == 0
    assert shape.top_rows == pytest.approx(51 / 100)  # 1 % of 200 rows: two of them
    assert shape.top_columns == pytest.approx(51 / 100)
    assert shape.longest_row == pytest.approx(50 / 0.5)
    half = torch.zeros_like(dense)
    half[0, :25] = True
    assert structure.overlap(rosa_fx.Mask.from_dense(half), rosa_fx.Mask.from_dense(dense)) == 1
    assert structure.overlap(rosa_fx.Mask.from_dense(dense), rosa_fx.Mask.from_dense(half)) == pytest.approx(0.25)


def test_masks_of_real_gradients_are_those_of_the_schedule(tmp_path: Path) -> None:
    """The dense gradients are what masks are made from in training: a first collecting step chooses the same entries."""
    bench = bench_of(tmp_path)
    batch = make_batches(bench.train_rows, 4, bench.length, bench.pad)[0]
    spec = rosa_fx.RosaSpec(base="nf4", rank=0, density=0.05)
    found = gradients.dense_gradients(gradients.over_base(bench.plain, "nf4"), [batch])
    model = rosa_fx.transform(copy.deepcopy(bench.plain), spec)
    rosa_fx.train(model, [batch], rosa_fx.TrainConfig(max_steps=1, compile=False, progress=False))
    masks = rosa_fx.masks(model)
    assert found.keys() == masks.keys()
    shared = [structure.overlap(masks[name], structure.mask_of(found[name], 0.05)) for name in found]
    # bfloat16 products in another order move entries at the cut.
    assert min(shared) > 0.95


def test_structure_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "BATCH_ROWS", (2, 4))
    bench_of(tmp_path)
    arguments = ["structure", "--data", tmp_path / "rows.jsonl", "--model", tmp_path / "model", "--out", tmp_path / "out"]
    result = CliRunner().invoke(accuracy.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    rows = Results(tmp_path / "out" / "structure.jsonl").rows
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {row["key"]["kind"] for row in rows} == kinds
    assert len(rows) == len(kinds) * 2 * len(structure.DENSITIES)
    assert all(row["layers"] == 2 and 0 < row["overlap_bases"] <= 1 for row in rows)
    assert (tmp_path / "out" / "structure.png").read_bytes().startswith(b"\x89PNG")
    assert len(choices_report.structure_table(rows)) == 2 + len(rows)


def test_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    model = bench.plain
    total = sum(p.numel() for p in model.parameters())
    linear = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    buffers = sum(b.numel() * b.element_size() for b in {b.data_ptr(): b for b in model.buffers()}.values())
    size = next(model.parameters()).element_size()
    full = cost.held_bytes(bench, grid.Cell("full", "all", "keep"))
    assert full == (total - linear) * size + linear * (4 + 12) + buffers
    low = cost.held_bytes(bench, grid.Cell("low-rank", "small", "keep"))
    trained = sum(4 * sum(p.shape) for name, p in model.named_parameters() if "proj" in name)
    fingerprints = 16 * 14
    assert low == total * size + 16 * trained + buffers + fingerprints
    # A sparse value has a column beside it, and rows their offsets.
    rows = sum(p.shape[0] + 1 for name, p in model.named_parameters() if "proj" in name)
    assert cost.held_bytes(bench, grid.Cell("sparse", "small", "keep")) == low + 4 * (trained + rows)
    assert cost.held_bytes(bench, grid.Cell("low-rank", "small", "nf4")) < low


def test_variants_run_at_the_best_rate_of_the_recipe(tmp_path: Path) -> None:
    results = Results(tmp_path / "task.jsonl")
    (cell,) = grid.cells(["rosa 1/2"], ["small"], ["nf4"])
    (variant,) = grid.cells(["rosa 1/2"], ["small"], ["nf4"], "warm-up 0")
    assert not list(grid.next_runs(results, [variant], 2, {})), "nothing is known yet"
    for loss, key in enumerate(list(grid.next_runs(results, [cell], 2, {}))[::-1]):
        results.add(key, {"loss": float(loss)})
    best = cell.learning_rates[-1]
    assert [(k["lr"], k["seed"]) for k in grid.next_runs(results, [cell], 3, {})] == [(best, 1), (best, 2)]
    runs = list(grid.next_runs(results, [variant], 2, {}))
    assert [(k["lr"], k["seed"], k["variant"]) for k in runs] == [(best, 0, "warm-up 0"), (best, 1, "warm-up 0")]


def test_variants_of_the_task_train(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    key = {"method": "rosa 1/2", "budget": "small", "base": "nf4", "lr": 1e-2, "seed": 0}
    values: dict[str, Any] = {}
    for name in (
        recipe.BASE,
        "warm-up 0",
        "restart, same steps",
        "restart, whole run",
        "masks over the model",
        "bf16, S exact",
    ):
        values[name] = bench.run({**key, "variant": name}, judged=False, compile=False)
    assert {name: v["steps"] for name, v in values.items() if v["steps"] != 4} == {"restart, whole run": 6}
    counts = {v["parameters"] for v in values.values()}
    assert max(counts) - min(counts) <= 14, "a weight may lose an entry to rounding"
    losses = [v["loss"] for v in values.values()]
    assert len(set(losses)) == len(losses)


def test_task_report_takes_the_best_rate_and_compares_seeds(tmp_path: Path) -> None:
    def row(method: str, lr: float, seed: int, loss: float) -> dict[str, Any]:
        key = {"method": method, "budget": "small", "base": "nf4", "lr": lr, "seed": seed, "setting": SETTING}
        return {"key": key, "loss": loss, "losses": [1.0] * 10, "parameters": 10, "steps": 10}

    rates = grid.LEARNING_RATES["rosa"]
    results = Results(tmp_path / "task.jsonl")
    for method, shift in (("rosa 1/2", 0.0), ("low-rank", 0.5)):
        for each in [row(method, lr, 0, 2.0 + shift + i) for i, lr in enumerate(rates)] + [
            row(method, rates[0], 1, 1.0 + 3 * shift)
        ]:
            results.add(each.pop("key"), each)
    result = CliRunner().invoke(accuracy.app, ["report", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    text = (tmp_path / "README.md").read_text()
    assert "| 2 | 1.5000 ± " in text
    assert "| nf4 | 4 | low-rank | +1.0000 ± " in text
    assert "+0.5000, +1.5000" in text
    assert (tmp_path / "task.png").read_bytes().startswith(b"\x89PNG")
    assert task_report.cells_of(results.rows[:2], {"rosa 1/2": 3})[0].tuned is False


SETTING = {
    "model": "m",
    "data": "d",
    "train_rows": 1,
    "held_rows": 1,
    "batch": 1,
    "epochs": 1,
    "max_length": 8,
    "schedule": "wl1",
    "warmup_steps": 1,
}


def made_up_rows(count: int) -> list[dict[str, Any]]:
    """Questions about one column of a table by the value of another."""
    words = ["name", "year", "city", "team", "score", "coach", "artist", "title", "country", "player", "venue", "record"]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        a, b, c = (words[i] for i in torch.randperm(len(words), generator=generator)[:3].tolist())
        schema = f"CREATE TABLE table_{number} ({a} VARCHAR, {b} VARCHAR, {c} VARCHAR)"
        question = f"context: {schema}\n\n question: Name the {b} for {c} of {a}"
        answer = f"SELECT {b} FROM table_{number} WHERE {c} = '{a}'"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_minutes_of_the_task(tmp_path: Path) -> None:
    """Four methods of equal budget on SmolLM2-135M: all learn; entries that gradients chose learn faster than those of chance.

    Faster at one rate, that which is best for gradient masks in the study; a rate ten times as high makes up for a choice by
    chance, and these rows are too easy to tell two masks apart by then.
    """
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in made_up_rows(128)), encoding="utf-8")
    bench = task.Bench(task.Setting(data.name, 96, 32, 4, 1, 128, "wl8", 4), data, "smollm2-135m")
    rates = {"low-rank": 3e-3, "rosa 1/2": 3e-3, "sparse": 3e-4, "sparse, random mask": 3e-4}
    losses = {}
    for method, lr in rates.items():
        cell = grid.Cell(method, "large", "nf4")
        values = bench.run(cell.key(lr, 0, bench.identity), judged=method == "rosa 1/2")
        losses[method] = values["loss"]
        assert values["loss"] < 0.5 * values["losses"][0], method
        if "exact_match" in values:
            assert values["exact_match"] > 0.3
    assert losses["sparse"] < losses["sparse, random mask"]
