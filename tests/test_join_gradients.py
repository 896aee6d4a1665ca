"""Gradients of the delta out of a product's pass over dy: the kernel, the operators, and where the passes emit them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rewritten_models import assert_budget, exact, fill, prepared, rewritten, run
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils.checkpoint import checkpoint

import rosa_fx
from rosa_fx.kernels import backward_ops, composition, ops
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.cpu import rows
from rosa_fx.kernels.inductor import capture_backend
from rosa_fx.mask import Mask
from rosa_fx.passes.joint import rewrite

MakeCase = Callable[..., Any]
rosa = torch.ops.rosa_fx
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
    R=st.sampled_from([0, 1, 4, 16, 17]),
    dtype=st.sampled_from([torch.float32, *LOW]),
    adapter_t=st.sampled_from([torch.float32, *LOW]),
    transposed=st.booleans(),
    density=st.sampled_from([0.0, 0.003, 0.1, 1.0]),
    turned=st.booleans(),
    seed=st.integers(0, 9),
)
def test_gradients_beside_a_product(
    N: int,
    K: int,
    M: int,
    R: int,
    dtype: torch.dtype,
    adapter_t: torch.dtype,
    transposed: bool,
    density: float,
    turned: bool,
    seed: int,
) -> None:
    """Within the bound of any order of summation, the same for every number of threads, and the product as without them."""
    generator = torch.Generator().manual_seed(seed)
    mask = Mask.from_dense(torch.rand(N, K, generator=generator) < density)
    csr = [torch.randn(mask.nnz, generator=generator).to(adapter_t), mask.row_offsets, mask.cols]
    source = rows.source((N, K), base_format("dense").stored([torch.zeros(N, K)]), csr)
    assert source is not None
    scale = 0.3
    A, B = (torch.randn(shape, generator=generator).to(adapter_t) for shape in ((R, K), (N, R)))
    inputs, outputs = (N, K) if transposed else (K, N)
    x, other = (torch.randn(M, size, generator=generator).to(dtype) for size in (inputs, outputs))
    inner, outer = (B.double(), A.double().t()) if transposed else (A.double().t(), B.double())
    kept = (scale * other.double() @ outer).to(dtype)
    if turned:
        x, other = x.t().contiguous().t(), other.t().contiguous().t()
    found: list[list[Tensor]] = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out, alone = (torch.full((M, outputs), float("nan"), dtype=dtype) for _ in range(2))
            made = torch.full((M, R), float("nan"), dtype=dtype)
            region = (0, N, 0, K)
            gradients = source.terms(region, x, out, transposed, (A, B, scale), made=made, other=other, kept=kept)
            assert source.terms(region, x, alone, transposed, (A, B, scale)) == []
            assert torch.equal(out, alone)
            found.append([made, *gradients])
    finally:
        torch.set_num_threads(threads)
    assert len(found[0]) == (4 if R else 2)
    assert all(torch.equal(one, several) for one, several in zip(*found, strict=True))
    made, values, *factors = found[0]
    eps, tiny = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).smallest_normal * M
    left, size = (scale * part(x) @ part(inner) for part in (Tensor.double, lambda t: t.double().abs()))
    if R:
        # In bfloat16 the factor may be rounded to that too.
        each = eps * (inputs + 4) + (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0)
        bound = each * size + torch.finfo(dtype).eps * left.abs() + torch.finfo(dtype).smallest_normal
        assert bool(((made.double() - left).abs() <= bound).all())
    dy, right = (x, other) if transposed else (other, x)
    entries = mask.rows(), mask.cols.long()
    # What the kernel multiplies is its own `left`, rounded to x's dtype.
    thin_dy, thin_x = (made, kept) if transposed else (kept, made)
    cases = [(values, dy, right, entries)]
    if factors:
        dA, dB = factors
        cases += [(dA, thin_dy, right, ...), (dB, dy, thin_x, ...)]
    # Chunks of tiles, 64 rows in at least 4 sums each.
    roundings = (M // 4 + 24) * eps
    for ours, a, b, index in cases:
        truth, size = ((p.t() @ q)[index] for p, q in ((a.double(), b.double()), (a.double().abs(), b.double().abs())))
        assert bool(((ours - truth).abs() <= roundings * size + tiny).all())


def test_what_is_not_finite_stays_with_its_entries() -> None:
    mask = Mask.from_dense(torch.tensor([[1, 0, 1], [0, 1, 1]]).bool())
    source = rows.source((2, 3), base_format("dense").stored([torch.zeros(2, 3)]), [torch.ones(4), mask.row_offsets, mask.cols])
    assert source is not None
    for dtype in LOW:
        dy, x = torch.ones(70, 2, dtype=dtype), torch.ones(70, 3, dtype=dtype)
        x[69, 0], dy[3, 1] = float("nan"), float("inf")
        (found,) = source.terms((0, 2, 0, 3), dy, torch.empty(70, 3, dtype=dtype), True, other=x)
        assert found.isnan().tolist() == [True, False, False, False]
        assert found[1:].tolist() == [70, float("inf"), float("inf")]


@pytest.mark.parametrize("wanted", ["values", "all", "factors"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_operators_within_the_budget(
    make_case: MakeCase, native: None, base: str, dtype: torch.dtype, transposed: bool, wanted: str
) -> None:
    """Against float64, as `linear`, `linear_t` and `linear_grads` are: the plain computation is that in low precision."""
    sparse, kept = wanted != "factors", wanted != "values"
    terms = ("low_rank", "sparse") if sparse else ("low_rank",)
    case = make_case((96, 128), base, m=ROWS, dtype=dtype, mask=0.05, terms=terms)
    x, other = (case.dy.detach(), case.x.detach()) if transposed else (case.x.detach(), case.dy.detach())
    key = case.layout.key
    out, left = rosa.product_with_left(other, None, case.base, case.delta, key, not transposed)
    found = [out, *rosa.product_with_grads(x, other, left if kept else None, case.base, case.delta, key, transposed)]
    results = []
    scale = case.layout.terms[0].scale
    for wide in (torch.float64, dtype):
        named = dict(zip(case.names, case.delta64, strict=True))
        S = torch.zeros(96, 128, dtype=torch.float64)
        if sparse:
            S = S.index_put(case.rows_cols, named["values"])
        parts = [part.to(wide) for part in (case.base64, S, scale * (named["B"] @ named["A"]))]
        g, right = (x.to(wide), other.to(wide)) if transposed else (other.to(wide), x.to(wide))
        y, dx = (sum(v @ (part if turn else part.t()) for part in parts) for v, turn in ((right, False), (g, True)))
        A, B = named["A"].to(wide), named["B"].to(wide)
        grads = [(scale * g @ B).t() @ right, scale * (g.t() @ (right @ A.t()))] if kept else []
        # In the order of the layout's terms.
        grads += [(g.t() @ right)[case.rows_cols]] if sparse else []
        results.append([*((y, dx) if transposed else (dx, y)), *grads])
    assert tuple(item.kind for item in case.layout.terms) == terms
    assert_budget(found, results[1], results[0], 2.0 if dtype == torch.float32 else 1.1)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m", [5, ROWS])
def test_without_the_kernel_all_is_computed_apart(
    make_case: MakeCase, m: int, transposed: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows, float32, no compiler, an empty mask: the operators mean the same, and what their definitions say."""
    for mask in (0.2, torch.zeros(12, 16, dtype=torch.bool)):
        case = make_case((12, 16), "nf4", m=m, mask=mask)
        x, other = (case.dy.detach(), case.x.detach()) if transposed else (case.x.detach(), case.dy.detach())
        first = (other, None, case.base, case.delta, case.layout.key, not transposed)
        out, left = rosa.product_with_left(*first)
        second = (x, other, left if kept else None, case.base, case.delta, case.layout.key, transposed)
        ours = [out, left, *rosa.product_with_grads(*second)]
        with monkeypatch.context() as patch:
            patch.setattr(rows.sparse, "native", lambda *tensors: None)
            plain = [*rosa.product_with_left(*first), *rosa.product_with_grads(*second)]
        defined = [*backward_ops.product_with_left._init_fn(*first), *backward_ops.product_with_grads._init_fn(*second)]
        product = ops.linear_t if transposed else ops.linear
        torch.testing.assert_close(ours[2], product(x, None, case.base, case.delta, case.layout.key))
        assert len(ours) == len(plain) == len(defined) == (6 if kept else 4)
        for one, other_way, right in zip(ours, plain, defined, strict=True):
            torch.testing.assert_close(one, other_way)
            torch.testing.assert_close(one, right)
        for operator, sample in ((rosa.product_with_left, first), (rosa.product_with_grads, second)):
            torch.library.opcheck(operator.default, sample, test_utils=("test_schema", "test_faketensor"))


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
    for report in reports:
        assert report.counts["dense"] == 0
        assert sum(use.joined for use in report.uses.values()) == report.joined
        assert all(use.joined <= use.gradients for use in report.uses.values())
    return [report.joined for report in reports]


