"""`save_adapter` and `load_adapter`: a trained adapter as a directory, and onto a model again."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rosa_fx import adapter_format
from rosa_fx.adapter_format import AdapterFiles, WeightEntry
from rosa_fx.adapters import adapter_state, load_adapter_state
from rosa_fx.attach import model_dtype, planned_base, transform
from rosa_fx.distributed.processes import ALONE, processes_of
from rosa_fx.distributed.tensors import any_sharded
from rosa_fx.errors import RosaError
from rosa_fx.fingerprint import as_text, fingerprint
from rosa_fx.mask import Mask
from rosa_fx.spec import RosaSpec
from rosa_fx.state import is_transformed, state_of
from rosa_fx.targets import Target, select_targets
from rosa_fx.weight import RosaWeight


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Save the adapter of a transformed model: `adapter_model.safetensors` and `adapter_config.json` in `directory`.

    The base is not saved; a fingerprint of each base weight is. An adapter that is there already is replaced, and at
    every moment the old or the new one can be loaded; other files in the directory stay. Everything is on disk when
    this returns. A model wrapped by `torch.compile` or DDP is as good as the model itself. Of several processes one should
    save; only if FSDP shards the model all must call, of which rank 0 writes.

    Args:
        model: transformed; its masks, if there are any yet, are saved too.
        directory: new, empty, or an adapter.

    Raises:
        RosaError: the model is not transformed, an adapter tensor is not finite, or the directory is something else or
            cannot be written. What was there is then still there.
    """
    state, tensors = state_of(model), adapter_state(model)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RosaError(f"{key} holds NaN or infinity and is not saved; load an earlier checkpoint")
    entries = {name: _entry(weight) for name, weight in state.weights.items()}
    processes = processes_of() if any_sharded(model) else ALONE
    processes.on_first(lambda: adapter_format.write(Path(directory), state.spec, entries, tensors))


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], *, strict: bool = False) -> nn.Module:
    """Put a saved adapter onto a model, in place, and return the same object.

    A plain model is transformed with the saved spec first; a transformed one must have an equal spec. Masks that were
    saved are in force afterwards, and a weight saved without one is back in its low-rank phase.

    Args:
        model: the base model the adapter was trained on, plain or transformed, in any dtype that holds its values.
        directory: what `save_adapter` wrote.
        strict: as for `rosa_fx.transform`; read only if the model is plain.

    Raises:
        RosaError: the files are damaged, of another version, or do not belong to this model (names, shapes, spec,
            values of the base weights). The model is then untouched.
    """
    files = adapter_format.read(Path(directory))
    if is_transformed(model):
        state = state_of(model)
        _compare_specs(files, state.spec)
        present = {name: _entry(weight) for name, weight in state.weights.items()}
        tensors = _checked(files, present, state.targets.values(), adapter_state(model))
    else:
        plain = _without_compile(model)
        _, tensors = check_fits(plain, files)
        transform(plain, files.spec, strict=strict)
    load_adapter_state(model, tensors)
    for name, weight in state_of(model).weights.items():
        if weight.sparse is not None:
            weight.sparse.has_mask = files.weights[name].has_mask
            weight.set_phase("joint" if weight.sparse.has_mask else "low_rank")
    return model


def check_fits(plain: nn.Module, files: AdapterFiles) -> tuple[list[Target], dict[str, Tensor]]:
    """The targets of a plain model that an adapter is for, and its tensors, after every check; the model is not changed."""
    try:
        targets = select_targets(plain, files.spec)
    except RosaError as error:
        raise RosaError(f"the adapter {files.folder} does not fit this model: {error}") from error
    dtype = model_dtype(plain)
    planned = {target.name: _planned(target, files.spec, dtype) for target in targets}
    return targets, _checked(files, planned, targets, {})


def _entry(weight: RosaWeight) -> WeightEntry:
    low_rank, sparse, base = weight.low_rank, weight.sparse, weight.base
    return WeightEntry(
        shape=weight.shape,
        matrices=dataclasses.astuple(weight.reading),
        rank=0 if low_rank is None else low_rank.rank,
        nnz=0 if sparse is None else sparse.values.numel(),
        base=base.format.to_dict(),
        dtype=_dtype_name(base.dtype),
        has_mask=sparse is not None and sparse.has_mask,
        fingerprint=as_text(base.get_buffer("fingerprint")),
    )


def _planned(target: Target, spec: RosaSpec, default: torch.dtype) -> WeightEntry:
    """The entry that this weight of a plain model would have, without transforming it."""
    module, attribute = target.owners[0]
    weight: Tensor = getattr(module, attribute)
    form, dtype, packed = planned_base(target, spec, default)
    return WeightEntry(
        shape=target.shape,
        matrices=dataclasses.astuple(target.reading),
        rank=target.rank,
        nnz=target.nnz,
        base=form.to_dict(),
        dtype=_dtype_name(dtype),
        has_mask=False,
        fingerprint=as_text(fingerprint(weight) if packed is None else packed.fingerprint()),
    )


