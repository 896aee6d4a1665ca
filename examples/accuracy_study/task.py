"""One run of one method on a real model and real data: trained by `rosa_fx.train`, judged on held-out rows."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accuracy_study.dense import train_full
from accuracy_study.gradients import dense_gradients, over_base
from accuracy_study.methods import by_name, set_random_masks, spec_of
from accuracy_study.recipe import BASE, VARIANTS, Variant, densities, exact_sparse
from accuracy_study.sql import normalise, same_answers
from torch import nn

import rosa_fx
from rosa_fx.data import encode_rows, make_batches, pad_length, read_jsonl
from rosa_fx.data.encoding import render
from rosa_fx.data.jsonl import Row
from rosa_fx.models import load_model
from rosa_fx.state import is_transformed
from rosa_fx.training.engine import Engine, training_mode


@dataclass(frozen=True)
class Setting:
    """What a run trains on, and for how long: the same for all methods of one table. Longer rows are left out."""

    data: str
    train_rows: int
    held_rows: int
    batch: int
    epochs: int
    max_length: int = 192
    schedule: str = "wl64"
    warmup_steps: int = 20


class Bench:
    """The model and the data, loaded once; every run starts from a copy of the model."""

    def __init__(self, setting: Setting, data: Path, model: str) -> None:
        self.setting = setting
        self.identity = {"model": model, **asdict(setting)}
        self.plain, self.tokenizer = load_model(model)
        rows = [(row, encode_rows([row], self.tokenizer, sys.maxsize).rows[0]) for row in read_jsonl(data)]
        rows = [(row, encoded) for row, encoded in rows if len(encoded.input_ids) <= setting.max_length]
        if len(rows) < setting.train_rows + setting.held_rows:
            raise SystemExit(
                f"{data} has {len(rows)} rows of at most {setting.max_length} tokens, "
                f"{setting.train_rows + setting.held_rows} are asked for"
            )
        train, held = rows[: setting.train_rows], rows[-setting.held_rows :]
        self.held_rows = [row for row, _ in held]
        self.train_rows = [encoded for _, encoded in train]
        self.length = pad_length([encoded for _, encoded in (*train, *held)], setting.max_length)
        self.pad = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        self.held = make_batches([encoded for _, encoded in held], setting.batch, self.length, self.pad)
        self._compiled_for: Any = None

    def run(self, key: dict[str, Any], *, judged: bool = True, compile: bool = True) -> dict[str, Any]:
        """Train as `key` says (method, budget, base, lr, seed, and a variant of the recipe) and measure.

        `judged`: by its answers too. To generate them takes a third as long as to train.
        """
        method, seed, variant = by_name(key["method"]), key["seed"], VARIANTS[key.get("variant", BASE)]
        graphs = {name: value for name, value in key.items() if name not in ("lr", "seed")}
        if graphs != self._compiled_for:
            # Graphs of other methods would fill Dynamo's cache of one block, and the rest would run uncompiled.
            torch.compiler.reset()
            self._compiled_for = graphs
        torch.manual_seed(seed)
        model = copy.deepcopy(self.plain)
        batches = make_batches(self.train_rows, self.setting.batch, self.length, self.pad, seed=seed)
        config = rosa_fx.TrainConfig(
            epochs=self.setting.epochs,
            lr=key["lr"],
            lr_sparse=key["lr"] * key.get("sparse_share", 1.0),
            warmup_steps=self.setting.warmup_steps,
            seed=seed,
            compile=False,
            progress=False,
            restart=variant.restart is not None,
            max_steps=len(batches) * self.setting.epochs if variant.restart == "same" else None,
        )
        started = time.perf_counter()
        if method.full:
            if compile:
                rosa_fx.compile_blocks(model)
            losses = train_full(model, batches, config)
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        else:
            with exact_sparse() if variant.bf16 == "exact" else nullcontext():
                losses, parameters = self._train_adapters(key, variant, model, batches, config, compile)
        seconds = time.perf_counter() - started
        with exact_sparse() if variant.bf16 == "exact" else nullcontext():
            loss = self.held_loss(model, config)
        values: dict[str, Any] = {
            "loss": loss,
            "losses": [round(value, 4) for value in losses],
            "parameters": parameters,
            "steps": len(losses),
            "train_seconds": round(seconds, 1),
        }
        if judged:
            values |= self.judge(model, config)
        return values

    def _train_adapters(
        self,
        key: dict[str, Any],
        variant: Variant,
        model: nn.Module,
        batches: list[Any],
        config: rosa_fx.TrainConfig,
        compile: bool,
    ) -> tuple[list[float], int]:
        method = by_name(key["method"])
        schedule = {"schedule": self.setting.schedule} if 0 < method.share < 1 else {}
        spec = spec_of(method, model, key["budget"], key["base"], **(schedule | dict(variant.spec)))
        if variant.allocation == "global":
            spec = replace(spec, overrides=allocated(model, spec, batches[:1]))
        rosa_fx.transform(model, spec)
        if method.mask == "random":
            set_random_masks(model, key["seed"])
        if compile:
            rosa_fx.compile_blocks(model)
        result = rosa_fx.train(model, batches, config)
        return result.losses, sum(result.parameters.values())

    def held_loss(self, model: nn.Module, config: rosa_fx.TrainConfig) -> float:
        # In the trainer's mode: with a key-value cache every layer would need a graph of its own.
        with training_mode(model):
            return Engine(model, config, torch.device("cpu"), None, None).evaluate(self.held)

    def judge(self, model: nn.Module, config: rosa_fx.TrainConfig) -> dict[str, Any]:
        """Of the model merged to its own dtype: held-out loss, exact match of normalised greedy answers, and equal answers in
        sqlite where that says anything."""
        merged = (rosa_fx.merge(model) if is_transformed(model) else model).to(self.plain.dtype)
        answers = generate(merged, self.tokenizer, list(self.held_rows), self.pad)
        exact, executed = [], []
        for row, answer in zip(self.held_rows, answers):
            expected = row.messages[-1]["content"]
            exact.append(normalise(expected) == normalise(answer))
            same = same_answers(row.messages[0]["content"], expected, answer)
            executed += [] if same is None else [same]
        with torch.compiler.set_stance("force_eager"):
            loss = self.held_loss(merged, config)
        found = {"merged_loss": loss, "exact_match": statistics.fmean(exact), "answers": answers}
        if executed:
            found |= {"execution_match": statistics.fmean(executed), "execution_rows": len(executed)}
        return found


def allocated(model: nn.Module, spec: rosa_fx.RosaSpec, batches: list[Any]) -> dict[str, dict[str, float]]:
    """Densities by the gradients of the model before training, over the base of `spec`; as many entries as `spec` has."""
    gradients = dense_gradients(over_base(model, spec.base), batches)
    budget = sum(int(spec.overrides[name]["density"] * gradient.numel()) for name, gradient in gradients.items())
    return densities(gradients, budget)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, rows: list[Row], pad: int, batch: int = 100, new_tokens: int = 64) -> list[str]:
    """The greedy answer to each row's conversation without its last turn."""
    model.eval()
    said: list[str] = []
    for start in range(0, len(rows), batch):
        texts = [render(row.messages[:-1], tokenizer, row.where, generate=True) for row in rows[start : start + batch]]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([[pad] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        with torch.compiler.set_stance("force_eager"):
            out = model.generate(
                input_ids=padded, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad
            )
        said += [tokenizer.decode(row[longest:], skip_special_tokens=True).strip() for row in out]
    return said
