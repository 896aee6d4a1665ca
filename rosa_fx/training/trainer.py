"""`rosa_fx.train`."""

import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from rosa_fx.distributed.gradients import without_ddp
from rosa_fx.distributed.processes import processes_of
from rosa_fx.errors import RosaError
from rosa_fx.state import state_of, unwrap
from rosa_fx.training.config import TrainConfig
from rosa_fx.training.engine import LossFunction, training_mode
from rosa_fx.training.interrupt import Stopper, StopRequested, Terminated
from rosa_fx.training.metrics import TrainResult
from rosa_fx.training.progress import Reporter
from rosa_fx.training.run import Run


def train(
    model: nn.Module,
    batches: Iterable[Any],
    config: TrainConfig | None = None,
    *,
    eval_batches: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    weight_fn: Callable[[Any], float] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Fine-tune the adapters of a transformed model with RoSA's mask schedule.

    Args:
        model: transformed by `rosa_fx.transform`, on one device. Left as trained, in the mode it was in.
        batches: micro-batches: a sequence (shuffled anew each epoch), a DataLoader, another iterable, or an iterator
            (one pass). See `rosa_fx.training.batches.BatchSource`. Micro-batches without targets are passed over.
        config: `TrainConfig()` by default.
        eval_batches: iterated for each evaluation; an iterator is kept as a list.
        loss_fn: `loss_fn(model, batch)` gives the scalar mean loss of any batch; it must call the model that it is
            handed (the compiled one). Without it a batch is a mapping and the loss is `.loss` or `["loss"]` of
            `model(**batch)`.
        weight_fn: the number of targets that a batch's mean loss is over. By default the labels that are not -100
            (after the shift of causal language models) if the batch is a mapping with "labels", else 1. A step's loss
            is the mean over all its targets, so accumulation equals one large batch. (For the masks each micro-batch's
            gradient is squared by itself, as in the paper's code.)
        out: folder for `checkpoints/step-N`, `metrics.jsonl`, `run.json` and, with `eval_batches`, `best` (the adapter with
            the lowest evaluation loss so far, and that loss in `evaluation.json`); None: nothing is written.
        resume: continue from the newest checkpoint in `out` (from the start if there is none). On the CPU the continued
            run equals an uninterrupted one bit for bit.
        on_event: is handed every row and message as a dict (see `rosa_fx.training.progress.Reporter`).
        console: a rich console to show progress on; standard error by default.

    Returns:
        What was measured, see `TrainResult`.

    Raises:
        RosaError: the model is not transformed; something given cannot be used (the message names it); the loss or a
            gradient is not finite (see `TrainConfig.on_nonfinite`); a checkpoint is damaged or belongs to another run;
            something cannot be written, the disk being full for example. What was written before is then still whole.
        KeyboardInterrupt: after Ctrl-C, once the step is finished and a checkpoint of it is in `out`; after a second Ctrl-C
            at once: the checkpoints written before are whole, the model in memory may be in the middle of a step.
        Terminated: after SIGTERM, with a checkpoint as after Ctrl-C; a SystemExit, which ends the process with code 143.
    """
    config = config or TrainConfig()
    if not isinstance(config, TrainConfig):
        raise RosaError(f"config is a {type(config).__name__}: pass a rosa_fx.TrainConfig")
    if resume and out is None:
        raise RosaError("resume=True needs out: the folder of the run to continue")
    state_of(model)  # says so if the model is not transformed
    processes = processes_of()
    model = without_ddp(model)
    first = processes.rank == 0
    reporter = Reporter(config.progress and first, config.log_every, console, on_event if first else None)
    with reporter, training_mode(unwrap(model)), Stopper(reporter.notice) as stop:
        folder = Path(out) if out else None
        run = Run(model, batches, config, eval_batches, loss_fn, weight_fn, folder, reporter, stop, processes)
        try:
            run.start(resume)
            run.loop()
            return run.finish()
        except KeyboardInterrupt:
            # A process that is stopped by itself cannot save what it needs the others for.
            at_once = stop.at_once or not processes.alone
            raise KeyboardInterrupt(run.abandoned() if at_once else run.interrupted()) from None
        except RosaError:
            raise
        except Exception as error:
            # Ctrl-C on a terminal also ends compilers and data workers that the step was waiting for.
            if stop.requested is None or not (processes.alone or isinstance(error, StopRequested)):
                raise
            cause = None if isinstance(error, StopRequested) else error
            message = run.interrupted()
            if stop.requested == signal.SIGINT:
                raise KeyboardInterrupt(message) from cause
            reporter.event("message", message)
            raise Terminated(message) from cause
        finally:
            run.close()
