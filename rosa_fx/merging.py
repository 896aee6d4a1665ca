"""`merge`: from a transformed model back to an ordinary one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rosa_fx.errors import RosaError
from rosa_fx.module_class import own_class
from rosa_fx.packed import become_dense, forget_quantiser, is_packed_linear
from rosa_fx.state import ATTRIBUTE, state_of, unwrap
from rosa_fx.weight import RosaWeight


def merge(model: nn.Module) -> nn.Module:
    """Back to ordinary dense parameters D(Q) + ΔW, in place, in the dtype of the weight; returns the same object.

    The sum is made in float32 (float64 for a float64 weight) and rounded once. Classes, parameter names and their order
    are those before `transform`, shared weights are shared again, and parameters train again if they did before. Only a
    module of bitsandbytes becomes a plain `nn.Linear` (of a subclass that takes any input dtype) with the dense weight.

    Raises:
        RosaError: the model is not transformed, or a merged weight is not finite (then nothing is changed).
    """
    inner = unwrap(model)
    state = state_of(inner)
    for name, weight in state.weights.items():
        _refuse_not_finite(name, weight)
    for name, weight in state.weights.items():
        dense = nn.Parameter(merged_weight(weight), requires_grad=False)
        for owner, attribute in state.targets[name].owners:
            _detach(owner, attribute, dense)
    _restore_order(inner, list(state.requires_grad))
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(state.requires_grad.get(name, False))
    delattr(inner, ATTRIBUTE)
    forget_quantiser(inner)
    return model


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
