"""Dense matrix products on the CPU, by the faster of the libraries that PyTorch brings.

`torch.mm` gives float32 to MKL, and MKL gives processors of other makers than Intel the code that it has for AVX2. Where such
a processor has AVX-512, oneDNN, to which PyTorch gives low precision anyway, multiplies float32 in half the time (Zen 5, two
cores, 4096x4096 with 512 rows: 41 ms against 88 ms). It writes no given memory: a product for a part of a tensor is copied, M·N
elements, some hundredths of its time.

The choice depends on the processor and on PyTorch's build alone, never on a measurement: a run that is repeated or resumed has
to round as before.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """left @ right + bias [M, N] of left [M, K], right [K, N] and bias [N], all of one dtype; in `out` (any strides) if given.

    Not differentiable where `out` is given or oneDNN is used: for the bodies of operators.
    """
    if left.dtype == torch.float32 and left.device.type == "cpu" and left.numel() and right.numel() and onednn_is_faster():
        made: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
        return made if out is None else out.copy_(made)
    if bias is None:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    return torch.addmm(bias, left, right) if out is None else torch.addmm(bias, left, right, out=out)


def onednn_is_faster() -> bool:
    """Whether float32 products go to oneDNN. `torch.backends.mkldnn.flags(enabled=False)` keeps them from it."""
    return _prefers_onednn() and torch.backends.mkldnn.enabled


@functools.cache
def _prefers_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _maker() not in ("GenuineIntel", "")
    )


def _maker() -> str:
    """`vendor_id` of the processor, empty where it is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
