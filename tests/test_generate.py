"""`generate()` of a transformed model, eager and compiled, and of its merged copy: the same tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import train
from torch import Tensor, nn
from trainer_models import llama
from transformers import AutoModelForCausalLM

import rosa_fx
from rosa_fx import RosaSpec


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("base", ["nf4", "keep"])
def test_same_tokens_eager_compiled_and_merged(base: str, tmp_path: Path) -> None:
    model = llama(layers=1, attention_dropout=0.0, initializer_range=0.3).eval()
    prompt = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])

    def tokens(model: nn.Module, **options: Any) -> Tensor:
        return model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)  # type: ignore[operator]

    plain = tokens(model)
    train(rosa_fx.transform(model, RosaSpec(base=base, rank=4, density=0.05)))
    expected = tokens(model)
    assert not torch.equal(expected, plain), "the adapter changes what is generated"
    with torch.enable_grad():  # as in the middle of a training loop
        assert torch.equal(tokens(model), expected)
    merged = rosa_fx.merge(copy.deepcopy(model))
    assert torch.equal(tokens(merged), expected)
    merged.save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(loaded(prompt).logits, merged(prompt).logits)
    if base == "nf4":
        model.compile()
        # A cache of fixed size: one graph for the prompt and one for all tokens after it.
        assert torch.equal(tokens(model, cache_implementation="static"), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
