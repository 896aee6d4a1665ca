"""Full fine-tuning: every entry of the same weights, float32 masters of them, the same order of batches, loss and schedule.

`rosa_fx.train` trains adapters alone, so the loop is written out here over the trainer's own pieces.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import rosa_fx
from rosa_fx.targets import select_targets
from rosa_fx.training.batches import END, BatchSource
from rosa_fx.training.engine import Engine, training_mode
from rosa_fx.training.optim import clip, gradient_norm, learning_rate_factor


def unfreeze(model: nn.Module) -> list[nn.Parameter]:
    """Make the weights that an adapter would be attached to trainable float32 parameters, and freeze all others."""
    names = [target.name for target in select_targets(model, rosa_fx.RosaSpec(base="keep"))]
    model.requires_grad_(False)
    trained = []
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
        trained.append(parameter.requires_grad_())
    return trained


def train_full(
    model: nn.Module,
    batches: list[Any],
    config: rosa_fx.TrainConfig,
    on_event: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[float]:
    """Train in place at `config.lr`; returns the loss of each step. `on_event` is handed a row per step, as by the trainer.

    A model whose other weights are bfloat16 needs autocast (`config.bf16`).
    """
    parameters = unfreeze(model)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    engine = Engine(model, config, parameters[0].device, None, None)
    source = BatchSource(batches, config.seed)
    total = source.count_steps(config)
    losses: list[float] = []
    torch.manual_seed(config.seed)
    with training_mode(model):
        while len(losses) < total:
            batch = source.take()
            if batch is END:
                source.next_epoch()
                continue
            started = time.perf_counter()
            factor = learning_rate_factor(len(losses), total, config.warmup_steps, config.schedule)
            optimizer.param_groups[0]["lr"] = config.lr * factor
            losses.append(float(engine.accumulate([engine.describe(batch)])))
            clip(gradient_norm(optimizer, engine.device), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            on_event({"event": "step", "step": len(losses), "loss": losses[-1], "seconds": time.perf_counter() - started})
    return losses
