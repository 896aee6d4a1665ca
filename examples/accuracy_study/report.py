"""The report: Markdown with tables, PNG with curves, from the result files in a folder."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from accuracy_study import known_answer_report
from accuracy_study.results import Results

import rosa_fx

HEADER = """# Accuracy

Made by `python examples/accuracy.py report` from the results beside it, which the commands named below wrote. {versions}
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


def write_report(folder: Path) -> Path:
    """Write `README.md` and the pictures into `folder`; returns the Markdown's path."""
    versions = f"torch {torch.__version__}, rosa_fx {rosa_fx.__version__}, Python {platform.python_version()}, CPU."
    parts = [HEADER.format(versions=versions)]
    known = Results(folder / "known_answer.jsonl").rows
    if known:
        known_answer_report.draw(known, folder / "known_answer.png")
        seeds = len({row["key"]["problem"]["seed"] for row in known})
        parts += [KNOWN_ANSWER.format(seeds=seeds), "\n".join(known_answer_report.table(known)), ""]
        parts += ["The same teachers compared one by one (positive: worse than RoSA):", ""]
        parts += ["\n".join(known_answer_report.paired(known)), ""]
    path = folder / "README.md"
    path.write_text("\n".join(parts))
    return path
