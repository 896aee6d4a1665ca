"""Does RoSA's claim hold with this code? Every figure of docs/accuracy comes from the commands here.

python examples/accuracy.py known-answer       recover a known low-rank + sparse update
python examples/accuracy.py task --data F      fine-tune a real model on chats, all methods at equal budgets
python examples/accuracy.py recipe             what each choice of the recipe is worth, on known updates
python examples/accuracy.py cost --data F      memory and time of a step of each method
python examples/accuracy.py structure --data F where masks from real gradients lie
python examples/accuracy.py report             docs/accuracy/README.md and its pictures, from the results so far

A command that is interrupted goes on where it stopped: each finished run is one line of a JSONL file.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from accuracy_study import cost as costs
from accuracy_study import grid, known_answer, recipe
from accuracy_study import structure as mask_structure
from accuracy_study.report import write_report
from accuracy_study.results import Results
from accuracy_study.task import Bench, Setting
from rich.progress import track

from rosa_fx.data import make_batches

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
Out = Annotated[Path, typer.Option(help="Folder of the results (JSONL) and of the report.")]
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "docs" / "accuracy"


def known_variants(names: list[str] | None) -> list[str]:
    """The names, if all are of variants of the recipe."""
    if unknown := {*(names or [])} - recipe.VARIANTS.keys():
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; variants: {', '.join(recipe.VARIANTS)}")
    return names or []


@app.command("known-answer")
def run_known_answer(
    out: Out = DEFAULT_OUT,
    seeds: Annotated[int, typer.Option(help="Teachers per setting.")] = 10,
    kind: Annotated[str, typer.Option(help="linear, transformer or both.")] = "both",
    limit: Annotated[int | None, typer.Option(help="Runs to make now.")] = None,
) -> None:
    """Recover a known update from samples, with five methods of equal budget."""
    torch.set_num_threads(1)  # the matrices are too small to share
    results = Results(out / "known_answer.jsonl")
    kinds = ("linear", "transformer") if kind == "both" else (kind,)
    keys = [
        {"problem": asdict(problem), "method": method}
        for problem in known_answer.problems(seeds, kinds)
        for method in known_answer.METHODS
    ]
    for key in track(results.missing(keys)[:limit], "known answer"):
        started = time.perf_counter()
        values = known_answer.run(known_answer.Problem(**key["problem"]), key["method"])
        results.add(key, values | {"seconds": round(time.perf_counter() - started, 1)})


@app.command("recipe")
def run_recipe(
    out: Out = DEFAULT_OUT,
    seeds: Annotated[int, typer.Option(help="Teachers per setting.")] = 10,
    kind: Annotated[str, typer.Option(help="linear, transformer or both.")] = "both",
    variant: Annotated[list[str] | None, typer.Option(help="Variants; all by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Runs to make now.")] = None,
) -> None:
    """Change one choice of RoSA's recipe at a time, on teachers with a known update."""
    torch.set_num_threads(1)
    results = Results(out / "recipe.jsonl")
    kinds = ("linear", "transformer") if kind == "both" else (kind,)
    keys = [
        {"problem": asdict(known_answer.middle(each, seed)), "variant": name}
        for each in kinds
        for name in known_variants(variant) or recipe.VARIANTS
        for seed in range(seeds)
    ]
    for key in track(results.missing(keys)[:limit], "recipe"):
        results.add(key, recipe.run_known_answer(known_answer.Problem(**key["problem"]), recipe.VARIANTS[key["variant"]]))


