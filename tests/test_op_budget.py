"""The fused operators against float64, under an error budget.

The error of an operator may be at most 1.1 times that of the plain computation in the same low precision, which is a
frozen linear with the sparse and the low-rank product added as adapter libraries do. Both are measured from the same
quantised base, so the error of quantisation is in neither. Errors are RMS over enough elements to be stable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_fx.kernels import ops

MakeCase = Callable[..., Any]


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def plain_linear(x: Tensor, W: Tensor, S: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """What adapter libraries compute, in x's dtype: three products, added."""
    low = x.dtype
    return F.linear(x, W) + F.linear(x, S) + F.linear(F.linear(x, A.to(low)), B.to(low)) * scale


def all_results(case: Any, how: str) -> dict[str, Tensor]:
    """Both products and all gradients, by `how`: exact (float64), plain, fused (linear and linear_t) or eager."""
    dtype = torch.float64 if how == "exact" else case.x.dtype
    W = case.base64.to(dtype) if how == "exact" else case.layout.base.dequantize(case.base, case.layout.shape, dtype)
    wide = how == "exact"
    named = dict(zip(case.names, case.leaves(case.delta64 if wide else case.delta), strict=True))
    A, B, values = named["A"], named["B"], named["values"]
    x, dy = (t.to(dtype).requires_grad_() for t in (case.x.detach(), case.dy.detach()))
    bias = (case.bias.double() if wide else case.bias.clone()).requires_grad_()
    scale, key, delta = case.layout.terms[0].scale, case.layout.key, list(named.values())
    if how in ("exact", "plain"):
        S = torch.zeros_like(W).index_put(case.rows_cols, values.to(dtype))
        y = plain_linear(x, W, S, A, B, scale) + bias.to(dtype)
        out_t = plain_linear(dy, W.t(), S.t(), B.t(), A.t(), scale)
    elif how == "fused":
        y = ops.linear(x, bias, case.base, delta, key)
        out_t = ops.linear_t(dy, None, case.base, delta, key)
    else:
        y = F.linear(x, ops.materialize(case.base, delta, key), bias.to(dtype))
        out_t = dy @ ops.materialize(case.base, delta, key)
    parameters = {"x": x, "bias": bias, "A": A, "B": B, "values": values}
    grads = torch.autograd.grad(y, list(parameters.values()), dy.detach(), retain_graph=True)
    grads_t = torch.autograd.grad(out_t, [dy, A, B, values], x.detach())
    out = {"y": y.detach(), "transposed": out_t.detach()}
    out |= {f"grad of {name}": grad for name, grad in zip(parameters, grads, strict=True)}
    return out | {f"transposed grad of {n}": g for n, g in zip(["dy", "A", "B", "values"], grads_t, strict=True)}


def dense_delta(case: Any) -> Tensor:
    """The sum of all terms, [N, K] in float64."""
    terms = [item.dense(tensors, case.layout.shape, torch.float64) for item, tensors in case.layout.split(case.delta64)]
    return torch.stack(terms).sum(0)


def over_budget(exact: Tensor, ours: Tensor, plain: Tensor, times: float = 1.1) -> str:
    """Empty if within budget. The floor is one float32 rounding: the plain error may be zero by accident."""
    floor = 2.0**-24 * rms(exact)
    error, allowed = rms(ours.double() - exact), times * max(rms(plain.double() - exact), floor)
    return "" if error <= allowed else f"RMS error {error:.3e} > {allowed:.3e} = {times} x the plain computation's"


