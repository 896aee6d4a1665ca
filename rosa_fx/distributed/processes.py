"""The processes that train together, and the few things that they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from rosa_fx.errors import RosaError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Processes:
    """`size` processes, of which this one is number `rank`. Every method but `alone` is a collective call: all must make it.

    Two groups of their own keep what is sent here apart from what a wrapper (DDP, FSDP) sends at the same time: `data` for
    tensors on the training device, `control` (gloo) for a few numbers on the host, for which no device is waited for.
    """

    rank: int = 0
    size: int = 1
    data: Any = None
    control: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is one process only: then nothing is sent."""
        return self.size == 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if not self.alone:
            dist.all_reduce(tensor, group=self.data)
        return tensor

    def start_sum(self, tensor: Tensor, owner: int) -> Any:
        """Begin to sum `tensor` over all processes, into that of process `owner`; elsewhere it holds nothing of use after.

        Returns what can be asked (`is_completed`) and waited for.
        """
        return dist.reduce(tensor, group_dst=owner, group=self.data, async_op=True)

    def broadcast_(self, tensor: Tensor, owner: int = 0) -> Tensor:
        """The tensor of process `owner`, in place."""
        if not self.alone:
            dist.broadcast(tensor, group_src=owner, group=self.data)
        return tensor

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        return list(numbers) if self.alone else self._reduced(numbers, torch.float64, dist.ReduceOp.SUM)

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number that any process has."""
        return list(numbers) if self.alone else self._reduced(numbers, torch.int64, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """The (small) values of all processes, in order of their rank."""
        if self.alone:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action()` gives on rank 0, told to all. A RosaError that it raises there is raised in all."""
        if self.alone:
            return action()
        told: tuple[str, Any] = ("", None)
        if self.rank == 0:
            try:
                told = "value", action()
            except RosaError as error:
                told = "error", str(error)
        kind, value = self.gather(told)[0]
        if kind == "error":
            raise RosaError(value)
        found: T = value
        return found

    def _reduced(self, numbers: Sequence[float], dtype: torch.dtype, operation: Any) -> list[Any]:
        tensor = torch.tensor(numbers, dtype=dtype, device="cpu")
        dist.all_reduce(tensor, op=operation, group=self.control)
        found: list[Any] = tensor.tolist()
        return found


ALONE = Processes()
_known: WeakKeyDictionary[Any, Processes] = WeakKeyDictionary()


def processes_of(group: Any = None) -> Processes:
    """The processes of `group`, by default all that `torch.distributed` knows; `ALONE` if it was not initialised.

    Asked for the first time it is a collective call of the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    group = dist.group.WORLD if group is None else group
    size = dist.get_world_size(group)
    if size == 1:
        return ALONE
    if group not in _known:
        ranks = dist.get_process_group_ranks(group)
        # Processes outside the group take no part.
        data = dist.new_group(ranks, use_local_synchronization=True)
        control = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        _known[group] = Processes(dist.get_rank(group), size, data, control)
    return _known[group]
