"""`transform` and its way back, `merge`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rosa_fx.errors import RosaError
from rosa_fx.fingerprint import fingerprint
from rosa_fx.kernels.bases.base import base_from_spec
from rosa_fx.passes.install import install
from rosa_fx.passes.report import normalise
from rosa_fx.spec import RosaSpec
from rosa_fx.state import ATTRIBUTE, RosaState, is_transformed, state_of, unwrap, weight_of
from rosa_fx.targets import Target, select_targets
from rosa_fx.weight import FrozenBase, LowRankParameters, RosaWeight, SparseParameters


def transform(model: nn.Module, spec: RosaSpec, *, strict: bool = False) -> nn.Module:
    """Rewrite the weights that `spec` selects, in place, and return the same object.

    Each selected weight [N, K] is frozen in the base format and gains the trainable delta s·B A + S as a parametrisation,
    so `forward` stays the model's own and `torch.compile(model)` runs the fused operators. Everything else is frozen.
    Weights are quantised one at a time: the peak over the model itself is one layer.

    Args:
        model: any module; its parameters must hold data (not `meta`).
        spec: what to rewrite and how.
        strict: raise at compile time, with weight, operator and shape, where a use of a weight cannot be fused.

    Raises:
        RosaError: the spec does not fit the model, or the model is already transformed. The model is then untouched.
    """
    if is_transformed(model):
        raise RosaError("the model is already transformed: rosa_fx.merge(model) first, or start from a fresh one")
    targets = select_targets(model, spec)
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    weights = {target.name: _attach(target, spec, strict) for target in targets}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RosaWeight):
            module.paths = (*module.paths, normalise(path))
    state = RosaState(spec, strict, {target.name: target for target in targets}, weights, requires_grad)
    for weight in weights.values():
        _make_trainable(weight)
    setattr(model, ATTRIBUTE, state)
    install()
    return model


def _make_trainable(weight: RosaWeight) -> None:
    if weight.low_rank is not None:
        weight.low_rank.requires_grad_(True)
    # With the low-rank part absent there is nothing to warm up; the sparse part waits for its mask either way.
    weight.set_phase("low_rank")


def _attach(target: Target, spec: RosaSpec, strict: bool) -> RosaWeight:
    module, attribute = target.owners[0]
    original: Tensor = getattr(module, attribute).detach()
    form = base_from_spec(target.base, spec.blocksize, spec.double_quant)
    dtype = getattr(torch, spec.adapter_dtype)
    try:
        # "keep" holds the very tensor: the weight stays as it is, without a second copy.
        tensors = (original,) if form.kind == "dense" else form.quantize(original)
    except RosaError as error:
        raise RosaError(f"{target.name}: {error}") from error
    device = original.device
    weight = RosaWeight(
        FrozenBase(form, tensors, original.dtype),
        target.shape,
        LowRankParameters(target.shape, target.rank, spec.init, dtype, device) if target.rank else None,
        SparseParameters(target.shape, target.nnz, dtype, device) if target.density > 0 else None,
        scale=target.scale,
        dropout=spec.dropout,
        strict=strict,
    )
    # A buffer, so that it stays with the base through state_dict and copies; `save_adapter` writes it down.
    weight.base.register_buffer("fingerprint", fingerprint(original).to(device))
    weight.train(module.training)
    del original
    for owner, name in target.owners:
        parametrize.register_parametrization(owner, name, weight, unsafe=True)
    return weight


def merge(model: nn.Module) -> nn.Module:
    """Back to ordinary dense parameters D(Q) + ΔW, in place, in the dtype of the weight; returns the same object.

    The sum is made in float32 (float64 for a float64 weight) and rounded once. Classes, parameter names and their order
    are those before `transform`, shared weights are shared again, and parameters train again if they did before.

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
    """D(Q) + ΔW [N, K]: summed in float32 or wider, rounded once to the dtype of the weight."""
    base = weight.base
    wide = torch.promote_types(base.dtype, torch.float32)
    dense = base.format.dequantize(base.tensors(), weight.shape, wide).add_(weight.dense_delta())
    return dense.to(base.dtype)


@torch.no_grad()
def _detach(module: nn.Module, attribute: str, dense: nn.Parameter) -> None:
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    delattr(module, attribute)
    module.register_parameter(attribute, dense)


def _restore_order(model: nn.Module, names: list[str]) -> None:
    """Parameters in the order of `names`: a state_dict and an optimizer's numbering are as before the transform."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        path, _, attribute = name.rpartition(".")
        if path in modules and attribute in modules[path]._parameters:  # else the user took it away since
            parameters = modules[path]._parameters
            parameters[attribute] = parameters.pop(attribute)


def trainable_parameters(model: nn.Module, lr: float = 7e-4, lr_sparse: float = 2e-4) -> list[dict[str, object]]:
    """Optimizer parameter groups `low_rank` and `sparse` (the paper's learning rates are the defaults).

    Sparse values are in their group from the start, frozen until the mask exists. A term that no weight has gives no group.
    """
    weights = state_of(model).weights.values()
    low_rank = [p for w in weights if w.low_rank is not None for p in (w.low_rank.A, w.low_rank.B)]
    sparse = [w.sparse.values for w in weights if w.sparse is not None]
    groups: list[dict[str, object]] = []
    if low_rank:
        groups.append({"params": low_rank, "lr": lr, "name": "low_rank"})
    if sparse:
        groups.append({"params": sparse, "lr": lr_sparse, "name": "sparse"})
    return groups


def adapter(model: nn.Module, name: str) -> RosaWeight:
    """The terms of the weight `name`: `.low_rank.A` [R, K], `.low_rank.B` [N, R], `.sparse.values` [nnz], `.sparse.mask`.

    A term that the spec leaves out is None. Raises RosaError for a name that is not a target.
    """
    return weight_of(model, name)


def base_weight(model: nn.Module, name: str) -> Tensor:
    """The dense frozen base D(Q) [N, K] of the weight `name`, in the dtype of the weight."""
    return weight_of(model, name).dense_base()


def delta(model: nn.Module, name: str) -> Tensor:
    """The dense ΔW = s·B A + S [N, K] of the weight `name`, float32."""
    return weight_of(model, name).dense_delta()
