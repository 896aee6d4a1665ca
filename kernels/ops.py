"""The fused operators as `torch.library` operators: schema, fake, autograd, and a fast implementation for CPU and CUDA.

`definition.py` says what each computes, `composition.py` holds the fast products.

Nothing here is differentiable twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rosa_fx.kernels import definition
from rosa_fx.kernels.composition import product
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.stack import grads_of_pieces, pieces_of_region, whole_piece

DEVICES = ("cpu", "cuda")

_on_capture: list[Callable[[], None]] = []


def on_capture(callback: Callable[[], None]) -> None:
    """Call `callback` whenever a rewritten weight is met while a graph is captured."""
    if callback not in _on_capture:
        _on_capture.append(callback)


def _own(out: Tensor) -> Tensor:
    """The same values as a tensor that autograd does not take for a view: it forbids changing a view in place (`y += b`)."""
    owned: Tensor = torch.ops.aten._unsafe_view.default(out, out.shape) if out._is_view() else out
    return owned


@torch.library.custom_op("rosa_fx::materialize", mutates_args=())
def materialize(base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return definition.materialize(base, delta, Layout.parse(layout))


@torch.library.custom_op("rosa_fx::linear", mutates_args=())
def linear(x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return _own(definition.linear(x, bias, base, delta, Layout.parse(layout)))


@torch.library.custom_op("rosa_fx::linear_t", mutates_args=())
def linear_t(x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return _own(definition.linear_t(x, bias, base, delta, Layout.parse(layout)))


@torch.library.custom_op("rosa_fx::linear_grads", mutates_args=())
def linear_grads(dy: Tensor, x: Tensor, delta: list[Tensor], layout: str) -> list[Tensor]:
    return definition.linear_grads(dy, x, delta, Layout.parse(layout))


@torch.library.custom_op("rosa_fx::materialize_backward", mutates_args=())
def materialize_backward(dW: Tensor, delta: list[Tensor], layout: str) -> list[Tensor]:
    return definition.materialize_backward(dW, delta, Layout.parse(layout))


# --- fast composition --------------------------------------------------------------------------------------------


@materialize.register_kernel(DEVICES)
def _(base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    parsed = Layout.parse(layout)
    terms = [(item, tensors) for item, tensors in parsed.split(delta) if item.contributes]
    # More than one rounding would make eager mode worse than a plain low-precision weight.
    dtype = parsed.dtype if len(terms) < 2 else definition.accumulate_dtype(parsed.dtype)
    weight = parsed.base.dequantize(base, parsed.shape, dtype)
    for item, tensors in terms:
        item.fold_(weight, tensors)
    return weight.to(parsed.dtype)


@linear.register_kernel(DEVICES)
def linear_kernel(x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return _own(product(x, bias, base, delta, Layout.parse(layout), transposed=False))


@linear_t.register_kernel(DEVICES)
def linear_t_kernel(x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return _own(product(x, bias, base, delta, Layout.parse(layout), transposed=True))


@linear_grads.register_kernel(DEVICES)
def linear_grads_kernel(dy: Tensor, x: Tensor, delta: list[Tensor], layout: str) -> list[Tensor]:
    parsed = Layout.parse(layout)
    dy, x = definition.flat(dy), definition.flat(x)
    if parsed.stack > 1:
        numbers, regions = zip(*pieces_of_region(parsed))
        parts = dy.split([row_stop - row for row, row_stop, _, _ in regions], -1)
        pieces = [whole_piece(number, part, x, region, parsed) for number, part, region in zip(numbers, parts, regions)]
        return grads_of_pieces(pieces, delta, parsed)
    dy, x = definition.whole_factors(dy, x, parsed)
    return [grad for item, tensors in parsed.split(delta) for grad in item.grads(dy, x, tensors)]


# --- fakes -------------------------------------------------------------------------------------------------------


@materialize.register_fake
def _(base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    # Capture is the one moment that every compilation passes through, under whatever configuration holds for it.
    for callback in _on_capture:
        callback()
    parsed = Layout.parse(layout)
    return base[0].new_empty(parsed.shape, dtype=parsed.dtype)


@linear.register_fake
def _(x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], Layout.parse(layout).out_shape[0])


@linear_t.register_fake
def _(x: Tensor, bias: Tensor | None, base: list[Tensor], delta: list[Tensor], layout: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], Layout.parse(layout).out_shape[1])


def _empty_grads(delta: list[Tensor], layout: str) -> list[Tensor]:
    return [grad for item, tensors in Layout.parse(layout).split(delta) for grad in item.grad_shapes(tensors)]


@linear_grads.register_fake
def _(dy: Tensor, x: Tensor, delta: list[Tensor], layout: str) -> list[Tensor]:
    return _empty_grads(delta, layout)


@materialize_backward.register_fake
def _(dW: Tensor, delta: list[Tensor], layout: str) -> list[Tensor]:
    return _empty_grads(delta, layout)


# --- autograd ----------------------------------------------------------------------------------------------------


def scatter_grads(grads: list[Tensor], layout: str, count: int) -> list[Tensor | None]:
    """Gradients laid out like `delta`: None for what is not trainable."""
    out: list[Tensor | None] = [None] * count
    for position, grad in zip(Layout.parse(layout).trainable, grads, strict=True):
        out[position] = grad
    return out


def _save_materialize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, delta, ctx.layout = inputs
    ctx.base_count, ctx.delta_count = len(base), len(delta)
    ctx.save_for_backward(*delta)


def _materialize_backward(ctx: Any, dW: Tensor) -> tuple[Any, ...]:
    grads = materialize_backward(dW, list(ctx.saved_tensors), ctx.layout)
    return [None] * ctx.base_count, scatter_grads(grads, ctx.layout, ctx.delta_count), None


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, base, delta, ctx.layout = inputs
    ctx.base_count = len(base)
    ctx.save_for_backward(x, bias, *base, *delta)


def _linear_backward(transposed: bool) -> Any:
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, bias, *rest = ctx.saved_tensors
        base, delta = rest[: ctx.base_count], rest[ctx.base_count :]
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = (linear if transposed else linear_t)(dy, None, base, delta, ctx.layout)
        if bias is not None and ctx.needs_input_grad[1]:
            dbias = dy.sum_to_size(bias.shape).to(bias.dtype)
        # For out = x W the weight gradient is xᵀ dy: the factors change places.
        factors = (x, dy) if transposed else (dy, x)
        layout, positions = Layout.parse(ctx.layout).only(ctx.needs_input_grad[3])
        ddelta: list[Tensor | None] = [None] * len(delta)
        if positions:
            wanted = [delta[position] for position in positions]
            found = scatter_grads(linear_grads(*factors, wanted, layout.key), layout.key, len(wanted))
            for position, grad in zip(positions, found, strict=True):
                ddelta[position] = grad
        return dx, dbias, [None] * len(base), ddelta, None

    return backward


materialize.register_autograd(_materialize_backward, setup_context=_save_materialize)
linear.register_autograd(_linear_backward(False), setup_context=_save_linear)
linear_t.register_autograd(_linear_backward(True), setup_context=_save_linear)
