"""`transform`: from a plain model to one whose selected weights are base + low-rank + sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rosa_fx.distributed.gradients import hide_from_ddp
from rosa_fx.errors import RosaError
from rosa_fx.fingerprint import fingerprint
from rosa_fx.kernels.bases.base import BaseFormat, base_from_spec
from rosa_fx.memory import give_back
from rosa_fx.module_class import share_class
from rosa_fx.packed import PackedWeight, find_packed, forget_quantiser, take_over
from rosa_fx.passes.install import install
from rosa_fx.passes.report import normalise
from rosa_fx.spec import RosaSpec
from rosa_fx.state import ATTRIBUTE, RosaState, is_transformed, state_of, weight_of
from rosa_fx.targets import Target, select_targets
from rosa_fx.weight import FrozenBase, LowRankParameters, RosaWeight, SparseParameters

# Times in a transform that freed memory goes back to the system: what is held meanwhile is that share of the weights.
_GIVE_BACK_TIMES = 16


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
    inner = getattr(model, "_orig_mod", model)  # a compiled wrapper names everything by its own prefix
    if is_transformed(inner):
        raise RosaError("the model is already transformed: rosa_fx.merge(model) first, or start from a fresh one")
    targets = select_targets(inner, spec)
    for target in targets:
        _refuse_out_of_range(target)
    requires_grad = {name: p.requires_grad for name, p in inner.named_parameters(remove_duplicate=False)}
    dtype = model_dtype(inner)
    packed = {id(owner) for target in targets for owner, name in target.owners if find_packed(owner, name) is not None}
    weights = _attach_all(targets, spec, strict, dtype)
    for owner in {id(owner): owner for target in targets for owner, _ in target.owners}.values():
        share_class(owner)
        if id(owner) in packed:
            take_over(owner)
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
    for path, module in inner.named_modules(remove_duplicate=False):
        if isinstance(module, RosaWeight):
            module.paths = (*module.paths, normalise(path))
    state = RosaState(spec, strict, {target.name: target for target in targets}, weights, requires_grad)
    for weight in weights.values():
        _make_trainable(weight)
    setattr(inner, ATTRIBUTE, state)
    hide_from_ddp(inner, weights.values())
    forget_quantiser(inner)
    install()
    return model


def _make_trainable(weight: RosaWeight) -> None:
    if weight.low_rank is not None:
        weight.low_rank.requires_grad_(True)
    # With the low-rank part absent there is nothing to warm up; the sparse part waits for its mask either way.
    weight.set_phase("low_rank")


def _refuse_out_of_range(target: Target) -> None:
    """What quantising would refuse half-way through the model is refused before anything is changed."""
    limit = {"nf4": torch.finfo(torch.float32).max, "fp4": torch.finfo(torch.float32).max, "int8": 65504.0}.get(target.base)
    module, attribute = target.owners[0]
    weight = getattr(module, attribute).detach()
    if limit is not None and torch.finfo(weight.dtype).max > limit:
        largest = float(torch.linalg.vector_norm(weight, float("inf")))
        if largest > limit:
            raise RosaError(
                f"{target.name} holds {largest:.6g}, base {target.base!r} reaches {limit:.6g}: use base 'keep' for it"
            )


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that stands for a packed weight whose own is not known: that of the model's first floating parameter."""
    floats = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(floats, torch.get_default_dtype())


def planned_base(target: Target, spec: RosaSpec, default: torch.dtype) -> tuple[BaseFormat, torch.dtype, PackedWeight | None]:
    """Format of the target's base, dtype of the weight that the model sees, and the packed weight that is taken over."""
    packed = find_packed(*target.owners[0])
    if isinstance(packed, PackedWeight):
        return packed.format, packed.dtype or default, packed
    module, attribute = target.owners[0]
    return base_from_spec(target.base, spec.blocksize, spec.double_quant), getattr(module, attribute).dtype, None


def _attach_all(targets: list[Target], spec: RosaSpec, strict: bool, default: torch.dtype) -> dict[str, RosaWeight]:
    """Weight by weight; what was replaced goes back to the system meanwhile, so that a model that barely fits will do."""
    total = sum(getattr(*target.owners[0]).nbytes for target in targets)
    weights, replaced = {}, 0
    for target in targets:
        replaced += getattr(*target.owners[0]).nbytes
        weights[target.name] = _attach(target, spec, strict, default)
        if replaced * _GIVE_BACK_TIMES >= total:
            give_back()
            replaced = 0
    return weights


def _attach(target: Target, spec: RosaSpec, strict: bool, default: torch.dtype) -> RosaWeight:
    module, attribute = target.owners[0]
    original: Tensor = getattr(module, attribute).detach()
    form, weight_dtype, packed = planned_base(target, spec, default)
    dtype = getattr(torch, spec.adapter_dtype)
    matrix = original if packed is not None else original.reshape(target.reading.matrix)
    try:
        # "keep" holds the very tensors: the weight stays as it is, without a second copy.
        kept = packed.tensors if packed is not None else (matrix,) if form.kind == "dense" else None
        tensors = form.quantize(matrix) if kept is None else kept
    except RosaError as error:
        raise RosaError(f"{target.name}: {error}") from error
    device = original.device
    weight = RosaWeight(
        FrozenBase(form, tensors, weight_dtype),
        target.shape,
        LowRankParameters(target.reading, target.rank, spec.init, dtype, device) if target.rank else None,
        SparseParameters(target.reading.matrix, target.nnz, dtype, device) if target.density > 0 else None,
        reading=target.reading,
        scale=target.scale,
        dropout=spec.dropout,
        strict=strict,
    )
    # A buffer, so that it stays with the base through state_dict and copies; `save_adapter` writes it down.
    known = fingerprint(original) if packed is None else packed.fingerprint()
    weight.base.register_buffer("fingerprint", known.to(device))
    weight.train(module.training)
    del original, matrix, packed, kept
    for owner, name in target.owners:
        parametrize.register_parametrization(owner, name, weight, unsafe=True)
    return weight


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

    `.shape` is that of the parameter, `.reading` how it is read as matrices. In a stack of E matrices [N, K] they have a
    low-rank term each, `A` [E, R, K] and `B` [E, N, R], and one sparse term with a mask [E · N, K].
    A term that the spec leaves out is None. Raises RosaError for a name that is not a target.
    """
    return weight_of(model, name)


def base_weight(model: nn.Module, name: str) -> Tensor:
    """The dense frozen base D(Q) of the weight `name`, in its shape ([N, K] mostly) and dtype."""
    return weight_of(model, name).dense_base()


def delta(model: nn.Module, name: str) -> Tensor:
    """The dense ΔW = s·B A + S of the weight `name`, in its shape ([N, K] mostly), float32."""
    return weight_of(model, name).dense_delta()
