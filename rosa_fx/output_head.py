"""Which linear weights are a model's output head, which ``"all-linear"`` leaves alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from rosa_fx.model_weights import ModelWeights, Weight, is_conv1d

HEAD_NAMES = ("lm_head", "embed_out", "output_projection", "classifier", "score", "qa_outputs", "head")
_NOT_VOCABULARY = ("pos", "wpe", "type", "segment", "relative")


def output_heads(model: nn.Module, weights: ModelWeights, linear: Sequence[Weight]) -> set[str]:
    """Names of those of the ``linear`` weights that are an output head. Any of three rules makes one:

    1. It is what ``get_output_embeddings()`` returns, of the model or of a module in it (or the last linear weight
       inside what it returns).
    2. Its output size is the ``num_embeddings`` of an ``nn.Embedding`` (not one whose own name says position, type,
       segment, relative or wpe) and it comes after that table, outside repeated blocks; of several such weights the
       last one. A repeated block is an element of an ``nn.ModuleList`` or ``nn.ModuleDict`` that shares its class with
       another element or is the only one, or an element with children of an ``nn.Sequential`` that shares its class
       with another.
    3. It is the last linear weight inside a direct child (or it is a bare parameter) of the root named ``lm_head``,
       ``embed_out``, ``output_projection``, ``classifier``, ``score``, ``qa_outputs`` or ``head``. The root is the
       model, or what is inside it as long as that is a lone child without parameters beside it (a wrapper).

    A weight that is an embedding's own table (a tied head) is not among ``linear`` at all. When every linear weight is
    a head (a model that is one linear layer called ``head``), ``"all-linear"`` takes them all the same.
    """
    heads: list[Weight | None] = []
    for module in dict.fromkeys(weights.modules.values()):
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                heads.append(_last_inside(getter(), linear))
            except (AttributeError, NotImplementedError, TypeError):
                continue  # a base class that declares the method without having a head
    heads += _vocabulary_heads(weights, linear)
    root = _unwrapped(model)
    for name in HEAD_NAMES:
        heads.append(_last_inside(getattr(root, name, None), linear))
    return {head.name for head in heads if head is not None}


def _last_inside(found: object, linear: Sequence[Weight]) -> Weight | None:
    if isinstance(found, torch.Tensor):
        inside = [weight for weight in linear if weight.parameter is found]
    elif isinstance(found, nn.Module):
        members = set(found.modules())
        inside = [weight for weight in linear if any(module in members for module, _ in weight.owners)]
    else:
        return None
    return inside[-1] if inside else None


def _vocabulary_heads(weights: ModelWeights, linear: Sequence[Weight]) -> Iterator[Weight]:
    position = {module: index for index, module in enumerate(dict.fromkeys(weights.modules.values()))}
    repeated = _repeated_prefixes(weights)
    for name, table in weights.modules.items():
        own_name = name.rpartition(".")[2].lower()
        if not isinstance(table, nn.Embedding) or any(word in own_name for word in _NOT_VOCABULARY):
            continue
        matching = [
            weight
            for weight in linear
            if table.num_embeddings in _output_sizes(weight)
            and not any(f"{weight.name}.".startswith(prefix) for prefix in repeated)
            # A bare parameter's module comes before the tables it contains.
            and any(position[module] > position[table] or _is_bare(module) for module, _ in weight.owners)
        ]
        if matching:
            yield max(matching, key=lambda weight: max(position[module] for module, _ in weight.owners))


def _is_bare(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear | nn.MultiheadAttention) and not is_conv1d(module)


def _output_sizes(weight: Weight) -> tuple[int, ...]:
    module = weight.owners[0][0]
    if weight.parameter is None or weight.dimensions is None or isinstance(module, nn.MultiheadAttention):
        return ()
    rows, columns = weight.shape[-2:]
    if isinstance(module, nn.Linear):
        return (rows,)
    return (columns,) if is_conv1d(module) else (rows, columns)  # a bare parameter may lie either way


def _repeated_prefixes(weights: ModelWeights) -> list[str]:
    prefixes = []
    for name, container in weights.modules.items():
        if not isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            continue
        children = list(container.named_children())
        for key, child in children:
            twin = any(type(other) is type(child) for _, other in children if other is not child)
            if isinstance(container, nn.Sequential):
                repeated = twin and any(True for _ in child.children())
            else:
                repeated = twin or len(children) == 1
            if repeated:
                prefixes.append(f"{name}.{key}." if name else f"{key}.")
    return prefixes


def _unwrapped(model: nn.Module) -> nn.Module:
    seen = {model}
    while len(children := list(model.children())) == 1 and not model._parameters and children[0] not in seen:
        (name,) = (key for key, _ in model.named_children())
        if name in HEAD_NAMES:
            break  # a model that is its head
        model = children[0]
        seen.add(model)
    return model
