"""Masks collected from gradients, against a plain transcription of the paper's rules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_rosa import (
    C,
    D,
    J,
    L,
    Pair,
    Tiny,
    assert_same_masks,
    batch,
    loss_of,
    spec_of,
    target_names,
    train_step,
    twins,
)
from torch import Tensor, nn

import rosa_fx


@pytest.mark.parametrize("mode", ["mean_squared", "mean"])
@pytest.mark.parametrize(("num_grads", "micro"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)])
def test_masks_agree(mode: str, num_grads: int, micro: int) -> None:
    spec = spec_of(num_grads=num_grads, grad_mode=mode)
    model, oracle = twins(spec)
    declared = mode == "mean"
    schedule = rosa_fx.MaskSchedule(model, micro_batches=micro if declared else None)
    mine = torch.optim.SGD(rosa_fx.trainable_parameters(model, lr=0.5))
    theirs = torch.optim.SGD(oracle.groups(0.5, 2e-4))
    for step in range(1 + num_grads):
        assert schedule.phase == oracle.phase
        batches = [batch(step, i) for i in range(micro)]
        train_step(model, schedule, batches, mine)
        oracle.step(batches, loss_of, theirs)
        if step == 0:
            assert schedule.state_dict()["learned"] == (-1 if declared else micro)
    assert_same_masks(model, oracle)


@pytest.mark.parametrize("checkpointing", ["nonreentrant", "reentrant"])
@pytest.mark.parametrize("num_grads", [1, 2])
def test_masks_under_checkpointing(checkpointing: str, num_grads: int) -> None:
    spec = spec_of(num_grads=num_grads)
    model, oracle = twins(spec)
    model.checkpointing = checkpointing
    schedule = rosa_fx.MaskSchedule(model)
    for step in range(1 + num_grads):
        train_step(model, schedule, [batch(step)])
        oracle.step([batch(step)], loss_of, None)
    assert_same_masks(model, oracle)


def test_masks_with_quantised_base_and_overrides() -> None:
    overrides = {"up.weight": {"density": 0.3}, "q.weight": {"density": 0}, "k.weight": {"rank": 0, "density": 1.0}}
    spec = spec_of(base="nf4", overrides=overrides)
    model, oracle = twins(spec)
    schedule = rosa_fx.MaskSchedule(model)
    for step in range(2):
        train_step(model, schedule, [batch(step)])
        oracle.step([batch(step)], loss_of, None)
    assert_same_masks(model, oracle)
    masks = rosa_fx.masks(model)
    assert masks["up.weight"].nnz == int(0.3 * 24 * D)
    assert "q.weight" not in masks
    assert masks["k.weight"].to_dense().all()
    train_step(model, schedule, [batch(2)], torch.optim.SGD(rosa_fx.trainable_parameters(model)))


def integer_pair(dtype: torch.dtype, scale: float) -> tuple[Pair, list[Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """A model and a loss whose products and sums are all exact in `dtype`: gradients are small integers times `scale`."""
    generator = torch.Generator().manual_seed(3)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    model = Pair().to(dtype)
    with torch.no_grad():
        model.a.weight.copy_(integers(8, 12))
        model.b.weight.copy_(integers(6, 8))
    weights = integers(7, 6)
    return model, [integers(7, 12) for _ in range(2)], lambda out, x: (out * (weights * scale).to(out.dtype)).sum()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float16, 2.0**-17)], ids=str)
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("mode", ["mean_squared", "mean"])
def test_masks_of_exact_data_with_ties(dtype: torch.dtype, scale: float, micro: int, mode: str) -> None:
    """Ties go to the smaller flat index; in float16 the squares (about 1e-10) would all be 0."""
    plain, batches, loss = integer_pair(dtype, scale)
    spec = spec_of(schedule="wl0", density=0.3, grad_mode=mode)
    model, oracle = twins(spec, plain)
    schedule = rosa_fx.MaskSchedule(model, micro_batches=micro)
    schedule.begin_step()
    for x in batches[:micro]:
        loss(model(x), x).backward()
    schedule.end_step()
    oracle.step(batches[:micro], loss, None)
    for name, mask in rosa_fx.masks(model).items():
        score = oracle.scores[name].abs().flatten()
        nnz = oracle.weights[name].nnz
        ranked = score.sort(descending=True).values
        assert ranked[nnz - 1] > 0
        assert torch.equal(mask.to_dense(), oracle.weights[name].mask), name
        if scale < 1:
            assert ranked[nnz - 1] < 1e-6 if mode == "mean_squared" else ranked[nnz - 1] < 1e-2


def test_masks_do_not_depend_on_threads_or_runs() -> None:
    def run(threads: int) -> dict[str, rosa_fx.Mask]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            plain, batches, loss = integer_pair(torch.float32, 1.0)
            model = rosa_fx.transform(plain, spec_of(schedule="wl0", density=0.3))
            schedule = rosa_fx.MaskSchedule(model)
            schedule.begin_step()
            loss(model(batches[0]), batches[0]).backward()
            schedule.end_step()
            return rosa_fx.masks(model)
        finally:
            torch.set_num_threads(before)

    one, two, again = run(1), run(2), run(2)
    for name, mask in one.items():
        for other in (two[name], again[name]):
            assert torch.equal(mask.cols, other.cols)
            assert torch.equal(mask.row_offsets, other.row_offsets)


def test_float32_base_with_bfloat16_adapters() -> None:
    model, oracle = twins(spec_of(schedule="wl0", adapter_dtype="bfloat16"))
    schedule = rosa_fx.MaskSchedule(model)
    optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model), lr=1e-3)
    train_step(model, schedule, [batch(0)], optimizer)
    oracle.step([batch(0)], loss_of, None)
    assert_same_masks(model, oracle)
    train_step(model, schedule, [batch(1)], optimizer)
    assert all(rosa_fx.adapter(model, name).sparse.values.any() for name in target_names(model))


class Sometimes(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


@pytest.mark.parametrize("num_grads", [1, 2])
def test_weight_without_gradient_warns(num_grads: int) -> None:
    model = rosa_fx.transform(Sometimes(D, D), spec_of(schedule="wl0", num_grads=num_grads, targets=["?.weight"]))
    schedule = rosa_fx.MaskSchedule(model)
    for step in range(num_grads - 1):
        train_step(model, schedule, [batch(step)])
    with pytest.warns(UserWarning, match=r"b\.weight received no gradient"):
        train_step(model, schedule, [batch(5)])
    for name, mask in rosa_fx.masks(model).items():
        weight = rosa_fx.adapter(model, name)
        mask.validate(name, weight.shape, weight.sparse.values.numel())


@pytest.mark.parametrize("density", [1.0, 1e-6])
@pytest.mark.parametrize("num_grads", [1, 2])
def test_extreme_densities(density: float, num_grads: int) -> None:
    model = rosa_fx.transform(Tiny(), spec_of(density=density, num_grads=num_grads))
    schedule = rosa_fx.MaskSchedule(model)
    optimizer = torch.optim.SGD(rosa_fx.trainable_parameters(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(num_grads + 2):
            train_step(model, schedule, [batch(step)], optimizer)
    assert schedule.phase == J
    for mask in rosa_fx.masks(model).values():
        assert mask.to_dense().all() if density == 1.0 else mask.nnz == 0


def test_evaluation_while_collecting_does_not_count() -> None:
    spec = spec_of()
    model, oracle = twins(spec)
    schedule = rosa_fx.MaskSchedule(model)
    for step in range(2):
        with torch.no_grad():
            model(batch(9))
        train_step(model, schedule, [batch(step)])
        oracle.step([batch(step)], loss_of, None)
    assert_same_masks(model, oracle)


def live_blocks(run: Callable[[], None], size: int) -> tuple[int, int]:
    """(greatest number at once, number left at the end) of blocks of `size` bytes that `run` allocates."""
    from torch._C._profiler import _EventType

    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events: list[tuple[int, int, int]] = []

    def visit(event: Any) -> None:
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.alloc_size, fields.ptr))
        for child in event.children:
            visit(child)

    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.experimental_event_tree():
        visit(event)
    live: set[int] = set()
    peak = 0
    for _, nbytes, address in sorted(events):
        if nbytes == size:
            live.add(address)
        elif nbytes < 0:
            live.discard(address)
        peak = max(peak, len(live))
    return peak, len(live)


def stack(layers: int = 6, width: int = 96) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))


def test_one_dense_gradient_at_a_time() -> None:
    """Dense blocks that a backward pass allocates: in a single collecting call hardly more at once than in a plain one."""
    layers, width = 6, 96
    measured = {}
    for phase, options in {L: {"schedule": "wl9"}, C: {"schedule": "wl0"}, "many": {"schedule": "wl0"}}.items():
        model = rosa_fx.transform(stack(layers, width), spec_of(**options))
        schedule = rosa_fx.MaskSchedule(model, micro_batches=2 if phase == "many" else 1)
        schedule.begin_step()
        # Warm up everything that allocates once, on the side.
        loss = model(torch.randn(5, width)).square().sum()
        measured[phase] = live_blocks(loss.backward, width * width * 4)
    assert measured[L][1] == 0
    assert measured[C][1] == 0
    assert measured[C][0] - measured[L][0] < 2
    assert measured["many"][1] == layers, "with several calls one float32 sum per weight is kept"
