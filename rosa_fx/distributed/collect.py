"""Masks that several processes make together, from the gradients of all of them.

Each backward call of each process counts as one gradient: it is squared (or not) by itself, and all are summed. So the masks
are those of one process that has the same micro-batches one after the other. The sum of each weight goes to one process, which
chooses the mask and sends it to the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from rosa_fx.collector import Collector
from rosa_fx.distributed.in_order import InOrder
from rosa_fx.distributed.processes import Processes
from rosa_fx.errors import NonFiniteError, RosaError
from rosa_fx.kernels.cpu.sparse import select_topk
from rosa_fx.kernels.gradients import Gradient
from rosa_fx.mask import Mask
from rosa_fx.weight import RosaWeight


class SharedCollector(Collector):
    """A `Collector` whose gradients are one process's share. With `single` they are sent while the backward pass goes on."""

    def __init__(self, name: str, weight: RosaWeight, mode: str, single: bool, limit: int | None, order: InOrder) -> None:
        super().__init__(name, weight, mode, single, limit)
        self.bad: Tensor | None = None
        self._order = order

    @torch.no_grad()
    def add_gradient(self, probe: Tensor) -> None:
        """Hook: the dense gradient of this backward call."""
        gradient, probe.grad = probe.grad, None
        assert gradient is not None
        self.count += 1
        if self.single:
            self._send(gradient)
        else:
            self._add_own(gradient)

    @torch.no_grad()
    def add_mask(self, probe: Tensor) -> None:
        """Hook: how often a compiled graph called `take` in this backward call."""
        probe.grad = None
        self.count += 1
        self.overlapping |= self._parts != 1  # the probe's gradient says the same, and would have to be waited for
        self._parts = 0

    @torch.no_grad()
    def take(self, gradient: Gradient) -> None:
        """A gradient [N, K] of one backward call, from a compiled graph."""
        if self.single:
            self._parts += 1
            # Dense, for it is this process's share of a sum over all: nothing here could take it tile by tile.
            self._send(gradient.dense())
        else:
            super().take(gradient)

    def _send(self, gradient: Tensor) -> None:
        score = gradient.square_() if self.mode == "mean_squared" else gradient
        if self.bad is None:  # else this is a second one, which is refused at the end
            self.bad = _has_bad(score)
            self._order.put(self.name, score)

    def part(self) -> Tensor:
        """This process's share of the sum, which is given away; zeros if it has none."""
        total, self.total = self.total, None
        if total is None:
            return torch.zeros(self.weight.matrix, device=self.weight.base.tensors()[0].device)
        self.bad = _has_bad(total)
        return total


def _has_bad(values: Tensor) -> Tensor:
    """Whether any is not finite: bool [], on their device, which is not waited for."""
    if not values.numel():  # has no largest
        return values.new_zeros((), dtype=torch.bool)
    return ~torch.linalg.vector_norm(values, float("inf")).isfinite()


class SharedCollection:
    """The collectors of one mask generation. `finish` is a collective call; it may be made again and gives the same."""

    def __init__(self, processes: Processes, names: Iterable[str]) -> None:
        self.processes = processes
        # The backward pass reaches the last weight first.
        self.order = InOrder(processes, list(names)[::-1], self._choose)
        self._collectors: dict[str, SharedCollector] = {}
        self._chosen: dict[str, tuple[Tensor, Tensor]] = {}
        self._masks: dict[str, Mask] | None = None

    def collector(self, name: str, weight: RosaWeight, mode: str, single: bool, limit: int | None) -> SharedCollector:
        """The collector of one of the names."""
        made = SharedCollector(name, weight, mode, single, limit, self.order)
        self._collectors[name] = made
        return made

    @torch.no_grad()
    def finish(self) -> dict[str, Mask]:
        """The masks, the same in all processes.

        Raises RosaError in all of them, naming weight and rank, if gradients are not finite or arrived in parts.
        """
        if self._masks is None:
            self._refuse_parts()
            counts = self.processes.totals([collector.count for collector in self._collectors.values()])
            for name, count in zip(self._collectors, counts, strict=True):
                if not count:
                    warnings.warn(
                        f"{name} received no gradient while masks were collected: its mask is arbitrary", stacklevel=5
                    )
            self.order.finish(lambda name: self._collectors[name].part())
            self._masks = {name: self._shared_mask(collector) for name, collector in self._collectors.items()}
        self._refuse_not_finite(self._masks)
        return self._masks

    def check_finite(self) -> None:
        """After a collecting step that is not the last: as `finish`, but for what was summed up so far, which stays."""
        sizes = {name: size for name, c in self._collectors.items() if (size := c.largest()) is not None}
        bad = [name for name, size in sizes.items() if not bool(size.isfinite())]
        self._raise_first(self.processes.gather(bad))

    def _choose(self, name: str, score: Tensor) -> None:
        self._chosen[name] = select_topk(score.abs_(), self._collectors[name].nnz)

    def _shared_mask(self, collector: SharedCollector) -> Mask:
        owner, device = self.order.owner(collector.name), collector.weight.base.tensors()[0].device
        if owner == self.processes.rank:
            row_offsets, cols = self._chosen.pop(collector.name)
        else:
            row_offsets = torch.empty(collector.weight.matrix[0] + 1, dtype=torch.int32, device=device)
            cols = torch.empty(collector.nnz, dtype=torch.int32, device=device)
        return Mask(
            self.processes.broadcast_(row_offsets, owner), self.processes.broadcast_(cols, owner), collector.weight.matrix
        )

    def _refuse_parts(self) -> None:
        errors = [error for c in self._collectors.values() if (error := c.unusable()) is not None]
        for rank, text in enumerate(self.processes.gather(str(errors[0]) if errors else None)):
            if text is not None:
                raise RosaError(f"rank {rank}: {text}")

    def _refuse_not_finite(self, masks: dict[str, Mask]) -> None:
        # What is chosen from a sum that is not finite says so, and it is the same everywhere.
        unusable = [name for name, mask in masks.items() if mask.nnz and int(mask.cols.min()) < 0]
        if unusable:
            bad = [name for name in unusable if (flag := self._collectors[name].bad) is not None and bool(flag)]
            self._raise_first(self.processes.gather(bad))
            raise NonFiniteError(f"the sum of the gradients of all processes is beyond float32 for {unusable[0]}")

    def _raise_first(self, bad: list[list[str]]) -> None:
        for rank, names in enumerate(bad):
            if names:
                raise NonFiniteError(f"rank {rank}: {self._collectors[names[0]].not_finite()}")
