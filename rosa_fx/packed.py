"""Weights that bitsandbytes has packed already are taken as they are: same bits, same memory.

A module of bitsandbytes computes with its own packed weight. When such a weight is rewritten the module stays the same
object and an instance of its class, and its `forward` becomes that of `CastingLinear`, which reads `weight` like any linear.
What is not kept is the quantisation of *activations* that `Linear8bitLt` does (and with it its outlier threshold): x is
multiplied with D(Q) in its own precision.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa_fx.errors import RosaError
from rosa_fx.fingerprint import BYTES, fingerprint
from rosa_fx.kernels.bases.base import BaseFormat, base_format
from rosa_fx.kernels.bases.fourbit import BLOCKSIZES, NESTED_BLOCKSIZE

_OWN_ATTRIBUTES = {
    "Linear4bit": ("compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu"),
    "Linear8bitLt": ("state", "index"),
}


class CastingLinear(nn.Linear):
    """An `nn.Linear` that computes in `compute_dtype` (None: the dtype of x), whatever its weight has; y has x's dtype.

    This is bitsandbytes' contract: their linears take any input dtype, which models prepared for them rely on.
    """

    compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [N, K] as bitsandbytes holds it. `dtype` is that of the weight it was made from, where that is known."""

    shape: tuple[int, int]
    dtype: torch.dtype | None
    format: BaseFormat
    tensors: tuple[Tensor, ...]

    def __str__(self) -> str:
        form = self.format.to_dict()
        details = [f"blocks of {form['blocksize']}"] if "blocksize" in form else []
        details += ["double-quantised"] if form.get("double_quant") else []
        return ", ".join([f"{self.format.kind} as bitsandbytes packed it", *details])

    def fingerprint(self) -> Tensor:
        """uint8 [16], see `rosa_fx.fingerprint`: of the scales, which are exact absolute maxima of the original weight.

        So the checkpoint is known again whichever device or release packed it; the codes round a little differently from
        one to the next, and double-quantised scales too: there it is zeros (unknown).
        """
        scales = self.tensors[1]
        known = scales.is_floating_point()
        return fingerprint(scales) if known else torch.zeros(BYTES, dtype=torch.uint8, device="cpu")


def find_packed(module: nn.Module, attribute: str) -> PackedWeight | str | None:
    """The packed weight of a module of bitsandbytes, or why it cannot be taken over; None for any other module."""
    kind = _kind(type(module))
    if kind is None or attribute not in module._parameters:
        return None
    who = f"belongs to bitsandbytes' {type(module).__name__}"
    if attribute != "weight" or not kind:
        return f"{who}, which rosa_fx does not take over"
    parameter = module._parameters[attribute]
    assert parameter is not None
    if parameter.is_meta:
        return f"{who} and is on the meta device or offloaded: load the model with its weights in memory"
    found = _four_bit(module, parameter) if kind == "Linear4bit" else _eight_bit(module, parameter)
    return f"{who}, {found}" if isinstance(found, str) else found


def _four_bit(module: nn.Module, parameter: nn.Parameter) -> PackedWeight | str:
    state: Any = getattr(parameter, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        return _not_yet(parameter)
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "which repacked it, with scales rounded to bfloat16, in an earlier forward without gradients on this CPU: "
            "load the model again and transform it before it is used"
        )
    if state.blocksize not in BLOCKSIZES or state.quant_type not in ("nf4", "fp4"):
        return f"in a format that is unknown here ({state.quant_type}, blocks of {state.blocksize})"
    packed = parameter.data
    if packed.dtype != torch.uint8:  # `quant_storage`: the same bytes under another name
        packed = packed.view(torch.uint8)
    rows, columns = state.shape
    nested = (state.state2.absmax, state.offset) if state.nested else ()
    tensors = (packed.view(-1, 1), state.absmax, *nested)
    form = base_format(state.quant_type, blocksize=state.blocksize, double_quant=bool(state.nested))
    known = not state.nested or (state.state2.blocksize == NESTED_BLOCKSIZE and _same_table(state.state2.code, "dynamic"))
    if not known or not _same_table(state.code, state.quant_type) or not _fits(form, tensors, (rows, columns)):
        return "with scales or tables that are not those of this release"
    return PackedWeight((rows, columns), state.dtype, form, tensors)


def _eight_bit(module: Any, parameter: nn.Parameter) -> PackedWeight | str:
    # The scales wander from the parameter to the module's state in the first forward.
    scales = getattr(parameter, "SCB", None)
    scales = module.state.SCB if scales is None else scales
    codes = parameter.data
    if codes.dtype != torch.int8 or scales is None:
        return _not_yet(parameter)
    form = base_format("int8")
    shape = (codes.shape[0], codes.shape[1])
    if not _fits(form, (codes, scales), shape):
        return "with scales that are not those of this release"
    return PackedWeight(shape, None if module.bias is None else module.bias.dtype, form, (codes, scales))


