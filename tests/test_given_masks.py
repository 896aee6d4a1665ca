"""Masks that are given, kept and refused, and `Mask` itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_rosa import (
    D,
    J,
    L,
    P,
    Tiny,
    assert_same_masks,
    assert_unchanged,
    batch,
    frozen,
    loss_of,
    snapshot,
    spec_of,
    target_names,
    train_step,
    twins,
)
from torch import Tensor, nn

import rosa_fx


def random_masks(model: Any) -> dict[str, Tensor]:
    found = {}
    for name in target_names(model):
        weight = rosa_fx.adapter(model, name)
        dense = torch.zeros(weight.shape, dtype=torch.bool)
        dense.view(-1)[torch.randperm(dense.numel())[: weight.sparse.values.numel()]] = True
        found[name] = dense
    return found


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "phases"), [("wl2", [L, L, J, J]), ("wl0", [J, J]), ("spa_only", [P, P])])
def test_given_masks_are_kept(when: str, name: str, phases: list[str]) -> None:
    model = rosa_fx.transform(Tiny(), spec_of(schedule=name, rank=0 if name == "spa_only" else 4))
    given = random_masks(model)
    if when == "before":
        rosa_fx.set_masks(model, given)
    schedule = rosa_fx.MaskSchedule(model)
    if when == "after":
        rosa_fx.set_masks(model, given)
    optimizer = torch.optim.SGD(rosa_fx.trainable_parameters(model, lr_sparse=0.1), momentum=0.9)
    for step, phase in enumerate(phases):
        schedule.begin_step()
        assert schedule.phase == phase
        train_step(model, schedule, [batch(step)], optimizer)
        values = [rosa_fx.adapter(model, n).sparse.values for n in given]
        assert all(v.any() for v in values) == (phase != L)
    assert all(torch.equal(rosa_fx.masks(model)[n].to_dense(), mask) for n, mask in given.items())


def test_a_given_mask_survives_collection_for_the_others() -> None:
    spec = spec_of()
    model, oracle = twins(spec)
    mask = random_masks(model)["v.weight"]
    rosa_fx.set_masks(model, {"v.weight": mask})
    schedule = rosa_fx.MaskSchedule(model)
    for step in range(2):
        train_step(model, schedule, [batch(step)])
        oracle.step([batch(step)], loss_of, None)
    oracle.weights["v.weight"].mask = mask
    assert_same_masks(model, oracle)


@st.composite
def dense_masks(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(bits).view(rows, columns)


@settings(max_examples=50, deadline=None)
@given(dense=dense_masks(), seed=st.integers(0, 2**20))
def test_mask_round_trips(dense: Tensor, seed: int) -> None:
    mask = rosa_fx.Mask.from_dense(dense)
    shape, nnz = tuple(dense.shape), int(dense.sum())
    mask.validate("w", shape, nnz)
    assert (mask.nnz, mask.row_offsets.dtype, mask.cols.dtype) == (nnz, torch.int32, torch.int32)
    assert torch.equal(mask.to_dense(), dense)
    shuffled = torch.randperm(nnz, generator=torch.Generator().manual_seed(seed))
    rows, cols = dense.nonzero(as_tuple=True)
    again = rosa_fx.Mask.from_indices(rows[shuffled], cols[shuffled], shape)
    assert torch.equal(again.row_offsets, mask.row_offsets)
    assert torch.equal(again.cols, mask.cols)
    assert torch.equal(again.rows(), rows)


def test_columns_above_int16() -> None:
    """16-bit column indices would end at 32,767: such a weight is masked and trained right up to its last column."""
    columns = 40_000
    model = rosa_fx.transform(nn.Linear(columns, 2, bias=False), spec_of(schedule="wl0", rank=0, density=2.5e-5))
    x = torch.zeros(1, columns)
    x[0, -1], x[0, 32_768] = 3.0, 2.0
    schedule = rosa_fx.MaskSchedule(model)
    optimizer = torch.optim.SGD(rosa_fx.trainable_parameters(model, lr_sparse=1.0))
    for _ in range(2):
        schedule.begin_step()
        (model(x) * torch.tensor([1.0, 0.5])).sum().backward()
        optimizer.step()
        schedule.end_step()
    mask = rosa_fx.masks(model)["weight"]
    assert (mask.rows().tolist(), mask.cols.tolist()) == ([0, 0], [32_768, columns - 1])
    assert torch.equal(mask.to_dense().nonzero(), torch.tensor([[0, 32_768], [0, columns - 1]]))
    assert rosa_fx.adapter(model, "weight").sparse.values.tolist() == [-2.0, -3.0]


def test_set_masks_accepts_both_forms() -> None:
    model = rosa_fx.transform(Tiny(), spec_of())
    given_masks = random_masks(model)
    rosa_fx.set_masks(model, {"q.weight": given_masks["q.weight"]})
    rosa_fx.set_masks(model, {"up.weight": rosa_fx.Mask.from_dense(given_masks["up.weight"])})
    assert rosa_fx.masks(model).keys() == {"q.weight", "up.weight"}
    for name, mask in rosa_fx.masks(model).items():
        assert torch.equal(mask.to_dense(), given_masks[name])
        assert mask.cols.dtype == mask.row_offsets.dtype == torch.int32


def edited(mask: rosa_fx.Mask, **changes: Any) -> rosa_fx.Mask:
    return dataclasses.replace(mask, **changes)


def swapped(mask: rosa_fx.Mask, duplicate: bool) -> Tensor:
    """Columns with the first two entries of one row exchanged, or made equal."""
    cols = mask.cols.clone()
    row = int((mask.row_offsets.diff() >= 2).nonzero()[0])
    first = int(mask.row_offsets[row])
    cols[first], cols[first + 1] = (mask.cols[first],) * 2 if duplicate else (mask.cols[first + 1], mask.cols[first])
    return cols


def replaced(tensor: Tensor, at: int, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


BAD_MASKS: dict[str, tuple[Callable[[rosa_fx.Mask], Any], str]] = {
    "shape": (lambda m: edited(m, shape=(D, D + 1)), "shape"),
    "transposed": (lambda m: m.to_dense().t().contiguous(), "shape"),
    "too few": (lambda m: rosa_fx.Mask.from_dense(m.to_dense() & (torch.arange(D) > 3)), "entries"),
    "too many": (lambda m: torch.ones(24, D, dtype=torch.bool), "entries"),
    "dense dtype": (lambda m: m.to_dense().float(), "bool"),
    "dense dimensions": (lambda m: m.to_dense()[0], "bool"),
    "cols dtype": (lambda m: edited(m, cols=m.cols.long()), "int32"),
    "offsets dtype": (lambda m: edited(m, row_offsets=m.row_offsets.to(torch.int16)), "int32"),
    "offsets length": (lambda m: edited(m, row_offsets=m.row_offsets[:-1]), "row_offsets"),
    "offsets start": (lambda m: edited(m, row_offsets=replaced(m.row_offsets, 0, 1)), "row_offsets"),
    "offsets end": (lambda m: edited(m, row_offsets=replaced(m.row_offsets, -1, 5)), "row_offsets"),
    "offsets fall": (lambda m: edited(m, row_offsets=replaced(m.row_offsets, 3, 10_000)), "row_offsets"),
    "negative": (lambda m: edited(m, cols=replaced(m.cols, 0, -1)), "column"),
    "outside": (lambda m: edited(m, cols=replaced(m.cols, -1, D)), "column"),
    "unsorted": (lambda m: edited(m, cols=swapped(m, duplicate=False)), "ascending"),
    "duplicate": (lambda m: edited(m, cols=swapped(m, duplicate=True)), "unique"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_masks_change_nothing(case: str) -> None:
    torch.manual_seed(0)
    model = rosa_fx.transform(Tiny(), spec_of(density=0.2))
    make, message = BAD_MASKS[case]
    good = random_masks(model)
    before = snapshot(model)
    bad = make(rosa_fx.Mask.from_dense(good["up.weight"]))
    with pytest.raises(rosa_fx.RosaError, match=message):
        rosa_fx.set_masks(model, {"q.weight": good["q.weight"], "up.weight": bad})
    assert rosa_fx.masks(model) == {}
    assert_unchanged(model, before)
    assert frozen(model, "sparse") == {True}


def test_masks_for_other_names() -> None:
    model = rosa_fx.transform(Tiny(), spec_of(overrides={"q.weight": {"density": 0}}))
    with pytest.raises(rosa_fx.RosaError, match=r"upp\.weight.*up\.weight"):
        rosa_fx.set_masks(model, {"upp.weight": torch.ones(24, D, dtype=torch.bool)})
    with pytest.raises(rosa_fx.RosaError, match=r"q\.weight.*density"):
        rosa_fx.set_masks(model, {"q.weight": torch.ones(D, D, dtype=torch.bool)})
    with pytest.raises(rosa_fx.RosaError, match="not transformed"):
        rosa_fx.set_masks(Tiny(), {"k.weight": torch.ones(D, D, dtype=torch.bool)})
    assert rosa_fx.masks(model) == {}
