"""A run as a checkpoint, and a checkpoint as a run."""

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rosa_fx.adapters import adapter_state, load_adapter_state
from rosa_fx.errors import RosaError
from rosa_fx.training import rng
from rosa_fx.training.checkpoint import Checkpoint, split_state
from rosa_fx.training.config import IDENTITY
from rosa_fx.training.optim import load_optimizer_state, optimizer_state, parameter_names
from rosa_fx.training.run_state import RunState


def snapshot(run: RunState) -> Checkpoint:
    """The run as it was at its last whole step. In several processes a collective call, which gives all of them the same."""
    mark, processes = run.mark, run.processes
    schedule = mark.schedule if processes.alone else run.schedule.shared_state(mark.schedule)
    schedule_tensors, schedule_values = split_state(schedule)
    (random_tensors, random_values), *others = processes.gather(mark.random)
    for rank, (tensors_of, _) in enumerate(others, 1):
        random_tensors = random_tensors | {f"rank{rank}.{name}": tensor for name, tensor in tensors_of.items()}
    optimizer_tensors, optimizer_values = optimizer_state(run.optimizer, parameter_names(run.model, run.optimizer))
    tensors = {
        "adapter": adapter_state(run.model),
        "optimizer": optimizer_tensors,
        "schedule": schedule_tensors,
        "random": random_tensors,
        "buffers": running_statistics(run.model),
        "metrics": {"losses": torch.tensor(run.losses, dtype=torch.float64, device="cpu")},
    }
    state: dict[str, Any] = {
        "step": mark.step,
        "epoch": mark.epoch,
        "index": mark.index,
        "restart_step": run.restart_step,
        "learning_rate_position": mark.step - (run.restart_step or 0),
        "planned": run.planned,
        "schedule": schedule_values,
        "random": random_values,
        "random_of_ranks": [values_of for _, values_of in others],
        "optimizer": optimizer_values,
        "evals": run.evals,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "spec": json.loads(run.spec.to_json()),
        "config": run.config.to_dict(),
    }
    return Checkpoint(mark.step, tensors, state)


def restore(run: RunState, found: Checkpoint) -> None:
    """Bring a fresh run to where the checkpoint was made. Raises RosaError if it belongs to another run."""
    _compare(run, found)
    state, tensors = found.state, found.tensors
    load_adapter_state(run.model, tensors["adapter"])
    run.schedule.load_state_dict({**state["schedule"], **tensors["schedule"]})
    run.optimizer = run.fresh_optimizer()
    names = parameter_names(run.model, run.optimizer)
    load_optimizer_state(run.optimizer, names, tensors["optimizer"], state["optimizer"])
    statistics = running_statistics(run.model)
    for name, value in tensors["buffers"].items():
        if name in statistics:
            statistics[name].copy_(value)
    run.step = state["step"]
    run.restart_step = state["restart_step"]
    run.losses = tensors["metrics"]["losses"].tolist()
    run.evals = {int(step): loss for step, loss in state["evals"].items()}
    run.tokens, run.seconds = state["tokens"], state["seconds"]
    run.last_checkpoint = found.path
    run.source.seek(state["epoch"], state["index"])
    _restore_random(run, tensors["random"], state)  # last: all of the above may draw random numbers
    run.mark = run.take_mark()
    run.message(f"resumed after step {run.step} from {found.path}")


def _restore_random(run: RunState, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    rank, others = run.processes.rank, state.get("random_of_ranks", [])
    if rank > len(others):
        rng.seed_all(run.config.seed, rank, run.step)  # the checkpoint was made by fewer processes
        return
    prefix = f"rank{rank}." if rank else ""
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    rng.restore(mine, others[rank - 1] if rank else state["random"])


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """What training changes besides parameters: the running statistics of normalisation layers."""
    return {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        if isinstance(module, _NormBase) and module.track_running_stats
        for name, buffer in module.named_buffers(recurse=False)
    }


def _compare(run: RunState, found: Checkpoint) -> None:
    state = found.state
    spec = json.loads(run.spec.to_json())
    if spec != state["spec"]:
        changed = sorted(k for k in spec.keys() | state["spec"].keys() if spec.get(k) != state["spec"].get(k))
        raise RosaError(
            f"the checkpoint {found.path} was made with another spec ({', '.join(changed)} differ): "
            "transform the model with the same spec, or train into another out folder"
        )
    differences = run.config.differences(state["config"])
    for name, (stored, here) in differences.items():
        if name in IDENTITY:
            raise RosaError(
                f"TrainConfig.{name} is {here!r}, but the checkpoint {found.path} was made with {stored!r}: "
                "use the same value to resume, or train into another out folder"
            )
        run.message(f"TrainConfig.{name} was {stored!r} and is now {here!r}: the run goes on with the new value")
    if run.planned != state["planned"] and not differences:
        run.message(f"the run was planned for {state['planned']} steps and now has {run.planned}: is it the same data?")
