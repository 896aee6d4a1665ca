"""What is collected for a weight's mask in one process: a mask straight from one gradient, or a sum over several."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor

from rosa_fx.errors import NonFiniteError, RosaError
from rosa_fx.kernels.cpu.sparse import select_topk
from rosa_fx.kernels.gradients import Given, Gradient
from rosa_fx.kernels.terms.collect import CollectTopK, receivers
from rosa_fx.mask import Mask
from rosa_fx.weight import RosaWeight

_numbers = itertools.count(1)


class Collector:
    """What one weight has collected: a mask straight from one gradient, or a float32 sum over several.

    `single` is set when one backward call is all there will be: the dense gradient is then dropped at once. `limit` is the
    number of backward calls that the caller declared, if any.

    A square is that of the whole gradient of a backward call, and several compiled graphs that read a weight each `take` a part
    of it. So the first backward call waits for its end, its gradient becoming the sum; where it came whole, later ones are
    added as they come, from their factors and tile by tile: of the size of the weight there is the sum alone. (Where gradients
    come in parts, that of each backward call is summed up beside it.)
    """

    def __init__(self, name: str, weight: RosaWeight, mode: str, single: bool, limit: int | None) -> None:
        assert weight.sparse is not None
        self.name, self.weight, self.mode, self.single, self.limit = name, weight, mode, single, limit
        self.nnz = weight.sparse.values.numel()
        self.count = 0
        self.total: Tensor | None = None
        self.mask: Mask | None = None
        self.overlapping = False
        self.number = next(_numbers)
        receivers[self.number] = self
        self._parts = 0  # of the gradient of this backward call so far
        self._sum_of_parts: Tensor | None = None
        self._comes_whole = mode == "mean"  # sums of parts are sums of wholes
        self._torn = False

    @torch.no_grad()
    def add_gradient(self, probe: Tensor) -> None:
        """Hook: the dense gradient of this backward call."""
        gradient, probe.grad = probe.grad, None
        assert gradient is not None
        self.count += 1
        if self.single:
            self.mask = self._select(gradient.abs_())
        else:
            self._add_own(gradient)

    @torch.no_grad()
    def add_mask(self, probe: Tensor) -> None:
        """Hook: the mask that a compiled graph selected in this backward call."""
        encoded, probe.grad = probe.grad, None
        assert encoded is not None
        self.count += 1
        calls, rows, cols = CollectTopK.decode(encoded)
        self.overlapping |= calls != 1
        if not self.overlapping:
            self._refuse_not_finite(cols)
            self.mask = Mask.from_indices(rows, cols, self.weight.matrix)

    @torch.no_grad()
    def take(self, gradient: Gradient) -> None:
        """A gradient [N, K], or a part of one, from a compiled graph in the midst of its backward pass."""
        self._parts += 1
        if self._comes_whole and self.total is not None:
            self._torn |= self._parts > 1 and self.mode == "mean_squared"
            gradient.add_to(self.total, squared=self.mode == "mean_squared")
        elif self._sum_of_parts is None:
            self._sum_of_parts = gradient.dense()
        else:
            gradient.add_to(self._sum_of_parts, squared=False)

    @torch.no_grad()
    def add_taken(self, probe: Tensor) -> None:
        """Hook: the backward call is over in which `take` was called."""
        probe.grad = None
        self.count += 1
        whole, self._sum_of_parts = self._sum_of_parts, None
        if whole is not None:
            self._add_own(whole)
            self._comes_whole |= self._parts == 1
        self._parts = 0

    def _add_own(self, gradient: Tensor) -> None:
        """A gradient that is nobody else's, to the sum: of squares, or of gradients."""
        if self.total is None:
            self.total = gradient.square_() if self.mode == "mean_squared" else gradient
        else:
            Given(gradient).add_to(self.total, squared=self.mode == "mean_squared")

    def finish(self) -> Mask:
        """The mask. Raises RosaError, naming the weight, for gradients that are not finite or cannot be told apart."""
        error = self.unusable()
        if error is not None:
            raise error
        if self.mask is not None:
            return self.mask
        if self.total is None:
            warnings.warn(f"{self.name} received no gradient while masks were collected: its mask is arbitrary", stacklevel=4)
            device = self.weight.base.tensors()[0].device
            return self._select(torch.zeros(self.weight.matrix, device=device))
        return self._select(self.total.abs_())

    def unusable(self) -> RosaError | None:
        """The error that says that gradients did not arrive as was declared."""
        if self._torn:
            return RosaError(
                f"{self.name}: a backward call brought its gradient in several parts, where earlier ones brought it whole, and "
                "was squared part by part. Call the model itself, not the compiled one, in the collecting steps"
            )
        expected = 1 if self.single else self.limit
        if self.overlapping and self.count == 1:
            return RosaError(
                f"{self.name}: it is read several times, and the compiled code chose a mask for each of them: a torch.compile "
                "backend other than 'inductor' does not run the pass that joins them, and a graph break may part them. Call "
                "the model itself in the collecting step, or give MaskSchedule micro_batches=2, which sums dense gradients"
            )
        if expected is not None and self.count > expected:
            return RosaError(
                f"{self.name}: its gradient arrived in {self.count} parts while {expected} backward call(s) were "
                "expected; give MaskSchedule the number of backward calls per optimizer step (micro_batches=...)"
            )
        return None

    def _select(self, score: Tensor) -> Mask:
        row_offsets, cols = select_topk(score, self.nnz)
        self._refuse_not_finite(cols)
        return Mask(row_offsets, cols, self.weight.matrix)

    def largest(self) -> Tensor | None:
        """The largest size in the sum so far, a scalar: NaN or infinite if anything in it is. None without a sum."""
        return None if self.total is None or not self.total.numel() else torch.linalg.vector_norm(self.total, float("inf"))

    def not_finite(self) -> NonFiniteError:
        """The error that says that this weight's gradient cannot be used."""
        squares = " or a square beyond float32" if self.mode == "mean_squared" and not self.single else ""
        return NonFiniteError(
            f"{self.name}: its gradient holds NaN or infinity{squares}, so no mask can be chosen from it; check the batch and "
            "the loss of this step, or lower the learning rate of the warm-up"
        )

    def _refuse_not_finite(self, cols: Tensor) -> None:
        if self.nnz and int(cols.min()) < 0:
            raise self.not_finite()
