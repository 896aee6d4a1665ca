"""Two processes with FSDP2's `fully_shard`: masks, training and what is saved are those of one process.

In float64, so that only a wrong share, shard or order could tell them apart by more than rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference_rosa import D, Pair, batch, loss_of, spec_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_processes import together

import rosa_fx
from rosa_fx import RosaError

STEPS, SAVED = 6, 4
VARIANTS: dict[str, dict[str, Any]] = {
    # Packed codes are sharded too; an odd rank, so that shards are uneven; sums for the masks when it is saved.
    "packed": {"base": "nf4", "rank": 3, "schedule": "wl2", "num_grads": 3, "restart": False},
    # Blocks are compiled, bases stay whole.
    "compiled": {"base": "keep", "rank": 3, "schedule": "wl2", "num_grads": 1, "restart": True},
}


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Pair(D, 24, D) for _ in range(2)])
        self.last = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(x)


class Loop:
    """A loop of one's own over `micro` micro-batches per step of which this process computes every `size`-th."""

    def __init__(self, variant: str, rank: int, size: int) -> None:
        fields = dict(VARIANTS[variant])
        restart = fields.pop("restart")
        self.rank, self.size, self.step = rank, size, 0
        torch.manual_seed(0)
        self.model: Any = Stack()
        rosa_fx.transform(self.model, spec_of(targets="blocks.*", **fields)).double()
        if size > 1:
            if variant == "packed":
                rosa_fx.shard_bases(self.model)
            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)
            if variant == "compiled":
                rosa_fx.compile_blocks(self.model)
        self.schedule = rosa_fx.MaskSchedule(self.model, restart=restart)
        self.optimizer = rosa_fx.optimizer_for(self.model, 0.01, 0.02)

    def run(self, until: int) -> Loop:
        while self.step < until:
            self.schedule.begin_step()
            for number in range(self.rank, 2, self.size):
                x = batch(self.step, number).double()
                (loss_of(self.model(x), x) * (self.size / 2)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.end_step()
            self.step += 1
            with torch.no_grad():
                self.model(x)  # leaves FSDP's outermost parameters whole
        return self

    def save(self, folder: Path) -> Loop:
        rosa_fx.save_training_state(folder, self.model, self.optimizer, self.schedule, {"step": self.step})
        return self

    def load(self, folder: Path) -> Loop:
        self.step = rosa_fx.load_training_state(folder, self.model, self.optimizer, self.schedule)["step"]
        return self

    def found(self) -> dict[str, Tensor]:
        state = {name: tensor.clone() for name, tensor in rosa_fx.adapter_state(self.model).items()}
        state |= {f"{name} mask": mask.to_dense() for name, mask in rosa_fx.masks(self.model).items()}
        for index, (parameter, entries) in enumerate(self.optimizer.state.items()):
            for key, value in entries.items():
                state[f"{index}.{key}"] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
                assert isinstance(value, DTensor) == (self.size > 1 and parameter.shape == value.shape)
        return state


def sharded_in(rank: int, variant: str, folder: str) -> dict[str, Any]:
    out = Path(folder)
    loop = Loop(variant, rank, 2).run(SAVED).save(out / "two").run(STEPS)
    name = "blocks.1.b.weight"
    weight = rosa_fx.adapter(loop.model, name)
    refused = {}
    for what in ("merge", "explain"):
        with pytest.raises(RosaError) as error:
            getattr(rosa_fx, what)(loop.model, *([batch(0)] if what == "explain" else []))
        refused[what] = str(error.value)
    rosa_fx.save_adapter(loop.model, out / "adapter")
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    again = Loop(variant, rank, 2)
    rosa_fx.load_adapter(again.model, out / "adapter")
    return {
        "found": loop.found(),
        "resumed": Loop(variant, rank, 2).load(out / "one").run(STEPS).found(),
        "adapter": {key: tensor.clone() for key, tensor in rosa_fx.adapter_state(again.model).items()},
        "delta": rosa_fx.delta(loop.model, name),
        "base": rosa_fx.base_weight(loop.model, name),
        "codes": [tuple(tensor.to_local().shape) for tensor in weight.base.tensors() if isinstance(tensor, DTensor)],
        "A": tuple(weight.low_rank.A.to_local().shape),
        "refused": refused,
        "breaks": breaks,
        "compiled": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if tensor.is_floating_point():
            assert (ours[key] - tensor).abs().max() <= 1e-8 * tensor.abs().max(), key
        else:
            assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_one_process(variant: str, tmp_path: Path) -> None:
    whole = Loop(variant, 0, 1).run(SAVED).save(tmp_path / "one").run(STEPS)
    expected = whole.found()
    assert all(value.abs().max() > 0 for key, value in expected.items() if key.endswith("values"))
    results = together(sharded_in, variant, str(tmp_path))
    for rank, result in enumerate(results):
        assert_alike(result["found"], expected)
        assert_alike(result["resumed"], expected)
        assert_alike(
            {"delta": result["delta"], "base": result["base"]},
            {
                "delta": rosa_fx.delta(whole.model, "blocks.1.b.weight"),
                "base": rosa_fx.base_weight(whole.model, "blocks.1.b.weight"),
            },
        )
        assert_alike(result["adapter"], {key: value for key, value in expected.items() if key in result["adapter"]})
        assert result["A"] == ((2, 24), (1, 24))[rank]
        assert len(result["codes"]) == (variant == "packed")
        assert result["breaks"] == {}
        assert (result["compiled"] > 0) == (variant == "compiled")
        for what, text in result["refused"].items():
            assert text.startswith(f"rosa_fx.{what} needs whole weights, and this model is sharded: rosa_fx.save_adapter(")
    assert_alike(Loop(variant, 0, 1).load(tmp_path / "two").run(STEPS).found(), expected)


def test_refusals(tmp_path: Path) -> None:
    loop = Loop("packed", 0, 1).save(tmp_path / "state")
    with pytest.raises(RosaError, match="holds a checkpoint already"):
        loop.save(tmp_path / "state")
    with pytest.raises(RosaError, match="holds no whole checkpoint"):
        loop.load(tmp_path / "other")
    with pytest.raises(RosaError, match=r"another spec \(base, num_grads differ\)"):
        Loop("compiled", 0, 1).load(tmp_path / "state")
    loop.schedule.restart = True
    with pytest.raises(RosaError, match="the saved schedule has restart=False"):
        loop.load(tmp_path / "state")
    stray = torch.optim.AdamW(loop.model.parameters())
    with pytest.raises(RosaError, match="parameters that are no adapter's"):
        rosa_fx.save_training_state(tmp_path / "new", loop.model, stray, loop.schedule)
    with pytest.raises(RosaError, match="extra holds something that JSON cannot"):
        rosa_fx.save_training_state(tmp_path / "new", loop.model, loop.optimizer, loop.schedule, {"step": loop})
