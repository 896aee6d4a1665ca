"""The weights of a transformed model that were left alone, each with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rosa_fx.model_weights import ModelWeights, Weight, not_a_product
from rosa_fx.output_head import output_heads
from rosa_fx.passes.report import GraphReport
from rosa_fx.spec import pattern_matcher
from rosa_fx.state import RosaState

_ALONE: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Embedding, "an embedding's table"),
    (nn.EmbeddingBag, "an embedding's table"),
    (nn.Bilinear, "nn.Bilinear multiplies it with two inputs, which is no linear product"),
    (nn.modules.conv._ConvNd, "a convolution of kernel size 1: name it by a pattern"),
)


@dataclass(frozen=True)
class Untouched:
    """A weight with two or more dimensions that is no target: `linear` if the model multiplies with it as a linear does.

    `flops`: of its products in the captured call, forward and grad-input.
    """

    name: str
    shape: tuple[int, ...]
    linear: bool
    reason: str
    flops: int


def untouched_weights(model: nn.Module, state: RosaState, graphs: Sequence[GraphReport]) -> tuple[Untouched, ...]:
    """Every weight of the transformed `model` with two or more dimensions that is not rewritten, in model order.

    Its products in `graphs`, rewritten with `work`, are those that its modules do with a weight of its shape.
    """
    weights = ModelWeights(model)
    linear = [weight for weight in weights.all if weights.is_linear(weight)]
    heads = output_heads(model, weights, linear)
    excluded = [pattern_matcher(pattern) for pattern in state.spec.exclude]
    found = []
    for weight in weights.all:
        if weight.name in state.weights or (weight.dimensions or 0) < 2:
            continue
        shape = tuple(weight.shape) if weight.parameter is not None else _computed_shape(weight)
        paths = tuple(name.rpartition(".")[0] for name in weight.names)
        flops = sum(o.flops for graph in graphs for o in graph.others if o.shape == shape and o.path in paths)
        multiplied = [name for name in weight.names if weights.multiplies(name)]
        if any(matches(name) for matches in excluded for name in weight.names):
            reason = "excluded by the spec"
        else:
            reason = _reason(weights, weight, weight.name in heads, weight in linear, flops)
        known = any(isinstance(module, kind) for module, _ in weight.owners for kind, _ in _ALONE)
        name = multiplied[0] if multiplied else weight.name
        found.append(Untouched(name, shape, bool(multiplied) or (flops > 0 and not known), reason, flops))
    return tuple(found)


def _reason(weights: ModelWeights, weight: Weight, head: bool, linear: bool, flops: int) -> str:
    if table := weights.shared_with_embedding(weight):
        return f"also the table of the embedding {table}"
    if weight.blocked:
        return weight.blocked.partition(":")[0]
    if unusable := weights.unusable(weight):
        return unusable
    for module, _ in weight.owners:
        if isinstance(module, nn.modules.conv._ConvNd) and (why := not_a_product(module)):
            return why
        for kind, reason in _ALONE:
            if isinstance(module, kind):
                return reason
    if head:
        return "the output head"
    if linear:
        return "no pattern in targets names it"
    if flops:
        return "multiplied with, which the source of its class does not show: name it by a pattern"
    return "no product with it in this call or in the source of its class"


def _computed_shape(weight: Weight) -> tuple[int, ...]:
    module, attribute = weight.owners[0]
    chain = dict(getattr(module, "parametrizations", {})).get(attribute)
    held = (
        chain.parameters() if chain is not None else (p for name, p in module.named_parameters() if name.startswith(attribute))
    )
    tensors = list(held)
    return tuple(max(tensors, key=lambda tensor: tensor.numel()).shape) if tensors else ()
