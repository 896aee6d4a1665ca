"""Models that bitsandbytes has quantised already: the packed weights are taken over as they are."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaError, RosaSpec
from rosa_fx.kernels.inductor import capture_backend
from rosa_fx.packed import CastingLinear
from rosa_fx.passes.joint import rewrite

pytestmark = pytest.mark.usefixtures("fresh_compiler")

EPS = torch.finfo(torch.float32).eps
FOUR_BIT: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "nf4, double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4, double": {"quant_type": "fp4", "compress_statistics": True},
    "nf4, stored as bfloat16": {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16},
}
KINDS = [*FOUR_BIT, "int8"]
LINEARS = ("0", "2")


def plain(columns: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(columns, 128), nn.GELU(), nn.Linear(128, 64, bias=False), nn.LayerNorm(64)).to(dtype)


def quantised(
    kind: str,
    columns: int = 64,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
    threshold: float = 0.0,
) -> nn.Sequential:
    """`plain` with bitsandbytes' linears, built as transformers builds them."""
    model = plain(columns, dtype, seed)
    for name in LINEARS:
        old = model.get_submodule(name)
        sizes = (old.in_features, old.out_features, old.bias is not None)
        if kind == "int8":
            new: Any = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold)
            new.weight = bnb.nn.Int8Params(old.weight.detach(), requires_grad=False).to("cpu")
        else:
            new = bnb.nn.Linear4bit(*sizes, compute_dtype, **FOUR_BIT[kind])
            fields = {**FOUR_BIT[kind], "module": new}
            new.weight = bnb.nn.Params4bit(old.weight.detach(), requires_grad=False, **fields).to("cpu")
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach())
        setattr(model, name, new)
    return model


def spec(**fields: Any) -> RosaSpec:
    return RosaSpec(**({"base": "keep", "rank": 4, "density": 0.05} | fields))


def filled(model: nn.Module, step: float = 0.1) -> nn.Module:
    """Transformed, with a mask and adapters away from zero."""
    torch.manual_seed(3)
    rosa_fx.transform(model, spec())
    for name, weight in rosa_fx.state.state_of(model).weights.items():
        dense = torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.bool)
        dense[torch.randperm(dense.numel())[: weight.sparse.values.numel()]] = True
        rosa_fx.set_masks(model, {name: dense.view(weight.shape)})
        nn.init.normal_(weight.low_rank.B, std=step)
        nn.init.normal_(weight.sparse.values, std=step)
    return model


def own_dequantisation(module: Any) -> Tensor:
    """D(Q) as bitsandbytes itself gives it (it is right where rows are whole blocks)."""
    weight = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = module.state.SCB if weight.SCB is None else weight.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales)


def stored(module: Any) -> list[Tensor]:
    """Everything that makes up the packed weight."""
    weight = module.weight
    if not isinstance(module, bnb.nn.Linear4bit):
        return [weight.data, module.state.SCB if weight.SCB is None else weight.SCB]
    state = weight.quant_state
    return [weight.data, state.absmax, *((state.state2.absmax, state.offset) if state.nested else ())]


