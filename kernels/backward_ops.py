"""Products with more out of their pass over x, as `torch.library` operators (see `passes/join_gradients.py`).

    product_with_left(x, b) = x Wᵀ + b [*, N], or x W + b [*, K] if `transposed`, and the thin product of its low-rank term,
                              s x Aᵀ, or s x B, [M, R] in x's dtype
    product_with_grads(x, other, kept) = x Wᵀ or x W; and the gradient of the values of S; or with `kept` those of all terms, in
                              their order, as `linear_grads` has them

`other`, of the shape of the product, and x are the factors of the weight gradient: otherᵀ x, or xᵀ other if `transposed`.
`kept` is what `product_with_left` of `other` gave; it saves work and says nothing new. The meaning of the rest is that of
`linear`, `linear_t` and `linear_grads`. They are emitted after autograd and have no derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rosa_fx.kernels import definition
from rosa_fx.kernels.composition import joined_product
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.low_rank import LowRank
from rosa_fx.kernels.terms.sparse import Sparse

_flat = definition.flat


def _sparse(delta: Sequence[Tensor], layout: Layout) -> tuple[Sequence[Tensor], Layout]:
    """The tensors of the only sparse term, and the layout of it alone."""
    (found,) = (tensors for item, tensors in layout.split(delta) if isinstance(item, Sparse))
    return found, replace(layout, terms=(Sparse(),))


def _low_rank(delta: Sequence[Tensor], layout: Layout) -> tuple[LowRank, Sequence[Tensor]]:
    (found,) = ((item, tensors) for item, tensors in layout.split(delta) if isinstance(item, LowRank))
    return found


def _left(x: Tensor, delta: Sequence[Tensor], layout: Layout, transposed: bool) -> Tensor:
    item, (A, B, *_) = _low_rank(delta, layout)
    dtype = definition.accumulate_dtype(x.dtype)
    inner = B.to(dtype) if transposed else A.to(dtype).t()
    return (item.scale * (_flat(x).to(dtype) @ inner)).to(x.dtype)


def _all_grads(
    x: Tensor, other: Tensor, kept: Tensor | None, delta: Sequence[Tensor], layout: Layout, transposed: bool
) -> list[Tensor]:
    """The gradients by the operators' own code, from the factors."""
    dy, right = (x, other) if transposed else (other, x)
    tensors, wanted = _sparse(delta, layout) if kept is None else (delta, layout)
    dy, right = definition.whole_factors(_flat(dy), _flat(right), wanted)
    return [grad for item, own in wanted.split(tensors) for grad in item.grads(dy, right, own)]


@torch.library.custom_op("rosa_fx::product_with_left", mutates_args=())
def product_with_left(
    x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str, transposed: bool
) -> tuple[Tensor, Tensor]:
    parsed = Layout.parse(layout)
    product = definition.linear_t if transposed else definition.linear
    return product(x, bias, base, delta, parsed), _left(x, delta, parsed, transposed)


@product_with_left.register_fake
def _(
    x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str, transposed: bool
) -> tuple[Tensor, Tensor]:
    parsed = Layout.parse(layout)
    out = x.new_empty(*x.shape[:-1], parsed.out_shape[1 if transposed else 0])
    return out, x.new_empty(_flat(x).shape[0], _low_rank(delta, parsed)[1][0].shape[0])


@product_with_left.register_kernel("cpu")
def product_with_left_kernel(
    x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str, transposed: bool
) -> tuple[Tensor, Tensor]:
    parsed = Layout.parse(layout)
    found = joined_product(x, bias, base, delta, parsed, transposed, left=True)
    return found.out, _left(x, delta, parsed, transposed) if found.left is None else found.left


@torch.library.custom_op("rosa_fx::product_with_grads", mutates_args=())
def product_with_grads(
    x: Tensor, other: Tensor, kept: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str, transposed: bool
) -> list[Tensor]:
    parsed = Layout.parse(layout)
    product = definition.linear_t if transposed else definition.linear
    dy, right = (x, other) if transposed else (other, x)
    tensors, wanted = _sparse(delta, parsed) if kept is None else (delta, parsed)
    return [product(x, None, base, delta, parsed), *definition.linear_grads(dy, right, tensors, wanted)]


@product_with_grads.register_fake
def _(
    x: Tensor, other: Tensor, kept: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str, transposed: bool
) -> list[Tensor]:
    parsed = Layout.parse(layout)
    out = x.new_empty(*x.shape[:-1], parsed.out_shape[1 if transposed else 0])
    tensors, wanted = _sparse(delta, parsed) if kept is None else (delta, parsed)
    return [out, *(grad for item, own in wanted.split(tensors) for grad in item.grad_shapes(own))]


@product_with_grads.register_kernel("cpu")
def product_with_grads_kernel(
    x: Tensor, other: Tensor, kept: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str, transposed: bool
) -> list[Tensor]:
    parsed = Layout.parse(layout)
    found = joined_product(x, None, base, delta, parsed, transposed, other=other, kept=kept)
    if len(found.gradients) != (1 if kept is None else 3):
        return [found.out, *_all_grads(x, other, kept, delta, parsed, transposed)]
    values, *factors = found.gradients
    grads: list[Tensor] = []
    for item, own in parsed.split(delta):
        made = [values] if isinstance(item, Sparse) else factors
        # `to` takes a microsecond to find that it has nothing to do.
        grads += [grad if grad.dtype is parameter.dtype else grad.to(parameter.dtype) for grad, parameter in zip(made, own)]
    return [found.out, *grads]
