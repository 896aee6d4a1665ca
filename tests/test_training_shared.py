"""The trainer in two processes does what it does in one with twice the micro-batches per step.

In float64, so that only a wrong share, weight or order could tell them apart by more than rounding.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training_models import config, make_data, make_model, state
from two_processes import together

import rosa_fx
from rosa_fx import train
from rosa_fx.training import read_metrics

STEPS = 8


def tiny(**spec: Any) -> Any:
    return make_model(dropout=0.0, **spec).double()


def run(each: int, out: Path | None = None, *, spec: dict[str, Any] | None = None, resume: bool = False, **fields: Any) -> Any:
    """What a run with `each` micro-batches per step and process comes to."""
    model = tiny(**(spec or {}))
    settings = {"max_steps": STEPS, "gradient_accumulation": each, "bf16": False, "tensorboard": False, **fields}
    # Seven micro-batches of different weight, one of them without targets: steps are uneven, and so are their shares.
    data = make_data(7)
    data[2]["labels"].fill_(-100)
    result = train(model, data, config(**settings), eval_batches=make_data(3, seed=1), out=out, resume=resume)
    return {"state": state(model), "losses": result.losses, "evals": result.evals, "skipped": result.skipped}


def assert_alike(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["evals"].keys() == theirs["evals"].keys()
    # Losses are handled in float32.
    for mine, exact in ((ours["losses"], theirs["losses"]), (list(ours["evals"].values()), list(theirs["evals"].values()))):
        assert (torch.tensor(mine) - torch.tensor(exact)).abs().max() <= 1e-6 * max(exact)
    for key, tensor in theirs["state"].items():
        mine = ours["state"][key]
        if tensor.is_floating_point():
            assert (mine - tensor).abs().max() <= 1e-9 * tensor.abs().max(), key
            assert tensor.abs().max() > 0, key
        else:
            assert torch.equal(mine, tensor), key


def runs_in(rank: int, folder: str) -> dict[str, Any]:
    out = Path(folder)
    return {
        "whole": run(1),
        "stopped": run(1, out / "two", stop_at_step=4),
        "collecting": run(1, out / "sums", spec={"num_grads": 2}, stop_at_step=4),
        "resumed": run(1, out / "one", resume=True),
        "again": run(1, out / "two", resume=True),
    }


def test_as_one_process(tmp_path: Path) -> None:
    whole = run(2)
    run(2, tmp_path / "one", stop_at_step=4)
    two = together(runs_in, str(tmp_path))
    for mine in two:
        for name, found in mine.items():
            for key, tensor in found["state"].items():
                assert torch.equal(tensor, two[0][name]["state"][key]), f"{name}: {key} differs between the processes"
        assert_alike(mine["whole"], whole)
        assert_alike(mine["resumed"], whole)
        assert_alike(mine["again"], whole)
    # What two processes wrote goes on in one, also where sums for the masks are under way.
    sums = run(2, spec={"num_grads": 2})
    assert_alike(run(2, tmp_path / "sums", spec={"num_grads": 2}, resume=True), sums)
    rows = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, STEPS + 1))
    assert len(json.loads((tmp_path / "two" / "run.json").read_text())["parts"]) == 2
    assert (tmp_path / "two" / "best" / "adapter_config.json").is_file()


class Poisoned(list[dict[str, Tensor]]):
    """Micro-batches of which one, by its place in the order of the first epoch, cannot be computed or ends the process."""

    def __init__(self, data: list[dict[str, Tensor]], rank: int, what: str) -> None:
        super().__init__(data)
        self.fetched, self.rank, self.what = 0, rank, what

    def __getitem__(self, index: Any) -> Any:
        self.fetched += 1
        batch = dict(super().__getitem__(index))
        if self.rank == 1 and self.fetched == 3:
            if self.what == "nan":
                batch["scale"] = torch.tensor(float("nan"))
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        return batch


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch)["loss"]
    return loss * batch.get("scale", 1.0)


def stopped_in(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what, schedule in (("nan", "wl5"), ("collect", "wl2"), ("sigterm", "wl5")):
        out = Path(folder) / what
        data = Poisoned(make_data(8), rank, "sigterm" if what == "sigterm" else "nan")
        settings = config(max_steps=STEPS, bf16=False, checkpoint_every=1)
        try:
            train(tiny(schedule=schedule), data, settings, loss_fn=loss_of, out=out)
        except rosa_fx.RosaError as error:
            found[what] = str(error)
        except SystemExit as error:
            found[what] = f"{error.code}: {error.message}"  # type: ignore[attr-defined]
    wrapped = DistributedDataParallel(tiny())
    found["wrapped"] = train(wrapped, make_data(8), config(max_steps=5, bf16=False)).losses
    skipped = train(
        tiny(schedule="wl2"),
        Poisoned(make_data(8), rank, "nan"),
        config(max_steps=STEPS, bf16=False, on_nonfinite="skip"),
        loss_fn=loss_of,
    )
    found["skipped"] = skipped.skipped
    return found


def test_stop_together(tmp_path: Path) -> None:
    first, second = together(stopped_in, str(tmp_path))
    assert first == second
    for what, phase in (("nan", "low_rank"), ("collect", "collect")):
        assert first[what].startswith(f"step 3 ({phase}): ")
        assert "the loss is not finite in rank 1" in first[what]
        assert f"the last checkpoint is {tmp_path}/{what}/checkpoints/step-2" in first[what]
    assert (
        first["sigterm"]
        == f"143: interrupted after step 3: continue with resume=True from {tmp_path}/sigterm/checkpoints/step-3"
    )
    assert first["skipped"] == 1
    alone = train(tiny(), make_data(8), config(max_steps=5, bf16=False, gradient_accumulation=2)).losses
    assert first["wrapped"] == pytest.approx(alone, rel=1e-6)