@app.command()
def task(
    data: Annotated[Path, typer.Option(help="JSONL rows of messages; the last rows are held out.")],
    out: Out = DEFAULT_OUT,
    model: Annotated[str, typer.Option(help="A directory, a .gguf file, a hub name or smollm2-135m.")] = "smollm2-135m",
    method: Annotated[list[str] | None, typer.Option(help="Methods; all by default.")] = None,
    budget: Annotated[list[str] | None, typer.Option(help="small, large; both by default.")] = None,
    base: Annotated[list[str] | None, typer.Option(help="keep, nf4, ...; keep and nf4 by default.")] = None,
    train_rows: Annotated[int, typer.Option(help="Rows to train on.")] = 700,
    held_rows: Annotated[int, typer.Option(help="Rows to judge on.")] = 100,
    batch: Annotated[int, typer.Option(help="Rows per optimizer step.")] = 4,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens; longer rows are left out.")] = 192,
    schedule: Annotated[str, typer.Option(help="Mask schedule of the methods with both terms.")] = "wl64",
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 20,
    seeds: Annotated[int, typer.Option(help="Seeds at the best learning rate.")] = 3,
    variant: Annotated[list[str] | None, typer.Option(help="Change these choices of the recipe, one at a time.")] = None,
    limit: Annotated[int | None, typer.Option(help="Runs to make now.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the blocks of the model.")] = True,
) -> None:
    """Fine-tune with every method: three learning rates, then more seeds at the best of them, whose answers are judged."""
    setting = Setting(data.name, train_rows, held_rows, batch, epochs, max_length, schedule, warmup_steps)
    results = Results(out / "task.jsonl")
    budgets, bases = budget or tuple(grid.BUDGETS), base or ("keep", "nf4")
    wanted = [cell for name in known_variants(variant) or [""] for cell in grid.cells(method or (), budgets, bases, name)]
    bench = Bench(setting, data, model)
    made = 0
    while limit is None or made < limit:
        key = next(grid.next_runs(results, wanted, seeds, bench.identity), None)
        if key is None:
            break
        started = time.perf_counter()
        # Seed 0 is there to find the learning rate.
        values = bench.run(key, judged=key["seed"] > 0 and "variant" not in key, compile=compile)
        results.add(key, values | {"seconds": round(time.perf_counter() - started, 1)})
        typer.echo(
            f"{key['method']}, {key['budget']}, {key['base']}, lr {key['lr']:g}, seed {key['seed']}: {values['loss']:.4f}"
        )
        made += 1


@app.command()
def structure(
    data: Annotated[Path, typer.Option(help="JSONL rows of messages.")],
    out: Out = DEFAULT_OUT,
    model: Annotated[str, typer.Option(help="A directory, a .gguf file, a hub name or smollm2-135m.")] = "smollm2-135m",
    max_length: Annotated[int, typer.Option(help="Tokens; longer rows are left out.")] = 128,
) -> None:
    """Where masks from real gradients lie: numbers and a picture per kind of layer."""
    each, most = min(mask_structure.BATCH_ROWS), max(mask_structure.BATCH_ROWS)
    bench = Bench(Setting(data.name, 2 * most, each, each, 1, max_length), data, model)
    batches = make_batches(bench.train_rows, each, bench.length, bench.pad, seed=0)
    rows, masks = mask_structure.measure(bench.plain, batches)
    (out / "structure.jsonl").unlink(missing_ok=True)
    results = Results(out / "structure.jsonl")
    for row in rows:
        results.add(row.pop("key"), row)
    mask_structure.draw(masks, out / "structure.png")


@app.command()
def cost(
    data: Annotated[Path, typer.Option(help="JSONL rows of messages.")],
    out: Out = DEFAULT_OUT,
    model: Annotated[str, typer.Option(help="A directory, a .gguf file, a hub name or smollm2-135m.")] = "smollm2-135m",
    method: Annotated[
        list[str] | None, typer.Option(help="Methods that are timed (large budget, nf4); all by default.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows per optimizer step.")] = 4,
    max_length: Annotated[int, typer.Option(help="Tokens; longer rows are left out.")] = 128,
) -> None:
    """Bytes that each method keeps, and seconds of a step of some of them. Time them on an idle machine."""
    bench = Bench(Setting(data.name, batch * costs.STEPS, batch, batch, 1, max_length), data, model)
    results = Results(out / "cost.jsonl")
    setting = {"model": model, "batch": batch, "max_length": max_length}
    for cell in grid.cells((), tuple(grid.BUDGETS), ("keep", "nf4")):
        key = {"method": cell.method, "budget": cell.budget, "base": cell.base, "setting": setting}
        if results.missing([key]):
            timed = (cell.method == "full" or (cell.budget, cell.base) == ("large", "nf4")) and cell.method in (
                method or [cell.method]
            )
            seconds = {"step_seconds": costs.step_seconds(bench, cell)} if timed else {}
            results.add(key, {"bytes": costs.held_bytes(bench, cell), **seconds})


@app.command()
def report(out: Out = DEFAULT_OUT) -> None:
    """Write the report from the results in the folder."""
    typer.echo(write_report(out))


if __name__ == "__main__":
    app()
