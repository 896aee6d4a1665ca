"""Copies, pickles and state dictionaries of transformed models, in this process and in a fresh one."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from captured_models import FUSED, Tail, assert_close, assert_equal, captured, inputs, plain, step, transformed
from other_process import run_python
from torch import nn

import rosa_fx
from rosa_fx import RosaSpec, attach

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def round_trip(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("phase", ["low_rank", "collect", "joint"])
def test_a_copy_is_equal_and_independent(how: str, phase: str) -> None:
    model, x = transformed(phase), inputs()
    clone = round_trip(model, how)
    assert [type(module) for module in clone.modules()] == [type(module) for module in model.modules()]
    expected = step(model, model, x)
    assert_equal(step(clone, clone, x), expected)
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not any(tensor.data_ptr() in theirs for tensor in clone.state_dict().values())
    optimizer = torch.optim.SGD([p for group in rosa_fx.trainable_parameters(clone) for p in group["params"]], lr=0.1)
    optimizer.step()
    assert not torch.equal(clone(x), expected["y"])
    assert torch.equal(model(x), expected["y"])
    if phase == "joint":
        report = rosa_fx.explain(clone, x)
        assert (report.counts, [t.name for t in report.targets]) == (FUSED, ["0.weight", "2.weight", "3.mix"])
    merged = rosa_fx.merge(clone)
    assert type(merged[0]) is nn.Linear
    assert isinstance(merged[0].weight, nn.Parameter)
    assert torch.equal(model(x), expected["y"])
    if phase == "joint":
        assert rosa_fx.explain(model, x).fused == 3


def test_a_copy_while_collecting_has_no_probes_and_its_own_schedule() -> None:
    """The hooks on the probes belong to the schedule of the first model; a schedule of its own arms the copy."""
    model = transformed("collect")
    clone = copy.deepcopy(model)
    weights = rosa_fx.state.state_of(clone).weights
    assert [(w.phase, w.probe, w.topk_probe) for w in weights.values()] == [("collect", None, None)] * 3
    schedule = rosa_fx.MaskSchedule(clone, "spa_only", micro_batches=1)
    schedule.begin_step()
    clone(inputs()).sum().backward()
    schedule.end_step()
    assert len(rosa_fx.masks(clone)) == 3
    assert rosa_fx.masks(model) == {}


def test_a_copy_and_a_merged_model_can_be_pickled_and_transformed_again() -> None:
    model = transformed(base="keep")
    again = pickle.loads(pickle.dumps(rosa_fx.merge(copy.deepcopy(model))))
    assert [type(module) for module in again] == [nn.Linear, nn.GELU, nn.Linear, Tail]
    assert rosa_fx.explain(rosa_fx.transform(again, RosaSpec(rank=2)), inputs()).fused == 3
    shallow = copy.copy(model[0])
    assert shallow.parametrizations is model[0].parametrizations


def test_shared_modules_and_weights_stay_shared_in_a_copy() -> None:
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(16, 16))
    model[3].weight = layer.weight
    transformed(model=model)
    clone = pickle.loads(pickle.dumps(model))
    assert clone[0] is clone[2]
    assert clone[0].parametrizations.weight[0] is clone[3].parametrizations.weight[0]
    assert list(rosa_fx.state.state_of(clone).weights.values()) == [clone[0].parametrizations.weight[0]]
    assert torch.equal(rosa_fx.merge(clone)(inputs(4, 16)), rosa_fx.merge(model)(inputs(4, 16)))


def test_a_compiled_module_is_copied_without_its_code() -> None:
    """torch's own copy of a parametrised module would keep a compiled forward that reads the weights of the first."""
    model = transformed(model=nn.Sequential(nn.Linear(16, 16)))
    x = inputs(4, 16)
    model[0].compile(backend="eager")
    before = model(x)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(clone(x), before)


PROGRAM = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
x, y = torch.load(sys.argv[2])
assert torch.equal(model(x), y)
import rosa_fx.passes.inductor_pass as installed
graphs, original = [], installed.rewrite
installed.rewrite = lambda graph: graphs.append(original(graph).counts)
with torch.no_grad():
    z = torch.compile(model, fullgraph=True, options={"fx_graph_cache": False})(x)
assert (z - y).norm() <= 1e-5 * y.norm()
import rosa_fx
print("FUSED", graphs[0]["linear"], type(model[0]).__name__, type(rosa_fx.merge(model)[0]).__name__)
"""


def test_a_fresh_process_loads_and_compiles_the_pickled_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.Sequential(nn.Linear(32, 32)))
    transformed(model=model).eval()
    torch.save(model, tmp_path / "model.pt")
    torch.save((inputs(), model(inputs()).detach()), tmp_path / "data.pt")
    done = run_python("-c", PROGRAM, tmp_path / "model.pt", tmp_path / "data.pt", cwd=tmp_path)
    assert "FUSED 3 ParametrizedLinear Linear" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("phase", ["low_rank", "collect", "joint"])
def test_state_dict_goes_into_an_equally_transformed_model(phase: str, assign: bool) -> None:
    model, other, x = transformed(phase), plain(), inputs()
    torch.manual_seed(9)
    rosa_fx.transform(other, RosaSpec(rank=4, density=0.05))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert other.load_state_dict(state, strict=True, assign=assign) == ([], [])
    expected_phase = "joint" if phase == "joint" else "low_rank"
    assert {w.phase for w in rosa_fx.state.state_of(other).weights.values()} == {expected_phase}
    assert_equal(step(other, other, x), step(model, model, x))
    call, reports = captured(other)
    assert_close(step(call, other, x), step(model, model, x))
    assert reports[0].counts == FUSED


def test_transform_gives_back_what_it_replaced_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each return of memory to the system all originals before it are gone: a model that barely fits will do."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(32)))
    originals = [weakref.ref(layer.weight) for layer in model]
    alive = []
    monkeypatch.setattr(attach, "give_back", lambda: alive.append(sum(original() is not None for original in originals)))
    rosa_fx.transform(model, RosaSpec(rank=4, density=0.01))
    assert alive == list(range(30, -1, -2))
