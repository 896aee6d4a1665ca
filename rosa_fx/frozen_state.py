"""What a checkpoint of a transformed model can leave out: everything frozen, which the base model brings again."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rosa_fx.fingerprint import as_text, fingerprint
from rosa_fx.state import is_transformed
from rosa_fx.weight import RosaWeight


class FrozenKeys(Collection[str]):
    """The `state_dict` keys of all that is frozen in `model`, looked up when they are asked for; none once it is merged.

    Base tensors and other parameters that do not train. What stays: adapters in every phase, parameters that the user lets
    train, and buffers outside the bases, such as running statistics. For transformers' `_keys_to_ignore_on_save`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __iter__(self) -> Iterator[str]:
        return iter(frozen_tensors(self._model))

    def __len__(self) -> int:
        return len(frozen_tensors(self._model))

    def __contains__(self, key: object) -> bool:
        return key in frozen_tensors(self._model)


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """See `FrozenKeys`; with the tensors."""
    if not is_transformed(model):
        return {}
    found: dict[str, Tensor] = {}
    adapters: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RosaWeight):
            adapters |= {id(parameter) for parameter in module.parameters()}
            found |= {f"{path}.base.{name}": tensor for name, tensor in module.base.state_dict().items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in adapters and not parameter.requires_grad:
            found[name] = parameter
    return found


@torch.no_grad()
def frozen_digest(model: nn.Module) -> str:
    """A checksum of the base weights as they were before quantisation, where known, and of other frozen parameters."""
    digest = hashlib.blake2b(digest_size=16)
    parts: dict[str, Any] = {}
    for key, tensor in frozen_tensors(model).items():
        if key.endswith(".base.fingerprint"):
            parts[key] = as_text(tensor)
        elif isinstance(tensor, nn.Parameter):
            parts[key] = as_text(fingerprint(tensor)) if tensor.is_floating_point() else None
    for key, text in sorted(parts.items()):
        digest.update(f"{key} {text};".encode())
    return digest.hexdigest()
