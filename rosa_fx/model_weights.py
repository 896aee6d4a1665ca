"""The weights of a model as the selection sees them: every name, every owner, and how each is used."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from rosa_fx.linear_uses import stack_reading, uses_linearly
from rosa_fx.packed import PackedWeight, find_packed
from rosa_fx.reading import Reading, read

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Weight:
    """One Parameter object, or one weight that is computed from others and so has none (``parameter`` is None).

    ``names``: every fully qualified name, the first in model order first. ``owners``: every (module, attribute) that
    holds it. ``dimensions``: None while it is lazy. ``blocked``: why nothing can be attached to it, as the rest of a
    sentence. ``packed``: the weight that bitsandbytes packed into the parameter, or why that cannot be taken over.
    """

    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]
    parameter: nn.Parameter | None
    dimensions: int | None
    blocked: str = ""
    packed: PackedWeight | str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter, or of what is packed in it."""
        assert self.parameter is not None
        return self.packed.shape if isinstance(self.packed, PackedWeight) else tuple(self.parameter.shape)

    @property
    def name(self) -> str:
        """The first name, the one the weight is known by."""
        return self.names[0]


class ModelWeights:
    """All weights of ``model`` in the order of ``named_parameters()``."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
        blocked = self._computed_weights()
        by_parameter: dict[int, list[str]] = {}
        parameters: dict[int, nn.Parameter] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            by_parameter.setdefault(id(parameter), []).append(name)
            parameters[id(parameter)] = parameter
        self.all: list[Weight] = []
        seen: set[str] = set()
        for key, names in by_parameter.items():
            hidden = [blocked[name] for name in names if name in blocked]
            weight = hidden[0] if hidden else self._weight(names, parameters[key])
            if weight.name not in seen:
                seen.add(weight.name)
                self.all.append(weight)

    def is_linear(self, weight: Weight) -> bool:
        """True if every one of the weight's owners is known to multiply with it, as a matrix or a stack of matrices."""
        if weight.dimensions not in (None, 2):
            return not self.unreadable(weight) and stack_reading(self.modules, weight.names) is not None
        # Of a computed weight only its own name counts; the others are the parameters it is computed from.
        kinds = {name: self._kind(name) for name in (weight.names[:1] if weight.blocked else weight.names)}
        bare = [name for name, kind in kinds.items() if kind == "bare"]
        if not set(kinds.values()) <= {"linear", "bare"}:
            return False
        return not bare or uses_linearly(self.modules, bare)

    def reading(self, weight: Weight) -> Reading:
        """How the weight is read as matrices: as the source of its class shows, filters of size 1 as one matrix, others as
        a stack over all but the last two dimensions."""
        shape = weight.shape
        shown = stack_reading(self.modules, weight.names) if len(shape) > 2 else None
        if shown is None and len(shape) > 2 and math.prod(shape[2:]) == 1:
            return read(shape, 0)
        return read(shape, *(shown or ()))

    def unreadable(self, weight: Weight) -> str:
        """Why the weight is no matrix and no stack of them, as the rest of a sentence; empty if it is."""
        dimensions = weight.dimensions
        if dimensions is None or dimensions == 2:
            return ""
        if dimensions < 2 or weight.blocked:
            return f"has {dimensions} dimensions"
        kinds = {self._kind(name) for name in weight.names}
        convolutions = [module for module, _ in weight.owners if isinstance(module, nn.modules.conv._ConvNd)]
        if convolutions:
            return next((reason for module in convolutions if (reason := not_a_product(module))), "")
        if kinds != {"bare"}:
            return f"has {dimensions} dimensions and belongs to {type(weight.owners[0][0]).__name__}"
        return f"has {dimensions} dimensions and {reason}" if (reason := self.unusable(weight)) else ""

    def multiplies(self, name: str) -> bool:
        """True if the owner under this very name multiplies with the weight, whatever others do (a tied head)."""
        kind = self._kind(name)
        return kind == "linear" or (kind == "bare" and uses_linearly(self.modules, [name]))

    def shared_with_embedding(self, weight: Weight) -> str:
        """The name of an embedding table that is this very Parameter under another owner; empty if there is none."""
        if len(weight.owners) < 2:
            return ""
        return next((name for name in weight.names if self._kind(name) == "embedding"), "")

    def unusable(self, weight: Weight) -> str:
        """Why a weight cannot hold an adapter, as the rest of a sentence; empty if it can."""
        parameter = weight.parameter
        if parameter is None:
            return weight.blocked
        if weight.packed is not None:
            return weight.packed if isinstance(weight.packed, str) else ""
        for module, _ in weight.owners:
            if isinstance(module, nn.RNNBase):
                return f"is read by {type(module).__name__} through its own flat list, past any adapter"
        if parameter.dtype not in _FLOATS:
            return f"has dtype {parameter.dtype}, not one of {', '.join(map(str, _FLOATS))} (is it packed already?)"
        if nn.parameter.is_lazy(parameter) or isinstance(parameter, FakeTensor):
            return ""
        if not isinstance(parameter.data, FakeTensor) and type(parameter.data) is not torch.Tensor:
            return f"is a {type(parameter.data).__name__}, not a plain tensor"
        return ""

    def _weight(self, names: list[str], parameter: nn.Parameter) -> Weight:
        owners: dict[tuple[int, str], tuple[nn.Module, str]] = {}
        for name in names:
            prefix, _, attribute = name.rpartition(".")
            module = self.modules[prefix]
            owners.setdefault((id(module), attribute), (module, attribute))
        lazy = nn.parameter.is_lazy(parameter)
        packed = [found for module, attribute in owners.values() if (found := find_packed(module, attribute)) is not None]
        if packed and len(packed) < len(owners):
            packed = ["is packed by bitsandbytes for one of its modules and read by another one as it is"]
        # Any owner's answer is right for all: the parameter is the same. Where some refuse, their reason counts.
        chosen = next((found for found in packed if isinstance(found, str)), packed[0] if packed else None)
        return Weight(tuple(names), tuple(owners.values()), parameter, None if lazy else parameter.dim(), packed=chosen)

    def _computed_weights(self) -> dict[str, Weight]:
        """Weights that a parametrization or a hook computes, by the names of the parameters they are computed from."""
        found: dict[str, Weight] = {}
        for prefix, module in self.modules.items():
            dot = f"{prefix}." if prefix else ""
            if parametrize.is_parametrized(module):
                for attribute, chain in module.parametrizations.items():
                    inner = [f"{dot}parametrizations.{attribute}.{name}" for name, _ in chain.named_parameters()]
                    originals = [tensor for name, tensor in chain.named_parameters() if name.startswith("original")]
                    why = "is already computed by another torch parametrization"
                    found |= self._blocked(f"{dot}{attribute}", module, attribute, inner, originals, why)
            elif isinstance(module, nn.Linear) and "weight" not in module._parameters:
                # The older weight_norm, spectral_norm and pruning keep weight_g, weight_orig, ... and set the weight.
                inner = [f"{dot}{name}" for name in module._parameters if name.startswith("weight_")]
                why = "is no parameter of its module (a hook computes it, as weight_norm and pruning do)"
                found |= self._blocked(f"{dot}weight", module, "weight", inner, [], why)
        return found

    def _blocked(
        self, name: str, module: nn.Module, attribute: str, inner: list[str], originals: list[nn.Parameter], why: str
    ) -> dict[str, Weight]:
        dimensions = max((tensor.dim() for tensor in originals), default=2)
        remedy = f"{why}: remove that first, or exclude the weight (exclude=[{name!r}])"
        weight = Weight((name, *inner), ((module, attribute),), None, dimensions, remedy)
        return dict.fromkeys(inner, weight)

    def _kind(self, name: str) -> str:
        """How the owner of this name uses it: ``linear``, ``embedding``, ``bare`` (ask its source) or ``other``."""
        prefix, _, attribute = name.rpartition(".")
        module = self.modules[prefix]
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and attribute == "weight":
            return "embedding"
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and attribute == "weight":
            return "linear"
        if isinstance(module, nn.MultiheadAttention) and attribute in _ATTENTION_WEIGHTS:
            return "linear"
        # A container, or a bare nn.Module that only holds parameters: the parent's source tells.
        if isinstance(module, nn.ParameterList | nn.ParameterDict) or type(module) is nn.Module:
            return "bare"
        return "other" if type(module).__module__.partition(".")[0] == "torch" else "bare"


def not_a_product(module: nn.modules.conv._ConvNd) -> str:
    """Why a convolution is no product over its channels, as the rest of a sentence; empty if it is one."""
    if module.transposed:
        return "belongs to a transposed convolution"
    padded = module.padding if isinstance(module.padding, tuple) else ()  # "same" and "valid" add nothing to a kernel of size 1
    for name, values, plain in (("kernel_size", module.kernel_size, 1), ("stride", module.stride, 1), ("padding", padded, 0)):
        if set(values) - {plain}:
            return f"belongs to a convolution with {name} {values}, not {plain}"
    return "" if module.groups == 1 else f"belongs to a convolution with {module.groups} groups"


def is_conv1d(module: nn.Module) -> bool:
    """True for Hugging Face's ``Conv1D``, a linear layer with a weight ``[in, out]`` (found without importing it)."""
    return any(cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__)
