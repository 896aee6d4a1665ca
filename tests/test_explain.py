"""`explain`: the reason and the line of what is not fused, what is left alone, estimates, and the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import Holder
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rosa_fx
from rosa_fx.errors import RosaError
from rosa_fx.report import RewriteReport, TargetReport
from rosa_fx.report_picture import Grid, Listing, nodes_of, panels
from rosa_fx.untouched import Untouched

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def explained(fn: Callable[..., Any], x: Tensor, shape: tuple[int, int] = (24, 32)) -> TargetReport:
    model = rosa_fx.transform(Holder(fn, shape, 32), rosa_fx.RosaSpec(targets=["weight"], rank=2, density=0.1))
    (target,) = rosa_fx.explain(model, x).targets
    return target


# --- reasons ---------------------------------------------------------------------------------------------------------


def clamped(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    narrow = w.clamp(-0.1, 0.1)  # where a clamp is
    return x @ narrow


def beside(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = x @ w
    return y + w.sum()  # where a sum is


def leaving(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    turned = w.T  # where a view is
    return x @ w, turned


def strided(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    part = w[:, ::2]  # where a slice is
    return x @ part


def nested(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(w, (32,)).sum() + x.sum()  # where torch is called


@pytest.mark.parametrize(
    ("fn", "reasons", "line"),
    [
        (clamped, ["weight gradient comes from aten.where", "read by aten.clamp_min"], "a clamp is"),
        (beside, ["weight gradient comes from aten.sum", "read by aten.sum"], "a sum is"),
        (leaving, ["the weight itself leaves the graph"], "a view is"),
        (strided, ["read by aten.mm.default -> [10, 16], which is not a product that can be fused"], "a slice is"),
        (nested, ["weight gradient comes from aten.", "read by aten."], "torch is called"),
    ],
    ids=["clamp", "sum", "output", "stride", "function of torch"],
)
def test_reason_and_line_of_what_is_dense(fn: Callable[..., Any], reasons: list[str], line: str) -> None:
    target = explained(fn, torch.randn(2, 5, 24, requires_grad=True))
    assert target.status == "dense"
    for reason in reasons:
        assert reason in target.reason
    assert target.source.startswith("test_explain.py:"), "the innermost line that is the user's"
    assert target.source.endswith(f"# where {line}")
    assert target.source in target.reason


def test_reason_and_line_of_masks_that_are_chosen_over_several_uses() -> None:
    model = Holder(lambda x, w, b: torch.tanh(x @ w) @ w, (24, 24), 24)
    rosa_fx.transform(model, rosa_fx.RosaSpec(targets=["weight"], rank=2, density=0.1))
    rosa_fx.MaskSchedule(model, "wl0", micro_batches=1).begin_step()
    (target,) = rosa_fx.explain(model, torch.randn(3, 24)).targets
    assert "mask selection over 2 uses of one weight takes the dense gradient" in target.reason
    assert target.source.endswith("self.weight, self.bias)"), "the line that reads the weight"
    assert (target.products, target.gradients) == (3, 0)


def test_unused_weights_say_so() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    rosa_fx.transform(model, rosa_fx.RosaSpec(rank=2, density=0.1))
    used, idle = rosa_fx.explain(model, torch.randn(3, 8)).targets
    assert (used.status, used.reason, used.source) == ("fused", "", "")
    assert (idle.status, idle.reason, idle.source, idle.flops_after) == ("unused", "not read in this call", "", 0)


def test_weights_read_beside_the_graphs_are_not_called_unread() -> None:
    model = nn.ModuleDict({"inside": nn.Linear(8, 8), "beside": nn.Linear(8, 8)})
    beside = torch.compiler.disable(lambda x: model["beside"](x))
    model.forward = lambda x: beside(model["inside"](x))  # type: ignore[method-assign]
    rosa_fx.transform(model, rosa_fx.RosaSpec(rank=2, density=0.1))
    report = rosa_fx.explain(model, torch.randn(3, 8))
    assert [target.status for target in report.targets] == ["fused", "unused"]
    assert report.graph_breaks == 1
    assert "where a graph break left it to eager mode" in report.targets[1].reason


# --- weights left alone ----------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """One weight of every kind that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.hidden = nn.Parameter(torch.randn(8, 8))
        self.scales = nn.Parameter(torch.randn(5, 8))
        self.up, self.skip, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.rnn, self.gru = nn.LSTM(8, 8), nn.GRU(8, 8)
        self.bilinear = nn.Bilinear(8, 8, 4)
        self.point, self.wide, self.back = nn.Conv1d(8, 6, 1), nn.Conv1d(8, 6, 3), nn.ConvTranspose1d(8, 6, 1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
        self.head = nn.Linear(8, 10)
        setattr(self, "named" + "_late", self.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) * self.scales
        y = torch.tanh(x @ getattr(self, "named" + "_late"))
        y = self.other(self.skip(self.up(y)))
        convolved = self.point(y.mT).sum() + self.wide(y.mT).sum() + self.back(y.mT).sum()
        return self.head(y) + self.bilinear(x, y).sum() + self.normed(y).sum() + convolved


def test_every_weight_that_is_left_alone_has_its_reason() -> None:
    torch.manual_seed(0)
    model = Odd()
    spec = rosa_fx.RosaSpec(targets=["up.weight"], exclude=["skip.*", "normed.*"], rank=2, density=0.1)
    report = rosa_fx.explain(rosa_fx.transform(model, spec), torch.randint(10, (2, 5)))
    found = {each.name: (each.reason, each.linear) for each in report.untouched}
    through = "through its own flat list, past any adapter"
    assert found == {
        "hidden": ("multiplied with, which the source of its class does not show: name it by a pattern", True),
        "scales": ("no product with it in this call or in the source of its class", False),
        "table.weight": ("an embedding's table", False),
        "skip.weight": ("excluded by the spec", True),
        "other.weight": ("no pattern in targets names it", True),
        "rnn.weight_ih_l0": (f"is read by LSTM {through}", False),
        "rnn.weight_hh_l0": (f"is read by LSTM {through}", False),
        "gru.weight_ih_l0": (f"is read by GRU {through}", False),
        "gru.weight_hh_l0": (f"is read by GRU {through}", False),
        "bilinear.weight": ("nn.Bilinear multiplies it with two inputs, which is no linear product", False),
        "point.weight": ("a convolution of kernel size 1: name it by a pattern", False),
        "wide.weight": ("belongs to a convolution with kernel_size (3,), not 1", False),
        "back.weight": ("belongs to a transposed convolution", False),
        "normed.weight": ("excluded by the spec", True),
        "head.weight": ("the output head", True),
    }
    printed = str(report)
    assert "left alone (the output head): head.weight [10, 8]" in printed
    flops = {each.name: each.flops for each in report.untouched}
    assert flops["head.weight"] == 2 * (2 * 10 * 8 * 10), "10 positions, y and dx"
    assert flops["wide.weight"] == 2 * (2 * 2 * 3 * 6 * 8 * 3)


def test_a_tied_head_goes_by_its_own_name() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(10, 8), "up": nn.Linear(8, 8), "head": nn.Linear(8, 10, bias=False)})
    model["head"].weight = model["table"].weight
    model.forward = lambda i: model["head"](model["up"](model["table"](i)))  # type: ignore[method-assign]
    report = rosa_fx.explain(rosa_fx.transform(model, rosa_fx.RosaSpec(rank=2)), torch.zeros(3, dtype=torch.long))
    assert report.untouched == (
        Untouched("head.weight", (10, 8), True, "also the table of the embedding table.weight", 2 * 2 * 3 * 10 * 8),
    )