def inputs(columns: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, columns, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_same_memory_same_values(kind: str, used: bool) -> None:
    """Also after a forward, in which `Linear8bitLt` moves its tensors about."""
    model, x = quantised(kind), inputs()
    theirs = model(x).detach() if used else None
    modules = [model.get_submodule(name) for name in LINEARS]
    before = [[(t.data_ptr(), t.clone()) for t in stored(module)] for module in modules]
    dense = [own_dequantisation(module) for module in modules]
    classes = [type(module) for module in modules]
    assert rosa_fx.transform(model, spec()) is model
    for name, module, cls, tensors, expected in zip(LINEARS, modules, classes, before, dense):
        assert model.get_submodule(name) is module, "the same object"
        assert isinstance(module, cls)
        base = module.parametrizations.weight[0].base
        held = base.tensors()
        assert [t.data_ptr() for t in held] == [address for address, _ in tensors], "no copy"
        for ours, (_, bits) in zip(held, tensors):
            assert torch.equal(ours.view(-1).view(torch.uint8), bits.view(-1).view(torch.uint8))
        assert torch.equal(rosa_fx.base_weight(model, f"{name}.weight"), expected)
        assert base.format.kind == kind[:4].rstrip(",")
    assert not any(isinstance(p, bnb.nn.Params4bit | bnb.nn.Int8Params) for p in model.parameters())
    if theirs is not None and kind != "int8":
        assert (model(x) - theirs).norm() <= 64 * EPS * theirs.norm(), "B and the sparse values are still zero"


def test_int8_multiplies_unquantised_activations() -> None:
    """bitsandbytes also rounds x to 8 bits, except outlier columns. That is not reproduced: the result is nearer to D(Q)."""
    for threshold in (0.0, 2.0):
        model, x = quantised("int8", threshold=threshold), inputs()
        linear: Any = model[0]
        exact = x.double() @ own_dequantisation(linear).double().t() + linear.bias.double()
        theirs = linear.eval()(x)  # in training it does not on a CPU
        rosa_fx.transform(model, spec())
        ours = model[0](x)
        assert (ours - exact).norm() <= 8 * EPS * exact.norm()
        assert (theirs - exact).norm() > 100 * (ours - exact).norm()


def decode(module: Any, shape: tuple[int, int]) -> Tensor:
    """4-bit D(Q) by the definition: table value of each code, high half of a byte first, times the scale of its block."""
    state = module.weight.quant_state
    packed = module.weight.data.view(torch.uint8).view(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1).long()
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return (state.code[codes] * scales.repeat_interleave(state.blocksize)[: codes.numel()]).view(shape)


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_rows_that_are_no_whole_blocks(kind: str) -> None:
    """Where bitsandbytes' own CPU kernel takes wrong scales."""
    model = quantised(kind, columns=96)
    expected = decode(model[0], (128, 96))
    rosa_fx.transform(model, spec())
    assert torch.equal(rosa_fx.base_weight(model, "0.weight"), expected)


@pytest.mark.parametrize(
    ("kind", "dtype", "compute_dtype", "input_dtype"),
    [
        ("nf4", torch.float32, None, torch.float32),
        ("nf4, double", torch.bfloat16, torch.float32, torch.bfloat16),  # transformers' default
        ("fp4", torch.bfloat16, torch.bfloat16, torch.float32),  # norms and embeddings widened for training
        ("nf4", torch.float16, None, torch.float16),
        ("int8", torch.bfloat16, None, torch.bfloat16),
        ("int8", torch.float16, None, torch.float32),
    ],
)
def test_training_step_eager_and_compiled(
    kind: str, dtype: torch.dtype, compute_dtype: torch.dtype | None, input_dtype: torch.dtype
) -> None:
    """Any input dtype is taken and given back, as bitsandbytes does, and the casts do not hinder the rewrite."""
    model = filled(quantised(kind, dtype=dtype, compute_dtype=compute_dtype))[:3]
    counts = []
    call = torch.compile(model, backend=capture_backend(lambda graph: counts.append(rewrite(graph).counts)), fullgraph=True)
    results = []
    for each in (model, call):
        x = inputs(dtype=input_dtype).requires_grad_()
        y = each(x)
        assert y.dtype == input_dtype
        model.zero_grad()
        y.float().square().mean().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == 2 + 2 * 3
    assert counts == [{"linear": 2, "linear_t": 2, "linear_grads": 2, "dense": 0}]
    # Eager rounds the weight to its own dtype first, the fused operator does not.
    eps = max(torch.finfo(each).eps for each in (dtype, compute_dtype or input_dtype, input_dtype))
    for eager, compiled in zip(*results):
        assert (compiled.double() - eager.double()).norm() <= 64 * eps * eager.double().norm()


def test_other_bases_are_refused_and_nothing_is_changed() -> None:
    model = quantised("nf4, double")
    with pytest.raises(RosaError, match=r"base: base 'nf4' for the weight '0.weight', which is nf4 as bitsandbytes packed it"):
        rosa_fx.transform(model, RosaSpec(rank=2))
    with pytest.raises(RosaError, match=r"overrides\['2.\*'\]: base 'int8' .* Use base 'keep'"):
        rosa_fx.transform(model, spec(overrides={"2.*": {"base": "int8"}}))
    assert type(model[0]) is type(model[2]) is bnb.nn.Linear4bit
    assert model[0].quant_state is not None
    # A mixed model: what is packed is kept, the rest is quantised.
    model = nn.Sequential(quantised("nf4")[0], nn.Linear(128, 64))
    rosa_fx.transform(model, RosaSpec(rank=2, overrides={"0.weight": {"base": "keep"}}))
    report = rosa_fx.explain(model, inputs())
    assert [(t.base, t.status) for t in report.targets] == [("keep", "fused"), ("nf4", "fused")]
    assert report.targets[0].reason == "nf4 as bitsandbytes packed it, blocks of 64"


def test_what_cannot_be_taken_over_is_refused() -> None:
    def refused(module: nn.Module, reason: str, targets: str | list[str] = "0.weight") -> None:
        with pytest.raises(RosaError, match=reason):
            rosa_fx.transform(nn.Sequential(module), spec(targets=targets))

    refused(bnb.nn.Linear4bit(64, 64), "Linear4bit, which has not quantised it yet: move the model to its device first")
    refused(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), "has not quantised it yet")
    refused(bnb.nn.Linear8bitLt(64, 64), "has_fp16_weights=True")
    refused(bnb.nn.StableEmbedding(64, 64), "StableEmbedding, which rosa_fx does not take over")
    with torch.device("meta"):
        offloaded = bnb.nn.Linear4bit(64, 64)
    for targets in ("0.weight", "all-linear"):
        refused(
            offloaded, "Linear4bit and is on the meta device or offloaded: load the model with its weights in memory", targets
        )
    repacked: Any = quantised("nf4")[0]
    repacked.weight.quant_state.packing_format_for_cpu = True
    refused(repacked, "repacked it, with scales rounded to bfloat16")
    other: Any = quantised("nf4")[0]
    other.weight.quant_state.code = other.weight.quant_state.code.flip(0)
    refused(other, "with scales or tables that are not those of this release")


