"""RoSA inside `transformers.Trainer`: phases, resuming, restart, two learning rates, compiled training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from other_process import run_python
from torch import Tensor, nn
from trainer_models import adapters, arguments, assert_same, llama, rows, trainer, transformed
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback

import rosa_fx
from rosa_fx import RosaCallback, RosaError


class Watch(TrainerCallback):
    """What the trainer's steps saw: phase and learning rates of each step, and whether values were non-zero after it."""

    def __init__(self, callback: RosaCallback) -> None:
        self.callback, self.seen = callback, []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        states = len(getattr(optimizer, "optimizer", optimizer).state)
        self.seen.append((self.callback.schedule.phase, rates["low_rank"], rates["sparse"], states))


def own_loop(steps: int, micro: int, **fields: Any) -> dict[str, Tensor]:
    """The same training without a trainer: its batches in its order, its learning rates, its clipping."""
    from transformers import get_scheduler, set_seed

    set_seed(3)  # as the trainer does when it is made, and again when it begins
    model = transformed(**fields)
    schedule = rosa_fx.MaskSchedule(model, micro_batches=micro)
    optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model, 0.01, 0.02), weight_decay=0.0)
    rates = get_scheduler("linear", optimizer, 1, steps)
    data = rows()
    set_seed(3)
    generator = torch.Generator().manual_seed(3)
    order: list[int] = []
    while len(order) < 2 * steps * micro:
        order += torch.randperm(len(data), generator=generator).tolist()
    model.train()
    for step in range(steps):
        schedule.begin_step()
        for part in range(micro):
            start = 2 * (step * micro + part)
            chosen = [data[i] for i in order[start : start + 2]]
            batch = {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}
            (model(**batch).loss / micro).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        schedule.end_step()
    return adapters(model)


def test_phases_and_learning_rates(tmp_path: Path) -> None:
    callback = RosaCallback()
    with pytest.raises(RosaError, match="made when training begins"):
        _ = callback.schedule
    watch = Watch(callback)
    run = trainer(transformed(), tmp_path, callback, gradient_accumulation_steps=2)
    run.add_callback(watch)
    run.train()
    factors = [0.0, 1.0, 0.8, 0.6, 0.4, 0.2]  # one warm-up step of transformers' linear schedule
    phases = ["low_rank", "low_rank", "collect", "joint", "joint", "joint"]
    assert [phase for phase, *_ in watch.seen] == phases
    assert [low for _, low, _, _ in watch.seen] == pytest.approx([0.01 * f for f in factors])
    assert [sparse for *_, sparse, _ in watch.seen] == pytest.approx([0.02 * f for f in factors])
    assert callback.schedule.micro_batches == 2
    assert len(rosa_fx.masks(run.model)) == 14
    assert all(bool(t.any()) for name, t in adapters(run.model).items() if name.endswith(("values", "low_rank.B")))
    assert not list(tmp_path.rglob("rosa_schedule*")), "nothing is saved unasked"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_same_as_a_loop_of_ones_own(tmp_path: Path, accumulate: int) -> None:
    """The trainer adds nothing and leaves nothing out; it only divides by the number of targets elsewhere."""
    model = transformed(dropout=0.0, base="keep")
    model.config.attention_dropout = 0.0
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    given = rosa_fx.MaskSchedule(model, micro_batches=accumulate)
    trainer(model, tmp_path, RosaCallback(given), gradient_accumulation_steps=accumulate).train()
    expected = own_loop(6, accumulate, model=llama(attention_dropout=0.0), dropout=0.0, base="keep")
    trained = adapters(model)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            error = (trained[name] - tensor).norm()
            assert error <= 1e-4 * tensor.norm(), name
        else:
            assert torch.equal(trained[name], tensor), name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_grads": 2},
        {"restart": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"bf16": True},
    ],
    ids=lambda fields: ",".join(fields) or "plain",
)
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = dict(fields)
    spec = {"num_grads": fields.pop("num_grads", 1)}
    restart = fields.pop("restart", False)
    if fields.get("gradient_checkpointing"):
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    saving = {"save_strategy": "steps", "save_steps": 1, **fields}
    watched = RosaCallback(restart=restart)
    whole = trainer(transformed(llama(layers=1), **spec), tmp_path / "whole", watched, **saving)
    watch = Watch(watched)
    whole.add_callback(watch)
    whole.train()
    expected = adapters(whole.model)
    if restart:
        assert [(low, states) for _, low, _, states in watch.seen[2:5]] == [
            (pytest.approx(0.008), 14),
            (0.0, 0),  # from the beginning: its warm-up, without state
            (pytest.approx(0.01), 21),
        ]
    for step in (1, 3, *([4] if restart else [])):
        folder = tmp_path / f"from{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        torch.manual_seed(77)
        model = llama(layers=1)
        rosa_fx.transform(model, rosa_fx.RosaSpec(**_spec_of(whole.model)))  # another initial A, no masks
        again = trainer(model, folder, RosaCallback(restart=restart), **saving)
        again.train(resume_from_checkpoint=True)
        assert_same(adapters(model), expected)


