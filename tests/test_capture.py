"""What else torch does with a model: copies, pickles, casts, functional calls, export, vmap, regional compilation.

Everywhere a transformed model has to behave as its bare model does, eager and captured alike. Most tests run the rewritten
graph eagerly; those that are about code generation or another process use Inductor.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._dynamo.utils import counters

import rosa_fx
from rosa_fx import RosaError, RosaSpec
from rosa_fx.kernels.inductor import capture_backend
from rosa_fx.passes.joint import rewrite
from rosa_fx.passes.report import GraphReport

EPS = torch.finfo(torch.float32).eps
# The tail multiplies with its weight as stored.
FUSED = {"linear": 3, "linear_t": 2, "linear_grads": 3, "dense": 0}
FORWARD = {"linear": 2, "linear_t": 1, "linear_grads": 0, "dense": 0}

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Tail(nn.Module):
    """A bare parameter, so that a class that is no torch class is parametrised too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mix + self.bias


def plain(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), Tail(width))


def transformed(phase: str = "joint", model: nn.Module | None = None, **spec: Any) -> nn.Module:
    """In the given phase, with adapters away from their initial values."""
    model = plain() if model is None else model
    torch.manual_seed(1)
    rosa_fx.transform(model, RosaSpec(**({"rank": 4, "density": 0.05} | spec)))
    for name, weight in rosa_fx.state.state_of(model).weights.items():
        assert weight.low_rank is not None
        nn.init.normal_(weight.low_rank.B, std=0.1)
        if phase == "joint" and weight.sparse is not None:
            dense = torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.bool)
            dense[torch.randperm(dense.numel())[: weight.sparse.values.numel()]] = True
            rosa_fx.set_masks(model, {name: dense.view(weight.shape)})
            nn.init.normal_(weight.sparse.values, std=0.1)
    if phase == "collect":
        schedule = rosa_fx.MaskSchedule(model, "wl0")
        schedule.begin_step()
        assert schedule.phase == "collect"
    return model


def inputs(rows: int = 6, width: int = 32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(2))


def captured(call: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], list[GraphReport]]:
    reports: list[GraphReport] = []
    backend = capture_backend(lambda graph: reports.append(rewrite(graph)))
    return torch.compile(call, backend=backend, fullgraph=True, **options), reports


