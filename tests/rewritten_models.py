"""Models compiled with the rewrite but without code generation, and what their outputs and gradients have to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rosa_fx
from rosa_fx.kernels.inductor import capture_backend
from rosa_fx.passes.joint import rewrite
from rosa_fx.passes.report import GraphReport

# Two float32 computations of one thing differ by the order of their sums: twice the other's error is within that.
FLOAT32 = 2.0

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


class Holder(nn.Module):
    """A model with one raw weight and one bias, used as `fn` spells it."""

    def __init__(self, fn: Spelling, shape: tuple[int, ...], bias: int) -> None:
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.randn(shape) * 0.1)
        self.bias = nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, self.weight, self.bias)


def prepared(fn: Spelling, shape: tuple[int, ...], base: str = "nf4", **spec: Any) -> Holder:
    """Transformed, with a random mask and every adapter tensor away from zero."""
    model = Holder(fn, shape, 32)
    settings = {"base": base, "rank": 4, "density": 0.1, "targets": ["weight"]} | spec
    rosa_fx.transform(model, rosa_fx.RosaSpec(**settings))
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    for name, weight in rosa_fx.state.state_of(model).weights.items():
        if weight.low_rank is not None:
            nn.init.normal_(weight.low_rank.B, std=0.1)
        if weight.sparse is not None:
            nnz = weight.sparse.values.numel()
            dense = torch.zeros(math.prod(weight.shape), dtype=torch.bool)
            dense[torch.randperm(dense.numel())[:nnz]] = True
            rosa_fx.set_masks(model, {name: dense.view(weight.shape)})
            nn.init.normal_(weight.sparse.values, std=0.1)


def rewritten(model: nn.Module, **options: Any) -> tuple[Callable[..., Any], list[GraphReport]]:
    """The model compiled with the rewrite but without code generation, and the reports of its graphs."""
    reports: list[GraphReport] = []
    torch._dynamo.reset()
    backend = capture_backend(lambda graph: reports.append(rewrite(graph)))
    return torch.compile(model, backend=backend, **options), reports


def run(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, grad-input and the gradient of every trainable parameter, for a fixed random upstream gradient."""
    for parameter in model.parameters():
        parameter.grad = None
    x = x.detach().clone().requires_grad_()
    y = call(x)
    torch.manual_seed(7)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def exact(model: Holder, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same by autograd through plain torch in `dtype`, from D(Q) and the adapter tensors."""
    term = rosa_fx.adapter(model, "weight")
    leaves = [t.detach().to(dtype).requires_grad_() for t in (term.low_rank.A, term.low_rank.B, term.sparse.values)]
    A, B, values = leaves
    mask = term.sparse.mask
    S = torch.zeros(term.matrix, dtype=dtype).index_put((mask.rows(), mask.cols.long()), values).view(term.shape)
    weight = rosa_fx.base_weight(model, "weight").to(dtype) + S + term.scale * (B @ A).view(term.shape)
    x = x.detach().to(dtype).requires_grad_()
    y = model.fn(x, weight, model.bias.detach().to(dtype))
    torch.manual_seed(7)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(dtype))
    return [y.detach(), x.grad, *(leaf.grad for leaf in leaves)]


def assert_budget(
    actual: list[Tensor], plain: list[Tensor], truth: list[Tensor], factor: float, together: bool = False
) -> None:
    """Root-mean-square error at most `factor` times that of the plain computation in the same precision.

    Where the plain error is accidentally tiny, half a unit in the last place of the result's size counts instead. Through a
    whole model rounding errors are few and add up by chance: `together` compares them over all tensors, each in units of
    its own size.
    """
    assert len(actual) == len(plain) == len(truth)
    if together:
        scales = [right.double().pow(2).mean().sqrt().clamp(min=1e-300) for right in truth]
        eps = max(torch.finfo(ours.dtype).eps for ours in actual)
        ours, theirs, right = (
            torch.cat([(t.double() / scale).flatten() for t, scale in zip(tensors, scales)])
            for tensors in (actual, plain, truth)
        )
        allowed = factor * (theirs - right).pow(2).mean().sqrt().clamp(min=eps / 2)
        assert (ours - right).pow(2).mean().sqrt() <= allowed
        return
    for ours, theirs, right in zip(actual, plain, truth):
        size = right.double().pow(2).mean().sqrt()
        floor = size * torch.finfo(ours.dtype).eps / 2
        budget = factor * torch.maximum((theirs.double() - right).pow(2).mean().sqrt(), floor)
        assert (ours.double() - right).pow(2).mean().sqrt() <= budget
