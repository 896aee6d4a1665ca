"""Where the tests of generated Triton run: Triton's interpreter on the CPU if TRITON_INTERPRET=1, else a GPU.

Import this module before anything imports triton, in a process of its own. From then on tensors are made on DEVICE by default,
Inductor's graphs are made anew, and what they allocate starts as NaN.
"""

from __future__ import annotations

import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def poisoned(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    """Memory of a generated module: NaN or the largest value, so that reading what was not written shows."""
    out = torch.empty_strided(size, stride, dtype=dtype, device=DEVICE)
    return out.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max if dtype != torch.bool else 1)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of random numbers on DEVICE."""
    return torch.Generator(DEVICE).manual_seed(seed)


def _start() -> None:
    if INTERPRETED:
        import triton_cpu

        triton_cpu.install()
    else:
        assert os.environ.get("ROSA_FX_TRITON", "1") == "1", "these are tests of the kernels that ROSA_FX_TRITON=0 turns off"
        torch.set_default_device(DEVICE)
    import torch._inductor.config as inductor_config

    inductor_config.fx_graph_cache = False
    # Generated modules take their allocator from here when they are loaded.
    setattr(torch._C._dynamo.guards, f"_empty_strided_{DEVICE.type}", poisoned)


_start()
