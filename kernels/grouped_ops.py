"""Products in which every row of x meets one matrix of a stack [E · N, K]: mixture-of-experts layers and block-diagonal ones.

Which matrix row t meets is said by the groups, in one of three ways:

    offs [E] integers      x [S, K]: rows [offs[e-1], offs[e]) meet matrix e (offs[-1] = 0); rows from offs[E-1] on give zeros
    index [S] integers     x [S, K] or [S, M, K]: x[t] meets matrix index[t], which may be negative as in indexing
    neither                x [E, M, K]: x[e] meets matrix e

As in `ops`, `grouped_linear` multiplies with the matrices transposed, `grouped_linear_t` with them as stored, and the region
of a layout is a part of *each* matrix. The composition computes one matrix at a time (`stack`), those without rows not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rosa_fx.kernels import definition
from rosa_fx.kernels.composition import product
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.ops import DEVICES, scatter_grads
from rosa_fx.kernels.stack import Stack, grads_of_pieces, whole_piece

# The ends of groups are read on the host, which a CUDA graph cannot hold.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def _groups(x: Tensor, offs: Tensor | None, index: Tensor | None, stack: int) -> Iterator[tuple[int, slice | int | Tensor]]:
    """The matrices that have rows, and which of x they are. Waits for the device unless the groups are equal."""
    if index is not None:
        wrapped = torch.where(index < 0, index + stack, index)
        order = torch.argsort(wrapped, stable=True)
        # Counted in an exact type; `bincount` of nothing has no length of its own.
        ends = torch.bincount(wrapped, minlength=stack).cumsum(0).tolist()
        for number, (start, stop) in enumerate(pairwise([0, *ends])):
            if start < stop:
                yield number, order[start:stop]
    elif offs is not None:
        for number, (start, stop) in enumerate(pairwise([0, *offs.tolist()])):
            if start < stop:
                yield number, slice(start, stop)
    elif x.shape[1]:
        yield from ((number, number) for number in range(stack))


@torch.library.custom_op("rosa_fx::grouped_linear", mutates_args=(), tags=_TAGS)
def grouped_linear(
    x: Tensor, offs: Tensor | None, index: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str
) -> Tensor:
    return _define(x, offs, index, base, delta, Layout.parse(layout), transposed=False)


@torch.library.custom_op("rosa_fx::grouped_linear_t", mutates_args=(), tags=_TAGS)
def grouped_linear_t(
    x: Tensor, offs: Tensor | None, index: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str
) -> Tensor:
    return _define(x, offs, index, base, delta, Layout.parse(layout), transposed=True)


@torch.library.custom_op("rosa_fx::grouped_linear_grads", mutates_args=(), tags=_TAGS)
def grouped_linear_grads(
    dy: Tensor, x: Tensor, offs: Tensor | None, index: Tensor | None, delta: list[Tensor], layout: str
) -> list[Tensor]:
    return define_grads(dy, x, offs, index, delta, Layout.parse(layout))


# --- definition --------------------------------------------------------------------------------------------------


def _define(
    x: Tensor,
    offs: Tensor | None,
    index: Tensor | None,
    base: Sequence[Tensor],
    delta: Sequence[Tensor],
    layout: Layout,
    transposed: bool,
) -> Tensor:
    """What `grouped_linear` and, if `transposed`, `grouped_linear_t` compute: with every matrix dense, rounded at the end."""
    dtype = definition.accumulate_dtype(x.dtype)
    weights = definition.dense_weight(base, delta, layout, dtype).view(layout.stack, -1, layout.shape[1])
    row, row_stop, column, column_stop = layout.region or (0, weights.shape[1], 0, weights.shape[2])
    weights = weights[:, row:row_stop, column:column_stop]
    out = x.new_zeros((*x.shape[:-1], weights.shape[2 if transposed else 1]), dtype=dtype)
    for number, rows in _groups(x, offs, index, layout.stack):
        out[rows] = x[rows].to(dtype) @ (weights[number] if transposed else weights[number].t())
    return out.to(x.dtype)


def define_linear(
    x: Tensor, offs: Tensor | None, index: Tensor | None, base: Sequence[Tensor], delta: Sequence[Tensor], layout: Layout
) -> Tensor:
    """y [*, N], in float32 (float64 if an operand is) and rounded once."""
    return _define(x, offs, index, base, delta, layout, transposed=False)


def define_linear_t(
    x: Tensor, offs: Tensor | None, index: Tensor | None, base: Sequence[Tensor], delta: Sequence[Tensor], layout: Layout
) -> Tensor:
    """dx [*, K] from dy [*, N], likewise."""
    return _define(x, offs, index, base, delta, layout, transposed=True)


def define_grads(
    dy: Tensor, x: Tensor, offs: Tensor | None, index: Tensor | None, delta: Sequence[Tensor], layout: Layout
) -> list[Tensor]:
    """Gradients of the delta's parameters from the dense gradient [E · N, K]."""
    dtype = definition.accumulate_dtype(dy.dtype, x.dtype)
    dW = x.new_zeros((layout.stack, layout.shape[0] // layout.stack, layout.shape[1]), dtype=dtype)
    row, row_stop, column, column_stop = layout.region or (0, dW.shape[1], 0, dW.shape[2])
    for number, rows in _groups(x, offs, index, layout.stack):
        left, right = (side[rows].reshape(-1, side.shape[-1]).to(dtype) for side in (dy, x))
        dW[number, row:row_stop, column:column_stop] = left.t() @ right
    return definition.materialize_backward(dW.view(layout.shape), delta, layout)


# --- fast composition --------------------------------------------------------------------------------------------


def _grouped(
    x: Tensor,
    offs: Tensor | None,
    index: Tensor | None,
    base: list[Tensor],
    delta: list[Tensor],
    layout: Layout,
    transposed: bool,
) -> Tensor:
    stack = Stack(base, delta, layout)
    out = x.new_zeros((*x.shape[:-1], layout.each_shape[1 if transposed else 0]))
    for number, rows in _groups(x, offs, index, layout.stack):
        out[rows] = product(x[rows], None, *stack.matrix(number, layout.region), transposed)
    return out


@grouped_linear.register_kernel(DEVICES)
def _(x: Tensor, offs: Tensor | None, index: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return _grouped(x, offs, index, base, delta, Layout.parse(layout), transposed=False)


@grouped_linear_t.register_kernel(DEVICES)
def _(x: Tensor, offs: Tensor | None, index: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return _grouped(x, offs, index, base, delta, Layout.parse(layout), transposed=True)


@grouped_linear_grads.register_kernel(DEVICES)
def _(dy: Tensor, x: Tensor, offs: Tensor | None, index: Tensor | None, delta: list[Tensor], layout: str) -> list[Tensor]:
    parsed = Layout.parse(layout)
    pieces = []
    for number, rows in _groups(x, offs, index, parsed.stack):
        left, right = (side[rows].reshape(-1, side.shape[-1]) for side in (dy, x))
        pieces.append(whole_piece(number, left, right, parsed.region, parsed))
    return grads_of_pieces(pieces, delta, parsed)


# --- fakes -------------------------------------------------------------------------------------------------------


@grouped_linear.register_fake
def _(x: Tensor, offs: Tensor | None, index: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], Layout.parse(layout).each_shape[0])


@grouped_linear_t.register_fake
def _(x: Tensor, offs: Tensor | None, index: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], Layout.parse(layout).each_shape[1])


@grouped_linear_grads.register_fake
def _(dy: Tensor, x: Tensor, offs: Tensor | None, index: Tensor | None, delta: list[Tensor], layout: str) -> list[Tensor]:
    return [grad for item, tensors in Layout.parse(layout).split(delta) for grad in item.grad_shapes(tensors)]


# --- autograd ----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offs, index, base, delta, ctx.layout = inputs
    ctx.base_count = len(base)
    ctx.save_for_backward(x, offs, index, *base, *delta)


def _backward(transposed: bool) -> Any:
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, offs, index, *rest = ctx.saved_tensors
        base, delta = rest[: ctx.base_count], rest[ctx.base_count :]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (grouped_linear if transposed else grouped_linear_t)(dy, offs, index, base, delta, ctx.layout)
        # For out = x W the weight gradient is xᵀ dy: the factors change places.
        factors = (x, dy) if transposed else (dy, x)
        grads = grouped_linear_grads(*factors, offs, index, delta, ctx.layout)
        return dx, None, None, [None] * len(base), scatter_grads(grads, ctx.layout, len(delta)), None

    return backward


grouped_linear.register_autograd(_backward(False), setup_context=_save)
grouped_linear_t.register_autograd(_backward(True), setup_context=_save)