@pytest.mark.parametrize("kind", ["nf4", "nf4, double", "int8"])
def test_merge_gives_dense_ordinary_linears(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = filled(quantised(kind, dtype=torch.bfloat16, compute_dtype=torch.float32)), inputs(dtype=torch.bfloat16)
    expected = {}
    with monkeypatch.context() as patch:  # eager mode adds the terms in the product, not in the weight
        patch.setattr("rosa_fx.eager.is_eager", lambda: False)
        before = model(x)
    for name in LINEARS:
        weight = rosa_fx.adapter(model, f"{name}.weight")
        base = weight.base.format.dequantize(weight.base.tensors(), weight.shape, torch.float32)
        expected[name] = (base + rosa_fx.delta(model, f"{name}.weight")).bfloat16()
    rosa_fx.merge(model)
    assert list(model.state_dict()) == list(plain().state_dict())
    for name, dense in expected.items():
        module = model.get_submodule(name)
        assert type(module) is CastingLinear
        assert isinstance(module, nn.Linear)
        assert type(module.weight) is nn.Parameter
        assert torch.equal(module.weight, dense)
        assert not {"quant_state", "quant_storage", "state", "index"} & vars(module).keys()
        assert not module._load_state_dict_pre_hooks
    assert torch.equal(model(x), before)
    assert model[:3](x.float()).dtype == torch.float32
    assert "bitsandbytes" not in str(pickle.dumps(model))
    plain(dtype=torch.bfloat16).load_state_dict(model.state_dict(), strict=True)
    assert rosa_fx.explain(rosa_fx.transform(model, spec(base="nf4")), x).fused == 2


def test_only_some_weights_taken_over() -> None:
    model, x = quantised("nf4"), inputs()
    expected = model(x)
    rosa_fx.transform(model, spec(exclude=["2.*"]))
    assert type(model[2]) is bnb.nn.Linear4bit
    assert (model(x) - expected).norm() <= 64 * EPS * expected.norm()
    rosa_fx.merge(model)
    assert (type(model[0]), type(model[2])) == (CastingLinear, bnb.nn.Linear4bit)


def test_one_packed_weight_in_two_modules() -> None:
    model = nn.Sequential(quantised("nf4", columns=128)[0], bnb.nn.Linear4bit(128, 128, quant_type="nf4"))
    model[1].weight = model[0].weight
    filled(model)
    assert [t.name for t in rosa_fx.explain(model, inputs(128)).targets] == ["0.weight"]
    before = model(inputs(128))
    rosa_fx.merge(model)
    assert model[0].weight is model[1].weight
    assert (model(inputs(128)) - before).norm() <= 64 * EPS * before.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, x = filled(quantised(kind)), inputs()
    rosa_fx.save_adapter(model, tmp_path / "adapter")
    for target in (quantised(kind), rosa_fx.transform(quantised(kind), spec())):
        assert torch.equal(rosa_fx.load_adapter(target, tmp_path / "adapter")(x), model(x))
    with pytest.raises(RosaError, match="base is "):
        rosa_fx.load_adapter(plain(), tmp_path / "adapter")
    other = quantised(kind, seed=1)
    if FOUR_BIT.get(kind, {}).get("compress_statistics"):
        # Double-quantised scales differ from device to device: the checkpoint is unknown.
        assert not bool(rosa_fx.adapter(model, "0.weight").base.fingerprint.any())
    else:
        with pytest.raises(RosaError, match="fingerprint"):
            rosa_fx.load_adapter(other, tmp_path / "adapter")
        assert type(other[0]).__module__.startswith("bitsandbytes"), "untouched"


@pytest.mark.parametrize("kind", ["nf4, double", "int8"])
def test_copies_pickles_and_state_dicts(kind: str) -> None:
    used = quantised(kind)
    used(inputs())
    model, x = filled(used), inputs()
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), rosa_fx.transform(quantised(kind, seed=1), spec())]
    assert not any(key.endswith(("SCB", "weight_format")) and ".base." not in key for key in model.state_dict())
    clones[2].load_state_dict(model.state_dict(), strict=True)
    expected = model(x)
    for clone in clones:
        assert type(clone[0]) is type(model[0])
        assert torch.equal(clone(x), expected)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert torch.equal(rosa_fx.base_weight(narrow, "0.weight"), rosa_fx.base_weight(model, "0.weight").bfloat16())
    assert narrow(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(rosa_fx.merge(clones[1])(x), rosa_fx.merge(clones[0])(x))


def test_device_hooks_call_the_new_forward() -> None:
    """accelerate keeps the former `forward` of a module that it moves inputs for."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = quantised("nf4"), inputs()
    for name in LINEARS:
        hooks.add_hook_to_module(model.get_submodule(name), hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    expected = filled(quantised("nf4"))(x)
    assert torch.equal(filled(model)(x), expected)
    merged = rosa_fx.merge(model)(x)
    assert (merged - expected).norm() <= 64 * EPS * expected.norm()
    hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), merged)


LOADING: list[dict[str, Any]] = [
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_storage": torch.bfloat16},
    {"load_in_8bit": True},
]


@pytest.mark.parametrize("options", LOADING, ids=["nf4, double", "fp4, stored as bfloat16", "int8"])
@pytest.mark.filterwarnings("ignore:.*inputs will be cast.*")
def test_models_loaded_by_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "base", quantization_config=transformers.BitsAndBytesConfig(**options))
    model.train()  # in eval bitsandbytes repacks 4-bit weights on some CPUs, lossily
    ids = torch.randint(0, 64, (2, 8))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    kinds = bnb.nn.Linear4bit, bnb.nn.Linear8bitLt
    packed = {name: [t.clone() for t in stored(m)] for name, m in model.named_modules() if isinstance(m, kinds)}
    rosa_fx.transform(model, spec())
    assert len(packed) == 7
    for name, tensors in packed.items():
        for ours, theirs in zip(rosa_fx.adapter(model, f"{name}.weight").base.tensors(), tensors, strict=True):
            assert torch.equal(ours.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8)), name
    with torch.no_grad():
        actual = model(ids, use_cache=False).logits
    # The activations of int8 layers are rounded to 8 bits there and not here.
    eps = 1 / 127 if "load_in_8bit" in options else 2 * torch.finfo(torch.bfloat16).eps
    assert (actual - expected).float().norm() <= 8 * eps * expected.float().norm()
    report = rosa_fx.explain(model, input_ids=ids, use_cache=False)
    assert (report.fused, report.graph_breaks) == (7, 0)
    assert report.counts == {"linear": 7, "linear_t": 4, "linear_grads": 7, "dense": 0}
    rosa_fx.merge(model)
    assert not model.is_quantized
    merged = model.to(torch.float32)(ids, use_cache=False).logits
    model.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    error = (again(ids, use_cache=False).logits - merged).norm()
    compute = options.get("bnb_4bit_compute_dtype", torch.float32)
    assert error <= 8 * torch.finfo(compute).eps * merged.norm()
