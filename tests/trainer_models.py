"""A small Llama, its data, and trainers of transformers for the tests of what drives one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import rosa_fx
from rosa_fx import RosaSpec

VOCAB = 61


def llama(layers: int = 2, hidden: int = 32, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "attention_dropout": 0.1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, eos_token_id=None, **{**sizes, **heads, **fields}))


def transformed(model: LlamaForCausalLM | None = None, **fields: Any) -> LlamaForCausalLM:
    model = model or llama()
    torch.manual_seed(1)
    spec = {"rank": 2, "alpha": 4, "density": 0.05, "schedule": "wl2", "dropout": 0.1}
    rosa_fx.transform(model, RosaSpec(**{**spec, **fields}))
    return model


def rows(count: int = 24, length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "warmup_steps": 1,
    }
    return TrainingArguments(**{**defaults, **fields})


def trainer(model: LlamaForCausalLM, folder: Path, callback: Any = None, **fields: Any) -> Trainer:
    optimizer = rosa_fx.optimizer_for(model, 0.01, 0.02)
    return Trainer(
        model,
        arguments(folder, **fields),
        train_dataset=rows(),
        optimizers=(optimizer, None),
        callbacks=[callback or rosa_fx.RosaCallback()],
    )


def adapters(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in rosa_fx.adapter_state(model).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
