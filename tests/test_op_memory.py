"""What the fused operators read, allocate and keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import Allocations
from torch import Tensor

from rosa_fx.kernels import ops
from rosa_fx.kernels.terms.collect import CollectTopK

MakeCase = Callable[..., Any]

BASES = [("dense", False), ("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]
TERMS: list[tuple[str, ...]] = [
    (),
    ("low_rank",),
    ("sparse",),
    ("low_rank", "sparse"),
    ("low_rank", "collect_gradient"),
    ("low_rank", "collect_topk"),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("base", "double_quant"), BASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_reads_uninitialised_memory(make_case: MakeCase, base: str, double_quant: bool, dtype: torch.dtype) -> None:
    assert torch.empty(3).isnan().all()
    for m in (0, 1, 70):
        for terms in TERMS:
            case = make_case((33, 65), base, double_quant=double_quant, terms=terms, dtype=dtype, m=m)
            key, delta = case.layout.key, case.delta
            out = [ops.linear(case.x, None, case.base, delta, key), ops.linear_t(case.dy, None, case.base, delta, key)]
            out += [ops.materialize(case.base, delta, key), *ops.linear_grads(case.dy, case.x, delta, key)]
            out += ops.materialize_backward(case.dy.t() @ case.x, delta, key)
            assert all(bool(tensor.isfinite().all()) for tensor in out), (m, terms)


def test_allocations_are_seen() -> None:
    a = torch.ones(256, 256)
    with Allocations() as seen:
        b = a @ a
        (b + 1).sum()
    assert seen.largest == 256 * 256 * 4
    assert seen.peak >= 2 * 256 * 256 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", TERMS[1:4], ids="+".join)
def test_gradients_make_no_dense_weight_gradient(make_case: MakeCase, terms: tuple[str, ...], dtype: torch.dtype) -> None:
    case = make_case((1024, 1024), terms=terms, rank=8, mask=0.006, m=64, dtype=dtype)
    with Allocations() as seen:
        ops.linear_grads(case.dy, case.x, case.delta, case.layout.key)
    assert 0 < seen.largest < 1024 * 1024


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_backward_holds_one_dense_weight_and_saves_none(make_case: MakeCase, base: str) -> None:
    """Grad-input needs one dequantised weight while it runs; nothing else of that size exists, or is saved before."""
    case = make_case((1024, 1024), base, rank=8, mask=0.006, m=64)
    base_bytes = {tensor.data_ptr() for tensor in case.base}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x, delta = case.x.requires_grad_(), case.leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ops.linear(x, None, case.base, delta, case.layout.key)
    assert saved
    assert all(t.numel() < 1024 * 1024 // 2 or t.data_ptr() in base_bytes for t in saved)
    with Allocations() as seen:
        torch.autograd.grad(y, [x, *(t for t in delta if t.requires_grad)], case.dy)
    assert seen.peak < 1.5 * 4 * 1024 * 1024


def test_collected_mask_leaves_without_the_dense_gradient(make_case: MakeCase) -> None:
    case = make_case((512, 512), terms=("low_rank", "collect_topk"), mask=0.006, m=64)
    outputs: list[Tensor] = []
    with Allocations() as seen:
        outputs = ops.linear_grads(case.dy, case.x, case.delta, case.layout.key)
    assert max(tensor.untyped_storage().nbytes() for tensor in outputs) < 512 * 512
    # One dense float32 gradient while the mask is chosen.
    assert 4 * 512 * 512 <= seen.peak < 1.6 * 4 * 512 * 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["collect_topk", "collect_gradient"])
def test_collecting_holds_one_dense_gradient(make_case: MakeCase, kind: str, dtype: torch.dtype) -> None:
    """However many rows there are, and whatever their dtype: less than 1.1 times the float32 gradient of the layer."""
    shape = 1024, 1024
    case = make_case(shape, terms=(kind,), mask=0.006, m=2048, dtype=dtype)
    dense = 4 * 1024 * 1024
    with Allocations() as seen:
        ops.linear_grads(case.dy, case.x, case.delta, case.layout.key)
    assert dense <= seen.peak < 1.1 * dense
    if kind == "collect_topk":
        gradient = (case.dy.t() @ case.x).float()
        with Allocations() as seen:
            ops.materialize_backward(gradient, case.delta, case.layout.key)
        assert seen.peak < 1.1 * dense


def test_choosing_a_mask_takes_the_real_memory_of_one_gradient() -> None:
    """What the C++ takes beside torch's allocator counts too: the peak of the resident set rises by less than 1.1 gradients."""
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        pytest.skip("needs Linux's count of resident memory")

    def resident(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))

    side = 4096
    dy, x = (torch.randn(64, side).bfloat16() for _ in range(2))
    for nnz in (side * side // 100, side * side // 64):
        probe = torch.zeros(1 + 2 * nnz)
        CollectTopK().grads(dy[:, :64], x[:, :64], [torch.zeros(3)])  # threads exist
        before = resident("VmRSS")
        peak.write_text("5")
        CollectTopK().grads(dy, x, [probe])
        # What was chosen is no overhead: rows and columns in float32, and both as integers while it is written.
        assert resident("VmHWM") - before < 1.1 * 4 * side * side + 24 * nnz
