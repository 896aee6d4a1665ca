"""What a user sees while training: a progress bar on a terminal, plain lines elsewhere, nothing if so asked."""

import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger("rosa_fx.training")


class Reporter:
    """Shows step and evaluation rows and messages on `console` (standard error by default), and hands every one of them
    to `on_event` as a dict whose "event" is "step", "eval", "checkpoint", "skip", "restart" or "message"."""

    def __init__(
        self, show: bool, log_every: int, console: Console | None, on_event: Callable[[dict[str, Any]], None] | None
    ) -> None:
        self._console = (console or Console(stderr=True)) if show else None
        self._log_every = log_every
        self._on_event = on_event
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total: int | None = None

    def __enter__(self) -> Self:
        if self._console is not None and self._console.is_terminal:
            columns = (
                TextColumn("{task.fields[phase]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=None, phase="start", status="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def plan(self, step: int, total: int) -> None:
        """Say how long the run is and where it stands."""
        self._total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total, completed=step)

    def step(self, row: Mapping[str, Any]) -> None:
        """One optimizer step."""
        self._emit(row)
        speed = f"{row['tokens_per_s']:,.0f} tokens/s  " if row["tokens"] else ""
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        memory = f"{row.get('device_memory', row['rss']) / 2**30:.2f} GiB"
        status = f"loss {loss}{' (skipped)' if row['skipped'] else ''}  {speed}{memory}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=row["step"], phase=row["phase"], status=status)
        elif self._console is not None and (row["step"] % self._log_every == 0 or row["step"] in (1, self._total)):
            self._line(f"step {row['step']}/{self._total}  {row['phase']}  {status}  lr {row['lr']:.2e}")

    def event(self, kind: str, text: str, **fields: Any) -> None:
        """Anything else that the user should read."""
        self._emit({"event": kind, "text": text, **fields})
        logger.info("%s", text)
        if self._console is not None:
            self._line(text)

    def notice(self, text: str) -> None:
        """Show a line without handing it to `on_event`, which may be in the middle of something (a signal arrived)."""
        if self._console is not None:
            self._line(text)

    def _line(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _emit(self, row: Mapping[str, Any]) -> None:
        if self._on_event is not None:
            self._on_event(dict(row))
