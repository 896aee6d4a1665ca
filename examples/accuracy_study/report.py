"""The report: Markdown with tables, PNG with curves, from the result files in a folder.

What the numbers mean is not generated: `conclusions.md` in the same folder is put in front of them.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accuracy_study import choices_report, grid, known_answer_report, task_report
from accuracy_study.methods import METHODS
from accuracy_study.results import Results, Row

import rosa_fx

HEADER = """# Accuracy

Made by `python examples/accuracy.py report` from the result files beside it, which the commands named below wrote. {versions}
"""

KNOWN_ANSWER = """## A known answer

`python examples/accuracy.py known-answer`: a teacher differs from the student's start by L + S, L of low rank and S sparse, of
equal norm. All methods train as many parameters as L + S has degrees of freedom, with the same number of learning rates
tried and the same number of steps. Middle case: rank 4, nnz half of `rank · (N + K)`, equal singular values, no noise; a
linear layer of 128 × 128, or two transformer blocks of width 32 with every linear weight updated. Below, the error after 512
samples, mean and 95 % interval over {seeds} teachers: of the weights for the linear layer, of the outputs for the
transformer, whose weights are not determined by its outputs.

![curves over samples](known_answer.png)
"""

TASK = """## A real model and a real task

```bash
{command}
```

SmolLM2-135M-Instruct learns to answer questions with SQL: {train_rows} rows to train on, {held_rows} others to judge by,
{epochs} epoch(s), {batch} rows a step, linear decay of the learning rate after {warmup_steps} steps, rows of at most
{max_length} tokens. Every method trains `R · (N + K)` numbers per linear weight (not the head; R = {large}); full fine-tuning
trains all of them, over the unquantised base. Methods with both terms make their masks by `{schedule}`, and the rate of their
sparse values is {share} of the other. Each is tried with four learning rates and one seed; the best one is run with further
seeds. A seed fixes the order of rows and the start of A, alike for all methods.

Held-out loss: mean negative log likelihood per token of the answer, ± a 95 % interval over seeds. Exact match: greedy answers
equal to the expected text but for case, quotes and spacing; same answers: those that return the same rows in sqlite on made-up
tables; both with the number of runs they are a mean of. Merged: the loss after the adapters are added to the bfloat16 weights.
{runs} runs; what is not in the table was not run, and a loss without ± is one seed's.

![loss against cost](task.png)
"""

OTHER = """### The same under other settings

```bash
{command}
```

{runs} runs, with {train_rows} rows to train on and masks by `{schedule}`.
"""

COST = """Memory is what training keeps between steps: weights, masks and adapters as stored, and float32 gradients and both
moments of Adam for what is trained; activations are the same for all. Seconds are those of `python examples/accuracy.py cost`.

| method | base | trainable budget | MiB | seconds a step |
|---|---|---|---|---|
{rows}
"""

RECIPE = """## The recipe's choices

`python examples/accuracy.py recipe`: one choice changed at a time, for RoSA with gradient masks on the teachers of the
known-answer study's middle case (512 samples; 300 steps, of which {warm_up} are warm-up; every variant with its own best
learning rate of three). Error as there; negative differences are better, bold ones have a 95 % interval that leaves zero out.
A step sees 256 of the samples.
"""

STRUCTURE = """## Where masks lie

`python examples/accuracy.py structure --data …`: masks of the first step of SmolLM2-135M on the task above over an NF4 base,
by the gradients of one batch; a mean over the 30 layers of a kind. A random mask of 576 × 576 at 0.6 % has 3 % empty rows,
3 % of its entries in the fullest percent of rows, and a longest row of 3 times the mean; it shares 0.6 % of its entries with
another. "Same in another batch": the share of entries that the mask from other rows has too; "same over bf16": that the mask
from the same rows over the unquantised base has.

![where masks lie](structure.png)
"""


def write_report(folder: Path) -> Path:
    """Write `README.md` and the pictures into `folder`; returns the Markdown's path."""
    versions = f"torch {torch.__version__}, rosa_fx {rosa_fx.__version__}, Python {platform.python_version()}, CPU."
    parts = [HEADER.format(versions=versions)]
    conclusions = folder / "conclusions.md"
    if conclusions.exists():
        parts.append(conclusions.read_text())
    parts += _task(folder) + _known_answer(folder) + _recipe(folder) + _structure(folder)
    path = folder / "README.md"
    path.write_text("\n".join(parts))
    return path


def _rows(folder: Path, name: str) -> list[Row]:
    path = folder / f"{name}.jsonl"
    return Results(path).rows if path.exists() else []


def _known_answer(folder: Path) -> list[str]:
    known = _rows(folder, "known_answer")
    if not known:
        return []
    known_answer_report.draw(known, folder / "known_answer.png")
    seeds = len({row["key"]["problem"]["seed"] for row in known})
    parts = [KNOWN_ANSWER.format(seeds=seeds), "\n".join(known_answer_report.table(known)), ""]
    parts += ["The same teachers compared one by one (positive: worse than RoSA):", ""]
    return [*parts, "\n".join(known_answer_report.paired(known)), ""]


def _task(folder: Path) -> list[str]:
    rows = _rows(folder, "task")
    if not rows:
        return []
    # Runs under different settings cannot be compared: a section for each, the most frequent first.
    by_setting: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_setting[str(row["key"]["setting"])].append(row)
    rows, *others = sorted(by_setting.values(), key=len, reverse=True)
    planned = {method.name: len(grid.Cell(method.name, "", "").learning_rates) for method in METHODS}
    cells = task_report.cells_of(rows, planned)
    costs = _rows(folder, "cost")
    task_report.draw(cells, costs, folder / "task.png")
    large = task_report.ranks(cells)
    setting, command = _command(rows)
    text = TASK.format(command=command, runs=len(rows), share=grid.SPARSE_SHARE, large=large, **setting)
    parts = [text, *_tables(cells)]
    for more in others:
        setting, command = _command(more)
        parts += [OTHER.format(command=command, runs=len(more), **setting), *_tables(task_report.cells_of(more, planned))]
    if costs:
        parts.append(COST.format(rows="\n".join(task_report.cost_rows(costs))))
    return parts


def _command(rows: list[Row]) -> tuple[dict[str, Any], str]:
    """The setting of rows that share it, and the command that makes them."""
    setting = rows[0]["key"]["setting"]
    options = [f"--{name.replace('_', '-')} {value}" for name, value in setting.items() if name not in ("model", "data")]
    return setting, f"python examples/accuracy.py task --data {setting['data']} " + " ".join(options)


def _tables(cells: list[task_report.Found]) -> list[str]:
    parts = ["\n".join(task_report.table(cells)), ""]
    if any(cell.method == "rosa 1/2" and cell.tuned for cell in cells):
        parts += ["Seed by seed (positive: worse than RoSA):", "", "\n".join(task_report.paired(cells)), ""]
    return parts


def _recipe(folder: Path) -> list[str]:
    rows = _rows(folder, "recipe")
    if not rows:
        return []
    from accuracy_study.known_answer import WARM_UP

    return [RECIPE.format(warm_up=WARM_UP), "\n".join(choices_report.recipe_table(rows)), ""]


def _structure(folder: Path) -> list[str]:
    rows = _rows(folder, "structure")
    return [STRUCTURE, "\n".join(choices_report.structure_table(rows)), ""] if rows else []
