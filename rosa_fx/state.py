"""What rosa_fx remembers about a transformed model, and how to find it again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rosa_fx.errors import RosaError
from rosa_fx.spec import RosaSpec
from rosa_fx.targets import Target
from rosa_fx.weight import RosaWeight

ATTRIBUTE = "_rosa_fx_state"


@dataclass
class RosaState:
    """`targets` and `weights` by the weight's name in the original model, in model order; who trained before."""

    spec: RosaSpec
    strict: bool
    targets: dict[str, Target]
    weights: dict[str, RosaWeight]
    requires_grad: dict[str, bool]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s wrapper or a data-parallel one."""
    while not hasattr(model, ATTRIBUTE):
        inner = getattr(model, "_orig_mod", None)
        if inner is None:
            inner = model._modules.get("module")
        if not isinstance(inner, nn.Module):
            return model
        model = inner
    return model


def is_transformed(model: nn.Module) -> bool:
    return hasattr(unwrap(model), ATTRIBUTE)


def state_of(model: nn.Module) -> RosaState:
    """Raises RosaError if the model was never transformed."""
    state = getattr(unwrap(model), ATTRIBUTE, None)
    if not isinstance(state, RosaState):
        raise RosaError(f"{type(model).__name__} is not transformed: call rosa_fx.transform(model, spec) first")
    return state


def weight_of(model: nn.Module, name: str) -> RosaWeight:
    """The parametrisation of the weight `name`. Raises RosaError with the nearest names if there is none."""
    weights = state_of(model).weights
    if name not in weights:
        import difflib

        near = difflib.get_close_matches(name, weights, n=3) or list(weights)[:3]
        raise RosaError(f"no rewritten weight is called {name!r}; near names: {', '.join(near)}")
    return weights[name]
