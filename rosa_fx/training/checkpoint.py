"""Checkpoints: a directory `step-N` of safetensors and JSON files that either is there whole or is not there."""

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rosa_fx.atomic import json_digest, new_directory, plain_tensors, remove_directory, sha256
from rosa_fx.errors import RosaError

VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"\.step-\d+\.(new|old)-\d+")


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: named groups of tensors (one file each) and one JSON document."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path | None = None


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-N` durably, then remove all but the newest `keep`; returns its path.

    Everything is written and flushed to disk in a hidden directory beside it, which is then renamed. Old checkpoints go
    only after that, each by a rename first, so that an interrupted removal leaves no damaged `step-N` behind.
    """
    final = folder / f"step-{checkpoint.step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new_directory(final, replace=True) as new:
            for name, tensors in checkpoint.tensors.items():
                save_file(plain_tensors(tensors), new / f"{name}.safetensors")
            (new / STATE).write_text(json.dumps(checkpoint.state, indent=1), encoding="utf-8")
            digests = {file.name: sha256(file) for file in sorted(new.iterdir())}
            manifest: dict[str, Any] = {"version": VERSION, "step": checkpoint.step, "sha256": digests}
            manifest["checksum"] = json_digest(manifest)
            (new / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise RosaError(f"could not write the checkpoint {final}: {error}; free space or choose another out") from error
    prune(folder, keep)
    return final


def prune(folder: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` whole checkpoints."""
    found = list_checkpoints(folder)
    whole = [path for path in found if (path / MANIFEST).is_file()]
    for old in found[: found.index(whole[-keep])] if len(whole) >= keep else ():
        remove_directory(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := _STEP.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def load_latest(folder: Path, message: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None. Half-written ones are passed over with a message.

    Raises RosaError naming the file if the newest whole checkpoint is damaged.
    """
    if folder.is_dir():
        for leftover in sorted(p for p in folder.iterdir() if _LEFTOVER.fullmatch(p.name)):
            message(f"ignored the half-written checkpoint {leftover} and removed it")
            shutil.rmtree(leftover, ignore_errors=True)
    for path in reversed(list_checkpoints(folder)):
        if (path / MANIFEST).is_file():
            return load(path)
        message(f"ignored the checkpoint {path}, which was not written to its end (no {MANIFEST})")
    return None


def load(path: Path, groups: Collection[str] | None = None) -> Checkpoint:
    """Read and verify one checkpoint, or only some of its groups of tensors; RosaError that names the file if it is damaged."""
    manifest = _read_json(path / MANIFEST)
    digests = manifest.get("sha256")
    checksum = manifest.pop("checksum", None)
    if manifest.get("version") != VERSION or not isinstance(digests, dict) or STATE not in digests:
        version = manifest.get("version")
        raise _damaged(path / MANIFEST, f"version {version!r} (this release reads {VERSION}) or fields missing")
    if checksum != json_digest(manifest):
        raise _damaged(path / MANIFEST, "its checksum differs")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, digest in digests.items():
        file = path / name
        if groups is not None and file.suffix == ".safetensors" and file.stem not in groups:
            continue
        if not file.is_file():
            raise _damaged(file, "it is missing")
        if sha256(file) != digest:
            raise _damaged(file, "its content is not what was written")
        if file.suffix == ".safetensors":
            try:
                tensors[file.stem] = load_file(file)
            except (SafetensorError, OSError) as error:
                raise _damaged(file, str(error)) from error
    return Checkpoint(manifest["step"], tensors, _read_json(path / STATE), path)


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A flat state dict parted into its tensors and its JSON values."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in state.items() if key not in tensors}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(file, "it is not a JSON object")
    return value


def _damaged(file: Path, why: str) -> RosaError:
    return RosaError(
        f"the checkpoint file {file} is damaged: {why}. Remove the folder {file.parent} to resume from an older one"
    )
