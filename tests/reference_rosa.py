"""A plain, slow transcription of RoSA (arXiv 2401.04679, section 4.2) over an ordinary dense model: the tests' oracle.

Every weight is a dense tensor W = W0 + s·B A + mask ∘ S that autograd differentiates as it stands; the dense gradient of each
backward call is kept. The classes share no code with rosa_fx.
Below them: models and steps that the schedule and mask tests share.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rosa_fx

Loss = Callable[[Tensor, Tensor], Tensor]


class ReferenceWeight:
    """One weight [N, K] and its adapters, all dense."""

    def __init__(self, base: Tensor, A: Tensor | None, B: Tensor | None, scale: float, nnz: int) -> None:
        self.base, self.scale, self.nnz = base, scale, nnz
        self.A = None if A is None else A.clone().requires_grad_()
        self.B = None if B is None else B.clone().requires_grad_()
        self.start = None if A is None else A.clone()
        self.S = torch.zeros_like(base, requires_grad=True)
        self.mask: Tensor | None = None

    def dense(self, sparse: bool) -> Tensor:
        weight = self.base.clone().requires_grad_()
        if self.A is not None and self.B is not None:
            weight = weight + self.scale * (self.B @ self.A)
        if sparse and self.mask is not None:
            weight = weight + self.mask * self.S
        return weight


def top_mask(score: Tensor, nnz: int) -> Tensor:
    """bool [N, K]: the nnz largest; of equal ones the first in row-major order."""
    order = torch.sort(score.flatten(), descending=True, stable=True).indices[:nnz]
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.view_as(score)


class ReferenceRosa:
    """Trains `model` (plain, not transformed) with RoSA. `weights` by parameter name, in the dtype to compute in."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, ReferenceWeight],
        schedule: str,
        num_grads: int = 1,
        mode: str = "mean_squared",
        restart: bool = False,
    ) -> None:
        dtype = next(iter(weights.values())).base.dtype
        self.model = copy.deepcopy(model).to(dtype).requires_grad_(False)
        self.weights, self.num_grads, self.mode, self.restart, self.dtype = weights, num_grads, mode, restart, dtype
        match = re.fullmatch(r"wl(\d+)", schedule)
        rank = any(w.A is not None for w in weights.values())
        sparse = any(w.nnz for w in weights.values())
        self.collect_at: int | None = None if schedule == "lora_only" or not sparse else 0
        if match is not None and rank and sparse:
            self.collect_at = int(match[1])
        self.train_low_rank = schedule != "spa_only"
        self.step_number = 0
        self.scores: dict[str, Tensor] = {}

    @property
    def phase(self) -> str:
        if self.collect_at is None or self.step_number < self.collect_at:
            return "low_rank"
        return "collect" if self.step_number < self.collect_at + self.num_grads else "joint"

    def groups(self, lr: float, lr_sparse: float) -> list[dict[str, Any]]:
        low_rank = [p for w in self.weights.values() for p in (w.A, w.B) if p is not None]
        sparse = [w.S for w in self.weights.values()]
        groups = [{"params": low_rank if self.train_low_rank else [], "lr": lr}, {"params": sparse, "lr": lr_sparse}]
        return [group for group in groups if group["params"]]

    def step(self, batches: Sequence[Tensor], loss: Loss, optimizer: torch.optim.Optimizer | None) -> list[float]:
        """One optimizer step over micro-batches: their losses."""
        phase, losses = self.phase, []
        for batch in batches:
            x = batch.to(self.dtype)
            dense = {name: w.dense(phase == "joint") for name, w in self.weights.items()}
            for weight in dense.values():
                weight.retain_grad()
            value = loss(torch.func.functional_call(self.model, dense, (x,)), x)
            value.backward()
            losses.append(value.item())
            if phase == "collect":
                for name, weight in dense.items():
                    gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    found = gradient.square() if self.mode == "mean_squared" else gradient
                    self.scores[name] = self.scores.get(name, torch.zeros_like(found)) + found
        if optimizer is not None:
            optimizer.step()
        for w in self.weights.values():
            for parameter in (w.A, w.B, w.S):
                if parameter is not None:
                    parameter.grad = None
        self.step_number += 1
        if phase == "collect" and self.phase == "joint":
            for name, w in self.weights.items():
                w.mask = top_mask(self.scores[name].abs(), w.nnz)
            if self.restart:
                self.start_again()
        return losses

    @torch.no_grad()
    def start_again(self) -> None:
        for w in self.weights.values():
            if w.A is not None and w.B is not None and w.start is not None:
                w.A.copy_(w.start)
                w.B.zero_()
            w.S.zero_()


# --- shared by the tests --------------------------------------------------------------------------------

