"""`merge` and `unmerge`: from a transformed model to an ordinary one, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rosa_fx.distributed.gradients import hide_from_ddp, show_to_ddp
from rosa_fx.distributed.shard import refuse_sharded
from rosa_fx.errors import RosaError
from rosa_fx.merge_report import MergeReport
from rosa_fx.module_class import own_class, share_class
from rosa_fx.packed import become_dense, forget_quantiser, is_packed_linear, own_attributes, take_over
from rosa_fx.state import ATTRIBUTE, RosaState, state_of, unwrap
from rosa_fx.weight import RosaWeight

KEPT = "_rosa_fx_before_merge"
"""Attribute of a merged model: what brings the transformed one back."""


@overload
def merge(model: nn.Module, *, into: Literal["dense"] = "dense", keep_base: bool = False) -> nn.Module: ...


@overload
def merge(
    model: nn.Module, *, into: Literal["same"], refit_rank: int = 0, refit_steps: int = 5, keep_base: bool = False
) -> MergeReport: ...


def merge(
    model: nn.Module, *, into: str = "dense", refit_rank: int = 0, refit_steps: int = 5, keep_base: bool = False
) -> nn.Module | MergeReport:
    """Back to a model without rosa_fx, in place: D(Q) + ΔW as ordinary weights, dense or in the base's own format.

    The sum is made in float32 (float64 for a float64 weight).

    `into="dense"` rounds it once to the dtype of the weight. Classes, parameter names and their order are those before
    `transform`, shared weights are shared again, and parameters train again if they did before. Only a module of
    bitsandbytes becomes a plain `nn.Linear` (of a subclass that takes any input dtype) with the dense weight.

    `into="same"` quantises it again like the base: 4-bit and int8 bases become modules of bitsandbytes (kept bases dense
    weights), which `save_pretrained` saves and `transform(base="keep")` takes over. What that loses is in the report. An int8
    weight that modules shared is one parameter for each of them afterwards, around the same memory.

    Args:
        model: transformed.
        into: "dense" or "same".
        refit_rank: with "same": put what quantising loses into a low-rank term of this rank (quantise and truncated SVD in
            turn, LoftQ, arXiv 2310.08659, algorithm 1). The model then stays transformed, with that term.
        refit_steps: turns of it; the best one is kept.
        keep_base: keep frozen base and adapter beside the merged weights, in their packed size, so that `unmerge` can bring
            them back. Without it they are freed.

    Returns:
        The same model object for "dense"; a `MergeReport` for "same".

    Raises:
        RosaError: the model is not transformed, a merged weight is not finite, or (for "same") a weight that bitsandbytes
            has no module for, by name. Then nothing is changed.
    """
    if into not in ("dense", "same"):
        raise RosaError(f"into is {into!r}: use 'dense' or 'same'")
    if into == "dense" and refit_rank:
        raise RosaError(f"refit_rank is {refit_rank!r}: a dense weight loses nothing that could be refitted; use into='same'")
    inner = unwrap(model)
    state = state_of(inner)
    refuse_sharded(inner, "rosa_fx.merge")
    for name, weight in state.weights.items():
        _refuse_not_finite(name, weight)
    if into == "same":
        from rosa_fx.requantise import merge_same

        report, undo = merge_same(model, inner, state, refit_rank, refit_steps)
    else:
        report, undo = None, _merge_dense(inner, state)
    vars(inner).pop(KEPT, None)
    if keep_base:
        object.__setattr__(inner, KEPT, undo)
    return model if report is None else report


def unmerge(model: nn.Module) -> nn.Module:
    """Bring back the transformed model that `merge(keep_base=True)` merged, bit for bit, in place; returns the same object.

    The merged weights, and what was trained on them since, are dropped. Raises RosaError if nothing was kept.
    """
    inner = unwrap(model)
    undo: Callable[[], None] | None = vars(inner).pop(KEPT, None)
    if undo is None:
        raise RosaError("nothing to unmerge: merge with keep_base=True, which keeps base and adapter beside the merged weights")
    undo()
    return model


def _merge_dense(inner: nn.Module, state: RosaState) -> Callable[[], None]:
    trains = {name: p.requires_grad for name, p in inner.named_parameters(remove_duplicate=False)}
    before: list[tuple[nn.Module, str, RosaWeight, type, dict[str, Any]]] = []
    for name, weight in state.weights.items():
        dense = nn.Parameter(merged_weight(weight), requires_grad=False)
        for owner, attribute in state.targets[name].owners:
            before.append((owner, attribute, weight, type(owner).__bases__[0], own_attributes(owner)))
            _detach(owner, attribute, dense)
    _restore_order(inner, list(state.requires_grad))
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(state.requires_grad.get(name, False))
    delattr(inner, ATTRIBUTE)
    show_to_ddp(inner)
    forget_quantiser(inner)

    def undo() -> None:
        for owner, attribute, weight, original, attributes in before:
            if not hasattr(owner, "parametrizations"):
                owner.__class__ = original
                vars(owner).update(attributes)
            parametrize.register_parametrization(owner, attribute, weight, unsafe=True)
        for owner in {id(owner): owner for owner, *_ in before}.values():
            share_class(owner)
            if is_packed_linear(owner):
                take_over(owner)
        for name, parameter in inner.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(trains.get(name, False))
        setattr(inner, ATTRIBUTE, state)
        hide_from_ddp(inner, state.weights.values())

    return undo


def _refuse_not_finite(name: str, weight: RosaWeight) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in weight.delta_tensors() if t.is_floating_point()):
        raise RosaError(f"{name}: its adapter holds NaN or infinity and cannot be merged; load a good checkpoint first")
    # Made twice, here and in the merge: to keep all of them would hold the dense model beside the frozen one.
    if not bool(torch.isfinite(merged_weight(weight)).all()):
        raise RosaError(
            f"{name}: D(Q) + ΔW exceeds the range of {weight.base.dtype} and cannot be merged; "
            "load a good checkpoint, or move the model to a dtype with a wider range first"
        )


@torch.no_grad()
def merged_weight(weight: RosaWeight) -> Tensor:
    """D(Q) + ΔW in the shape of the weight: summed in float32 or wider, rounded once to its dtype."""
    base = weight.base
    wide = torch.promote_types(base.dtype, torch.float32)
    dense = base.format.dequantize(base.tensors(), weight.matrix, wide).view(weight.shape).add_(weight.dense_delta())
    return dense.to(base.dtype)


@torch.no_grad()
def _detach(module: nn.Module, attribute: str, dense: nn.Parameter) -> None:
    own_class(module)
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    delattr(module, attribute)
    module.register_parameter(attribute, dense)
    if is_packed_linear(module):
        become_dense(module)


def _restore_order(model: nn.Module, names: list[str]) -> None:
    """Parameters in the order of `names`: a state_dict and an optimizer's numbering are as before the transform."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        path, _, attribute = name.rpartition(".")
        if path in modules and attribute in modules[path]._parameters:  # else the user took it away since
            parameters = modules[path]._parameters
            parameters[attribute] = parameters.pop(attribute)
