"""The phases by optimizer step, their errors, restarts and resumes, against a plain transcription of the paper's rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference_rosa import (
    C,
    D,
    J,
    L,
    P,
    Pair,
    Tiny,
    assert_same_masks,
    assert_unchanged,
    batch,
    feed_forward,
    frozen,
    loss_of,
    snapshot,
    spec_of,
    train_step,
    transcribe,
    twins,
)
from torch import Tensor

import rosa_fx

PHASES = [
    ({"schedule": "wl0"}, [C, J, J]),
    ({"schedule": "wl0", "num_grads": 2}, [C, C, J, J]),
    ({"schedule": "wl1"}, [L, C, J, J]),
    ({"schedule": "wl1", "num_grads": 2}, [L, C, C, J]),
    ({"schedule": "wl3"}, [L, L, L, C, J, J]),
    ({"schedule": "wl3", "num_grads": 2}, [L, L, L, C, C, J]),
    ({"schedule": "spa_only", "rank": 0}, [C, P, P]),
    ({"schedule": "spa_only", "rank": 0, "num_grads": 2}, [C, C, P]),
    ({"schedule": "lora_only", "density": 0}, [L, L, L]),
    ({"schedule": "wl1", "density": 0}, [L, L, L]),
    ({"schedule": "wl64", "rank": 0}, [C, P, P]),
]


@pytest.mark.parametrize(("changes", "phases"), PHASES, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_phases(changes: dict[str, Any], phases: list[str]) -> None:
    model = rosa_fx.transform(Tiny(), spec_of(**changes))
    sparse = {id(p) for g in rosa_fx.trainable_parameters(model) if g["name"] == "sparse" for p in g["params"]}
    everything = {id(p) for p in model.parameters()}
    schedule = rosa_fx.MaskSchedule(model)
    seen = []
    for step in range(len(phases)):
        assert schedule.phase == phases[step], "between steps it is the phase of the next step"
        schedule.begin_step()
        seen.append(schedule.phase)
        assert schedule.step == step
        assert frozen(model, "sparse") <= {phases[step] not in (J, P)}
        assert frozen(model, "low_rank") <= {False}
        assert bool(rosa_fx.masks(model)) == (phases[step] in (J, P))
        loss_of(model(batch(step)), batch(step)).backward()
        trained = {id(p) for p in model.parameters() if p.grad is not None}
        assert bool(trained & sparse) == (phases[step] in (J, P))
        assert schedule.phase == phases[step]
        schedule.end_step()
    assert seen == phases
    assert {id(p) for p in model.parameters()} == everything, "parameters stay the same objects"


def test_trainable_parameter_groups() -> None:
    both = rosa_fx.trainable_parameters(rosa_fx.transform(Tiny(), spec_of()), lr=1.0, lr_sparse=2.0)
    assert [(g["name"], g["lr"], len(g["params"])) for g in both] == [("low_rank", 1.0, 14), ("sparse", 2.0, 7)]
    lora = rosa_fx.trainable_parameters(rosa_fx.transform(Tiny(), spec_of(density=0)))
    assert [g["name"] for g in lora] == ["low_rank"]
    pure = rosa_fx.trainable_parameters(rosa_fx.transform(Tiny(), spec_of(rank=0)))
    assert [g["name"] for g in pure] == ["sparse"]


def test_spa_only_freezes_a_low_rank_part() -> None:
    model = rosa_fx.transform(Tiny(), spec_of())
    schedule = rosa_fx.MaskSchedule(model, "spa_only")
    before = {k: v.clone() for k, v in rosa_fx.adapter_state(model).items()}
    optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model), lr=0.1)
    seen = []
    for step in range(3):
        seen.append(schedule.phase)
        train_step(model, schedule, [batch(step)], optimizer)
    after = rosa_fx.adapter_state(model)
    assert seen == [C, P, P]
    assert all(torch.equal(after[k], before[k]) == (".low_rank." in k) for k in after)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimizer_never_moves_frozen_values(kind: str) -> None:
    model = rosa_fx.transform(Tiny(), spec_of(schedule="wl2", num_grads=2))
    groups = rosa_fx.trainable_parameters(model, lr=0.05, lr_sparse=0.05)
    momentum = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1)
    optimizer = momentum if kind == "sgd" else torch.optim.AdamW(groups, weight_decay=0.1)
    values = groups[1]["params"]
    schedule = rosa_fx.MaskSchedule(model)
    for step in range(4):
        train_step(model, schedule, [batch(step)], optimizer)
        assert all(not v.any() and v.grad is None for v in values)
    train_step(model, schedule, [batch(4)], optimizer)
    assert all(v.any() for v in values)


def test_arguments_are_checked() -> None:
    model = rosa_fx.transform(Tiny(), spec_of())
    for bad in ("wl", "wl-1", "warmup", "WL3"):
        with pytest.raises(rosa_fx.RosaError, match="schedule"):
            rosa_fx.MaskSchedule(model, bad)
    for field in ("num_grads", "micro_batches"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(rosa_fx.RosaError, match=field):
                rosa_fx.MaskSchedule(model, **{field: value})
    with pytest.raises(rosa_fx.RosaError, match="density"):
        rosa_fx.MaskSchedule(rosa_fx.transform(Tiny(), spec_of(density=0)), "spa_only")
    with pytest.raises(rosa_fx.RosaError, match="rank"):
        rosa_fx.MaskSchedule(rosa_fx.transform(Tiny(), spec_of(rank=0)), "lora_only")
    with pytest.raises(rosa_fx.RosaError, match="not transformed"):
        rosa_fx.MaskSchedule(Tiny())


class Spoiled(Pair):
    """Its gradient of `a` gets one entry of `bad`; that of `b` stays good."""

    bad = 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        if self.bad and hidden.requires_grad:
            hidden.register_hook(self._spoil)
        return self.b(hidden)

    def _spoil(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.flatten()[0] = self.bad
        return gradient


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("num_grads", "micro"), [(1, 1), (1, 2), (2, 1)])
def test_gradient_that_is_not_finite(num_grads: int, micro: int, bad: float) -> None:
    spec = spec_of(num_grads=num_grads)
    plain = Spoiled(D, D, D)
    model, oracle = twins(spec, plain)
    schedule = rosa_fx.MaskSchedule(model)
    good = [batch(0, i) for i in range(micro)]
    train_step(model, schedule, good)
    oracle.step(good, loss_of, None)
    for step in range(num_grads - 1):
        train_step(model, schedule, [batch(1 + step)])
    before, step_before = snapshot(model), schedule.step
    model.bad = bad
    with pytest.raises(rosa_fx.RosaError, match=r"^a\.weight: its gradient holds NaN or infinity"):
        train_step(model, schedule, good)
    assert_unchanged(model, before)
    assert (rosa_fx.masks(model), schedule.phase, schedule.step) == ({}, C, step_before)
    assert frozen(model, "sparse") == {True}
    if num_grads == 1:  # the step may be done again
        model.bad = 0.0
        for p in model.parameters():
            p.grad = None
        again = [batch(7, i) for i in range(micro)]
        train_step(model, schedule, again)
        oracle.step(again, loss_of, None)
        assert_same_masks(model, oracle)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_first_of_several_collecting_steps_names_its_own_gradient(bad: float) -> None:
    """Not the last one, by which the batch would be forgotten. The square of 1e30 is infinite."""
    model = rosa_fx.transform(Spoiled(D, D, D), spec_of(schedule="wl0", num_grads=3))
    schedule = rosa_fx.MaskSchedule(model)
    train_step(model, schedule, [batch(0)])
    before = snapshot(model)
    model.bad = bad
    with pytest.raises(rosa_fx.RosaError, match=r"^a\.weight: its gradient holds NaN or infinity or a square beyond float32"):
        train_step(model, schedule, [batch(1)])
    assert_unchanged(model, before)
    assert (schedule.phase, schedule.step, rosa_fx.masks(model)) == (C, 1, {})


def test_an_infinite_gradient_with_a_finite_loss_is_refused() -> None:
    """Its entries would come first, for no merit of theirs, and the optimizer may not see it: B is frozen here."""
    model = rosa_fx.transform(Spoiled(D, D, D), spec_of(schedule="wl0", rank=0))
    model.bad = float("inf")
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    schedule.begin_step()
    loss = model(batch(0).abs() + 0.1).sum()
    assert bool(loss.isfinite())
    with pytest.raises(rosa_fx.RosaError, match=r"^a\.weight: its gradient holds NaN or infinity, so"):
        loss.backward()
    assert rosa_fx.masks(model) == {}


@pytest.mark.parametrize(("num_grads", "declared", "actual"), [(1, 1, 2), (1, 2, 3), (2, 1, 2)])
def test_more_backward_calls_than_declared(num_grads: int, declared: int, actual: int) -> None:
    model = rosa_fx.transform(Tiny(), spec_of(schedule="wl0", num_grads=num_grads))
    schedule = rosa_fx.MaskSchedule(model, micro_batches=declared)
    for step in range(num_grads - 1):
        train_step(model, schedule, [batch(step, i) for i in range(actual)])
    before = snapshot(model)
    with pytest.raises(rosa_fx.RosaError, match=r"^q\.weight: .*micro_batches"):
        train_step(model, schedule, [batch(1, i) for i in range(actual)])
    assert_unchanged(model, before)
    assert (rosa_fx.masks(model), schedule.phase, schedule.step) == ({}, C, num_grads - 1)
    if num_grads == 1:
        train_step(model, schedule, [batch(2, i) for i in range(declared)])
        assert schedule.phase == J


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
def test_restart(init: str, adapter_dtype: str) -> None:
    model = rosa_fx.transform(Tiny(), spec_of(schedule="wl2", init=init, adapter_dtype=adapter_dtype))
    start = snapshot(model)
    schedule = rosa_fx.MaskSchedule(model, restart=True)
    optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model), lr=0.05)
    flags = []
    for step in range(6):
        assert schedule.phase == [L, L, C, J, J, J][step]
        train_step(model, schedule, [batch(step)], optimizer)
        flags.append(schedule.restarted)
        if schedule.restarted:
            now = rosa_fx.adapter_state(model)
            moving = [k for k in now if k.rsplit(".", 1)[-1] in ("A", "B", "values")]
            assert all(torch.equal(now[k], start[k]) for k in moving)
            masks = {name: mask.to_dense().clone() for name, mask in rosa_fx.masks(model).items()}
            assert len(masks) == 7
            optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model), lr=0.05)
            assert frozen(model, "sparse") == frozen(model, "low_rank") == {False}
    assert flags == [False, False, True, False, False, False], "from the end of the collecting step to the end of the next"
    assert all(torch.equal(mask.to_dense(), masks[name]) for name, mask in rosa_fx.masks(model).items())
    now = rosa_fx.adapter_state(model)
    assert not any(torch.equal(now[k], start[k]) for k in moving)


@pytest.mark.parametrize("stop", range(6))
@pytest.mark.parametrize("restart", [False, True])
def test_exact_resume(stop: int, restart: bool) -> None:
    """Interrupted after `stop` steps (within each phase, and between the two collecting steps): bit for bit the same."""

    def build(seed: int) -> tuple[Any, rosa_fx.MaskSchedule, torch.optim.Optimizer]:
        torch.manual_seed(0)
        plain = feed_forward()
        torch.manual_seed(seed)  # other adapters than those of the run that is resumed
        model = rosa_fx.transform(plain, spec_of(schedule="wl2", num_grads=2))
        optimizer = torch.optim.SGD(rosa_fx.trainable_parameters(model, lr=0.1, lr_sparse=0.1), momentum=0.5)
        return model, rosa_fx.MaskSchedule(model, restart=restart), optimizer

    def run(model: Any, schedule: rosa_fx.MaskSchedule, optimizer: Any, first: int, last: int) -> list[list[float]]:
        return [train_step(model, schedule, [batch(s, 0), batch(s, 1)], optimizer) for s in range(first, last)]

    whole = build(1)
    losses = run(*whole, 0, 6)
    part = build(1)
    run(*part, 0, stop)
    saved = copy.deepcopy((rosa_fx.adapter_state(part[0]), part[1].state_dict(), part[2].state_dict()))
    resumed = build(2)
    rosa_fx.load_adapter_state(resumed[0], saved[0])
    resumed[1].load_state_dict(saved[1])
    resumed[2].load_state_dict(saved[2])
    assert (resumed[1].phase, resumed[1].step, resumed[1].restarted) == (part[1].phase, stop, part[1].restarted)
    assert run(*resumed, stop, 6) == losses[stop:]
    assert_unchanged(resumed[0], snapshot(whole[0]))


def test_resume_rejects_another_schedule() -> None:
    model = rosa_fx.transform(Tiny(), spec_of())
    state = rosa_fx.MaskSchedule(model, "wl2").state_dict()
    for options in ({"schedule": "wl3"}, {"schedule": "wl2", "num_grads": 2}, {"schedule": "wl2", "restart": True}):
        with pytest.raises(rosa_fx.RosaError, match="saved schedule"):
            rosa_fx.MaskSchedule(model, **options).load_state_dict(state)


@pytest.mark.parametrize("restart", [False, True])
def test_fifty_steps_agree_with_the_transcription(restart: bool) -> None:
    """Losses of 50 float32 steps within the error that plain float32 transcriptions make against float64."""
    spec = spec_of(schedule="wl10", num_grads=2)
    torch.manual_seed(0)
    plain = feed_forward()
    model = rosa_fx.transform(copy.deepcopy(plain), spec)

    def optimizer_of(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def run_reference(dtype: torch.dtype, order: Tensor) -> tuple[Tensor, Any]:
        oracle = transcribe(model, plain, spec, dtype, restart=restart)
        optimizer, losses = optimizer_of(oracle.groups(7e-4, 2e-4)), []
        for step in range(50):
            batches = [batch(step % 5, i, rows=4)[order] for i in range(2)]
            losses.append(oracle.step(batches, loss_of, optimizer))
            if restart and oracle.step_number == 12:
                optimizer = optimizer_of(oracle.groups(7e-4, 2e-4))
        return torch.tensor(losses, dtype=torch.float64), oracle

    exact, oracle = run_reference(torch.float64, torch.arange(4))
    # Several orders of summation: one plain float32 run may be close by luck.
    orders = [torch.arange(4), torch.tensor([3, 2, 1, 0]), torch.tensor([1, 3, 0, 2]), torch.tensor([2, 0, 3, 1])]
    plain_error = max((run_reference(torch.float32, order)[0] - exact).abs().max() for order in orders)

    schedule = rosa_fx.MaskSchedule(model, restart=restart)
    optimizer, losses = optimizer_of(rosa_fx.trainable_parameters(model)), []
    for step in range(50):
        losses.append(train_step(model, schedule, [batch(step % 5, i, rows=4) for i in range(2)], optimizer))
        if schedule.restarted:
            optimizer = optimizer_of(rosa_fx.trainable_parameters(model))
    assert_same_masks(model, oracle)
    error = (torch.tensor(losses, dtype=torch.float64) - exact).abs().max()
    assert error <= 1.1 * plain_error, (error, plain_error)
    assert exact[-5:].mean() < exact[:5].mean()
