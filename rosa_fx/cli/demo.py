"""`rosa-fx demo`: the whole of rosa_fx on a real model and real data, in minutes on two CPU cores."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import rosa_fx
from rosa_fx.cli import common
from rosa_fx.cli.common import console
from rosa_fx.data import EncodedRow, Row, docstring_rows, encode_rows, make_batches
from rosa_fx.data.docstrings import messages_for
from rosa_fx.errors import RosaError
from rosa_fx.models import load_model
from rosa_fx.training import TrainConfig, train
from rosa_fx.training.metrics import peak_rss

# Not from the standard library, so it can be in neither part of the data.
PROMPT = """def slugify(title):
    words = re.findall(r"[a-z0-9]+", title.lower())
    return "-".join(words)"""
# Saving rounds nothing and both losses come from the same computation; what differs is the order of sums.
_SAME_LOSS = 1e-3


def run_demo(
    ctx: Any,
    *,
    out: Path | None,
    steps: int,
    batch: int,
    max_length: int,
    held_out: int,
    base: str,
    rank: int,
    density: float,
    lr: float,
    lr_sparse: float,
    model: str,
    dtype: str,
    device: str,
    resume: bool,
    compile: bool,
    compile_scope: str,
    seed: int,
    download: bool,
) -> None:
    """Options as in `rosa_fx.cli.app.demo`. Never holds two models at once."""
    began = time.perf_counter()
    out = choose_out(Path("runs/demo"), resume) if out is None else out
    ctx.obj = out
    common.check_out(out, resume)
    warm_up = max(1, steps // 5)
    spec = rosa_fx.RosaSpec(base=base, rank=rank, density=density, schedule=f"wl{warm_up}")
    config = TrainConfig(
        max_steps=steps,
        lr=lr,
        lr_sparse=lr_sparse,
        warmup_steps=max(1, steps // 10),
        compile=compile and compile_scope == "model",
        seed=seed,
    )
    chosen_device = common.pick_device(device)

    def load() -> tuple[Any, Any]:
        loaded, its_tokenizer = load_model(model, common.pick_dtype(dtype), download=download)
        return loaded.to(chosen_device), its_tokenizer

    _say(1, f"loading {model}")
    network, tokenizer = load()
    _say(2, "reading the standard library's functions")
    train_rows, held_rows = docstring_rows()
    train_part = _fitting(train_rows, tokenizer, max_length, steps * batch, seed)
    held_part = _fitting(held_rows, tokenizer, max_length, held_out, seed)
    pad = common.pad_token(tokenizer)
    batches = make_batches(train_part, batch, max_length, pad, seed=seed)
    held_batches = make_batches(held_part, batch, max_length, pad)
    console.print(f"    {len(train_part)} functions to train on, {len(held_part)} held out, from other modules")
    _say(3, "asking the model as it is")
    question = messages_for(PROMPT)
    before = common.answer(network, tokenizer, question)

    _say(4, f"rewriting it: {base} base, rank {rank}, {density:.1%} sparse; then training")
    torch.manual_seed(seed)
    network = rosa_fx.transform(network, spec)
    common.apply_compile(network, compile, compile_scope)
    if compile:
        console.print("    the first step of each phase compiles, which takes a while")
    result = train(network, batches, config, eval_batches=held_batches, out=out, resume=resume, console=console)
    _say(5, f"saving the adapter to {out / 'adapter'}")
    common.save_run(network, out, f"{model}: {base}, rank {rank}, density {density:g}, docstrings")
    after = common.answer(network, tokenizer, question)

    _say(6, "loading the adapter into a fresh model")
    del network
    gc.collect()
    fresh, _ = load()
    fresh = rosa_fx.load_adapter(fresh, out / "adapter")
    common.apply_compile(fresh, compile, compile_scope)
    reloaded = common.evaluate(fresh, held_batches, config)
    if result.eval_loss_after is None or abs(reloaded - result.eval_loss_after) > _SAME_LOSS:
        raise RosaError(f"the reloaded adapter gives held-out loss {reloaded}, not {result.eval_loss_after}")

    filled = sum(len(row.input_ids) for row in train_part) / (len(batches) * batch * max_length)
    rows = common.result_rows(result, filled)
    rows.insert(1, ("reloaded adapter", f"{reloaded:.4f} held-out loss in a fresh model"))
    rows = [(name, value) for name, value in rows if name != "peak memory"]
    rows += [
        ("peak memory", f"{peak_rss() / 2**30:.2f} GiB resident"),
        ("time", f"{time.perf_counter() - began:.0f} s in all, {result.seconds:.0f} s of them in {result.steps} steps"),
        ("adapter", str(out / "adapter")),
        ("loss curve", str(out / "loss.png")),
        ("prompt", PROMPT),
        ("answer before", before),
        ("answer after", after),
    ]
    common.summary(rows, "rosa-fx demo")


def choose_out(first: Path, resume: bool) -> Path:
    """`first`, `first-2`, `first-3`, …: the newest that exists if resuming, else the one after it."""
    number, path = 1, first
    while path.exists():
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    if resume and number > 1:
        return first if number == 2 else first.with_name(f"{first.name}-{number - 1}")
    return path


def _fitting(rows: Sequence[Row], tokenizer: Any, max_length: int, count: int, seed: int) -> list[EncodedRow]:
    """The first `count` rows, in a seeded order, that are not cut at `max_length`; fewer if there are not so many."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    fitting: list[EncodedRow] = []
    for row in order:
        encoded = encode_rows([row], tokenizer, 1_000_000).rows[0]
        if len(encoded.input_ids) <= max_length:
            fitting.append(encoded)
        if len(fitting) == count:
            break
    if not fitting:
        raise RosaError(f"no function fits into {max_length} tokens with this tokenizer: raise --max-length")
    return fitting


def _say(number: int, text: str) -> None:
    console.print(f"[bold]\\[{number}/6][/] {text} …", highlight=False)
