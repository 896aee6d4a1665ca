"""Recovering a known update: a teacher's weights are W + L + S with L of low rank and S sparse (robust PCA's setting).

The student starts from W and sees inputs and the teacher's outputs alone. All methods have as many trainable parameters as
the true update has degrees of freedom: `rank · (N + K) + nnz`.

Measured: the relative error of the weights, ‖ΔW - (L + S)‖ / ‖L + S‖ (Frobenius, all updated weights together); the F1 score
of the mask against the support of S; and the error of the outputs on fresh inputs, relative to what the update changes. A
transformer's outputs do not determine its weights (queries and keys enter as a product), so there the outputs count.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rosa_fx

METHODS = ("rosa", "rosa, random mask", "low-rank", "sparse", "sparse, random mask")
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
STEPS, WARM_UP, BATCH = 300, 75, 256
VALIDATION = 256


@dataclass(frozen=True)
class Problem:
    """Which teacher: `kind` is "linear" or "transformer"; `decay` of 1 makes L's singular values equal, smaller ones fall off.

    `noise` is the standard deviation of what is added to the teacher's outputs, relative to that of what the update changes.
    """

    kind: str
    samples: int
    rank: int
    nnz_per_rank: float
    decay: float
    noise: float
    seed: int


class Attention(nn.Module):
    """One block of a transformer, width 32: attention and a feed-forward part, each with a residual."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / math.sqrt(self.width), -1) @ v)
        return x + self.down(torch.tanh(self.up(x)))


def student_of(problem: Problem, generator: torch.Generator) -> nn.Module:
    """The model before the update; one sample of its input is [128], or [8, 32] for a transformer."""
    model: nn.Module
    if problem.kind == "linear":
        model = nn.Sequential(nn.Linear(128, 128, bias=False))
    else:
        model = nn.Sequential(Attention(), Attention())
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 1 / math.sqrt(parameter.shape[1]), generator=generator)
    return model


def inputs(problem: Problem, count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, *((128,) if problem.kind == "linear" else (8, 32)), generator=generator)


def true_nnz(problem: Problem, shape: torch.Size) -> int:
    return int(problem.nnz_per_rank * problem.rank * sum(shape))


