"""Thin products against float64 within the error of the plain product, and where the pass emits them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import rosa_fx
from rosa_fx.kernels import thin_ops
from rosa_fx.kernels.inductor import capture_backend
from rosa_fx.passes.joint import rewrite

ops = torch.ops.rosa_fx
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def strided(rows: int, columns: int, kind: str, generator: torch.Generator) -> Tensor:
    """[rows, columns] with NaN around it."""
    held = torch.full((rows + 1, columns + 3) if kind != "turned" else (columns + 1, rows + 3), float("nan"))
    view = held[:rows, :columns] if kind != "turned" else held[:columns, :rows].t()
    view = view if kind != "whole" else torch.empty(rows, columns)
    return view.copy_(torch.randn(rows, columns, generator=generator))


@FUZZ
@given(
    M=st.sampled_from([0, 1, 3, 4, 5, 63, 64, 257]),
    K=st.sampled_from([1, 2, 15, 16, 17, 97, 1024, 1031, 2500]),
    R=st.sampled_from([1, 3, 4, 5, 16, 17, 48]),
    kind=st.sampled_from(["whole", "rows apart", "turned"]),
    seed=st.integers(0, 9),
)
def test_thin_products(M: int, K: int, R: int, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, rows, thin = (strided(*shape, kind, generator) for shape in ((M, K), (R, K), (M, R)))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([ops.thin_product(x, rows), ops.thin_gradient(thin, x, False), ops.thin_gradient(thin, x, True)])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous()
    product, gradient, turned = found[0]
    assert torch.equal(turned.t(), gradient)
    for ours, left, right in ((product, x, rows.t()), (gradient, thin.t(), x)):
        size = left.double().abs() @ right.double().abs()
        # Every order of summation in at least four sums, with the parts added up.
        bound = (left.shape[1] // 4 + 16) * torch.finfo(torch.float32).eps * size
        assert bool(((ours - left.double() @ right.double()).abs() <= bound).all())


@pytest.mark.parametrize("K", [512, 4096])
def test_long_sums_are_as_exact_as_plain_ones(K: int) -> None:
    x, rows = torch.randn(64, K), torch.randn(16, K)
    exact = x.double() @ rows.double().t()
    error, plain = ((found - exact).square().mean().sqrt() for found in (ops.thin_product(x, rows), x @ rows.t()))
    assert error <= 1.1 * max(plain, 2.0**-24 * exact.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_and_no_compiler_are_plain_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (dtype, torch.float32):
        x, rows, thin = (torch.randn(shape).to(kind) for shape in ((7, 33), (3, 33), (7, 3)))
        with monkeypatch.context() as patch:
            patch.setattr(thin_ops, "native", lambda *tensors: None)
            patch.setattr("rosa_fx.kernels.cpu.gradient.native", lambda *tensors: None)
            assert torch.equal(ops.thin_product(x, rows), x @ rows.t())
            torch.testing.assert_close(ops.thin_gradient(thin, x, False), thin.t() @ x)
            torch.testing.assert_close(ops.thin_gradient(thin, x, True), x.t() @ thin)


def test_operators_are_well_formed() -> None:
    x, rows, thin = torch.randn(7, 33), torch.randn(3, 33), torch.randn(7, 3)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.thin_product.default, (x, rows), test_utils=utilities)
    for transposed in (False, True):
        torch.library.opcheck(ops.thin_gradient.default, (thin, x, transposed), test_utils=utilities)


@pytest.mark.parametrize(("dtype", "own"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_float32_on_the_cpu_has_products_of_its_own(dtype: torch.dtype, own: bool) -> None:
    """Products of x and of dy, once each, and the gradients of A and B: the other is in the layout of B."""
    torch.manual_seed(0)
    model: Any = rosa_fx.transform(
        torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False, dtype=dtype)), rosa_fx.RosaSpec(rank=4, density=0.01)
    )
    rosa_fx.MaskSchedule(model, "wl0").begin_step()
    found: list[Any] = []

    def visit(graph: torch.fx.Graph) -> None:
        rewrite(graph)
        found.extend(node.target for node in graph.nodes)

    x = torch.randn(2048, 64).to(dtype).requires_grad_()
    torch.compile(model, backend=capture_backend(visit))(x).sum().backward()
    assert found.count(ops.thin_product.default) == (2 if own else 0)
    assert found.count(ops.thin_gradient.default) == (2 if own else 0)
    assert found.count(torch.ops.aten.mm.default) == (0 if own else 4)
    B = rosa_fx.adapter(model, "0.weight").low_rank.B
    assert B.grad.stride() == B.stride()
