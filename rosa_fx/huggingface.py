"""The RoSA phases inside `transformers.Trainer` (and trainers made from it, such as TRL's `SFTTrainer`).

This module imports transformers; `rosa_fx` itself does not, until `rosa_fx.RosaCallback` is asked for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rosa_fx.adapters import adapter_state
from rosa_fx.atomic import json_digest, tensor_digest, write_tensors
from rosa_fx.errors import RosaError
from rosa_fx.frozen_state import FrozenKeys, frozen_digest
from rosa_fx.schedule import MaskSchedule
from rosa_fx.state import is_transformed
from rosa_fx.training.checkpoint import split_state
from rosa_fx.training.optim import names_of, optimizer_parameters

try:
    from transformers import TrainerCallback, get_scheduler
except ImportError as missing:
    raise RosaError("rosa_fx.RosaCallback needs transformers: pip install 'rosa-fx[hf]'") from missing

STATE_FILE = "rosa_schedule.safetensors"
IGNORED = "_keys_to_ignore_on_save"  # an attribute of models of transformers
VERSION = 2


class RosaCallback(TrainerCallback):
    """Drives a `MaskSchedule` inside `transformers.Trainer`: one phase step for each optimizer step.

    Give the trainer an optimizer that holds the sparse values from the start, although they are frozen until their mask
    exists: `Trainer(model, args, optimizers=(rosa_fx.optimizer_for(model), None), callbacks=[rosa_fx.RosaCallback()])`.
    The trainer's own learning-rate schedule then scales both rates.

    Every checkpoint of the trainer gets a file `rosa_schedule.safetensors` beside the trainer's own. On
    `resume_from_checkpoint` phases, masks and a mask generation that is under way go on from there. Of the model, the
    checkpoints hold what trains: resuming takes the base from the model that the trainer is given, and knows another one.

    Args:
        schedule: one of your own, fresh, for the model that the trainer gets. By default it is made from the model's spec when
            training begins, with `micro_batches` from `gradient_accumulation_steps`.
        restart: as for `MaskSchedule`, for the schedule that is made here. When the masks exist the adapters, the
            optimizer's state and a learning-rate schedule of transformers begin again, the latter over the steps that
            are left; the trainer's order of the data goes on.
        checkpoint: the folder that is given to `resume_from_checkpoint`, where that is not one of the trainer's own
            `output_dir` (a trainer does not tell its callbacks).
        save_base: write the frozen base into every checkpoint too. (Models that are none of transformers' are always
            saved whole.)

    Raises:
        RosaError: from `train()`: the model is not transformed, the optimizer lacks adapter parameters, the schedule
            belongs to another model, or the checkpoint's file is missing, damaged, or of another schedule or base.
    """

    def __init__(
        self,
        schedule: MaskSchedule | None = None,
        *,
        restart: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        save_base: bool = False,
    ) -> None:
        if schedule is not None and not isinstance(schedule, MaskSchedule):
            raise RosaError(f"schedule is a {type(schedule).__name__}: give a rosa_fx.MaskSchedule, or none")
        if schedule is not None and restart:
            raise RosaError("restart=True is for the schedule that is made here: use MaskSchedule(model, restart=True)")
        self._given = schedule
        self._restart = restart
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._schedule: MaskSchedule | None = schedule
        self._restart_step: int | None = None
        self._save_base = save_base
        self._left_out_of: Any = None  # the model whose files lack the base for now
        self._base = ""

    @property
    def schedule(self) -> MaskSchedule:
        """The schedule that is driven. Raises RosaError before training began, if none was given."""
        if self._schedule is None:
            raise RosaError("the schedule is made when training begins: ask for it after trainer.train() or in a callback")
        return self._schedule

    # --- events --------------------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Here already, because a trainer that resumes loads its checkpoint, and wonders about missing keys, before training.
        self._leave_base_out(kwargs.get("model"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if not is_transformed(model):
            raise RosaError("the trainer's model is not transformed: call rosa_fx.transform(model, spec) before Trainer(...)")
        if args.n_gpu > 1:
            raise RosaError(
                f"the trainer sees {args.n_gpu} devices and would copy the model to each in one process, which has no masks of "
                "its own: start one process per device (torchrun or accelerate launch), or set CUDA_VISIBLE_DEVICES=0"
            )
        if optimizer is not None:
            _require_all_parameters(model, optimizer)
        self._schedule, self._restart_step = self._fresh_schedule(model, args), None
        self._leave_base_out(model)
        self._base = frozen_digest(model)
        if state.global_step:
            folder = self._checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._load(folder / STATE_FILE, model)
            if self._restart_step is not None:
                self._follow_restart(args, state, kwargs.get("lr_scheduler"), begin=False)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.end_step()
        if self.schedule.restarted:
            self._restart_step = int(state.global_step)
            optimizer = kwargs["optimizer"]
            getattr(optimizer, "optimizer", optimizer).state.clear()
            self._follow_restart(args, state, kwargs.get("lr_scheduler"), begin=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._left_out_of is not None:
            setattr(self._left_out_of, IGNORED, None)
            self._left_out_of = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # Of several processes one writes, and all take part in saying what.
        schedule, adapter = self.schedule.state_dict(), tensor_digest(adapter_state(kwargs["model"]))
        if args.should_save and folder.is_dir():
            self._save(folder / STATE_FILE, schedule, adapter)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _leave_base_out(self, model: Any) -> None:
        # A model with keys of its own to leave out is saved as it is used to.
        if not self._save_base and hasattr(model, IGNORED) and not getattr(model, IGNORED) and is_transformed(model):
            setattr(model, IGNORED, FrozenKeys(model))
            self._left_out_of = model

    def _fresh_schedule(self, model: nn.Module, args: Any) -> MaskSchedule:
        if self._given is None:
            return MaskSchedule(model, restart=self._restart, micro_batches=args.gradient_accumulation_steps)
        if not self._given.drives(model):
            raise RosaError("the schedule given to RosaCallback was made for another model than the trainer's")
        return self._given

    def _follow_restart(self, args: Any, state: Any, scheduler: Any, begin: bool) -> None:
        """A learning-rate schedule of transformers runs again, from its warm-up, over the steps after the restart."""
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
        assert self._restart_step is not None
        remaining = max(1, state.max_steps - self._restart_step)
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR) or not _of_transformers(scheduler.lr_lambdas[0]):
            return  # the user's own, which goes on as it is
        groups = [{"params": [torch.zeros((), device="cpu")], "lr": rate} for rate in scheduler.base_lrs]
        again = get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD(groups),
            num_warmup_steps=args.get_warmup_steps(remaining),
            num_training_steps=remaining,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        scheduler.lr_lambdas = again.lr_lambdas
        if begin:
            scheduler.last_epoch = 0
            scheduler._last_lr = again.get_last_lr()
            for group, rate in zip(scheduler.optimizer.param_groups, again.get_last_lr(), strict=True):
                group["lr"] = rate

    def _save(self, file: Path, schedule: dict[str, Any], adapter: str) -> None:
        tensors, values = split_state(schedule)
        content: dict[str, Any] = {
            "version": VERSION,
            "schedule": values,
            "restart_step": self._restart_step,
            "adapter": adapter,
            "base": self._base,
        }
        content["checksum"] = _checksum(content, tensors)
        try:
            write_tensors(file, tensors, {"rosa_fx": json.dumps(content)})
        except (OSError, SafetensorError) as error:
            raise RosaError(f"could not write {file}: {error}; free space or choose another output_dir") from error

    def _load(self, file: Path, model: nn.Module) -> None:
        if not file.is_file():
            raise RosaError(
                f"{file} is missing: the checkpoint was made without rosa_fx.RosaCallback, or was not written to its end; "
                "resume from an older one"
            )
        try:
            with safe_open(file, "pt") as stored:
                content: dict[str, Any] = json.loads((stored.metadata() or {})["rosa_fx"])
                tensors: dict[str, Tensor] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            version = content["version"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise RosaError(f"{file} is damaged: {error!r}; resume from an older checkpoint") from error
        if version != VERSION:
            raise RosaError(f"{file} has the version {version!r}, this rosa_fx reads {VERSION}: use the release that wrote it")
        if content.pop("checksum", None) != _checksum(content, tensors):
            raise RosaError(f"{file} is damaged: its checksum differs; resume from an older checkpoint")
        if content.get("adapter") != tensor_digest(adapter_state(model)):
            raise RosaError(
                f"{file} does not belong to the checkpoint that the trainer resumed from: its adapter is another one. Pass the "
                "folder given to resume_from_checkpoint as RosaCallback(checkpoint=...)"
            )
        if content["base"] != self._base:
            raise RosaError(
                f"{file} was written over another base: a weight that does not train has other values in this model. Load the "
                "same base model, in the same dtype, before transform"
            )
        self._restart_step = content["restart_step"]
        self.schedule.load_state_dict({**content["schedule"], **tensors})


def _checksum(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    return json_digest([content, tensor_digest(tensors)])


def _require_all_parameters(model: nn.Module, optimizer: Any) -> None:
    held = {id(parameter) for parameter in optimizer_parameters(optimizer)}
    missing = [name for key, name in names_of(model).items() if key not in held]
    if missing:
        raise RosaError(
            f"the trainer's optimizer does not hold {missing[0]} and {len(missing) - 1} other adapter parameters: a "
            "trainer takes only what trains at its first step, and sparse values train later. Pass "
            "optimizers=(rosa_fx.optimizer_for(model), None) to the trainer"
        )


def _of_transformers(function: Any) -> bool:
    function = getattr(function, "func", function)
    return getattr(function, "__module__", "").startswith("transformers.")
