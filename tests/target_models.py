"""Small models, and the names of their targets."""

from typing import Any

from torch import nn

from rosa_fx.spec import RosaSpec
from rosa_fx.targets import Target, select_targets


def names(model: nn.Module, **fields: Any) -> list[str]:
    return [target.name for target in select_targets(model, RosaSpec(**{"density": 0.1, **fields}))]


def only(model: nn.Module, **fields: Any) -> Target:
    (target,) = select_targets(model, RosaSpec(**{"density": 0.1, **fields}))
    return target


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 4))
