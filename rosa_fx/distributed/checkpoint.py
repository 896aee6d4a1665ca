"""Training state in a loop of one's own, saved by `torch.distributed.checkpoint`: each process writes what it holds.

Everything has the name that it has in one process, whole tensors and shards alike, so that any number of processes, sharded or
not, can go on with it. Settings are JSON text in a tensor; nothing of rosa_fx's is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rosa_fx.adapters import adapter_tensors
from rosa_fx.distributed.processes import Processes, processes_of
from rosa_fx.distributed.tensors import local, reshard
from rosa_fx.errors import RosaError
from rosa_fx.schedule import MaskSchedule
from rosa_fx.state import state_of

VERSION = 1
_SETTINGS = "settings"


def save_training_state(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: MaskSchedule,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save adapters, masks, the optimizer's state and the schedule, between two steps. Every process must call.

    The frozen base is not saved. `folder` holds a whole checkpoint once it holds the file `.metadata`, which comes last.

    Args:
        folder: a new one, which all processes reach.
        model: transformed; alone, under DDP or sharded by FSDP2.
        optimizer: of torch, over the adapter parameters (`trainable_parameters`, `optimizer_for`).
        schedule: the one that drives the model.
        extra: JSON values of yours, such as the position in the data; those of rank 0 are kept.

    Raises:
        RosaError: the folder holds a checkpoint already; the optimizer has other parameters than adapters; `extra` is no JSON.
    """
    path, processes = Path(folder), processes_of()
    processes.on_first(lambda: _refuse_used(path))
    tensors, values = _optimizer_entries(model, optimizer)
    saved = schedule.state_dict()
    settings = {
        "version": VERSION,
        "spec": json.loads(state_of(model).spec.to_json()),
        "schedule": {key: value for key, value in saved.items() if not isinstance(value, Tensor)},
        "optimizer": values,
        "extra": dict(extra or {}),
    }
    try:
        text = processes.gather(json.dumps(settings))[0].encode()
    except TypeError as error:
        raise RosaError(f"extra holds something that JSON cannot: {error}") from error
    state = {f"adapter/{key}": tensor for key, tensor in adapter_tensors(model).items()}
    state |= {f"optimizer/{key}": tensor for key, tensor in tensors.items()}
    state |= {f"schedule/{key}": value for key, value in saved.items() if isinstance(value, Tensor)}
    state[_SETTINGS] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=processes.alone)


def load_training_state(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, schedule: MaskSchedule
) -> dict[str, Any]:
    """Go on from `save_training_state`, in any number of processes; returns its `extra`. Every process must call.

    Args:
        folder: what `save_training_state` wrote.
        model: the same model, transformed with the same spec, whether it is sharded as it was then or not.
        optimizer, schedule: fresh ones for this model.

    Raises:
        RosaError: no whole checkpoint, or one of another spec, schedule or optimizer. Then nothing has changed.
    """
    path, processes = Path(folder), processes_of()
    if not (path / ".metadata").is_file():
        raise RosaError(f"{path} holds no whole checkpoint: it has no .metadata; name one that save_training_state finished")
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    settings = _settings(path, stored, processes)
    spec = json.loads(state_of(model).spec.to_json())
    if settings["spec"] != spec:
        changed = sorted(key for key in spec if settings["spec"].get(key) != spec[key])
        raise RosaError(f"{path} was made with another spec ({', '.join(changed)} differ): transform the model with that one")
    schedule.check_state(settings["schedule"])
    live = {f"adapter/{key}": tensor for key, tensor in adapter_tensors(model).items()}
    parameters = _parameters(model, optimizer)
    wanted: dict[str, Tensor] = {}
    for key, entry in stored.items():
        if key != _SETTINGS and isinstance(entry, TensorStorageMetadata):
            wanted[key] = _empty(path, key, entry, live, parameters)
    missing = sorted(live.keys() - wanted.keys())
    if missing:
        raise RosaError(f"{path} does not hold {missing[0]}: it was made for another model")
    dcp.load(wanted, storage_reader=reader, no_dist=processes.alone)
    with torch.no_grad():
        for key, tensor in live.items():
            local(tensor).copy_(local(wanted[key]))
    for weight in state_of(model).weights.values():
        weight.follow_mask()
    tensors = {key.removeprefix("schedule/"): tensor for key, tensor in wanted.items() if key.startswith("schedule/")}
    schedule.load_state_dict({**settings["schedule"], **tensors})
    tensors = {key.removeprefix("optimizer/"): tensor for key, tensor in wanted.items() if key.startswith("optimizer/")}
    _load_optimizer(optimizer, parameters, tensors, settings["optimizer"])
    extra: dict[str, Any] = settings["extra"]
    return extra


def _refuse_used(path: Path) -> None:
    if (path / ".metadata").exists():
        raise RosaError(f"{path} holds a checkpoint already: name a new folder, for example by the step")


def _settings(path: Path, stored: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    entry = stored.get(_SETTINGS)
    if not isinstance(entry, TensorStorageMetadata):
        raise RosaError(f"{path} was not written by rosa_fx.save_training_state")
    text = {_SETTINGS: torch.empty(entry.size, dtype=torch.uint8, device="cpu")}
    dcp.load(text, storage_reader=dcp.FileSystemReader(path), no_dist=processes.alone)
    settings: dict[str, Any] = json.loads(text[_SETTINGS].numpy().tobytes())
    if settings["version"] != VERSION:
        raise RosaError(f"{path} has the version {settings['version']!r}, this rosa_fx reads {VERSION}")
    return settings


def _empty(
    path: Path, key: str, entry: TensorStorageMetadata, live: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> Tensor:
    """Where a stored tensor is read to: sharded like the parameter that it belongs to."""
    part, _, rest = key.partition("/")
    example: Tensor | None = live.get(key)
    if part == "optimizer":
        example = parameters.get(rest.partition("/")[0])
    if example is None and part != "schedule":
        raise RosaError(f"{path} holds {key}, which this model or optimizer lacks: transform with the same spec first")
    if example is not None and (part == "adapter" or entry.size == example.shape):
        if entry.size != example.shape:
            raise RosaError(f"{path}: {key} has the shape {list(entry.size)}, in this model {list(example.shape)}")
        return torch.empty_like(example.detach(), dtype=entry.properties.dtype)
    device = "cpu" if example is None or not entry.size else example.device
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=device)


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    reshard(model)
    names = {
        id(parameter): f"{weight}.{name}"
        for weight, terms in state_of(model).weights.items()
        for name, parameter in terms.named_parameters()
    }
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in names for parameter in held):
        raise RosaError(
            "the optimizer has parameters that are no adapter's: make it from rosa_fx.trainable_parameters(model), after "
            "fully_shard where the model is sharded"
        )
    return {names[id(parameter)]: parameter for parameter in held}


def _optimizer_entries(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in _parameters(model, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, dict):
                raise RosaError(f"the state of {type(optimizer).__name__} is nested ({key}): use an optimizer of torch")
            place: dict[str, Any] = tensors if isinstance(value, Tensor) else numbers
            place[f"{name}/{key}"] = value
    groups = [
        {
            key: value
            for key, value in group.items()
            if isinstance(value, (int, float, str, bool, tuple, list)) and key != "params"
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"numbers": numbers, "groups": groups}


def _load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    index_of = {name: index for index, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values["numbers"]}.items():
        name, _, entry = key.partition("/")
        state.setdefault(index_of[name], {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, values["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items() if key in group})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
