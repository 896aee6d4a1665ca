"""What each choice of the recipe is worth: one thing changed at a time, on the known-answer teachers or on the real model.

Both studies take a variant by its name. The base case of the known-answer study is the recipe of its table: 75 warm-up steps
of 300, one gradient, masks per weight, training goes on when they exist.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accuracy_study import known_answer
from accuracy_study.methods import global_allocation
from torch import Tensor

import rosa_fx
from rosa_fx.kernels import ops
from rosa_fx.kernels.layout import Layout


@dataclass(frozen=True)
class Variant:
    """`spec` are fields of the spec. `restart` is "same" (in all as many steps) or "whole" (the paper's: a whole run after it).

    `allocation` "global" gives each weight as many entries as it has among the largest gradients of the model. `bf16` computes
    in bfloat16: "folded" adds S to the weight and rounds the sum, as the kernels do, "exact" rounds no sum.
    """

    spec: Mapping[str, Any] = field(default_factory=dict)
    restart: str | None = None
    allocation: str = "per weight"
    bf16: str | None = None


BASE = "as in the table"
VARIANTS = {
    BASE: Variant(),
    "warm-up 0": Variant({"schedule": "wl0"}),
    "warm-up 16": Variant({"schedule": "wl16"}),
    "warm-up 64": Variant({"schedule": "wl64"}),
    "4 gradients, squared": Variant({"num_grads": 4}),
    "4 gradients, mean": Variant({"num_grads": 4, "grad_mode": "mean"}),
    "restart, same steps": Variant(restart="same"),
    "restart, whole run": Variant(restart="whole"),
    "masks over the model": Variant(allocation="global"),
    "dropout 0.05": Variant({"dropout": 0.05}),
    "bf16, S folded": Variant(bf16="folded"),
    "bf16, S exact": Variant(bf16="exact"),
}


def run_known_answer(problem: known_answer.Problem, variant: Variant) -> dict[str, float]:
    """As `known_answer.run` for RoSA, with one thing changed."""
    taught = known_answer.teach(problem)
    spec = replace(known_answer.spec_of("rosa", problem, taught.plain), **variant.spec)
    best: dict[str, float] = {}
    for lr in known_answer.LEARNING_RATES:
        generator = torch.Generator().manual_seed(problem.seed + 1)
        torch.manual_seed(problem.seed)
        used = replace(spec, overrides=_allocated(taught, spec, lr)) if variant.allocation == "global" else spec
        torch.manual_seed(problem.seed)
        model = rosa_fx.transform(copy.deepcopy(taught.plain), used)
        with computing(variant.bf16):
            known_answer.fit(model, taught, lr, generator, restart=variant.restart)
            loss = taught.held_loss(model)
        if not best or loss < best["validation"]:
            found = known_answer.compare(model, taught.truth)
            best = {"validation": loss, "output_error": math.sqrt(loss), "lr": lr, **found}
    best["parameters"] = sum(p.numel() for group in rosa_fx.trainable_parameters(model) for p in group["params"])
    return best


def _allocated(taught: known_answer.Taught, spec: rosa_fx.RosaSpec, lr: float) -> dict[str, dict[str, float]]:
    """Densities by the gradients after the warm-up, which is made here once more."""
    model = rosa_fx.transform(copy.deepcopy(taught.plain), spec)
    known_answer.fit(model, taught, lr, torch.Generator().manual_seed(taught.problem.seed + 1), stop=known_answer.WARM_UP)
    budget = sum(
        int(override["density"] * taught.plain.get_parameter(name).numel()) for name, override in spec.overrides.items()
    )
    dense = rosa_fx.merge(model).requires_grad_()
    (dense(taught.x) - taught.y).square().mean().backward()
    return densities({name: p.grad for name, p in dense.named_parameters() if p.grad is not None}, budget)


def densities(gradients: dict[str, Tensor], budget: int) -> dict[str, dict[str, float]]:
    """Overrides of the spec that give each weight its share of the `budget` largest gradients of all."""
    counts = global_allocation({name: gradient.abs() for name, gradient in gradients.items()}, budget)
    # Half an entry more, so that int(density · N · K) is not one short.
    return {name: {"density": min(1.0, (count + 0.5) / gradients[name].numel())} for name, count in counts.items()}


@contextmanager
def computing(bf16: str | None) -> Iterator[None]:
    """Autocast to bfloat16 or not, the sparse term folded into the weight (as the kernels do it) or added exactly."""
    cast: Any = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with cast, exact_sparse() if bf16 == "exact" else nullcontext():
        yield


@contextmanager
def exact_sparse() -> Iterator[None]:
    """Products in training with bf16(D(Q)) + S + BA summed and multiplied in float32: nothing but the result is rounded.

    Eager evaluation without gradients reads the folded weight as always.
    """
    folding = ops.product

    def apart(
        x: Tensor, bias: Tensor | None, base: Sequence[Tensor], delta: Sequence[Tensor], parsed: Layout, transposed: bool
    ) -> Tensor:
        if x.dtype == torch.float32:
            return folding(x, bias, base, delta, parsed, transposed)
        weight = parsed.base.dequantize(base, parsed.shape, x.dtype).float()
        for item, tensors in parsed.split(delta):
            if item.contributes:
                item.fold_(weight, tensors)
        weight = parsed.cut(weight)
        out = x.float() @ (weight if transposed else weight.t())
        return (out if bias is None else out + bias.float()).to(x.dtype)

    ops.product = apart  # type: ignore[assignment]
    try:
        yield
    finally:
        ops.product = folding