def captured(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How often each operator of ours, and a plain product, is in the graph after the rewrite."""
    graphs: list[Graph] = []
    torch._dynamo.reset()
    torch.compile(model, backend=capture_backend(lambda graph: (rewrite(graph), graphs.append(graph))), fullgraph=True)(x)
    return Counter(
        node.target.__name__.split(".")[0] for node in graphs[0].nodes if str(node.target).startswith(("rosa_fx.", "aten.mm"))
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_layer_of_a_backward_pass_is_joined(native: None, dtype: torch.dtype) -> None:
    x = torch.randn(2, ROWS // 2 + 1, 32).to(dtype)
    assert joined(mlp(dtype), x) == [4]
    assert captured(mlp(dtype), x.clone().requires_grad_()) == {"product_with_left": 4, "product_with_grads": 4}
    assert joined(mlp(dtype), x, backward=False) == [0]
    assert joined(mlp(dtype), x[:1, :5]) == [0]  # few rows are multiplied without a tile
    for terms in ({"density": 0}, {"rank": 0}):
        assert joined(mlp(dtype, **terms), x) == [4]


def test_explain_names_joined_layers(native: None) -> None:
    model, x = mlp(torch.bfloat16), torch.randn(2, ROWS // 2 + 1, 32).bfloat16().requires_grad_()
    report = rosa_fx.explain(model, x)
    assert {target.name: (target.gradients, target.joined) for target in report.targets} == dict.fromkeys(
        ("gate.weight", "up.weight", "down.weight", "last"), (1, 1)
    )
    assert [target.joined for target in rosa_fx.explain(model, x[:1, :5]).targets] == [0] * 4


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_only_the_gradient_of_values_is_joined_where_thin_products_are_not(
    native: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large rank, factors that do not train, values that do not."""
    x = torch.randn(2, ROWS // 2 + 1, 32, requires_grad=True).to(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(composition, "_FP32_RANK", 3)
        found = captured(mlp(dtype, rank=4), x)
    assert (found["product_with_grads"], found["product_with_left"], found["linear_grads"]) == (4, 0, 0)
    for names, expected in ((("A", "B"), (4, 0, 0)), (("A",), (4, 0, 0)), (("values",), (0, 0, 0))):
        model = mlp(dtype)
        for weight in rosa_fx.state.state_of(model).weights.values():
            for name in names:
                getattr(weight.sparse if name == "values" else weight.low_rank, name).requires_grad_(False)
        found = captured(model, x)
        assert (found["product_with_grads"], found["product_with_left"], found["linear_grads"]) == expected


def test_a_product_that_is_computed_again_makes_no_thin_product_for_later(native: None) -> None:
    """Checkpointing would repeat the whole product for the sake of the thin one."""
    x = torch.randn(2, ROWS, 32, dtype=torch.bfloat16, requires_grad=True)
    found = captured(Again(mlp(torch.bfloat16)), x)
    assert (found["product_with_grads"], found["product_with_left"], found["linear_grads"]) == (4, 0, 0)


class Again(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.model, x, use_reentrant=False)
        return out


def test_a_product_of_the_forward_pass_is_no_partner(native: None) -> None:
    """An input without a gradient has no grad-input; the upstream gradient stands before the forward product in the graph."""
    model = prepared(lambda x, w, b: F.linear(x, w), (32, 48)).to(torch.bfloat16)
    call, reports = rewritten(model, fullgraph=True)
    call(torch.randn(ROWS, 48).to(torch.bfloat16)).sum().backward()
    assert [(report.joined, report.counts["linear_grads"], report.counts["linear_t"]) for report in reports] == [(0, 1, 0)]
    assert rosa_fx.adapter(model, "weight").sparse.values.grad is not None


def test_float32_joins_small_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, ROWS, 32)
    assert joined(mlp(torch.float32), x) == [4]
    monkeypatch.setattr(composition, "_SMALL_WEIGHT", 32 * 64 - 1)
    assert joined(mlp(torch.float32), x) == [1]


@pytest.mark.parametrize("rank", [4, 40])
@pytest.mark.parametrize("spelling", ["x Wt", "x W"])
def test_gradients_through_a_joined_graph(native: None, spelling: str, rank: int) -> None:
    model = prepared(
        *((lambda x, w, b: F.linear(x, w, b), (32, 48)) if spelling == "x Wt" else (lambda x, w, b: x @ w + b, (48, 32))),
        rank=rank,
    ).to(torch.bfloat16)
    x = torch.randn(3, ROWS, 48).to(torch.bfloat16)
    call, reports = rewritten(model, fullgraph=True)
    actual = run(call, model, x)
    assert [report.joined for report in reports] == [1]
    assert_budget(actual, exact(model, x, torch.bfloat16), exact(model, x, torch.float64), 1.1)
