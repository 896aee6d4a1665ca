"""What Inductor generates for the gradients of adapters, executed by Triton's interpreter. Run by `test_triton_gradients.py`.

Buffers start as NaN. Every element is compared with float64 under the bound of rounding analysis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from triton_device import INTERPRETED, seeded
from triton_layers import kernels, operator_calls

from rosa_fx.kernels import inductor, lower_grads, lowering, ops
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.registry import term
from rosa_fx.mask import Mask

lowering.register()
SCALE = 1.3


@dataclass
class Case:
    """Factors dy [M, N] and x [M, K] of a weight gradient, and the adapter that wants its part of it."""

    dy: Tensor
    x: Tensor
    A: Tensor
    B: Tensor
    values: Tensor
    mask: Mask
    region: tuple[int, int, int, int] | None = None
    only_sparse: bool = False

    @property
    def layout(self) -> Layout:
        terms = (term("sparse"),) if self.only_sparse else (term("low_rank", scale=SCALE), term("sparse"))
        return Layout(self.mask.shape, self.x.dtype, base_format("dense"), terms, region=self.region)

    @property
    def delta(self) -> list[Tensor]:
        sparse = [self.values, self.mask.row_offsets, self.mask.cols]
        return sparse if self.only_sparse else [self.A, self.B, *sparse]

    def compiled(self, **options: Any) -> tuple[list[Tensor], str]:
        """The gradients from generated code, and the code."""
        key = self.layout.key
        torch._dynamo.reset()
        with torch.no_grad():
            function = torch.compile(lambda dy, x, delta: ops.linear_grads(dy, x, delta, key), fullgraph=True, **options)
            out, code = run_and_get_code(function, self.dy, self.x, self.delta)
        return out, "\n".join(code)

    def expected(self) -> list[tuple[Tensor, Tensor]]:
        """Exact value and largest error of each gradient, in float64.

        Errors: roundings to the dtype on the longest way (factor, its scaling, thin product, result), and float32 sums.
        """
        row, row_stop, column, column_stop = self.region or (0, self.mask.shape[0], 0, self.mask.shape[1])
        flat = [t.reshape(-1, t.shape[-1]).double() for t in (self.dy, self.x)]
        low = torch.finfo(self.x.dtype).eps / 2
        single = torch.finfo(torch.float32).eps / 2

        def gradients(dy: Tensor, x: Tensor, A: Tensor, B: Tensor) -> list[Tensor]:
            dW = torch.zeros(self.mask.shape, dtype=torch.float64)
            dW[row:row_stop, column:column_stop] = dy.t() @ x
            dS = dW[self.mask.rows(), self.mask.cols.long()]
            return [dS] if self.only_sparse else [SCALE * B.t() @ dW, SCALE * dW @ A.t(), dS]

        exact = gradients(*flat, self.A.double(), self.B.double())
        size = gradients(*(t.abs() for t in (*flat, self.A.double(), self.B.double())))
        sums = (flat[0].shape[0] + sum(self.mask.shape) + 8) * single
        bounds = [part * (4 * low + sums) for part in size[:-1]]
        bounds.append(size[-1] * sums)
        own = [torch.finfo(t.dtype).eps / 2 for t in self.delta if t.is_floating_point()]
        tiny = torch.finfo(torch.float16).tiny if self.x.dtype == torch.float16 else torch.finfo(torch.float32).tiny
        return [(e, b + eps * e.abs() + tiny) for e, b, eps in zip(exact, bounds, own, strict=True)]


def build(
    rows: int,
    shape: tuple[int, int],
    *,
    rank: int = 4,
    entries: str = "random",
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    region: tuple[int, int, int, int] | None = None,
    only_sparse: bool = False,
) -> Case:
    """Random operands. `entries`: "none", "random" (a fifth), "one row", "one entry" or "empty rows" (every other)."""
    generator = seeded()

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    n, k = shape
    chosen = torch.rand(shape, generator=generator) < 0.2
    if entries in ("none", "one row", "one entry"):
        chosen[:] = False
    if entries == "one row":
        chosen[n // 2] = True
    if entries == "one entry":
        chosen[n - 1, k // 2] = True
    if entries == "empty rows":
        chosen[::2] = False
    mask = Mask.from_dense(chosen)
    row, row_stop, column, column_stop = region or (0, n, 0, k)
    return Case(
        randn(rows, row_stop - row).to(dtype),
        randn(rows, column_stop - column).to(dtype),
        (randn(rank, k) * k**-0.5).to(adapter_dtype),
        (randn(n, rank) * 0.1).to(adapter_dtype),
        (randn(mask.nnz) * 0.1).to(adapter_dtype),
        mask,
        region,
        only_sparse,
    )


def check(case: Case, **options: Any) -> str:
    """Compare with the exact gradients, element by element; the generated code."""
    out, code = case.compiled(**options)
    for name, got, (exact, bound) in zip("SABS"[-len(out) :], out, case.expected(), strict=True):
        assert got.shape == exact.shape
        worst = ((got.double() - exact).abs() / bound).max().item() if exact.numel() else 0.0
        assert worst <= 1, f"d{name}: {worst:.3g} times the bound of rounding"
    return code


def lowered(code: str) -> bool:
    """Nothing of the operator is called, and the sampled product is the template's."""
    return not operator_calls(code) and sum("_tem_" in name for name in kernels(code)) == 1


