"""Thin products of low-rank parts that are computed once: counts, agreement, accounting. No code is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import FLOAT32, assert_budget, fill, prepared, rewritten, run
from torch import Tensor, nn
from torch.fx import Graph

import rosa_fx
from rosa_fx.kernels import composition, ops
from rosa_fx.kernels.inductor import capture_backend
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.registry import term
from rosa_fx.passes import joint
from rosa_fx.passes.fuse_linear import emit
from rosa_fx.passes.joint import rewrite
from rosa_fx.passes.order import dependents, hoist
from rosa_fx.passes.shared_input import stacking_pays

aten = torch.ops.aten
SPEC = {"base": "nf4", "rank": 4, "density": 0.1}
FUSED = {"linear": 6, "linear_t": 6, "linear_grads": 6, "dense": 0}
SHARED = {"stacked": 2, "reused": 12, "gradients": 2}


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights on the CPU go another way, see test_join_gradients.py; this is what all others take."""
    monkeypatch.setattr(composition, "joins_all", lambda *args: False)


class Block(nn.Module):
    """The linears of a transformer layer: three with one input, two with another, one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16, bias=False)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(x) * torch.cat([self.k(x), self.v(x)], -1).tanh()
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def block(dtype: torch.dtype = torch.float32, **spec: Any) -> nn.Module:
    torch.manual_seed(0)
    model = rosa_fx.transform(Block().to(dtype), rosa_fx.RosaSpec(**(SPEC | spec)))
    fill(model)
    return model


def unshared(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(joint, "_share", lambda *args: None)
        return call()


def captured(model: nn.Module, x: Tensor) -> Graph:
    """The joint graph after the rewrite."""
    graphs: list[Graph] = []
    torch._dynamo.reset()
    torch.compile(model, backend=capture_backend(lambda graph: (rewrite(graph), graphs.append(graph))), fullgraph=True)(x)
    (graph,) = graphs
    return graph


def target_count(graph: Graph, target: Any) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


def kept_terms(graph: Graph) -> list[list[str]]:
    """The terms that each `linear_grads` of the graph still has."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.rosa_fx.linear_grads.default)
    return [[item.kind for item in Layout.parse(str(node.args[3])).terms] for node in nodes]


def test_counts_forward_and_backward() -> None:
    model, x = block(), torch.randn(2, 50, 32, requires_grad=True)
    call, reports = rewritten(model, fullgraph=True)
    run(call, model, x)
    assert reports[0].counts == FUSED
    assert reports[0].shared == SHARED
    assert {(u.products, u.gradients, u.shared) for u in reports[0].uses.values()} == {(2, 1, 2)}
    # x Aᵀ: three products; dy B: one a weight; Aᵀ's gradients: three; B's: one a weight. Values are left to the operator.
    graph = captured(model, x)
    assert target_count(graph, aten.mm.default) == 3 + 6 + 3 + 6
    assert kept_terms(graph) == [["sparse"]] * 6

    call, reports = rewritten(model, fullgraph=True)
    with torch.no_grad():
        call(x)
    assert reports[0].shared == {"stacked": 2, "reused": 0, "gradients": 0}
    assert {name: u.shared for name, u in reports[0].uses.items() if not u.shared} == {"down.weight": 0}


def test_few_rows_are_not_stacked() -> None:
    """Copying the matrices into one would cost more than reading two rows again."""
    assert not stacking_pays(2, [4, 4, 4])
    call, reports = rewritten(block(), fullgraph=True)
    with torch.no_grad():
        call(torch.randn(2, 32))
    assert reports[0].shared == {"stacked": 0, "reused": 0, "gradients": 0}


@pytest.mark.parametrize(
    ("rows", "ranks", "pays"),
    [
        (1024, [16, 16, 16], True),
        (512, [64, 64, 64], True),
        (64, [16, 16, 16], True),
        (16, [16, 16, 16], False),
        (1, [1, 1], False),
        (4096, [16], False),
        (4096, [], False),
        (4096, [1, 200], True),
        (400, [1, 200], False),
    ],
)
def test_cost_of_stacking(rows: int, ranks: list[int], pays: bool) -> None:
    """As measured on the CPU: 0.4 to 0.9 of the time from 64 rows on, 1.3 at 16 rows (float32, 4096 columns)."""
    assert stacking_pays(rows, ranks) is pays


