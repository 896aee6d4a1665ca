"""What the fused operators compute, in plain torch: the oracle of every kernel and the meaning of every rewrite.

With W = D(Q) + Σ terms (design: y = x (D(Q)+S)ᵀ + s (x Aᵀ) Bᵀ + b):

    materialize            W                                [N, K]
    linear                 y  = x Wᵀ + b                    x [*, K] -> y [*, N]
    linear_t               dx = dy W + b                    dy [*, N] -> dx [*, K]
    linear_grads           gradients of the delta's parameters from dy [*, N] and x [*, K]
    materialize_backward   the same gradients from a dense dW [N, K]

A layout with a region uses that part of W, and its gradients are those of the whole with zeros elsewhere.

Everything is computed in `accumulate` (float32 unless an operand is float64) and rounded once at the end.
Give float64 operands and a float64 layout for the exact value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rosa_fx.kernels.layout import Layout


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def dense_weight(base: Sequence[Tensor], delta: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`, each term added in that dtype."""
    weight = layout.base.dequantize(base, layout.shape, dtype)
    for item, tensors in layout.split(delta):
        dense = item.dense(tensors, layout.shape, dtype)
        if dense is not None:
            weight = weight + dense
    return weight


def materialize(base: Sequence[Tensor], delta: Sequence[Tensor], layout: Layout) -> Tensor:
    return dense_weight(base, delta, layout, accumulate_dtype(layout.dtype)).to(layout.dtype)


def linear(x: Tensor, bias: Tensor | None, base: Sequence[Tensor], delta: Sequence[Tensor], layout: Layout) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    out = x.to(dtype) @ layout.cut(dense_weight(base, delta, layout, dtype)).t()
    return (out if bias is None else out + bias.to(dtype)).to(x.dtype)


def linear_t(dy: Tensor, bias: Tensor | None, base: Sequence[Tensor], delta: Sequence[Tensor], layout: Layout) -> Tensor:
    dtype = accumulate_dtype(dy.dtype)
    out = dy.to(dtype) @ layout.cut(dense_weight(base, delta, layout, dtype))
    return (out if bias is None else out + bias.to(dtype)).to(dy.dtype)


def flat(x: Tensor) -> Tensor:
    """Rows [M, K] of x [*, K]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def whole_factors(dy: Tensor, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """dy [M, N] and x [M, K] for the whole weight: what belongs to a region is set into zeros."""
    if layout.region is None:
        return dy, x
    row, row_stop, column, column_stop = layout.region
    rows, columns = layout.shape
    if (row, row_stop) != (0, rows):
        dy = torch.nn.functional.pad(dy, (row, rows - row_stop))
    if (column, column_stop) != (0, columns):
        x = torch.nn.functional.pad(x, (column, columns - column_stop))
    return dy, x


def linear_grads(dy: Tensor, x: Tensor, delta: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    dtype = accumulate_dtype(dy.dtype, x.dtype)
    dy, x = whole_factors(flat(dy), flat(x), layout)
    dW = dy.to(dtype).t() @ x.to(dtype)
    return materialize_backward(dW, delta, layout)


def materialize_backward(dW: Tensor, delta: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    return [grad for item, tensors in layout.split(delta) for grad in item.grads_from_dense(dW, tensors)]
