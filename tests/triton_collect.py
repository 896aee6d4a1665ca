"""What collects gradients for masks, executed by Triton's interpreter: kernels of generated code, and one that adds to sums.

Run by `test_triton_gradients.py`. Buffers start as NaN. Every element is compared with float64 under the bound of rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from triton_device import seeded
from triton_layers import kernels, operator_calls

import rosa_fx
from rosa_fx.errors import RosaError
from rosa_fx.kernels import gradients, lowering, ops, triton_accumulate
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms import collect
from rosa_fx.kernels.terms.collect import CollectTopK
from rosa_fx.kernels.terms.registry import term

lowering.register()
EPS = 2.0**-24


def exact_and_bound(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """dyᵀ x in float64, and what a float32 sum of exact or rounded products may be off by."""
    size = dy.double().abs().t() @ x.double().abs()
    return dy.double().t() @ x.double(), size * (dy.shape[0] + 2) * EPS


# --- the kernel that adds to a sum --------------------------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 61, 130])


@settings(
    max_examples=24,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@given(
    rows=st.one_of(SIZES, st.sampled_from([127, 128, 129])),
    n=SIZES,
    k=SIZES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    squared=st.booleans(),
    pitch=st.sampled_from([0, 5]),
    turned=st.booleans(),
    wide=st.booleans(),
)
def test_added_in_place(
    rows: int, n: int, k: int, dtype: torch.dtype, squared: bool, pitch: int, turned: bool, wide: bool
) -> None:
    """To each element of a sum whose rows may lie apart, once, and to nothing around it."""
    generator = seeded()
    dy, x = (torch.randn(rows, size, generator=generator).to(dtype) for size in (n, k))
    if turned:
        dy, x = dy.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]
    start = torch.randn(n, k, generator=generator)
    around = torch.full((n + 2, k + pitch), torch.nan)
    total = around[1 : n + 1, :k]
    total.copy_(start)
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            patch.setattr(triton_accumulate, "_reach", lambda tensor: 2**31)
        gradients.add_product(total, dy, x, squared=squared)
    exact, bound = exact_and_bound(dy, x)
    if squared:
        exact, bound = exact.square(), 2 * exact.abs() * bound + bound.square() + EPS * exact.square()
    expected = start.double() + exact
    assert ((total.double() - expected).abs() <= bound + EPS * (expected.abs() + bound)).all()
    assert int(around.isnan().sum()) == around.numel() - total.numel()


def test_the_same_bits_every_time_and_refusals() -> None:
    dy, x = torch.randn(70, 40), torch.randn(70, 33)
    first, second = torch.ones(40, 33), torch.ones(40, 33)
    for total in (first, second):
        triton_accumulate.add_weight_gradient(total, dy, x, squared=True)
    assert torch.equal(first, second)
    for wrong in (first.t().contiguous(), first.double(), torch.ones(33, 40).t()):
        with pytest.raises(RosaError, match=r"total must be float32 \[40, 33\] with adjacent columns"):
            triton_accumulate.add_weight_gradient(wrong, dy, x, squared=True)


class Taker:
    """Adds squares to a sum."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.total = torch.zeros(shape)

    def take(self, gradient: gradients.Gradient) -> None:
        gradient.add_to(self.total, squared=True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each launch of the kernel that adds to sums: whether it squares."""
    found: list[bool] = []
    add = triton_accumulate.add_weight_gradient

    def watched(*args: Any, squared: bool) -> None:
        found.append(squared)
        add(*args, squared=squared)

    monkeypatch.setattr(triton_accumulate, "add_weight_gradient", watched)
    return found


@pytest.mark.parametrize("region", [None, (3, 7, 20, 32)])
def test_factors_leave_the_graph(
    monkeypatch: pytest.MonkeyPatch, launched: list[bool], region: tuple[int, int, int, int] | None
) -> None:
    """No kernel of the graph makes the gradient; the launched one adds its square to the sum, inside of the region."""
    n, k = (20, 32) if region is None else (4, 12)
    dy, x = torch.randn(9, n), torch.randn(9, k)
    taker = Taker((20, 32))
    monkeypatch.setitem(collect.receivers, 7, taker)
    key = Layout((20, 32), torch.float32, base_format("dense"), (term("collect_received"),), region=region).key
    delta = [torch.zeros(1), torch.tensor([7])]
    torch._dynamo.reset()
    with torch.no_grad():
        function = torch.compile(lambda dy, x: ops.linear_grads(dy, x, delta, key)[0], fullgraph=True)
        count, code = run_and_get_code(function, dy, x)
    assert (kernels("\n".join(code)), operator_calls("\n".join(code))) == ([], ["give_product"])
    assert (count.tolist(), launched) == ([1], [True])
    exact, bound = exact_and_bound(dy, x)
    row, row_stop, column, column_stop = region or (0, 20, 0, 32)
    inside = taker.total[row:row_stop, column:column_stop]
    assert ((inside.double() - exact.square()).abs() <= 2 * exact.abs() * bound + bound.square() + EPS * exact.square()).all()
    assert int((taker.total != 0).sum()) == inside.numel()


@pytest.mark.parametrize("mode", ["mean_squared", "mean"])
def test_masks_from_several_backward_calls(launched: list[bool], mode: str) -> None:
    """transform, torch.compile, three backward calls, masks: those of float64 gradients, squared one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, bias=False), nn.Linear(48, 16, bias=False))
    spec = rosa_fx.RosaSpec(base="keep", rank=4, density=0.1, schedule="wl0", grad_mode=mode, targets="*.weight")
    dense = [layer.weight.detach().double().requires_grad_() for layer in model]
    rosa_fx.transform(model, spec)
    schedule = rosa_fx.MaskSchedule(model, micro_batches=3)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True)
    schedule.begin_step()
    totals: list[Any] = [0, 0]
    for _ in range(3):
        x = torch.randn(10, 32)
        compiled(x).square().sum().backward()
        exact = torch.autograd.grad((x.double() @ dense[0].t() @ dense[1].t()).square().sum(), dense)
        totals = [
            total + (part.square() if mode == "mean_squared" else part) for total, part in zip(totals, exact, strict=True)
        ]
    schedule.end_step()
    # The gradient of the first call becomes the sum, and is squared once it is known to be whole.
    assert launched == [False] * 2 + [mode == "mean_squared"] * 4
    for total, mask in zip(totals, rosa_fx.masks(model).values(), strict=True):
        kept = mask.to_dense()
        # The least that is in and the largest that is not may change places within rounding of float32 sums.
        assert total.abs()[kept].min() >= total.abs()[~kept].max() - 1e-5 * total.abs().max()


