"""Resumed runs equal uninterrupted ones bit for bit, from every phase and after an interrupt anywhere."""

import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_models import assert_same, config, make_data, make_model, state

import rosa_fx
from rosa_fx import RosaError, RosaSpec, train
from rosa_fx.training import checkpoint as checkpoints
from rosa_fx.training import read_metrics
from rosa_fx.training.interrupt import uninterrupted
from rosa_fx.training.rng import seed_all


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


# Interrupts


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


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """As in a terminal: a shell's background job inherits that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
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


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_the_trainer_takes_signals_over_and_gives_them_back() -> None:
    """A handler that the program has set itself stays in force, and other threads train without any."""
    seen: list[Any] = []
    watch = config(max_steps=1)

    def look(row: dict[str, Any]) -> None:
        seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))

    def mine(number: int, frame: Any) -> None:
        raise AssertionError

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(make_model(), make_data(1), watch, on_event=look)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not set(seen[0]) & set(before)
    signal.signal(signal.SIGTERM, mine)
    try:
        train(make_model(), make_data(1), watch, on_event=look)
    finally:
        signal.signal(signal.SIGTERM, before[1])
    assert seen[-1][1] is mine
    thread = threading.Thread(target=lambda: train(make_model(), make_data(1), watch, on_event=look))
    thread.start()
    thread.join()
    assert seen[-1] == before


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_step_that_fails_because_of_ctrl_c_is_saved_as_one(tmp_path: Path) -> None:
    """Ctrl-C on a terminal also reaches compilers and data workers, whose end then makes the step fail."""
    calls = itertools.count(1)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("a worker died")
        return model(**batch)["loss"]

    with pytest.raises(KeyboardInterrupt, match=r"interrupted after step 2: continue with resume=True") as caught:
        train(make_model(), make_data(), config(), loss_fn=loss_fn, out=tmp_path)
    assert isinstance(caught.value.__cause__, RuntimeError)
    model, whole = make_model(), make_model()
    train(model, make_data(), config(), out=tmp_path, resume=True)
    train(whole, make_data(), config())
    assert_same(state(whole), state(model))
