"""Cold start: `transform`, and the compilation of a training step with empty caches, against PEFT LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import rosa_fx
from benchmarks import common, model
from benchmarks.common import Bar, Part
from rosa_fx.kernels.cpu import sparse

SCRIPT = Path(__file__).resolve().parents[1] / "bench_cpu.py"


def fresh(command: str, *arguments: str, **environment: str) -> dict[str, float]:
    """The JSON that a hidden subcommand of the benchmark prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), command, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command} {' '.join(arguments)} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(peer: str, name: str, dtype_name: str, tokens: tuple[int, int]) -> None:
    common.start()
    dtype = common.DTYPES[dtype_name]
    base = model.load(name, dtype)
    data = model.batch(base, tokens)
    seconds = {}
    if peer == model.QROSA:
        sparse.native()  # the C++ of the kernels: once per machine, as installing them would be
        begin = time.perf_counter()
        rosa_fx.transform(base, rosa_fx.RosaSpec(rank=model.RANK, alpha=model.RANK, density=model.DENSITY))
        seconds["transform"] = time.perf_counter() - begin
        rosa_fx.set_masks(base, common.random_masks(base, model.DENSITY))
        rosa_fx.MaskSchedule(base, "wl0").begin_step()
        made = base
    else:
        made = model.layer.with_lora(base, model.RANK)
    rosa_fx.compile_blocks(made)
    step = model.training_step(made, data)
    for label in ("first", "second", "third"):
        begin = time.perf_counter()
        step()
        seconds[label] = time.perf_counter() - begin
    counters = torch._dynamo.utils.counters
    seconds["graphs"] = counters["stats"]["unique_graphs"]
    print(json.dumps(seconds))


def run(name: str, dtype: str, tokens: tuple[int, int] = (4, 256)) -> Part:
    part = Part("cold", "Cold start: transform, and compilation with empty caches")
    part.notes = [
        "Each in a fresh process with an empty compilation cache; all models compiled block by block. Compilation is the first "
        "training step less the third. The C++ kernels are compiled when they are first used on a machine."
    ]
    found = {}
    for peer in (model.LORA_COMPILED, model.QROSA):
        with tempfile.TemporaryDirectory() as caches:
            arguments = (peer, name, dtype, f"{tokens[0]}x{tokens[1]}")
            found[peer] = fresh("cold-child", *arguments, TORCHINDUCTOR_CACHE_DIR=caches)
        seconds = found[peer]
        seconds["compile"] = seconds["first"] - seconds["third"]
        shown = {key: round(value, 2) for key, value in seconds.items()}
        part.add([{"peer": peer, "model": name, "dtype": dtype, "transform": ""} | shown])
    part.bars = [
        Bar(f"transform of {name}, s", found[model.QROSA]["transform"], 10.0),
        Bar(f"compilation of {name}: x PEFT LoRA", found[model.QROSA]["compile"] / found[model.LORA_COMPILED]["compile"], 1.3),
    ]
    part.panels["seconds"] = {"compile": [(peer, values["compile"]) for peer, values in found.items()]}
    return part
