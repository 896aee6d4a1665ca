"""Loss, evaluation and one optimizer step: everything that computes, without files, progress or phases of a run."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rosa_fx.distributed.gradients import average_
from rosa_fx.distributed.processes import ALONE, Processes
from rosa_fx.distributed.tensors import is_sharded
from rosa_fx.errors import RosaError
from rosa_fx.training.batches import count_tokens, target_counter, to_device
from rosa_fx.training.config import TrainConfig
from rosa_fx.training.optim import GradientNorm, clip, gradient_norm, optimizer_parameters
from rosa_fx.training.rng import untouched

LossFunction = Callable[[nn.Module, Any], Tensor]


class MicroBatch(NamedTuple):
    """A micro-batch as given, the number of targets its mean loss is over, its input tokens (None: unknown), and the
    targets of the whole step (None: those of the micro-batches that are accumulated with it)."""

    batch: Any
    weight: float
    tokens: int | None
    of: float | None = None


class Outcome(NamedTuple):
    """values: float32 [3] on the device: loss, gradient norm, index of the first bad gradient or -1; the same in all
    processes. own_loss: this process's part of the loss."""

    values: Tensor
    norm: GradientNorm
    own_loss: Tensor


class Engine:
    """Runs `model` (compiled if so configured) on micro-batches.

    The loss of a micro-batch is `loss_fn(model, batch)`, a scalar tensor, where a `loss_fn` is given, whatever the
    batch is; without one the batch is a mapping and the loss is `.loss` or `["loss"]` of `model(**batch)`. It is the
    mean over the micro-batch's targets, of which `weight_fn(batch)` (default: `batches.target_counter`) says the
    number. A step's loss is the mean over all its targets, so that accumulated micro-batches equal one large batch.

    With several `processes` each accumulates its own micro-batches; loss and gradients of all are summed in `measure`. Where
    parameters are sharded, the sums of their gradients are made by FSDP as the backward pass goes on.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        loss_fn: LossFunction | None,
        weight_fn: Callable[[Any], float] | None,
        processes: Processes = ALONE,
        sharded: bool = False,
    ) -> None:
        self.device = device
        self._processes, self._sharded = processes, sharded
        self.bf16 = config.autocast_to_bf16(device)
        self._max_norm = config.max_grad_norm
        self._loss_fn = loss_fn
        already = hasattr(model, "_orig_mod")
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._run: Any = model
        if config.compile and not already:
            self._run = torch.compile(model, dynamic=config.dynamic)
        self.compiled = already or config.compile
        self._weight_fn = weight_fn or target_counter(self._model)
        # Reading a number from a GPU waits for it, so there the host looks at several steps together. Until then `_bad`
        # holds: a bad step's update does not happen, and if bad steps stop the run none after it does either. Only torch's
        # own optimizer can leave a step out on the device.
        self.looks_late = device.type == "cuda" and config.optimizer == "adamw"
        self._bad = torch.zeros((), device=device)
        self._stays_bad = config.on_nonfinite == "stop"

    def describe(self, batch: Any) -> MicroBatch:
        """The micro-batch with its weight. Counted before it moves to the device, which is then not waited for."""
        weight = float(self._weight_fn(batch))
        if not math.isfinite(weight) or weight < 0:
            raise RosaError(f"weight_fn gave {weight}: it must give the number of targets of the micro-batch")
        return MicroBatch(batch, weight, count_tokens(batch))

    def loss(self, batch: Any) -> Tensor:
        """The scalar mean loss of one micro-batch."""
        batch = to_device(batch, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self._loss_fn is not None:
                loss: Any = self._loss_fn(self._run, batch)
                source = "loss_fn"
            elif isinstance(batch, Mapping):
                output = self._run(**batch)
                loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
                source = f"{type(self._model).__name__}'s output"
            else:
                raise RosaError(
                    f"a micro-batch is a {type(batch).__name__}: without loss_fn it must be a mapping of the model's "
                    "arguments; else pass loss_fn, for example "
                    "loss_fn=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"
                )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss).__name__)
            raise RosaError(
                f"the loss from {source} is {found}: it must be a tensor with one number"
                + ("" if self._loss_fn else '; does the batch hold "labels"?')
            )
        return loss.reshape(())

    def accumulate(self, group: Sequence[MicroBatch]) -> Tensor:
        """Forward and backward of every micro-batch; returns the step's loss, still on the device."""
        total = group[0].of or sum(micro.weight for micro in group)
        # FSDP takes the mean over processes where a sum is wanted.
        times = self._processes.size if self._sharded else 1
        step_loss = torch.zeros((), device=self.device)
        for micro in group:
            loss = self.loss(micro.batch)
            if not loss.requires_grad:
                raise RosaError(
                    "the loss does not depend on any trainable parameter: does the model use the weights that were "
                    "transformed, and does loss_fn avoid .item() and torch.no_grad()?"
                )
            share = micro.weight / total
            (loss.float() * (share * times)).backward()
            step_loss += loss.detach().float() * share
        return step_loss

    def measure(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Outcome:
        """Gradient norm before clipping, and what the host will need to know of the step."""
        own = loss.clone()
        if not self._processes.alone:
            self._processes.sum_(loss)
            plain = [p for p in optimizer_parameters(optimizer) if p.requires_grad and not is_sharded(p)]
            average_(plain, self._processes, share=None if self._sharded else 1.0)
        norm = gradient_norm(optimizer, self.device)
        values = torch.stack([loss.float(), norm.total.float(), norm.first_bad.float()])
        return Outcome(values, norm, own)

    def update(self, outcome: Outcome, optimizer: torch.optim.Optimizer) -> None:
        """Clip and step. Where the host looks late, a bad step updates nothing."""
        clip(outcome.norm, self._max_norm)
        if self.looks_late:
            bad = (~outcome.values[:2].isfinite().all()).float()
            self._bad = torch.maximum(self._bad, bad) if self._stays_bad else bad
            # What torch's own gradient scaler sets: the fused kernel then skips the update without asking the host.
            setattr(optimizer, "found_inf", self._bad)  # noqa: B010
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, batches: Any, between: Callable[[], None] = lambda: None) -> float:
        """Mean loss over all targets of `batches`; the model's mode and all random states stay as they were.

        `between` is called before each micro-batch and may raise.
        """
        losses: list[Tensor] = []
        weights: list[float] = []
        last: MicroBatch | None = None
        seen = 0
        training = self._model.training
        with untouched():
            self._model.eval()
            try:
                for batch in batches:
                    between()
                    micro = self.describe(batch)
                    if micro.weight:
                        if seen % self._processes.size == self._processes.rank:
                            losses.append(self.loss(micro.batch).float())
                            weights.append(micro.weight)
                        last, seen = micro, seen + 1
                if last is not None and self._sharded and self._processes.rank >= seen % self._processes.size > 0:
                    self.loss(last.batch)  # the others compute one more, and need the shards that are here
            finally:
                self._model.train(training)
        if last is None:
            raise RosaError("eval_batches holds no target: pass at least one micro-batch whose labels are not all -100")
        numbers = torch.stack(losses).tolist() if losses else []
        sums = self._processes.totals([math.fsum(w * x for w, x in zip(weights, numbers)), math.fsum(weights)])
        return sums[0] / sums[1]


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """The model in training mode and, if it is one of transformers', without its key-value cache; restored after."""
    modes = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    # Training never reads the cache, which would be an output of the compiled graph and live as long as the logits.
    cached = getattr(config, "use_cache", None) is True
    try:
        if cached:
            setattr(config, "use_cache", False)  # noqa: B010
        model.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if cached:
            setattr(config, "use_cache", True)  # noqa: B010
