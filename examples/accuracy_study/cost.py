"""What a method costs: bytes that training keeps between steps, and seconds of a step."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from accuracy_study.dense import train_full, unfreeze
from accuracy_study.grid import Cell
from accuracy_study.methods import by_name, set_random_masks, spec_of
from accuracy_study.task import Bench

import rosa_fx
from rosa_fx.data import make_batches

STEPS, SKIPPED = 12, 5
"""Optimizer steps made, and those before all graphs are compiled (one of warm-up and one that collects among them)."""


def held_bytes(bench: Bench, cell: Cell) -> int:
    """Weights, masks and adapters as they are stored, and float32 gradients and two moments of what is trained."""
    model, method = copy.deepcopy(bench.plain), by_name(cell.method)
    if method.full:
        trained = unfreeze(model)
    else:
        rosa_fx.transform(model, spec_of(method, model, cell.budget, cell.base))
        set_random_masks(model, 0)  # their places do not matter here
        trained = [p for group in rosa_fx.trainable_parameters(model) for p in group["params"]]
    tensors = [*model.parameters(), *model.buffers()]
    stored = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(stored.values()) + 3 * sum(4 * p.numel() for p in trained)


def step_seconds(bench: Bench, cell: Cell) -> float:
    """Median over steps with both terms, in the trainer."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, method = copy.deepcopy(bench.plain), by_name(cell.method)
    batches = make_batches(bench.train_rows, bench.setting.batch, bench.length, bench.pad, seed=0)
    config = rosa_fx.TrainConfig(max_steps=STEPS, warmup_steps=1, compile=False, progress=False)
    seconds: list[float] = []

    def note(row: dict[str, Any]) -> None:
        if row["event"] == "step":
            seconds.append(row["seconds"])

    if method.full:
        rosa_fx.compile_blocks(model)
        train_full(model, batches, config, note)
    else:
        schedule = {"schedule": "wl1"} if 0 < method.share < 1 else {}
        rosa_fx.transform(model, spec_of(method, model, cell.budget, cell.base, **schedule))
        if method.mask == "random":
            set_random_masks(model, 0)
        rosa_fx.compile_blocks(model)
        rosa_fx.train(model, batches, config, on_event=note)
    return statistics.median(seconds[SKIPPED:])
