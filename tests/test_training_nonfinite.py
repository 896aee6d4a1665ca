"""Losses and gradients that are not finite: the run stops and says where, or skips the step; the best adapter is kept."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_models import EPS, assert_same, config, make_data, make_model, state

import rosa_fx
from rosa_fx import RosaError, train
from rosa_fx.training.engine import Engine


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = make_model()
    data = iter([*make_data(2), {**make_data(1)[0], "scale": math.inf}])

    def loss_fn(called: nn.Module, batch: dict[str, Any]) -> Tensor:
        return called(**batch)["loss"] * batch.get("scale", 1.0)

    good: list[dict[str, Tensor]] = []
    with pytest.raises(RosaError, match=r"step 3 \(low_rank\): the loss is inf .*of up\.weight\.low_rank\.") as caught:
        train(
            model,
            data,
            config(checkpoint_every=2),
            loss_fn=loss_fn,
            out=tmp_path,
            on_event=lambda row: good.append(state(model)),
        )
    assert str(tmp_path / "checkpoints" / "step-2") in str(caught.value)
    assert_same(good[-1], state(model))


def test_where_the_host_looks_late_bad_steps_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens on a GPU, made to happen here: the numbers of five steps are read together."""
    plain = make_model()
    expected = train(plain, make_data(), config())
    looks = Engine.__init__

    def late(self: Engine, *args: Any) -> None:
        looks(self, *args)
        self.looks_late = True

    monkeypatch.setattr(Engine, "__init__", late)
    model, rows = make_model(), []
    result = train(model, make_data(), config(log_every=5), on_event=rows.append)
    assert result.losses == expected.losses
    assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 9))
    assert_same(state(plain), state(model))

    two, stopped = make_model(), make_model()
    train(two, iter(make_data()[:2]), config())
    bad = {**make_data()[2], "scale": math.nan}
    data = iter([*make_data()[:2], bad, *make_data()[:2]])

    def loss_fn(called: nn.Module, batch: dict[str, Any]) -> Tensor:
        return called(**batch)["loss"] * batch.get("scale", 1.0)

    late_config = config(log_every=5)
    with pytest.raises(RosaError, match=r"step 3 \(low_rank\): the loss is nan"):
        train(stopped, data, late_config, loss_fn=loss_fn)
    assert_same(state(two), state(stopped))


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = make_model()
    b = rosa_fx.adapter(model, "down.weight").low_rank.B
    b.register_hook(lambda grad: torch.full_like(grad, math.nan))
    with pytest.raises(RosaError, match=r"first gradient that is not finite is that of down\.weight\.low_rank\.B"):
        train(model, make_data(), config())


