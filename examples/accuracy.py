"""Does RoSA's claim hold with this code? Every figure of docs/accuracy.md comes from the commands here.

python examples/accuracy.py known-answer       recover a known low-rank + sparse update
python examples/accuracy.py report             docs/accuracy.md and its pictures from the results so far

A command that is interrupted goes on where it stopped: each finished run is one line of a JSONL file.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from accuracy_study import known_answer
from accuracy_study.report import write_report
from accuracy_study.results import Results
from rich.progress import track

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
Out = Annotated[Path, typer.Option(help="Folder of the results (JSONL) and of the report.")]
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "docs" / "accuracy"


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


@app.command()
def report(out: Out = DEFAULT_OUT) -> None:
    """Write the report from the results in the folder."""
    typer.echo(write_report(out))


if __name__ == "__main__":
    app()
