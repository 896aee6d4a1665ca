"""The RoSA phases by optimizer step, and the masks that they end in (paper section 4.2 and its reference schedule)."""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rosa_fx.collector import Collector
from rosa_fx.distributed.collect import SharedCollection
from rosa_fx.distributed.gradients import Averaging
from rosa_fx.distributed.processes import processes_of
from rosa_fx.distributed.start import start_together
from rosa_fx.distributed.tensors import is_sharded, local, reshard
from rosa_fx.errors import RosaError
from rosa_fx.mask import Mask
from rosa_fx.state import state_of
from rosa_fx.weight import RosaWeight


def parse_schedule(schedule: str, has_low_rank: bool, has_sparse: bool) -> tuple[int | None, int | None]:
    """(first collecting step, or None if nothing is collected; number of warm-up steps, or None if endless)."""
    match = re.fullmatch(r"wl(\d+)", schedule)
    if schedule not in ("spa_only", "lora_only") and match is None:
        raise RosaError(f"schedule {schedule!r} is unknown: use wl{{n}} (such as wl64), spa_only or lora_only")
    if schedule == "lora_only" or not has_sparse:
        return None, None
    if schedule == "spa_only" or not has_low_rank:
        return 0, 0
    assert match is not None
    return int(match[1]), int(match[1])


_averaging: WeakKeyDictionary[RosaWeight, Averaging] = WeakKeyDictionary()  # one for each model, by its first weight


