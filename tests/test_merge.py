"""Merging: the exact sum, an ordinary model again, and refusals that change nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaError, RosaSpec

N, K = 48, 64


class Net(nn.Module):
    """Linears with and without bias, a bare weight, and a frozen part."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(K, N) / 8)
        self.a = nn.Linear(K, N)
        self.b = nn.Linear(N, K, bias=False)
        self.c = nn.Linear(K, N)
        self.norm = nn.LayerNorm(N)
        self.head = nn.Linear(K, 5)
        if tied:
            self.c.weight = self.a.weight
        self.b.weight.requires_grad_(False)
        self.norm.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.tanh(self.a(x)))
        return self.head(self.norm(self.c(x)) @ self.w.T)


def plain(tied: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(tied).to(dtype)


def spec_of(**fields: Any) -> RosaSpec:
    patterns = ["a.weight", "b.weight", "c.weight", "w"]
    return RosaSpec(**{"base": "nf4", "rank": 4, "density": 0.05, "targets": patterns, **fields})


@torch.no_grad()
def trained(tied: bool = False, dtype: torch.dtype = torch.float32, masks: bool = True, **fields: Any) -> nn.Module:
    """Transformed, with random adapter values and masks in place of trained ones."""
    model = rosa_fx.transform(plain(tied, dtype), spec_of(**fields))
    fill(model, masks)
    return model


@torch.no_grad()
def fill(model: nn.Module, masks: bool = True) -> None:
    generator = torch.Generator().manual_seed(7)
    state = rosa_fx.adapter_state(model)
    for key, tensor in state.items():
        name = key.removesuffix(".sparse.values")
        if masks and name != key and tensor.numel():
            dense = torch.zeros(rosa_fx.adapter(model, name).shape, dtype=torch.bool)
            dense.view(-1)[torch.randperm(dense.numel(), generator=generator)[: tensor.numel()]] = True
            rosa_fx.set_masks(model, {name: dense})
        if tensor.is_floating_point() and (masks or "sparse" not in key):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


FORMS: list[dict[str, Any]] = [
    {},
    {"double_quant": True, "adapter_dtype": "bfloat16"},
    {"base": "fp4"},
    {"base": "int8"},
    {"base": "keep"},
    {"dtype": torch.bfloat16},
    {"base": "keep", "dtype": torch.bfloat16},
    {"base": "keep", "dtype": torch.float16, "adapter_dtype": "float16"},
    {"rank": 0, "schedule": "spa_only"},
    {"density": 0.0, "schedule": "lora_only"},
    {"masks": False},
    {"tied": True, "targets": ["a.weight", "w"]},
    {"overrides": {"a.*": {"rank": 9, "base": "keep"}, "w": {"density": 0.0}}},
]


@pytest.mark.parametrize("fields", FORMS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items()) or "nf4")
def test_merged_weight_is_the_sum_rounded_once_and_the_model_ordinary_again(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, tied = fields.get("dtype", torch.float32), fields.get("tied", False)
    before = plain(tied, dtype)
    model = trained(**fields)
    names = fields.get("targets", spec_of().targets)
    expected = {}
    for name in names:
        weight = rosa_fx.adapter(model, name)
        base = weight.base.format.dequantize(weight.base.tensors(), weight.shape, torch.float32)
        expected[name] = (base + rosa_fx.delta(model, name)).to(dtype)
        assert not torch.equal(expected[name], rosa_fx.base_weight(model, name))
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    with monkeypatch.context() as patch:  # eager mode adds the terms in the product, not in the weight
        patch.setattr("rosa_fx.eager.is_eager", lambda: False)
        unmerged = model(x)

    assert rosa_fx.merge(model) is model
    assert kinds(model) == kinds(before)
    assert list(model.state_dict()) == list(before.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert flags(model) == flags(before)
    for name, tensor in model.state_dict().items():
        assert (tensor.dtype, tensor.shape) == (before.state_dict()[name].dtype, before.state_dict()[name].shape)
        if name not in expected and not (tied and name == "c.weight"):
            assert torch.equal(tensor, before.state_dict()[name]), name
    for name, dense in expected.items():
        parameter = model.get_parameter(name)
        assert type(parameter) is nn.Parameter
        assert parameter.is_leaf
        assert torch.equal(parameter, dense)
    assert (model.c.weight is model.a.weight) == tied
    torch.testing.assert_close(model(x), unmerged)  # eager adds the terms one by one
    assert not any("rosa" in key for key in vars(model))
    with pytest.raises(RosaError, match="not transformed"):
        rosa_fx.merge(model)
    before.load_state_dict(model.state_dict(), strict=True)
    model(x).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in before.named_parameters() if p.requires_grad
    }


def test_double_precision_keeps_its_digits() -> None:
    model = trained(dtype=torch.float64, base="keep")
    expected = plain(dtype=torch.float64).w.detach() + rosa_fx.delta(model, "w").double()
    assert torch.equal(rosa_fx.merge(model).get_parameter("w"), expected)


def test_merged_model_can_be_transformed_again() -> None:
    model = rosa_fx.merge(trained())
    base = model.get_parameter("w").detach().clone()
    rosa_fx.transform(model, spec_of(base="keep"))
    assert torch.equal(rosa_fx.base_weight(model, "w"), base)
    fill(model)
    delta = rosa_fx.delta(model, "w")
    assert torch.equal(rosa_fx.merge(model).get_parameter("w"), base + delta)
    assert flags(model) == flags(plain())


def test_untrained_adapter_on_kept_base_merges_to_the_original_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        model = rosa_fx.merge(rosa_fx.transform(plain(dtype=dtype), spec_of(base="keep")))
        for name, tensor in plain(dtype=dtype).state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)


