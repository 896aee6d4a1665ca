"""Micro-batches in a reproducible order, and what one of them weighs."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from rosa_fx.errors import RosaError
from rosa_fx.training.config import TrainConfig
from rosa_fx.training.rng import Stream

IGNORED = -100  # the label that PyTorch's and Hugging Face's cross entropy leave out


class BatchSource:
    """Where the next micro-batch comes from; its position is (epoch, index) and can be sought.

    - a sequence (`__len__` and `__getitem__`): each epoch in its own order, a permutation from (seed, epoch);
    - a DataLoader: its own shuffling, whose generator is seeded from (seed, epoch) at each epoch's start;
    - any other re-iterable: iterated again for each epoch, in the order in which it comes;
    - an iterator (`iter(x) is x`): one pass; seeking skips what was consumed before.

    Batches are drawn under a random stream of their own, so that random augmentation repeats exactly on resume and the
    model's random numbers do not depend on how batches are made.
    """

    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        if isinstance(batches, (Mapping, str, bytes, Tensor)) or not (
            hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
        ):
            raise RosaError(
                f"batches is a {type(batches).__name__}: pass a list, a DataLoader or another iterable of micro-batches"
            )
        self._batches: Any = batches
        self._seed = seed
        self._is_loader = isinstance(batches, DataLoader)
        sized = hasattr(batches, "__len__") and hasattr(batches, "__getitem__")
        self.is_sequence = sized and not self._is_loader
        # With this sampler every process has a share of its own.
        self.split = self._is_loader and isinstance(getattr(batches, "sampler", None), DistributedSampler)
        self.one_shot = isinstance(batches, Iterator)
        self.length = _length(batches)
        if self.length == 0:
            raise RosaError("batches is empty: training needs at least one micro-batch")
        self.epoch, self.index = 0, 0
        self._iterator: Iterator[Any] | None = None

    def count_steps(self, config: TrainConfig, processes: int = 1) -> int:
        """Optimizer steps of a run of so many processes over this source; RosaError if they cannot be known."""
        if config.max_steps is not None:
            return config.max_steps
        if self.length is None:
            raise RosaError(
                "the number of batches is unknown, so the learning-rate schedule has no end: set TrainConfig.max_steps "
                "(or pass a list)"
            )
        if self.one_shot and config.epochs > 1:
            raise RosaError(f"TrainConfig.epochs is {config.epochs}, but an iterator has one pass: pass a list")
        each = config.gradient_accumulation * (1 if self.split else processes)
        return config.epochs * math.ceil(self.length / each)

    def seek(self, epoch: int, index: int) -> None:
        """Go to micro-batch `index` of `epoch`; those before it are skipped."""
        if self.one_shot and (epoch, index) < (self.epoch, self.index):
            raise RosaError("batches is an iterator, which cannot go back: pass a list or another re-iterable")
        skip = index - self.index if self.one_shot else index
        if not self.one_shot:
            self._iterator = None
        self.epoch, self.index = epoch, index
        if not self.is_sequence:
            for _ in range(skip):
                if self._draw() is _END:
                    raise RosaError(
                        f"batches ended within the first {index} micro-batches that the checkpoint has already used: "
                        "pass the same data from its beginning"
                    )

    def next_epoch(self) -> bool:
        """Begin the next pass; False where there is none (an iterator)."""
        if self.one_shot:
            return False
        if self.index == 0:
            raise RosaError("batches gives no micro-batch: it may be exhausted; pass a list or a fresh iterable")
        self._iterator = None
        self.epoch, self.index = self.epoch + 1, 0
        return True

    def take(self) -> Any:
        """The next micro-batch of this epoch, or `END`."""
        batch = self._draw()
        if batch is not _END:
            self.index += 1
        return batch

    def fetch(self, index: int) -> Any:
        """Micro-batch `index` of this epoch, of a sequence, wherever the source stands."""
        # One stream per micro-batch: a position can then be sought without making those before it.
        with Stream(self._seed, self.epoch, index).use():
            return self._batches[self._order()[index]]

    def _draw(self) -> Any:
        if self.is_sequence:
            return self.fetch(self.index) if self.index < (self.length or 0) else _END
        if self._iterator is None:
            self._stream = Stream(self._seed, self.epoch)
            self._seed_loader()
            with self._stream.use():
                self._iterator = iter(self._batches)
        with self._stream.use():
            return next(self._iterator, _END)

    def _order(self) -> list[int]:
        if getattr(self, "_order_of", None) != self.epoch:
            generator = torch.Generator("cpu")
            generator.manual_seed(self._seed * 1_000_003 + self.epoch)
            self._permutation: list[int] = torch.randperm(self.length or 0, generator=generator, device="cpu").tolist()
            self._order_of = self.epoch
        return self._permutation

    def _seed_loader(self) -> None:
        if not self._is_loader:
            return
        samplers: list[Any] = [getattr(self._batches, "sampler", None)]
        samplers.append(getattr(getattr(self._batches, "batch_sampler", None), "sampler", None))
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        for owner in (self._batches, *samplers):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(self._seed * 1_000_003 + self.epoch)


_END = object()
END = _END


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # no __len__, or a DataLoader over an iterable data set
        return None


def count_tokens(batch: Any) -> int | None:
    """Input tokens of a micro-batch, without padding; None where the batch does not say."""
    if isinstance(batch, Mapping):
        for name in ("attention_mask", "input_ids"):
            value = batch.get(name)
            if isinstance(value, Tensor):
                # A float or 4-D attention mask is not a padding mask.
                if name == "input_ids":
                    return value.numel()
                if value.dim() == 2 and not value.is_floating_point():
                    return int(value.sum())
    return None


def target_counter(model: nn.Module) -> Callable[[Any], float]:
    """How many targets the mean loss of `model` is taken over, as a function of the micro-batch.

    A mapping with a tensor "labels": the labels that are not -100, without the first column where the model is one of
    transformers' causal language models (their loss shifts the labels). Floating-point labels: their rows. Else 1.
    """
    shift = _shifts_labels(model)

    def count(batch: Any) -> float:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            return 1.0
        if labels.is_floating_point():
            return float(labels.shape[0] if labels.dim() else 1)
        if shift and labels.dim() >= 2:
            labels = labels[..., 1:]
        return float((labels != IGNORED).sum())

    return count


def _shifts_labels(model: nn.Module) -> bool:
    if not hasattr(model, "loss_type"):  # not one of transformers' models
        return False
    name = type(model).__name__
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return "ForCausalLM" in name or "LMHead" in name or ("ForConditionalGeneration" in name and not encoder_decoder)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`: mappings, tuples and lists are followed, other things are left."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if device.type == "cpu":  # nothing to move, and the user's own batch classes stay what they are
        return batch
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch.to(device) if hasattr(batch, "to") else batch
