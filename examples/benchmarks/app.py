"""The command line: one subcommand per part, and all of them without a subcommand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from benchmarks import cold, common, decode, layer, memory, model, parts, scaling
from benchmarks.common import Part, console

app = typer.Typer(help="Speed and memory of QRoSA on the CPU against its peers.", add_completion=False)

Name = Annotated[str, typer.Option(help="Name of the files, if not that of the part.")]
Out = Annotated[Path, typer.Option(help="Folder for the .csv, .md and .png.")]
Check = Annotated[bool, typer.Option("--check", help="Exit with 1 where a bar is missed in every one of --tries runs.")]
Tries = Annotated[int, typer.Option(help="Runs in which a missed bar may still be met, with --check.", min=1)]
Rounds = Annotated[int, typer.Option(help="Interleaved rounds.", min=1)]
Dtypes = Annotated[list[str], typer.Option("--dtype", help="float32 or bfloat16; may be repeated.")]
Rows = Annotated[list[int], typer.Option(help="Rows of x; may be repeated.")]
Shapes = Annotated[list[str], typer.Option("--shape", help="Weight as NxK; may be repeated.")]
Models = Annotated[list[str], typer.Option("--model", help="llama-27m, llama-tiny or smollm2-135m; may be repeated.")]

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
SHAPES = ["4096x4096", "11008x4096"]


def shape_of(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not a shape such as 4096x4096")
    return int(rows), int(columns)


def dtypes_of(names: list[str]) -> list[str]:
    for name in names:
        if name not in common.DTYPES:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(common.DTYPES)}")
    return names


def finish(measure: Callable[[], Part], out: Path, check: bool, tries: int, name: str = "") -> list[str]:
    """Measure, print, write; with `check`, measure again while a bar is missed. Returns what was missed every time."""
    missed: set[str] | None = None
    for _ in range(tries if check else 1):
        common.start()
        Part.keep = staticmethod(lambda part: common.write(part, out, common.command_line(), name))
        part = measure()
        for bar in part.bars:
            console.print(escape(str(bar)), style="green" if bar.met else "red", soft_wrap=True)
        common.write(part, out, common.command_line(), name)
        still = {bar.what for bar in part.bars if not bar.met}
        missed = still if missed is None else missed & still
        if not missed:
            break
    return sorted(missed or ()) if check else []


def leave(missed: list[str]) -> None:
    for what in missed:
        console.print(escape(f"missed in every run: {what}"), style="bold red")
    if missed:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def everything(
    context: typer.Context,
    out: Out = OUT,
    check: Check = False,
    tries: Tries = 2,
) -> None:
    """Without a subcommand: all parts with their defaults."""
    if context.invoked_subcommand is not None:
        return
    both = list(common.DTYPES)
    parts: list[Callable[[], Part]] = [
        lambda: layer.run([shape_of(s) for s in SHAPES], [512, 2048], both, 5),
        lambda: model.run(["llama-27m", "smollm2-135m"], both, 5),
        lambda: memory.run(["llama-27m", "smollm2-135m"], "float32"),
        lambda: cold.run("smollm2-135m", "float32"),
        lambda: decode.run([shape_of(s) for s in SHAPES], [1, 8, 64], both, 7, ["smollm2-135m"]),
        lambda: scaling.run("float32", 5),
    ]
    leave([what for measure in parts for what in finish(measure, out, check, tries)])


@app.command("layer")
def layer_command(
    shape: Shapes = SHAPES,
    rows: Rows = [512, 2048],  # noqa: B006
    dtype: Dtypes = ["float32", "bfloat16"],  # noqa: B006
    rounds: Rounds = 5,
    out: Out = OUT,
    check: Check = False,
    tries: Tries = 2,
    name: Name = "",
    compiled: Annotated[bool, typer.Option(help="Compile the layers of rosa_fx.")] = True,
) -> None:
    """Forward + backward of one layer, against the floor."""
    shapes = [shape_of(s) for s in shape]
    measure = lambda: layer.run(shapes, rows, dtypes_of(dtype), rounds, compile_ours=compiled)  # noqa: E731
    leave(finish(measure, out, check, tries, name))


@app.command("parts")
def parts_command(
    shape: Shapes = ["4096x4096"],  # noqa: B006
    rows: Rows = [512, 2048],  # noqa: B006
    dtype: Dtypes = ["float32", "bfloat16"],  # noqa: B006
    rounds: Rounds = 9,
    out: Out = OUT,
    name: Name = "",
    compiled: Annotated[bool, typer.Option(help="Compile the layers of rosa_fx.")] = True,
) -> None:
    """What the time of one layer is spent on. There are no bars."""
    shapes = [shape_of(s) for s in shape]
    finish(lambda: parts.run(shapes, rows, dtypes_of(dtype), rounds, compile_ours=compiled), out, False, 1, name)


@app.command("model")
def model_command(
    model_name: Models = ["llama-27m", "smollm2-135m"],  # noqa: B006
    dtype: Dtypes = ["float32", "bfloat16"],  # noqa: B006
    rounds: Rounds = 5,
    tokens: Annotated[str, typer.Option(help="Batch as sequences x length.")] = "4x256",
    out: Out = OUT,
    check: Check = False,
    tries: Tries = 2,
    name: Name = "",
    compiled: Annotated[bool, typer.Option(help="Compile what is meant to be compiled.")] = True,
) -> None:
    """Training steps in lockstep: PEFT LoRA, QLoRA, the reference, QRoSA and its mask step."""
    leave(finish(lambda: model.run(model_name, dtypes_of(dtype), rounds, shape_of(tokens), compiled), out, check, tries, name))


@app.command("memory")
def memory_command(
    model_name: Models = ["llama-27m", "smollm2-135m"],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    tokens: Annotated[str, typer.Option(help="Batch as sequences x length.")] = "4x256",
    mask_shape: Annotated[str, typer.Option(help="Weights for the mask step's extra.")] = "4096x4096",
    out: Out = OUT,
    check: Check = False,
    tries: Tries = 2,
    name: Name = "",
) -> None:
    """Resident set of a training step and of `transform`, each peer in a process of its own."""
    (dtype,) = dtypes_of([dtype])
    leave(finish(lambda: memory.run(model_name, dtype, shape_of(tokens), shape_of(mask_shape)), out, check, tries, name))


@app.command("memory-child", hidden=True)
def memory_child(peer: str, model_name: str, dtype: str, tokens: str) -> None:
    """What `memory` runs in a fresh process; prints JSON."""
    memory.child(peer, model_name, dtype, shape_of(tokens))


@app.command("cold")
def cold_command(
    model_name: Annotated[str, typer.Option("--model", help="As for `model`.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    tokens: Annotated[str, typer.Option(help="Batch as sequences x length.")] = "4x256",
    out: Out = OUT,
    check: Check = False,
    tries: Tries = 2,
    name: Name = "",
) -> None:
    """`transform`, and compilation with empty caches, each in a process of its own."""
    (dtype,) = dtypes_of([dtype])
    leave(finish(lambda: cold.run(model_name, dtype, shape_of(tokens)), out, check, tries, name))


@app.command("cold-child", hidden=True)
def cold_child(peer: str, model_name: str, dtype: str, tokens: str) -> None:
    """What `cold` runs in a fresh process; prints JSON."""
    cold.child(peer, model_name, dtype, shape_of(tokens))


@app.command("decode")
def decode_command(
    shape: Shapes = SHAPES,
    rows: Rows = [1, 8, 64],  # noqa: B006
    dtype: Dtypes = ["float32", "bfloat16"],  # noqa: B006
    rounds: Rounds = 15,
    out: Out = OUT,
    check: Check = False,
    tries: Tries = 2,
    name: Name = "",
    model_name: Models = ["smollm2-135m"],  # noqa: B006
    compiled: Annotated[bool, typer.Option(help="Compile the layers of rosa_fx.")] = True,
) -> None:
    """Forward without gradients of a few rows, and after `merge`; the next token of whole models."""
    shapes, dtypes = [shape_of(s) for s in shape], dtypes_of(dtype)
    measure = lambda: decode.run(shapes, rows, dtypes, rounds, model_name, compile_ours=compiled)  # noqa: E731
    leave(finish(measure, out, check, tries, name))


@app.command("scaling")
def scaling_command(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Rounds = 7,
    size: Annotated[int, typer.Option(help="Side of the square weight at the centre of the curves.")] = 2048,
    rows: Annotated[int, typer.Option(help="Rows of x at the centre.")] = 512,
    out: Out = OUT,
    check: Check = False,
    tries: Tries = 2,
    name: Name = "",
    compiled: Annotated[bool, typer.Option(help="Compile the layers of rosa_fx.")] = True,
) -> None:
    """Time and memory of a layer against its size, rows, density and rank."""
    (dtype,) = dtypes_of([dtype])
    leave(finish(lambda: scaling.run(dtype, rounds, size, rows, compiled), out, check, tries, name))
