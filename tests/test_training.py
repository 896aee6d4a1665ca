"""The trainer: rules of weighting and order, phases, exact resume, checkpoints that survive accidents, errors."""

import io
import itertools
import json
import math
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rosa_fx
from rosa_fx import RosaError, RosaSpec, TrainConfig, train
from rosa_fx.adapters import adapter_state
from rosa_fx.training import checkpoint as checkpoints
from rosa_fx.training import read_metrics, save_loss_curve, tune_allocator
from rosa_fx.training.batches import END, BatchSource, count_tokens, target_counter
from rosa_fx.training.config import has_native_bf16
from rosa_fx.training.engine import Engine
from rosa_fx.training.interrupt import uninterrupted
from rosa_fx.training.metrics import current_rss, peak_rss
from rosa_fx.training.optim import learning_rate_factor
from rosa_fx.training.rng import Stream, capture, restore, seed_all, untouched

VOCAB, WIDTH = 11, 16
EPS = torch.finfo(torch.float32).eps


class Tiny(nn.Module):
    """A language model in Hugging Face's calling convention, with dropout so that random state matters."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        logits = self.head(x + self.down(self.drop(F.relu(self.up(x)))))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def make_model(dropout: float = 0.1, **spec: Any) -> nn.Module:
    torch.manual_seed(3)
    fields: dict[str, Any] = {"base": "keep", "rank": 2, "alpha": 4, "density": 0.05, "schedule": "wl3"}
    targets = ("up.weight", "down.weight")
    return rosa_fx.transform(Tiny(dropout), RosaSpec(**{**fields, "targets": targets, **spec}))


def make_data(count: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    data = []
    for i in range(count):
        ids = torch.randint(0, VOCAB, (2, 5), generator=generator)
        labels = (ids * 3 + 1) % VOCAB
        labels[0, : i % 4] = -100
        data.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return data


def config(**fields: Any) -> TrainConfig:
    defaults = {"max_steps": 8, "compile": False, "progress": False, "warmup_steps": 2, "log_every": 1, "lr": 0.01}
    return TrainConfig(**{**defaults, "lr_sparse": 0.01, **fields})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state(model).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


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


# Micro-batches


def test_sequences_are_shuffled_from_seed_and_epoch() -> None:
    def epoch(source: BatchSource) -> list[int]:
        return list(iter(source.take, END))

    source = BatchSource(list(range(20)), seed=5)
    first = epoch(source)
    assert source.next_epoch()
    second = epoch(source)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != list(range(20))
    again = BatchSource(list(range(20)), seed=5)
    again.seek(1, 7)
    assert epoch(again) == second[7:]
    assert epoch(BatchSource(list(range(20)), seed=6)) != first


@pytest.mark.parametrize("own_generator", [False, True])
def test_loader_is_repeatable_and_leaves_the_random_state_alone(own_generator: bool) -> None:
    def loader() -> DataLoader:
        generator = torch.Generator() if own_generator else None
        return DataLoader(TensorDataset(torch.arange(12)), batch_size=2, shuffle=True, generator=generator)

    def rest(source: BatchSource) -> list[list[int]]:
        return [batch[0].tolist() for batch in iter(source.take, END)]

    before = torch.get_rng_state()
    source = BatchSource(loader(), seed=1)
    first = rest(source)
    source.next_epoch()
    second = rest(source)
    assert torch.equal(before, torch.get_rng_state())
    assert first != second
    torch.rand(3)
    again = BatchSource(loader(), seed=1)
    again.seek(1, 4)
    assert rest(again) == second[4:]


def test_an_iterator_is_one_pass_and_is_skipped_on_seek() -> None:
    source = BatchSource(iter(range(5)), seed=0)
    source.seek(0, 2)
    assert source.take() == 2
    assert not source.next_epoch()
    with pytest.raises(RosaError, match="cannot go back"):
        source.seek(0, 0)
    with pytest.raises(RosaError, match="pass the same data"):
        BatchSource(iter(range(3)), seed=0).seek(0, 4)


def test_random_augmentation_repeats_when_a_position_is_sought() -> None:
    class Noisy:
        def __iter__(self) -> Iterator[tuple[float, float, float]]:
            for _ in range(4):
                yield random.random(), float(np.random.rand()), float(torch.rand(()))

    source = BatchSource(Noisy(), seed=2)
    drawn = list(iter(source.take, END))
    torch.rand(5)
    again = BatchSource(Noisy(), seed=2)
    again.seek(0, 2)
    assert list(iter(again.take, END)) == drawn[2:]


@pytest.mark.parametrize(("batches", "message"), [([], "empty"), ({"a": 1}, "dict"), (torch.ones(2), "Tensor"), (3, "int")])
def test_unusable_batches(batches: Any, message: str) -> None:
    with pytest.raises(RosaError, match=message):
        BatchSource(batches, seed=0)


def test_target_and_token_counts() -> None:
    class TinyForCausalLM(nn.Module):
        loss_type = "ForCausalLM"

    labels = torch.tensor([[1, 2, -100], [-100, 4, 5]])
    assert target_counter(nn.Linear(1, 1))({"labels": labels}) == 4
    assert target_counter(TinyForCausalLM())({"labels": labels}) == 3
    assert target_counter(TinyForCausalLM())({"labels": torch.tensor([0, -100, 2])}) == 2
    assert target_counter(nn.Linear(1, 1))({"labels": torch.rand(3, 4)}) == 3
    assert target_counter(nn.Linear(1, 1))((labels, labels)) == 1
    assert count_tokens({"input_ids": labels, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}) == 5
    assert count_tokens({"input_ids": labels}) == 6
    assert count_tokens((labels,)) is None


def test_random_streams() -> None:
    seed_all(1)
    python, numpy, tensor = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    kept = capture()
    with untouched():
        random.random(), np.random.rand(), torch.rand(1)
    stream = Stream(7)
    with stream.use():
        first = random.random(), np.random.randn(), float(torch.rand(()))
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy
    assert torch.equal(torch.get_rng_state(), tensor)
    random.gauss(0, 1), np.random.randn()  # both keep a second number back
    restore(*kept)
    assert random.getstate() == python
    with stream.use():
        second = random.random(), np.random.randn(), float(torch.rand(()))
    with Stream(7).use():
        assert (random.random(), np.random.randn(), float(torch.rand(()))) == first
    assert first != second


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


# Exact resume


@pytest.mark.parametrize("stop", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("restart", [False, True])
def test_resume_is_exact_in_every_phase(tmp_path: Path, stop: int, restart: bool) -> None:
    """Steps 1 to 3 low-rank, 4 and 5 collect (4: in the middle of collecting), then joint or, with restart, again."""
    data, held_out = make_data(3), make_data(2, seed=1)
    fields: dict[str, Any] = {"max_steps": 9, "gradient_accumulation": 2, "restart": restart}
    whole = make_model(num_grads=2)
    expected = train(whole, data, config(**fields), eval_batches=held_out, out=tmp_path / "whole")

    out = tmp_path / "parts"
    part = train(make_model(num_grads=2), data, config(**fields, stop_at_step=stop), eval_batches=held_out, out=out)
    assert (part.steps, part.finished) == (stop, False)
    seed_all(99)  # another process starts with other random numbers and another initial adapter
    model = make_model(num_grads=2)
    with torch.no_grad():
        rosa_fx.adapter(model, "up.weight").low_rank.A.fill_(1.0)
    resumed = train(model, data, config(**fields), eval_batches=held_out, out=out, resume=True)

    assert resumed.losses == expected.losses
    assert resumed.evals == expected.evals
    assert resumed.restart_step == expected.restart_step == (5 if restart else None)
    assert_same(state(whole), state(model))
    for folder in ("whole", "parts"):
        rows = [r for r in read_metrics(tmp_path / folder / "metrics.jsonl") if r["event"] == "step"]
        assert [r["step"] for r in rows] == list(range(1, 10))
    # Including what is not the model: the two last checkpoints hold the same tensors.
    last = [checkpoints.load(tmp_path / folder / "checkpoints" / "step-9") for folder in ("whole", "parts")]
    assert last[0].tensors.keys() == last[1].tensors.keys()
    for group, tensors in last[0].tensors.items():
        assert_same(tensors, last[1].tensors[group])


def test_resume_of_an_iterator_skips_what_was_used(tmp_path: Path) -> None:
    whole, parts = make_model(), make_model()
    expected = train(whole, iter(make_data()), config())
    train(parts, iter(make_data()), config(stop_at_step=5), out=tmp_path)
    resumed = train(make_model(), iter(make_data()), config(), out=tmp_path, resume=True)
    assert resumed.losses == expected.losses


def test_resume_keeps_running_statistics(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        spec = RosaSpec(base="keep", rank=2, density=0.0, targets="0.weight")
        return rosa_fx.transform(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), spec)

    data = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean() + model(batch).relu().mean()

    whole, model = build(), build()
    train(whole, data, config(max_steps=4), loss_fn=loss_fn)
    train(build(), data, config(max_steps=4, stop_at_step=2), loss_fn=loss_fn, out=tmp_path)
    train(model, data, config(max_steps=4), loss_fn=loss_fn, out=tmp_path, resume=True)
    assert torch.equal(whole[1].running_mean, model[1].running_mean)
    assert torch.equal(whole[1].running_var, model[1].running_var)


def test_resume_of_a_finished_run_and_of_none(tmp_path: Path) -> None:
    data = make_data()
    first = train(make_model(), data, config(), out=tmp_path, resume=True, eval_batches=data)
    again = train(make_model(), data, config(), out=tmp_path, resume=True, eval_batches=data)
    assert again.losses == first.losses
    assert (again.eval_loss_before, again.eval_loss_after) == (first.eval_loss_before, first.eval_loss_after)
    with pytest.raises(RosaError, match="resume=True"):
        train(make_model(), data, config(), out=tmp_path)


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    data = make_data()
    train(make_model(), data, config(stop_at_step=2), out=tmp_path)
    with pytest.raises(RosaError, match=r"TrainConfig\.seed is 1"):
        train(make_model(), data, config(seed=1), out=tmp_path, resume=True)
    with pytest.raises(RosaError, match="rank"):
        train(make_model(rank=3), data, config(), out=tmp_path, resume=True)
    events: list[dict[str, Any]] = []
    train(make_model(), data, config(lr=0.02), out=tmp_path, resume=True, on_event=events.append)
    assert any("lr was 0.01 and is now 0.02" in e.get("text", "") for e in events)


# Accidents


def test_checkpoints_are_pruned_to_the_newest(tmp_path: Path) -> None:
    train(make_model(), make_data(), config(checkpoint_every=2, keep_checkpoints=3), out=tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-4", "step-6", "step-8"]
    files = {p.suffix for p in (tmp_path / "checkpoints" / "step-8").iterdir()}
    assert files == {".json", ".safetensors"}


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


@pytest.mark.parametrize("at", [3, 4, 5, 7])
def test_an_interrupt_saves_the_last_whole_step(tmp_path: Path, at: int) -> None:
    """Interrupted inside step `at`, after its forward pass drew random numbers; 4 and 5 are collecting steps."""
    whole, model = make_model(num_grads=2), make_model(num_grads=2)
    expected = train(whole, make_data(), config())
    interrupted = make_model(num_grads=2)
    calls = itertools.count(1)

    def interrupt(module: nn.Module, args: Any, output: Any) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt

    interrupted.head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"resume=True") as caught:
        train(interrupted, make_data(), config(checkpoint_every=4), out=tmp_path)
    # With a gradient already in the sums the step before cannot be saved any more; its own checkpoint can be used.
    assert f"step-{at - 1}" in str(caught.value)
    resumed = train(model, make_data(), config(), out=tmp_path, resume=True)
    assert resumed.losses == expected.losses
    assert_same(state(whole), state(model))


def test_an_interrupt_without_a_folder_says_that_nothing_is_saved() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="nothing is saved"):
        train(make_model(), make_data(), config(), loss_fn=interrupt)  # type: ignore[arg-type]


def test_an_interrupt_waits_for_the_end_of_an_update() -> None:
    done = []

    def update() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        update()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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


# What the user sees


def test_quiet_lines_and_bar() -> None:
    shown = {}
    for kind, progress, terminal in (("quiet", False, True), ("lines", True, False), ("bar", True, True)):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=140)
        data = make_data()
        train(make_model(), data, config(progress=progress, log_every=4), eval_batches=data, console=console)
        shown[kind] = file.getvalue()
    assert shown["quiet"] == ""
    lines = shown["lines"].splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step") and "lr" in line] == ["1/8", "4/8", "8/8"]
    assert sum("held-out loss" in line for line in lines) == 2
    assert "tokens/s" in shown["bar"]
    assert "joint" in shown["bar"]


def test_metrics_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    train(make_model(), make_data(), config(eval_every=3), eval_batches=make_data(2), out=tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    expected = {"step", "phase", "loss", "lr", "lr_sparse", "grad_norm", "tokens", "tokens_per_s", "seconds", "rss"}
    assert all(expected <= row.keys() for row in rows if row["event"] == "step")
    assert [row["step"] for row in rows if row["event"] == "eval"] == [0, 3, 6, 8]
    picture = save_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "pictures" / "loss.png", title="tiny")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(RosaError, match="no training step"):
        save_loss_curve(tmp_path / "none.jsonl", picture)


def test_memory_figures_are_bytes() -> None:
    psutil = pytest.importorskip("psutil")
    now = psutil.Process().memory_info().rss
    assert 0.5 * now < current_rss() < 2 * now
    assert current_rss() <= peak_rss() * 1.01


def test_allocator_keeps_large_blocks() -> None:
    """In a process of its own, because it cannot be undone: after tuning, a freed block's pages stay mapped."""
    import subprocess
    import sys

    code = (
        "import resource, torch\n"
        "from rosa_fx.training import tune_allocator\n"
        "def faults():\n"
        "    torch.empty(4096, 4096).fill_(1)\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5): torch.empty(4096, 4096).fill_(1)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "a = faults(); tuned = tune_allocator(); b = faults()\n"
        "assert not tuned or b < a / 2 or a < 100, (a, b)\n"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    assert isinstance(tune_allocator(), bool)


def test_compiled_training_equals_eager() -> None:
    """Through every phase. Adam divides by the size of a gradient, so rounding may grow from step to step."""
    data = make_data(3)
    settings = {"max_steps": 4, "bf16": False}
    eager = train(make_model(0.0, schedule="wl1"), data, config(**settings))
    compiled = train(make_model(0.0, schedule="wl1"), data, config(**settings, compile=True))
    assert compiled.compiled
    assert eager.losses == pytest.approx(compiled.losses, rel=256 * EPS)
