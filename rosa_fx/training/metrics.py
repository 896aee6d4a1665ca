"""What a run measures: rows of metrics.jsonl, memory, and the result that `rosa_fx.train` returns."""

import json
import math
import os
import statistics
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rosa_fx import atomic
from rosa_fx.errors import RosaError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class TrainResult:
    """What `rosa_fx.train` did.

    eval_loss_before, eval_loss_after: token-weighted mean loss over `eval_batches`; None without them.
    steps: optimizer steps of the whole run, those before a resume included. epochs: passes begun.
    finished: False if `stop_at_step` ended it early. seconds: time spent in steps (no evaluation, no checkpoints).
    tokens, tokens_per_s: input tokens without padding, and tokens / seconds (compilation included);
    steady_tokens_per_s: median over the steps, which compilation does not move. 0 where batches do not say.
    peak_rss: bytes, largest resident memory of the process so far. peak_device: bytes, largest allocation on the GPU.
    losses: one per step, NaN where the step was skipped (`TrainConfig.on_nonfinite`); skipped: how many those are.
    evals: {step: loss}. best_step: after which step the evaluation loss was lowest; None without evaluations after step 0.
    parameters: trainable numbers per term. compiled, bf16: what was used. checkpoint: the last one written.
    restart_step: after which step both adapters started again, if they did.
    """

    eval_loss_before: float | None
    eval_loss_after: float | None
    steps: int
    epochs: int
    finished: bool
    seconds: float
    tokens: int
    tokens_per_s: float
    steady_tokens_per_s: float
    peak_rss: int
    peak_device: int
    losses: list[float]
    evals: dict[int, float]
    parameters: dict[str, int]
    compiled: bool
    bf16: bool
    checkpoint: Path | None
    restart_step: int | None
    skipped: int
    best_step: int | None


class MetricsLog:
    """metrics.jsonl: one JSON object per line, in order of `step` (optimizer steps done).

    Rows of "event": "step" have
        phase: "low_rank", "collect", "joint" or "sparse". loss: mean over the step's targets. lr, lr_sparse: rates used.
        grad_norm: of all gradients together, before clipping. skipped: the update was left out (loss and grad_norm are null
        where they are not finite). tokens: of the input, without padding where the batch has an attention mask.
        targets: what the loss is the mean of. seconds; tokens_per_s. rss: resident memory of the process in bytes.
        device_memory: largest allocation on the GPU so far in bytes, on a GPU only.
    Rows of "event": "eval" have loss (null if it is not finite) and seconds.

    Raises RosaError where the file cannot be written; rows that were written before stay.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def append(self, rows: list[Mapping[str, Any]]) -> None:
        """Add rows; each is on its own line."""
        if self.path is None or not rows:
            return
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    def flush(self) -> None:
        """Put the rows on disk: a checkpoint must not be newer than the rows it vouches for."""
        if self.path is not None and self.path.exists():
            with self._writing(), self.path.open("a", encoding="utf-8") as stream:
                os.fsync(stream.fileno())

    def truncate(self, step: int, evals: Collection[int]) -> None:
        """Keep the rows up to `step`, evaluations only of the steps in `evals`; drop a last line that was cut off."""
        if self.path is None or not self.path.exists():
            return
        rows = [
            row for row in read_metrics(self.path) if row["step"] <= step and (row["event"] == "step" or row["step"] in evals)
        ]
        with self._writing():
            atomic.write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RosaError(
                f"could not write {self.path}: {error}; free space or choose another out, then go on with resume=True"
            ) from error


def finite(number: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return number if math.isfinite(number) else None


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; lines that are not whole (a run that was killed) are left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row.get("event") in ("step", "eval"):
            rows.append(row)
    return rows


def median_rate(rows: list[tuple[int, float]]) -> float:
    """Median of tokens / seconds over steps given as (tokens, seconds)."""
    rates = [tokens / seconds for tokens, seconds in rows if seconds > 0]
    return statistics.median(rates) if rates else 0.0


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes (0 where the system does not say)."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


def current_rss() -> int:
    """Resident memory of this process now, in bytes; the peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak_rss()
    return pages * os.sysconf("SC_PAGE_SIZE")
