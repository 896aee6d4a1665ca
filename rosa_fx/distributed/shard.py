"""What FSDP2 (`torch.distributed.fsdp.fully_shard`) needs to know of a transformed model, and what a sharded one cannot do."""

from __future__ import annotations

from torch import nn

from rosa_fx.distributed.tensors import any_sharded
from rosa_fx.errors import RosaError
from rosa_fx.state import is_transformed, state_of


def shard_bases(model: nn.Module) -> nn.Module:
    """Let `fully_shard`, called afterwards, shard the frozen bases too; in place, returns the same object.

    FSDP2 shards parameters and leaves buffers whole in every process, and a frozen base is held in buffers: 4 bits per weight
    for `nf4`. This makes frozen parameters of the packed codes (of the dense weight for `base="keep"`), which are gathered
    for each block as it runs; scales stay whole (an eighth of the codes at the default block size). Names in `state_dict` are
    as before.

    Raises RosaError if the model is not transformed, or is sharded already.
    """
    state = state_of(model)
    if any_sharded(model):
        raise RosaError("the model is sharded already: call rosa_fx.shard_bases(model) before fully_shard")
    for weight in state.weights.values():
        weight.base.make_parameters()
    return model


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raises RosaError, naming what cannot be done and the way around it, if FSDP shards the model."""
    if is_transformed(model) and any_sharded(model):
        raise RosaError(
            f"{what} needs whole weights, and this model is sharded: rosa_fx.save_adapter(model, folder) in every process, "
            f"then rosa_fx.load_adapter onto a model that is not sharded, and {what} there"
        )
