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
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_LONGEST_SUM = 1024


def product(
    left: Tensor,
    right: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = False,
    *,
    keep: bool = True,
) -> Tensor:
    """left @ right + bias [M, N] of left [M, K], right [K, N] and bias [N], all of one dtype; in `out` (any strides) if given.

    `add`: to what `out` holds; the sums start from there and are rounded once. Without `keep` the result may be in memory of
    its own instead, which spares a copy where the library writes no given memory.

    `right` may be given as its rows in `blocks(K)`, which spares a copy where they do not lie like that in one tensor.
    Not differentiable where `out` is given or oneDNN is used: for the bodies of operators.
    """
    if by_onednn(left.dtype, left.device) and left.numel() and out_columns(right):
        made = _onednn(left, right, bias, out if add else None)
        return made if out is None or not keep else out.copy_(made)
    if not isinstance(right, Tensor):
        right = torch.cat(list(right))
    if add:
        assert out is not None
        torch.addmm(out, left, right, out=out)
        return out if bias is None else out.add_(bias)
    if bias is None:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    return torch.addmm(bias, left, right) if out is None else torch.addmm(bias, left, right, out=out)


def out_columns(right: Tensor | Sequence[Tensor]) -> int:
    return (right if isinstance(right, Tensor) else right[0]).shape[1]


def blocks(depth: int) -> list[tuple[int, int]]:
    """[start, stop) of the parts in which oneDNN sums a float32 product of that depth.

    It adds up all of a sum in one register, and the error grows with its length: twice MKL's at 4096.
    """
    return [(start, min(depth, start + _LONGEST_SUM)) for start in range(0, depth, _LONGEST_SUM)]


def _onednn(left: Tensor, right: Tensor | Sequence[Tensor], bias: Tensor | None, start_from: Tensor | None) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    total = None if start_from is None else start_from.contiguous()
    for index, (start, stop) in enumerate(blocks(left.shape[1])):
        part = right[start:stop] if isinstance(right, Tensor) else right[index]
        if not (part.is_contiguous() or part.t().is_contiguous()):
            # Anything else is multiplied element by element.
            part = part.t().contiguous().t() if part.stride(0) == 1 else part.contiguous()
        if total is None:
            total = linear(left[:, start:stop], part.t(), bias, "none", [], "")
        else:
            total = linear.binary(left[:, start:stop], total, part.t(), None if start else bias, "add")
    assert total is not None
    return total


def by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of that dtype there are oneDNN's, in `blocks`."""
    return dtype == torch.float32 and device.type == "cpu" and onednn_is_faster()


def onednn_is_faster() -> bool:
    """Whether float32 products go to oneDNN. `torch.backends.mkldnn.flags(enabled=False)` keeps them from it."""
    return _prefers_onednn() and bool(torch.backends.mkldnn.enabled)


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
