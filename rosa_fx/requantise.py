"""`merge(into="same")`: D(Q) + ΔW in the format of the base again, in modules of bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rosa_fx.distributed.gradients import hide_from_ddp, show_to_ddp
from rosa_fx.errors import RosaError
from rosa_fx.kernels.bases.base import BaseFormat
from rosa_fx.kernels.bases.fourbit import BLOCKSIZES, NESTED_BLOCKSIZE, FourBitFormat
from rosa_fx.merge_report import MergedWeight, MergeReport
from rosa_fx.packed import CastingLinear, is_packed_linear
from rosa_fx.spec import RosaSpec
from rosa_fx.state import ATTRIBUTE, RosaState, state_of
from rosa_fx.weight import RosaWeight

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def merge_same(
    model: nn.Module, inner: nn.Module, state: RosaState, rank: int, steps: int
) -> tuple[MergeReport, Callable[[], None]]:
    """See `rosa_fx.merge`. Returns the report and what undoes it."""
    for field, value, least in (("refit_rank", rank, 0), ("refit_steps", steps, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise RosaError(f"{field} is {value!r}: use a whole number of at least {least}")
    for name, weight in state.weights.items():
        _refuse_unfit(name, weight, state, rank)
    replaced: dict[int, nn.Module] = {}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    rows = []
    for name, weight in state.weights.items():
        tensors, refit, row = _requantised(name, weight, rank, steps)
        rows.append(row)
        if refit is not None:
            factors[name] = refit
        parameter: nn.Parameter | None = None
        for owner, _ in state.targets[name].owners:
            module = _linear_of(owner, weight, tensors, parameter)
            parameter = module.weight
            if weight.base.format.kind == "dense":
                parameter.requires_grad_(state.requires_grad.get(name, False))
            replaced[id(owner)] = module
    places = [
        (parent, name, child, replaced[id(child)])
        for parent in list(inner.modules())
        for name, child in parent._modules.items()
        if child is not None and id(child) in replaced
    ]
    trains = {name: p.requires_grad for name, p in inner.named_parameters(remove_duplicate=False)}
    for parent, name, _, new in places:
        parent._modules[name] = new
    delattr(inner, ATTRIBUTE)
    show_to_ddp(inner)
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and name in state.requires_grad:
            parameter.requires_grad_(state.requires_grad[name])
    quantiser = _describe(inner, state)
    if rank:
        _transform_again(model, state, rank, factors)

    def undo() -> None:
        for parent, name, old, _ in places:
            parent._modules[name] = old
        for name, value in quantiser.items():
            _put(inner, name, value)
        setattr(inner, ATTRIBUTE, state)
        hide_from_ddp(inner, state.weights.values())
        for name, parameter in inner.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(trains.get(name, False))

    return MergeReport(model, tuple(rows)), undo


def _refuse_unfit(name: str, weight: RosaWeight, state: RosaState, rank: int) -> None:
    reason, remedy = None, "use into='dense'"
    form, shape = weight.base.format, weight.shape
    for owner, attribute in state.targets[name].owners:
        original = type(owner).__bases__[0]
        if attribute != "weight" or not (original in (nn.Linear, CastingLinear) or is_packed_linear(owner)):
            reason = f"it is {attribute!r} of a {original.__name__}, and bitsandbytes has a module for nn.Linear only"
    if isinstance(form, FourBitFormat) and shape[1] % form.blocksize:
        reason = f"its {shape[1]} columns are no whole blocks of {form.blocksize}, which bitsandbytes reads wrongly on a CPU"
        whole = [size for size in BLOCKSIZES if shape[1] % size == 0]
        other = (
            f"a model transformed with RosaSpec(blocksize={max(whole)}) has whole ones"
            if whole
            else (f"a model transformed with overrides={{{name!r}: {{'base': 'keep'}}}} keeps it dense")
        )
        remedy = f"{remedy}; {other}"
    if rank and form.kind == "int8" and len({id(owner) for owner, _ in state.targets[name].owners}) > 1:
        reason = "several modules share it, which int8 parameters of bitsandbytes cannot, nor then the refitted term"
        remedy = "use refit_rank=0 or into='dense'"
    if rank > min(shape):
        reason, remedy = f"refit_rank {rank} exceeds its size {list(shape)}", f"use refit_rank={min(shape)} or less"
    if reason:
        raise RosaError(f"{name} cannot be merged into its own format: {reason}: {remedy}")


@torch.no_grad()
def _requantised(
    name: str, weight: RosaWeight, rank: int, steps: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor] | None, MergedWeight]:
    form, shape, base = weight.base.format, weight.shape, weight.base
    wide = torch.promote_types(base.dtype, torch.float32)
    update = weight.dense_delta()
    exact = form.dequantize(base.tensors(), shape, wide).add_(update)

    def quantised(value: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        try:
            tensors = form.quantize(value.to(base.dtype) if form.kind == "dense" else value)
        except RosaError as error:
            raise RosaError(f"{name}: {error}") from error
        return tensors, form.dequantize(tensors, shape, wide)

    tensors, dense = quantised(exact)
    best, refit, residual = tensors, None, exact - dense
    error = float(residual.norm())
    if rank:
        error = float("inf")
        for _ in range(steps):
            B, A = _truncated(residual, rank)
            left = float((residual - B @ A).norm())
            if left < error:
                best, refit, error = tensors, (A, B), left
            tensors, dense = quantised(exact - B @ A)
            residual = exact - dense
    scale, change = float(exact.norm()), float(update.norm())
    row = MergedWeight(name, form.kind, error / scale if scale else 0.0, error / change if change else 0.0, rank)
    return best, refit, row


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [N, R] and A [R, K] with B A the nearest matrix of that rank."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * V[:rank]


# --- modules ---------------------------------------------------------------------------------------------------------


def _linear_of(owner: Any, weight: RosaWeight, tensors: tuple[Tensor, ...], shared: nn.Parameter | None) -> Any:
    """A module like `owner` with the new weight; `shared`: the parameter that another owner has already.

    An int8 parameter cannot be shared, since bitsandbytes takes the scales out of it at first use: there owners get parameters
    of their own around the same two tensors.
    """
    import bitsandbytes as bnb

    form, dtype = weight.base.format, weight.base.dtype
    rows, columns = weight.shape
    bias = owner.bias
    if form.kind == "dense":
        new: Any = CastingLinear(columns, rows, bias is not None, device="meta")
        if not isinstance(owner, CastingLinear) and not is_packed_linear(owner):
            new.__class__ = nn.Linear
        new.weight = shared if shared is not None else nn.Parameter(tensors[0])
    elif isinstance(form, FourBitFormat):
        compute = getattr(owner, "compute_dtype", None) or dtype
        new = bnb.nn.Linear4bit(columns, rows, bias is not None, compute, form.double_quant, form.kind, device="meta")
        packed, state = tensors[0], _quant_state(form, tensors, weight.matrix, dtype)
        fields = {"blocksize": form.blocksize, "compress_statistics": form.double_quant, "quant_type": form.kind}
        made = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, module=new, bnb_quantized=True, **fields)
        new.weight = shared if shared is not None else made
        new.quant_state = state
        new.compute_type_is_set = True
    else:
        new = bnb.nn.Linear8bitLt(columns, rows, bias is not None, has_fp16_weights=False, device="meta")
        codes, scales = tensors
        new.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    new.bias = bias
    for name in _HOOKS:
        setattr(new, name, getattr(owner, name))
    new.train(owner.training)
    return new


def _quant_state(form: BaseFormat, tensors: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Any:
    from bitsandbytes import functional

    assert isinstance(form, FourBitFormat)
    device = tensors[0].device
    code = functional.get_4bit_type(form.kind, device=device)
    offset = nested = None
    if form.double_quant:
        table = functional.create_dynamic_map().to(device)
        nested = functional.QuantState(absmax=tensors[2], code=table, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
        offset = tensors[3]
    return functional.QuantState(
        absmax=tensors[1],
        shape=torch.Size(shape),
        code=code,
        blocksize=form.blocksize,
        quant_type=form.kind,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )


# --- transformers ----------------------------------------------------------------------------------------------------

_MISSING = object()


def _put(owner: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    if value is _MISSING:
        vars(owner).pop(name, None)
    else:
        setattr(owner, name, value)


def _describe(model: Any, state: RosaState) -> dict[str, Any]:
    """Tell a model of transformers how its weights are packed, so that it saves them; returns what was there before."""
    forms = {weight.base.format for weight in state.weights.values()}
    packed = [form for form in forms if form.kind != "dense"]
    if not hasattr(model, "save_pretrained") or len(packed) != 1:
        return {}
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    form = packed[0]
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not is_packed_linear(module)]
    dtype = next(iter(state.weights.values())).base.dtype
    fields: dict[str, Any] = {"llm_int8_skip_modules": plain}
    if isinstance(form, FourBitFormat):
        fields |= {"load_in_4bit": True, "bnb_4bit_quant_type": form.kind, "bnb_4bit_compute_dtype": dtype}
        fields |= {"bnb_4bit_use_double_quant": form.double_quant}
    else:
        fields |= {"load_in_8bit": True}
    config = BitsAndBytesConfig(**fields)
    quantiser = AutoHfQuantizer.from_config(config, pre_quantized=True)
    new = {
        "hf_quantizer": quantiser,
        "config.quantization_config": config,
        "quantization_method": config.quant_method,
        "is_quantized": True,
        "is_loaded_in_4bit": isinstance(form, FourBitFormat),
        "is_loaded_in_8bit": not isinstance(form, FourBitFormat),
    }
    before = {}
    for path, value in new.items():
        owner = model.config if path.startswith("config.") else model
        before[path] = vars(owner).get(path.rpartition(".")[2], _MISSING)
        _put(model, path, value)
    return before


def _transform_again(model: nn.Module, state: RosaState, rank: int, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    from rosa_fx.attach import transform

    spec = RosaSpec(
        base="keep",
        rank=rank,
        alpha=float(rank),  # scale 1
        density=0.0,
        schedule="lora_only",
        targets=tuple(state.targets),
        adapter_dtype=state.spec.adapter_dtype,
    )
    transform(model, spec, strict=state.strict)
    with torch.no_grad():
        for name, (A, B) in factors.items():
            low_rank = state_of(model).weights[name].low_rank
            assert low_rank is not None
            low_rank.A.copy_(A)
            low_rank.B.copy_(B)