def _not_yet(parameter: nn.Parameter) -> str:
    if getattr(parameter, "has_fp16_weights", False):
        return "which quantises anew in every forward (has_fp16_weights=True): use has_fp16_weights=False or nn.Linear"
    return "which has not quantised it yet: move the model to its device first (model.to(device))"


def _fits(form: BaseFormat, tensors: tuple[Tensor, ...], shape: tuple[int, int]) -> bool:
    return [(tuple(t.shape), t.dtype) for t in tensors] == [(part.shape, part.dtype) for part in form.layout(shape)]


def _same_table(code: Tensor, kind: str) -> bool:
    return torch.equal(code.to("cpu", torch.float32), _table(kind))


@functools.cache
def _table(kind: str) -> Tensor:
    from bitsandbytes import functional

    with torch.inference_mode(False), torch.device("cpu"):
        return functional.create_dynamic_map() if kind == "dynamic" else functional.get_4bit_type(kind, device="cpu")


def _kind(cls: type) -> str | None:
    """Which of bitsandbytes' two linears this is or derives from; "" for its other modules, None for all others."""
    if not any(base.__module__.partition(".")[0] == "bitsandbytes" for base in cls.__mro__):
        return None
    modules: Any = sys.modules["bitsandbytes"].nn
    return next((name for name in _OWN_ATTRIBUTES if issubclass(cls, getattr(modules, name))), "")


def is_packed_linear(module: nn.Module) -> bool:
    """Whether this is a linear of bitsandbytes, taken over or not."""
    return bool(_kind(type(module)))


# --- modules ---------------------------------------------------------------------------------------------------------


def members_for(original: type) -> dict[str, Any]:
    """What the class of a rewritten module has instead of the members of `original`; nothing for most classes."""
    if not _kind(original):
        return {}
    # The others look for bitsandbytes' state beside the weight, which lies in the base now.
    plain = ("to", "_save_to_state_dict", "_load_from_state_dict")
    return {"forward": CastingLinear.forward, **{name: getattr(nn.Module, name) for name in plain}}


def take_over(module: Any) -> None:
    """After the packed weight was moved into the base: forget bitsandbytes' references to it."""
    if _kind(type(module)) == "Linear4bit":
        module.quant_state = None
    else:
        module.state.CB = module.state.SCB = None
        module.compute_dtype = None
    cls: Any = type(module)
    former = cls.__bases__[0].forward
    # Wrappers such as accelerate's device hooks keep the module's former `forward` as an attribute and call that.
    for name, value in list(vars(module).items()):
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is former:
            vars(module)[name] = MethodType(cls.forward, module)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What `become_dense` would take away from a linear of bitsandbytes; nothing for other modules."""
    kind = _kind(type(module))
    names = (*_OWN_ATTRIBUTES[kind], "compute_dtype") if kind else ()
    return {name: vars(module)[name] for name in names if name in vars(module)}


def become_dense(module: nn.Module) -> None:
    """After a merge: `module`, still the same object, is a `CastingLinear` with a dense weight."""
    kind = _kind(type(module))
    assert kind
    compute_dtype = getattr(module, "compute_dtype", None)
    for name in (*_OWN_ATTRIBUTES[kind], "compute_dtype"):
        vars(module).pop(name, None)
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(getattr(hook, "hook", hook), "__module__", "").startswith("bitsandbytes"):
            del hooks[key]
    module.__class__ = CastingLinear
    if compute_dtype is not None:
        module.compute_dtype = compute_dtype


def forget_quantiser(model: nn.Module) -> None:
    """After a transform or a merge: a model of transformers whose packed weights are all taken over is no quantised one any
    more, so that it can be cast, trained and saved."""
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is None or any(is_packed_linear(m) and not hasattr(m, "parametrizations") for m in model.modules()):
        return
    quantiser.remove_quantization_config(model)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            setattr(model, name, False)


def refuse_requantising(name: str, packed: PackedWeight, base: str, origin: str) -> None:
    """A packed weight is kept. Raises RosaError for any other `base`, naming the field `origin` that asks for it."""
    if base != "keep":
        raise RosaError(
            f"{origin}: base {base!r} for the weight {name!r}, which is {packed}: quantising it again would lose twice. "
            "Use base 'keep', which takes it over as it is, or load the model without quantization_config"
        )
