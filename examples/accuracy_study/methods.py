"""The methods that are compared, each as a `RosaSpec`: all run through the same transform, schedule and trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import rosa_fx
from rosa_fx.state import state_of
from rosa_fx.targets import select_targets

BUDGETS = {"small": 4, "large": 16}
"""Name of a budget -> rank R0 of the low-rank method: every method trains R0 · (N + K) numbers per weight."""


@dataclass(frozen=True)
class Method:
    """`share` of the budget is low-rank, the rest sparse; "full" has neither: see `dense`.

    `mask` is "gradient" (the recipe's), "random", or "global" (one budget of entries for the whole model, which goes where the
    gradients are largest).
    """

    name: str
    share: float
    mask: str = "gradient"
    full: bool = False


METHODS = (
    Method("full", 0.0, full=True),
    Method("low-rank", 1.0),
    Method("sparse", 0.0),
    Method("sparse, random mask", 0.0, "random"),
    Method("rosa 3/4", 0.75),
    Method("rosa 1/2", 0.5),
    Method("rosa 1/4", 0.25),
    Method("rosa 1/2, random mask", 0.5, "random"),
)


def by_name(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def spec_of(method: Method, model: nn.Module, budget: str, base: str, **changes: object) -> rosa_fx.RosaSpec:
    """The spec that spends the budget. `changes` are further fields of the spec, such as `num_grads` or `grad_mode`."""
    if method.full:
        raise ValueError("full fine-tuning has no spec")
    rank = round(method.share * BUDGETS[budget])
    probe = rosa_fx.RosaSpec(base="keep", rank=1, density=0.5)
    densities = {}
    for target in select_targets(model, probe):
        rows, columns = target.shape[-2:]
        entries = (BUDGETS[budget] - rank) * (rows + columns)
        # Half an entry more, so that int(density · N · K) is not one short.
        densities[target.name] = {"density": min(1.0, (entries + 0.5) / (rows * columns))}
    only_low_rank = method.share == 1
    fields: dict[str, object] = {
        "base": base,
        "rank": rank,
        "alpha": max(rank, 1),
        "density": 0.0 if only_low_rank else 0.01,
        "overrides": {} if only_low_rank else densities,
        "schedule": "lora_only" if only_low_rank else ("wl64" if rank else "spa_only"),
    }
    return rosa_fx.RosaSpec(**(fields | changes))  # type: ignore[arg-type]


def set_random_masks(model: nn.Module, seed: int) -> None:
    """Masks of random entries, as many as the spec says."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in state_of(model).weights:
        weight = rosa_fx.adapter(model, name)
        if weight.sparse is None:
            continue
        rows, columns = weight.shape[-2:]
        count = weight.sparse.values.numel()
        flat = torch.randperm(rows * columns, generator=generator)[:count]
        found[name] = rosa_fx.Mask.from_indices(flat // columns, flat % columns, (rows, columns))
    rosa_fx.set_masks(model, found)


def global_allocation(scores: dict[str, torch.Tensor], budget: int) -> dict[str, int]:
    """How many of the `budget` largest scores of the whole model fall into each weight."""
    low, high = 0.0, max(float(score.max()) for score in scores.values())
    counted: Callable[[float], int] = lambda cut: sum(int((score > cut).sum()) for score in scores.values())  # noqa: E731
    for _ in range(60):  # bisection: no copy of all scores, no sort
        middle = (low + high) / 2
        if counted(middle) > budget:
            low = middle
        else:
            high = middle
    return {name: int((score > high).sum()) for name, score in scores.items()}
