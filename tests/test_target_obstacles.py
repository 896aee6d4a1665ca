"""Models that cannot be used as they are, and what select_targets says of them."""

import math
from typing import Any

import pytest
import torch
from target_models import names, sequential
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from rosa_fx.errors import RosaError
from rosa_fx.spec import RosaSpec
from rosa_fx.targets import select_targets


class RosaWeight(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Marked(RosaWeight):
    _is_rosa_weight = True


@pytest.mark.parametrize("kind", [RosaWeight, Marked])
def test_transformed_twice(kind: type[nn.Module]) -> None:
    model = sequential()
    parametrize.register_parametrization(model[3], "weight", kind())
    with pytest.raises(RosaError, match=r"already transformed.*'3.weight'"):
        names(model)


@pytest.mark.parametrize("targets", ["all-linear", "*"])
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        nn.utils.weight_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ],
    ids=["weight_norm", "orthogonal", "old_weight_norm", "prune"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_computed_by_something_else(change: Any, targets: str) -> None:
    model = sequential()
    change(model[3])
    with pytest.raises(RosaError, match=r"'3.weight' is .*exclude the weight \(exclude=\['3.weight'\]\)"):
        names(model, targets=targets)
    assert names(model, targets=targets, exclude="3.weight") == ["0.weight"]
    assert names(model, targets="0.*") == ["0.weight"]


def test_a_parametrised_bias_is_no_obstacle() -> None:
    model = sequential()
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    assert names(model) == names(model, targets="*") == ["0.weight", "3.weight"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    model = sequential().to(dtype)
    model[3].weight.data[1, 2] = value
    with pytest.raises(RosaError, match=r"'3.weight' holds values that are not finite"):
        names(model)
    assert names(model, exclude="3.weight") == ["0.weight"]


def test_large_finite_values_of_low_precision_are_fine() -> None:
    model = nn.Linear(64, 64).half()
    model.weight.data.fill_(60000)
    assert names(model) == ["weight"]


def test_not_materialised() -> None:
    with torch.device("meta"):
        model = sequential()
    with pytest.raises(RosaError, match=r"'0.weight' is on the meta device.*materialise"):
        names(model)
    with pytest.raises(RosaError, match=r"'0.weight' is not initialised yet: run the model once"):
        names(nn.Sequential(nn.LazyLinear(4)))
    with pytest.raises(RosaError, match=r"empty"):
        names(nn.ParameterDict({"w": torch.empty(0, 4)}), targets="w")


def packed() -> nn.Sequential:
    model = sequential()
    model[0].weight = nn.Parameter(torch.zeros(48, 1, dtype=torch.uint8), requires_grad=False)
    return model


def test_packed_weights() -> None:
    assert names(packed()) == ["3.weight"]
    with pytest.raises(RosaError, match=r"'0.weight', which has dtype torch.uint8.*exclude it"):
        names(packed(), targets="*")
    with pytest.raises(RosaError, match=r"selects no weight of Sequential: '0.weight' has dtype torch.uint8"):
        names(packed()[:1])


def test_bitsandbytes_modules() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64))
    assert names(model) == ["0.weight"]
    with pytest.raises(RosaError, match=r"'1.weight', which belongs to bitsandbytes' Linear4bit"):
        names(model, targets="1.weight")


def test_float8_is_packed_too() -> None:
    model = sequential()
    model[0].weight = nn.Parameter(model[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert names(model) == ["3.weight"]


def test_not_a_module() -> None:
    with pytest.raises(RosaError, match=r"must be a torch.nn.Module, got str"):
        select_targets("gpt2", RosaSpec())  # type: ignore[arg-type]
