"""`torch.set_default_device` and `with torch.device(...)`: what rosa_fx makes for itself lies where its user's tensors lie.

Under "meta" whatever is made without a device has no data and shows at once; "cuda" would hand a GPU's addresses to CPU code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rosa_fx

ROWS = 80  # more than the kernels for few rows take


def run(folder: Path, base: str, compiled: bool, dtype: torch.dtype) -> list[Any]:
    """Everything from `transform` to a merged weight; numbers that do not depend on the default device."""
    torch._dynamo.reset()
    with torch.device("cpu"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to(dtype)
        x = torch.randn(ROWS, 64, dtype=dtype)
    spec = rosa_fx.RosaSpec(base=base, rank=4, density=0.05, schedule="wl2", targets="*.weight")
    rosa_fx.transform(model, spec)
    config = rosa_fx.TrainConfig(max_steps=5, compile=compiled, progress=False, warmup_steps=1, bf16=False)
    result = rosa_fx.train(model, [x] * 4, config, loss_fn=lambda net, batch: (net(batch) - batch).square().mean(), out=folder)
    rosa_fx.save_adapter(model, folder / "adapter")
    rosa_fx.load_adapter(model, folder / "adapter")
    with torch.no_grad():
        outputs = [model(x), model(x[:2])]
    found: list[Any] = [result.losses, *outputs, rosa_fx.explain(model, x).counts]
    rosa_fx.merge(model)
    return [*found, model(x).detach()]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("base", "dtype"),
    [("nf4", torch.bfloat16), ("nf4", torch.float32), ("int8", torch.float32), ("keep", torch.float32)],
    ids=str,
)
def test_results_do_not_depend_on_it(tmp_path: Path, base: str, compiled: bool, dtype: torch.dtype) -> None:
    expected = run(tmp_path / "plain", base, compiled, dtype)
    with torch.device("meta"):
        found = run(tmp_path / "meta", base, compiled, dtype)
    for got, want in zip(found, expected, strict=True):
        if isinstance(want, Tensor):
            assert torch.equal(got, want)
        else:
            assert got == want