SIZES = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 32, 33, 61])


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@given(
    rows=st.one_of(SIZES, st.sampled_from([127, 128, 129])),
    n=SIZES,
    k=SIZES,
    rank=st.sampled_from([0, 1, 5, 16]),
    entries=st.sampled_from(["none", "random", "one row", "one entry", "empty rows"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    adapter_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    only_sparse=st.booleans(),
)
def test_any_shape(
    rows: int, n: int, k: int, rank: int, entries: str, dtype: torch.dtype, adapter_dtype: torch.dtype, only_sparse: bool
) -> None:
    case = build(rows, (n, k), rank=rank, entries=entries, dtype=dtype, adapter_dtype=adapter_dtype, only_sparse=only_sparse)
    code = check(case)
    assert not operator_calls(code)
    assert sum("_tem_" in name for name in kernels(code)) == (case.mask.nnz > 0)


def test_wide_weights() -> None:
    """Columns above 32,767, of which few are in the mask."""
    case = build(5, (3, 40_000), entries="none", only_sparse=True)
    chosen = torch.zeros(3, 40_000, dtype=torch.bool)
    chosen[0, [0, 32_767, 32_768, 39_999]] = True
    chosen[2, [1, 39_998]] = True
    case.mask = Mask.from_dense(chosen)
    case.values = torch.zeros(6)
    assert lowered(check(case))


def test_batches_strides_and_regions() -> None:
    case = build(12, (20, 32))
    case.dy, case.x = case.dy.view(3, 4, 20), case.x.view(3, 4, 32)
    assert lowered(check(case))
    case = build(12, (20, 32))
    case.dy = case.dy.t().contiguous().t()
    case.x = torch.randn(12, 64)[:, ::2]
    assert lowered(check(case))
    for region in ((5, 12, 0, 32), (2, 4, 31, 32)):
        assert lowered(check(build(12, (20, 32), region=region)))


def test_layers_with_one_input_share_its_transpose() -> None:
    first, second = build(9, (20, 32), only_sparse=True), build(9, (24, 32), only_sparse=True)
    keys = first.layout.key, second.layout.key

    def both(x: Tensor, dys: list[Tensor], deltas: list[list[Tensor]]) -> list[Tensor]:
        x = x * 2
        return [ops.linear_grads(dy, x, delta, key)[0] for dy, delta, key in zip(dys, deltas, keys, strict=True)]

    torch._dynamo.reset()
    with torch.no_grad():
        out, code = run_and_get_code(
            torch.compile(both, fullgraph=True), first.x, [first.dy, second.dy], [first.delta, second.delta]
        )
    second.x = first.x
    for got, case in zip(out, (first, second), strict=True):
        exact, bound = case.expected()[0]
        assert ((got.double() - 2 * exact).abs() <= 2 * bound).all()
    pointwise = [name for name in kernels("\n".join(code)) if "_tem_" not in name]
    # x * 2, and one transpose each of it and of both dy; on a GPU the first two may be one kernel.
    assert len(pointwise) == 4 or (len(pointwise) == 3 and not INTERPRETED), pointwise


def test_dynamic_rows_and_repeated_results() -> None:
    """One graph for every number of rows, and the same bits every time."""
    case = build(9, (20, 32))
    key, delta = case.layout.key, case.delta
    torch._dynamo.reset()
    function = torch.compile(lambda dy, x: ops.linear_grads(dy, x, delta, key), fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (9, 5, 133):
            case.dy, case.x = torch.randn(rows, 20), torch.randn(rows, 32)
            out, again = function(case.dy, case.x), function(case.dy, case.x)
            for got, twin, (exact, bound) in zip(out, again, case.expected(), strict=True):
                assert ((got.double() - exact).abs() <= bound).all()
                assert torch.equal(got, twin)


def test_autotuning_times_the_chunks_and_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = [lower_grads.Chunk(8, 16, 4), lower_grads.Chunk(4, 32, 1)]
    monkeypatch.setattr(lower_grads, "chunks", lambda rows, nnz: choices)
    case = build(33, (20, 32), only_sparse=True)
    # As they are wanted: kernels that only transpose would be timed, too.
    case.dy, case.x = (factor.t().contiguous().t() for factor in (case.dy, case.x))
    code = check(case, options={"max_autotune": True, "autotune_local_cache": False})
    assert lowered(code)


def test_what_is_not_lowered_calls_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(3, (8, 32))
    case.dy, case.x = case.dy.double(), case.x.double()
    _, code = case.compiled()
    assert operator_calls(code)
    monkeypatch.setattr(inductor, "generates_triton", lambda device: False)
    assert operator_calls(check(build(3, (8, 32))))
