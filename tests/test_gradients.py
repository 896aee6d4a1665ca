"""Weight gradients that are handed over as factors: added, squared, and seen whole; against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_rosa import spec_of
from torch import Tensor, nn

import rosa_fx
from rosa_fx.kernels.gradients import Given, Gradient, Products
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms import collect
from rosa_fx.kernels.terms.registry import term

EPS = 2.0**-24
N, K, M = 12, 20, 9


def factors(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dy, x = (torch.randn(size, M, generator=generator).to(dtype).t() for size in (rows, columns))
    return dy, x


def dense_of(gradient: Gradient) -> tuple[Tensor, Tensor]:
    """The exact gradient in float64, and a bound of what float32 sums of M products may be off by."""
    if isinstance(gradient, Given):
        exact = gradient.values.double()
        return exact, torch.zeros_like(exact)
    assert isinstance(gradient, Products)
    exact, size = (torch.zeros(gradient.shape, dtype=torch.float64) for _ in range(2))
    for (row, row_stop, column, column_stop), dy, x in gradient.parts:
        exact[row:row_stop, column:column_stop] = dy.double().t() @ x.double()
        size[row:row_stop, column:column_stop] = dy.double().abs().t() @ x.double().abs()
    return exact, size * (M + 2) * EPS


GRADIENTS: dict[str, Callable[[torch.dtype], Gradient]] = {
    "given": lambda dtype: Given(torch.randn(K, N, generator=torch.Generator().manual_seed(1)).to(dtype).t()),
    "whole": lambda dtype: Products((N, K), [((0, N, 0, K), *factors(N, K, dtype))]),
    "region": lambda dtype: Products((N, K), [((3, 8, 4, 20), *factors(5, 16, dtype))]),
    "matrices": lambda dtype: Products(
        (N, K), [((0, 4, 0, K), *factors(4, K, dtype, 1)), ((8, 12, 0, K), *factors(4, K, dtype, 2))]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_sums_squares_and_the_whole(kind: str, dtype: torch.dtype) -> None:
    gradient = GRADIENTS[kind](dtype)
    exact, bound = dense_of(gradient)
    whole = gradient.dense()
    assert (whole.dtype, whole.is_contiguous()) == (torch.float32, True)
    assert ((whole.double() - exact).abs() <= bound).all()
    whole.fill_(torch.nan)  # it belongs to who asked; the gradient is as it was
    start = torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    total = start.clone()
    gradient.add_to(total, squared=False)
    expected = start.double() + exact
    assert ((total.double() - expected).abs() <= bound + EPS * expected.abs()).all()
    total = start.clone()
    gradient.add_to(total, squared=True)
    expected = start.double() + exact.square()
    off = 2 * exact.abs() * bound + bound.square() + 2 * EPS * exact.square()
    assert ((total.double() - expected).abs() <= off + EPS * expected.abs()).all()


def test_squares_of_small_float16_gradients_do_not_underflow() -> None:
    tiny = torch.full((2, 3), 2.0**-14, dtype=torch.float16)
    products = Products((2, 3), [((0, 2, 0, 3), tiny[:, :1].t(), torch.ones(1, 3).half())])
    gradients: list[Gradient] = [Given(tiny), products]
    for gradient in gradients:
        total = torch.zeros(2, 3)
        gradient.add_to(total, squared=True)
        assert torch.equal(total, torch.full((2, 3), 2.0**-28))


class Taker:
    """Keeps what it is given, squared."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.total = torch.zeros(shape)
        self.kinds: list[str] = []

    def take(self, gradient: Gradient) -> None:
        self.kinds.append(type(gradient).__name__)
        gradient.add_to(self.total, squared=True)


@pytest.fixture
def taker(monkeypatch: pytest.MonkeyPatch) -> Taker:
    found = Taker((N, K))
    monkeypatch.setitem(collect.receivers, 7, found)
    return found


@pytest.mark.parametrize("twice", [False, True])
def test_matrices_of_a_stack_are_handed_over_as_factors(taker: Taker, twice: bool) -> None:
    """Unless one matrix has two summands, which are added before they are squared."""
    pieces = [(0, *factors(4, K, seed=1)), (0 if twice else 2, *factors(4, K, seed=2))]
    (count,) = term("collect_received").grads_of_stack(pieces, [torch.zeros(1), torch.tensor([7])], (N, K), 3)
    assert count.tolist() == [1]
    exact = torch.zeros(3, 4, K, dtype=torch.float64)
    for index, dy, x in pieces:
        exact[index] += dy.double().t() @ x.double()
    assert taker.kinds == ["Given" if twice else "Products"]
    torch.testing.assert_close(taker.total.double(), exact.view(N, K).square(), rtol=1e-5, atol=1e-6)


def test_region_is_handed_over_as_it_is(taker: Taker) -> None:
    dy, x = factors(5, K)
    probe, number = torch.zeros(1), torch.tensor([7])
    count = torch.ops.rosa_fx.give_product(dy, x, probe, number, [N, K], [3, 8, 0, K])
    assert (count.tolist(), taker.kinds) == ([1], ["Products"])
    assert torch.equal(taker.total[3:8] > 0, torch.ones(5, K, dtype=torch.bool))
    assert not taker.total[:3].any()
    assert not taker.total[8:].any()


def test_receivers_number_stays_on_the_host(taker: Taker) -> None:
    """It is read in every step: on the weight's device that would wait for all that was asked of it."""
    model = rosa_fx.transform(nn.Sequential(nn.Linear(8, 8)), spec_of(schedule="wl0", targets="*.weight"))
    with torch.device("meta"):  # where tensors go that do not say
        rosa_fx.MaskSchedule(model, micro_batches=2).begin_step()
    weight: Any = rosa_fx.adapter(model, "0.weight")
    layout = Layout.parse(weight.topk_key)
    assert [name for item in layout.terms for name in item.tensor_names][-2:] == ["probe", "number"]
    model.to(torch.float16)
    assert (weight.receiver.device.type, weight.receiver.dtype) == ("cpu", torch.int64)
    assert collect.receivers[int(weight.receiver)] is not None
    # Tensors of the meta device have no values: to read one raises.
    taker.total = taker.total.to("meta")
    dy, x, probe = (tensor.to("meta") for tensor in (*factors(N, K), torch.zeros(1)))
    count = collect.hand_over(Products((N, K), [((0, N, 0, K), dy, x)]), probe, torch.tensor([7]))
    assert (count.device.type, taker.kinds) == ("meta", ["Products"])
    with pytest.raises(RuntimeError, match="meta"):
        int(count)
