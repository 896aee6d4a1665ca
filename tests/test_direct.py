"""Calls of the CPU kernels past the dispatcher, out of code that Inductor generates."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from rewritten_models import fill
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code, run_fw_bw_and_get_code
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import rosa_fx
from rosa_fx.kernels import direct
from rosa_fx.state import state_of

pytestmark = pytest.mark.usefixtures("no_caches")


def masked(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False, dtype=dtype))
    rosa_fx.transform(model, rosa_fx.RosaSpec(rank=4, density=0.05))
    fill(model)
    return model


def test_generated_code_calls_the_kernels() -> None:
    """In inference and in both halves of a training step; never the operator."""
    model, x = masked(torch.bfloat16), torch.randn(80, 64).bfloat16()
    with torch.no_grad():
        y, codes = run_and_get_code(torch.compile(model), x)
    assert torch.equal(y, model(x))
    training: Any = torch.compile(model)
    _, trained = run_fw_bw_and_get_code(lambda: training(x.requires_grad_()))
    for code in codes + trained:
        assert "torch.ops.rosa_fx" not in code.replace("'torch.ops.rosa_fx", "").replace("(op: torch.ops.rosa_fx", "")
    assert "rosa_fx.kernels.direct.linear(" in codes[0]
    calls = re.findall(r"rosa_fx\.kernels\.direct\.(\w+)\(", "\n".join(trained))
    assert calls == ["product_with_left", "product_with_grads"]


def test_a_profiler_sees_the_operator() -> None:
    model, x = masked(), torch.randn(3, 64)
    call: Any = torch.compile(model)
    with torch.no_grad():
        call(x)
        with profile() as seen:
            call(x)
    assert [event.count for event in seen.key_averages() if event.key == "rosa_fx::linear"] == [1]


def test_gradients_are_recorded_where_they_are_asked_for() -> None:
    model, x = masked(), torch.randn(3, 64, requires_grad=True)
    weight = state_of(model).weights["0.weight"]
    arguments: tuple[Any, ...] = (x, None, weight.base.tensors(), weight.delta_tensors(), weight.layout_key)
    y: Tensor = direct.linear(*arguments)
    y.sum().backward()
    assert x.grad is not None
    assert weight.low_rank is not None
    assert weight.low_rank.A.grad is not None
    with torch.no_grad():
        assert torch.equal(direct.linear(*arguments), y)


@pytest.mark.parametrize("name", direct.KERNELS)
def test_functions_carry_the_operators_names(name: str) -> None:
    assert getattr(direct, name).__name__ == name
    assert hasattr(torch.ops.rosa_fx, name)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    pass


def test_eager_products_go_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients, unless somebody else has to see them; the results are the same bits."""
    model, x = masked(torch.bfloat16), torch.randn(2, 3, 64).bfloat16()
    expected = model(x).detach()
    calls: list[str] = []
    for name in ("linear", "linear_t"):
        kernel = getattr(direct, name)
        monkeypatch.setattr(direct, name, lambda *a, kernel=kernel, name=name: (calls.append(name), kernel(*a))[1])
    with torch.no_grad():
        assert torch.equal(model(x), expected)
        assert torch.equal(x @ model[0].weight.t(), expected)
        backwards = expected @ model[0].weight
        assert calls == ["linear", "linear", "linear_t"]
        with Seen() as seen:
            assert torch.equal(model(x), expected)
        assert "rosa_fx.linear.default" in seen.operators
        assert torch.equal(model(x.as_subclass(Own)), expected)
        torch.func.vmap(model)(x)
    model(x)
    assert len(calls) == 3
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x.float()), expected)
        assert torch.equal(expected @ model[0].weight, backwards)
    assert calls[3:] == ["linear", "linear_t"]