# --- estimates -------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix = nn.Linear(24, 40), nn.Parameter(torch.randn(40, 16))
        self.point = nn.Conv2d(16, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x)) @ self.mix
        return self.point(y.mT[..., None]).sum()


@pytest.mark.parametrize("rows", [7, 1])
def test_flops_before_are_those_that_torch_counts(rows: int) -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, rows, 24, requires_grad=True)
    counter = FlopCounterMode(display=False)
    model.point.requires_grad_(False)
    with counter:
        model(x).backward()
    report = rosa_fx.explain(rosa_fx.transform(model, rosa_fx.RosaSpec(rank=2, density=0.1)), x)
    assert [t.name for t in report.targets] == ["mix", "up.weight"]
    assert report.totals["flops_before"] + sum(each.flops for each in report.untouched) == counter.get_total_flops()


def test_flops_and_bytes_after_follow_from_rank_entries_and_rows() -> None:
    torch.manual_seed(0)
    model = rosa_fx.transform(Two(), rosa_fx.RosaSpec(rank=2, density=0.1))
    report = rosa_fx.explain(model, torch.randn(3, 7, 24))
    mix, up = report.targets
    rows, n, k, rank, nnz = 21, 40, 24, 2, 96
    assert (up.rank, up.nnz, up.products, up.gradients) == (rank, nnz, 1, 1), "the input needs no gradient"
    product = 2 * rows * n * k + 2 * rows * rank * (n + k) + 2 * rows * nnz
    gradient = 4 * rows * rank * (n + k) + 2 * rows * nnz
    assert (up.flops_before, up.flops_after) == (2 * 2 * rows * n * k, product + gradient)
    held = sum(t.nbytes for name, t in model.state_dict().items() if name.startswith("up.param") and "fingerprint" not in name)
    assert (up.bytes_before, up.bytes_after) == (4 * n * k, held)
    assert report.totals["bytes_after"] == up.bytes_after + mix.bytes_after
    assert report.to_dict()["totals"] == report.totals


