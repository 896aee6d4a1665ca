"""What processes make sure of before they train together: the same bases, masks and initial adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from rosa_fx.distributed.processes import Processes
from rosa_fx.distributed.tensors import is_sharded
from rosa_fx.errors import RosaError
from rosa_fx.fingerprint import as_text
from rosa_fx.weight import RosaWeight


@torch.no_grad()
def start_together(weights: Mapping[str, RosaWeight], processes: Processes) -> None:
    """Give every process the adapters of rank 0, and what a restart makes them from again. A collective call.

    Raises RosaError in all processes, naming weight and rank, where a base or a mask is not that of rank 0.
    """
    described = processes.gather({name: _described(weight) for name, weight in weights.items()})
    for rank, found in enumerate(described):
        for name, (base, mask) in described[0].items():
            other_base, other_mask = found.get(name, ("missing", mask))
            if other_base != base:
                raise RosaError(
                    f"rank {rank}: the base weight {name} is not that of rank 0 ({other_base}, there {base}): load the same "
                    "model in every process, or seed all alike before it is made"
                )
            if other_mask != mask:
                raise RosaError(f"rank {rank}: the mask of {name} is not that of rank 0: set or load the same one everywhere")
    seeds = [0 if weight.low_rank is None else weight.low_rank.seed for weight in weights.values()]
    first = processes.gather(seeds)[0]
    for weight, seed in zip(weights.values(), first, strict=True):
        parameters: list[Tensor] = []
        if weight.low_rank is not None:
            weight.low_rank.seed = seed
            parameters += [weight.low_rank.A, weight.low_rank.B]
        if weight.sparse is not None:
            parameters.append(weight.sparse.values)
        for parameter in parameters:
            if not is_sharded(parameter) and parameter.numel():
                processes.broadcast_(parameter)


def _described(weight: RosaWeight) -> tuple[str | None, str]:
    mask = None if weight.sparse is None else weight.sparse.mask
    digest = hashlib.blake2b(digest_size=8)
    for tensor in () if mask is None else (mask.row_offsets, mask.cols):
        digest.update(tensor.cpu().numpy().tobytes())
    return as_text(weight.base.get_buffer("fingerprint")), digest.hexdigest()