def step(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient of one training step."""
    model.zero_grad()
    y = call(x)
    y.square().mean().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], eps: float = EPS) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).double().norm() <= 64 * eps * value.double().norm(), name


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# --- copies and pickles ------------------------------------------------------------------------------------------------


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
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model.pt"), str(tmp_path / "data.pt")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
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


# --- casts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "base"),
    [("to", "nf4"), ("half", "nf4"), ("bfloat16", "fp4"), ("bfloat16", "int8"), ("half", "keep"), ("double", "keep")],
)
def test_casts_move_the_model_and_leave_the_scales_of_the_base(how: str, base: str) -> None:
    model = transformed(base=base, double_quant=base == "fp4")
    stored = {name: t.clone() for name, t in model.named_buffers() if ".base." in name and base != "keep"}
    before = rosa_fx.base_weight(model, "0.weight")
    dtype = {"to": torch.bfloat16, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[how]
    assert (model.to(dtype) if how == "to" else getattr(model, how)()) is model
    assert_equal({name: t for name, t in model.named_buffers() if name in stored}, stored)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(rosa_fx.base_weight(model, "0.weight"), before.to(dtype))
    x = inputs().to(dtype)
    expected = step(model, model, x)
    assert {t.dtype for t in expected.values()} == {dtype}
    call, reports = captured(model)
    actual = step(call, model, x)
    assert reports[0].counts == FUSED
    # Eager rounds the sum base + delta to the narrow dtype before the product, the fused operator does not.
    assert_close(actual, expected, torch.finfo(dtype).eps if dtype != torch.float64 else EPS)
    model.float()
    if base != "keep":
        assert torch.equal(rosa_fx.base_weight(model, "0.weight"), before), "a base format loses nothing on the way"


# --- functional calls, vmap, export --------------------------------------------------------------------------------------


def test_functional_call_with_replaced_adapters() -> None:
    model, x = transformed(), inputs()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    new = {name: torch.randn_like(model.get_parameter(name)).div(10).requires_grad_() for name in names}
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in new.items():
            reference.get_parameter(name).copy_(tensor)
    expected = step(reference, reference, x)

    def call(adapters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, adapters, (x,))

    compiled, reports = captured(call)
    for function, check in ((call, assert_equal), (compiled, assert_close)):
        y = function(new, x)
        gradients = torch.autograd.grad(y.square().mean(), list(new.values()))
        check({"y": y.detach(), **dict(zip(names, gradients))}, expected)
    assert reports[0].counts == FUSED
    assert not any(p.grad is not None for p in model.parameters()), "the model's own adapters took no part"


@pytest.mark.parametrize("shape", [(3, 6, 32), (6, 32)])
def test_vmap_over_inputs(shape: tuple[int, ...]) -> None:
    model = transformed(model=nn.Linear(32, 24))
    x = torch.randn(shape)
    expected = step(model, model, x)
    assert_close(step(torch.vmap(model), model, x), expected)
    call, reports = captured(lambda x: torch.vmap(model)(x))
    assert_close(step(call, model, x), expected)
    assert reports[0].counts == {"linear": 1, "linear_t": 0, "linear_grads": 1, "dense": 0}
    assert_close({"y": torch.func.jacrev(model)(x[0])}, {"y": torch.func.jacfwd(model)(x[0])})


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """An exported program reads the materialised weight; compiled on the machine it runs on, it is fused."""
    model, x = transformed().eval(), inputs()
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("rosa_fx.materialize.default") == 3
    assert not any("dequantize" in target for target in targets)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for each in (program, torch.export.load(buffer)):
        for rows in (6, 3):
            assert torch.equal(each.module()(inputs(rows)), model(inputs(rows)))
    call, reports = captured(program.module())
    with torch.no_grad():
        assert_close({"y": call(x)}, {"y": model(x)})
    assert reports[0].counts == FORWARD


# --- recompilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flips_compile_no_more_graphs_than_those_of_the_bare_model(dropout: float) -> None:
    def compilations(model: nn.Module) -> int:
        call, graphs = captured(model, dynamic=True)
        for rows in (6, 9):
            x = inputs(rows).requires_grad_()
            call(x).sum().backward()
            model.eval()
            call(x).sum().backward()
            with torch.no_grad():
                call(x)
            with torch.inference_mode():
                call(inputs(rows))
            model.train()
        return len(graphs)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 48), nn.Dropout(0.5), nn.Linear(48, 32))

    assert compilations(transformed(model=model(), dropout=dropout)) == compilations(model()) == 4


def test_parameters_may_be_frozen_and_released() -> None:
    model, x = transformed(), inputs()
    A = rosa_fx.adapter(model, "0.weight").low_rank.A
    call, reports = captured(model)
    for flag in (True, False, True):
        A.requires_grad_(flag)
        expected = step(model, model, x)
        assert ("0.parametrizations.weight.0.low_rank.A" in expected) == flag
        assert_close(step(call, model, x), expected)
    assert [report.counts for report in reports] == [FUSED, FUSED]
    model.requires_grad_(False)
    call, reports = captured(model)
    assert_close({"y": call(x)}, {"y": model(x)})
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    call(leaf).sum().backward()
    model(other).sum().backward()
    assert_close({"dx": leaf.grad}, {"dx": other.grad})
    assert reports[-1].counts == {"linear": 3, "linear_t": 3, "linear_grads": 0, "dense": 0}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    for phase in ("low_rank", "collect", "joint"):
        model, x = transformed(phase), inputs()
        call, reports = captured(model)
        with mode():
            assert_close({"y": call(x)}, {"y": model(x)})
        assert reports[0].counts == FORWARD


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture
def no_caches() -> Iterator[None]:
    with inductor_config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@pytest.mark.usefixtures("no_caches")
def test_identical_blocks_compile_once_and_their_copies_not_at_all() -> None:
    model = transformed(model=nn.Sequential(*(Block() for _ in range(3))))
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    x = inputs(5, 16)
    before = counters["stats"]["unique_graphs"]
    for each in (model, *clones):
        expected = step(each, each, x.requires_grad_())
        for block in each:
            block.compile()
        assert_close(step(each, each, x), expected)
    assert counters["stats"]["unique_graphs"] - before == 1


# --- models without data -----------------------------------------------------------------------------------------------


def test_weights_without_data_are_refused_and_nothing_is_changed() -> None:
    with torch.device("meta"):
        model = plain()
    with pytest.raises(RosaError, match=r"'0.weight' is on the meta device and has no values: materialise the model"):
        rosa_fx.transform(model, RosaSpec(rank=2))
    assert type(model[0]) is nn.Linear
    # Deferred initialisation: materialise, load, transform.
    source = plain()
    for assign in (False, True):
        with torch.device("meta"):
            model = plain()
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(transformed(model=model)(inputs()), transformed()(inputs()))


def test_offloaded_weights_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(plain(), execution_device=torch.device("cpu"))
    with pytest.raises(RosaError, match="is on the meta device"):
        rosa_fx.transform(model, RosaSpec(rank=2))
    assert model(inputs()).shape == (6, 32)


# --- torch's fast path ---------------------------------------------------------------------------------------------------


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)


@pytest.mark.parametrize(
    ("make", "products"),
    [
        (lambda: nn.MultiheadAttention(32, 4, batch_first=True), 2),
        (encoder_layer, 4),
        (lambda: nn.TransformerEncoder(encoder_layer(), 1), 4),
    ],
    ids=["attention", "layer", "encoder"],
)
@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_fast_path_of_torchs_transformer(make: Callable[[], nn.Module], products: int) -> None:
    """In eval without gradients torch would call one kernel with the dense weights; captured, it must not."""
    torch.manual_seed(0)
    model = pickle.loads(pickle.dumps(transformed(model=make().eval())))
    x = torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    attention = isinstance(model, nn.MultiheadAttention)

    def call(model: Callable[..., Any], **mask: Tensor) -> Tensor:
        return model(x, x, x, **mask)[0] if attention else model(x, **mask)

    merged = rosa_fx.merge(copy.deepcopy(model))  # takes the fast path
    for mask in ({}, {"key_padding_mask" if attention else "src_key_padding_mask": padding}):
        compiled, reports = captured(model)
        with torch.no_grad():
            expected = call(merged, **mask)
            valid = ~padding if mask else torch.ones_like(padding)
            for function in (model, compiled):
                assert_close({"y": call(function, **mask)[valid]}, {"y": expected[valid]})
        assert reports[0].counts == {"linear": products, "linear_t": 0, "linear_grads": 0, "dense": 0}
