"""Products with stacks of matrices: the operators against their definition in float64, and what a stack's parts cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Case, build_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rosa_fx.kernels import grouped_ops
from rosa_fx.kernels.bases.base import BaseFormat, base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.stack import Stack

ops = torch.ops.rosa_fx

FORMATS = {
    "keep": base_format("dense"),
    "nf4": base_format("nf4", blocksize=64),
    "fp4 double": base_format("fp4", blocksize=32, double_quant=True),
    "int8": base_format("int8"),
}


def stacked(stack: int, rows: int, columns: int, base: str = "dense", rank: int = 2, seed: int = 0, **fields: Any) -> Case:
    """A stack of matrices with a low-rank term each."""
    case = build_case((stack * rows, columns), base, rank=rank, seed=seed, **fields)
    generator = torch.Generator().manual_seed(seed + 1)
    dtype = case.delta[0].dtype
    A = torch.randn(stack, rank, columns, generator=generator).mul_(columns**-0.5).to(dtype)
    B = torch.randn(stack, rows, rank, generator=generator).mul_(0.02).to(dtype)
    return replace(case, layout=replace(case.layout, stack=stack), delta=[A, B, *case.delta[2:]])


def groups(
    kind: str, stack: int, count: int, generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """(offs, index, the leading sizes of x) with `count` rows or so; some matrices get no row."""
    chosen = torch.randint(stack, (count,), generator=generator)
    if kind == "index":
        return None, torch.where(chosen % 2 == 0, chosen, chosen - stack), (count,)
    if kind == "index, several rows":
        return None, chosen, (count, 3)
    if kind == "offs":
        counts = torch.bincount(chosen, minlength=stack)
        return counts.cumsum(0).to(torch.int32), None, (count + 2,)
    return None, None, (stack, count)


KINDS = ("batch", "offs", "index", "index, several rows")


def plain(x: Tensor, offs: Tensor | None, index: Tensor | None, weights: Tensor) -> Tensor:
    """Row by row: x meets the transposed matrices."""
    if offs is None and index is None:
        return x @ weights.mT
    if offs is not None:
        rows = torch.searchsorted(offs.long(), torch.arange(len(x)), right=True)
        weights = torch.cat([weights, torch.zeros_like(weights[:1])])  # rows behind the last group
    else:
        assert index is not None
        rows = index
    wide = x if x.dim() == 3 else x[:, None]
    return (wide @ weights[rows].mT).view(*x.shape[:-1], -1)


def budget(ours: Tensor, theirs: Tensor, truth: Tensor, factor: float) -> None:
    assert ours.shape == truth.shape
    if not ours.numel():
        return
    size = truth.pow(2).mean().sqrt()
    floor = size * torch.finfo(ours.dtype).eps / 2
    allowed = factor * torch.maximum((theirs.double() - truth).pow(2).mean().sqrt(), floor)
    assert (ours.double() - truth).pow(2).mean().sqrt() <= allowed


def check(case: Case, kind: str, count: int, factor: float, region: tuple[int, int, int, int] | None = None) -> None:
    layout = case.layout if region is None else case.layout.part_of_each(region)
    layout64, generator = layout.with_dtype(torch.float64), torch.Generator().manual_seed(3)
    offs, index, lead = groups(kind, layout.stack, count, generator)
    rows, columns = layout.each_shape
    x = torch.randn(*lead, columns, generator=generator).to(case.x.dtype)
    dy = torch.randn(*lead, rows, generator=generator).to(case.x.dtype)
    shape = layout.stack, -1, layout.shape[1]
    dense = ops.materialize(case.base, case.delta64, replace(layout64, region=None).key).view(shape)
    part = dense if region is None else dense[:, region[0] : region[1], region[2] : region[3]]

    truth = grouped_ops.define_linear(x.double(), offs, index, case.base, case.delta64, layout64)
    torch.testing.assert_close(truth, plain(x.double(), offs, index, part))
    ours = ops.grouped_linear(x, offs, index, case.base, case.delta, layout.key)
    budget(ours, plain(x, offs, index, part.to(x.dtype)), truth, factor)

    truth = grouped_ops.define_linear_t(dy.double(), offs, index, case.base, case.delta64, layout64)
    torch.testing.assert_close(truth, plain(dy.double(), offs, index, part.mT))
    ours = ops.grouped_linear_t(dy, offs, index, case.base, case.delta, layout.key)
    budget(ours, plain(dy, offs, index, part.mT.to(dy.dtype)), truth, factor)

    # Of the gradients: against autograd through the dense weight, in float64 and in the precision of the operands.
    grads = ops.grouped_linear_grads(dy, x, offs, index, case.delta, layout.key)
    defined = grouped_ops.define_grads(dy.double(), x.double(), offs, index, case.delta64, layout64)
    exact = autograd(case, x.double(), dy.double(), offs, index, region, torch.float64)
    theirs = autograd(case, x, dy, offs, index, region, x.dtype)
    for ours, first, second, other in zip(grads, defined, exact, theirs, strict=True):
        torch.testing.assert_close(first, second)
        budget(ours, other, second, factor)


def autograd(
    case: Case, x: Tensor, dy: Tensor, offs: Tensor | None, index: Tensor | None, region: Any, dtype: torch.dtype
) -> list[Tensor]:
    leaves = [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in case.delta]
    A, B, values = leaves[:3]
    rows, cols = case.rows_cols
    S = torch.zeros(case.layout.shape, dtype=dtype).index_put((rows, cols), values)
    scale = case.layout.terms[0].fields()["scale"]
    dense = case.base64.to(dtype) + S + (scale * (B @ A)).reshape(case.layout.shape)
    weights = dense.view(case.layout.stack, -1, case.layout.shape[1])
    if region is not None:
        weights = weights[:, region[0] : region[1], region[2] : region[3]]
    return list(torch.autograd.grad(plain(x, offs, index, weights), [A, B, values], dy))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_products_and_gradients_within_the_budget(kind: str, base: str, poison: None) -> None:
    check(stacked(5, 24, 20, base), kind, 11, 2.0)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    stack=st.integers(2, 5),
    rows=st.sampled_from([1, 2, 7, 16]),
    columns=st.sampled_from([1, 3, 13, 32]),
    count=st.sampled_from([0, 1, 4, 17]),
    mask=st.sampled_from([0.0, 0.1, 1.0]),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shapes(kind: str, stack: int, rows: int, columns: int, count: int, mask: float, double: bool, seed: int) -> None:
    case = stacked(stack, rows, columns, "nf4", rank=1, mask=mask, double_quant=double, seed=seed)
    if count:
        # A single value or two may be rounded luckily by the other side: what counts is the size of the result then.
        check(case, kind, count, 8.0)
        return
    offs, index, lead = groups(kind, stack, 0, torch.Generator().manual_seed(seed))
    x, dy = torch.zeros(*lead, columns), torch.zeros(*lead, rows)
    assert ops.grouped_linear(x, offs, index, case.base, case.delta, case.layout.key).shape == dy.shape
    assert all(not g.any() for g in ops.grouped_linear_grads(dy, x, offs, index, case.delta, case.layout.key))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("region", [(0, 8, 0, 20), (8, 24, 0, 20), (0, 24, 3, 17), (5, 6, 0, 1)])
def test_the_same_part_of_each_matrix(kind: str, region: tuple[int, int, int, int], poison: None) -> None:
    check(stacked(3, 24, 20, "nf4"), kind, 9, 2.0, region)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_keeps_an_early_delta(kind: str, poison: None) -> None:
    check(stacked(3, 32, 64, "nf4", dtype=torch.bfloat16, weight_dtype=torch.bfloat16), kind, 40, 1.1)


@pytest.mark.parametrize("region", [None, (0, 12, 0, 20), (12, 24, 2, 9), (14, 23, 0, 20), (6, 30, 0, 20), (3, 36, 1, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_stack_in_a_plain_product(region: tuple[int, int, int, int] | None, dtype: torch.dtype, poison: None) -> None:
    """A product with one matrix, a part of one, or rows of several; the definition knows of no stacks there."""
    case = stacked(3, 12, 20, "nf4", dtype=dtype)
    layout = case.layout if region is None else case.layout.part(region)
    rows, columns = layout.out_shape
    row, row_stop, column, column_stop = region or (0, 36, 0, 20)
    x, dy = torch.randn(4, 7, columns).to(dtype), torch.randn(4, 7, rows).to(dtype)
    dense = ops.materialize(case.base, case.delta64, case.layout.with_dtype(torch.float64).key)
    part = dense[row:row_stop, column:column_stop]
    factor = 2.0 if dtype == torch.float32 else 1.1
    y = ops.linear(x, case.bias[:rows], case.base, case.delta, layout.key)
    budget(y, torch.addmm(case.bias[:rows].to(dtype), x.view(28, -1), part.t().to(dtype)).view_as(y),
           x.double() @ part.t() + case.bias[:rows], factor)  # fmt: skip
    dx = ops.linear_t(dy, None, case.base, case.delta, layout.key)
    budget(dx, dy @ part.to(dtype), dy.double() @ part, factor)
    grads = ops.linear_grads(dy, x, case.delta, layout.key)
    dW = torch.zeros(36, 20, dtype=torch.float64)
    dW[row:row_stop, column:column_stop] = dy.double().view(28, -1).t() @ x.double().view(28, -1)
    truth = ops.materialize_backward(dW, case.delta64, case.layout.key)
    narrow = ops.materialize_backward(dW.to(dtype), case.delta, case.layout.key)
    for ours, theirs, right in zip(grads, narrow, truth, strict=True):
        budget(ours, theirs, right, 4.0 if dtype == torch.float32 else 2.0)


def test_autograd_of_the_operators() -> None:
    case = stacked(3, 6, 5)
    layout = case.layout.with_dtype(torch.float64)
    offs = torch.tensor([2, 2, 7])
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    leaves = case.leaves(case.delta64)
    y = ops.grouped_linear(x, offs, None, [case.base64], leaves, layout.key)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *leaves[:3]], dy)
    other = torch.autograd.grad(
        ops.grouped_linear_t(dy.requires_grad_(), offs, None, [case.base64], leaves, layout.key), [dy, *leaves[:3]], x.detach()
    )
    torch.testing.assert_close(got[0], ops.grouped_linear_t(dy, offs, None, [case.base64], leaves, layout.key))
    torch.testing.assert_close(other[0], y)
    torch.testing.assert_close(got[1:], other[1:])
    dy, x = dy.detach().float(), x.detach().float()
    torch.library.opcheck(grouped_ops.grouped_linear, (x, offs, None, case.base, case.delta, case.layout.key))
    torch.library.opcheck(grouped_ops.grouped_linear_grads, (dy, x, offs, None, case.delta, case.layout.key))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (4, 24), (3, 7), (1, 1), (5, 13)])
def test_part_of_a_base_is_bit_for_bit_that_of_the_whole(name: str, rows: int, columns: int) -> None:
    form: BaseFormat = FORMATS[name]
    weight = torch.randn(4 * rows, columns)
    tensors = form.quantize(weight)
    whole = form.dequantize(tensors, weight.shape, torch.float32)
    plain_form, plain_tensors = form.plain(tensors)
    for index in range(4):
        start, stop = index * rows, (index + 1) * rows
        found, parts = plain_form.part(plain_tensors, weight.shape, start, stop)
        for dtype in (torch.float32, torch.bfloat16):
            expected = (
                whole[start:stop] if dtype == torch.float32 else form.dequantize(tensors, weight.shape, dtype)[start:stop]
            )
            assert torch.equal(found.dequantize(parts, (rows, columns), dtype), expected)


def test_matrices_without_rows_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = stacked(6, 8, 16, "nf4")
    asked: list[int] = []
    matrix = Stack.matrix

    def counted(self: Stack, index: int, region: Any) -> Any:
        asked.append(index)
        return matrix(self, index, region)

    monkeypatch.setattr(Stack, "matrix", counted)
    x = torch.randn(5, 16)
    ops.grouped_linear(x, torch.tensor([0, 3, 3, 3, 5, 5]), None, case.base, case.delta, case.layout.key)
    ops.grouped_linear(x, None, torch.tensor([4, 1, 1, -2, 4]), case.base, case.delta, case.layout.key)
    assert asked == [1, 4, 1, 4]


def test_scratch_is_that_of_one_matrix() -> None:
    case = stacked(16, 64, 64, "nf4", mask=0.01)
    x = torch.randn(16, 1, 64)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point() and func not in (ops.grouped_linear.default,):
                largest = max(largest, out.untyped_storage().nbytes() if out._base is None else 0)
            return out

    layout = Layout.parse(case.layout.key)
    with Largest():
        grouped_ops._grouped(x, None, None, case.base, case.delta, layout, False)
    assert 0 < largest <= 64 * 64 * 4


def test_groups_stay_outside_cuda_graphs() -> None:
    """Their ends are read on the host: a capture that held the operator would fail."""
    for name in ("grouped_linear", "grouped_linear_t", "grouped_linear_grads"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.rosa_fx, name).default.tags
