"""Masks and adapter tensors of a transformed model: reading, setting, and moving them as one flat dictionary."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rosa_fx.distributed.tensors import local, reshard, whole, write
from rosa_fx.errors import RosaError
from rosa_fx.mask import Mask
from rosa_fx.state import state_of, weight_of
from rosa_fx.weight import RosaWeight


def masks(model: nn.Module) -> dict[str, Mask]:
    """The masks that exist, by weight name."""
    found = {name: w.sparse.mask for name, w in state_of(model).weights.items() if w.sparse is not None}
    return {name: mask for name, mask in found.items() if mask is not None}


def set_masks(model: nn.Module, masks: Mapping[str, Mask | Tensor]) -> None:
    """Set masks and let the sparse values of these weights train, from zero.

    Args:
        model: transformed.
        masks: by weight name a `Mask`, or a bool tensor [N, K]; each with nnz = int(density·N·K) entries. For a weight with
            more than two dimensions the bool tensor has its shape, and a `Mask` that of its matrix, see `adapter`.

    Raises:
        RosaError: unknown name, no sparse part, wrong shape or number of entries, unsorted or out-of-range indices.
            Then no mask is changed.
    """
    state_of(model)
    checked: dict[str, tuple[RosaWeight, Mask]] = {}
    for name, given in masks.items():
        weight = weight_of(model, name)
        if weight.sparse is None:
            raise RosaError(f"{name} has no sparse part (density 0): transform with density > 0 to set a mask")
        mask = _from_dense(name, weight, given) if isinstance(given, Tensor) else given
        mask.validate(name, weight.matrix, weight.sparse.values.numel())
        checked[name] = (weight, mask)
    reshard(model)
    for weight, mask in checked.values():
        assert weight.sparse is not None
        weight.sparse.set_mask(mask)
        with torch.no_grad():
            local(weight.sparse.values).zero_()
        weight.set_phase("joint")


def _from_dense(name: str, weight: RosaWeight, dense: Tensor) -> Mask:
    if tuple(dense.shape) == weight.shape:
        dense = dense.reshape(weight.matrix)
    elif len(weight.shape) > 2 and tuple(dense.shape) != weight.matrix:
        raise RosaError(f"{name}: the mask has shape {list(dense.shape)}, the weight {list(weight.shape)}")
    return Mask.from_dense(dense)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter tensor, by "<weight name>.low_rank.A" / ".low_rank.B" / ".sparse.values" / ".row_offsets" / ".cols".

    The tensors are the live ones, detached. Weights without a mask have zero row offsets.
    Of a model that FSDP shards it is a copy of the whole tensors; every process must ask for it then.
    """
    return {key: whole(tensor) for key, tensor in adapter_tensors(model).items()}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """As `adapter_state`, the very tensors: parameters, and of a sharded model their shards."""
    reshard(model)
    weights = state_of(model).weights
    return {f"{name}.{part}": tensor for name, weight in weights.items() for part, tensor in _tensors(weight).items()}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Take over what `adapter_state` gave, into an equally transformed model; masks that came along are in force.

    Into a model that FSDP shards as well; every process takes its part of the whole tensors.

    Raises:
        RosaError: missing or additional names, other shapes or dtypes, NaN or infinity, a mask that is none. Then nothing
            is changed.
    """
    weights, expected = state_of(model).weights, adapter_tensors(model)
    for key in sorted(expected.keys() ^ state.keys()):
        raise RosaError(f"{key} is {'missing from' if key in expected else 'not part of'} this adapter: the specs differ")
    for key, tensor in state.items():
        wanted = expected[key]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise RosaError(
                f"{key} is {tensor.dtype} {list(tensor.shape)}, the model needs {wanted.dtype} {list(wanted.shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RosaError(f"{key} holds NaN or infinity: load an earlier checkpoint")
    for name, weight in weights.items():
        if weight.sparse is not None and bool(state[f"{name}.sparse.row_offsets"].any()):
            offsets, cols = state[f"{name}.sparse.row_offsets"], state[f"{name}.sparse.cols"]
            Mask(offsets, cols, weight.matrix).validate(name, weight.matrix, weight.sparse.values.numel())
    for key, tensor in state.items():
        write(expected[key], tensor)
    for weight in weights.values():
        weight.follow_mask()


def _tensors(weight: RosaWeight) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if weight.low_rank is not None:
        found |= {"low_rank.A": weight.low_rank.A, "low_rank.B": weight.low_rank.B}
    if weight.sparse is not None:
        sparse = weight.sparse
        found |= {"sparse.values": sparse.values, "sparse.row_offsets": sparse.row_offsets, "sparse.cols": sparse.cols}
    return found