class Heads(nn.Module):
    """Three linears with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(96, n, bias=False) for n in (64, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def plain_heads(model: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients as adapter libraries compute them in `dtype`, three products a layer, in the order of `run`."""
    leaves: dict[int, Tensor] = {}
    x = x.detach().to(dtype).requires_grad_()
    outs = []
    for name in ("q.weight", "k.weight", "v.weight"):
        part = rosa_fx.adapter(model, name)
        own = [part.low_rank.A, part.low_rank.B, part.sparse.values]
        mine = [t.detach().double().requires_grad_() if dtype == torch.float64 else t.detach().requires_grad_() for t in own]
        leaves |= dict(zip(map(id, own), mine, strict=True))
        A, B, values = (t.to(dtype) for t in mine)
        S = torch.zeros(part.shape, dtype=dtype).index_put((part.sparse.mask.rows(), part.sparse.mask.cols.long()), values)
        W = rosa_fx.base_weight(model, name).to(dtype)
        outs.append(F.linear(x, W) + F.linear(x, S) + F.linear(F.linear(x, A), B) * part.scale)
    y = torch.cat(outs, -1)
    torch.manual_seed(7)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(leaves[id(p)].grad for p in model.parameters() if id(p) in leaves)]


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, FLOAT32), (torch.bfloat16, 1.1)], ids=str)
def test_error_budget(dtype: torch.dtype, factor: float) -> None:
    torch.manual_seed(0)
    model = rosa_fx.transform(Heads().to(dtype), rosa_fx.RosaSpec(**SPEC, alpha=5.2))
    fill(model)
    x = torch.randn(300, 96).to(dtype)
    call, reports = rewritten(model, fullgraph=True)
    actual = run(call, model, x)
    assert reports[0].shared == {"stacked": 1, "reused": 6, "gradients": 1}
    assert_budget(actual, plain_heads(model, x, dtype), plain_heads(model, x, torch.float64), factor)


