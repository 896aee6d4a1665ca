"""The micro-batches of one optimizer step, and which process computes which."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from rosa_fx.distributed.processes import Processes
from rosa_fx.errors import RosaError
from rosa_fx.training.batches import END, BatchSource
from rosa_fx.training.engine import MicroBatch


class Drawn(NamedTuple):
    """`group`: this process's micro-batches; it is empty at the end of an epoch, in all processes alike. `targets`, `tokens`:
    of the whole step. `passed_over`: whether a micro-batch without targets came by."""

    group: list[MicroBatch]
    targets: float
    tokens: int
    passed_over: bool


class StepBatches:
    """Draws `accumulation` micro-batches for each of the processes, in the order in which one process would draw them all.

    The first goes to rank 0, the next to rank 1, and so on. Of a sequence each process makes its own only; of anything else
    it draws all and leaves the others'. A DataLoader with a DistributedSampler gives each process its share already. Where
    the last ones do not suffice for all, a process computes one of them again without weight: every process makes the
    same number of backward calls.
    """

    def __init__(
        self, source: BatchSource, describe: Callable[[Any], MicroBatch], processes: Processes, accumulation: int
    ) -> None:
        self._source, self._describe, self._processes, self._each = source, describe, processes, accumulation
        self._last: MicroBatch | None = None

    def draw(self) -> Drawn:
        """The next step's; its last ones of an epoch may be fewer. A collective call."""
        if self._processes.alone:
            group, passed = self._take(self._each)
            return Drawn(group, sum(micro.weight for micro in group), sum(micro.tokens or 0 for micro in group), passed)
        if self._source.split:
            return self._from_own_share()
        return self._from_sequence() if self._source.is_sequence else self._from_stream()

    def _take(self, wanted: int) -> tuple[list[MicroBatch], bool]:
        group: list[MicroBatch] = []
        passed = False
        while len(group) < wanted and (batch := self._source.take()) is not END:
            micro = self._describe(batch)
            if micro.weight:
                group.append(micro)
            else:
                passed = True  # its mean loss would be 0/0; leaving it out is what one large batch does
        return group, passed

    def _from_stream(self) -> Drawn:
        everyone, passed = self._take(self._each * self._processes.size)
        mine = everyone[self._processes.rank :: self._processes.size]
        return self._finished(mine, everyone[-1:], [(m.weight, m.tokens or 0) for m in everyone], passed)

    def _from_sequence(self) -> Drawn:
        source, processes = self._source, self._processes
        found: list[tuple[int, float, int]] = []  # index, weight, tokens
        made: dict[int, MicroBatch] = {}
        passed = False
        while missing := min(self._each * processes.size - len(found), (source.length or 0) - source.index):
            start = source.index
            known = [(0.0, 0.0)] * missing
            for place in range(missing):
                if (len(found) + place) % processes.size == processes.rank:
                    micro = made[start + place] = self._describe(source.fetch(start + place))
                    known[place] = (micro.weight, float(micro.tokens or 0))
            numbers = processes.totals([number for pair in known for number in pair])
            for place, (weight, tokens) in enumerate(zip(numbers[::2], numbers[1::2], strict=True)):
                if weight:
                    found.append((start + place, weight, int(tokens)))
                else:
                    passed = True
            source.index += missing

        def micro_batch(index: int) -> MicroBatch:
            return made[index] if index in made else self._describe(source.fetch(index))

        mine = [micro_batch(index) for index, _, _ in found[processes.rank :: processes.size]]
        short = len(mine) < math.ceil(len(found) / processes.size)
        spare = [micro_batch(found[-1][0])] if short else []
        return self._finished(mine, spare, [(weight, tokens) for _, weight, tokens in found], passed)

    def _from_own_share(self) -> Drawn:
        mine, passed = self._take(self._each)
        self._last = mine[-1] if mine else self._last
        targets, tokens = self._processes.totals([sum(m.weight for m in mine), sum(m.tokens or 0 for m in mine)])
        (most,) = self._processes.largest([len(mine)])
        if len(mine) < most and self._last is None:
            raise RosaError("this process's share of the batches is empty: use fewer processes, or a sampler that fills up")
        spare = [] if self._last is None else [self._last] * (most - len(mine))
        return self._marked(mine, spare, targets, int(tokens), passed)

    def _finished(
        self, mine: list[MicroBatch], spare: list[MicroBatch], all_of_them: list[tuple[float, int]], passed: bool
    ) -> Drawn:
        most = math.ceil(len(all_of_them) / self._processes.size)
        targets, tokens = sum(weight for weight, _ in all_of_them), sum(tokens for _, tokens in all_of_them)
        return self._marked(mine, spare[: most - len(mine)], targets, tokens, passed)

    @staticmethod
    def _marked(mine: list[MicroBatch], spare: list[MicroBatch], targets: float, tokens: int, passed: bool) -> Drawn:
        group = [micro._replace(of=targets) for micro in mine]
        group += [micro._replace(weight=0.0, tokens=0, of=targets) for micro in spare]
        return Drawn(group, targets, tokens, passed)
