"""The whole life of weights with more than two dimensions: inspection, masks, files, copies, collection, training, merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import FLOAT32, assert_budget, fill, prepared, rewritten
from torch import Tensor, nn

import rosa_fx
from rosa_fx.spec import RosaSpec


class Mixture(nn.Module):
    """Experts of both kinds and a merged projection, small enough to follow entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 12, 8) * 0.3)
        self.out = nn.Parameter(torch.randn(8, 2, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bsd,dhk->bshk", x, self.out).flatten(2)
        parts = [torch.tanh(F.linear(x, self.up[e])) @ self.down[e] for e in range(3)]
        return torch.stack(parts).sum(0)


def mixture(**spec: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Mixture()
    model = rosa_fx.transform(copy.deepcopy(plain), RosaSpec(**{"rank": 2, "density": 0.1, "base": "nf4"} | spec))
    return plain, model


@pytest.mark.parametrize("base", ["nf4", "int8", "keep"])
def test_inspection_masks_files_copies_and_merge(base: str, tmp_path: Path) -> None:
    plain, model = mixture(base=base)
    fill(model)
    term = rosa_fx.adapter(model, "up")
    assert (term.low_rank.A.shape, term.low_rank.B.shape) == ((3, 2, 8), (3, 12, 2))
    assert (rosa_fx.adapter(model, "out").low_rank.A.shape, rosa_fx.adapter(model, "out").low_rank.B.shape) == ((2, 8), (8, 2))
    mask = rosa_fx.masks(model)["up"]
    assert (mask.shape, mask.to_dense().sum().item()) == ((36, 8), int(0.1 * 3 * 12 * 8))
    dense = {name: rosa_fx.base_weight(model, name) + rosa_fx.delta(model, name) for name in ("up", "down", "out")}
    assert {name: tuple(value.shape) for name, value in dense.items()} == {
        "up": (3, 12, 8), "down": (3, 12, 8), "out": (8, 2, 4),
    }  # fmt: skip
    if base == "keep":
        assert torch.equal(rosa_fx.base_weight(model, "up"), plain.up)
    x = torch.randn(2, 5, 8)
    expected = model(x)
    for name, value in dense.items():
        torch.testing.assert_close(getattr(model, name), value)
    rosa_fx.save_adapter(model, tmp_path / "a")
    loaded = rosa_fx.load_adapter(copy.deepcopy(plain), tmp_path / "a")
    assert torch.equal(loaded(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    fresh = rosa_fx.transform(copy.deepcopy(plain), rosa_fx.state.state_of(model).spec)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)
    rosa_fx.merge(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(model(x), expected)
    for name, value in dense.items():
        torch.testing.assert_close(model.get_parameter(name), value)


def test_adapter_of_another_reading_is_refused(tmp_path: Path) -> None:
    plain, model = mixture()
    rosa_fx.save_adapter(model, tmp_path / "a")

    class Other(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.out)

    other = Other()
    other.load_state_dict(plain.state_dict())
    with pytest.raises(
        rosa_fx.RosaError, match=r"out: matrices is \(1, 8, 8\) in the adapter .* and \(8, 2, 4\) in this model"
    ):
        rosa_fx.load_adapter(other, tmp_path / "a")


def test_masks_may_be_given_in_the_shape_of_the_weight() -> None:
    _, model = mixture()
    nnz = rosa_fx.adapter(model, "up").sparse.values.numel()
    chosen = torch.zeros(3 * 12 * 8, dtype=torch.bool).index_fill_(0, torch.randperm(288)[:nnz], True).view(3, 12, 8)
    rosa_fx.set_masks(model, {"up": chosen})
    assert torch.equal(rosa_fx.masks(model)["up"].to_dense().view(3, 12, 8), chosen)
    rosa_fx.set_masks(model, {"up": rosa_fx.Mask.from_dense(chosen.view(36, 8))})
    with pytest.raises(rosa_fx.RosaError, match=r"up: the mask has shape \[12, 3, 8\], the weight \[3, 12, 8\]"):
        rosa_fx.set_masks(model, {"up": chosen.view(12, 3, 8)})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_collected_masks_are_the_largest_entries_of_the_dense_gradient(compiled: bool, micro_batches: int) -> None:
    plain, model = mixture(base="keep", schedule="wl0", density=0.05)
    schedule = rosa_fx.MaskSchedule(model, micro_batches=micro_batches)
    call = rewritten(model)[0] if compiled else model
    schedule.begin_step()
    score = {name: torch.zeros(p.shape) for name, p in plain.named_parameters()}
    for micro in range(micro_batches):
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(micro))
        call(x).square().sum().backward()
        plain.zero_grad()
        plain(x).square().sum().backward()
        for name, p in plain.named_parameters():
            score[name] += p.grad.square()
    schedule.end_step()
    for name, mask in rosa_fx.masks(model).items():
        best = score[name].flatten().topk(mask.nnz).indices
        assert set(mask.to_dense().flatten().nonzero().flatten().tolist()) == set(best.tolist()), name
    assert schedule.phase == "joint"


def test_dropout_drops_its_own_features_for_each_matrix() -> None:
    torch.manual_seed(0)
    model = prepared(lambda x, w, b: torch.bmm(x, w.mT), (3, 32, 24), dropout=0.5, density=0.0)
    term = rosa_fx.adapter(model, "weight")
    x = torch.eye(24).expand(3, 24, 24)
    full = term.scale * (term.low_rank.B @ term.low_rank.A).mT
    base = rosa_fx.base_weight(model, "weight").mT
    kept = base.double() + 2 * term.scale * (term.low_rank.B.double() @ term.low_rank.A.double()).mT
    call, reports = rewritten(model, fullgraph=True)
    for spelled in (model, call):
        y = spelled(x)
        dropped = (y == base).all(dim=2)
        assert 0 < int(dropped.sum()) < 72, "rows of the base alone where a feature was dropped"
        assert len({tuple(row.tolist()) for row in dropped}) == 3, "not the same ones in each"
        assert_budget([y[~dropped]], [(base + 2 * full)[~dropped]], [kept[~dropped]], factor=FLOAT32)
    assert [report.counts["dense"] for report in reports] == [0]


def test_an_optimizer_step_trains_every_matrix() -> None:
    _, model = mixture()
    fill(model)
    optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rewritten(model)[0](torch.randn(2, 5, 8)).square().sum().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert len(before) == 9
    for name, value in before.items():
        changed = (after[name] != value).flatten(1).any(1) if value.dim() == 3 else (after[name] != value).any()
        assert bool(changed.all()), name
