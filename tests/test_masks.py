"""Masks: those collected, against a plain transcription of the paper's rules; those given; and `Mask` itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rosa_fx


def load_reference() -> ModuleType:
    name = "rosa_fx_test_reference"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("reference_rosa.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


reference = load_reference()
D, L, C, J, P = (reference.D, reference.L, reference.C, reference.J, reference.P)
Tiny = reference.Tiny
Pair = reference.Pair
spec_of = reference.spec_of
loss_of = reference.loss_of
batch = reference.batch
twins = reference.twins
transcribe = reference.transcribe
target_names = reference.target_names
train_step = reference.train_step
assert_same_masks = reference.assert_same_masks
frozen = reference.frozen
snapshot = reference.snapshot
assert_unchanged = reference.assert_unchanged


@pytest.mark.parametrize("mode", ["mean_squared", "mean"])
@pytest.mark.parametrize(("num_grads", "micro"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)])
def test_masks_agree(mode: str, num_grads: int, micro: int) -> None:
    spec = spec_of(num_grads=num_grads, grad_mode=mode)
    model, oracle = twins(spec)
    declared = mode == "mean"
    schedule = rosa_fx.MaskSchedule(model, micro_batches=micro if declared else None)
    mine = torch.optim.SGD(rosa_fx.trainable_parameters(model, lr=0.5))
    theirs = torch.optim.SGD(oracle.groups(0.5, 2e-4))
    for step in range(1 + num_grads):
        assert schedule.phase == oracle.phase
        batches = [batch(step, i) for i in range(micro)]
        train_step(model, schedule, batches, mine)
        oracle.step(batches, loss_of, theirs)
        if step == 0:
            assert schedule.state_dict()["learned"] == (-1 if declared else micro)
    assert_same_masks(model, oracle)


@pytest.mark.parametrize("checkpointing", ["nonreentrant", "reentrant"])
@pytest.mark.parametrize("num_grads", [1, 2])
def test_masks_under_checkpointing(checkpointing: str, num_grads: int) -> None:
    spec = spec_of(num_grads=num_grads)
    model, oracle = twins(spec)
    model.checkpointing = checkpointing
    schedule = rosa_fx.MaskSchedule(model)
    for step in range(1 + num_grads):
        train_step(model, schedule, [batch(step)])
        oracle.step([batch(step)], loss_of, None)
    assert_same_masks(model, oracle)


def test_masks_with_quantised_base_and_overrides() -> None:
    overrides = {"up.weight": {"density": 0.3}, "q.weight": {"density": 0}, "k.weight": {"rank": 0, "density": 1.0}}
    spec = spec_of(base="nf4", overrides=overrides)
    model, oracle = twins(spec)
    schedule = rosa_fx.MaskSchedule(model)
    for step in range(2):
        train_step(model, schedule, [batch(step)])
        oracle.step([batch(step)], loss_of, None)
    assert_same_masks(model, oracle)
    masks = rosa_fx.masks(model)
    assert masks["up.weight"].nnz == int(0.3 * 24 * D)
    assert "q.weight" not in masks
    assert masks["k.weight"].to_dense().all()
    train_step(model, schedule, [batch(2)], torch.optim.SGD(rosa_fx.trainable_parameters(model)))


def integer_pair(dtype: torch.dtype, scale: float) -> tuple[Pair, list[Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """A model and a loss whose products and sums are all exact in `dtype`: gradients are small integers times `scale`."""
    generator = torch.Generator().manual_seed(3)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)

    model = Pair().to(dtype)
    with torch.no_grad():
        model.a.weight.copy_(integers(8, 12))
        model.b.weight.copy_(integers(6, 8))
    weights = integers(7, 6)
    return model, [integers(7, 12) for _ in range(2)], lambda out, x: (out * (weights * scale).to(out.dtype)).sum()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.float16, 2.0**-17)], ids=str)
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("mode", ["mean_squared", "mean"])
def test_masks_of_exact_data_with_ties(dtype: torch.dtype, scale: float, micro: int, mode: str) -> None:
    """Ties go to the smaller flat index; in float16 the squares (about 1e-10) would all be 0."""
    plain, batches, loss = integer_pair(dtype, scale)
    spec = spec_of(schedule="wl0", density=0.3, grad_mode=mode)
    model, oracle = twins(spec, plain)
    schedule = rosa_fx.MaskSchedule(model, micro_batches=micro)
    schedule.begin_step()
    for x in batches[:micro]:
        loss(model(x), x).backward()
    schedule.end_step()
    oracle.step(batches[:micro], loss, None)
    for name, mask in rosa_fx.masks(model).items():
        score = oracle.scores[name].abs().flatten()
        nnz = oracle.weights[name].nnz
        ranked = score.sort(descending=True).values
        assert ranked[nnz - 1] > 0
        assert torch.equal(mask.to_dense(), oracle.weights[name].mask), name
        if scale < 1:
            assert ranked[nnz - 1] < 1e-6 if mode == "mean_squared" else ranked[nnz - 1] < 1e-2


def test_masks_do_not_depend_on_threads_or_runs() -> None:
    def run(threads: int) -> dict[str, rosa_fx.Mask]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            plain, batches, loss = integer_pair(torch.float32, 1.0)
            model = rosa_fx.transform(plain, spec_of(schedule="wl0", density=0.3))
            schedule = rosa_fx.MaskSchedule(model)
            schedule.begin_step()
            loss(model(batches[0]), batches[0]).backward()
            schedule.end_step()
            return rosa_fx.masks(model)
        finally:
            torch.set_num_threads(before)

    one, two, again = run(1), run(2), run(2)
    for name, mask in one.items():
        for other in (two[name], again[name]):
            assert torch.equal(mask.cols, other.cols)
            assert torch.equal(mask.row_offsets, other.row_offsets)


def test_float32_base_with_bfloat16_adapters() -> None:
    model, oracle = twins(spec_of(schedule="wl0", adapter_dtype="bfloat16"))
    schedule = rosa_fx.MaskSchedule(model)
    optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model), lr=1e-3)
    train_step(model, schedule, [batch(0)], optimizer)
    oracle.step([batch(0)], loss_of, None)
    assert_same_masks(model, oracle)
    train_step(model, schedule, [batch(1)], optimizer)
    assert all(rosa_fx.adapter(model, name).sparse.values.any() for name in target_names(model))


class Sometimes(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


@pytest.mark.parametrize("num_grads", [1, 2])
def test_weight_without_gradient_warns(num_grads: int) -> None:
    model = rosa_fx.transform(Sometimes(D, D), spec_of(schedule="wl0", num_grads=num_grads, targets=["?.weight"]))
    schedule = rosa_fx.MaskSchedule(model)
    for step in range(num_grads - 1):
        train_step(model, schedule, [batch(step)])
    with pytest.warns(UserWarning, match=r"b\.weight received no gradient"):
        train_step(model, schedule, [batch(5)])
    for name, mask in rosa_fx.masks(model).items():
        weight = rosa_fx.adapter(model, name)
        mask.validate(name, weight.shape, weight.sparse.values.numel())


@pytest.mark.parametrize("density", [1.0, 1e-6])
@pytest.mark.parametrize("num_grads", [1, 2])
def test_extreme_densities(density: float, num_grads: int) -> None:
    model = rosa_fx.transform(Tiny(), spec_of(density=density, num_grads=num_grads))
    schedule = rosa_fx.MaskSchedule(model)
    optimizer = torch.optim.SGD(rosa_fx.trainable_parameters(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(num_grads + 2):
            train_step(model, schedule, [batch(step)], optimizer)
    assert schedule.phase == J
    for mask in rosa_fx.masks(model).values():
        assert mask.to_dense().all() if density == 1.0 else mask.nnz == 0


def test_evaluation_while_collecting_does_not_count() -> None:
    spec = spec_of()
    model, oracle = twins(spec)
    schedule = rosa_fx.MaskSchedule(model)
    for step in range(2):
        with torch.no_grad():
            model(batch(9))
        train_step(model, schedule, [batch(step)])
        oracle.step([batch(step)], loss_of, None)
    assert_same_masks(model, oracle)


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


def live_blocks(run: Callable[[], None], size: int) -> tuple[int, int]:
    """(greatest number at once, number left at the end) of blocks of `size` bytes that `run` allocates."""
    from torch._C._profiler import _EventType

    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events: list[tuple[int, int, int]] = []

    def visit(event: Any) -> None:
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.alloc_size, fields.ptr))
        for child in event.children:
            visit(child)

    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.experimental_event_tree():
        visit(event)
    live: set[int] = set()
    peak = 0
    for _, nbytes, address in sorted(events):
        if nbytes == size:
            live.add(address)
        elif nbytes < 0:
            live.discard(address)
        peak = max(peak, len(live))
    return peak, len(live)


def stack(layers: int = 6, width: int = 96) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))


def test_one_dense_gradient_at_a_time() -> None:
    """Dense blocks that a backward pass allocates: in a single collecting call hardly more at once than in a plain one."""
    layers, width = 6, 96
    measured = {}
    for phase, options in {L: {"schedule": "wl9"}, C: {"schedule": "wl0"}, "many": {"schedule": "wl0"}}.items():
        model = rosa_fx.transform(stack(layers, width), spec_of(**options))
        schedule = rosa_fx.MaskSchedule(model, micro_batches=2 if phase == "many" else 1)
        schedule.begin_step()
        # Warm up everything that allocates once, on the side.
        loss = model(torch.randn(5, width)).square().sum()
        measured[phase] = live_blocks(loss.backward, width * width * 4)
    assert measured[L][1] == 0
    assert measured[C][1] == 0
    assert measured[C][0] - measured[L][0] < 2
    assert measured["many"][1] == layers, "with several calls one float32 sum per weight is kept"


# --- Mask and set_masks ------------------------------------------------------------------------------------------------


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
