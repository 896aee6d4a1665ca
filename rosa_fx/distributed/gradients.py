"""Gradients averaged over processes, for adapters that no wrapper looks after.

`DistributedDataParallel` decides once, when it is made, whose gradients it averages: sparse values are frozen then, and train
later. They are averaged here, at the end of each backward pass. DDP is told to leave them alone for good, and not to send the
frozen bases and masks from process to process at every step, as it does with buffers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rosa_fx.distributed.processes import Processes
from rosa_fx.weight import RosaWeight

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # what DDP reads, see torch/nn/parallel/distributed.py
_OWN = re.compile(r"(^|\.)parametrizations\.\w+\.0\.(base|sparse)\.")


def hide_from_ddp(model: nn.Module, weights: Iterable[RosaWeight]) -> None:
    """Let DDP pass over sparse values, masks and bases. `show_to_ddp` takes it back."""
    names = _own_names(model, weights)
    setattr(model, _IGNORED, [*(name for name in getattr(model, _IGNORED, ()) if name not in names), *sorted(names)])


def show_to_ddp(model: nn.Module) -> None:
    """Undo `hide_from_ddp`, when the weights have left the model."""
    rest = [name for name in getattr(model, _IGNORED, ()) if not _OWN.search(name)]
    if rest:
        setattr(model, _IGNORED, rest)
    elif hasattr(model, _IGNORED):
        delattr(model, _IGNORED)


def _own_names(model: nn.Module, weights: Iterable[RosaWeight]) -> set[str]:
    own = {id(weight) for weight in weights}
    names = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in own:
            assert isinstance(module, RosaWeight)
            names |= {f"{path}.{name}" for name, _ in module.named_buffers()}
            if module.sparse is not None:
                names.add(f"{path}.sparse.values")
    # A model is compiled before it is wrapped, or after.
    return names | {f"_orig_mod.{name}" for name in names}


def without_ddp(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel`, compiled or not, or else the model."""
    found = getattr(model, "_orig_mod", model)
    return found.module if isinstance(found, nn.parallel.DistributedDataParallel) else model


@torch.no_grad()
def average_(parameters: Sequence[nn.Parameter], processes: Processes, share: float | None = None) -> None:
    """Replace the gradients of `parameters` by their mean over all processes (`share`: by their sum times that).

    One call for all of a dtype. A process that has no gradient where others have one counts as zero; where none has one, none
    gets one. The same parameters must be given in all processes.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for (dtype, device), members in groups.items():
        flags = torch.tensor([float(p.grad is not None) for p in members], device="cpu")
        # The flags travel along: whether a gradient exists is then known without a second call.
        parts = [flags.to(device, dtype), *(_flat_gradient(parameter) for parameter in members)]
        total = processes.sum_(torch.cat(parts))
        exists = None if bool(flags.all()) else total[: len(members)].tolist()
        total *= 1 / processes.size if share is None else share
        start = len(members)
        for index, parameter in enumerate(members):
            part = total[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
            if parameter.grad is not None:
                parameter.grad.copy_(part)
            elif exists is not None and exists[index] > 0:
                parameter.grad = part.clone()


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    return parameter.new_zeros(parameter.numel()) if parameter.grad is None else parameter.grad.reshape(-1)


class Averaging:
    """Averages the gradients of `values` over all processes at the end of every backward pass that reaches an adapter.

    `anchors` say that a backward pass reaches one: they belong to weights that every process uses.
    """

    def __init__(self, values: Sequence[nn.Parameter], anchors: Iterable[nn.Parameter], processes: Processes) -> None:
        self._values, self._processes, self._queued = list(values), processes, False
        self._handles = [self._watch(parameter) for parameter in (*values, *anchors)]

    def begin(self) -> None:
        """Before the backward passes of a step: one that raised may have left its mark."""
        self._queued = False

    def stop(self) -> None:
        """Do so no more."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, parameter: nn.Parameter) -> Any:
        trains = parameter.requires_grad  # torch takes hooks on nothing else; they stay for when it does
        handle = parameter.requires_grad_().register_post_accumulate_grad_hook(self._reached)
        parameter.requires_grad_(trains)
        return handle

    def _reached(self, parameter: Tensor) -> None:
        if not self._queued:
            self._queued = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._average)

    def _average(self) -> None:
        self._queued = False
        trainable = [parameter for parameter in self._values if parameter.requires_grad]
        if trainable:
            average_(trainable, self._processes)
