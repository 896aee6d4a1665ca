"""The targets of Hugging Face models with random weights."""

from typing import Any

import pytest
from target_models import names
from torch import nn

from rosa_fx.errors import RosaError
from rosa_fx.spec import RosaSpec
from rosa_fx.targets import select_targets


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def llama(transformers: Any, *, tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_llama(transformers: Any, tied: bool) -> None:
    parts = [f"self_attn.{each}_proj" for each in "qkvo"] + [f"mlp.{each}_proj" for each in ("gate", "up", "down")]
    expected = [f"model.layers.{index}.{part}.weight" for index in range(2) for part in parts]
    model = llama(transformers, tied=tied)
    assert names(model) == expected
    wrapper = nn.Module()
    wrapper.policy, wrapper.value = model, nn.Linear(16, 1)  # not a wrapper with a lone child
    assert names(wrapper, exclude="value.*") == [f"policy.{name}" for name in expected]
    if tied:
        with pytest.raises(RosaError, match=r"'model.embed_tokens.weight'.*exclude it"):
            names(model, targets="lm_head.weight")
    else:
        assert names(model, targets="lm_head.weight") == ["lm_head.weight"]
    assert names(model, targets="re:.*[qv]_proj.weight") == [name for name in expected if "q_p" in name or "v_p" in name]


def test_gpt2_conv1d(transformers: Any) -> None:
    config = transformers.GPT2Config(vocab_size=64, n_positions=48, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)  # head tied; N of c_attn is n_positions
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    targets = select_targets(model, RosaSpec(density=0.1))
    assert [target.name for target in targets] == [f"transformer.h.{i}.{part}.weight" for i in range(2) for part in parts]
    assert targets[0].shape == (16, 48)  # as stored: in, out


def test_router_of_a_mixture_of_experts(transformers: Any) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config)
    expected = [f"model.layers.0.self_attn.{each}_proj.weight" for each in "qkvo"] + ["model.layers.0.mlp.gate.weight"]
    expected += [f"model.layers.0.mlp.experts.{each}_proj" for each in ("gate_up", "down")]
    assert sorted(names(model, rank=2)) == sorted(expected)
    assert sorted(names(model, rank=2, targets="*experts*")) == sorted(expected[-2:])


def test_bert_and_albert(transformers: Any) -> None:
    common = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,  # equal to the hidden size: the pooler is no head
    }
    bert = transformers.BertModel(transformers.BertConfig(**common))
    found = names(bert)
    assert len(found) == 2 * 6 + 1
    assert found[-1] == "pooler.dense.weight"
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**common))
    found = names(masked)
    assert len(found) == 2 * 6 + 1
    assert found[-1] == "cls.predictions.transform.dense.weight"
    albert = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(embedding_size=8, **common))
    targets = select_targets(albert, RosaSpec(density=0.1))
    assert len(targets) == 1 + 6 + 1  # one set of layer weights; the mapping in before, the pooler after, no classifier
    assert all(len(target.owners) == 1 for target in targets)
