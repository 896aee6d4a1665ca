"""The operators' CPU kernels as functions, which compiled graphs call past the dispatcher.

The dispatcher, and what `torch.library` puts around a kernel in Python, take some 15 us a call, and twice that between
products, whose weights leave nothing of the interpreter in the caches. Where an operator is more than its kernel, since
gradients are recorded or a profiler wants to see it, it is the operator that is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rosa_fx.kernels import backward_ops, ops, thin_ops

KERNELS: dict[str, Callable[..., Any]] = {
    "linear": ops.linear_kernel,
    "linear_t": ops.linear_t_kernel,
    "linear_grads": ops.linear_grads_kernel,
    "product_with_left": backward_ops.product_with_left_kernel,
    "product_with_grads": backward_ops.product_with_grads_kernel,
    "thin_product": thin_ops.thin_product_kernel,
    "thin_gradient": thin_ops.thin_gradient_kernel,
}
"""By the name of the operator."""


def _function(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    op = getattr(torch.ops.rosa_fx, name).default

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() or torch.autograd._profiler_enabled():
            return op(*args)
        return kernel(*args)

    call.__name__ = call.__qualname__ = name
    return call


linear, linear_t, linear_grads, product_with_left, product_with_grads, thin_product, thin_gradient = (
    _function(name, kernel) for name, kernel in KERNELS.items()
)


def register() -> None:
    """Let Inductor write calls of these functions into the code it generates for the CPU. Doing so twice is harmless."""
    from rosa_fx.kernels.inductor import call_functions

    call_functions(__name__, [getattr(torch.ops.rosa_fx, name).default for name in KERNELS])
