"""`rosa-fx train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

import rosa_fx
from rosa_fx.cli import common
from rosa_fx.cli.common import console
from rosa_fx.data import encode_rows, make_batches, pad_length, read_jsonl, split_rows
from rosa_fx.models import load_model
from rosa_fx.training import TrainConfig, train


def run_train(
    ctx: Any,
    *,
    model: str,
    data: Path,
    out: Path,
    eval_data: Path | None,
    eval_share: float,
    base: str,
    double_quant: bool,
    rank: int,
    alpha: float,
    dropout: float,
    density: float,
    target: list[str] | None,
    exclude: list[str] | None,
    schedule: str,
    num_grads: int,
    restart: bool,
    lr: float,
    lr_sparse: float,
    optimizer: str,
    warmup: int,
    epochs: int,
    max_steps: int | None,
    batch: int,
    accumulate: int,
    max_length: int,
    long_rows: Literal["cut", "drop", "refuse"],
    on_nonfinite: Literal["stop", "skip"],
    tensorboard: bool | None,
    eval_every: int | None,
    save_every: int | None,
    dtype: str,
    device: str,
    resume: bool,
    compile: bool,
    compile_scope: str,
    seed: int,
    download: bool,
) -> None:
    """Options as in `rosa_fx.cli.app.train`. Everything that can be wrong with the input is checked before training.

    Under `torchrun --no-python --nproc-per-node 2 rosa-fx train ...` every process trains on its share.
    """
    ctx.obj = out
    common.check_out(out, resume)
    spec = rosa_fx.RosaSpec(
        base=base,
        double_quant=double_quant,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        density=density,
        targets=target or "all-linear",
        exclude=exclude or (),
        schedule=schedule,
        num_grads=num_grads,
    )
    config = TrainConfig(
        epochs=epochs,
        max_steps=max_steps,
        gradient_accumulation=accumulate,
        lr=lr,
        lr_sparse=lr_sparse,
        optimizer=optimizer,  # type: ignore[arg-type]
        warmup_steps=warmup,
        eval_every=eval_every,
        checkpoint_every=save_every,
        restart=restart,
        on_nonfinite=on_nonfinite,
        tensorboard="auto" if tensorboard is None else tensorboard,
        compile=compile and compile_scope == "model",
        seed=seed,
    )
    rows = read_jsonl(data)
    held_rows = read_jsonl(eval_data) if eval_data else []
    if not eval_data:
        rows, held_rows = split_rows(rows, eval_share, seed)
    chosen_device, first = common.join_processes(common.pick_device(device))
    network, tokenizer = load_model(model, common.pick_dtype(dtype), download=download)
    encoded = encode_rows(rows, tokenizer, max_length, long_rows)
    console.print(f"training data: {encoded.describe()}", highlight=False)
    common.check_vocabulary(network, encoded)
    held = encode_rows(held_rows, tokenizer, max_length, long_rows) if held_rows else None
    length = pad_length([*encoded.rows, *(held.rows if held else [])], max_length)
    batches = make_batches(encoded.rows, batch, length, common.pad_token(tokenizer), seed=seed)
    held_batches = None
    if held:
        console.print(f"held-out data: {held.describe()}", highlight=False)
        common.check_vocabulary(network, held)
        held_batches = make_batches(held.rows, batch, length, common.pad_token(tokenizer))

    # Seeded for the adapter's initial values: the trainer seeds only what comes after the transform.
    torch.manual_seed(seed)
    network = rosa_fx.transform(network.to(chosen_device), spec)
    common.apply_compile(network, compile, compile_scope)
    result = train(network, batches, config, eval_batches=held_batches, out=out, resume=resume, console=console)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not first:
        return
    common.save_run(network, out, f"{model}: {spec.base}, rank {spec.rank}, density {spec.density:g}")
    filled = sum(len(row.input_ids) for row in encoded.rows) / (len(batches) * batch * length)
    table = common.result_rows(result, filled)
    table += [("adapter", str(out / "adapter")), ("loss curve", str(out / "loss.png"))]
    common.summary(table, f"rosa-fx train: {result.steps} steps in {result.seconds:.0f} s")
