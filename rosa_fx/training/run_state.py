"""Where a training run stands: what its loop changes, what a checkpoint stores and what a resume brings back."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rosa_fx.distributed.processes import Processes
from rosa_fx.distributed.tensors import any_sharded, is_sharded
from rosa_fx.errors import RosaError
from rosa_fx.schedule import MaskSchedule
from rosa_fx.state import state_of, unwrap
from rosa_fx.training import rng
from rosa_fx.training.batches import BatchSource
from rosa_fx.training.config import TrainConfig
from rosa_fx.training.optim import optimizer_for, optimizer_parameters
from rosa_fx.training.progress import Reporter


@dataclass(frozen=True)
class Mark:
    """Everything but the model and the optimizer that a checkpoint at the last whole step needs, in this process."""

    step: int
    epoch: int
    index: int
    schedule: dict[str, Any]
    random: tuple[dict[str, Tensor], dict[str, Any]]


class RunState:
    """A run before its first step; `rosa_fx.training.run.Run` takes it further, and `persistence.restore` back to a checkpoint.

    Raises RosaError for a model that is not on one device or has nothing to train, and for batches that cannot be used.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], config: TrainConfig, reporter: Reporter, processes: Processes
    ) -> None:
        self.model, self.config, self.reporter, self.processes = unwrap(model), config, reporter, processes
        self.spec = state_of(model).spec
        self.device = self._one_device()
        self.source = BatchSource(batches, config.seed)
        self.planned = self.source.count_steps(config, processes.size)
        self.schedule = MaskSchedule(
            self.model,
            restart=config.restart,
            micro_batches=config.gradient_accumulation,
            can_skip=config.on_nonfinite == "skip",
            averages=any_sharded(self.model),  # FSDP takes means, and elsewhere the trainer takes sums
        )
        self.optimizer = self.fresh_optimizer()
        self.step = 0
        self.restart_step: int | None = None
        self.losses: list[float] = []
        self.evals: dict[int, float] = {}
        self.tokens, self.seconds = 0, 0.0
        self.last_checkpoint: Path | None = None
        self.mark = self.take_mark()

    def _one_device(self) -> torch.device:
        devices = {p.device for p in self.model.parameters()}
        if len(devices) != 1 or next(iter(devices)).type == "meta":
            found = ", ".join(sorted(map(str, devices))) or "none"
            raise RosaError(f"the model's parameters are on {found}: move the whole model to one device")
        return devices.pop()

    def fresh_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return optimizer_for(
            self.model,
            config.lr,
            config.lr_sparse,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            betas=config.betas,
        )

    def message(self, text: str) -> None:
        self.reporter.event("message", text)

    def take_mark(self) -> Mark:
        """Remember where the run stands; called between steps."""
        position = (self.source.epoch, self.source.index)
        return Mark(self.step, *position, self.schedule.state_dict(local=True), rng.capture())

    @property
    def sharded(self) -> bool:
        """Whether this process holds only a part of some adapter."""
        return any(map(is_sharded, optimizer_parameters(self.optimizer)))
