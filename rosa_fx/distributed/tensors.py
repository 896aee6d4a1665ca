"""Tensors that may be sharded (`DTensor`, as FSDP2 makes parameters): the whole, this process's part, and writing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor, or a copy that belongs to several."""
    if type(tensor) is Tensor or not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; a collective call if it is sharded."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full.detach()


def local(tensor: Tensor) -> Tensor:
    """This process's part, which shares its memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values`, which every process has whole, sharded as `tensor` is."""
    if not is_sharded(tensor):
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return distribute_tensor(values.to(tensor.device), mesh, placements, src_data_rank=None)


@torch.no_grad()
def write(tensor: Tensor, values: Tensor) -> None:
    """Set a tensor, sharded or not, to `values`, the whole of it, which every process has."""
    local(tensor).copy_(local(like(tensor, values)))


def reshard(model: nn.Module) -> None:
    """Let FSDP's modules go back to shards where a forward pass without backward has left them whole.

    What is then written, or has its `requires_grad` changed, is what the optimizer holds.
    """
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def any_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of some parameter."""
    reshard(model)
    return any(map(is_sharded, model.parameters()))


def norms_over_shards(norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each of the whole `tensors`, from those of this process's parts; a collective call if any is sharded."""
    sharded = [index for index, tensor in enumerate(tensors) if is_sharded(tensor)]
    if not sharded:
        return norms
    example: Any = tensors[sharded[0]]
    places = torch.tensor(sharded, device=norms.device)
    squares = norms[places].double().square()
    for dimension, placement in enumerate(example.placements):
        if placement.is_shard():  # over a replicated dimension every process has the same
            dist.all_reduce(squares, group=example.device_mesh.get_group(dimension))
    return norms.index_copy(0, places, squares.sqrt().to(norms.dtype))
