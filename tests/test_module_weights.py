"""Weights as modules hold them: 1 x 1 convolutions, parametrisations of others, kinds that are left alone, checkpointing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten_models import fill, rewritten, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import rosa_fx
from rosa_fx.errors import RosaError

EPS = torch.finfo(torch.float32).eps

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def transformed(model: nn.Module, **spec: Any) -> nn.Module:
    torch.manual_seed(1)
    rosa_fx.transform(model, rosa_fx.RosaSpec(**({"rank": 2, "density": 0.1} | spec)))
    fill(model)
    return model


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected):
        assert (ours - theirs).double().norm() <= 64 * EPS * theirs.double().norm()


# --- convolutions ----------------------------------------------------------------------------------------------------


def pointwise() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 6, 1, bias=False, padding="same")
    )


def test_convolutions_of_kernel_size_1_are_fused_where_a_pattern_names_them(tmp_path: Path) -> None:
    with pytest.raises(RosaError, match="selects no weight"):
        rosa_fx.transform(pointwise(), rosa_fx.RosaSpec())
    model = transformed(pointwise(), targets=["0.*", "3.*"])
    x = torch.randn(2, 8, 5, 7)
    call, reports = rewritten(model, fullgraph=True)
    assert_close(run(call, model, x), run(model, model, x))
    assert reports[0].counts == {"linear": 2, "linear_t": 2, "linear_grads": 2, "dense": 0}
    report = rosa_fx.explain(model, x)
    assert [(t.name, t.shape, t.status, t.reason) for t in report.targets] == [
        ("0.weight", (16, 8, 1, 1), "fused", "read as a matrix 16 x 8"),
        ("3.weight", (6, 16, 1, 1), "fused", "read as a matrix 6 x 16"),
    ]
    rosa_fx.save_adapter(model, tmp_path)
    other = rosa_fx.load_adapter(pointwise(), tmp_path)
    before = model(x)
    assert torch.equal(other(x), before)
    merged = rosa_fx.merge(model)
    assert merged[0].weight.shape == (16, 8, 1, 1)
    assert_close([merged(x)], [before])


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv1d(8, 8, 3), r"kernel_size \(3,\), not 1"),
        (nn.Conv2d(8, 8, 1, stride=2), r"stride \(2, 2\), not 1"),
        (nn.Conv2d(8, 8, 1, padding=1), r"padding \(1, 1\), not 0"),
        (nn.Conv1d(8, 8, 1, groups=2), "with 2 groups"),
        (nn.ConvTranspose1d(8, 8, 1), "transposed convolution"),
        (nn.Bilinear(8, 8, 4), "has 3 dimensions and belongs to Bilinear"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_other_modules_are_refused_with_the_reason(module: nn.Module, reason: str) -> None:
    with pytest.raises(RosaError, match=f"'0.weight' .*{reason}"):
        rosa_fx.transform(nn.Sequential(module), rosa_fx.RosaSpec(targets=["0.weight"]))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_left_alone_and_refused_by_name(kind: type[nn.RNNBase]) -> None:
    model = nn.ModuleDict({"rnn": kind(8, 8), "up": nn.Linear(8, 8)})
    with pytest.raises(RosaError, match=f"is read by {kind.__name__} through its own flat list"):
        rosa_fx.transform(model, rosa_fx.RosaSpec(targets=["rnn.weight_ih_l0"]))
    transformed(model)
    assert list(rosa_fx.state.state_of(model).weights) == ["up.weight"]
    assert type(model["rnn"].weight_ih_l0) is nn.Parameter


def test_a_buffer_that_is_multiplied_with_is_no_parameter() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("fixed", torch.randn(8, 8))
    with pytest.raises(RosaError, match=r"only the buffer 'fixed', which does not train: make it an nn.Parameter"):
        rosa_fx.transform(model, rosa_fx.RosaSpec(targets=["fixed"]))


# --- parametrisations of others --------------------------------------------------------------------------------------


class Twice(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


def siblings() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))


def test_a_parametrisation_of_one_module_is_not_its_siblings() -> None:
    model = transformed(siblings())
    x = torch.randn(4, 8)
    before = [layer(x) for layer in model]
    assert len({type(layer) for layer in model}) == 1, "equal modules share a class"
    parametrize.register_parametrization(model[0], "bias", Twice())
    assert type(model[0]) is not type(model[1]) is type(model[2])
    assert_close([model[0](x)], [before[0] + model[0].bias / 2])
    assert all(torch.equal(layer(x), old) for layer, old in zip(model[1:], before[1:]))
    assert type(model[1].bias) is nn.Parameter
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), model(x))
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(model)
    call, reports = rewritten(model, fullgraph=True)
    assert_close(run(call, model, x), run(model, model, x))
    assert reports[0].counts == {"linear": 3, "linear_t": 3, "linear_grads": 3, "dense": 0}
    expected = model(x)
    rosa_fx.merge(model)
    assert_close([model(x)], [expected])
    assert parametrize.is_parametrized(model[0], "bias")
    assert type(model[1]) is nn.Linear


def test_a_parametrised_sibling_tensor_or_module_is_no_obstacle() -> None:
    model = siblings()
    parametrize.register_parametrization(model[0], "bias", Twice())
    parametrizations.weight_norm(model[2])
    transformed(model, exclude="2.weight")
    call, reports = rewritten(model, fullgraph=True)
    x = torch.randn(4, 8)
    assert_close(run(call, model, x), run(model, model, x))
    assert reports[0].counts == {"linear": 2, "linear_t": 2, "linear_grads": 2, "dense": 0}
    assert {t.name: t.status for t in rosa_fx.explain(model, x).targets} == {"0.weight": "fused", "1.weight": "fused"}


# --- stacks of heads, checkpointing, autocast ------------------------------------------------------------------------


class Heads(nn.Module):
    """One weight [heads, N, K], mapped over."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(4, 8, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda head: torch.tanh(x @ head.T))(self.heads)


def test_heads_that_are_mapped_over() -> None:
    torch.manual_seed(0)
    model = transformed(Heads(), targets=["heads"])
    x = torch.randn(5, 24)
    call, _ = rewritten(model, fullgraph=True)
    assert_close(run(call, model, x), run(model, model, x))
    (target,) = rosa_fx.explain(model, x).targets
    assert target.status == "fused"
    assert target.flops_before == 2 * (2 * 5 * 4 * 8 * 24), "y and dW, as if the heads were one weight"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = transformed(siblings())
    x = torch.randn(4, 8)

    def checkpointed(x: Tensor) -> Tensor:
        for layer in model:
            x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=reentrant)
        return x

    call, reports = rewritten(checkpointed)
    expected = run(checkpointed, model, x)
    assert_close(run(call, model, x), expected)
    assert sum(report.counts["linear_grads"] for report in reports) >= 1
    assert all(report.counts["dense"] == 0 for report in reports)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_over_convolutions(dtype: torch.dtype) -> None:
    model = transformed(pointwise()[:1], targets=["0.weight"])
    x = torch.randn(2, 8, 5, 7)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return model(x)

    compiled, reports = rewritten(call, fullgraph=True)
    truth = [t.double() for t in run(model, model, x)]
    plain, actual = run(call, model, x), run(compiled, model, x)
    assert reports[0].counts == {"linear": 1, "linear_t": 1, "linear_grads": 1, "dense": 0}
    assert actual[0].dtype == dtype
    for ours, theirs, right in zip(actual, plain, truth):
        assert (ours - right).norm() <= 1.1 * torch.maximum((theirs - right).norm(), right.norm() * torch.finfo(dtype).eps / 2)
