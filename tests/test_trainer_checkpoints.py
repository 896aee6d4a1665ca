"""What a trainer's checkpoints hold of a transformed model, and optimizers that the trainer makes itself."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from trainer_models import adapters, arguments, assert_same, llama, rows, trainer, transformed
from transformers import AutoModelForCausalLM, Trainer

import rosa_fx
from rosa_fx import RosaCallback, RosaError

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as stored:
        return set(stored.keys())


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_hold_what_trains_and_resume_from_it(
    tmp_path: Path, tied: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(seed: int = 0) -> Any:
        model = llama(layers=1, tie_word_embeddings=tied)
        model.model.norm.weight.data.fill_(1 + seed / 8)
        model = transformed(model)
        model.model.layers[0].input_layernorm.weight.requires_grad_(True)  # the user's own
        model.register_buffer("running", torch.tensor([float(seed)]))
        return model

    model = built()
    trainer(model, tmp_path, **SAVING).train()
    parts = {"low_rank.A", "low_rank.B", "sparse.values", "sparse.row_offsets", "sparse.cols"}
    names = rosa_fx.state.state_of(model).weights
    expected = {f"{n.rpartition('.')[0]}.parametrizations.weight.0.{part}" for n in names for part in parts}
    assert keys(tmp_path / "checkpoint-3") == expected | {"model.layers.0.input_layernorm.weight", "running"}

    again = built()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer(again, tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not [record for record in caplog.records if "missing keys" in record.message]
    assert_same(adapters(again), adapters(model))
    with pytest.raises(RosaError, match="was written over another base: a weight that does not train has other values"):
        trainer(built(1), tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    other = llama(layers=1, tie_word_embeddings=tied)
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(RosaError, match="was written over another base"):
        trainer(transformed(other), tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_best_model_is_loaded_from_what_trains(tmp_path: Path) -> None:
    model = transformed(llama(layers=1))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"}
    run = Trainer(
        model,
        arguments(tmp_path, **SAVING, **best, greater_is_better=True),  # the loss falls, so that the first is "best"
        train_dataset=rows(),
        eval_dataset=rows(4),
        optimizers=(rosa_fx.optimizer_for(model, 0.01, 0.02), None),
        callbacks=[RosaCallback()],
    )
    run.train()
    assert run.state.best_model_checkpoint is not None
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    with safe_open(Path(run.state.best_model_checkpoint) / "model.safetensors", "pt") as stored:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(stored.get_tensor(name), parameter), name


def test_whole_models_are_saved_outside_training_and_where_asked(tmp_path: Path) -> None:
    model = transformed(llama(layers=1))
    run = trainer(model, tmp_path, RosaCallback(save_base=True), **SAVING)
    run.train()
    run.save_model(str(tmp_path / "after"))
    assert keys(tmp_path / "checkpoint-3") == keys(tmp_path / "after") == set(model.state_dict())
    # Also where a run has not come to its end: a merged model is saved whole, whatever its trainer left out.
    unfinished = transformed(llama(layers=1))
    kept = trainer(unfinished, tmp_path / "unfinished", **SAVING)
    kept.save_model(str(tmp_path / "before"))
    assert keys(tmp_path / "before") < set(unfinished.state_dict())
    assert len(copy.deepcopy(unfinished)._keys_to_ignore_on_save) == len(unfinished._keys_to_ignore_on_save) > 0
    merged = rosa_fx.merge(unfinished)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, merged.eval()(ids).logits)


def test_the_trainer_makes_the_optimizer(tmp_path: Path) -> None:
    """`optimizer_cls_and_kwargs` with both rates: the same training as with an optimizer that is passed."""
    given = transformed(llama(layers=1))
    trainer(given, tmp_path).train()
    model = transformed(llama(layers=1))
    made = {"params": rosa_fx.trainable_parameters(model, 0.01, 0.02), "weight_decay": 0.0, "fused": True}
    run = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(torch.optim.AdamW, made),
        callbacks=[RosaCallback()],
    )
    run.train()
    assert {g["name"]: g["initial_lr"] for g in run.optimizer.param_groups} == {"low_rank": 0.01, "sparse": 0.02}
    assert_same(adapters(model), adapters(given))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_at_once_compiled(tmp_path: Path, fresh_compiler: None) -> None:
    """torch_compile with accumulation, checkpointing, bf16 and resuming: as the run that was not interrupted."""

    def built() -> nn.Module:
        return transformed(llama(layers=1, attention_dropout=0.0), dropout=0.0)

    fields: dict[str, Any] = {**SAVING, "save_steps": 2, "max_steps": 4, "torch_compile": True, "bf16": True}
    fields |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    fields["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    whole = built()
    trainer(whole, tmp_path, **fields).train()
    # transformers makes the embedding's output require gradients in a hook, which breaks the graph; nothing else does.
    assert all("requires_grad_()" in reason for reason in torch._dynamo.utils.counters["graph_break"])
    assert len(rosa_fx.masks(whole)) == 7
    again = built()
    trainer(again, tmp_path, **fields).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(adapters(again), adapters(whole))
