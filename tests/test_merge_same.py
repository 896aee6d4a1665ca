"""Merging into the format of the base, taking a merge back, and sums of adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from adapter_models import assert_same, contents, inputs, train
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaError, RosaSpec

EPS = torch.finfo(torch.float32).eps
NAMES = ["a.weight", "b.weight", "c.weight"]


class Net(nn.Module):
    """Three linears, of which two share their weight; one of them in two places."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(64, 128)
        self.b = nn.Linear(128, 64, bias=False)
        self.c = nn.Linear(64, 64)
        self.d = nn.Linear(64, 64)
        if tied:
            self.d.weight = self.c.weight
        self.again = self.d
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.tanh(self.a(x)))
        return self.head(torch.tanh(self.again(torch.tanh(self.c(x)))))


def plain(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = True) -> Net:
    torch.manual_seed(seed)
    return Net(tied).to(dtype)


def spec(**fields: Any) -> RosaSpec:
    return RosaSpec(**{"base": "nf4", "rank": 4, "density": 0.05, "targets": NAMES, **fields})


def trained(dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    return train(rosa_fx.transform(plain(dtype=dtype), spec(**fields)))


def exact(model: nn.Module, name: str) -> Tensor:
    weight = rosa_fx.adapter(model, name)
    return weight.base.format.dequantize(weight.base.tensors(), weight.shape, torch.float32) + weight.dense_delta()


FORMS: list[dict[str, Any]] = [
    {},
    {"double_quant": True},
    {"base": "fp4", "blocksize": 32},
    {"base": "int8"},
    {"base": "keep"},
    {"dtype": torch.bfloat16, "base": "nf4"},
    {"overrides": {"b.weight": {"base": "keep"}}},
]


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_merged_into_the_format_of_the_base(fields: dict[str, Any]) -> None:
    model = trained(**fields)
    sums = {name: exact(model, name) for name in NAMES}
    deltas = {name: rosa_fx.delta(model, name) for name in NAMES}
    forms = {name: rosa_fx.adapter(model, name).base.format for name in NAMES}
    report = rosa_fx.merge(model, into="same")
    assert report.model is model
    assert not hasattr(model, "_rosa_fx_state")
    assert type(model) is Net
    dtype = fields.get("dtype", torch.float32)
    for row in report.weights:
        module: Any = model.get_submodule(row.name.removesuffix(".weight"))
        form = forms[row.name]
        tensors = form.quantize(sums[row.name].to(dtype) if form.kind == "dense" else sums[row.name])
        now = form.dequantize(tensors, sums[row.name].shape, torch.float32)
        kinds = {"nf4": bnb.nn.Linear4bit, "fp4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt, "dense": nn.Linear}
        assert type(module) is kinds[form.kind]
        assert row.base == form.kind
        error = float((sums[row.name] - now).norm())
        assert row.error == pytest.approx(error / float(sums[row.name].norm()), rel=1e-3, abs=1e-9)
        assert row.lost == pytest.approx(error / float(deltas[row.name].norm()), rel=1e-3, abs=1e-9)
        assert (row.error < 1e-6) == (form.kind == "dense" and dtype == torch.float32)
    assert model.again is model.d
    # bitsandbytes takes the scales out of an int8 parameter at first use, so each module has its own, around one memory.
    assert (model.c.weight is model.d.weight) == (fields.get("base") != "int8")
    assert model.c.weight.data_ptr() == model.d.weight.data_ptr()
    assert report.error == max(row.error for row in report.weights)
    assert [line.split()[0] for line in str(report).splitlines()] == ["weight", *(row.name for row in report.weights)]
    assert report.to_dict()["weights"][0]["name"] == report.weights[0].name
    # What bitsandbytes computes with is what was reported, and it is taken over as it is.
    base = rosa_fx.transform(copy.deepcopy(model), spec(base="keep", overrides={}))
    for name in NAMES:
        form = forms[name]
        tensors = form.quantize(sums[name].to(dtype) if form.kind == "dense" else sums[name])
        assert torch.equal(rosa_fx.base_weight(base, name), form.dequantize(tensors, sums[name].shape, dtype))
    if dtype == torch.float32:
        x = inputs()
        limit = (1 / 127 if "int8" in str(fields) else 64 * EPS) * 8
        expected = base.eval()(x)
        assert (model.train()(x) - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_refit_puts_the_loss_into_a_low_rank_term(base: str, tmp_path: Path) -> None:
    model = train(rosa_fx.transform(plain(tied=base != "int8"), spec(base=base)))
    sums = {name: exact(model, name) for name in NAMES}
    lost = rosa_fx.merge(copy.deepcopy(model), into="same")
    reports = {}
    for rank in (2, 16):
        again = copy.deepcopy(model)
        reports[rank] = rosa_fx.merge(again, into="same", refit_rank=rank)
        for row in reports[rank].weights:
            error = (sums[row.name] - exact(again, row.name)).norm() / sums[row.name].norm()
            assert row.error == pytest.approx(float(error), rel=1e-3)
            assert row.rank == rank == rosa_fx.adapter(again, row.name).low_rank.A.shape[0]
        assert base == "int8" or again.c.parametrizations.weight[0] is again.d.parametrizations.weight[0]
        rosa_fx.save_adapter(again, tmp_path / f"{rank}")
        trainable = rosa_fx.trainable_parameters(again)
        assert [group["name"] for group in trainable] == ["low_rank"]
    for none, few, many in zip(lost.weights, reports[2].weights, reports[16].weights):
        assert many.error < few.error < none.error
    one = rosa_fx.merge(copy.deepcopy(model), into="same", refit_rank=16, refit_steps=1)
    assert sum(row.error for row in reports[16].weights) < sum(row.error for row in one.weights), "the turns help"


@pytest.mark.parametrize("into", ["dense", "same"])
@pytest.mark.parametrize("refit", [0, 3])
@pytest.mark.parametrize("base", ["nf4", "keep", "int8"])
def test_unmerge_returns_the_original_bits(into: Any, refit: int, base: str) -> None:
    if into == "dense" and refit:
        with pytest.raises(RosaError, match="a dense weight loses nothing"):
            rosa_fx.merge(trained(), into="dense", refit_rank=refit)  # type: ignore[call-overload]
        return
    tied = base != "int8" or not refit
    model = train(rosa_fx.transform(plain(tied=tied), spec(base=base)))
    before, x = contents(model), inputs()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = model(x).detach()
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"into": into, **({"refit_rank": refit} if refit else {})}
    merged = copy.deepcopy(model)
    rosa_fx.merge(merged, **options)
    with pytest.raises(RosaError, match="nothing to unmerge: merge with keep_base=True"):
        rosa_fx.unmerge(merged)
    for _ in range(2):
        rosa_fx.merge(model, **options, keep_base=True)
        assert list(model.state_dict()) == list(merged.state_dict()), "the kept base is no part of the model"
        assert rosa_fx.unmerge(model) is model
        assert_same(contents(model), before)
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == addresses
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert torch.equal(model(x), expected)
    assert rosa_fx.explain(model, x).fused == 3
    rosa_fx.merge(model, into="dense")


def test_packed_modules_come_back_too() -> None:
    model = plain()
    rosa_fx.merge(rosa_fx.transform(model, spec(rank=0, schedule="spa_only")), into="same")  # bitsandbytes' modules now
    train(rosa_fx.transform(model, spec(base="keep")))
    before, expected = contents(model), model(inputs()).detach()
    for into in ("dense", "same"):
        rosa_fx.merge(model, into=into, keep_base=True)  # type: ignore[call-overload]
        rosa_fx.unmerge(model)
        assert_same(contents(model), before)
        assert torch.equal(model(inputs()), expected)
        assert isinstance(model.a, bnb.nn.Linear4bit)


def test_refusals_change_nothing() -> None:
    def refused(model: nn.Module, message: str, **options: Any) -> None:
        before = contents(model)
        with pytest.raises(RosaError, match=message):
            rosa_fx.merge(model, **options)
        assert_same(contents(model), before)

    refused(trained(), "into is 'nf4': use 'dense' or 'same'", into="nf4")
    refused(trained(), "refit_rank is -1", into="same", refit_rank=-1)
    refused(trained(), "refit_steps is 0", into="same", refit_rank=1, refit_steps=0)
    too_large = r"weight cannot be merged .* refit_rank 65 exceeds its size \[128, 64\]: use refit_rank=64 or less"
    refused(trained(), too_large, into="same", refit_rank=65)
    shared = "c.weight cannot be merged .* several modules share it.*: use refit_rank=0 or into='dense'"
    refused(trained(base="int8"), shared, into="same", refit_rank=2)
    blocks = r"64 columns are no whole blocks of 128, .*: use into='dense'; .*RosaSpec\(blocksize=64\) has whole ones"
    refused(trained(blocksize=128), blocks, into="same")
    odd = nn.Sequential(nn.Linear(40, 8))
    rosa_fx.transform(odd, RosaSpec(rank=2, density=0.0, schedule="lora_only", targets=["0.weight"]))
    refused(odd, r"40 columns are no whole .*overrides=\{'0.weight': \{'base': 'keep'\}\} keeps it dense", into="same")
    attention = nn.Sequential(nn.MultiheadAttention(64, 2))
    rosa_fx.transform(attention, RosaSpec(rank=2, density=0.0, schedule="lora_only", targets=["0.in_proj_weight"]))
    refused(
        attention, "'in_proj_weight' of a MultiheadAttention, and bitsandbytes has a module for nn.Linear only", into="same"
    )
    refused(plain(), "is not transformed", into="same")


LOADED: list[dict[str, Any]] = [{}, {"double_quant": True}, {"base": "int8"}]


@pytest.mark.parametrize("fields", LOADED, ids=str)
@pytest.mark.filterwarnings("ignore:.*inputs will be cast.*")
def test_transformers_saves_and_loads_it(fields: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from trainer_models import llama

    model = llama(layers=1, hidden=64, num_attention_heads=2).to(torch.bfloat16)
    train(rosa_fx.transform(model, RosaSpec(rank=2, density=0.02, **fields)))
    report = rosa_fx.merge(model, into="same", keep_base=True)
    model.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.is_quantized
    # Both taken over: the same bits.
    keep = RosaSpec(base="keep", rank=1, density=0.0, schedule="lora_only")
    again = rosa_fx.transform(loaded, keep)
    names = [row.name for row in report.weights]
    assert len(names) == 7
    stored = {name: exact(again, name) for name in names}  # its B is zero
    rosa_fx.unmerge(model)
    assert not getattr(model, "is_quantized", False)
    for row in report.weights:
        error = (exact(model, row.name) - stored[row.name]).norm() / exact(model, row.name).norm()
        assert float(error) == pytest.approx(row.error, rel=1e-3)


# --- sums of adapters ------------------------------------------------------------------------------------------------


def saved(folder: Path, seed: int, **fields: Any) -> dict[str, Tensor]:
    """A saved adapter; returns its ΔW by name."""
    model = rosa_fx.transform(plain(), spec(**fields))
    torch.manual_seed(seed)
    for name, weight in rosa_fx.state.state_of(model).weights.items():
        if weight.sparse is not None:
            dense = torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.bool)
            dense[torch.randperm(dense.numel())[: weight.sparse.values.numel()]] = True
            rosa_fx.set_masks(model, {name: dense.view(weight.shape)})
            nn.init.normal_(weight.sparse.values, std=0.1)
        if weight.low_rank is not None:
            nn.init.normal_(weight.low_rank.B, std=0.1)
    rosa_fx.save_adapter(model, folder)
    return {name: rosa_fx.delta(model, name).double() for name in rosa_fx.state.state_of(model).weights}


SUMS: list[list[dict[str, Any]]] = [
    [{}, {"rank": 3, "alpha": 5, "density": 0.01}],
    [{"rank_stabilized": True}, {"density": 0.0, "schedule": "lora_only"}],
    [{"rank": 0, "schedule": "spa_only"}, {"targets": ["b.weight"], "density": 0.9}],
    [{"rank": 40}, {"rank": 40, "overrides": {"a.weight": {"rank": 1}}}],
    [{"adapter_dtype": "bfloat16"}, {}],
]


@pytest.mark.parametrize("fields", SUMS, ids=str)
def test_sum_of_adapters(fields: list[dict[str, Any]], tmp_path: Path) -> None:
    shares = (0.7, -1.5)
    deltas = [saved(tmp_path / str(i), i, **each) for i, each in enumerate(fields)]
    pairs = [(tmp_path / str(i), share) for i, share in enumerate(shares)]
    base = plain()
    model = rosa_fx.merge_adapters(base, pairs)
    assert model is base
    for name in rosa_fx.state.state_of(model).weights:
        expected = sum(share * each[name] for share, each in zip(shares, deltas) if name in each)
        assert isinstance(expected, Tensor)
        assert (rosa_fx.delta(model, name) - expected).norm() <= 16 * EPS * expected.norm()
    rosa_fx.save_adapter(model, tmp_path / "sum")
    loaded = rosa_fx.load_adapter(plain(), tmp_path / "sum")
    assert torch.equal(loaded(inputs()), model(inputs()))
    into = {name: exact(model, name) for name in rosa_fx.state.state_of(model).weights}
    rosa_fx.merge(model)
    for name, dense in into.items():
        assert torch.equal(model.get_parameter(name), dense)


def test_sum_for_stacks_of_matrices(tmp_path: Path) -> None:
    def stacked() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module()
        model.w = nn.Parameter(torch.randn(3, 12, 16))
        return model

    deltas = []
    for number, rank in enumerate((3, 11)):  # together more than min(N, K)
        model = rosa_fx.transform(stacked(), spec(targets=["w"], rank=rank, density=0.1))
        train(model, masks=False)
        dense = torch.zeros(3, 12, 16, dtype=torch.bool)
        weight = rosa_fx.adapter(model, "w")
        dense.view(-1)[number::7][: weight.sparse.values.numel()] = True
        rosa_fx.set_masks(model, {"w": dense})
        nn.init.normal_(weight.sparse.values)
        rosa_fx.save_adapter(model, tmp_path / str(number))
        deltas.append(rosa_fx.delta(model, "w").double())
    total = rosa_fx.merge_adapters(stacked(), [(tmp_path / "0", 2.0), (tmp_path / "1", -1.0)])
    expected = 2 * deltas[0] - deltas[1]
    assert rosa_fx.adapter(total, "w").low_rank.rank == 12
    assert (rosa_fx.delta(total, "w") - expected).norm() <= 16 * EPS * expected.norm()


def test_sums_that_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", 0)
    saved(tmp_path / "b", 1, base="fp4")
    saved(tmp_path / "c", 1, double_quant=True)

    def refused(message: str, pairs: Any, model: nn.Module | None = None) -> None:
        model = model or plain()
        before = contents(model)
        with pytest.raises(RosaError, match=message):
            rosa_fx.merge_adapters(model, pairs)
        assert_same(contents(model), before)

    refused("adapters is empty", [])
    refused("the weight of the adapter .* is nan", [(tmp_path / "a", float("nan"))])
    refused("the weight of the adapter .* is '1'", [(tmp_path / "a", "1")])
    refused("different bases .nf4 in .*a, fp4 in .*b", [(tmp_path / "a", 1), (tmp_path / "b", 1)])
    refused("double_quant is False in the adapter .* and True in", [(tmp_path / "a", 1), (tmp_path / "c", 1)])
    refused("the base weight has other values", [(tmp_path / "a", 1)], plain(seed=3))
    refused("takes the plain base model", [(tmp_path / "a", 1)], trained())
    refused("does not exist", [(tmp_path / "none", 1)])
