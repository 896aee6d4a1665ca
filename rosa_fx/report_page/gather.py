"""What a run's folder holds, read for its page: metrics, settings, and the newest adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rosa_fx import adapter_format
from rosa_fx.errors import RosaError
from rosa_fx.report_page.layers import Layer, layers_of
from rosa_fx.spec import RosaSpec
from rosa_fx.training import checkpoint as checkpoints
from rosa_fx.training.metrics import read_metrics
from rosa_fx.training.records import RUN


@dataclass(frozen=True)
class RunData:
    """`steps` and `evals` are rows of metrics.jsonl; `run` is run.json, empty if it is missing; `source` names where the
    adapter was found ("" if there is none yet); `notes` says what could not be read."""

    folder: Path
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    run: dict[str, Any]
    layers: list[Layer]
    source: str
    notes: list[str] = field(default_factory=list)


def gather(folder: Path) -> RunData:
    """Read a run's folder. Raises RosaError if there is no run in it; files that are damaged are left out and noted."""
    if not folder.is_dir():
        raise RosaError(f"{str(folder)!r} is no folder: name the --out of a run")
    notes: list[str] = []
    rows = []
    try:
        if (folder / "metrics.jsonl").is_file():
            rows = read_metrics(folder / "metrics.jsonl")
    except (OSError, ValueError) as error:
        notes.append(f"metrics.jsonl cannot be read: {error}")
    run = _json(folder / RUN, notes)
    tensors, source, spec = _adapter(folder, notes)
    if not rows and not tensors:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise RosaError(
            f"{str(folder)!r} holds no run: neither metrics.jsonl with a step nor an adapter{why}; name the --out of a run"
        )
    weights = run.get("weights") if isinstance(run.get("weights"), dict) else {}
    known = {name: entry for name, entry in (weights or {}).items() if isinstance(entry, dict)}
    shapes = {name: (e["matrix"][0], e["matrix"][1]) for name, e in known.items() if len(e.get("matrix") or ()) == 2}
    scales = {name: float(e["scale"]) for name, e in known.items() if isinstance(e.get("scale"), (int, float))}
    for key, tensor in tensors.items():
        if spec is not None and key.endswith(".low_rank.A"):
            scales.setdefault(key.removesuffix(".low_rank.A"), spec.scale(tensor.shape[-2]))
    return RunData(
        folder=folder,
        steps=[row for row in rows if row["event"] == "step"],
        evals=[row for row in rows if row["event"] == "eval"],
        run=run,
        layers=layers_of(tensors, shapes, scales),
        source=source,
        notes=notes,
    )


def _adapter(folder: Path, notes: list[str]) -> tuple[Mapping[str, Tensor], str, RosaSpec | None]:
    """The adapter of the newest checkpoint that can be read, else the one that was saved at the end."""
    for path in reversed(checkpoints.list_checkpoints(folder / "checkpoints")):
        if not (path / checkpoints.MANIFEST).is_file():
            continue
        try:
            found = checkpoints.load(path, ("adapter",))
            spec = RosaSpec.from_json(json.dumps(found.state["spec"]))
            return found.tensors.get("adapter", {}), f"the checkpoint after step {found.step}", spec
        except RosaError as error:
            notes.append(str(error))
    if (folder / "adapter").is_dir():
        try:
            files = adapter_format.read(folder / "adapter")
            return files.tensors, "the saved adapter", files.spec
        except RosaError as error:
            notes.append(str(error))
    return {}, "", None


def _json(file: Path, notes: list[str]) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{file.name} cannot be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}
