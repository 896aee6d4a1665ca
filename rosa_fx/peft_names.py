"""Which weights of a transformed model PEFT has a place for, and how its files call them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from rosa_fx.atomic import json_digest
from rosa_fx.errors import RosaError
from rosa_fx.state import state_of, unwrap
from rosa_fx.weight import RosaWeight

PREFIX = "base_model.model."
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class PeftModule:
    """A module whose `weight` is adapted. `flipped`: its weight is stored [in, out] (transformers' `Conv1D`)."""

    name: str
    weight_name: str
    weight: RosaWeight
    flipped: bool


def config_digest(config: dict[str, Any]) -> str:
    """A checksum of what an `adapter_config.json` says of the factors; paths and the like may be changed by hand."""
    return json_digest({field: config.get(field) for field in _READ})


def peft_modules(model: nn.Module) -> list[PeftModule]:
    """The adapted modules, those that share a weight each for itself.

    Raises RosaError, naming the weight, for one that is not the `weight` [N, K] of a linear module by itself.
    """
    inner = unwrap(model)
    state = state_of(inner)
    paths = {id(module): name for name, module in inner.named_modules()}
    attention = {f"{name}." for name, module in inner.named_modules() if isinstance(module, nn.MultiheadAttention)}
    found = []
    for name, weight in state.weights.items():
        for owner, attribute in state.targets[name].owners:
            path = paths[id(owner)]
            reason = None
            if len(weight.shape) != 2:
                reason = f"it has {len(weight.shape)} dimensions (a stack of experts)"
            elif attribute != "weight":
                reason = (
                    f"it is the parameter {attribute!r} of a {_original(owner).__name__}, not the weight of a linear module"
                )
            elif any(f"{path}.".startswith(prefix) for prefix in attention):
                reason = "nn.MultiheadAttention reads it without calling its module"
            elif not isinstance(owner, nn.Linear) and not _is_conv1d(owner):
                reason = f"{_original(owner).__name__} is no linear module"
            if reason:
                raise RosaError(
                    f"{name} cannot be exported to PEFT, which adapts whole linear modules: {reason}. "
                    "Use rosa_fx.save_adapter, or leave it out of the spec's targets"
                )
            found.append(PeftModule(path, name, weight, flipped=not isinstance(owner, nn.Linear)))
    return found


def _original(module: nn.Module) -> type:
    return type(module).__bases__[0]


def _is_conv1d(module: nn.Module) -> bool:
    return any(f"{cls.__module__}.{cls.__name__}" == "transformers.pytorch_utils.Conv1D" for cls in type(module).__mro__)


def short_targets(model: nn.Module, modules: list[str]) -> list[str] | str:
    """PEFT's `target_modules` for exactly these modules: last parts of names if that is exact, else whole names, else a
    regular expression. PEFT takes every module whose name is a listed one or ends in "." and a listed one."""
    every = [name for name, _ in unwrap(model).named_modules() if name]
    wanted = set(modules)
    for candidates in (sorted({name.rpartition(".")[2] for name in modules}), modules):
        hit = {name for name in every if any(name == c or name.endswith(f".{c}") for c in candidates)}
        if hit == wanted:
            return candidates
    return "|".join(re.escape(name) for name in modules)


def patterns(values: dict[str, float], default: float) -> dict[str, float]:
    """PEFT's `rank_pattern` or `alpha_pattern`: by module what differs from `default`.

    PEFT takes the first pattern that matches the end of a name, so longer names come first, and where a pattern would
    also match another module all are listed.
    """
    names = sorted(values, key=lambda name: (-len(name), name))
    few = {re.escape(name): values[name] for name in names if values[name] != default}
    whole = {re.escape(name): values[name] for name in names}
    return few if all(_matched(few, name, default) == value for name, value in values.items()) else whole


def _matched(found: dict[str, float], name: str, default: float) -> float:
    return next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", name)), default)