def update_of(problem: Problem, shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(L, S) [N, K], of equal Frobenius norm, together half as large as W, in a transformer a fifth."""
    left, right = (torch.linalg.qr(torch.randn(n, problem.rank, generator=generator))[0] for n in shape)
    L = (left * problem.decay ** torch.arange(problem.rank)) @ right.T
    S = torch.zeros(shape)
    support = torch.randperm(S.numel(), generator=generator)[: true_nnz(problem, shape)]
    # Away from zero: an entry that is too small to matter has no support to be found.
    values = torch.randn(support.numel(), generator=generator)
    S.view(-1)[support] = values.sign() * (0.5 + values.abs())
    size = (0.5 if problem.kind == "linear" else 0.2) * math.sqrt(shape[0] / 2)
    return L * size / L.norm(), S * size / S.norm()


def spec_of(method: str, problem: Problem, model: nn.Module) -> rosa_fx.RosaSpec:
    """As many trainable parameters for each method, up to the rounding of a rank."""
    shapes = [p.shape for p in model.parameters()]
    nnz = {name: true_nnz(problem, p.shape) for name, p in model.named_parameters()}
    extra = round(sum(nnz.values()) / sum(sum(shape) for shape in shapes))
    rank = {"low-rank": problem.rank + extra}.get(method, 0 if method.startswith("sparse") else problem.rank)
    densities: dict[str, dict[str, float]] = {}
    for name, parameter in model.named_parameters():
        budget = nnz[name] + (problem.rank * sum(parameter.shape) if rank == 0 else 0)
        densities[name] = {"density": (budget + 0.5) / parameter.numel()}
    schedule = {"low-rank": "lora_only"}.get(method, "spa_only" if rank == 0 else f"wl{WARM_UP}")
    return rosa_fx.RosaSpec(
        base="keep",
        rank=rank,
        alpha=max(rank, 1),
        density=0.0 if method == "low-rank" else 0.01,
        schedule=schedule,
        overrides={} if method == "low-rank" else densities,
    )


def random_masks(model: nn.Module, shapes: dict[str, torch.Size], generator: torch.Generator) -> dict[str, rosa_fx.Mask]:
    found = {}
    for name, shape in shapes.items():
        sparse = rosa_fx.adapter(model, name).sparse
        assert sparse is not None
        flat = torch.randperm(shape.numel(), generator=generator)[: sparse.values.numel()]
        found[name] = rosa_fx.Mask.from_indices(flat // shape[1], flat % shape[1], (shape[0], shape[1]))
    return found


@dataclass
class Taught:
    """A student, what it learns from (`x`, `y`), what it is judged on, and the update (L, S) per weight that it should find."""

    problem: Problem
    plain: nn.Module
    truth: dict[str, tuple[Tensor, Tensor]]
    x: Tensor
    y: Tensor
    held: Tensor
    held_y: Tensor
    changed: Tensor

    def held_loss(self, model: nn.Module) -> float:
        """Mean squared error on fresh inputs, relative to the variance of what the update changes."""
        model.eval()
        with torch.no_grad():
            return float((model(self.held) - self.held_y).square().mean() / self.changed.square())


def teach(problem: Problem) -> Taught:
    generator = torch.Generator().manual_seed(problem.seed)
    plain = student_of(problem, generator)
    truth = {name: update_of(problem, p.shape, generator) for name, p in plain.named_parameters()}
    teacher = copy.deepcopy(plain)
    for name, parameter in teacher.named_parameters():
        parameter.data += sum(truth[name])
    x, held = inputs(problem, problem.samples, generator), inputs(problem, VALIDATION, generator)
    with torch.no_grad():
        y, held_y = teacher(x), teacher(held)
        changed = (held_y - plain(held)).std()
    y = y + problem.noise * changed * torch.randn(y.shape, generator=generator)
    return Taught(problem, plain, truth, x, y, held, held_y, changed)


def fit(
    model: nn.Module, taught: Taught, lr: float, generator: torch.Generator, *, stop: int = STEPS, restart: str | None = None
) -> None:
    """The recipe's phases in a plain loop: Adam, linear decay over `STEPS` steps, of which `stop` are made.

    `restart` begins again when the masks exist: "same" with the steps that are left, "whole" with all of them.
    """
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1, restart=restart is not None)
    groups = rosa_fx.trainable_parameters(model, lr=lr, lr_sparse=lr)
    optimizer = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    x, y = taught.x, taught.y
    left = min(stop, STEPS)
    while left:
        schedule.begin_step()
        chosen = torch.randint(len(x), (BATCH,), generator=generator) if len(x) > BATCH else slice(None)
        (model(x[chosen]).float() - y[chosen]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.end_step()
        decay.step()
        left -= 1
        if schedule.restarted:
            left = STEPS if restart == "whole" else left
            optimizer = torch.optim.Adam(rosa_fx.trainable_parameters(model, lr=lr, lr_sparse=lr))
            decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, left)


def run(problem: Problem, method: str) -> dict[str, float]:
    """Fit with each learning rate, keep the one that does best on validation samples, compare with the truth."""
    taught = teach(problem)
    shapes = {name: p.shape for name, p in taught.plain.named_parameters()}
    best: dict[str, float] = {}
    for lr in LEARNING_RATES:
        own = torch.Generator().manual_seed(problem.seed + 1)
        torch.manual_seed(problem.seed)
        model = rosa_fx.transform(copy.deepcopy(taught.plain), spec_of(method, problem, taught.plain))
        if "random" in method:
            rosa_fx.set_masks(model, random_masks(model, shapes, own))
        fit(model, taught, lr, own)
        loss = taught.held_loss(model)
        if not best or loss < best["validation"]:
            best = {"validation": loss, "output_error": math.sqrt(loss), "lr": lr, **compare(model, taught.truth)}
    best["parameters"] = sum(p.numel() for group in rosa_fx.trainable_parameters(model) for p in group["params"])
    return best


def compare(model: nn.Module, truth: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Relative error of ΔW and F1 of the support, over all weights together."""
    error = size = 0.0
    hits = chosen = there = 0
    masks = rosa_fx.masks(model)
    for name, (L, S) in truth.items():
        error += float((rosa_fx.delta(model, name) - L - S).square().sum())
        size += float((L + S).square().sum())
        if masks.get(name) is not None:
            mask = masks[name].to_dense()
            hits, chosen, there = hits + int((mask & (S != 0)).sum()), chosen + int(mask.sum()), there + int((S != 0).sum())
    found = {"error": math.sqrt(error / size)}
    if chosen:
        found["f1"] = 2 * hits / (chosen + there)
    return found


MIDDLE: dict[str, Any] = {"rank": 4, "nnz_per_rank": 0.5, "decay": 1.0, "noise": 0.0}
CHANGES: tuple[dict[str, Any], ...] = (
    {"rank": 2},
    {"rank": 8},
    {"nnz_per_rank": 0.25},
    {"nnz_per_rank": 1.0},
    {"noise": 0.3},
    {"decay": 0.5},
)


def middle(kind: str, seed: int, samples: int = 512, **changes: Any) -> Problem:
    return Problem(kind, samples, seed=seed, **(MIDDLE | changes))


def problems(seeds: int, kinds: tuple[str, ...] = ("linear", "transformer")) -> Iterator[Problem]:
    """Samples are the curve's axis; every other property is varied around one middle case, at the middle of the axis."""
    for seed in range(seeds):
        if "linear" in kinds:
            yield from (middle("linear", seed, samples) for samples in (64, 128, 256, 512, 1024))
            yield from (middle("linear", seed, **change) for change in CHANGES)
        if "transformer" in kinds:
            yield from (middle("transformer", seed, samples) for samples in (32, 128, 512))
