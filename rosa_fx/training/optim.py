"""Optimizer, learning-rate schedule, gradient norm, and the optimizer's state as tensors and JSON."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rosa_fx.attach import trainable_parameters
from rosa_fx.distributed.tensors import is_sharded, like, local, norms_over_shards, whole
from rosa_fx.errors import RosaError
from rosa_fx.state import state_of
from rosa_fx.training.config import TrainConfig


def learning_rate_factor(position: int, total: int, warmup: int, schedule: str) -> float:
    """Share of the peak rate at optimizer step `position` (from 0) of `total`.

    Warm-up: 1/warmup, 2/warmup, ..., 1. "linear": from 1 down in equal parts, 0 being one step after the last.
    """
    if position < warmup:
        return (position + 1) / warmup
    if schedule == "constant":
        return 1.0
    return max(0.0, (total - position) / max(1, total - warmup))


OPTIMIZERS = ("adamw", "adamw8bit")


def optimizer_for(
    model: nn.Module,
    lr: float = 7e-4,
    lr_sparse: float = 2e-4,
    *,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """An optimizer over all adapter parameters of a transformed model, sparse values included, with two learning rates.

    For `transformers.Trainer`: `optimizers=(rosa_fx.optimizer_for(model), None)`. The defaults are the paper's.

    Args:
        model: transformed, on the device where it trains.
        lr, lr_sparse: of the groups `low_rank` and `sparse`.
        optimizer: "adamw" (torch's) or "adamw8bit" (bitsandbytes', state in 8 bits for parameters of 4,096 entries or more).

    Raises:
        RosaError: the model is not transformed or has nothing to train; an unknown optimizer; bitsandbytes does not
            support the model's device.
    """
    groups = trainable_parameters(model, lr=lr, lr_sparse=lr_sparse)
    if not groups:
        raise RosaError("the spec has rank 0 and density 0 for every weight: nothing trains; set either above 0")
    first: list[nn.Parameter] = groups[0]["params"]  # type: ignore[assignment]
    return make_optimizer(groups, optimizer, first[0].device, lr=lr, betas=betas, weight_decay=weight_decay)


def make_optimizer(
    groups: Sequence[dict[str, Any]],
    optimizer: str,
    device: torch.device,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """The optimizer of that name over `rosa_fx.trainable_parameters`' groups.

    Sparse values without a mask have no gradient; AdamW then neither decays them nor gives them state, so that
    their bias correction starts with their own first step.
    """
    if optimizer not in OPTIMIZERS:
        raise RosaError(f"optimizer is {optimizer!r}: use {' or '.join(map(repr, OPTIMIZERS))}")
    if optimizer == "adamw8bit":
        _require_8bit(device)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(list(groups), lr=lr, betas=betas, weight_decay=weight_decay)
    fused = device.type in ("cpu", "cuda")  # on CUDA also what skips bad steps (found_inf)
    return torch.optim.AdamW(list(groups), lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)


@functools.cache
def _require_8bit(device: torch.device) -> None:
    """RosaError unless bitsandbytes' 8-bit AdamW works on `device`: one step of one small parameter is tried."""
    from bitsandbytes.optim import AdamW8bit

    try:
        tried = nn.Parameter(torch.zeros(4096, device=device))
        tried.grad = torch.ones_like(tried)
        AdamW8bit([tried], lr=0.1).step()
        works = bool((tried < 0).all())
        reason = "its step did nothing"
    except Exception as error:  # whatever a missing kernel raises: every backend has its own
        works, reason = False, f"{type(error).__name__}: {error}"
    if not works:
        raise RosaError(
            f"optimizer 'adamw8bit' does not work on {device.type!r} with this bitsandbytes ({reason}): use optimizer 'adamw'"
        )


def set_learning_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, factor: float) -> dict[str, float]:
    """Set each group's rate to `factor` times its peak; returns {group name: rate}."""
    peaks = {"low_rank": config.lr, "sparse": config.lr_sparse}
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]] = peaks[group["name"]] * factor
    return rates


class GradientNorm(NamedTuple):
    """total: norm over all gradients, a float32 scalar on the device; first_bad: index of the first gradient that has
    a non-finite value, -1 if none (also where only their sum of squares overflows)."""

    total: Tensor
    first_bad: Tensor
    parameters: list[nn.Parameter]


def gradient_norm(optimizer: torch.optim.Optimizer, device: torch.device) -> GradientNorm:
    """The norm of all gradients that exist, without waiting for the device."""
    parameters = [p for p in optimizer_parameters(optimizer) if p.grad is not None]
    if not parameters:
        return GradientNorm(torch.zeros((), device=device), torch.full((), -1, device=device), [])
    gradients = [p.grad.detach() for p in parameters if p.grad is not None]
    wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    norms = torch.stack([n.float() for n in torch._foreach_norm([local(g) for g in gradients], 2, wide)])
    norms = norms_over_shards(norms, gradients)
    bad = ~norms.isfinite()
    first = torch.where(bad.any(), bad.int().argmax(), -1)
    return GradientNorm(torch.linalg.vector_norm(norms), first, parameters)


def clip(norm: GradientNorm, max_norm: float | None) -> None:
    """Scale the gradients so that their norm is at most `max_norm`."""
    if max_norm is not None and norm.parameters:
        if any(map(is_sharded, norm.parameters)):
            factor = (max_norm / (norm.total + 1e-6)).clamp(max=1.0)  # as torch has it, which does not mix whole and sharded
            torch._foreach_mul_([local(p.grad) for p in norm.parameters if p.grad is not None], factor)
        else:
            torch.nn.utils.clip_grads_with_norm_(norm.parameters, max_norm, norm.total)


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in its order: `<weight's name in the original model>.<term>.<parameter>`."""
    names = names_of(model)
    return [names[id(p)] for p in optimizer_parameters(optimizer)]


def names_of(model: nn.Module) -> dict[int, str]:
    """{id of the parameter: its name} of all adapter parameters."""
    return {
        id(parameter): f"{weight}.{name}"
        for weight, terms in state_of(model).weights.items()
        for name, parameter in terms.named_parameters()
    }


def optimizer_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors `<parameter name>/<key>` and JSON (other per-parameter values).

    Sharded state is gathered: every process must call. Where a state is nested, as bitsandbytes nests what is in 8 bits, the
    keys follow each other: `<name>/<outer>/<key>`.
    """
    state = optimizer.state_dict()["state"]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state.items():
        for key, value in entries.items():
            for inner, part in (
                {f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            ).items():
                key_of = f"{names[index]}/{inner}"
                if isinstance(part, Tensor):
                    tensors[key_of] = whole(part)
                else:
                    values[key_of] = part
    return tensors, {"values": values, "parameters": list(names)}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` returned; RosaError if the parameters are not the same ones."""
    if list(names) != values["parameters"]:
        missing = sorted(set(values["parameters"]) ^ set(names))[:1] or ["their order"]
        raise RosaError(
            f"the checkpoint's optimizer has other parameters than this model ({missing[0]}): "
            "transform the same model with the same spec before resuming"
        )
    index_of = {name: i for i, name in enumerate(names)}
    parameters = optimizer_parameters(optimizer)
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **values["values"]}.items():
        owner, *outer, key = name.split("/")
        entries = state.setdefault(index_of[owner], {})
        for part in outer:
            entries = entries.setdefault(part, {})
        parameter = parameters[index_of[owner]]
        entries[key] = like(parameter, value) if isinstance(value, Tensor) and value.shape == parameter.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
