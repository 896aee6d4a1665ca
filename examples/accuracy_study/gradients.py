"""Dense gradients of the weights that would be adapted, by ordinary autograd: what masks are chosen from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accuracy_study.dense import unfreeze
from torch import Tensor, nn

import rosa_fx
from rosa_fx.targets import select_targets
from rosa_fx.training.engine import Engine, training_mode


def over_base(model: nn.Module, base: str) -> nn.Module:
    """A copy of `model` whose linear weights are what `base` keeps of them, as dense weights."""
    model = copy.deepcopy(model)
    if base == "keep":
        return model
    # B is zero, so the merged weight is the dequantised one.
    return rosa_fx.merge(rosa_fx.transform(model, rosa_fx.RosaSpec(base=base, rank=1, density=0.0, schedule="lora_only")))


def dense_gradients(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weight's name -> its float32 gradient [N, K] of the mean loss over `batches`. Leaves `model` in float32, trainable."""
    names = [target.name for target in select_targets(model, rosa_fx.RosaSpec(base="keep"))]
    parameters = unfreeze(model)
    engine = Engine(model, rosa_fx.TrainConfig(compile=False, progress=False), torch.device("cpu"), None, None)
    with training_mode(model):
        engine.accumulate([engine.describe(batch) for batch in batches])
    found: dict[str, Any] = {}
    for name, parameter in zip(names, parameters, strict=True):
        found[name], parameter.grad = parameter.grad, None
    return found
