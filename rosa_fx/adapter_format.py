"""The adapter directory on disk: `adapter_config.json` and `adapter_model.safetensors`.

The configuration holds the spec, one entry per weight, the size and checksum of the tensor file, and a checksum of
itself; so a pair of files that belongs together is known from one that does not. Saving over an adapter goes through a
hidden directory `PENDING` inside: both new files are written there and then renamed over the old ones, one after the
other. Whenever that is interrupted, one whole pair is left among the four places, and `read` finds it, without writing.
Other files in the directory are never touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rosa_fx.atomic import flush, flush_directory, new_directory, plain_tensors, sha256
from rosa_fx.errors import RosaError
from rosa_fx.spec import RosaSpec

FORMAT = "rosa_fx adapter"
VERSION = 1
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PENDING = ".adapter.new"


@dataclasses.dataclass(frozen=True)
class WeightEntry:
    """What the configuration says of one weight. `fingerprint` is None where the base is not known.

    `shape` is that of the parameter, `matrices` (E, N, K) those that it is read as: (1, N, K) for a matrix, whose factors are
    A [R, K] and B [N, R]; more are a stack with A [E, R, K] and B [E, N, R].
    """

    shape: tuple[int, ...]
    matrices: tuple[int, int, int]
    rank: int
    nnz: int
    base: dict[str, Any]
    dtype: str
    has_mask: bool
    fingerprint: str | None

    @staticmethod
    def from_json(where: str, value: object) -> WeightEntry:
        """The entry that `dataclasses.asdict` gave. RosaError, beginning with `where`, if it is none."""
        types = {"shape": list, "matrices": list, "rank": int, "nnz": int, "base": dict, "dtype": str, "has_mask": bool}
        types["fingerprint"] = str | type(None)  # type: ignore[assignment]
        if isinstance(value, dict) and isinstance(value.get("shape"), list) and len(value["shape"]) == 2:
            # Files of before there were stacks do not say it.
            value = {"matrices": [1, *value["shape"]], **value}
        if not isinstance(value, dict) or value.keys() != types.keys():
            raise RosaError(f"{where} must have the fields {', '.join(types)}, got {value!r}")
        for name, expected in types.items():
            if not isinstance(value[name], expected):
                raise RosaError(f"{where}: {name} has the bad value {value[name]!r}")
        shape, matrices = value["shape"], value["matrices"]
        if len(shape) < 2 or not all(isinstance(size, int) for size in shape):
            raise RosaError(f"{where}: shape must be [N, K] or have more dimensions, got {shape!r}")
        if len(matrices) != 3 or not all(isinstance(size, int) for size in matrices):
            raise RosaError(f"{where}: matrices must be [E, N, K], got {matrices!r}")
        if math.prod(matrices) != math.prod(shape):
            raise RosaError(f"{where}: matrices {matrices!r} are not what a parameter of shape {shape!r} holds")
        return WeightEntry(**{**value, "shape": tuple(shape), "matrices": tuple(matrices)})


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """A verified adapter: `weights` by weight name, `tensors` by the keys of `rosa_fx.adapter_state`."""

    folder: Path
    spec: RosaSpec
    weights: dict[str, WeightEntry]
    tensors: dict[str, Tensor]


def write(folder: Path, spec: RosaSpec, weights: Mapping[str, WeightEntry], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter directory, new or in place of the adapter that is there; on disk when this returns.

    Raises RosaError if `folder` is something else than an adapter or an empty directory, or cannot be written; then the
    adapter that was there is still there.
    """
    folder = Path(os.path.realpath(folder))  # a link to a directory stays one
    try:
        if _is_adapter(folder):
            _replace(folder, spec, weights, tensors)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RosaError(f"{folder} exists and is no adapter: it is left alone; choose a new or an empty directory")
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with new_directory(folder) as new:
                _write_pair(new, spec, weights, tensors)
    except (OSError, SafetensorError) as error:
        raise RosaError(f"could not write the adapter {folder}: {error}; free space or choose another place") from error


def read(folder: Path) -> AdapterFiles:
    """Read and verify an adapter directory, also one whose replacement was interrupted.

    Raises RosaError, naming the file and the reason, if there is no adapter, or another format or version, or if a file
    is missing, truncated or changed, or holds names or values that no adapter can have.
    """
    if not folder.is_dir():
        raise RosaError(f"{folder} is no adapter directory: it {'is a file' if folder.exists() else 'does not exist'}")
    error: RosaError | None = None
    for _ in range(2):  # again, in case another process replaced the adapter meanwhile
        for config_place, tensor_place in _combinations(folder):
            try:
                found = _read_pair(config_place, tensor_place)
            except RosaError as reason:
                error = error or reason  # that of the plain directory says most
                continue
            if found is not None:
                return dataclasses.replace(found, folder=folder)
    raise error or RosaError(f"{folder} is no adapter directory: it holds no {CONFIG}; save with rosa_fx.save_adapter")


def _combinations(folder: Path) -> list[tuple[Path, Path]]:
    """Where a configuration and its tensors may lie, at rest first."""
    places = (folder, folder / PENDING)
    return [(config, tensors) for config in places for tensors in places]


