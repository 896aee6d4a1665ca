"""Time training steps of a whole model on your GPU: python examples/bench_gpu_model.py [--model llama-1b] [--tokens 4x1024]

A Llama with random weights (or SmolLM2-135M, which is downloaded) in bf16, rank 16, 0.6 % sparse, NF4 in blocks of 64, all
linears but the head, fused AdamW; compiled peers block by block. All peers in one process, interleaved; each row gives

    ms          median and quartiles of a step: forward, backward, optimizer
    x floor     the same over a compiled step of the frozen model, which trains nothing
    resident    MB that the peer's weights, adapters and optimizer state take
    peak        MB that a step takes above that
    first step  s, compilation included

Before anything is timed, logits are compared with those of the dequantised weights in float64.
`--device cpu` makes a trial run.
"""

import argparse
import csv
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks import common, model
from rich.console import Console
from torch import nn

import rosa_fx

PEERS = (model.FLOOR, model.LORA_COMPILED, model.QLORA, model.QLORA_COMPILED, model.QROSA)


def allocated(device: str) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def build(peer: str, name: str, base: nn.Module, data: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """A peer's model. QRoSA's masks come from the gradients of a first step, as in training."""
    if peer != model.QROSA:
        return model.build(peer, name, dtype, base)
    made = model.build(model.LOW_RANK, name, dtype, base)
    schedule = rosa_fx.MaskSchedule(made, "wl0", micro_batches=1)
    schedule.begin_step()
    made(**data).loss.backward()
    made.zero_grad(set_to_none=True)
    schedule.end_step()
    schedule.begin_step()
    return made


def measure(step: Callable[[], float], weights: int, device: str) -> dict[str, Any]:
    """The first three steps: bytes that stay, with those of the `weights`; highest bytes above that; seconds of the first."""
    before = allocated(device)
    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    step()
    after = allocated(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - after if device == "cuda" else 0
    resident = weights + after - before
    return {"resident": round(resident / 1e6), "peak": round(peak / 1e6), "first step": round(first, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-1b", help=f"{', '.join(model.LLAMAS)}, or a model of transformers")
    parser.add_argument("--tokens", default="4x1024", metavar="ROWSxLENGTH")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", default="bench_gpu_model.csv")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; --device cpu makes a trial run")
    rows, _, length = arguments.tokens.partition("x")
    if not (rows.isdigit() and length.isdigit() and int(rows) and int(length)):
        parser.error(f"--tokens: {arguments.tokens!r} is not ROWSxLENGTH, for example 4x1024")
    device, dtype = arguments.device, torch.bfloat16
    common.start()
    base = model.load(arguments.model, dtype, device)
    data = model.batch(base, (int(rows), int(length)))
    models: dict[str, nn.Module] = {}
    facts: dict[str, dict[str, Any]] = {}
    for peer in PEERS:
        before = allocated(device)
        models[peer] = build(peer, arguments.model, base, data, dtype)
        facts[peer] = {"resident": allocated(device) - before}
    model.verify(base, data, models)
    del base
    # A step ends with reading the loss, which waits for all that it enqueued.
    steps = {peer: model.training_step(models[peer], data) for peer in PEERS}
    for peer, step in steps.items():
        facts[peer] |= measure(step, facts[peer]["resident"], device)
    seconds = common.interleaved(steps, arguments.rounds, warm_up=2)
    table = common.timing_rows(seconds, model.FLOOR, "x floor", model=arguments.model, tokens=arguments.tokens)
    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    lines = [{"gpu": gpu, "torch": torch.__version__, **row, **facts[row["peer"]]} for row in table]
    with open(arguments.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    console = Console(soft_wrap=True)
    for line in lines:
        console.print("  ".join(str(value) for value in line.values()), markup=False)
    console.print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
