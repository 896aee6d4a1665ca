"""The trainer: configuration, rules of weighting and order, phases, errors."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_models import EPS, Tiny, assert_same, config, make_data, make_model, state

import rosa_fx
from rosa_fx import RosaError, RosaSpec, TrainConfig, train
from rosa_fx.training.batches import BatchSource
from rosa_fx.training.config import has_native_bf16
from rosa_fx.training.engine import Engine
from rosa_fx.training.optim import learning_rate_factor

# Configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("max_steps", 0),
        ("max_steps", 1.5),
        ("gradient_accumulation", True),
        ("lr", -1.0),
        ("lr_sparse", math.nan),
        ("weight_decay", math.inf),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("warmup_steps", -1),
        ("schedule", "cosine"),
        ("max_grad_norm", 0.0),
        ("bf16", "yes"),
        ("compile", 1),
        ("dynamic", "auto"),
        ("on_nonfinite", "warn"),
        ("tensorboard", "no"),
        ("keep_checkpoints", 0),
        ("seed", -1),
    ],
)
def test_config_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(RosaError, match=rf"TrainConfig\.{field} is .*use "):
        TrainConfig(**{field: value})


def test_config_bf16_follows_the_hardware() -> None:
    cpu = torch.device("cpu")
    assert TrainConfig(bf16=True).autocast_to_bf16(cpu)
    assert not TrainConfig(bf16=False).autocast_to_bf16(cpu)
    assert TrainConfig().autocast_to_bf16(cpu) == has_native_bf16(cpu)


def test_bf16_autocast_reaches_the_model() -> None:
    seen = []
    model = make_model()
    model.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert train(model, make_data(1), config(max_steps=1, bf16=True)).bf16
    assert seen == [torch.bfloat16]


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    factors = [learning_rate_factor(i, 10, 2, "linear") for i in range(11)]
    assert factors == [0.5, 1.0, 1.0, *[(10 - i) / 8 for i in range(3, 10)], 0.0]
    assert [learning_rate_factor(i, 4, 0, "constant") for i in range(4)] == [1.0] * 4


# What a step computes


def test_accumulation_equals_one_large_batch() -> None:
    """Float64, so that only a wrong weighting could tell the two apart by more than rounding."""
    model = make_model(dropout=0.0).double()
    data = make_data(4)
    large = {key: torch.cat([batch[key] for batch in data]) for key in data[0]}
    engine = Engine(model, config(bf16=False), torch.device("cpu"), None, None)
    gradients = []
    for group in (data, [large]):
        for parameter in model.parameters():
            parameter.grad = None
        loss = engine.accumulate([engine.describe(batch) for batch in group])
        gradients.append([loss] + [p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 1
    for a, b in zip(*gradients):
        # The loss itself is handled in float32, whose rounding is the one difference there may be.
        assert (a - b).abs().max() <= 4 * EPS * b.abs().max()


def test_one_step_is_adamw_of_the_clipped_mean_gradient() -> None:
    data = make_data(2)
    model, reference = make_model(0.0), make_model(0.0)
    result = train(model, data, config(max_steps=1, gradient_accumulation=2, max_grad_norm=0.01, bf16=False))
    groups = rosa_fx.trainable_parameters(reference, lr=0.005, lr_sparse=0.005)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    weights = [float((batch["labels"] != -100).sum()) for batch in data]
    losses = []
    for index in BatchSource(data, 0)._order():
        loss = reference(**data[index])["loss"] * (weights[index] / sum(weights))
        loss.backward()
        losses.append(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_([p for p in reference.parameters() if p.grad is not None], 0.01)
    optimizer.step()
    assert norm > 0.01
    assert result.losses == [pytest.approx(float(sum(losses)), rel=8 * EPS)]
    for name, value in state(reference).items():
        assert torch.allclose(state(model)[name], value, rtol=64 * EPS, atol=0), name


def test_batches_without_targets_are_passed_over() -> None:
    data = make_data(3)
    empty = {**data[0], "labels": torch.full_like(data[0]["labels"], -100)}
    events: list[dict[str, Any]] = []
    result = train(make_model(), [*data, empty], config(max_steps=None), on_event=events.append, eval_batches=[empty, data[0]])
    assert result.steps == 3
    assert all(map(math.isfinite, [*result.losses, result.eval_loss_after or math.nan]))
    assert any("passed over" in e.get("text", "") for e in events)
    with pytest.raises(RosaError, match="no target"):
        train(make_model(), data, config(), eval_batches=[empty])


def test_loss_function_and_weights_for_any_batch() -> None:
    torch.manual_seed(0)
    model = rosa_fx.transform(nn.Sequential(nn.Linear(8, 8)), RosaSpec(base="keep", rank=2, targets="*.weight"))
    data = [(torch.randn(n, 8), torch.randn(n, 8)) for n in (1, 3)]

    def loss_fn(called: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(called(batch[0]), batch[1])

    result = train(
        model,
        data,
        config(max_steps=1, gradient_accumulation=2, lr=0.0),
        loss_fn=loss_fn,
        weight_fn=lambda b: len(b[0]),
    )
    everything = F.mse_loss(model(torch.cat([b[0] for b in data])), torch.cat([b[1] for b in data]))
    assert result.losses[0] == pytest.approx(everything.item(), rel=16 * EPS)
    with pytest.raises(RosaError, match="pass loss_fn"):
        train(model, data, config())
    with pytest.raises(RosaError, match="tensor with one number"):
        train(model, data, config(), loss_fn=lambda called, batch: called(batch[0]))
    with pytest.raises(RosaError, match="does not depend on any trainable"):
        train(model, data, config(), loss_fn=lambda called, batch: batch[0].sum())
    with pytest.raises(RosaError, match="weight_fn gave"):
        train(model, data, config(), loss_fn=loss_fn, weight_fn=lambda batch: -1)


def test_evaluation_is_token_weighted_and_changes_nothing() -> None:
    model = make_model()
    data = make_data(4)
    before = state(model)
    result = train(model, data, config(max_steps=1, lr=0.0, lr_sparse=0.0), eval_batches=iter(data))
    model.eval()
    large = {key: torch.cat([batch[key] for batch in data]) for key in data[0]}
    assert result.eval_loss_before == result.eval_loss_after == pytest.approx(model(**large)["loss"].item(), rel=16 * EPS)
    assert_same(before, state(model))
    with_eval = train(make_model(), data, config(eval_every=2), eval_batches=data)
    without = train(make_model(), data, config())
    assert with_eval.losses == without.losses
    assert list(with_eval.evals) == [0, 2, 4, 6, 8]


def test_modes_and_cache_are_restored() -> None:
    model = make_model()
    model.eval()
    model.up.train()
    model.config = type("Config", (), {"use_cache": True})()  # type: ignore[assignment]
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, module.config.use_cache)))
    train(model, make_data(1), config(max_steps=1))
    assert seen == [(True, False)]
    assert not model.training
    assert model.up.training
    assert model.config.use_cache


# Phases and length


def test_phases_and_sparse_values() -> None:
    model = make_model(num_grads=2)
    values = rosa_fx.adapter(model, "up.weight").sparse.values
    seen: list[tuple[int, bool]] = []
    events: list[dict[str, Any]] = []

    def on_event(row: dict[str, Any]) -> None:
        events.append(row)
        if row["event"] == "step":
            seen.append((row["step"], bool(values.any())))

    result = train(model, make_data(), config(weight_decay=0.1, gradient_accumulation=2), on_event=on_event)
    steps = [row for row in events if row["event"] == "step"]
    assert [row["phase"] for row in steps] == ["low_rank"] * 3 + ["collect"] * 2 + ["joint"] * 3
    assert [row["targets"] > 0 and row["tokens"] for row in steps] == [20] * 8
    assert seen == [(i, i > 5) for i in range(1, 9)]
    assert values is rosa_fx.adapter(model, "up.weight").sparse.values
    assert result.parameters["sparse"] == sum(m.cols.numel() for m in rosa_fx.masks(model).values())
    assert result.steps == len(result.losses) == 8
    assert result.seconds > 0
    assert result.tokens == 160


@pytest.mark.parametrize("counted", ["epochs", "max_steps"])
def test_restart_begins_again_with_the_mask(counted: str) -> None:
    model = make_model()
    data = make_data(8)
    first = state(model)
    at_restart: list[dict[str, Tensor]] = []
    rows: list[dict[str, Any]] = []

    def on_event(row: dict[str, Any]) -> None:
        if row["event"] == "restart":
            at_restart.append(state(model))
        elif row["event"] == "step":
            rows.append(row)

    length: dict[str, Any] = {"max_steps": None} if counted == "epochs" else {"max_steps": 10}
    result = train(model, data, config(restart=True, **length), on_event=on_event)
    assert result.restart_step == 4
    assert len(at_restart) == 1
    for name, value in at_restart[0].items():
        if name.endswith(("low_rank.B", "sparse.values")):
            assert not value.any(), name
        elif name.endswith("low_rank.A"):
            assert value.shape == first[name].shape
        else:
            assert torch.equal(value, state(model)[name]), name
    steps = 12 if counted == "epochs" else 10
    assert result.steps == steps
    rates = [row["lr"] for row in rows]
    total = steps - 4
    assert rates[4:] == pytest.approx([0.01 * learning_rate_factor(i, total, 2, "linear") for i in range(total)])
    # The data begin again too: the first batch of epoch 0 has the same number of targets.
    assert [r["targets"] for r in rows[:4]] == [r["targets"] for r in rows[4:8]]


def test_a_run_too_short_for_its_masks_says_so() -> None:
    events: list[dict[str, Any]] = []
    train(make_model(schedule="wl9"), make_data(2), config(max_steps=4), on_event=events.append)
    assert any("sparse values never train" in e.get("text", "") for e in events)


def test_lengths() -> None:
    data = make_data(5)
    assert train(make_model(), data, config(max_steps=None, epochs=2, gradient_accumulation=2)).steps == 6
    assert train(make_model(), iter(data), config(max_steps=9)).steps == 5
    stream = (batch for batch in data)
    with pytest.raises(RosaError, match="max_steps"):
        train(make_model(), stream, config(max_steps=None))
    with pytest.raises(RosaError, match="no micro-batch"):
        train(make_model(), _Nothing(), config())


class _Nothing:
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_needs_a_transformed_model_and_something_to_train() -> None:
    with pytest.raises(RosaError, match="transform"):
        train(Tiny(), make_data(), config())
    with pytest.raises(RosaError, match="TrainConfig"):
        train(make_model(), make_data(), {"epochs": 1})  # type: ignore[arg-type]
    with pytest.raises(RosaError, match="needs out"):
        train(make_model(), make_data(), config(), resume=True)


def test_compiled_training_equals_eager() -> None:
    """Through every phase. Adam divides by the size of a gradient, so rounding may grow from step to step."""
    data = make_data(3)
    settings = {"max_steps": 4, "bf16": False}
    eager = train(make_model(0.0, schedule="wl1"), data, config(**settings))
    compiled = train(make_model(0.0, schedule="wl1"), data, config(**settings, compile=True))
    assert compiled.compiled
    assert eager.losses == pytest.approx(compiled.losses, rel=256 * EPS)