def _compare_specs(files: AdapterFiles, spec: RosaSpec) -> None:
    differing = [
        f"{field.name} (saved {getattr(files.spec, field.name)!r}, here {getattr(spec, field.name)!r})"
        for field in dataclasses.fields(RosaSpec)
        if getattr(files.spec, field.name) != getattr(spec, field.name)
    ]
    if differing:
        raise RosaError(
            f"the adapter {files.folder} was made with another spec than the model: {'; '.join(differing)}. "
            "Load it onto the plain base model, or transform with the saved spec"
        )


def _checked(
    files: AdapterFiles, present: Mapping[str, WeightEntry], targets: Iterable[Target], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The adapter's tensors in the dtypes that the model needs, after every check; the model is not changed.

    `present`: the entries of the model's own weights, its `targets`. `state`: its adapter tensors, if it has them yet.
    """
    for name in sorted(present.keys() - files.weights.keys()):
        raise RosaError(f"the adapter {files.folder} has nothing for the weight {name!r}: it is another model's")
    for name in files.weights.keys() - present.keys():
        near = difflib.get_close_matches(name, present, n=3) or list(present)[:3]
        raise RosaError(
            f"the adapter {files.folder} is for a weight {name!r}, which is no target in this model "
            f"(near names: {', '.join(near)}): load the base model that it was trained on"
        )
    tensors: dict[str, Tensor] = {}
    for target in targets:
        entry = files.weights[target.name]
        _check_entry(files, target.name, entry, present[target.name])
        tensors |= _checked_tensors(files, target, entry, state)
    for key in sorted(files.tensors.keys() - tensors.keys()):
        raise RosaError(f"the adapter {files.folder} holds a tensor {key!r} that its spec has no place for")
    return tensors


def _check_entry(files: AdapterFiles, name: str, saved: WeightEntry, here: WeightEntry) -> None:
    for field in ("shape", "matrices", "rank", "nnz", "base"):
        of_file, of_model = getattr(saved, field), getattr(here, field)
        if of_file != of_model:
            raise RosaError(
                f"{name}: {field} is {of_file} in the adapter {files.folder} and {of_model} in this model: "
                "load the base model that it was trained on"
            )
    if saved.fingerprint and here.fingerprint and saved.fingerprint != here.fingerprint:
        hint = f", in {saved.dtype} (it is in {here.dtype} here)" if saved.dtype != here.dtype else ""
        raise RosaError(
            f"{name}: the base weight has other values than the one the adapter {files.folder} was trained on "
            f"(fingerprint {saved.fingerprint}, here {here.fingerprint}): load that base model{hint}"
        )


def _checked_tensors(files: AdapterFiles, target: Target, entry: WeightEntry, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part, shape in _expected(target).items():
        key = f"{target.name}.{part}"
        if key not in files.tensors:
            raise RosaError(f"the adapter {files.folder} lacks the tensor {key!r}: save it again")
        tensor = files.tensors[key]
        if tuple(tensor.shape) != shape:
            raise RosaError(f"{key} has shape {list(tensor.shape)} in the adapter {files.folder}, not {list(shape)}")
        index = part in ("sparse.row_offsets", "sparse.cols")
        wanted = torch.int32 if index else state[key].dtype if key in state else files.spec.torch_adapter_dtype
        # Widening is exact; it happens where the model was cast after its transform.
        if tensor.dtype != wanted and (index or torch.promote_types(tensor.dtype, wanted) != wanted):
            raise RosaError(
                f"{key} is {tensor.dtype} in the adapter {files.folder} and {wanted} in the model, which would lose "
                "digits: cast the model that was saved, or the one here, to the same dtype"
            )
        tensors[key] = tensor.to(wanted)
    if target.density > 0:
        _check_mask(files, target, entry, tensors)
    return tensors


def _expected(target: Target) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter tensors of one weight."""
    reading, rank, nnz = target.reading, target.rank, target.nnz
    stack = () if reading.stack == 1 else (reading.stack,)
    shapes: dict[str, tuple[int, ...]] = {}
    if rank:
        shapes |= {"low_rank.A": (*stack, rank, reading.columns), "low_rank.B": (*stack, reading.rows, rank)}
    if target.density > 0:  # a density of less than one entry leaves a sparse part with none
        shapes |= {"sparse.values": (nnz,), "sparse.row_offsets": (reading.matrix[0] + 1,), "sparse.cols": (nnz,)}
    return shapes


def _check_mask(files: AdapterFiles, target: Target, entry: WeightEntry, tensors: Mapping[str, Tensor]) -> None:
    name, matrix = target.name, target.reading.matrix
    offsets, cols = tensors[f"{name}.sparse.row_offsets"], tensors[f"{name}.sparse.cols"]
    if not entry.has_mask:
        if bool(offsets.any()):
            raise RosaError(f"{name}: the adapter {files.folder} has a mask that its configuration knows nothing of")
        return
    # Before their differences are looked at, which may overflow.
    if int(offsets.min()) < 0 or int(offsets.max()) > entry.nnz:
        raise RosaError(f"{name}: row_offsets in the adapter {files.folder} must rise from 0 to nnz = {entry.nnz}")
    Mask(offsets, cols, matrix).validate(name, matrix, entry.nnz)


def _without_compile(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