class MaskSchedule:
    """Drives the RoSA phases in a training loop.

    Call `begin_step()` before the first forward of an optimizer step and `end_step()` after `optimizer.step()`.
    `wl{n}`: low-rank only for n steps; then `num_grads` steps that also collect gradients; masks are made in the `end_step()`
    of the last of them, and from the next step low-rank and sparse train together. `spa_only` collects first and trains the
    sparse part alone; `lora_only` never collects. Where all masks are set already, nothing is collected; a weight whose mask
    is set keeps it in any case. If the first collecting step fails (a gradient that is not finite), it may be done again from
    `begin_step()`.

    Each backward call counts as one gradient (micro-batches square separately, as in the reference). With one backward
    call in all, at most one layer's dense gradient exists at a time; otherwise one float32 sum per rewritten weight is kept
    (4 bytes per base parameter), to which gradients are added as they come.

    In several processes (`torch.distributed` is initialised) make it in all of them, before or after DDP wraps the model.
    Each backward call of each process counts as one gradient, and all get the same masks, those that one process would make
    of the same micro-batches. With one backward call in each process a gradient is summed over them as it arrives.
    They begin with the adapters of rank 0. Sparse values train later than DDP expects: their gradients are averaged here.

    Args:
        model: transformed.
        schedule: the spec's if not given.
        num_grads: collecting optimizer steps; the spec's if not given.
        restart: the paper's second run. In the `end_step()` that makes the masks, both adapters return to their initial
            state and train together from the next step; make a fresh optimizer then (`restarted` says when).
        micro_batches: backward calls per optimizer step. If not given it is counted during warm-up steps; without any,
            several are assumed.
        can_skip: allow `skip_step`. With `num_grads` above 1 the sums are then kept twice during later collecting steps.
        process_group: the processes that train together, if not all.
        averages: gradients are averaged over processes, as DDP and FSDP do; those of sparse values are, where DDP leaves
            them out, by this object. False: the loss is scaled so that you sum all of them yourself.

    Raises:
        RosaError: unknown schedule, or one that does not fit the spec. While collecting, naming the weight: a gradient
            with NaN or infinity, from `backward()` or `end_step()`; more backward calls than declared, or a graph that the
            pass did not see whole, from `end_step()`. No mask is set then.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: str | None = None,
        num_grads: int | None = None,
        restart: bool = False,
        *,
        micro_batches: int | None = None,
        can_skip: bool = False,
        process_group: Any = None,
        averages: bool = True,
    ) -> None:
        state = state_of(model)
        self._model, self._weights = model, state.weights
        self.schedule = state.spec.schedule if schedule is None else schedule
        self.num_grads = state.spec.num_grads if num_grads is None else num_grads
        self.grad_mode = state.spec.grad_mode
        self.restart = restart
        self.micro_batches = micro_batches
        for field, number in (("num_grads", self.num_grads), ("micro_batches", micro_batches)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise RosaError(f"{field} must be a whole number of at least 1, got {number!r}")
        low_rank = any(w.low_rank is not None for w in self._weights.values())
        sparse = [w for w in self._weights.values() if w.sparse is not None]
        if self.schedule == "spa_only" and not sparse:
            raise RosaError("schedule 'spa_only' needs density > 0 in the spec")
        if self.schedule == "lora_only" and not low_rank:
            raise RosaError("schedule 'lora_only' needs rank > 0 in the spec")
        self._start, self._warmup = parse_schedule(self.schedule, low_rank, bool(sparse))
        self._only_sparse = self.schedule == "spa_only" or not low_rank
        self._had_masks = self._all_masked()
        self.step = 0
        self.restarted = False
        self._collectors: dict[str, Collector] = {}
        self._can_skip = can_skip
        self._before: dict[str, tuple[int, Tensor | None]] = {}
        self._counted = 0
        self._learned: int | None = None
        self._counter_handle: Any = None
        self._processes = processes_of(process_group)
        self._collection: SharedCollection | None = None
        self._averaging: Averaging | None = None
        if not self._processes.alone:
            start_together(self._weights, self._processes)
            self._average_values(averages)
        # What a process collects of a gradient, over what one process would that goes through the micro-batches alone.
        times = self._processes.size if averages else 1
        self._excess = float(times**2 if self.grad_mode == "mean_squared" else times)
        if self.schedule == "spa_only":
            for weight in self._weights.values():
                if weight.low_rank is not None:
                    weight.low_rank.requires_grad_(False)
        self._apply()

    @property
    def phase(self) -> str:
        """Of the current step (between `end_step` and `begin_step`: of the next): low_rank, collect, joint or sparse."""
        if self._start is None or self._warmup is None or self.step < self._warmup:
            return "low_rank"
        if not self._had_masks and self.step < self._start + self.num_grads:
            return "collect"
        return "sparse" if self._only_sparse else "joint"

    def drives(self, model: nn.Module) -> bool:
        """Whether this schedule was made for `model` (wrapped or not)."""
        return self._weights is state_of(model).weights

    def begin_step(self) -> None:
        """Before the first forward of an optimizer step."""
        if self._start is not None and self.step <= self._start:
            # Nothing is collected yet: masks set since then count, and a first collecting step that failed starts afresh.
            self._had_masks = self._all_masked()
            self._collectors = {}
        self._apply()
        if self._averaging is not None:
            self._averaging.begin()
        if self._can_skip:
            kept = {name: (c.count, None if c.total is None else c.total.clone()) for name, c in self._collectors.items()}
            self._before = kept if self.phase == "collect" else {}
        if self.phase == "low_rank":
            self._count_backwards()

    def end_step(self) -> None:
        """After `optimizer.step()`. Makes the masks at the end of the last collecting step."""
        self.restarted = False
        self._stop_counting()
        collecting = self.phase == "collect"
        # Before the step counts: if a gradient was not finite, nothing has changed yet.
        masks = self._make_masks() if collecting and self._last_collecting() else None
        if collecting and masks is None:
            self.check_collected()
        self.step += 1
        if masks is not None:
            for name, mask in masks.items():
                sparse = self._weights[name].sparse
                assert sparse is not None
                sparse.set_mask(mask)
            self._collectors = {}
            if self.restart:
                self._reset_adapters()
                self.restarted = True
        if masks is not None or not collecting:
            self._apply()

    def check_collected(self) -> None:
        """While collecting, after backward: raises NonFiniteError, naming the weight, if a sum holds NaN or infinity."""
        if self._collection is not None:
            if self.num_grads == 1 and self._calls() == 1:
                self._collection.finish()
            else:
                self._collection.check_finite()
            return
        sizes = [(collector, size) for collector in self._collectors.values() if (size := collector.largest()) is not None]
        if sizes:
            # One wait for the device, whatever the number of weights.
            finite = torch.stack([size.to(sizes[0][1].device) for _, size in sizes]).isfinite().tolist()
            for (collector, _), good in zip(sizes, finite, strict=True):
                if not good:
                    raise collector.not_finite()

    def skip_step(self) -> None:
        """In place of `end_step()` after a step whose gradients were thrown away because they were not finite.

        What a collecting step has collected is forgotten, also where `backward()` raised in its midst, and the next step
        collects in its stead; any other step counts as usual. Raises RosaError unless `can_skip` was set.
        """
        if not self._can_skip:
            raise RosaError("this MaskSchedule cannot undo a step: make it with can_skip=True")
        self.restarted = False
        self._stop_counting()
        if self.phase == "collect":
            self._collectors = {}
            self._apply()
            for name, (count, total) in self._before.items():
                self._collectors[name].count, self._collectors[name].total = count, total
        else:
            self._learned = None  # the backward calls of such a step may not all have been made
            self.step += 1
            self._apply()

    # --- phases --------------------------------------------------------------------------------------------------

    def _all_masked(self) -> bool:
        sparse = [w.sparse for w in self._weights.values() if w.sparse is not None]
        # A part without entries has nothing to collect for.
        return bool(sparse) and all(part.has_mask or not part.values.numel() for part in sparse)

    def _last_collecting(self) -> bool:
        assert self._start is not None
        return self.step == self._start + self.num_grads - 1

    def _apply(self) -> None:
        phase = {"sparse": "joint"}.get(self.phase, self.phase)
        changing = [weight for weight in self._weights.values() if weight.phase != phase]
        if changing and not self._processes.alone:
            reshard(self._model)
        for weight in changing:
            weight.set_phase(phase)
        if phase == "collect":
            wanting = [name for name, w in self._weights.items() if w.sparse is not None and not w.sparse.has_mask]
            self._arm([name for name in wanting if name not in self._collectors])
        else:
            self._collection = None

    def _calls(self) -> int | None:
        """Backward calls per optimizer step (in each process), if that is known."""
        return self.micro_batches or self._learned

    def _arm(self, names: list[str]) -> None:
        single = self.num_grads == 1 and self._calls() == 1
        limit = self.micro_batches and self.micro_batches * self.num_grads
        if names and not self._processes.alone:
            self._collection = SharedCollection(self._processes, names)
        for name in names:
            weight = self._weights[name]
            if self._collection is None:
                collector = Collector(name, weight, self.grad_mode, single, limit)
                number = None if single else collector.number
            else:
                collector = self._collection.collector(name, weight, self.grad_mode, single, limit)
                number = collector.number
            weight.start_probes(collector.add_gradient, collector.add_mask if single else collector.add_taken, number)
            self._collectors[name] = collector

    def _make_masks(self) -> dict[str, Mask]:
        if self._collection is not None:
            return self._collection.finish()
        return {name: collector.finish() for name, collector in self._collectors.items()}

    @torch.no_grad()
    def _reset_adapters(self) -> None:
        for weight in self._weights.values():
            if weight.low_rank is not None:
                weight.low_rank.reset()
            if weight.sparse is not None:
                local(weight.sparse.values).zero_()

    # --- how many backward calls make a step ---------------------------------------------------------------------

    def _count_backwards(self) -> None:
        if self.micro_batches is not None or self._start is None or self.step != self._start - 1:
            return
        self._stop_counting()
        counted = next(w.low_rank.B for w in self._weights.values() if w.low_rank is not None)
        self._counted = 0
        self._counter_handle = counted.register_post_accumulate_grad_hook(self._count)

    def _count(self, parameter: Tensor) -> None:
        self._counted += 1

    def _stop_counting(self) -> None:
        if self._counter_handle is not None:
            self._counter_handle.remove()
            self._counter_handle = None
            # A weight that took no part tells nothing, nor do processes that differ: assume several.
            most, least = self._processes.largest([self._counted, -self._counted])
            self._learned = self._counted if self._counted and most == -least else None

    # --- several processes ---------------------------------------------------------------------------------------

    def _average_values(self, wanted: bool) -> None:
        """Look after the sparse values' gradients, which DDP does not know. Those of FSDP are sharded, and it does."""
        anchors = [w.low_rank.B for w in self._weights.values() if w.low_rank is not None]
        values = [w.sparse.values for w in self._weights.values() if w.sparse is not None]
        values = [parameter for parameter in values if not is_sharded(parameter) and parameter.numel()]
        for key in list(self._weights.values())[:1]:
            if key in _averaging:
                _averaging.pop(key).stop()
            if wanted and values:
                _averaging[key] = self._averaging = Averaging(values, anchors, self._processes)

    # --- exact resume --------------------------------------------------------------------------------------------

    def state_dict(self, *, local: bool = False) -> dict[str, Any]:
        """Flat: JSON values, and live tensors under `total.<name>`, for an exact continuation. Take it between two steps.

        In several processes it is a collective call, and that of any of them continues in any number of processes. With
        `local` it is this process's share, see `shared_state`.
        """
        state: dict[str, Any] = {
            "step": self.step,
            "schedule": self.schedule,
            "num_grads": self.num_grads,
            "restart": self.restart,
            "restarted": self.restarted,
            "had_masks": self._had_masks,
            "learned": -1 if self._learned is None else self._learned,
        }
        for name, weight in self._weights.items():
            if self.restart and weight.low_rank is not None:
                state[f"seed.{name}"] = weight.low_rank.seed  # a restart returns to the A that this run began with
        for name, collector in self._collectors.items():
            state[f"count.{name}"] = collector.count
            if collector.total is not None:
                state[f"total.{name}"] = collector.total
        return state if local or self._processes.alone else self.shared_state(state)

    @torch.no_grad()
    def shared_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of all processes from that of this one, `state_dict(local=True)`: what was collected is summed."""
        counts = {key: int(value) for key, value in state.items() if key.startswith("count.")}
        shared = {key: value for key, value in state.items() if not key.startswith("total.")}
        for key, most in zip(counts, self._processes.largest(list(counts.values())), strict=True):
            name = key.removeprefix("count.")
            shared[key] = most
            total = state.get(f"total.{name}")
            if most and self.num_grads > 1:
                weight = self._weights[name]
                zeros = torch.zeros(weight.matrix, device=weight.base.tensors()[0].device)
                total = zeros if total is None else total / self._excess
                shared[f"total.{name}"] = self._processes.sum_(total)
        return shared

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises RosaError if a `state_dict()` belongs to another schedule."""
        for field in ("schedule", "num_grads", "restart"):
            if state[field] != getattr(self, field):
                raise RosaError(f"the saved schedule has {field}={state[field]!r}, this one {getattr(self, field)!r}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises RosaError if it belongs to another schedule."""
        self.check_state(state)
        self.step = int(state["step"])
        self.restarted = bool(state["restarted"])
        self._had_masks = bool(state["had_masks"])
        self._learned = None if state["learned"] < 0 else int(state["learned"])
        for name, weight in self._weights.items():
            if weight.low_rank is not None:
                weight.low_rank.seed = int(state.get(f"seed.{name}", weight.low_rank.seed))
        self._collectors = {}
        self._apply()
        for name, collector in self._collectors.items():
            collector.count = int(state.get(f"count.{name}", 0))
            total = state.get(f"total.{name}")
            if total is not None and self._processes.rank == 0:  # it is the sum over all
                collector.total = total.to(device=self._weights[name].base.tensors()[0].device, copy=True).mul_(self._excess)
