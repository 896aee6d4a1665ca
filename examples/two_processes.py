"""RoSA in two processes: torchrun --nproc-per-node 2 examples/two_processes.py [--shard] [--steps 40] [--out FOLDER]

A small network that predicts the next byte of Python source is trained densely on one module of the standard library, then
adapted to another one. Every process computes its half of each batch; all choose the same masks. By default DDP averages the
gradients; with --shard FSDP2 shards the adapters, the optimizer's state and the frozen 4-bit base. A checkpoint is written
half-way and resumed from, also by another number of processes: run it again with `--nproc-per-node 1`.
"""

import argparse
import inspect
import textwrap
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rosa_fx

CONTEXT, ROWS = 16, 128


def batch(module: object, step: int, share: int, shares: int) -> tuple[Tensor, Tensor]:
    """One share of the rows of a step: CONTEXT bytes [rows, CONTEXT] of a module's source and the byte that follows [rows]."""
    text = torch.frombuffer(bytearray(inspect.getsource(module).encode()), dtype=torch.uint8).long()  # type: ignore[arg-type]
    windows = text.unfold(0, CONTEXT + 1, 1)
    chosen = windows[torch.randint(len(windows), (ROWS,), generator=torch.Generator().manual_seed(step))]
    mine = chosen[share::shares]
    return mine[:, :-1], mine[:, -1]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return out


def make_model() -> nn.Sequential:
    """The same in every process, since all seed alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 16), nn.Flatten(), Residual(256), Residual(256), nn.Linear(256, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        x, y = batch(argparse, step, 0, 1)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def adapt(arguments: argparse.Namespace) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = make_model()
    rosa_fx.transform(model, rosa_fx.RosaSpec(base="nf4", rank=8, density=0.02, schedule=f"wl{arguments.steps // 4}"))
    wrapped: nn.Module = model
    if arguments.shard:
        rosa_fx.shard_bases(model)
        for block in (model[2], model[3], model):
            fully_shard(block)
    else:
        wrapped = DistributedDataParallel(model)
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    optimizer = rosa_fx.optimizer_for(model, lr=3e-3, lr_sparse=1e-3)
    held_out = batch(textwrap, 1_000_000, 0, 1)

    def held_out_loss() -> float:
        with torch.no_grad():  # in every process: where the model is sharded each needs the others
            return nn.functional.cross_entropy(wrapped(held_out[0]), held_out[1]).item()

    before = held_out_loss()
    start, saved = 0, arguments.out / "half-way"
    if (saved / ".metadata").exists():
        start = rosa_fx.load_training_state(saved, model, optimizer, schedule)["step"]

    for step in range(start, arguments.steps):
        if step == arguments.steps // 2 and step > start:
            rosa_fx.save_training_state(saved, model, optimizer, schedule, {"step": step})
        schedule.begin_step()
        x, y = batch(textwrap, step, rank, size)
        nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.end_step()
        if rank == 0 and (step in (start, arguments.steps - 1) or step % 10 == 0):
            print(f"step {step}: next {schedule.phase}")

    after = held_out_loss()
    digest = [int((mask.cols.long() * (index + 1)).sum()) for index, mask in enumerate(rosa_fx.masks(model).values())]
    digests = [digest] * size
    dist.all_gather_object(digests, digest)
    if rank == 0 or arguments.shard:  # a sharded adapter is gathered from all
        rosa_fx.save_adapter(model, arguments.out / "adapter")
    if rank == 0:
        print(f"{len(digest)} masks, the same in {sum(d == digests[0] for d in digests)} of {size} processes")
        print(f"loss {before:.3f} -> {after:.3f}, adapter in {arguments.out / 'adapter'}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shard", action="store_true", help="FSDP2 in place of DDP")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/two_processes"))
    arguments = parser.parse_args()
    dist.init_process_group("gloo")  # on GPUs "nccl", and torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) before it
    adapt(arguments)
    # After DDP has gone with `adapt`: were it the group's last owner, it would wait for the group's threads with Python's lock
    # held, which a thread may need to let go of the last tensor that it sent.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
