"""Small transformed models with bare parameters and adapters away from zero, captured with the rewrite, and their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaSpec
from rosa_fx.kernels.inductor import capture_backend
from rosa_fx.passes.joint import rewrite
from rosa_fx.passes.report import GraphReport

EPS = torch.finfo(torch.float32).eps
# The tail multiplies with its weight as stored.
FUSED = {"linear": 3, "linear_t": 2, "linear_grads": 3, "dense": 0}
FORWARD = {"linear": 2, "linear_t": 1, "linear_grads": 0, "dense": 0}


class Tail(nn.Module):
    """A bare parameter, so that a class that is no torch class is parametrised too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mix + self.bias


def plain(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), Tail(width))


def transformed(phase: str = "joint", model: nn.Module | None = None, **spec: Any) -> nn.Module:
    """In the given phase, with adapters away from their initial values."""
    model = plain() if model is None else model
    torch.manual_seed(1)
    rosa_fx.transform(model, RosaSpec(**({"rank": 4, "density": 0.05} | spec)))
    for name, weight in rosa_fx.state.state_of(model).weights.items():
        assert weight.low_rank is not None
        nn.init.normal_(weight.low_rank.B, std=0.1)
        if phase == "joint" and weight.sparse is not None:
            dense = torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.bool)
            dense[torch.randperm(dense.numel())[: weight.sparse.values.numel()]] = True
            rosa_fx.set_masks(model, {name: dense.view(weight.shape)})
            nn.init.normal_(weight.sparse.values, std=0.1)
    if phase == "collect":
        schedule = rosa_fx.MaskSchedule(model, "wl0")
        schedule.begin_step()
        assert schedule.phase == "collect"
    return model


def inputs(rows: int = 6, width: int = 32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2))


def captured(call: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], list[GraphReport]]:
    reports: list[GraphReport] = []
    backend = capture_backend(lambda graph: reports.append(rewrite(graph)))
    return torch.compile(call, backend=backend, fullgraph=True, **options), reports


def step(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient of one training step."""
    model.zero_grad()
    y = call(x)
    y.square().mean().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], eps: float = EPS) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).double().norm() <= 64 * eps * value.double().norm(), name


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
