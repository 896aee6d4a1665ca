"""RoSA as its published implementation computes it, transcribed in torch: the published one is not on the package index.

Forward and backward both build a dense W + S; the gradient of the sparse values is a sampled product of float32 transposed
copies of dy and x; the low-rank part is added by two more products. (Source: the algorithm of arXiv 2401.04679 and of the
authors' adapter code, which adds a CSR matrix to the dense weight and calls a CPU SDDMM.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rosa_fx.state import state_of

_CHUNK = 1 << 13  # entries whose rows are gathered at once


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, rows: Tensor, cols: Tensor, module: ReferenceLinear) -> Tensor:
        ctx.save_for_backward(x, values, rows, cols)
        ctx.module = module
        return x @ module.dense(values, rows, cols, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, values, rows, cols = ctx.saved_tensors
        dx = dy @ ctx.module.dense(values, rows, cols, dy.dtype)
        dy_t = dy.reshape(-1, dy.shape[-1]).float().t().contiguous()
        x_t = x.reshape(-1, x.shape[-1]).float().t().contiguous()
        parts = [(dy_t[rows[j : j + _CHUNK]] * x_t[cols[j : j + _CHUNK]]).sum(1) for j in range(0, len(values), _CHUNK)]
        return dx, torch.cat(parts).to(values.dtype), None, None, None


class ReferenceLinear(nn.Module):
    """A linear with an NF4 (or dense) base, a low-rank part and a sparse part, from a transformed weight's tensors."""

    def __init__(self, weight: Any, bias: Tensor | None) -> None:
        super().__init__()
        self.form, self.shape, self.scale = weight.base.format, weight.shape, weight.scale
        self.base = weight.base.tensors()
        self.A = nn.Parameter(weight.low_rank.A.detach().clone())
        self.B = nn.Parameter(weight.low_rank.B.detach().clone())
        self.values = nn.Parameter(weight.sparse.values.detach().clone())
        self.rows, self.cols = weight.sparse.mask.rows(), weight.sparse.cols.long()
        self.bias = bias

    def dense(self, values: Tensor, rows: Tensor, cols: Tensor, dtype: torch.dtype) -> Tensor:
        weight: Tensor = self.form.dequantize(self.base, self.shape, dtype)
        return weight.index_put_((rows, cols), values.to(dtype), accumulate=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _SparseLinear.apply(x, self.values, self.rows, self.cols, self)
        low = (x.to(self.A.dtype) @ self.A.t()) @ self.B.t() * self.scale
        out = out + low.to(out.dtype)
        return out if self.bias is None else out + self.bias


def replace_linears(model: nn.Module, source: nn.Module) -> nn.Module:
    """Every weight that `source`, a transformed twin of `model`, rewrote becomes a `ReferenceLinear` in `model`."""
    for name, weight in state_of(source).weights.items():
        path = name.removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        linear = model.get_submodule(path)
        setattr(model.get_submodule(parent), leaf, ReferenceLinear(weight, getattr(linear, "bias", None)))
    return model