def test_inside_a_wrapper_and_in_training_mode_with_dropout() -> None:
    model = trained(dropout=0.5)
    expected = rosa_fx.base_weight(model, "w") + rosa_fx.delta(model, "w")
    wrapped = torch.compile(model)
    assert rosa_fx.merge(wrapped) is wrapped
    assert torch.equal(model.get_parameter("w"), expected)
    assert kinds(model) == kinds(plain())


@pytest.mark.parametrize(
    ("part", "value", "dtype", "message"),
    [
        ("w.low_rank.A", float("nan"), torch.float32, "w: its adapter holds NaN or infinity"),
        ("c.weight.low_rank.B", float("inf"), torch.float32, "c.weight: its adapter holds NaN or infinity"),
        ("c.weight.sparse.values", -float("inf"), torch.float32, "c.weight: its adapter holds NaN or infinity"),
        ("c.weight.sparse.values", 7e4, torch.float16, "c.weight: D.Q. . ΔW exceeds the range of torch.float16"),
        ("c.weight.low_rank.B", 3e38, torch.float32, "c.weight: D.Q. . ΔW exceeds the range of torch.float32"),
    ],
)
def test_not_finite_is_refused_and_nothing_changed(part: str, value: float, dtype: torch.dtype, message: str) -> None:
    model = trained(dtype=dtype)
    rosa_fx.adapter_state(model)[part].fill_(value)
    before, classes, requires = contents(model), kinds(model), flags(model)
    with pytest.raises(RosaError, match=message):
        rosa_fx.merge(model)
    after = contents(model)
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) or bool(tensor.isnan().any()), name
    assert (kinds(model), flags(model)) == (classes, requires)
    rosa_fx.adapter_state(model)[part].zero_()
    rosa_fx.merge(model)


def test_plain_model_is_refused() -> None:
    with pytest.raises(RosaError, match=r"Net is not transformed: call rosa_fx.transform"):
        rosa_fx.merge(plain())


def test_saved_and_loaded_adapter_merges_to_the_same_bits(tmp_path: Path) -> None:
    model = trained()
    rosa_fx.save_adapter(model, tmp_path / "a")
    loaded = rosa_fx.load_adapter(plain(), tmp_path / "a")
    merged, again = rosa_fx.merge(model).state_dict(), rosa_fx.merge(loaded).state_dict()
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    with pytest.raises(RosaError, match="other values"):  # a merged model is another base
        rosa_fx.load_adapter(loaded, tmp_path / "a")


def test_merged_hugging_face_model_saves_and_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    kept = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    rosa_fx.transform(model, RosaSpec(rank=4, density=0.02))
    fill(model)
    ids = torch.arange(12).view(2, 6)
    rosa_fx.merge(model)
    with torch.no_grad():
        expected = model(ids).logits
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == kept
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "merged")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
