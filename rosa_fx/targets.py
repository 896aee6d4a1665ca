"""Which weights of a model are fine-tuned, and with which rank, density and base."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from rosa_fx.errors import RosaError
from rosa_fx.model_weights import ModelWeights, Weight
from rosa_fx.output_head import output_heads
from rosa_fx.packed import PackedWeight, refuse_requantising
from rosa_fx.reading import Reading
from rosa_fx.spec import ALL_LINEAR, RosaSpec, pattern_matcher

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Target:
    """One weight to fine-tune.

    ``name`` is its first fully qualified name in the original model; ``owners`` every (module, attribute) that holds
    this very Parameter object; ``shape`` its ``(N, K)`` as stored (a Hugging Face ``Conv1D`` stores ``(in, out)``), or more
    dimensions, which ``reading`` reads as one matrix or a stack of them. ``rank`` is that of each matrix and already capped,
    ``scale`` is that of the capped rank, ``nnz = int(density * number of entries)``. ``note`` says what differs from the
    spec, e.g. ``"rank capped from 16 to 8 = min(N, K)"``, and how more than two dimensions are read; else it is empty.
    """

    name: str
    owners: tuple[tuple[nn.Module, str], ...]
    shape: tuple[int, ...]
    reading: Reading
    rank: int
    alpha: float
    scale: float
    density: float
    nnz: int
    base: str
    note: str = ""


def select_targets(model: nn.Module, spec: RosaSpec) -> list[Target]:
    """The weights of ``model`` that ``spec`` names, in the order of ``model.named_parameters()``; nothing is changed.

    ``"all-linear"`` selects the floating-point weights that the model multiplies with: those of ``nn.Linear`` and
    its subclasses, Hugging Face's ``Conv1D``, the projections of ``nn.MultiheadAttention``, and bare parameters with two or
    more dimensions, such as stacks of experts, which the source of their class shows in a matrix product (see
    :mod:`rosa_fx.linear_uses`). It leaves out embeddings (and whatever shares its Parameter with one), the output head (the
    rule: :func:`rosa_fx.output_head.output_heads`), recurrent layers, convolutions, ``nn.Bilinear``, weights without
    elements, and weights that are already packed, except those of bitsandbytes' ``Linear4bit`` and ``Linear8bitLt``. A
    weight left out so can be named by a pattern, if it is floating-point, not shared with an embedding, and 2-D, outside
    the modules of torch or the filters of a convolution of kernel size 1 (stride 1, no padding, one group), which are read
    as one matrix. Patterns match any name of a shared weight; parameters with one dimension that a pattern also
    matches, such as biases, are no targets.

    A weight with more than two dimensions is read as the source of its class shows: ``einsum("ibh,hnd->ibnd", x, w)`` as the
    one matrix [h, n·d], ``einsum("bnh,noh->bno", x, w)`` and everything that is no einsum, or is named by a pattern alone, as
    a stack over all dimensions but the last two.

    The general rank is capped at min(N, K) of each weight and ``Target.note`` says so; the scale uses the capped rank.

    Raises RosaError when: the model is no module or already transformed; a pattern in targets, exclude or overrides
    matches nothing (or nothing usable); nothing is selected; an override's rank exceeds min(N, K) of a weight whose
    rank it sets; a weight would train nothing; a selected weight is shared with an embedding (patterns only), computed
    by another parametrization, not floating-point, not materialised, empty, too large for int32 indices, or not finite,
    or is packed by bitsandbytes and its base is not "keep".
    """
    if not isinstance(model, nn.Module):
        raise RosaError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _refuse_transformed(model)
    weights = ModelWeights(model)
    excluded = _matched(weights, "exclude", spec.exclude)
    selected: dict[str, Weight] = {}
    for pattern in spec.target_patterns:
        if pattern == ALL_LINEAR:
            found = _all_linear(model, weights, excluded, alone=len(spec.target_patterns) == 1)
        else:
            found = _named(weights, pattern, excluded)
        selected |= {weight.name: weight for weight in found}
    overrides = _override_matches(weights, spec, selected)
    targets = []
    for weight in weights.all:  # in model order
        if weight.name in selected:
            targets.append(_target(weights, weight, spec, [pattern for pattern, names in overrides if weight.name in names]))
    return targets


def _refuse_transformed(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for attribute, chain in getattr(module, "parametrizations", {}).items():
            for each in chain:
                if getattr(each, "_is_rosa_weight", False) or type(each).__name__ == "RosaWeight":
                    where = f"{name}.{attribute}" if name else attribute
                    raise RosaError(
                        f"the model is already transformed (its weight {where!r} has RoSA terms): "
                        "use it as it is, or merge it, or start from a freshly loaded model"
                    )


def _matched(weights: ModelWeights, field: str, patterns: Iterable[str]) -> set[str]:
    """First names of the weights that any of the patterns matches; every pattern must match something."""
    found: set[str] = set()
    for pattern in patterns:
        names = _matching(weights, field, pattern)
        found |= {weight.name for weight in names}
    return found


def _matching(weights: ModelWeights, field: str, pattern: str) -> list[Weight]:
    matches = pattern_matcher(pattern)
    found = [weight for weight in weights.all if any(map(matches, weight.names))]
    if found:
        return found
    if buffers := [name for name in weights.buffers if matches(name)]:
        raise RosaError(
            f"{field}: the pattern {pattern!r} matches no parameter of the model, only the buffer {buffers[0]!r}, which does "
            "not train: make it an nn.Parameter, or leave it out"
        )
    names = [name for weight in weights.all for name in weight.names]
    bare = pattern.removeprefix("re:").strip("*.^$")
    close = [name for name in names if bare and bare in name] or difflib.get_close_matches(bare, names, n=5, cutoff=0.4)
    hint = f"; close names: {', '.join(map(repr, close[:5]))}" if close else ""
    raise RosaError(
        f"{field}: the pattern {pattern!r} matches no parameter of the model{hint}. A pattern covers the whole "
        "parameter name: a glob such as '*.q_proj.weight', or 're:' and a regular expression"
    )


def _all_linear(model: nn.Module, weights: ModelWeights, excluded: set[str], *, alone: bool) -> list[Weight]:
    linear = [weight for weight in weights.all if weights.is_linear(weight)]
    heads = output_heads(model, weights, linear)
    body = [weight for weight in linear if weight.name not in heads]
    found, reasons = [], []
    for weight in body or linear:
        if weight.name in excluded:
            reasons.append(f"{weight.name!r} is excluded")
        elif weight.blocked:
            raise RosaError(f"the weight {weight.name!r} {weight.blocked}")
        elif weight.dimensions is not None and math.prod(weight.shape) == 0:
            reasons.append(f"{weight.name!r} is empty")
        elif reason := weights.unusable(weight):
            if weight.packed is not None and weight.parameter is not None and weight.parameter.is_meta:
                raise RosaError(f"the weight {weight.name!r} {reason}")
            reasons.append(f"{weight.name!r} {reason}")
        else:
            found.append(weight)
    if not found and alone:
        why = f": {_some(reasons)}" if reasons else ""
        raise RosaError(
            f"targets='all-linear' selects no weight of {type(model).__name__}{why or ': it has no linear weights'}. "
            "Name weights by pattern"
        )
    return found


def _named(weights: ModelWeights, pattern: str, excluded: set[str]) -> list[Weight]:
    found, reasons = [], []
    for weight in _matching(weights, "targets", pattern):
        if weight.name in excluded:
            reasons.append(f"{weight.name!r} is excluded")
        elif reason := weights.unreadable(weight):
            reasons.append(f"{weight.name!r} {reason}")
        elif weight.blocked:
            raise RosaError(f"the weight {weight.name!r} {weight.blocked}")
        elif shared := weights.shared_with_embedding(weight):
            raise RosaError(
                f"targets: {pattern!r} names the weight {weight.name!r}, which is also the table of the embedding "
                f"{shared!r}, a use that is not linear: exclude it (exclude=[{weight.name!r}]) or untie it first"
            )
        elif reason := weights.unusable(weight):
            raise RosaError(f"targets: {pattern!r} names the weight {weight.name!r}, which {reason}: exclude it")
        else:
            found.append(weight)
    if not found:
        raise RosaError(
            f"targets: the pattern {pattern!r} matches nothing usable (a target is a floating-point weight with two "
            f"dimensions, or with more outside the modules of torch, 1 x 1 convolutions aside): {_some(reasons)}"
        )
    return found


def _some(reasons: list[str], limit: int = 6) -> str:
    more = f" and {len(reasons) - limit} more" if len(reasons) > limit else ""
    return "; ".join(reasons[:limit]) + more


def _override_matches(weights: ModelWeights, spec: RosaSpec, selected: dict[str, Weight]) -> list[tuple[str, set[str]]]:
    matches = []
    for pattern in spec.overrides:
        names = {weight.name for weight in _matching(weights, "overrides", pattern)}
        if not names & set(selected):
            raise RosaError(
                f"overrides: the pattern {pattern!r} names no target, only "
                f"{_some([repr(name) for name in sorted(names)])}: drop the override, or widen targets"
            )
        matches.append((pattern, names))
    return matches


def _target(weights: ModelWeights, weight: Weight, spec: RosaSpec, patterns: list[str]) -> Target:
    _check_values(weight)
    reading = weights.reading(weight)
    (rows, columns), shape = (reading.rows, reading.columns), " x ".join(map(str, weight.shape))
    settings: dict[str, Any] = {"rank": spec.rank, "alpha": spec.alpha, "density": spec.density, "base": spec.base}
    origin: dict[str, str] = {}
    for pattern in patterns:
        settings |= spec.overrides[pattern]
        origin |= dict.fromkeys(spec.overrides[pattern], pattern)
    rank, density, notes = settings["rank"], settings["density"], []
    if isinstance(weight.packed, PackedWeight):
        asked = f"overrides[{origin['base']!r}]" if "base" in origin else "base"
        refuse_requantising(weight.name, weight.packed, settings["base"], asked)
        notes.append(str(weight.packed))
    if len(weight.shape) > 2:
        notes.append(f"read as {reading}")
    if rank > min(rows, columns):
        if "rank" in origin:
            raise RosaError(
                f"overrides[{origin['rank']!r}]: rank {rank} exceeds min(N, K) = {min(rows, columns)} of the weight "
                f"{weight.name!r} of shape {shape}: lower it, or let the pattern leave this weight out"
            )
        notes.append(f"rank capped from {rank} to {min(rows, columns)} = min(N, K)")
        rank = min(rows, columns)
    nnz = int(density * math.prod(weight.shape))
    if density > 0 and nnz == 0:
        notes.append(f"density {density:g} of {shape} is less than one entry: no sparse term")
    if rank == 0 and nnz == 0:
        raise RosaError(
            f"the weight {weight.name!r} of shape {shape} has rank 0 and density {density:g} "
            "(no sparse entry): nothing to train there; exclude it, or raise its rank or density"
        )
    if nnz > _INT32_MAX or max(reading.matrix) > _INT32_MAX:
        raise RosaError(
            f"the weight {weight.name!r} of shape {shape} at density {density:g} has {nnz} sparse entries, "
            f"more than {_INT32_MAX}: lower its density"
        )
    return Target(
        name=weight.name,
        owners=weight.owners,
        shape=weight.shape,
        reading=reading,
        rank=rank,
        alpha=settings["alpha"],
        scale=spec.scale(rank, settings["alpha"]),
        density=density,
        nnz=nnz,
        base=settings["base"],
        note="; ".join(notes),
    )


def _check_values(weight: Weight) -> None:
    parameter = weight.parameter
    assert parameter is not None
    if nn.parameter.is_lazy(parameter):
        raise RosaError(f"the weight {weight.name!r} is not initialised yet: run the model once, then transform it")
    if parameter.is_meta and not isinstance(parameter.data, FakeTensor):
        raise RosaError(
            f"the weight {weight.name!r} is on the meta device and has no values: materialise the model first "
            "(model.to_empty(...) and load its weights, or load it without device_map/init_empty_weights)"
        )
    if math.prod(weight.shape) == 0:
        raise RosaError(f"the weight {weight.name!r} is empty ({' x '.join(map(str, weight.shape))}): exclude it")
    if not isinstance(parameter.data, FakeTensor):
        values = weight.packed.tensors[1] if isinstance(weight.packed, PackedWeight) else parameter.detach()
        low, high = torch.aminmax(values)  # one pass, no temporary of the weight's size; NaN propagates
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise RosaError(
                f"the weight {weight.name!r} holds values that are not finite (min {low.item()}, max {high.item()}): "
                "repair the checkpoint, or exclude it"
            )
