"""What torch's allocator gives out."""

from __future__ import annotations

from typing import Any

import torch


class Allocations:
    """Largest block and largest live total that torch's allocator gave out inside the `with`, in bytes."""

    def __enter__(self) -> Allocations:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        profiler: Any = self._profile.profiler
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.largest = max(changes, default=0)
        self.peak = live = 0
        for change in changes:
            live += change
            self.peak = max(self.peak, live)
