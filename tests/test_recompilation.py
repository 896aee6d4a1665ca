"""How often a transformed model is compiled: no more often than its bare model, and equal blocks once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured_models import FORWARD, FUSED, assert_close, captured, inputs, step, transformed
from torch import Tensor, nn
from torch._dynamo.utils import counters

import rosa_fx

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flips_compile_no_more_graphs_than_those_of_the_bare_model(dropout: float) -> None:
    def compilations(model: nn.Module) -> int:
        call, graphs = captured(model, dynamic=True)
        for rows in (6, 9):
            x = inputs(rows).requires_grad_()
            call(x).sum().backward()
            model.eval()
            call(x).sum().backward()
            with torch.no_grad():
                call(x)
            with torch.inference_mode():
                call(inputs(rows))
            model.train()
        return len(graphs)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 48), nn.Dropout(0.5), nn.Linear(48, 32))

    assert compilations(transformed(model=model(), dropout=dropout)) == compilations(model()) == 4


def test_parameters_may_be_frozen_and_released() -> None:
    model, x = transformed(), inputs()
    A = rosa_fx.adapter(model, "0.weight").low_rank.A
    call, reports = captured(model)
    for flag in (True, False, True):
        A.requires_grad_(flag)
        expected = step(model, model, x)
        assert ("0.parametrizations.weight.0.low_rank.A" in expected) == flag
        assert_close(step(call, model, x), expected)
    assert [report.counts for report in reports] == [FUSED, FUSED]
    model.requires_grad_(False)
    call, reports = captured(model)
    assert_close({"y": call(x)}, {"y": model(x)})
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    call(leaf).sum().backward()
    model(other).sum().backward()
    assert_close({"dx": leaf.grad}, {"dx": other.grad})
    assert reports[-1].counts == {"linear": 3, "linear_t": 3, "linear_grads": 0, "dense": 0}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    for phase in ("low_rank", "collect", "joint"):
        model, x = transformed(phase), inputs()
        call, reports = captured(model)
        with mode():
            assert_close({"y": call(x)}, {"y": model(x)})
        assert reports[0].counts == FORWARD


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.mark.usefixtures("no_caches")
def test_identical_blocks_compile_once_and_their_copies_not_at_all() -> None:
    model = transformed(model=nn.Sequential(*(Block() for _ in range(3))))
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    x = inputs(5, 16)
    before = counters["stats"]["unique_graphs"]
    for each in (model, *clones):
        expected = step(each, each, x.requires_grad_())
        for block in each:
            block.compile()
        assert_close(step(each, each, x), expected)
    assert counters["stats"]["unique_graphs"] - before == 1