def test_a_nan_while_collecting_names_step_and_weight() -> None:
    model = make_model(schedule="spa_only", rank=0)

    def loss_fn(called: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return called(**batch)["loss"] * math.nan

    with pytest.raises(RosaError, match=r"step 1 \(collect\).*no checkpoint"):
        train(model, make_data(), config(), loss_fn=loss_fn)


@pytest.mark.parametrize("phase", ["low_rank", "collect", "joint"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_is_skipped_where_asked(phase: str, where: str, tmp_path: Path) -> None:
    """Skipping equals a run that never saw the batch; in a collecting step the next batch makes the masks."""
    bad_at = {"low_rank": 2, "collect": 4, "joint": 6}[phase]
    # A skipped warm-up step counts as one.
    model, reference = make_model(0.0), make_model(0.0, schedule="wl2" if phase == "low_rank" else "wl3")
    calls: list[int] = []

    def loss_fn(called: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        loss = called(**batch)["loss"]
        if len(calls) != bad_at:
            return loss
        return loss * math.nan if where == "loss" else loss + (called.up.weight.sum() * 0.0).sqrt()  # 0 · inf = NaN backward

    data = make_data(7)
    # Neither rates nor length may depend on the number of steps, or the two runs could not be equal.
    fields: dict[str, Any] = {"schedule": "constant", "warmup_steps": 0, "on_nonfinite": "skip"}
    events: list[dict[str, Any]] = []
    result = train(model, iter(data), config(**fields), loss_fn=loss_fn, on_event=events.append, out=tmp_path)
    expected = train(reference, iter([*data[: bad_at - 1], *data[bad_at:]]), config(**fields))
    assert (result.steps, result.skipped, expected.skipped) == (7, 1, 0)
    assert [loss for loss in result.losses if math.isfinite(loss)] == expected.losses
    assert_same(state(reference), state(model))
    rows = [row for row in events if row["event"] == "step"]
    assert [row["step"] for row in rows if row["skipped"]] == [bad_at]
    assert [row["phase"] for row in rows].count("collect") == (2 if phase == "collect" else 1)
    assert any(row["event"] == "skip" and f"step {bad_at} ({phase})" in row["text"] for row in events)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_bad_collecting_step_is_skipped_in_a_compiled_run() -> None:
    """There the mask itself leaves the graph, and its NaN shows in a hook inside `backward()`."""
    runs = []
    for compiled in (False, True):
        calls: list[int] = []

        def loss_fn(called: nn.Module, batch: dict[str, Tensor], calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return called(**batch)["loss"] * (math.nan if len(calls) == 2 else 1.0)

        model = make_model(0.0, schedule="wl1")
        settings = config(max_steps=4, compile=compiled, bf16=False, on_nonfinite="skip")
        result = train(model, iter(make_data(4)), settings, loss_fn=loss_fn)
        assert result.skipped == 1
        runs.append((result.losses, rosa_fx.masks(model)))
    (eager, eager_masks), (other, other_masks) = runs
    assert other == pytest.approx(eager, rel=256 * EPS, nan_ok=True)
    for name, mask in eager_masks.items():
        assert torch.equal(mask.to_dense(), other_masks[name].to_dense())


@pytest.mark.parametrize("bad_at", [7, 9])
def test_a_skipped_step_leaves_no_trace_in_sums_of_gradients(bad_at: int) -> None:
    """Two micro-batches make a step and two steps the masks: one micro-batch is bad, in the first or the second of them."""
    model, reference = make_model(0.0, num_grads=2), make_model(0.0, num_grads=2)
    calls: list[int] = []

    def loss_fn(called: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return called(**batch)["loss"] * (math.nan if len(calls) == bad_at else 1.0)

    data = make_data(14)
    fields: dict[str, Any] = {"schedule": "constant", "warmup_steps": 0, "gradient_accumulation": 2}
    result = train(model, iter(data), config(**fields, on_nonfinite="skip"), loss_fn=loss_fn)
    first = bad_at // 2 * 2
    train(reference, iter([*data[:first], *data[first + 2 :]]), config(**fields))
    assert result.skipped == 1
    assert_same(state(reference), state(model))


def test_nothing_but_bad_steps_ends_the_run() -> None:
    def loss_fn(called: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return called(**batch)["loss"] * math.inf

    with pytest.raises(RosaError, match=r"the last 10 steps, to step 10, were all skipped .*no checkpoint"):
        train(make_model(), make_data(), config(max_steps=30, on_nonfinite="skip"), loss_fn=loss_fn)


def test_where_the_host_looks_late_bad_steps_are_skipped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Engine.__init__

    def late(self: Engine, *args: Any) -> None:
        looks(self, *args)
        self.looks_late = True

    monkeypatch.setattr(Engine, "__init__", late)
    model, reference = make_model(0.0), make_model(0.0)
    data = make_data(7)
    bad = {**data[1], "scale": math.nan}

    def loss_fn(called: nn.Module, batch: dict[str, Any]) -> Tensor:
        return called(**batch)["loss"] * batch.get("scale", 1.0)

    fields: dict[str, Any] = {"schedule": "constant", "warmup_steps": 0, "log_every": 5, "on_nonfinite": "skip"}
    result = train(model, iter([data[0], bad, *data[2:]]), config(**fields), loss_fn=loss_fn)
    # The schedule has counted the skipped warm-up step, as it does not know of it yet.
    expected = train(reference, iter([data[0], *data[2:]]), config(**fields))
    assert math.isnan(result.losses[1])
    assert result.losses[0] == expected.losses[0]
    assert result.losses[2] == expected.losses[1]
    assert result.skipped == 1
    assert all(bool(tensor.isfinite().all()) for tensor in state(model).values())


def test_the_best_adapter_is_kept(tmp_path: Path) -> None:
    """Trained to a point and then ruined by a learning rate that is far too high."""
    data, held_out = make_data(4), make_data(2, seed=1)
    first = config(max_steps=12, stop_at_step=6, eval_every=2, schedule="constant")
    model = make_model(0.0)
    good = train(model, data, first, eval_batches=held_out, out=tmp_path)
    at_best = state(model)
    assert good.best_step == 6
    result = train(
        make_model(0.0),
        data,
        config(max_steps=12, lr=30.0, eval_every=2, schedule="constant"),
        eval_batches=held_out,
        out=tmp_path,
        resume=True,
    )
    assert result.best_step == min((step for step in result.evals if step), key=lambda step: result.evals[step]) == 6
    loaded = rosa_fx.load_adapter(make_model(0.0), tmp_path / "best")
    assert_same(at_best, state(loaded))
    assert json.loads((tmp_path / "best" / "evaluation.json").read_text()) == {"step": 6, "loss": result.evals[6]}
