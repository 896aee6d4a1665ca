"""Two small records of a run: `run.json`, what was run and where, and `best`, the best adapter so far."""

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rosa_fx import __version__, atomic
from rosa_fx.adapter_files import save_adapter
from rosa_fx.errors import RosaError
from rosa_fx.state import state_of
from rosa_fx.training import checkpoint as checkpoints
from rosa_fx.training.metrics import MetricsLog
from rosa_fx.training.run_state import RunState

RUN = "run.json"
BEST = "best"
EVALUATION = "evaluation.json"


def remove_leftovers(out: Path) -> None:
    """Remove what a run that was killed left half-written in its folder (checkpoints look after their own)."""
    atomic.remove_leftovers(out, ("metrics.jsonl", RUN, BEST, "adapter"))
    atomic.remove_leftovers(out / BEST, (EVALUATION,))


def find_checkpoint(run: RunState, out: Path | None, metrics: MetricsLog, resume: bool) -> checkpoints.Checkpoint | None:
    """The checkpoint to continue from. The folder then holds nothing of what came after it.

    Of several processes one looks and tidies up, and the others read what it found.
    """
    if out is None:
        return None
    folder, found = out / "checkpoints", None

    def look() -> Path | None:
        nonlocal found
        used = checkpoints.list_checkpoints(folder) or (metrics.path and metrics.path.exists())
        if used and not resume:
            raise RosaError(f"out ({out}) already holds a run: pass resume=True to continue it, or another folder")
        found = checkpoints.load_latest(folder, run.message) if resume else None
        remove_leftovers(out)
        evals = [int(step) for step in found.state["evals"]] if found else []
        metrics.truncate(found.step if found else -1, evals)
        checkpoints.prune(folder, run.config.keep_checkpoints)  # a kill may have come just before that
        return None if found is None else found.path

    path = run.processes.on_first(look)
    return checkpoints.load(path) if found is None and path is not None else found


def write_run(out: Path, run: RunState) -> None:
    """Write `out/run.json`: spec, settings, versions, machine, the rewritten weights, and when each part began."""
    file = out / RUN
    parts = [*_earlier_parts(file, run.step), {"after_step": run.step, "began": _now()}]
    document: dict[str, Any] = {
        "format": "rosa_fx run",
        "version": 1,
        "versions": {"rosa_fx": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "system": platform.platform(),
            "device": str(run.device),
            "gpu": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
        },
        "model": type(run.model).__name__,
        "spec": json.loads(run.spec.to_json()),
        "config": run.config.to_dict(),
        "planned": run.planned,
        "parameters": {g["name"]: sum(p.numel() for p in g["params"]) for g in run.optimizer.param_groups},
        "weights": {
            name: {
                "shape": list(weight.shape),
                "matrix": list(weight.matrix),
                "base": weight.base.format.kind,
                "scale": weight.scale,
            }
            for name, weight in state_of(run.model).weights.items()
        },
        "parts": parts,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic.write_text(file, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise RosaError(f"could not write {file}: {error}; free space or choose another out") from error


def save_best(model: nn.Module, out: Path, step: int, loss: float, writes: bool = True) -> None:
    """Save the adapter to `out/best` in place of the one that is there, and its evaluation beside it.

    At every moment the old or the new adapter can be loaded. The evaluation goes first and comes last, so that it never
    stands beside another adapter than its own. Of a sharded model every process must call it, of which one `writes`.
    """
    folder = out / BEST
    try:
        if writes:
            (folder / EVALUATION).unlink(missing_ok=True)
        save_adapter(model, folder)
        if writes:
            atomic.write_text(folder / EVALUATION, json.dumps({"step": step, "loss": loss}) + "\n")
    except OSError as error:
        raise RosaError(f"could not write {folder}: {error}; free space or choose another out") from error


def _earlier_parts(file: Path, step: int) -> list[dict[str, Any]]:
    """The parts that led to `step`; none if the file is not there or cannot be read, for it is only a record."""
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
        return [part for part in parts if step and part["after_step"] <= step]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