# --- generated kernels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "shape", "dtype"),
    [(33, (17, 40), torch.bfloat16), (5, (130, 65), torch.float32), (70, (16, 31), torch.float16)],
    ids=str,
)
def test_collected_gradients_and_masks(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The dense gradient in float32 from factors that nobody converts first; the mask from one buffer of its size."""
    torch.manual_seed(0)
    dy, x = torch.randn(rows, shape[0]).to(dtype), torch.randn(rows, shape[1]).to(dtype)
    exact, bound = exact_and_bound(dy, x)
    nnz = exact.numel() // 10

    def collected(kind: str, probe: Tensor) -> tuple[Tensor, str]:
        key = Layout(shape, dtype, base_format("dense"), (term(kind),)).key
        torch._dynamo.reset()
        with torch.no_grad():
            function = torch.compile(lambda dy, x: ops.linear_grads(dy, x, [probe], key)[0], fullgraph=True)
            out, code = run_and_get_code(function, dy, x)
        return out, "\n".join(code)

    gradient, code = collected("collect_gradient", torch.zeros(()).expand(shape))
    assert not operator_calls(code)
    assert len(kernels(code)) == 1
    assert gradient.dtype == torch.float32
    assert ((gradient.double() - exact).abs() <= bound).all()
    encoded, code = collected("collect_topk", torch.zeros(1 + 2 * nnz))
    # The size is taken in the template that multiplies, and the selection is all that follows.
    assert len(kernels(code)) == 1
    assert operator_calls(code) == ["select_mask"]
    assert torch.equal(encoded, CollectTopK.encode(gradient.abs(), nnz))


def test_collected_gradient_of_a_region() -> None:
    dy, x = torch.randn(9, 4), torch.randn(9, 12)
    key = Layout((20, 32), torch.float32, base_format("dense"), (term("collect_gradient"),), region=(3, 7, 20, 32)).key
    probe = torch.zeros(()).expand(20, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        (out,) = torch.compile(lambda dy, x: ops.linear_grads(dy, x, [probe], key), fullgraph=True)(dy, x)
    exact = torch.zeros(20, 32, dtype=torch.float64)
    exact[3:7, 20:] = dy.double().t() @ x.double()
    assert ((out.double() - exact).abs() <= 11 * 2.0**-24 * (dy.abs().t() @ x.abs()).max().double()).all()
