"""The settings of one training run."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch

from rosa_fx.errors import RosaError

# A resumed run that changes one of these is another run: its data order or its phases no longer match what was trained.
IDENTITY = ("seed", "restart", "optimizer")
# These may change between two parts of a run without changing what is computed.
FREE = (
    "progress",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "stop_at_step",
    "tune_allocator",
    "on_nonfinite",
    "tensorboard",
)


@dataclass(frozen=True)
class TrainConfig:
    """How `rosa_fx.train` trains. The defaults are those of the RoSA paper (arXiv 2401.04679) where it states them.

    Length of the run
        epochs: passes over the batches. With `restart=True` they are counted from the restart, so that the second run
            is a whole one; the steps before it come on top.
        max_steps: exact number of optimizer steps in all (those before a restart included). Given, `epochs` is ignored
            and the batches are passed over as often as it takes. Needed where the number of batches is unknown.
        stop_at_step: write a checkpoint after this optimizer step and return; the learning-rate schedule still
            spans the whole run, so that `resume=True` continues exactly. None: run to the end.
    Optimizer
        optimizer: "adamw", or "adamw8bit" (bitsandbytes', where it supports the device): its state in 8 bits.
        gradient_accumulation: micro-batches per optimizer step.
        lr, lr_sparse: peak rates of the low-rank factors and of the sparse values.
        weight_decay, betas: AdamW's.
        warmup_steps, schedule: linear warm-up, then "linear" decay to 0 or "constant".
        max_grad_norm: clip the norm of all gradients together; None: do not clip.
    Execution
        bf16: True: autocast to bfloat16; False: never; "auto": where the hardware computes in bfloat16.
        compile: `torch.compile` the model. dynamic: its `dynamic=` argument.
        restart: the paper's second run: once the masks exist both adapters start again, and so do the data,
            the optimizer and the learning-rate schedule.
        on_nonfinite: a loss or gradient that is not finite: "stop" names the step, the weight and the last checkpoint;
            "skip" leaves the step's update out, counts it (`TrainResult.skipped`) and goes on, but stops after ten in a
            row. A skipped step that collects for the masks is made up for by the next one.
        seed: of the data order and of every random number of the run (Python's, NumPy's and torch's are seeded).
        tune_allocator: on CPU, let the C allocator keep large blocks (`rosa_fx.training.tune_allocator`).
    Reporting
        eval_every: evaluate each so many steps besides before and after; None: only then.
        checkpoint_every: write a checkpoint each so many steps besides the last; None: only the last.
        keep_checkpoints: how many of the newest stay. log_every: steps between lines (and, on a GPU, between reads of
            the loss). progress: show anything at all.
        tensorboard: write `out/tensorboard`: "auto" where TensorBoard is installed, True: or fail, False: never.

    Raises RosaError that names the field for a value that cannot be used.
    """

    epochs: int = 1
    max_steps: int | None = None
    stop_at_step: int | None = None
    gradient_accumulation: int = 1
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = 7e-4
    lr_sparse: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 20
    schedule: Literal["linear", "constant"] = "linear"
    max_grad_norm: float | None = 1.0
    bf16: bool | Literal["auto"] = "auto"
    compile: bool = True
    dynamic: bool | None = None
    restart: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    log_every: int = 10
    seed: int = 0
    progress: bool = True
    tensorboard: bool | Literal["auto"] = "auto"
    tune_allocator: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "gradient_accumulation", "keep_checkpoints", "log_every"):
            self._require(name, _is_int(getattr(self, name), 1), "a whole number of at least 1")
        for name in ("max_steps", "stop_at_step", "eval_every", "checkpoint_every"):
            value = getattr(self, name)
            self._require(name, value is None or _is_int(value, 1), "a whole number of at least 1, or None")
        self._require("warmup_steps", _is_int(self.warmup_steps, 0), "a whole number of at least 0")
        self._require("seed", _is_int(self.seed, 0), "a whole number of at least 0")
        for name in ("lr", "lr_sparse", "weight_decay"):
            self._require(name, _is_real(getattr(self, name)), "a finite number of at least 0")
        positive = self.max_grad_norm is None or (_is_real(self.max_grad_norm) and self.max_grad_norm > 0)
        self._require("max_grad_norm", positive, "a finite number above 0, or None to leave gradients as they are")
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        self._require("betas", pair and all(_is_real(b) and b < 1 for b in self.betas), "two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        self._require("optimizer", self.optimizer in ("adamw", "adamw8bit"), '"adamw" or "adamw8bit"')
        self._require("schedule", self.schedule in ("linear", "constant"), '"linear" or "constant"')
        self._require("bf16", isinstance(self.bf16, bool) or self.bf16 == "auto", 'True, False or "auto"')
        auto = isinstance(self.tensorboard, bool) or self.tensorboard == "auto"
        self._require("tensorboard", auto, 'True, False or "auto"')
        self._require("on_nonfinite", self.on_nonfinite in ("stop", "skip"), '"stop" or "skip"')
        self._require("dynamic", self.dynamic is None or isinstance(self.dynamic, bool), "True, False or None")
        for name in ("compile", "restart", "progress", "tune_allocator"):
            self._require(name, isinstance(getattr(self, name), bool), "True or False")

    def _require(self, name: str, good: bool, remedy: str) -> None:
        if not good:
            raise RosaError(f"TrainConfig.{name} is {getattr(self, name)!r}: use {remedy}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def differences(self, stored: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Fields whose value here is not the stored one: {name: (stored, here)}; those in FREE are left out."""
        here, stored = self.to_dict(), {"optimizer": "adamw", **stored}  # the one that there was before the field
        names = [f.name for f in fields(self) if f.name not in FREE]
        return {name: (stored.get(name), here[name]) for name in names if stored.get(name) != here[name]}

    def autocast_to_bf16(self, device: torch.device) -> bool:
        """Whether the forward pass runs under bfloat16 autocast on `device`."""
        return has_native_bf16(device) if self.bf16 == "auto" else self.bf16


def has_native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; where it does not, float32 is the faster choice."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Private probes: absent means unknown, and then float32 is the safe answer.
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
