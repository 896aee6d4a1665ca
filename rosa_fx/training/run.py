"""One training run: its phases, loop, evaluation and what it reports."""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rosa_fx.distributed.processes import ALONE, Processes
from rosa_fx.errors import NonFiniteError, RosaError
from rosa_fx.training import checkpoint as checkpoints
from rosa_fx.training import persistence, rng
from rosa_fx.training.allocator import tune_allocator
from rosa_fx.training.config import TrainConfig
from rosa_fx.training.engine import Engine, LossFunction, Outcome
from rosa_fx.training.interrupt import Stopper, uninterrupted
from rosa_fx.training.metrics import MetricsLog, TrainResult, current_rss, finite, median_rate, peak_rss
from rosa_fx.training.optim import learning_rate_factor, names_of, set_learning_rates
from rosa_fx.training.progress import Reporter
from rosa_fx.training.records import find_checkpoint, save_best, write_run
from rosa_fx.training.run_state import RunState
from rosa_fx.training.sharing import Drawn, StepBatches
from rosa_fx.training.tensorboard import TensorBoardLog

_SKIPS_IN_A_ROW = 10  # so many, and the data or the model is broken


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers are still on the device."""

    step: int
    phase: str
    rates: dict[str, float]
    tokens: int
    targets: float
    outcome: Outcome | None  # None: backward found a gradient that is not finite
    skipped: bool = False


class Run(RunState):
    """A run that goes on. `start`, then `loop`, then `finish`; `interrupted` in their stead after Ctrl-C."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        config: TrainConfig,
        eval_batches: Iterable[Any] | None,
        loss_fn: LossFunction | None,
        weight_fn: Callable[[Any], float] | None,
        out: Path | None,
        reporter: Reporter,
        stop: Stopper,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__(model, batches, config, reporter, processes)
        self.out, self.stop = out, stop
        self.first = processes.rank == 0  # the one that writes
        self.eval_batches = list(eval_batches) if isinstance(eval_batches, Iterator) else eval_batches
        if self.device.type == "cpu" and config.tune_allocator:
            tune_allocator()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.engine = Engine(model, config, self.device, loss_fn, weight_fn, processes, self.sharded)
        self.batches = StepBatches(self.source, self.engine.describe, processes, config.gradient_accumulation)
        self.folder = out / "checkpoints" if out else None
        self.metrics = MetricsLog(out / "metrics.jsonl" if out and self.first else None)
        self.tensorboard = TensorBoardLog(None, False, 0)
        self.rates: list[tuple[int, float]] = []  # (tokens, seconds) of each step made here
        self.pending: list[_Pending] = []
        self.window = 0.0  # when the first pending step began
        self.inside_step = False
        self.skipped_empty = False

    def start(self, resume: bool) -> None:
        """Begin a fresh run, or continue from the newest checkpoint."""
        try:
            found = find_checkpoint(self, self.out, self.metrics, resume)
        except OSError as error:
            raise RosaError(f"out ({self.out}) cannot be used: {error}; choose a folder that you may read and write") from error
        if found is not None:
            persistence.restore(self, found)
        if self.out is not None:
            self.processes.on_first(lambda: self._open_records(self.out))
        if found is None:
            if resume:
                self.message(f"{self.out} holds no checkpoint yet: starting from the beginning")
            rng.seed_all(self.config.seed, *([] if self.first else [self.processes.rank]))
            self._warn_about_length()
            if self.eval_batches is not None:
                self._evaluate()
            self.mark = self.take_mark()
        self.reporter.plan(self.step, self.total)

    def _open_records(self, out: Path | None) -> None:
        assert out is not None
        with rng.untouched():  # whatever TensorBoard draws
            write_run(out, self)
            self.tensorboard = TensorBoardLog(out / "tensorboard", self.config.tensorboard, self.step)

    def _warn_about_length(self) -> None:
        warm_up = re.fullmatch(r"wl(\d+)", self.spec.schedule)
        before = int(warm_up[1]) + self.spec.num_grads if warm_up else 0
        if before >= self.total and any(g["name"] == "sparse" for g in self.optimizer.param_groups):
            self.message(
                f"sparse values never train: schedule {self.spec.schedule!r} makes the masks after step {before}, but "
                f"the run has {self.total}; use a shorter schedule such as wl{max(1, self.total // 4)} or train longer"
            )

    # The loop

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run. A restart makes a run that is counted in epochs longer."""
        extra = self.restart_step if self.restart_step is not None and self.config.max_steps is None else 0
        return self.planned + (extra or 0)

    def loop(self) -> None:
        """Train until the planned end, the end of the data, or `stop_at_step`."""
        config = self.config
        self._after_step()  # a run may have been stopped between a step and its evaluation
        while self.step < self.total and not self._is_at_stop():
            started = time.perf_counter()
            drawn = self._draw()
            if not drawn.group:
                if not self.source.next_epoch() or (config.max_steps is None and self.source.epoch >= config.epochs):
                    self.message(f"the batches ended at step {self.step} of {self.total}")
                    break
                continue
            self._train_step(drawn, started)
            self._after_step()
        self._flush()

    def _after_step(self) -> None:
        config = self.config
        if self.step and config.eval_every and self.step % config.eval_every == 0 and self.eval_batches is not None:
            self._evaluate()
        if self.step and config.checkpoint_every and self.step % config.checkpoint_every == 0:
            self._checkpoint()
        self.stop.check_all(self.processes)

    def _is_at_stop(self) -> bool:
        return self.config.stop_at_step is not None and self.step >= self.config.stop_at_step

    def _draw(self) -> Drawn:
        """The micro-batches of the next step; the last step of an epoch may have fewer."""
        drawn = self.batches.draw()
        if drawn.passed_over and not self.skipped_empty:
            self.skipped_empty = True
            self.message("micro-batches without a target (all labels are -100) are passed over")
        return drawn

    def _train_step(self, drawn: Drawn, started: float) -> None:
        config, schedule = self.config, self.schedule
        if schedule.phase == "collect":  # of the step to come
            self._flush()
        if not self.pending:
            self.window = started
        self.inside_step = True
        schedule.begin_step()
        phase, number = schedule.phase, self.step + 1
        start = self.restart_step or 0
        factor = learning_rate_factor(self.step - start, self.total - start, config.warmup_steps, config.schedule)
        rates = set_learning_rates(self.optimizer, config, factor)
        pending = _Pending(number, phase, rates, drawn.tokens, drawn.targets, None)
        try:
            loss = self.engine.accumulate(drawn.group)
            outcome = self.engine.measure(loss, self.optimizer)
            pending = replace(pending, outcome=outcome)
            # Before the update, so that the weights stay those of the last good step; and masks must not come of a bad one.
            if not self.engine.looks_late or phase == "collect":
                self._check(outcome, outcome.values.tolist())
            if phase == "collect":
                schedule.check_collected()
        except NonFiniteError as error:  # also from collection, which notices a NaN first
            if config.on_nonfinite == "stop":
                raise NonFiniteError(self._stopped_by(pending, error)) from error
            pending = replace(pending, skipped=True)
            self.reporter.event("skip", f"step {number} ({phase}) is skipped: {error}", step=number)
        except RosaError as error:  # an unusable batch
            raise RosaError(f"step {number} ({phase}): {error}") from error
        with uninterrupted():
            if pending.outcome is None or pending.skipped:
                self.optimizer.zero_grad(set_to_none=True)
                schedule.skip_step()
            else:
                self._update(pending.outcome, number, phase)
            self.step = number
            self.pending.append(pending)
            if schedule.restarted and self.restart_step is None:
                self._restart()
            self.mark = self.take_mark()
            self.inside_step = False
        if not self.engine.looks_late or len(self.pending) >= config.log_every:
            self._flush()

    def _update(self, outcome: Outcome, number: int, phase: str) -> None:
        self.engine.update(outcome, self.optimizer)
        try:
            self.schedule.end_step()
        except RosaError as error:
            raise RosaError(f"step {number} ({phase}): {error}; {self._where_to_go_back()}") from error

    def _restart(self) -> None:
        self.restart_step = self.step
        self.optimizer = self.fresh_optimizer()
        if not self.source.one_shot:
            self.source.seek(0, 0)
        self.reporter.plan(self.step, self.total)
        self.reporter.event("restart", f"masks made at step {self.step}: both adapters start again", step=self.step)

    def _check(self, outcome: Outcome | None, values: list[float]) -> None:
        """Raises NonFiniteError if loss or gradients are not finite."""
        loss, norm, bad = values
        if math.isfinite(loss) and math.isfinite(norm):
            return
        culprit = "no single gradient is infinite or NaN"
        if bad >= 0 and outcome is not None:
            name = names_of(self.model)[id(outcome.norm.parameters[int(bad)])]
            culprit = f"the first gradient that is not finite is that of {name}"
        if not self.processes.alone:
            lost = self.processes.gather(outcome is not None and bool(outcome.own_loss.isfinite()))
            ranks = [str(rank) for rank, fine in enumerate(lost) if not fine]
            culprit += f"; the loss is not finite in rank {', '.join(ranks)}" if ranks else "; every rank's loss is finite"
        raise NonFiniteError(f"the loss is {loss} and the gradient norm {norm}; {culprit}")

    def _stopped_by(self, entry: _Pending, error: NonFiniteError) -> str:
        return (
            f"step {entry.step} ({entry.phase}): {error}. "
            f"Lower lr ({self.config.lr}) and lr_sparse ({self.config.lr_sparse}), look at the batches of this step, or pass "
            f'them over with on_nonfinite="skip"; {self._where_to_go_back()}'
        )

    def _where_to_go_back(self) -> str:
        return f"the last checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "there is no checkpoint yet"

    def _flush(self) -> None:
        """Read the pending steps' numbers (one wait for the device) and report them."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        unknown = torch.full((3,), math.nan, device=self.device)
        values = torch.stack([unknown if p.outcome is None else p.outcome.values for p in pending]).tolist()
        seconds = (time.perf_counter() - self.window) / len(pending)
        memory = current_rss()
        for entry, numbers in zip(pending, values):
            skipped = entry.skipped
            if not skipped:
                try:
                    self._check(entry.outcome, numbers)
                except NonFiniteError as error:  # seen late: the device has left the update out
                    if self.config.on_nonfinite == "stop":
                        raise NonFiniteError(self._stopped_by(entry, error)) from error
                    skipped = True
                    self.reporter.event("skip", f"step {entry.step} ({entry.phase}) is skipped: {error}", step=entry.step)
            row = {
                "event": "step",
                "step": entry.step,
                "phase": entry.phase,
                "loss": finite(numbers[0]),
                "lr": entry.rates.get("low_rank", 0.0),
                "lr_sparse": entry.rates.get("sparse", 0.0),
                "grad_norm": finite(numbers[1]),
                "skipped": skipped,
                "tokens": entry.tokens,
                "targets": entry.targets,
                "tokens_per_s": entry.tokens / seconds,
                "seconds": seconds,
                "rss": memory,
            }
            if self.device.type == "cuda":
                row["device_memory"] = torch.cuda.max_memory_allocated(self.device)
            self.losses.append(math.nan if skipped else numbers[0])
            self.rates.append((entry.tokens, seconds))
            self.tokens += entry.tokens
            self.seconds += seconds
            self.metrics.append([row])
            self.tensorboard.add(row)
            self.reporter.step(row)
        if len(self.losses) >= _SKIPS_IN_A_ROW and all(map(math.isnan, self.losses[-_SKIPS_IN_A_ROW:])):
            raise NonFiniteError(
                f"the last {_SKIPS_IN_A_ROW} steps, to step {len(self.losses)}, were all skipped because "
                f"their loss or gradients were not finite: look at the data, lower the rates; {self._where_to_go_back()}"
            )

    def _evaluate(self) -> None:
        if self.step in self.evals:
            return
        self._flush()
        started = time.perf_counter()
        # Of several processes none may leave alone.
        loss = self.engine.evaluate(self.eval_batches, self.stop.check if self.processes.alone else lambda: None)
        seconds = time.perf_counter() - started
        best = self.best_step is None or loss < self.evals[self.best_step]
        if self.out is not None and self.step and best and math.isfinite(loss):
            self._save_best(self.out, loss)
        self.evals[self.step] = loss
        row = {"event": "eval", "step": self.step, "loss": finite(loss), "seconds": seconds}
        self.metrics.append([row])
        self.tensorboard.add(row)
        self.reporter.event("eval", f"step {self.step}: held-out loss {loss:.4f}", step=self.step, loss=loss)

    def _save_best(self, out: Path, loss: float) -> None:
        if self.sharded:
            save_best(self.model, out, self.step, loss, writes=self.first)
        else:
            self.processes.on_first(lambda: save_best(self.model, out, self.step, loss))

    @property
    def best_step(self) -> int | None:
        """After which step the evaluation loss was lowest; the model before the first step does not count."""
        losses = {step: loss for step, loss in self.evals.items() if step and math.isfinite(loss)}
        return min(losses, key=lambda step: (losses[step], step), default=None)

    def _checkpoint(self) -> None:
        """Write a checkpoint of the last whole step, unless it is there already."""
        if self.folder is None or (self.last_checkpoint and self.last_checkpoint.name == f"step-{self.mark.step}"):
            return
        self._flush()
        with uninterrupted():
            self.metrics.flush()
            folder, found = self.folder, persistence.snapshot(self)
            self.last_checkpoint = self.processes.on_first(
                lambda: checkpoints.save(folder, found, self.config.keep_checkpoints)
            )
        self.reporter.event("checkpoint", f"checkpoint {self.last_checkpoint}", path=str(self.last_checkpoint))

    def interrupted(self) -> str:
        """Save what can be saved after an interrupt; returns what to tell the user."""
        if self.folder is None:
            return f"interrupted after step {self.mark.step}; nothing is saved because train() was given no out folder"
        # Gradients that were summed into the collected ones in place cannot be taken out again.
        collecting = self.inside_step and any(isinstance(v, Tensor) for v in self.mark.schedule.values())
        if self.mark.step and not (collecting and self.schedule.phase == "collect"):
            self._checkpoint()
        if self.last_checkpoint is None:
            return f"interrupted after step {self.mark.step}, before the first checkpoint: start again"
        return f"interrupted after step {self.mark.step}: continue with resume=True from {self.last_checkpoint}"

    def abandoned(self) -> str:
        """What to tell the user after a second interrupt: nothing is saved."""
        if self.last_checkpoint is None:
            return f"stopped at once after step {self.mark.step}, before the first checkpoint: start again"
        return f"stopped at once after step {self.mark.step}: continue with resume=True from {self.last_checkpoint}"

    def close(self) -> None:
        """Close what is open."""
        self.tensorboard.close()

    def finish(self) -> TrainResult:
        """Evaluate, write the last checkpoint, and sum up."""
        finished = not self._is_at_stop() or self.step >= self.total
        if finished and self.eval_batches is not None:
            self._evaluate()
        self._checkpoint()
        cuda = self.device.type == "cuda"
        return TrainResult(
            eval_loss_before=self.evals.get(0),
            eval_loss_after=self.evals.get(self.step) if self.step else None,
            steps=self.step,
            epochs=self.source.epoch + (1 if self.source.index else 0),
            finished=finished,
            seconds=self.seconds,
            tokens=self.tokens,
            tokens_per_s=self.tokens / self.seconds if self.seconds else 0.0,
            steady_tokens_per_s=median_rate(self.rates),
            peak_rss=peak_rss(),
            peak_device=torch.cuda.max_memory_allocated(self.device) if cuda else 0,
            losses=list(self.losses),
            evals=dict(self.evals),
            parameters={g["name"]: sum(p.numel() for p in g["params"]) for g in self.optimizer.param_groups},
            compiled=self.engine.compiled,
            bf16=self.engine.bf16,
            checkpoint=self.last_checkpoint,
            restart_step=self.restart_step,
            skipped=sum(map(math.isnan, self.losses)),
            best_step=self.best_step,
        )
