"""One run of one method on a real model and real data: trained by `rosa_fx.train`, judged on held-out rows."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_study.methods import by_name, set_random_masks, spec_of
from accuracy_study.sql import normalise, same_answers
from torch import nn

import rosa_fx
from rosa_fx.data import encode_rows, make_batches, pad_length, read_jsonl
from rosa_fx.data.encoding import render
from rosa_fx.data.jsonl import Row
from rosa_fx.models import load_model
from rosa_fx.training.metrics import current_rss


@dataclass(frozen=True)
class Setting:
    """What a run trains on, and for how long: the same for all methods of one table."""

    data: str
    train_rows: int
    held_rows: int
    batch: int
    epochs: int
    max_length: int = 192


class Bench:
    """The model and the data, loaded once; every run starts from a copy of the model."""

    def __init__(self, setting: Setting, data: Path, model: str) -> None:
        self.setting = setting
        self.identity = {"model": model, **asdict(setting)}
        self.plain, self.tokenizer = load_model(model)
        rows = read_jsonl(data)
        if len(rows) < setting.train_rows + setting.held_rows:
            raise SystemExit(f"{data} has {len(rows)} rows, {setting.train_rows + setting.held_rows} are asked for")
        self.held_rows = rows[-setting.held_rows :]
        train = encode_rows(rows[: setting.train_rows], self.tokenizer, setting.max_length)
        held = encode_rows(self.held_rows, self.tokenizer, setting.max_length)
        length = pad_length([*train.rows, *held.rows], setting.max_length)
        pad = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        self.train_rows, self.length, self.pad = train.rows, length, pad
        self.held = make_batches(held.rows, setting.batch, length, pad)

    def run(self, key: dict[str, Any], *, generate: bool = True, compile: bool = True) -> dict[str, Any]:
        """Train as `key` says (method, budget, base, lr, seed, and further fields of the spec) and measure."""
        method, seed = by_name(key["method"]), key["seed"]
        torch.manual_seed(seed)
        model = copy.deepcopy(self.plain)
        before = current_rss()
        spec = spec_of(method, model, key["budget"], key["base"], **key.get("spec", {}))
        rosa_fx.transform(model, spec)
        if method.mask == "random":
            set_random_masks(model, seed)
        batches = make_batches(self.train_rows, self.setting.batch, self.length, self.pad, seed=seed)
        if compile:
            rosa_fx.compile_blocks(model)
        config = rosa_fx.TrainConfig(
            epochs=self.setting.epochs,
            lr=key["lr"],
            lr_sparse=key["lr"] * key.get("sparse_share", 1.0),
            seed=seed,
            compile=False,
            progress=False,
            restart=key.get("restart", False),
        )
        started = time.perf_counter()
        result = rosa_fx.train(model, batches, config, eval_batches=self.held)
        values: dict[str, Any] = {
            "loss_before": result.eval_loss_before,
            "loss": result.eval_loss_after,
            "train_loss": statistics.fmean(result.losses[-10:]),
            "parameters": sum(result.parameters.values()),
            "steps": result.steps,
            "train_seconds": round(time.perf_counter() - started, 1),
            "rss_over_model": result.peak_rss - before,
        }
        if generate:
            values |= self.judge(model)
        return values

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Exact match of normalised greedy answers, and equal answers in sqlite where that says anything."""
        merged = rosa_fx.merge(model)
        answers = generate(merged, self.tokenizer, list(self.held_rows), self.pad)
        exact, executed = [], []
        for row, answer in zip(self.held_rows, answers):
            expected = row.messages[-1]["content"]
            exact.append(normalise(expected) == normalise(answer))
            same = same_answers(row.messages[0]["content"], expected, answer)
            executed += [] if same is None else [same]
        found = {"exact_match": statistics.fmean(exact)}
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