D = 16
L, C, J, P = "low_rank", "collect", "joint", "sparse"


class Tiny(nn.Module):
    """Attention whose q, k and v share their input, one weight used twice, and a feed-forward part."""

    def __init__(self, checkpointing: str = "") -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=i > 1) for i in range(4))
        self.twice = nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 24), nn.Linear(24, D)
        self.checkpointing = checkpointing

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + self.o(torch.softmax(q @ k.mT / 4, -1) @ v)

    def rest(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self._part(self.attend, x)
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self._part(self.rest, x)

    def _part(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not self.checkpointing:
            return function(x)
        reentrant = self.checkpointing == "reentrant"
        # A reentrant segment needs an input that requires grad.
        return checkpoint(function, x.requires_grad_() if x.is_leaf else x, use_reentrant=reentrant)


class Pair(nn.Module):
    def __init__(self, d: int = 12, h: int = 8, out: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d, h, bias=False), nn.Linear(h, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 24), nn.Tanh(), nn.Linear(24, D))


def spec_of(**changes: Any) -> rosa_fx.RosaSpec:
    return rosa_fx.RosaSpec(**{"base": "keep", "rank": 4, "density": 0.05, "schedule": "wl1", **changes})


def loss_of(out: Tensor, x: Tensor) -> Tensor:
    return (out - x.detach().roll(1, -1)).square().mean()


def batch(step: int, micro: int = 0, rows: int = 3) -> Tensor:
    return torch.randn(rows, 5, D, generator=torch.Generator().manual_seed(1000 * step + micro))


def twins(
    spec: rosa_fx.RosaSpec, plain: nn.Module | None = None, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Any, Any]:
    """A transformed model and its transcription in `dtype`, which start alike."""
    torch.manual_seed(seed)
    plain = Tiny() if plain is None else plain
    model = rosa_fx.transform(copy.deepcopy(plain), spec)
    return model, transcribe(model, plain, spec, dtype, **options)


def transcribe(model: Any, plain: nn.Module, spec: rosa_fx.RosaSpec, dtype: torch.dtype, **options: Any) -> Any:
    weights = {}
    for target in target_names(model):
        term = rosa_fx.adapter(model, target)
        A, B = (None, None) if term.low_rank is None else (term.low_rank.A.detach(), term.low_rank.B.detach())
        weights[target] = ReferenceWeight(
            rosa_fx.base_weight(model, target).to(dtype),
            None if A is None else A.to(dtype),
            None if B is None else B.to(dtype),
            term.scale,
            0 if term.sparse is None else term.sparse.values.numel(),
        )
    arguments = {"schedule": spec.schedule, "num_grads": spec.num_grads, "mode": spec.grad_mode, **options}
    return ReferenceRosa(plain, weights, **arguments)


def target_names(model: Any) -> list[str]:
    keys = rosa_fx.adapter_state(model)
    return list(dict.fromkeys(key.rsplit(".", 2)[0] for key in keys))


def train_step(
    model: Any, schedule: rosa_fx.MaskSchedule, batches: list[Tensor], optimizer: Any = None, call: Any = None
) -> list[float]:
    schedule.begin_step()
    losses = []
    for x in batches:
        loss = loss_of((model if call is None else call)(x), x)
        loss.backward()
        losses.append(loss.item())
    if optimizer is not None:
        optimizer.step()
    for p in model.parameters():
        p.grad = None
    schedule.end_step()
    return losses


def assert_same_masks(model: Any, oracle: Any) -> None:
    """Exactly equal masks, where no rounding error can decide: the scores at the cut lie well apart."""
    masks = rosa_fx.masks(model)
    assert set(masks) == {name for name, w in oracle.weights.items() if rosa_fx.adapter(model, name).sparse is not None}
    for name, mask in masks.items():
        weight = oracle.weights[name]
        ranked = oracle.scores[name].abs().flatten().sort(descending=True).values
        if 0 < weight.nnz < ranked.numel() and ranked[0] > 0:
            above, below = ranked[weight.nnz - 1], ranked[weight.nnz]
            assert (above - below) / above > 1e-4, f"{name}: these data do not tell entries apart; take another seed"
        mask.validate(name, tuple(weight.base.shape), weight.nnz)
        assert torch.equal(mask.to_dense(), weight.mask), name


def frozen(model: Any, part: str) -> set[bool]:
    terms = [getattr(rosa_fx.adapter(model, name), part) for name in target_names(model)]
    return {not p.requires_grad for term in terms if term is not None for p in term.parameters()}


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in rosa_fx.adapter_state(model).items()}


def assert_unchanged(model: Any, before: dict[str, Tensor]) -> None:
    after = rosa_fx.adapter_state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