def test_dropout_draws_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A differs in every forward pass and between layers; sharing reorders no random number."""
    model, x = block(dropout=0.3).train(), torch.randn(60, 32)

    def step() -> tuple[list[Tensor], list[Tensor], dict[str, int]]:
        call, reports = rewritten(model, fullgraph=True)
        torch.manual_seed(3)
        first = run(call, model, x)
        return first, run(call, model, x), reports[0].shared

    (first, second, shared), (plain, _, none) = step(), unshared(step, monkeypatch)
    assert (shared, none) == (SHARED, {"stacked": 0, "reused": 0, "gradients": 0})
    assert not torch.equal(first[0], second[0])
    for ours, theirs in zip(first, plain, strict=True):
        assert (ours.double() - theirs.double()).norm() <= 64 * torch.finfo(torch.float32).eps * theirs.double().norm()


def agrees(model: nn.Module, x: Tensor, **options: Any) -> dict[str, int]:
    """Compare with eager mode to rounding; what was shared."""
    call, reports = rewritten(model, fullgraph=True, **options)
    for ours, theirs in zip(run(call, model, x), run(model, model, x), strict=True):
        assert (ours.double() - theirs.double()).norm() <= 64 * torch.finfo(torch.float32).eps * theirs.double().norm()
    assert reports[0].counts["dense"] == 0
    return reports[0].shared


def test_regions_of_a_packed_weight() -> None:
    """Rows of one weight have one A: x Aᵀ is one product. Columns have parts of it."""
    torch.manual_seed(0)
    rows = prepared(lambda x, w, b: F.linear(x, w[:16]) * F.linear(x, w[16:32]) + F.linear(x, w[32:]), (48, 24))
    assert agrees(rows, torch.randn(90, 24)) == {"stacked": 0, "reused": 4, "gradients": 1}
    columns = prepared(lambda x, w, b: F.linear(x, w[:, :24]) * F.linear(x, w[:, 24:]), (20, 48))
    assert agrees(columns, torch.randn(90, 24)) == {"stacked": 1, "reused": 4, "gradients": 1}


def test_weights_stored_as_inputs_by_outputs() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(24, 32) * 0.1), nn.Parameter(torch.randn(24, 32) * 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.first) * (x @ self.second)

    torch.manual_seed(0)
    model = rosa_fx.transform(Turned(), rosa_fx.RosaSpec(**SPEC, targets=["first", "second"]))
    fill(model)
    assert agrees(model, torch.randn(3, 30, 24)) == {"stacked": 1, "reused": 4, "gradients": 1}


def test_ranks_that_differ_and_layers_without_low_rank_part() -> None:
    x = torch.randn(100, 32)
    assert agrees(block(overrides={"q.weight": {"rank": 3}, "v.weight": {"rank": 9}}), x) == SHARED
    # k has no low-rank part: q and v share, k keeps its operator as it is.
    assert agrees(block(overrides={"k.weight": {"rank": 0}}), x) == {"stacked": 2, "reused": 10, "gradients": 2}
    # v is no target at all.
    assert agrees(block(exclude=["v.weight"]), x) == {"stacked": 2, "reused": 10, "gradients": 2}
    assert agrees(block(density=0.0), x) == SHARED


def test_dynamic_rows() -> None:
    model = block()
    call, reports = rewritten(model, dynamic=True, fullgraph=True)
    for rows in (100, 40, 70):
        run(call, model, torch.randn(2, rows, 32))
    assert [report.shared for report in reports] == [SHARED]


def test_only_wanted_gradients_are_computed() -> None:
    model, x = block(), torch.randn(100, 32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("values"))
    call, reports = rewritten(model, fullgraph=True)
    y = call(x)
    y.sum().backward()
    graph = captured(model, x)
    assert reports[0].counts["linear_grads"] == 6
    assert kept_terms(graph) == [["sparse"]] * 6
    # Forward alone shares: one stack for q, k and v, one for gate and up.
    assert reports[0].shared == {"stacked": 2, "reused": 0, "gradients": 0}
    assert target_count(graph, aten.mm.default) == 2


def test_explain_counts_by_weight() -> None:
    report = rosa_fx.explain(block(), torch.randn(100, 32, requires_grad=True))
    assert report.counts == FUSED
    assert {(t.status, t.products, t.gradients, t.shared) for t in report.targets} == {("fused", 2, 1, 2)}


def test_checkpointed_layers_recompute_the_shared_product() -> None:
    model, x = block(), torch.randn(100, 32)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    call, reports = rewritten(checkpointed, fullgraph=True)  # type: ignore[arg-type]
    actual, expected = run(call, model, x), run(model, model, x)
    assert reports[0].shared["stacked"] == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.double() - theirs.double()).norm() <= 64 * torch.finfo(torch.float32).eps * theirs.double().norm()


def test_given_product_means_the_low_rank_term(make_case: Callable[..., Any]) -> None:
    case = make_case((12, 16), "nf4")
    low_rank, sparse = case.layout.terms
    given = Layout((12, 16), case.layout.dtype, case.layout.base, (term("low_rank_given", scale=low_rank.scale), sparse))
    A, B, *rest = case.delta
    for op, rows, product in (
        (ops.linear, case.x, case.x @ A.t()),
        (ops.linear_t, case.dy, case.dy @ (low_rank.scale * B)),
    ):
        expected = op(rows, None, case.base, case.delta, case.layout.key)
        exact = op(rows.double(), None, case.base, case.delta64, case.layout64.key)
        # A kernel that computes the product itself may round it otherwise.
        assert_budget([op(rows, None, case.base, [A, B, product, *rest], given.key)], [expected], [exact], FLOAT32)
        # It is the product that is taken, and not computed again.
        other = op(rows, None, case.base, [A, B, 0 * product, *rest], given.key)
        assert torch.equal(other, op(rows, None, case.base, [A, 0 * B, *rest], case.layout.key))
        assert not torch.allclose(other, expected, rtol=0, atol=0.01 * expected.std().item())
    region = (2, 9, 3, 16)
    x, part = case.x[:, 3:], [A, B, case.x[:, 3:] @ A[:, 3:].t(), *rest]
    expected = ops.linear(x, None, case.base, case.delta, case.layout.part(region).key)
    # The product of a part of x may be rounded otherwise than the operator's own, whose rows lie side by side.
    exact = ops.linear(x.double(), None, case.base, case.delta64, case.layout64.part(region).key)
    assert_budget([ops.linear(x, None, case.base, part, given.part(region).key)], [expected], [exact], FLOAT32)
    dense = [ops.materialize(case.base, d, key.key) for d, key in ((case.delta, case.layout), (part, given))]
    assert torch.equal(*dense)
    grads = [ops.linear_grads(case.dy, case.x, d, k.key) for d, k in ((case.delta, case.layout), (part, given))]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_moving_keeps_random_numbers_in_order() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(4)
    first = emit(graph, aten.neg.default, x)
    noise = graph.call_function(aten.rand.default, ([4],))
    noise.meta["val"] = torch.zeros(4)
    product = emit(graph, aten.mul.Tensor, noise, x)
    other = graph.call_function(aten.rand.default, ([4],))
    other.meta["val"] = torch.zeros(4)
    late = emit(graph, aten.mul.Tensor, other, first)
    free = emit(graph, aten.mul.Tensor, other, x)
    assert not hoist([late], first), "it depends on what it would stand before"
    assert not hoist([free], first), "its random number would come before another one"
    assert [node.name for node in graph.nodes] == [n.name for n in (x, first, noise, product, other, late, free)]
    assert hoist([product], first)
    assert hoist([free], first)
    assert [node.name for node in graph.nodes] == [n.name for n in (x, noise, product, other, free, first, late)]
    assert dependents([noise], late) == [product]
    assert dependents([first], late) is None
    graph.lint()
