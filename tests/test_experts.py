"""Mixture-of-experts models of transformers: every expert is fused, trained, saved and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten_models import FLOAT32, assert_budget, fill, rewritten
from torch import Tensor, nn

import rosa_fx

IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "use_cache": False,
    "pad_token_id": 0,
}


def built(kind: str, implementation: str | None = None) -> nn.Module:
    import transformers as tf

    torch.manual_seed(0)
    many = {"num_local_experts": 4, "num_experts_per_tok": 2}
    if kind == "mixtral":
        model: Any = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES | many))
    elif kind == "qwen3_moe":
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES | sizes))
    elif kind == "gpt_oss":
        model = tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES | many | {"layer_types": ["full_attention"]}))
    elif kind == "llama4":
        sizes = many | {"num_experts_per_tok": 1, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1}
        model = tf.Llama4ForCausalLM(tf.Llama4TextConfig(**SIZES | sizes))
    else:
        model = tf.XLNetModel(tf.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48))
    for parameter in model.parameters():  # some are made without values
        if not bool(parameter.isfinite().all()) or not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model.eval()


def output(model: Any) -> Tensor:
    return model(input_ids=IDS)[0]


def in_float64(model: nn.Module) -> nn.Module:
    wide: Any = copy.deepcopy(model).double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # the grouped product has no float64
    return wide


def run(call: Any, model: nn.Module) -> list[Tensor]:
    """Output, and the gradient of every parameter that has one, for a fixed random upstream gradient."""
    model.zero_grad()
    y = output(call)
    torch.manual_seed(5)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


# Weights with more than two dimensions, and how each is read.
STACKS = {
    "mixtral": {"gate_up_proj": "4 matrices 48 x 32", "down_proj": "4 matrices 32 x 24"},
    "qwen3_moe": {"gate_up_proj": "4 matrices 40 x 32", "down_proj": "4 matrices 32 x 20"},
    "gpt_oss": {"gate_up_proj": "4 matrices 32 x 48", "down_proj": "4 matrices 24 x 32"},
    "llama4": {"gate_up_proj": "4 matrices 32 x 48", "down_proj": "4 matrices 24 x 32"},
    "xlnet": dict.fromkeys("qkvor", "a matrix 32 x 32"),
}


@pytest.mark.parametrize("kind", STACKS)
def test_all_experts_are_fused_trained_saved_and_merged(kind: str, tmp_path: Path) -> None:
    plain = built(kind)
    model = rosa_fx.transform(copy.deepcopy(plain), rosa_fx.RosaSpec(rank=2, density=0.05))
    targets = {n: t for n, t in rosa_fx.state.state_of(model).targets.items() if len(t.shape) > 2}
    assert {name.rpartition(".")[2]: str(target.reading) for name, target in targets.items()} == STACKS[kind]
    fill(model)
    call, reports = rewritten(model)
    actual = run(call, model)
    uses = {name: use for report in reports for name, use in report.uses.items()}
    assert not [reason for use in uses.values() for reason in use.dense]
    for name in targets:
        assert (uses[name].products, uses[name].gradients) in ((1, 1), (2, 1)), "one product forward, one or none for dx"
    wide = in_float64(model)
    assert_budget(actual, run(model, model), run(wide, wide), factor=FLOAT32, together=True)
    torch.optim.AdamW(rosa_fx.trainable_parameters(model)).step()
    with torch.no_grad():
        trained = output(model)
        rosa_fx.save_adapter(model, tmp_path / "a")
        assert torch.equal(output(rosa_fx.load_adapter(plain, tmp_path / "a")), trained)
        exact = output(in_float64(model))
        assert_budget([output(rosa_fx.merge(model))], [trained], [exact], factor=FLOAT32)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_is_right_in_eager_mode_and_fused(implementation: str) -> None:
    """transformers' loop over experts breaks the graph by itself; the other two are captured whole."""
    model = rosa_fx.transform(built("mixtral", implementation), rosa_fx.RosaSpec(rank=2, density=0.05, base="keep"))
    fill(model)
    merged = rosa_fx.merge(copy.deepcopy(model))
    budget: dict[str, Any] = {"plain": [output(merged)], "truth": [output(in_float64(merged))], "factor": FLOAT32}
    assert_budget([output(model)], **budget)
    if implementation == "eager":
        return
    report = rosa_fx.explain(model, input_ids=IDS)
    assert (report.graph_breaks, report.dense) == (0, 0)
    assert report.fused == len(report.targets)
    assert_budget([output(rewritten(model)[0])], **budget)


def test_masks_of_experts_come_from_one_grouped_gradient() -> None:
    """Collecting in a compiled graph chooses the mask of a whole stack, without the dense gradient leaving the operator."""
    model = rosa_fx.transform(built("mixtral"), rosa_fx.RosaSpec(rank=2, density=0.05, base="keep", schedule="wl0"))
    other = copy.deepcopy(model)
    masks = []
    for each, compiled in ((model, True), (other, False)):
        schedule = rosa_fx.MaskSchedule(each, micro_batches=1)
        schedule.begin_step()
        call, reports = rewritten(each) if compiled else (each, [])
        output(call).square().sum().backward()
        schedule.end_step()
        masks.append(rosa_fx.masks(each))
        assert not [reason for report in reports for use in report.uses.values() for reason in use.dense]
    for name, mask in masks[0].items():
        same = (mask.to_dense() & masks[1][name].to_dense()).sum().item()
        assert same >= mask.nnz - 1, name  # the entry at the cut may be decided by rounding
