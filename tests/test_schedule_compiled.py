"""Mask collection under torch.compile: recompilations, dense gradients, masks and errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference_rosa import (
    C,
    D,
    J,
    Pair,
    assert_same_masks,
    assert_unchanged,
    batch,
    feed_forward,
    loss_of,
    snapshot,
    spec_of,
    train_step,
    twins,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

import rosa_fx
from rosa_fx.kernels.inductor import CustomGraphPass


class Recorder(CustomGraphPass):
    """Notes every value of each compiled graph. No identity: such graphs are not taken from a cache."""

    def __init__(self) -> None:
        self.graphs: list[list[tuple[str, str, tuple[int, ...], torch.dtype]]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        values = []
        for node in graph.nodes:
            val = node.meta.get("val")
            for tensor in val if isinstance(val, list | tuple) else [val]:
                if isinstance(tensor, Tensor):
                    values.append((node.op, str(node.target), tuple(tensor.shape), tensor.dtype))
        self.graphs.append(values)

    def uuid(self) -> None:
        return None


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def recorder(fresh_compiler: None) -> Iterator[Recorder]:
    found = Recorder()
    with torch._inductor.config.patch(post_grad_custom_post_pass=found):
        yield found


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("num_grads", "micro"), [(1, 1), (2, 2)])
def test_compiled(recorder: Recorder, num_grads: int, micro: int) -> None:
    """Masks, at most one compilation per phase, and no dense float32 gradient in any graph."""
    spec = spec_of(base="nf4", schedule="wl2", num_grads=num_grads)
    model, oracle = twins(spec, feed_forward())
    schedule = rosa_fx.MaskSchedule(model)
    step_function = torch.compile(model)
    mine = torch.optim.SGD(rosa_fx.trainable_parameters(model, lr=0.1, lr_sparse=0.1))
    theirs = torch.optim.SGD(oracle.groups(0.1, 0.1))
    seen: dict[str, list[int]] = {}
    values: dict[str, list[Any]] = {}
    losses = []
    for step in range(4 + num_grads):
        phase, compiled, recorded = schedule.phase, graphs(), len(recorder.graphs)
        assert phase == oracle.phase
        batches = [batch(step, i) for i in range(micro)]
        mean, expected = train_step(model, schedule, batches, mine, step_function), oracle.step(batches, loss_of, theirs)
        losses.append([*zip(mean, expected)])
        seen.setdefault(phase, []).append(graphs() - compiled)
        values.setdefault(phase, []).extend(v for graph in recorder.graphs[recorded:] for v in graph)
    assert_same_masks(model, oracle)
    assert all(counts[0] <= 1 and not any(counts[1:]) for counts in seen.values()), seen
    torch.testing.assert_close(torch.tensor(losses)[..., 0], torch.tensor(losses)[..., 1])
    assert not [v for found in values.values() for v in found if v[2] in ((24, D), (D, 24)) and v[3].is_floating_point]
    assert any("linear_grads" in v[1] for v in values[C])
    # Evaluation and training in turn: one more graph for evaluation, then none.
    compiled = graphs()
    for step in range(2):
        model.eval()
        with torch.no_grad():
            step_function(batch(step))
        model.train()
        train_step(model, schedule, [batch(step)], None, step_function)
    bare = feed_forward()
    extra, compiled = graphs() - compiled, graphs()
    bare_step = torch.compile(bare)
    bare_step(batch(0)).sum().backward()
    for step in range(2):
        bare.eval()
        with torch.no_grad():
            bare_step(batch(step))
        bare.train()
        bare_step(batch(step)).sum().backward()
    assert extra <= graphs() - compiled - 1


class Shared(nn.Module):
    """Two weights that share their input, of which one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(D, D, bias=False), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.k(torch.tanh(self.k(x) * self.q(x)))


def test_compiled_weight_used_twice_and_shared_input(fresh_compiler: None) -> None:
    model, oracle = twins(spec_of(schedule="wl0"), Shared())
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    step_function = torch.compile(model, fullgraph=True)
    train_step(model, schedule, [batch(0)], None, step_function)
    oracle.step([batch(0)], loss_of, None)
    assert_same_masks(model, oracle)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_weight_used_twice_where_another_backend_runs_no_pass(backend: str) -> None:
    """Each use chooses a mask of its own there, from part of the gradient; both remedies that the error names give the mask."""
    model, oracle = twins(spec_of(schedule="wl0"), Shared())
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    call = torch.compile(model, backend=backend, fullgraph=True)
    with pytest.raises(rosa_fx.RosaError, match=r"^k\.weight: it is read several times, .*'inductor'.*micro_batches=2"):
        train_step(model, schedule, [batch(0)], None, call)
    assert (rosa_fx.masks(model), schedule.step) == ({}, 0)
    summing = copy.deepcopy(model)
    train_step(model, schedule, [batch(0)], None)
    oracle.step([batch(0)], loss_of, None)
    assert_same_masks(model, oracle)
    schedule = rosa_fx.MaskSchedule(summing, micro_batches=2)
    train_step(summing, schedule, [batch(0)], None, torch.compile(summing, backend=backend, fullgraph=True))
    assert_same_masks(summing, oracle)


def test_compiled_nan_and_too_many_backward_calls(fresh_compiler: None) -> None:
    model = rosa_fx.transform(Pair(D, 8, D), spec_of(schedule="wl0"))
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    step_function = torch.compile(model)
    before = snapshot(model)
    for bad in (float("nan"), 1e38):  # the second overflows in the gradients, after a finite loss or not
        with pytest.raises(rosa_fx.RosaError, match=r"[ab]\.weight: its gradient holds NaN or infinity"):
            train_step(model, schedule, [batch(0) * bad], None, step_function)
    with pytest.raises(rosa_fx.RosaError, match=r"a\.weight: .*micro_batches"):
        train_step(model, schedule, [batch(0), batch(1)], None, step_function)
    assert_unchanged(model, before)
    assert (rosa_fx.masks(model), schedule.phase, schedule.step) == ({}, C, 0)
    train_step(model, schedule, [batch(2)], None, step_function)
    assert schedule.phase == J
    assert graphs() == 1
