"""Mask collection as two terms that add nothing to the weight and whose "gradients" are what was collected.

RoSA picks, per layer, the top nnz entries of the dense weight gradient (or of its square) by size (paper section 4.2,
algorithm 1). A collecting term owns one hidden leaf tensor, `probe`, and answers for its gradient. Nothing is mutated
inside a graph, so eager mode, compiled graphs and checkpointing need no special case, and a compiled training step
carries the result out of the backward pass like any other gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rosa_fx.kernels.cpu.gradient import weight_gradient
from rosa_fx.kernels.cpu.sparse import row_ids, select_topk
from rosa_fx.kernels.gradients import Given, Gradient, Products
from rosa_fx.kernels.terms.base import Shape, Term


@torch.library.custom_op("rosa_fx::select_mask", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def select_mask(score: Tensor, nnz: int) -> Tensor:
    """The gradient of a `CollectTopK` probe, float32 [1 + 2·nnz], from scores [N, K] that are not negative."""
    return CollectTopK.encode(score, nnz)


@select_mask.register_fake
def _(score: Tensor, nnz: int) -> Tensor:
    return score.new_empty(1 + 2 * nnz)


class Receiver(Protocol):
    """Takes the gradients of one weight, or parts of them, each when it is there. They last as long as the call."""

    def take(self, gradient: Gradient) -> None: ...


receivers: WeakValueDictionary[int, Receiver] = WeakValueDictionary()
"""By the number that a `CollectReceived` term holds."""


def hand_over(gradient: Gradient, probe: Tensor, number: Tensor) -> Tensor:
    """Give a gradient to the receiver of that number; returns what counts the call. The host waits for no device."""
    receivers[int(number)].take(gradient)
    return torch.ones_like(probe)


@torch.library.custom_op("rosa_fx::give_product", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def give_product(dy: Tensor, x: Tensor, probe: Tensor, number: Tensor, shape: list[int], region: list[int]) -> Tensor:
    """The gradient of a `CollectReceived` probe, float32 [1]: dyᵀ x in a region of a weight goes to the receiver.

    dy [M, rows], x [M, columns]; shape: (N, K); region: row start and stop, column start and stop. What the receiver adds it to
    is no value of the graph, so the operator is called by the host in every step, and no CUDA graph can hold it.
    """
    row, row_stop, column, column_stop = region
    parts = [((row, row_stop, column, column_stop), dy, x)]
    return hand_over(Products((shape[0], shape[1]), parts), probe, number)


@give_product.register_fake
def _(dy: Tensor, x: Tensor, probe: Tensor, number: Tensor, shape: list[int], region: list[int]) -> Tensor:
    return torch.empty_like(probe)


@dataclass(frozen=True)
class CollectGradient(Term):
    """The gradient of `probe` [N, K] float32 is the dense weight gradient (several gradients to average)."""

    kind: ClassVar[str] = "collect_gradient"
    tensor_names: ClassVar[tuple[str, ...]] = ("probe",)
    trainable: ClassVar[tuple[str, ...]] = ("probe",)
    folds: ClassVar[bool] = True
    contributes: ClassVar[bool] = False

    def dense(self, tensors: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> None:
        return None

    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [weight_gradient(dy, x)]

    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [dW.to(torch.float32, copy=True, memory_format=torch.contiguous_format)]


@dataclass(frozen=True)
class CollectTopK(Term):
    """The gradient of `probe` [1 + 2·nnz] float32 is the mask itself: (1, rows, columns) of the top nnz entries.

    The dense gradient lives only inside the kernel, one layer at a time. Rows and columns below 2²⁴ are exact in
    float32. The leading 1 counts the calls that autograd summed up: anything but 1 means that the rest is no mask.
    Columns of -1 mean that the gradient held a NaN or an infinity.
    """

    kind: ClassVar[str] = "collect_topk"
    tensor_names: ClassVar[tuple[str, ...]] = ("probe",)
    trainable: ClassVar[tuple[str, ...]] = ("probe",)
    folds: ClassVar[bool] = True
    contributes: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def dense(self, tensors: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> None:
        return None

    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.encode(weight_gradient(dy, x, absolute=True), (tensors[0].numel() - 1) // 2)]

    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        score = dW.abs() if dW.dtype == torch.float32 else dW.float().abs_()
        return [self.encode(score, (tensors[0].numel() - 1) // 2)]

    @staticmethod
    def encode(score: Tensor, nnz: int) -> Tensor:
        row_offsets, cols = select_topk(score, nnz)
        out = score.new_empty(1 + 2 * nnz)
        out[0] = 1
        out[1 : nnz + 1] = row_ids(row_offsets, nnz)
        out[nnz + 1 :] = cols
        return out

    @staticmethod
    def decode(grad: Tensor) -> tuple[int, Tensor, Tensor]:
        """(number of calls, rows int64 [nnz], columns int64 [nnz]) from a gradient of `probe`."""
        nnz = (grad.numel() - 1) // 2
        return int(grad[0].item()), grad[1 : nnz + 1].long(), grad[nnz + 1 :].long()


@dataclass(frozen=True)
class CollectReceived(Term):
    """The weight gradient goes to the receiver whose number `number` [1] holds, one layer at a time, as the factors that it is
    the product of; the gradient of `probe` [1] counts the calls.

    For masks from several backward calls or processes. What is squared or sent is the whole gradient of a weight, so its uses
    are joined as for `CollectTopK`. The number, int64, lies on the CPU whatever the weight's device: to read it costs no wait.
    As a tensor it tells equal layers apart that share one compiled graph, which a number in the term would not let them do.
    """

    kind: ClassVar[str] = "collect_received"
    tensor_names: ClassVar[tuple[str, ...]] = ("probe", "number")
    trainable: ClassVar[tuple[str, ...]] = ("probe",)
    folds: ClassVar[bool] = True
    contributes: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def dense(self, tensors: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> None:
        return None

    def grads(self, dy: Tensor, x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        shape = (dy.shape[1], x.shape[1])
        return [hand_over(Products(shape, [((0, shape[0], 0, shape[1]), dy, x)]), *tensors)]

    def grads_from_dense(self, dW: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [hand_over(Given(dW), *tensors)]

    def grads_of_stack(
        self, pieces: Sequence[tuple[int, Tensor, Tensor]], tensors: Sequence[Tensor], shape: Shape, stack: int
    ) -> list[Tensor]:
        rows = shape[0] // stack
        if len({index for index, _, _ in pieces}) < len(pieces):  # summands of one matrix are added before they are squared
            return super().grads_of_stack(pieces, tensors, shape, stack)
        parts = [((index * rows, (index + 1) * rows, 0, shape[1]), dy, x) for index, dy, x in pieces]
        return [hand_over(Products(shape, parts), *tensors)]
