"""What else torch does with a model: casts, functional calls, export, vmap, deferred initialisation, its fast path.

Everywhere a transformed model has to behave as its bare model does, eager and captured alike.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured_models import EPS, FORWARD, FUSED, assert_close, assert_equal, captured, inputs, plain, step, transformed
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaError, RosaSpec

pytestmark = pytest.mark.usefixtures("fresh_compiler")


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
def test_export(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
            with monkeypatch.context() as patch:  # eager mode itself does not form the weight
                patch.setattr("rosa_fx.eager.is_eager", lambda: False)
                expected = model(inputs(rows))
            assert torch.equal(each.module()(inputs(rows)), expected)
    call, reports = captured(program.module())
    with torch.no_grad():
        assert_close({"y": call(x)}, {"y": model(x)})
    assert reports[0].counts == FORWARD


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
