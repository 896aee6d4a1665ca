"""Grad-input and the gradient of sparse values in one operator: the operator alone, and where the pass emits it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rewritten_models import assert_budget, exact, fill, prepared, rewritten, run
from torch import Tensor, nn

import rosa_fx
from rosa_fx.kernels import backward_ops, composition, ops
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.cpu import rows
from rosa_fx.mask import Mask

MakeCase = Callable[..., Any]
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
LOW = [torch.bfloat16, torch.float16]
ROWS = 2 * composition.FEW_ROWS


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies low precision itself: the pass and the products go by it."""
    monkeypatch.setattr(composition, "native", lambda dtype: True)


@FUZZ
@given(
    N=st.sampled_from([1, 2, 31, 32, 33, 97]),
    K=st.sampled_from([1, 3, 16, 63, 64, 65, 200]),
    M=st.sampled_from([0, 1, 15, 33, 64, 65, 130, 700]),
    dtype=st.sampled_from([torch.float32, *LOW]),
    value_t=st.sampled_from([torch.float32, *LOW]),
    transposed=st.booleans(),
    density=st.sampled_from([0.003, 0.1, 1.0]),
    turned=st.booleans(),
    seed=st.integers(0, 9),
)
def test_gradient_beside_a_product(
    N: int, K: int, M: int, dtype: torch.dtype, value_t: torch.dtype, transposed: bool, density: float, turned: bool, seed: int
) -> None:
    """Within the bound of any order of summation, the same for every number of threads, and the product as without it."""
    generator = torch.Generator().manual_seed(seed)
    mask = Mask.from_dense(torch.rand(N, K, generator=generator) < density)
    csr = [torch.randn(mask.nnz, generator=generator).to(value_t), mask.row_offsets, mask.cols]
    source = rows.source((N, K), base_format("dense").stored([torch.zeros(N, K)]), csr)
    assert source is not None
    inputs, outputs = (N, K) if transposed else (K, N)
    x, other = (torch.randn(M, size, generator=generator).to(dtype) for size in (inputs, outputs))
    if turned:
        x, other = x.t().contiguous().t(), other.t().contiguous().t()
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out, alone = (torch.full((M, outputs), float("nan"), dtype=dtype) for _ in range(2))
            gradient = source.terms((0, N, 0, K), x, out, transposed, other=other)
            assert source.terms((0, N, 0, K), x, alone, transposed) is None
            assert torch.equal(out, alone)
            found.append(gradient)
    finally:
        torch.set_num_threads(threads)
    one, several = found
    assert one is not None
    assert several is not None
    assert torch.equal(one, several)
    dy, right = (x, other) if transposed else (other, x)
    entries = mask.rows(), mask.cols.long()
    truth, size = ((a.t() @ b)[entries] for a, b in ((dy.double(), right.double()), (dy.double().abs(), right.double().abs())))
    # Chunks of tiles, 64 rows in at least 4 sums each.
    roundings = (M // 4 + 24) * torch.finfo(torch.float32).eps
    assert bool(((one - truth).abs() <= roundings * size + torch.finfo(torch.float32).smallest_normal * M).all())


def test_what_is_not_finite_stays_with_its_entries() -> None:
    mask = Mask.from_dense(torch.tensor([[1, 0, 1], [0, 1, 1]]).bool())
    source = rows.source((2, 3), base_format("dense").stored([torch.zeros(2, 3)]), [torch.ones(4), mask.row_offsets, mask.cols])
    assert source is not None
    for dtype in LOW:
        dy, x = torch.ones(70, 2, dtype=dtype), torch.ones(70, 3, dtype=dtype)
        x[69, 0], dy[3, 1] = float("nan"), float("inf")
        found = source.terms((0, 2, 0, 3), dy, torch.empty(70, 3, dtype=dtype), True, other=x)
        assert found is not None
        assert found.isnan().tolist() == [True, False, False, False]
        assert found[1:].tolist() == [70, float("inf"), float("inf")]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_operator_within_the_budget(make_case: MakeCase, native: None, base: str, dtype: torch.dtype, transposed: bool) -> None:
    """Against float64, as `linear`, `linear_t` and `linear_grads` are: the plain computation is that in low precision."""
    case = make_case((96, 128), base, m=ROWS, dtype=dtype, mask=0.05)
    x, other = (case.dy, case.x) if transposed else (case.x, case.dy)
    found = torch.ops.rosa_fx.product_with_grad(x.detach(), other.detach(), case.base, case.delta, case.layout.key, transposed)
    results = []
    for wide in (torch.float64, dtype):
        named = dict(zip(case.names, case.delta64, strict=True))
        S = torch.zeros(96, 128, dtype=torch.float64).index_put(case.rows_cols, named["values"])
        W, low = case.base64, case.layout.terms[0].scale * (named["B"] @ named["A"])
        g, right = x.detach().to(wide), other.detach().to(wide)
        parts = [part.to(wide) for part in (W, S, low)]
        y = sum(g @ (part if transposed else part.t()) for part in parts)
        dW = g.t() @ right if transposed else right.t() @ g
        results.append([y, dW[case.rows_cols]])
    assert_budget(list(found), results[1], results[0], 2.0 if dtype == torch.float32 else 1.1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m", [5, ROWS])
def test_without_the_kernel_both_are_computed(
    make_case: MakeCase, m: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows, float32, no compiler, an empty mask: the operator means the same."""
    for mask in (0.2, torch.zeros(12, 16, dtype=torch.bool)):
        case = make_case((12, 16), "nf4", m=m, mask=mask)
        x, other = (case.dy.detach(), case.x.detach()) if transposed else (case.x.detach(), case.dy.detach())
        with monkeypatch.context() as patch:
            patch.setattr(rows.sparse, "native", lambda *tensors: None)
            plain = backward_ops.product_with_grad(x, other, case.base, case.delta, case.layout.key, transposed)
        out, gradient = backward_ops.product_with_grad(x, other, case.base, case.delta, case.layout.key, transposed)
        product = ops.linear_t if transposed else ops.linear
        assert torch.equal(out, product(x, None, case.base, case.delta, case.layout.key))
        torch.testing.assert_close(gradient, plain[1])
        torch.testing.assert_close(out, plain[0])
        sample = (x, other, case.base, case.delta, case.layout.key, transposed)
        torch.library.opcheck(
            torch.ops.rosa_fx.product_with_grad.default, sample, test_utils=("test_schema", "test_faketensor")
        )


class Mlp(nn.Module):
    """Two weights of one input, one behind them, and one stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.last = nn.Parameter(torch.randn(32, 48) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down(F.silu(self.gate(x)) * self.up(x))) @ self.last


def mlp(dtype: torch.dtype, **spec: Any) -> nn.Module:
    torch.manual_seed(0)
    fields = {"base": "nf4", "rank": 4, "density": 0.1, "targets": ["*weight", "last"]} | spec
    model = rosa_fx.transform(Mlp().to(dtype), rosa_fx.RosaSpec(**fields))
    fill(model)
    return model


def joined(model: nn.Module, x: Tensor, backward: bool = True) -> list[int]:
    call, reports = rewritten(model, fullgraph=True)
    if backward:
        run(call, model, x)
    else:
        with torch.no_grad():
            call(x)
    assert all(report.counts["dense"] == 0 for report in reports)
    return [report.joined for report in reports]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_pair_of_a_backward_pass_is_joined(native: None, dtype: torch.dtype) -> None:
    x = torch.randn(2, ROWS // 2 + 1, 32).to(dtype)
    assert joined(mlp(dtype), x) == [4]
    assert joined(mlp(dtype), x, backward=False) == [0]
    assert joined(mlp(dtype), x[:1, :5]) == [0]  # few rows are multiplied without a tile
    assert joined(mlp(dtype, density=0), x) == [0]
    model = mlp(dtype)
    for weight in rosa_fx.state.state_of(model).weights.values():
        assert weight.sparse is not None
        weight.sparse.values.requires_grad_(False)
    assert joined(model, x) == [0]


def test_a_product_of_the_forward_pass_is_no_partner(native: None) -> None:
    """An input without a gradient has no grad-input; the upstream gradient stands before the forward product in the graph."""
    model = prepared(lambda x, w, b: F.linear(x, w), (32, 48)).to(torch.bfloat16)
    call, reports = rewritten(model, fullgraph=True)
    call(torch.randn(ROWS, 48).to(torch.bfloat16)).sum().backward()
    assert [(report.joined, report.counts["linear_grads"], report.counts["linear_t"]) for report in reports] == [(0, 1, 0)]
    assert rosa_fx.adapter(model, "weight").sparse.values.grad is not None


def test_float32_is_left_alone() -> None:
    assert joined(mlp(torch.float32), torch.randn(2, ROWS, 32)) == [0]


@pytest.mark.parametrize("spelling", ["x Wt", "x W"])
def test_gradients_through_a_joined_graph(native: None, spelling: str) -> None:
    model = prepared(
        *((lambda x, w, b: F.linear(x, w, b), (32, 48)) if spelling == "x Wt" else (lambda x, w, b: x @ w + b, (48, 32)))
    ).to(torch.bfloat16)
    x = torch.randn(3, ROWS, 48).to(torch.bfloat16)
    call, reports = rewritten(model, fullgraph=True)
    actual = run(call, model, x)
    assert [report.joined for report in reports] == [1]
    assert_budget(actual, exact(model, x, torch.bfloat16), exact(model, x, torch.float64), 1.1)
