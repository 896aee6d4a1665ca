"""What the commands share: process set-up, model and data, compilation by blocks, evaluation, answers, summaries."""

from __future__ import annotations

import logging
import os
import shlex
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

import rosa_fx
from rosa_fx.data.encoding import Encoded, render
from rosa_fx.errors import RosaError
from rosa_fx.training import TrainConfig, TrainResult, save_loss_curve
from rosa_fx.training.engine import Engine, training_mode

console = Console(stderr=True)


def prepare_process() -> None:
    """Keep libraries' progress bars and advice off the terminal; it belongs to the command."""
    try:
        import transformers
    except ImportError as error:
        raise RosaError("the command line needs transformers: pip install 'rosa-fx[hf]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)


def resume_command(arguments: Sequence[str], out: Path | None) -> str:
    """The command that goes on with the run that `arguments` began in `out`."""
    given = list(arguments)
    if out is not None and not {"--out", "-o"} & {a.partition("=")[0] for a in given}:
        given += ["--out", str(out)]
    if "--resume" not in given:
        given.append("--resume")
    return shlex.join(["rosa-fx", *given])


def pick_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of an option; None for "auto"."""
    return None if name == "auto" else getattr(torch, name)


def pick_device(name: str) -> torch.device:
    """The torch device of an option. Raises RosaError for an unknown or absent one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RosaError(f"--device {name!r} is not a device: use cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise RosaError(f"--device {name!r}: cpu and cuda are supported")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise RosaError(f"--device {name!r} is not available on this machine: use --device cpu")
    return device


def join_processes(device: torch.device) -> tuple[torch.device, bool]:
    """Under `torchrun`: meet the other processes. The device of this one, and whether it is the one that prints and writes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device, True
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first = torch.distributed.get_rank() == 0
    console.quiet = not first
    return device, first


def pad_token(tokenizer: Any) -> int:
    """A token to pad with. Any will do, since nothing attends to padding and it carries no loss."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def check_vocabulary(model: nn.Module, encoded: Encoded) -> None:
    """Raise RosaError if a token id does not fit the model's embedding, where the model would fail obscurely."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(getattr(embedding, "weight", None), "shape", (None,))[0]
    largest = max(max(row.input_ids) for row in encoded.rows)
    if size is not None and largest >= size:
        raise RosaError(
            f"the tokenizer gives token {largest} but the model's embedding has {size} rows: "
            "the tokenizer belongs to another model"
        )


def apply_compile(model: nn.Module, enabled: bool, scope: str) -> bool:
    """Compile blocks if so asked; returns whether the trainer should compile the whole model."""
    if enabled and scope == "blocks":
        rosa_fx.compile_blocks(model)
    return enabled and scope == "model"


def evaluate(model: nn.Module, batches: Iterable[Any], config: TrainConfig) -> float:
    """Mean loss over all targets of `batches`, as the trainer computes it."""
    device = next(model.parameters()).device
    with training_mode(model):
        return Engine(model, config, device, None, None).evaluate(batches)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int = 32) -> str:
    """The model's greedy answer to a conversation, in one line."""
    text = render(messages, tokenizer, "the prompt", generate=True)
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    training = model.training
    model.eval()
    # Generation feeds one token at a time, at a new length each: eager is right here, compiling would not pay off.
    with torch.compiler.set_stance("force_eager"):
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad_token(tokenizer),
        )
    model.train(training)
    said = tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(said.split())


def check_out(out: Path, resume: bool) -> None:
    """Raise RosaError if `out` holds a run that is neither to be resumed nor to be written over."""
    if out.exists() and not out.is_dir():
        raise RosaError(f"--out {str(out)!r} is a file: name a folder")
    used = (out / "metrics.jsonl").exists() or (out / "checkpoints").exists()
    if used and not resume:
        raise RosaError(f"--out {str(out)!r} already holds a run: add --resume to go on with it, or name another folder")


def save_run(model: nn.Module, out: Path, title: str) -> None:
    """Save the adapter to `out/adapter` and draw the loss curve to `out/loss.png`."""
    rosa_fx.save_adapter(model, out / "adapter")
    try:
        save_loss_curve(out / "metrics.jsonl", out / "loss.png", title)
    except OSError as error:
        raise RosaError(f"could not write {out / 'loss.png'}: {error}; free space (the adapter is saved)") from error


def summary(rows: Sequence[tuple[str, str]], title: str) -> None:
    """Print a two-column table on standard output, where scripts can read it."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # not markup: source code has brackets of its own
    Console().print(table)


def result_rows(result: TrainResult, filled: float) -> list[tuple[str, str]]:
    """What every run reports. `filled` is the share of positions that are not padding."""
    rows = []
    if result.eval_loss_before is not None and result.eval_loss_after is not None:
        rows.append(("held-out loss", f"{result.eval_loss_before:.4f} before, {result.eval_loss_after:.4f} after"))
    if result.best_step not in (None, result.steps):
        rows.append(("best held-out loss", f"{result.evals[result.best_step or 0]:.4f} after step {result.best_step}, in best"))
    if result.skipped:
        rows.append(("skipped steps", f"{result.skipped}, whose loss or gradients were not finite"))
    for name, count in result.parameters.items():
        rows.append((f"trainable, {name.replace('_', '-')}", f"{count:,} parameters"))
    speed = f"{result.steady_tokens_per_s * filled:,.0f} tokens/s without padding ({result.steady_tokens_per_s:,.0f} with)"
    rows.append(("speed", f"{speed}, median over {result.steps} steps"))
    rows.append(("peak memory", f"{result.peak_rss / 2**30:.2f} GiB resident"))
    if result.peak_device:
        rows.append(("peak GPU memory", f"{result.peak_device / 2**30:.2f} GiB"))
    return rows
