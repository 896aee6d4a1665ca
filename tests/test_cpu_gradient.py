"""Dense weight gradients on the CPU: against float64, against plain torch, and bit for bit over threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from allocations import Allocations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_layouts import laid_out
from torch import Tensor

from rosa_fx.errors import RosaError
from rosa_fx.kernels.cpu import gradient, sparse
from rosa_fx.kernels.cpu.gradient import add_weight_gradient, weight_gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(["rows", "columns", "strided", "expanded"])
sides = st.one_of(st.integers(0, 140), st.sampled_from([255, 256, 257, 383, 384, 385, 521]))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def plain(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.to(dtype).t() @ x.to(dtype)


def with_threads(threads: int, dy: Tensor, x: Tensor) -> Tensor:
    torch.set_num_threads(threads)
    return weight_gradient(dy, x)


@FUZZ
@given(
    st.sampled_from([0, 1, 2, 3, 15, 16, 17, 31, 97, 127, 128, 129, 255, 256, 257, 385, 1031]),
    sides,
    sides,
    dtypes,
    dtypes,
    layouts,
    layouts,
    st.integers(0, 2**31),
)
def test_every_way(M: int, N: int, K: int, dy_t: torch.dtype, x_t: torch.dtype, dy_l: str, x_l: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dy = laid_out(torch.randn(M, N, generator=generator).to(dy_t), dy_l)
    x = laid_out(torch.randn(M, K, generator=generator).to(x_t), x_l)
    exact, size = plain(dy, x, torch.float64), plain(dy.abs(), x.abs(), torch.float64)
    theirs = (plain(dy, x, torch.float32) - exact).norm()
    out = weight_gradient(dy, x)
    assert (out.dtype, out.shape, out.is_contiguous()) == (torch.float32, (N, K), True)
    assert (out - exact).norm() <= 1.1 * theirs + EPS / 4 * size.norm()
    # One value: a bound that holds for every order of summation with at most 300 roundings on any path.
    assert bool(((out - exact).abs() <= 300 * EPS * size).all())
    assert all(torch.equal(out, with_threads(threads, dy, x)) for threads in (1, 3, 8))

    # Into part of a tensor, whatever it held, and nothing beside it.
    wide = torch.full((N, K + 5), float("nan"))
    library = sparse.native(wide)
    assert library is not None
    gradient._run(library, dy, x, wide[:, 2 : K + 2], gradient._STORE)
    assert torch.equal(wide[:, 2 : K + 2], out)
    assert torch.equal(weight_gradient(dy, x, absolute=True), out.abs())
    assert bool(wide[:, [0, 1, -3, -2, -1]].isnan().all())

    before = torch.randn(N, K, generator=generator)
    for squared in (False, True):
        wide[:, 2 : K + 2] = before
        add_weight_gradient(wide[:, 2 : K + 2], dy, x, squared=squared)
        added = wide[:, 2 : K + 2].double()
        right = before.double() + (out.double().square() if squared else out.double())
        assert bool(((added - right).abs() <= 1.5 * EPS * (before.abs() + (out.square() if squared else out.abs()))).all())
        assert bool(wide[:, [0, 1, -3, -2, -1]].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "K"), [(40, 300, 270), (700, 257, 331), (9001, 67, 101), (40001, 9, 50)])
def test_as_exact_as_torch(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    """All sums are float32's: no worse than the product of converted factors, however long they are."""
    generator = torch.Generator().manual_seed(M)
    dy, x = (torch.randn(M, n, generator=generator).to(dtype) for n in (N, K))
    exact = plain(dy, x, torch.float64)
    ours, theirs = (weight_gradient(dy, x) - exact).norm(), (plain(dy, x, torch.float32) - exact).norm()
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squares_are_of_the_whole_sum_and_do_not_underflow(dtype: torch.dtype) -> None:
    dy, x = torch.full((700, 20), 2.0**-12, dtype=dtype), torch.ones(700, 60, dtype=dtype)
    dy[350:] = -(2.0**-13)
    total = torch.zeros(20, 60)
    for _ in range(2):
        add_weight_gradient(total, dy, x, squared=True)
    assert torch.equal(total, torch.full((20, 60), 2 * (350 * 2.0**-13) ** 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_and_nan_reach_their_rows_and_columns_only(dtype: torch.dtype) -> None:
    for M in (1, 65, 301):
        dy, x = torch.ones(M, 19, dtype=dtype), torch.ones(M, 53, dtype=dtype)
        dy[M - 1, 18], x[M // 2, 52] = float("inf"), float("nan")
        out = weight_gradient(dy, x)
        assert bool((out[:18, :52] == M).all())
        assert bool((out[18, :52] == float("inf")).all())
        assert bool(out[:, 52].isnan().all())


def test_every_half_precision_value_is_read_exactly() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = bits.view(dtype)[None]
        for x in (values, values.t().contiguous().t(), values.expand(17, -1)):
            dy = torch.zeros(x.shape[0], 1)
            dy[-1] = 1
            finite = values[0].isfinite()
            assert torch.equal(weight_gradient(dy, x)[0, finite], values[0].float()[finite])


def test_nothing_of_the_size_of_the_sum_is_made() -> None:
    dy, x, total = torch.randn(900, 1024).bfloat16(), torch.randn(900, 1024).bfloat16(), torch.zeros(1024, 1024)
    with Allocations() as seen:
        add_weight_gradient(total, dy, x, squared=True)
    assert seen.peak == 0
    assert sparse.native(total) is not None
    with Allocations() as seen:
        gradient._add_torch(total, dy, x, squared=True)
    assert 0 < seen.peak < 1.1 * 4 * gradient._CHUNK + 4 * 1024 * 1024


def test_without_a_compiler_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "native", lambda *tensors: None)
    monkeypatch.setattr(gradient, "_CHUNK", 500)
    generator = torch.Generator().manual_seed(0)
    for dtype in (*DTYPES, torch.float64):
        dy, x = torch.randn(90, 37, generator=generator).to(dtype), torch.randn(90, 61, generator=generator).to(dtype)
        exact, out, total = plain(dy, x, torch.float64), weight_gradient(dy, x), torch.ones(37, 80)[:, :61]
        assert out.dtype == torch.float32
        assert torch.equal(weight_gradient(dy, x, absolute=True), out.abs())
        assert bool(((out - exact).abs() <= 90 * EPS * plain(dy.abs(), x.abs(), torch.float64)).all())
        add_weight_gradient(total, dy, x, squared=True)
        torch.testing.assert_close(total, 1 + out.square())
        add_weight_gradient(total, dy, x, squared=False)
        torch.testing.assert_close(total, 1 + out.square() + out)


def test_float64_factors_give_a_float32_gradient() -> None:
    ones = torch.ones(8, 3, dtype=torch.float64)
    assert weight_gradient(ones, ones).equal(torch.full((3, 3), 8.0))


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(RosaError, match=r"share M, got \[8, 2\] and \[9, 3\]"):
        weight_gradient(torch.zeros(8, 2), torch.zeros(9, 3))
    for total in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(3, 2).t()):
        with pytest.raises(RosaError, match=r"total must be float32 \[2, 3\] with adjacent columns"):
            add_weight_gradient(total, torch.zeros(8, 2), torch.zeros(8, 3), squared=True)