def test_a_dense_use_costs_the_dense_product_and_gradient() -> None:
    target = explained(clamped, torch.randn(5, 24))
    assert target.flops_before == 2 * (2 * 5 * 24 * 32), "y and dW"
    assert target.flops_after == target.flops_before + (2 + 4) * 2 * 24 * 32, "B A is formed, and dW is multiplied with both"


def test_saved_bytes_are_activations_without_parameters() -> None:
    model = rosa_fx.transform(nn.Sequential(nn.Linear(24, 40), nn.Tanh()), rosa_fx.RosaSpec(rank=2, density=0.1))
    report = rosa_fx.explain(model, torch.randn(5, 24))
    x, y, thin = 5 * 24, 5 * 40, 5 * 2
    assert report.saved_bytes == 4 * (x + y + thin), "x and x Aᵀ for the gradients of the delta, y for that of tanh"
    assert "saved for backward 1.32 kB" in str(report)


def test_dynamic_sizes_are_counted_as_they_were() -> None:
    model = rosa_fx.transform(nn.Sequential(nn.Linear(24, 40)), rosa_fx.RosaSpec(rank=2, density=0.1))
    x = torch.randn(5, 24)
    fixed = rosa_fx.explain(model, x).totals
    torch._dynamo.mark_dynamic(x, 0)
    assert rosa_fx.explain(model, x).totals == fixed


# --- the picture -----------------------------------------------------------------------------------------------------


def made(names: list[str], untouched: list[str] | None = None) -> RewriteReport:
    targets = tuple(
        TargetReport(name, (8, 8), "nf4", 2, 6, "fused", "", 2, 1, flops_before=4000, flops_after=3000 + i)
        for i, name in enumerate(names)
    )
    left = tuple(Untouched(name, (90, 8), True, "the output head", 90_000) for name in untouched or [])
    return RewriteReport(targets, 0, 0, {}, left, 640)


def test_blocks_stand_in_a_grid_and_the_rest_in_a_list() -> None:
    parts = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"]
    names = [f"model.layers.{i}.{part}.weight" for i in range(30) for part in parts]
    report = made([name for name in names if name != "model.layers.3.mlp.up_proj.weight"], [names[11], "lm_head.weight"])
    grid, listing = panels(nodes_of(report))
    assert isinstance(grid, Grid)
    assert isinstance(listing, Listing)
    assert (grid.title, grid.rows, grid.columns) == ("model.layers", tuple(map(str, range(30))), tuple(parts))
    assert len(grid.nodes) == 90
    assert grid.nodes[3, 2].status == "untouched", "excluded in one block: in its place all the same"
    assert [node.name for node in listing.nodes] == ["lm_head.weight"]


def test_experts_and_stages_are_taken_apart_and_long_stacks_split() -> None:
    experts = [f"layers.{i}.{part}" for i in range(2) for part in ["q.weight", *(f"experts.{e}.up.weight" for e in range(40))]]
    shown = {panel.title: panel for panel in panels(nodes_of(made(experts))) if isinstance(panel, Grid)}
    assert shown.keys() == {"layers.*.experts", "layers"}
    assert shown["layers"].columns == ("q",)
    long = [panel for panel in panels(nodes_of(made(experts))) if isinstance(panel, Grid) and "experts" in panel.title]
    assert sum(len(panel.rows) for panel in long) == 80
    assert max(len(panel.rows) for panel in long) <= 36
    assert long[0].rows[:2] == ("0.0", "0.1")
    (listing,) = panels(nodes_of(made(["0.weight", "blocks.0.up"])))
    assert isinstance(listing, Listing), "a single block is no grid"


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_is_drawn(ending: str, start: bytes, tmp_path: Path) -> None:
    names = [f"layers.{i}.{part}.weight" for i in range(3) for part in ("up", "down")]
    path = tmp_path / "new" / f"picture.{ending}"
    for report in (made(names, ["head.weight"]), made([]), made(["up.weight"])):
        assert report.picture(path) == path
        assert path.read_bytes().startswith(start)
    if ending == "svg":
        made(names, ["head.weight"]).picture(path)
        text = path.read_text(encoding="utf-8")
        assert text.count("fill: #2b6cb0") == 6 + 1, "the squares and one in the legend"
        assert text.count("fill: #c3c9d2") == 1 + 2
    with pytest.raises(RosaError, match=r"\.svg or a \.png file, not 'picture.gif'"):
        made(names).picture(tmp_path / "picture.gif")