def _spec_of(model: nn.Module) -> dict[str, Any]:
    import dataclasses

    spec = rosa_fx.state.state_of(model).spec
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}


def test_resuming_from_elsewhere(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    first = trainer(transformed(), tmp_path / "a", **saving)
    first.train()
    expected = adapters(first.model)
    trainer(transformed(schedule="wl1"), tmp_path / "b", **saving).train()
    place = tmp_path / "a" / "checkpoint-3"
    with pytest.raises(RosaError, match="does not belong to the checkpoint that the trainer resumed from"):
        trainer(transformed(), tmp_path / "b", **saving).train(resume_from_checkpoint=str(place))
    moved = trainer(transformed(), tmp_path / "b", RosaCallback(checkpoint=place), **saving)
    moved.train(resume_from_checkpoint=str(place))
    assert_same(adapters(moved.model), expected)

    file = place / "rosa_schedule.safetensors"
    content = file.read_bytes()
    other_step = content.replace(b'\\"step\\": 3', b'\\"step\\": 2')
    no_version = content.replace(b"version", b"vorsien")
    for damaged, message in ((content[:40], "is damaged"), (no_version, "is damaged"), (other_step, "its checksum differs")):
        assert damaged != content
        file.write_bytes(damaged)
        with pytest.raises(RosaError, match=message):
            trainer(transformed(), tmp_path / "a", **saving).train(resume_from_checkpoint=str(place))
    file.write_bytes(content.replace(b'{\\"version\\": 2', b'{\\"version\\": 7'))
    with pytest.raises(RosaError, match="has the version 7, this rosa_fx reads 2"):
        trainer(transformed(), tmp_path / "a", **saving).train(resume_from_checkpoint=str(place))
    file.unlink()
    with pytest.raises(RosaError, match=r"is missing: the checkpoint was made without rosa_fx.RosaCallback"):
        trainer(transformed(), tmp_path / "a", **saving).train(resume_from_checkpoint=str(place))


def test_refusals(tmp_path: Path) -> None:
    model = transformed()
    run = Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[RosaCallback()])
    with pytest.raises(RosaError, match=r"does not hold .*sparse.values and 13 other .*optimizers=\(rosa_fx.optimizer_for"):
        run.train()
    run = Trainer(llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[RosaCallback()])
    with pytest.raises(RosaError, match="the trainer's model is not transformed"):
        run.train()
    other = RosaCallback(rosa_fx.MaskSchedule(transformed()))
    with pytest.raises(RosaError, match="made for another model"):
        trainer(model, tmp_path, other).train()
    with pytest.raises(RosaError, match="schedule is a str"):
        RosaCallback("wl64")  # type: ignore[arg-type]
    with pytest.raises(RosaError, match="restart=True is for the schedule"):
        RosaCallback(rosa_fx.MaskSchedule(model), restart=True)


def test_torch_compile(tmp_path: Path, fresh_compiler: None) -> None:
    """`torch_compile=True`: every phase runs the fused operators, and the result is that of eager to rounding."""
    small = {"layers": 1, "attention_dropout": 0.0}
    model = transformed(llama(**small), dropout=0.0)
    trainer(model, tmp_path, torch_compile=True, max_steps=4).train()
    eager = transformed(llama(**small), dropout=0.0)
    trainer(eager, tmp_path, max_steps=4).train()
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    compiled, expected = adapters(model), adapters(eager)
    for name, tensor in expected.items():
        if "low_rank" in name:
            assert (compiled[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert set(rosa_fx.masks(model)) == set(rosa_fx.masks(eager))


def test_model_that_bitsandbytes_quantised(tmp_path: Path) -> None:
    """Trainers refuse quantised models; once its weights are taken over it is none any more."""
    llama(layers=1).save_pretrained(tmp_path / "base")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=options).train()
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(loaded, arguments(tmp_path), train_dataset=rows())
    base = [linear.weight.data.clone() for linear in loaded.model.layers[0].mlp.children() if hasattr(linear, "weight")]
    model = transformed(loaded, base="keep")
    run = trainer(model, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=4)
    run.train()
    kept = [w.base.packed for name, w in rosa_fx.state.state_of(model).weights.items() if ".mlp." in name]
    assert len(kept) == len(base) == 3
    assert all(torch.equal(a.view(-1), b.view(-1)) for a, b in zip(kept, base))
    assert len(rosa_fx.masks(model)) == 7


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, rosa_fx; rosa_fx.transform; rosa_fx.optimizer_for; sys.exit('transformers' in sys.modules)"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