@pytest.mark.parametrize("how", ["fused", "eager"])
@pytest.mark.parametrize("density", [0.006, 0.3])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_error_budget(
    make_case: MakeCase, base: str, dtype: torch.dtype, adapter_dtype: torch.dtype, density: float, how: str
) -> None:
    """A scale that is no power of two, so that rounding it twice would show."""
    case = make_case((96, 192), base, rank=12, mask=density, m=160, dtype=dtype, adapter_dtype=adapter_dtype)
    exact, ours, plain = (all_results(case, how) for how in ("exact", how, "plain"))
    failures = {name: over_budget(exact[name], ours[name], plain[name]) for name in exact}
    assert not any(failures.values()), {name: text for name, text in failures.items() if text}
    for name, tensor in ours.items():
        assert tensor.dtype == plain[name].dtype, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_small_sparse_step_survives_at_least_as_well_as_in_plain_code(make_case: MakeCase, dtype: torch.dtype) -> None:
    """Folding may round D(Q) + S, adding products rounds y: whichever S the step in y then obeys, ours is the nearer.

    S is of the size of a first optimizer step (2e-4), less than half an ulp of many bf16 weights.
    """
    case = make_case((64, 128), "nf4", terms=("sparse",), mask=0.02, m=1024, dtype=dtype, step=2e-4)
    shape, key, (values, *_) = case.layout.shape, case.layout.key, case.delta
    W = case.layout.base.dequantize(case.base, shape, dtype)
    S = torch.zeros(shape, dtype=dtype).index_put(case.rows_cols, values.to(dtype))

    def error_of_effective(y: Tensor, without: Tensor) -> float:
        effective = torch.linalg.lstsq(case.x.double(), y.double() - without.double()).solution.t()
        return rms(effective[case.rows_cols] - values)

    zero = [torch.zeros_like(values), *case.delta[1:]]
    y, without = (ops.linear(case.x, None, case.base, delta, key) for delta in (case.delta, zero))
    plain = F.linear(case.x, W)
    assert error_of_effective(y, without) <= error_of_effective(plain + F.linear(case.x, S), plain)


@pytest.mark.parametrize("terms", [("low_rank",), ("sparse",), ("low_rank", "sparse")], ids=str)
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_small_step_of_any_term_arrives_in_the_output(
    make_case: MakeCase, base: str, dtype: torch.dtype, terms: tuple[str, ...]
) -> None:
    """B and S are of the size of a first optimizer step (2e-4), and what they add is below half an ulp of most elements of y.

    Added to a y that was rounded before, four fifths of it are lost in bfloat16. The share of it that y shows has a standard
    error of ulp / (sqrt(12) · |step| · sqrt(count)), far below a tenth.
    """
    case = make_case((64, 128), base, terms=terms, rank=8, mask=0.02, m=1024, dtype=dtype, step=2e-4)
    y = ops.linear(case.x, None, case.base, case.delta, case.layout.key)
    exact = case.x.double() @ case.base64.t()
    step = case.x.double() @ (dense_delta(case)).t()
    share = ((y.double() - exact) * step).sum() / step.square().sum()
    assert abs(share - 1) < 0.1


@pytest.fixture
def medium_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("m", [1, 7, 8, 31, 64])
def test_float32_in_medium_precision(make_case: MakeCase, medium_precision: None, m: int) -> None:
    """A few rows of float32 may then be multiplied in bfloat16, if the processor does that: the delta is exact as before."""
    case = make_case((128, 256), "nf4", m=m)
    how = {name: all_results(case, name)["y"] for name in ("exact", "fused")}
    x = case.x.detach()
    base = case.layout.base.dequantize(case.base, case.layout.shape, torch.float32)
    in_bf16 = F.linear(x.bfloat16().double(), base.bfloat16().double()) - F.linear(x.double(), base.double())
    error = rms(how["fused"].double() - how["exact"])
    assert error <= 1.1 * rms(in_bf16) + 2.0**-24 * rms(how["exact"])
    torch.set_float32_matmul_precision("highest")
    exact = rms(all_results(case, "fused")["y"].double() - how["exact"])
    assert exact < 1e-3 * rms(in_bf16)
    lowers = m > 4 and torch.cpu._is_avx512_bf16_supported()
    assert error > 100 * exact if lowers else error == exact
