"""`transformers.Trainer` with `RosaCallback` under `accelerate launch`, in two processes that average gradients by DDP."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import trainer_models
from other_process import run_python
from torch import Tensor
from transformers import Trainer

import rosa_fx

STEPS = 6
EPS = torch.finfo(torch.float32).eps


def train_with(folder: Path, accumulate: int, resume: bool = False, **fields: Any) -> dict[str, Tensor]:
    """The adapters after training in this process, or its share of it: no dropout, and each row is a micro-batch.

    In float64 with SGD, so that what rounding there is (the loss is float32) stays as small as it is.
    """
    model = trainer_models.transformed(trainer_models.llama(attention_dropout=0.0), dropout=0.0, base="keep").double()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulate, "max_steps": STEPS, **fields}
    optimizer = torch.optim.SGD(rosa_fx.trainable_parameters(model, lr=1.0, lr_sparse=1.0))
    trainer = Trainer(
        model,
        trainer_models.arguments(folder, save_strategy="steps", save_steps=4, **settings),
        train_dataset=trainer_models.rows(2 * STEPS),
        optimizers=(optimizer, None),
        callbacks=[rosa_fx.RosaCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer_models.adapters(model)


def launch(script: Path, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", str(port)]
    done = run_python("-m", "accelerate.commands.launch", *options, script, *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    torch.save(train_with(folder / "run", 1), folder / f"whole-{rank}.pt")
    torch.save(train_with(folder / "alone", 1, resume=True), folder / f"resumed-{rank}.pt")


def test_as_one_process(tmp_path: Path) -> None:
    whole = train_with(tmp_path / "alone", 2)
    launch(Path(__file__), str(tmp_path))
    for name in ("whole", "resumed"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        for key, tensor in whole.items():
            assert torch.equal(first[key], second[key]), f"{name}: {key} differs between the processes"
            if tensor.is_floating_point():
                assert (first[key] - tensor).abs().max() <= 64 * STEPS * EPS * tensor.abs().max(), f"{name}: {key}"
                assert tensor.abs().max() > 0, key
            else:
                assert torch.equal(first[key], tensor), f"{name}: {key}"


if __name__ == "__main__":
    main()
