"""`optimizer_for`, and bitsandbytes' 8-bit AdamW in the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaError, RosaSpec, TrainConfig
from rosa_fx.adapters import adapter_state
from rosa_fx.training import optim

SIZE = 1024


def model() -> nn.Module:
    """Of parameters that are large enough for states in 8 bits (4,096 entries)."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
    return rosa_fx.transform(plain, RosaSpec(base="keep", rank=4, density=0.005, schedule="wl2", targets=["0.weight"]))


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, SIZE, generator=generator)] * 6


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def config(**fields: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"max_steps": 6, "compile": False, "progress": False, "optimizer": "adamw8bit"}
    return TrainConfig(**{**defaults, "warmup_steps": 1, "lr": 0.002, "lr_sparse": 0.002, **fields})


def test_two_rates_and_all_parameters() -> None:
    transformed = model()
    optimizer = rosa_fx.optimizer_for(transformed, 0.1, 0.2, weight_decay=0.3, betas=(0.5, 0.6))
    assert type(optimizer) is torch.optim.AdamW
    assert [(g["name"], g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups] == [
        ("low_rank", 0.1, 0.3, (0.5, 0.6)),
        ("sparse", 0.2, 0.3, (0.5, 0.6)),
    ]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    low_rank, sparse = rosa_fx.adapter(transformed, "0.weight").low_rank, rosa_fx.adapter(transformed, "0.weight").sparse
    assert held == {id(p) for p in (low_rank.A, low_rank.B, sparse.values)}
    assert [g["lr"] for g in rosa_fx.optimizer_for(transformed).param_groups] == [7e-4, 2e-4], "the paper's"
    assert type(rosa_fx.optimizer_for(transformed, optimizer="adamw8bit")) is bnb.optim.AdamW8bit
    with pytest.raises(RosaError, match="optimizer is 'sgd': use 'adamw' or 'adamw8bit'"):
        rosa_fx.optimizer_for(transformed, optimizer="sgd")
    with pytest.raises(RosaError, match="not transformed"):
        rosa_fx.optimizer_for(nn.Linear(2, 2))
    with pytest.raises(RosaError, match=r"TrainConfig.optimizer is 'adam': use \"adamw\" or \"adamw8bit\""):
        config(optimizer="adam")


def test_eight_bit_states_learn_and_resume_bit_for_bit(tmp_path: Path) -> None:
    whole = model()
    result = rosa_fx.train(whole, data(), config(), loss_fn=loss, out=tmp_path / "whole")
    exact = model()
    reference = rosa_fx.train(exact, data(), config(optimizer="adamw"), loss_fn=loss)
    assert result.losses[-1] < result.losses[0]
    assert result.losses[-1] == pytest.approx(reference.losses[-1], rel=0.05)
    assert not torch.equal(adapter_state(whole)["0.weight.low_rank.B"], adapter_state(exact)["0.weight.low_rank.B"])
    for stop in (1, 4):  # without the sparse values' state, and with it
        out = tmp_path / f"stopped at {stop}"
        rosa_fx.train(model(), data(), config(stop_at_step=stop), loss_fn=loss, out=out)
        again = model()
        rosa_fx.train(again, data(), config(), loss_fn=loss, out=out, resume=True)
        for name, tensor in adapter_state(whole).items():
            assert torch.equal(adapter_state(again)[name], tensor), (stop, name)
    with pytest.raises(RosaError, match=r"TrainConfig.optimizer is 'adamw', but the checkpoint .* was made with 'adamw8bit'"):
        rosa_fx.train(model(), data(), config(optimizer="adamw"), loss_fn=loss, out=tmp_path / "whole", resume=True)


def test_states_are_in_eight_bits() -> None:
    transformed = model()
    optimizer = rosa_fx.optimizer_for(transformed, optimizer="adamw8bit")
    loss(transformed, data()[0]).backward()
    optimizer.step()
    moments = optimizer.state[rosa_fx.adapter(transformed, "0.weight").low_rank.A]
    assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8


@pytest.mark.parametrize("failure", ["raises", "does nothing"])
def test_device_without_it_is_refused(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any) -> None:
        if failure == "raises":
            raise NotImplementedError("no kernel for this device")

    optim._require_8bit.cache_clear()
    monkeypatch.setattr(bnb.optim.AdamW8bit, "step", step)
    reason = "NotImplementedError: no kernel for this device" if failure == "raises" else "its step did nothing"
    with pytest.raises(RosaError, match=rf"'adamw8bit' does not work on 'cpu' .*\({reason}\): use optimizer 'adamw'"):
        rosa_fx.train(model(), data(), config(), loss_fn=loss)
    optim._require_8bit.cache_clear()
