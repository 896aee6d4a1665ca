"""Collecting over several backward calls of compiled models: sums that grow one layer at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import Allocations
from reference_rosa import D, assert_same_masks, batch, loss_of, spec_of, twins
from torch import Tensor, nn

import rosa_fx

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("base", ["keep", "nf4"])
@pytest.mark.parametrize("mode", ["mean_squared", "mean"])
def test_of_the_size_of_a_weight_there_are_the_sums_alone(mode: str, base: str) -> None:
    """Once they are there, no gradient is made: its square goes tile by tile to where it is wanted."""
    width, layers = 256, 8
    dense = 4 * width * width
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    rosa_fx.transform(model, spec_of(schedule="wl0", grad_mode=mode, base=base, targets="*.weight"))
    schedule = rosa_fx.MaskSchedule(model, micro_batches=3)
    compiled: Any = torch.compile(model)
    schedule.begin_step()
    seen = [Allocations() for _ in range(3)]
    for watched in seen:
        loss = compiled(torch.randn(16, width)).square().mean()
        with watched:
            loss.backward()
    schedule.end_step()
    # The first call makes the sums, and may make buffers that are kept. D(Q) of a layer is dense where no kernel decodes it.
    decoded = dense * (base != "keep")
    assert seen[0].peak < (layers + 2) * dense
    assert max(watched.largest for watched in seen[1:]) < dense + decoded
    assert max(watched.peak for watched in seen[1:]) < dense + decoded
    assert len(rosa_fx.masks(model)) == layers


class Twice(nn.Module):
    """Reads a weight once, or in two products."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(D, D, bias=False)
        self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.k(x))
        return self.k(y) if self.twice else y


@pytest.mark.parametrize("mode", ["mean_squared", "mean"])
@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_parts_of_a_gradient(mode: str, order: tuple[bool, bool]) -> None:
    """Without the pass, which joins them, each use gives a part. Squares of parts are refused, all else is exact."""
    model, oracle = twins(spec_of(schedule="wl0", grad_mode=mode), Twice(), num_grads=2)
    schedule = rosa_fx.MaskSchedule(model, micro_batches=2)
    compiled: Any = torch.compile(model, backend="aot_eager")
    schedule.begin_step()
    for number, twice in enumerate(order):
        model.twice = oracle.model.twice = twice
        x = batch(number)
        loss_of(compiled(x), x).backward()
        oracle.step([x], loss_of, None)
    if mode == "mean_squared" and order == (False, True):
        with pytest.raises(rosa_fx.RosaError, match=r"^k\.weight: .* in several parts.*Call the model itself"):
            schedule.end_step()
        assert (rosa_fx.masks(model), schedule.step) == ({}, 0)
        return
    schedule.end_step()
    assert_same_masks(model, oracle)
