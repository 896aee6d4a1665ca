"""Being told to stop: Ctrl-C and SIGTERM end a run after its step, and nothing is cut in two."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from rosa_fx.distributed.processes import Processes

TERMINATED = 128 + signal.SIGTERM


class StopRequested(Exception):
    """Raised inside the trainer where a requested stop takes effect."""


class Terminated(SystemExit):
    """What `rosa_fx.train` raises after SIGTERM, its checkpoint written: not caught, it ends the process with code 143."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = TERMINATED


class Stopper:
    """Takes over Ctrl-C and SIGTERM while a run goes on.

    The first of them asks the run to stop: it ends the step, writes a checkpoint and raises KeyboardInterrupt or
    `Terminated`. A Ctrl-C after that raises KeyboardInterrupt on the spot. Handlers that the program has set itself stay,
    and outside the main thread, where Python lets nobody set any, nothing changes.
    """

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._previous: dict[int, Any] = {}
        self.requested: int | None = None
        self.at_once = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) == default:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise StopRequested if so asked."""
        if self.requested is not None:
            raise StopRequested

    def check_all(self, processes: Processes) -> None:
        """Raise StopRequested in all processes if any was asked so. A collective call."""
        (number,) = processes.largest([self.requested or 0])
        self.requested = number or None
        self.check()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
            again = "; press Ctrl-C again to stop at once, without saving" if number == signal.SIGINT else ""
            self._notice(f"stopping: this step is finished and saved first{again}")
        elif number == signal.SIGINT:
            self.at_once = True
            raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold an interrupt back until the body is done: half an optimizer step could neither be saved nor undone.

    Where a `Stopper` is at work there is nothing to hold back: its first signal only asks, and its second is meant to cut.
    """
    previous = signal.getsignal(signal.SIGINT)
    # Python delivers signals to the main thread only, and only there may handlers be set.
    main = threading.current_thread() is threading.main_thread()
    if not main or not callable(previous) or isinstance(getattr(previous, "__self__", None), Stopper):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            previous(*held[0])
