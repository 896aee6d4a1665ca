"""RoSA in a training loop of your own, in plain PyTorch: python examples/own_loop.py [--steps 60] [--out FOLDER]

A small network that predicts the next byte of Python source is trained densely on one module of the standard library,
then adapted to another one with a frozen 4-bit base, through `torch.compile`.
"""

import argparse
import inspect
import textwrap
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import rosa_fx

CONTEXT = 16


def batches(module: object, steps: int, rows: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Random places in a module's source: CONTEXT bytes [rows, CONTEXT] and the byte that follows each [rows]."""
    text = torch.frombuffer(bytearray(inspect.getsource(module).encode()), dtype=torch.uint8).long()
    windows = text.unfold(0, CONTEXT + 1, 1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = windows[torch.randint(len(windows), (rows,), generator=generator)]
        yield chosen[:, :-1], chosen[:, -1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="runs/own_loop")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Embedding(256, 32), nn.Flatten()),
        *(nn.Linear(CONTEXT * 32, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU()),
        nn.Linear(512, 256),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for x, y in batches(argparse, 100):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    # From here on: the base is frozen in 4 bits, the adapters train. "all-linear" leaves the output layer alone.
    warm_up = arguments.steps // 4
    rosa_fx.transform(model, rosa_fx.RosaSpec(base="nf4", rank=8, density=0.02, schedule=f"wl{warm_up}"))
    groups = rosa_fx.trainable_parameters(model, lr=3e-3, lr_sparse=1e-3)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for group in groups:
        print(f"{group['name']}: {sum(p.numel() for p in group['params'])} parameters")
    # One backward call per optimizer step: masks are then chosen without keeping any dense gradient.
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    compiled = torch.compile(model)

    phase = ""
    for step, (x, y) in enumerate(batches(textwrap, arguments.steps)):
        schedule.begin_step()
        loss = nn.functional.cross_entropy(compiled(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule.phase != phase or step == arguments.steps - 1:
            phase = schedule.phase
            print(f"step {step}: {phase}, loss {loss.item():.3f}")
        schedule.end_step()

    rosa_fx.save_adapter(model, arguments.out)
    entries = sum(mask.nnz for mask in rosa_fx.masks(model).values())
    print(f"{entries} entries in the masks; adapter in {arguments.out}")


if __name__ == "__main__":
    main()
