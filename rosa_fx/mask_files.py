"""`save_masks` and `load_masks`: masks alone in one safetensors file, for every rank, dtype and base of the same weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rosa_fx.adapters import masks, set_masks
from rosa_fx.atomic import json_digest, tensor_digest, write_tensors
from rosa_fx.errors import RosaError
from rosa_fx.mask import Mask

VERSION = 1
FORMAT = "rosa_fx masks"


def save_masks(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Save the masks of a transformed model: int32 CSR as `<weight name>.row_offsets` and `.cols`, and the shapes.

    The file is on disk whole when this returns; one that was there is replaced in one step.

    Raises RosaError if no mask exists yet, or the file cannot be written.
    """
    path, found = Path(file), masks(model)
    if not found:
        raise RosaError("no weight has a mask yet: train past the schedule's mask generation, or set masks first")
    tensors: dict[str, Tensor] = {}
    for name, mask in found.items():
        tensors |= {f"{name}.row_offsets": mask.row_offsets, f"{name}.cols": mask.cols}
    content: dict[str, object] = {"format": FORMAT, "version": VERSION, "checksum": tensor_digest(tensors)}
    content["shapes"] = {name: list(mask.shape) for name, mask in found.items()}
    content["shapes_checksum"] = json_digest(content["shapes"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"rosa_fx": json.dumps(content)})
    except (OSError, SafetensorError) as error:
        raise RosaError(f"could not write the masks {path}: {error}; free space or choose another place") from error


def load_masks(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Set the masks that `save_masks` wrote; their sparse values train, from zero.

    The model may have another rank, dtype or base format; each weight's density must be the one the mask was made for.

    Raises RosaError if the file is damaged or no masks' file, or does not fit the model (names, shapes, numbers of
    entries). Then no mask is changed.
    """
    path = Path(file)
    try:
        with safe_open(path, "pt") as stored:
            content = json.loads((stored.metadata() or {}).get("rosa_fx", "null"))
            tensors: dict[str, Tensor] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise RosaError(f"{path} is damaged or no safetensors file: {error}; save or copy the masks again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RosaError(f"{path} is not in the format {FORMAT!r}: rosa_fx.load_masks reads what rosa_fx.save_masks wrote")
    if content.get("version") != VERSION or not isinstance(content.get("shapes"), dict):
        raise RosaError(f"{path} has the format version {content.get('version')!r}, this rosa_fx reads version {VERSION}")
    if content.get("checksum") != tensor_digest(tensors):
        raise RosaError(f"{path} is damaged (its checksum differs): save or copy the masks again")
    shapes = content["shapes"]
    if content.get("shapes_checksum", json_digest(shapes)) != json_digest(shapes):
        raise RosaError(f"{path} is damaged (the checksum of its shapes differs): save or copy the masks again")
    expected = {f"{name}.{part}" for name in shapes for part in ("row_offsets", "cols")}
    for key in sorted(expected ^ tensors.keys()):
        raise RosaError(
            f"{path}: {key!r} is {'missing' if key in expected else 'not named in its header'}; save the masks again"
        )
    found = {}
    for name, shape in shapes.items():
        offsets, cols = tensors[f"{name}.row_offsets"], tensors[f"{name}.cols"]
        if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
            raise RosaError(f"{path}: the shape of {name!r} is {shape!r}")
        if offsets.numel() and (int(offsets.min()) < 0 or int(offsets.max()) > cols.numel()):
            raise RosaError(f"{path}: {name}: row_offsets must rise from 0 to the number of columns' entries")
        found[name] = Mask(offsets, cols, tuple(shape))
    try:
        set_masks(model, found)
    except RosaError as error:
        raise RosaError(f"the masks {path} do not fit this model: {error}") from error
