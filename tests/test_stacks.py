"""Weights with more than two dimensions: which are selected, how they are read, and which uses of them are rewritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import FLOAT32, Spelling, assert_budget, exact, fill, prepared, rewritten, run
from target_models import only
from torch import Tensor, nn

import rosa_fx
from rosa_fx.linear_uses import einsum_reading
from rosa_fx.spec import RosaSpec
from rosa_fx.targets import select_targets

E, N, K = 3, 8, 4
INDEX = torch.tensor([0, 2, 1, 1, 2, 0])
OFFSETS = torch.tensor([2, 2, 6], dtype=torch.int32)

# spelling -> (function, weight shape, input shape, products of the forward pass)
SPELLINGS: dict[str, tuple[Spelling, tuple[int, ...], tuple[int, ...], int]] = {
    "one by one": (lambda x, w, b: torch.stack([F.linear(x, w[e]) for e in range(E)]), (E, N, K), (6, K), 3),
    "one by one, [in, out]": (lambda x, w, b: torch.stack([x @ w[e] for e in range(E)]), (E, K, N), (6, K), 3),
    "only one": (lambda x, w, b: x @ w[-1].T, (E, N, K), (6, K), 1),
    "unbind": (lambda x, w, b: torch.stack([F.linear(x, each) for each in w.unbind()]), (E, N, K), (6, K), 3),
    "chunk of experts": (lambda x, w, b: F.linear(x, w.chunk(3)[1][0], b[:N]), (E, N, K), (6, K), 1),
    "rows of each": (lambda x, w, b: torch.stack([F.linear(x, w[e, :5]) for e in range(E)]), (E, N, K), (6, K), 3),
    "bmm": (lambda x, w, b: torch.bmm(x, w), (E, K, N), (E, 6, K), 1),
    "bmm, transposed": (lambda x, w, b: torch.bmm(x, w.transpose(1, 2)), (E, N, K), (E, 6, K), 1),
    "bmm, weight first": (lambda x, w, b: torch.bmm(w, x), (E, N, K), (E, K, 6), 1),
    "bmm with halves": (lambda x, w, b: torch.cat([torch.bmm(x, c) for c in w.chunk(2, -1)], -1), (E, K, N), (E, 6, K), 2),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b[:N], x, w), (E, K, N), (E, 6, K), 1),
    "baddbmm with factors": (lambda x, w, b: torch.baddbmm(b[:N], x, w, beta=2, alpha=0.5), (E, K, N), (E, 6, K), 1),
    "matmul, broadcast": (lambda x, w, b: x @ w, (E, K, N), (2, E, 6, K), 1),
    "matmul, weight first": (lambda x, w, b: w @ x, (E, N, K), (E, K, 6), 1),
    "einsum, batch of experts": (lambda x, w, b: torch.einsum("bek,enk->ben", x, w), (E, N, K), (2, E, K), 1),
    "einsum, heads": (lambda x, w, b: torch.einsum("bshk,hkn->bshn", x, w), (E, K, N), (2, 5, E, K), 1),
    "einsum, four dimensions": (lambda x, w, b: torch.einsum("bghd,ghde->bghe", x, w), (2, E, K, N), (5, 2, E, K), 1),
    "grouped_mm fallback": (lambda x, w, b: fallback(x, w.transpose(-2, -1)), (E, N, K), (6, K), 1),
    "grouped_mm fallback, [in, out]": (lambda x, w, b: fallback(x, w), (E, K, N), (6, K), 1),
    "gathered, weight first": (lambda x, w, b: torch.bmm(w[INDEX], x.unsqueeze(-1)).squeeze(-1), (E, N, K), (6, K), 1),
    "gathered, [in, out]": (lambda x, w, b: torch.bmm(x.unsqueeze(1), w[INDEX]).squeeze(1), (E, K, N), (6, K), 1),
    "gathered, several rows": (lambda x, w, b: torch.bmm(x, w[INDEX].mT), (E, N, K), (6, 5, K), 1),
    "index_select": (lambda x, w, b: torch.bmm(x, w.index_select(0, INDEX).mT), (E, N, K), (6, 5, K), 1),
    "all as one matrix": (lambda x, w, b: F.linear(x, w.flatten(0, 1)), (E, N, K), (6, K), 1),
    "all as one matrix, [in, out]": (lambda x, w, b: x @ w.flatten(0, 1), (E, N, K), (6, E * N), 1),
    "a stack of one": (lambda x, w, b: x @ w, (1, K, N), (1, 6, K), 1),
}


def fallback(x: Tensor, w: Tensor) -> Tensor:
    import transformers.integrations.moe  # noqa: F401  (registers the operator)

    return torch.ops.transformers.grouped_mm_fallback(x, w, OFFSETS)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_fused_forward_and_backward(name: str) -> None:
    fn, shape, input_shape, products = SPELLINGS[name]
    torch.manual_seed(0)
    model = prepared(fn, shape, rank=2, density=0.2)
    x = torch.randn(input_shape)
    call, reports = rewritten(model, fullgraph=True)
    actual = run(call, model, x)
    (report,) = reports
    use = report.uses["weight"]
    assert report.counts["linear"] + report.counts["linear_t"] == 2 * products, "y and dx"
    assert (use.products, use.gradients, use.dense) == (2 * products, products, [])
    assert report.counts["dense"] == 0
    truth, plain = exact(model, x, torch.float64), exact(model, x, torch.float32)
    assert_budget(actual, plain, truth, factor=FLOAT32)
    assert_budget(run(model, model, x), plain, truth, factor=FLOAT32)


@pytest.mark.parametrize("gathered", [True, False])
def test_changed_number_of_rows_compiles_nothing_new_under_dynamic(gathered: bool) -> None:
    def spelled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        index = (x[:, 0] > 0).long()
        if gathered:
            return torch.bmm(w[index], x.unsqueeze(-1)).squeeze(-1)
        import transformers.integrations.moe  # noqa: F401  (registers the operator)

        return torch.ops.transformers.grouped_mm_fallback(x, w.mT, F.one_hot(index, E).sum(0).cumsum(0))

    model = prepared(spelled, (E, N, K), rank=2, density=0.2)
    call, reports = rewritten(model, dynamic=True)
    for rows in (5, 8, 13):
        x = torch.randn(rows, K)
        for ours, theirs in zip(run(call, model, x), run(model, model, x), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(reports) == 1
    assert reports[0].counts == {"linear": 1, "linear_t": 1, "linear_grads": 1, "dense": 0}


class Contractions(nn.Module):
    """Einsums over merged axes, which reach the graph in alphabetical order whatever that of the weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.split = nn.Parameter(torch.randn(8, 3, 4) * 0.3)
        self.swapped = nn.Parameter(torch.randn(8, 3, 4) * 0.3)
        self.merge = nn.Parameter(torch.randn(8, 3, 4) * 0.3)
        self.three = nn.Parameter(torch.randn(8, 2, 3, 4) * 0.3)
        self.first = nn.Parameter(torch.randn(2, 3, 4, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("ibnd,hnd->ibh", torch.einsum("ibh,hnd->ibnd", x, self.split), self.merge)
        y = torch.einsum("ibh,hnd->ibdn", x, self.swapped).repeat(1, 1, 1, 2)
        y = torch.einsum("ibdcn,hcnd->ibh", y.unflatten(3, (2, 3)), self.three)
        return torch.einsum("ixyz,zxyh->ih", y.view(10, 1, 1, 8).expand(10, 3, 4, 8)[..., :2], self.first)


def test_axes_in_another_order_than_they_are_stored() -> None:
    torch.manual_seed(0)
    model = rosa_fx.transform(Contractions(), RosaSpec(rank=2, density=0.2))
    fill(model)
    readings = {target.name: str(target.reading) for target in rosa_fx.state.state_of(model).targets.values()}
    expected = dict.fromkeys(("split", "swapped", "merge"), "a matrix 8 x 12")
    assert readings == expected | {"three": "a matrix 8 x 24", "first": "a matrix 24 x 8"}
    x = torch.randn(2, 5, 8)
    call, reports = rewritten(model, fullgraph=True)
    actual = run(call, model, x)
    assert reports[0].counts["linear"] + reports[0].counts["linear_t"] == 10
    assert (reports[0].counts["linear_grads"], reports[0].counts["dense"]) == (5, 0)
    eager = run(model, model, x)
    wide = run(model.double(), model, x.double())
    assert_budget(actual, eager, wide, factor=FLOAT32, together=True)


def test_inductor_generates_code_for_grouped_products(fresh_compiler: None) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(E, 16, 8) * 0.3)
            self.down = nn.Parameter(torch.randn(E, 16, 8) * 0.3)
            self.side = nn.Parameter(torch.randn(E, 8, 8) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            x = x @ self.side[1]
            index = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
            order = torch.argsort(index, stable=True)
            import transformers.integrations.moe  # noqa: F401  (registers the operator)

            offs = F.one_hot(index, E).sum(0).cumsum(0)
            x = torch.tanh(torch.ops.transformers.grouped_mm_fallback(x[order], self.up.mT, offs))
            return torch.bmm(x.unsqueeze(1), self.down[index[order]]).squeeze(1)

    torch.manual_seed(0)
    model = rosa_fx.transform(Sorted(), RosaSpec(targets=["up", "down", "side"], rank=2, density=0.2))
    fill(model)
    x = torch.randn(12, 8)
    assert rosa_fx.explain(model, x).fused == 3
    actual, eager = run(torch.compile(model, fullgraph=True), model, x), run(model, model, x)
    assert_budget(actual, eager, run(model.double(), model, x.double()), factor=FLOAT32)


def test_grouped_mm_in_bfloat16() -> None:
    """Where `_grouped_mm` compiles, it is what the graph holds, three times."""
    torch.manual_seed(0)
    offsets = torch.tensor([16, 16, 48], dtype=torch.int32)
    model = prepared(lambda x, w, b: F.grouped_mm(x, w.transpose(-2, -1), offs=offsets), (3, 32, 16), base="keep")
    model.to(torch.bfloat16)
    call, reports = rewritten(model, fullgraph=True)
    actual = run(call, model, torch.randn(48, 16).bfloat16())
    assert reports[0].counts == {"linear": 1, "linear_t": 1, "linear_grads": 1, "dense": 0}
    expected = run(model, model, torch.randn(48, 16).bfloat16())
    assert [t.shape for t in actual] == [t.shape for t in expected]


UNFUSED: dict[str, tuple[Spelling, tuple[int, ...], str]] = {
    "some of the experts": (lambda x, w, b: torch.bmm(x[:2], w[:2]), (E, K, N), "bmm"),
    "scaled": (lambda x, w, b: torch.bmm(x, w * 2.0), (E, K, N), "mul"),
    "other axes": (lambda x, w, b: torch.einsum("esk,nek->esn", x, w), (N, E, K), "bmm"),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_other_uses_stay_dense_and_right_and_are_named(name: str) -> None:
    fn, shape, word = UNFUSED[name]
    torch.manual_seed(0)
    model = prepared(fn, shape, rank=2, density=0.2)
    x = torch.randn(E, 6, K)
    call, reports = rewritten(model, fullgraph=True)
    actual = run(call, model, x)
    assert reports[0].counts["dense"] == 1
    assert_budget(actual, exact(model, x, torch.float32), exact(model, x, torch.float64), factor=FLOAT32)
    target = rosa_fx.explain(model, x).targets[0]
    assert (target.status, target.shape) == ("dense", shape)
    assert word in target.reason
    assert f"read as {shape[0]} matrices" in target.reason


# --- selection ---------------------------------------------------------------------------------------------------


class Spellings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("loop", "batch", "chosen", "selected", "summed", "grouped", "table", "rows", "added", "bias"):
            setattr(self, name, nn.Parameter(torch.randn(4, 6, 8)))
        self.heads = nn.Parameter(torch.randn(8, 2, 4))
        self.merged = nn.Parameter(torch.randn(2, 4, 8))
        self.blocks = nn.Parameter(torch.randn(2, 4, 6, 8))
        self.middle = nn.Parameter(torch.randn(6, 4, 8))
        self.empty = nn.Parameter(torch.randn(0, 6, 8))
        self.lookup = nn.Parameter(torch.randn(6, 8))
        self.each = nn.ParameterList([nn.Parameter(torch.randn(2, 6, 8))])

    def forward(self, x: Tensor, index: Tensor, offs: Tensor) -> Any:
        for expert in range(4):
            current = self.loop[expert]
            x = F.linear(x, current)
        y = torch.baddbmm(self.bias, x, self.batch)
        weights = self.chosen[index]
        z = torch.bmm(weights, x) + torch.bmm(torch.index_select(self.selected, 0, index), x)
        a = torch.einsum("bed,efd->bef", x, self.summed), F._grouped_mm(x, self.grouped.mT, offs)
        b = F.embedding(index, self.table) @ x, self.rows[index] + self.added
        c = torch.einsum("bsd,dhk->bshk", x, self.heads), torch.einsum("bshk, hkd -> bsd", x, self.merged)
        d = torch.einsum("bgek,gefk->bgef", x, self.blocks), torch.einsum("bnd,snd->bns", x, self.middle)
        return y, z, a, b, c, d, x @ self.empty, self.lookup[index] @ x, [x @ w for w in self.each]


def test_selection_and_readings() -> None:
    found = {target.name: str(target.reading) for target in select_targets(Spellings(), RosaSpec(rank=2, density=0.1))}
    stack = "4 matrices 6 x 8"
    expected = dict.fromkeys(("loop", "batch", "chosen", "selected", "summed", "grouped"), stack)
    expected |= {"heads": "a matrix 8 x 8", "merged": "a matrix 8 x 8", "blocks": "8 matrices 6 x 8"}
    assert found == expected | {"each.0": "2 matrices 6 x 8"}
    named = {t.name: str(t.reading) for t in select_targets(Spellings(), RosaSpec(targets=["rows", "middle"], density=0.1))}
    assert named == {"rows": stack, "middle": "6 matrices 4 x 8"}, "a pattern takes what all-linear leaves out"


def test_einsum_readings() -> None:
    readings = {
        ("ibh,hnd->ibnd", 1): (0, 1),
        ("ibnd,hnd->ibh", 1): (0, 1),
        ("...i, oi -> ...o", 1): (0, 1),
        ("abc,c->ab", 0): (0, 2),
        ("bnh,noh->bno", 1): (1, 1),
        ("hde,bhd->bhe", 0): (1, 1),
        ("bghd,ghde->bghe", 1): (2, 1),
        ("ab,bcd", 1): (0, 1),
        ("ibnd,snd->ibns", 1): None,
        ("binh,dnh->bind", 1): None,
        ("bd,...de->be", 1): None,
        ("ij,kl->ijkl", 1): None,
        ("ij,jkl->ij", 1): None,
        ("ij", 1): None,
    }
    assert {key: einsum_reading(*key) for key in readings} == readings


def test_target_of_a_stack() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.w.mT)

    target = only(Experts(), rank=16, density=0.25)
    assert (target.shape, target.rank, target.nnz) == ((4, 6, 8), 6, 48)
    assert target.note == "read as 4 matrices 6 x 8; rank capped from 16 to 6 = min(N, K)"
    assert only(Experts(), rank=2, overrides={"w": {"rank": 3, "density": 0.5}}).rank == 3
    with pytest.raises(rosa_fx.RosaError, match=r"rank 7 exceeds min\(N, K\) = 6 of the weight 'w' of shape 4 x 6 x 8"):
        only(Experts(), overrides={"w": {"rank": 7}})
