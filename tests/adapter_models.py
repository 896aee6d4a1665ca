"""Models with trained adapters, and what the tests of adapter files compare."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaError, RosaSpec

N, K = 48, 64


class Net(nn.Module):
    """Three linears, two of which share their weight, and a bare weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(K, N)
        self.b = nn.Linear(N, K, bias=False)
        self.c = nn.Linear(K, N)
        self.w = nn.Parameter(torch.randn(K, N) / 8)
        self.head = nn.Linear(K, 5)
        if tied:
            self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.tanh(self.a(x)))
        return self.head(torch.tanh(self.c(x)) @ self.w.T)


def plain(seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net(tied).to(dtype)


def spec_of(**fields: Any) -> RosaSpec:
    patterns = ["a.weight", "b.weight", "c.weight", "w"]
    return RosaSpec(**{"base": "nf4", "rank": 4, "density": 0.05, "targets": patterns, **fields})


@torch.no_grad()
def train(model: nn.Module, masks: bool = True) -> nn.Module:
    """Stand-in for training: random adapter values, and random masks."""
    generator = torch.Generator().manual_seed(7)
    state = rosa_fx.adapter_state(model)
    if masks:
        found = {}
        for name, target in model._rosa_fx_state.targets.items():  # type: ignore[union-attr]
            if target.nnz:
                flat = torch.randperm(target.shape[0] * target.shape[1], generator=generator)[: target.nnz]
                dense = torch.zeros(target.shape, dtype=torch.bool)
                dense.view(-1)[flat] = True
                found[name] = dense
        rosa_fx.set_masks(model, found)
    for key, tensor in state.items():
        if tensor.is_floating_point() and (masks or "sparse" not in key):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
    return model


def trained(tied: bool = False, dtype: torch.dtype = torch.float32, masks: bool = True, **fields: Any) -> nn.Module:
    return train(rosa_fx.transform(plain(tied=tied, dtype=dtype), spec_of(**fields)), masks)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def assert_refused(model: nn.Module, folder: Path, message: str) -> None:
    """Refused with this message, and the model is what it was."""
    before, kind, modes = contents(model), type(model), [p.requires_grad for p in model.parameters()]
    phases = [getattr(m, "phase", None) for m in model.modules()]
    with pytest.raises(RosaError, match=message):
        rosa_fx.load_adapter(model, folder)
    assert_same(before, contents(model))
    assert type(model) is kind
    assert modes == [p.requires_grad for p in model.parameters()]
    assert phases == [getattr(m, "phase", None) for m in model.modules()]
