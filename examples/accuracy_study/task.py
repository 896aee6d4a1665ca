"""One run of one method on a real model and real data: trained by `rosa_fx.train`, judged on held-out rows."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_study.dense import train_full
from accuracy_study.methods import by_name, set_random_masks, spec_of
from accuracy_study.sql import normalise, same_answers
from torch import nn

import rosa_fx
from rosa_fx.data import encode_rows, make_batches, pad_length, read_jsonl
from rosa_fx.data.encoding import render
from rosa_fx.data.jsonl import Row
from rosa_fx.models import load_model
from rosa_fx.state import is_transformed
from rosa_fx.training.engine import Engine


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

    def run(
        self, key: dict[str, Any], *, judged: Callable[[float], bool] = lambda loss: True, compile: bool = True
    ) -> dict[str, Any]:
        """Train as `key` says (method, budget, base, lr, seed, and further fields of the spec) and measure.

        `judged` says by the held-out loss whether the answers are generated too, which takes a while.
        """
        method, seed = by_name(key["method"]), key["seed"]
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
            restart=key.get("restart", False),
        )
        started = time.perf_counter()
        if method.full:
            if compile:
                rosa_fx.compile_blocks(model)
            losses = train_full(model, batches, config)
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        else:
            losses, parameters = self._train_adapters(key, model, batches, config, compile)
        seconds = time.perf_counter() - started
        engine = Engine(model, config, torch.device("cpu"), None, None)
        loss = engine.evaluate(self.held)
        values: dict[str, Any] = {
            "loss": loss,
            "losses": [round(value, 4) for value in losses],
            "parameters": parameters,
            "steps": len(losses),
            "train_seconds": round(seconds, 1),
        }
        if judged(loss):
            values |= self.judge(model, config)
        return values

    def _train_adapters(
        self, key: dict[str, Any], model: nn.Module, batches: list[Any], config: rosa_fx.TrainConfig, compile: bool
    ) -> tuple[list[float], int]:
        method = by_name(key["method"])
        changes = dict(key.get("spec", {}))
        if 0 < method.share < 1:
            changes.setdefault("schedule", self.setting.schedule)
        rosa_fx.transform(model, spec_of(method, model, key["budget"], key["base"], **changes))
        if method.mask == "random":
            set_random_masks(model, key["seed"])
        if compile:
            rosa_fx.compile_blocks(model)
        result = rosa_fx.train(model, batches, config)
        return result.losses, sum(result.parameters.values())

    def judge(self, model: nn.Module, config: rosa_fx.TrainConfig) -> dict[str, float]:
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
            loss = Engine(merged, config, torch.device("cpu"), None, None).evaluate(self.held)
        found = {"merged_loss": loss, "exact_match": statistics.fmean(exact)}
        if executed:
            found |= {"execution_match": statistics.fmean(executed), "execution_rows": len(executed)}
        return found


@torch.no_grad()
def generate(model: Any, tokenizer: Any, rows: list[Row], pad: int, batch: int = 25, new_tokens: int = 64) -> list[str]:
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