def _replace(folder: Path, spec: RosaSpec, weights: Mapping[str, WeightEntry], tensors: Mapping[str, Tensor]) -> None:
    pending = folder / PENDING
    _settle(folder)
    try:
        pending.mkdir()
        _write_pair(pending, spec, weights, tensors)
        flush_directory(pending)
    except BaseException:
        shutil.rmtree(pending, ignore_errors=True)
        raise
    for name in (TENSORS, CONFIG):
        (pending / name).replace(folder / name)
    flush(folder)
    pending.rmdir()


def _settle(folder: Path) -> None:
    """Bring a replacement that was interrupted to its end, or forget it if it had not come far enough."""
    pending = folder / PENDING
    if not pending.exists():
        return
    for config_place, tensor_place in _combinations(folder):
        with contextlib.suppress(RosaError):
            if _read_pair(config_place, tensor_place) is None:
                continue
            for place, name in ((tensor_place, TENSORS), (config_place, CONFIG)):
                if place == pending:
                    (pending / name).replace(folder / name)
            flush(folder)
            break
    shutil.rmtree(pending)


def _write_pair(place: Path, spec: RosaSpec, weights: Mapping[str, WeightEntry], tensors: Mapping[str, Tensor]) -> None:
    from rosa_fx import __version__  # not at the top: rosa_fx imports this module while it is made

    save_file(plain_tensors(tensors), place / TENSORS, metadata={"format": "pt"})
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "rosa_fx": __version__,
        "spec": json.loads(spec.to_json()),
        "weights": {name: dataclasses.asdict(entry) for name, entry in weights.items()},
        "tensors": {"file": TENSORS, "bytes": (place / TENSORS).stat().st_size, "sha256": sha256(place / TENSORS)},
    }
    config["sha256"] = _own_checksum(config)
    (place / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _read_pair(config_place: Path, tensor_place: Path) -> AdapterFiles | None:
    """The adapter of these two places; None if the first holds no configuration."""
    file = config_place / CONFIG
    if not file.is_file():
        return None
    config = _read_config(file)
    tensors = tensor_place / TENSORS
    stored = config["tensors"]
    if not tensors.is_file():
        raise RosaError(f"{tensors} is missing: copy the whole directory again")
    if (size := tensors.stat().st_size) != stored["bytes"]:
        raise RosaError(f"{tensors} is truncated or changed ({size} of {stored['bytes']} bytes): copy or save it again")
    if sha256(tensors) != stored["sha256"]:
        raise RosaError(f"{tensors} is damaged (its checksum is not that of {CONFIG}): copy or save it again")
    try:
        content = load_file(tensors)
    except (SafetensorError, OSError, ValueError) as error:
        raise RosaError(f"{tensors} is no safetensors file: {error}") from error
    weights = {}
    for name, entry in config["weights"].items():
        _check_name(file, name)
        weights[name] = WeightEntry.from_json(f"{file}: the entry of {name!r}", entry)
    for key, tensor in content.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RosaError(f"{tensors}: {key} holds NaN or infinity: use an earlier adapter")
    try:
        spec = RosaSpec.from_json(json.dumps(config["spec"]))
    except RosaError as error:
        raise RosaError(f"{file}: {error}") from error
    return AdapterFiles(config_place, spec, weights, content)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RosaError(f"{file} is damaged: {error}; copy or save the adapter again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        peft = isinstance(config, dict) and "peft_type" in config
        what = f"a PEFT adapter ({config['peft_type']})" if peft else f"not in the format {FORMAT!r}"
        raise RosaError(f"{file} is {what}: rosa_fx.load_adapter reads what rosa_fx.save_adapter wrote")
    if config.get("version") != VERSION or isinstance(config["version"], bool):
        raise RosaError(
            f"{file} has the format version {config.get('version')!r}, this rosa_fx reads version {VERSION}: "
            f"use the release that wrote it (rosa_fx {config.get('rosa_fx')!r})"
        )
    if config.get("sha256") != _own_checksum(config):
        raise RosaError(f"{file} was changed after it was saved (its checksum differs): copy or save the adapter again")
    tensors = config.get("tensors")
    if not isinstance(config.get("weights"), dict) or not isinstance(tensors, dict):
        raise RosaError(f"{file} lacks 'weights' or 'tensors': save the adapter again")
    if tensors.get("file") != TENSORS:
        raise RosaError(f"{file}: the tensor file must be {TENSORS!r}, got {tensors.get('file')!r}")
    return config


def _own_checksum(config: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_name(file: Path, name: str) -> None:
    # A parameter name is dotted and has no empty part, so ".." in it is a path and no name.
    if not all(name.split(".")) or name.startswith("/") or any(c in name for c in "\\\0"):
        raise RosaError(f"{file}: {name!r} is no parameter name; do not use this adapter")


def _is_adapter(folder: Path) -> bool:
    """Whether a rosa_fx adapter, of whatever version and state, is here: then saving may replace its files."""
    for place in (folder, folder / PENDING):
        try:
            config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict) and config.get("format") == FORMAT:
            return True
    return False
