"""A product of the backward pass and the gradient of S's values as one operator (see `passes/join_gradients.py`).

    product_with_grad(x, other) = x Wᵀ [*, N], or x W [*, K] if `transposed`, and the gradient of the values, [nnz]

`other`, of the shape of the product, and x are the factors of the weight gradient: otherᵀ x, or xᵀ other if `transposed`. The
meaning is that of `linear` or `linear_t` without a bias, and of the sparse term in `linear_grads`. It is emitted after autograd
and has no derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rosa_fx.kernels import composition, definition
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.sparse import Sparse


def sparse_tensors(delta: Sequence[Tensor], layout: Layout) -> Sequence[Tensor]:
    """Values, row offsets and columns of the only sparse term."""
    (found,) = (tensors for item, tensors in layout.split(delta) if type(item) is Sparse)
    return found


def _values_layout(layout: Layout) -> Layout:
    return replace(layout, terms=(Sparse(),))


@torch.library.custom_op("rosa_fx::product_with_grad", mutates_args=())
def product_with_grad(
    x: Tensor, other: Tensor, base: list[Tensor], delta: list[Tensor], layout: str, transposed: bool
) -> tuple[Tensor, Tensor]:
    parsed = Layout.parse(layout)
    product = definition.linear_t if transposed else definition.linear
    dy, right = (x, other) if transposed else (other, x)
    (gradient,) = definition.linear_grads(dy, right, sparse_tensors(delta, parsed), _values_layout(parsed))
    return product(x, None, base, delta, parsed), gradient


@product_with_grad.register_fake
def _(
    x: Tensor, other: Tensor, base: list[Tensor], delta: list[Tensor], layout: str, transposed: bool
) -> tuple[Tensor, Tensor]:
    parsed = Layout.parse(layout)
    out = x.new_empty(*x.shape[:-1], parsed.out_shape[1 if transposed else 0])
    return out, torch.empty_like(sparse_tensors(delta, parsed)[0])


@product_with_grad.register_kernel("cpu")
def _(
    x: Tensor, other: Tensor, base: list[Tensor], delta: list[Tensor], layout: str, transposed: bool
) -> tuple[Tensor, Tensor]:
    parsed = Layout.parse(layout)
    out, gradient = composition.product_with_grad(x, other, base, delta, parsed, transposed)
    tensors = sparse_tensors(delta, parsed)
    if gradient is None:
        dy, right = (x, other) if transposed else (other, x)
        dy, right = definition.whole_factors(dy.reshape(-1, dy.shape[-1]), right.reshape(-1, right.shape[-1]), parsed)
        (gradient,) = Sparse().grads(dy, right, tensors)
    return out, gradient.to(tensors[0].dtype)
