"""Sums of large tensors over all processes in one fixed order, whatever the order in which each process has them ready.

Gradients arrive during the backward pass, in an order that autograd and the compiler choose, and a process may lack some (an
expert that none of its rows chose). Collective calls must come in the same order everywhere, so:

- a tensor waits until those before it in the order have been sent; what a process lacks it sends as zeros at the end;
- nothing that could need another process blocks the backward pass for good: sums run beside it. Only when several are under
  way is the oldest waited for, so that memory holds a few tensors, and only for a while: another process may be unable to
  send its part before this one goes on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rosa_fx.distributed.processes import Processes

UNDER_WAY = 2
"""Sums that may be under way without being waited for."""
PATIENCE = 2.0
"""Seconds after which a sum is not waited for any more during a backward pass."""


class InOrder:
    """Sums the tensors called `names`, in that order. The sum of each goes to one process, its owner, in turns.

    There `take(name, sum)` is called once, with the right to change the sum. `held`: the largest number of tensors that were
    here at the same time.
    """

    def __init__(self, processes: Processes, names: Sequence[str], take: Callable[[str, Tensor], None]) -> None:
        self._processes, self._names, self._take = processes, list(names), take
        self._sent = 0
        self._waiting: dict[str, Tensor] = {}
        self._under_way: deque[tuple[str, Tensor, Any]] = deque()
        self._patient = True
        self.held = 0

    def owner(self, name: str) -> int:
        """The rank that gets the sum of `name`."""
        return self._names.index(name) % self._processes.size

    def put(self, name: str, tensor: Tensor) -> None:
        """Hand over this process's part of `name`; it belongs to the sum from here on."""
        self._waiting[name] = tensor
        self.held = max(self.held, len(self._waiting) + len(self._under_way))
        while self._sent < len(self._names) and self._names[self._sent] in self._waiting:
            following = self._names[self._sent]
            part = self._waiting.pop(following)
            self._under_way.append((following, part, self._processes.start_sum(part, self._sent % self._processes.size)))
            self._sent += 1
        while self._under_way and self._is_done(self._under_way[0][2]):
            self._receive()

    def finish(self, missing: Callable[[str], Tensor]) -> None:
        """Send what was not put as `missing(name)` gives it, and wait for all sums."""
        while self._sent < len(self._names):
            following = self._names[self._sent]
            self.put(following, missing(following))
        while self._under_way:
            self._receive()

    def _is_done(self, work: Any) -> bool:
        if len(self._under_way) > UNDER_WAY and self._patient:
            until = time.monotonic() + PATIENCE
            while not work.is_completed() and time.monotonic() < until:
                time.sleep(1e-4)
            self._patient = work.is_completed()
        return bool(work.is_completed())

    def _receive(self) -> None:
        name, tensor, work = self._under_way.popleft()
        work.wait()
        if self.owner(name) == self._processes.rank:
            self._take(name, tensor)
