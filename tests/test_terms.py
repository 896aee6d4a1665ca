"""Terms and layouts against straight transcriptions of their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rosa_fx.errors import RosaError
from rosa_fx.kernels import definition, ops
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.base import Term
from rosa_fx.kernels.terms.collect import CollectGradient, CollectTopK
from rosa_fx.kernels.terms.registry import TERMS, term

MakeCase = Callable[..., Any]


# --- the definition itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_definition_is_the_formula(make_case: MakeCase, base: str) -> None:
    """y = x (D(Q) + S)ᵀ + s (x Aᵀ) Bᵀ + b and its gradients, entry by entry, in float64."""
    case = make_case((6, 9), base, m=4)
    A, B, values, offsets, cols = case.delta64
    scale, x, dy, bias = case.layout.terms[0].scale, case.x.double(), case.dy.double(), case.bias.double()
    D = case.base64
    entries = [(row, int(cols[j])) for row in range(6) for j in range(int(offsets[row]), int(offsets[row + 1]))]
    S = torch.zeros(6, 9, dtype=torch.float64)
    for (row, col), value in zip(entries, values, strict=True):
        S[row, col] += value
    arguments = (case.base, case.delta64, case.layout64)
    expected = x @ (D + S).t() + scale * (x @ A.t()) @ B.t() + bias
    torch.testing.assert_close(definition.linear(x, bias, *arguments), expected, rtol=1e-13, atol=1e-14)
    dx = dy @ (D + S) + scale * (dy @ B) @ A
    torch.testing.assert_close(definition.linear_t(dy, None, *arguments), dx, rtol=1e-13, atol=1e-14)
    W = D + S + scale * B @ A
    torch.testing.assert_close(definition.materialize(*arguments), W, rtol=1e-13, atol=1e-14)
    dA, dB = scale * (dy @ B).t() @ x, scale * dy.t() @ (x @ A.t())
    dS = torch.stack([sum(dy[m, row] * x[m, col] for m in range(4)) for row, col in entries])
    grads = definition.linear_grads(dy, x, case.delta64, case.layout64)
    for ours, exact in zip(grads, (dA, dB, dS), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["low_rank", "sparse"])
def test_fold_adds_the_dense_term_and_rounds_once(make_case: MakeCase, kind: str, weight_dtype: torch.dtype) -> None:
    case = make_case((17, 33), terms=(kind,), adapter_dtype=torch.bfloat16, rank=1)
    (item,) = case.layout.terms
    weight = torch.randn(17, 33, generator=torch.Generator().manual_seed(1)).to(weight_dtype)
    folded = weight.clone()
    item.fold_(folded, case.delta)
    exact = weight.double() + item.dense(case.delta64, (17, 33), torch.float64)
    # Half an ulp of the weight's dtype, and the float32 arithmetic before it: a scaled product and a sum.
    unit = torch.finfo(weight_dtype).eps / 2
    before = 4 * (2.0**-24 if weight_dtype != torch.float64 else 2.0**-53)
    allowed = exact.abs() * unit + (weight.double().abs() + (exact - weight).abs()) * before
    assert bool(((folded.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("kind", list(TERMS))
def test_terms_describe_their_tensors(make_case: MakeCase, kind: str) -> None:
    """Gradients are fresh, shaped and typed like the trainable tensors, as `grad_shapes` says, from either source."""
    case = make_case(terms=(kind,), adapter_dtype=torch.bfloat16)
    (item,) = case.layout.terms
    named = dict(zip(item.tensor_names, case.delta, strict=True))
    expected = [(named[name].shape, named[name].dtype) for name in item.trainable]
    dW = case.dy.t() @ case.x
    for grads in (
        item.grads(case.dy, case.x, case.delta),
        item.grads_from_dense(dW, case.delta),
        item.grad_shapes(case.delta),
    ):
        assert [(grad.shape, grad.dtype) for grad in grads] == expected
        inputs = {tensor.untyped_storage().data_ptr() for tensor in (dW, case.x, case.dy, *case.delta)}
        assert not inputs & {grad.untyped_storage().data_ptr() for grad in grads if grad.numel()}
    assert isinstance(item, Term)
    assert item == term(kind, **item.fields())


def test_a_term_that_folds_has_no_product_of_its_own(make_case: MakeCase) -> None:
    case = make_case(terms=("sparse",))
    with pytest.raises(AssertionError, match="folds into the weight"):
        case.layout.terms[0].factors(case.x, case.delta, False)


# --- mask collection ---------------------------------------------------------------------------------------------


def transcribed_top(dW: Tensor, nnz: int) -> tuple[list[int], list[int]]:
    """Top nnz of dW² by size, ties by smaller flat index. In float64 squares of float32 are exact: no ties are made."""
    score = dW.double().square().flatten().tolist()
    flat = sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:nnz])
    return [i // dW.shape[1] for i in flat], [i % dW.shape[1] for i in flat]


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    m=st.integers(1, 20),
    density=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_topk_is_the_transcription(
    shape: tuple[int, int], m: int, density: float, dtype: torch.dtype, ties: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    N, K = shape
    x, dy = (torch.randn(m, width, generator=generator) for width in (K, N))
    if ties:  # small integers: many equal squares
        x, dy = x.round(), dy.round()
    x, dy = x.to(dtype), dy.to(dtype)
    nnz = int(density * N * K)
    dW = dy.t().float() @ x.float()
    expected = transcribed_top(dW, nnz)
    probe = torch.zeros(1 + 2 * nnz)
    for grad in (*CollectTopK().grads(dy, x, [probe]), *CollectTopK().grads_from_dense(dW, [probe])):
        count, rows, cols = CollectTopK.decode(grad)
        assert count == 1
        assert (rows.tolist(), cols.tolist()) == expected


@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float16, 1e-7), (torch.bfloat16, 1e-15)], ids=str)
def test_topk_of_a_tiny_gradient_does_not_underflow(dtype: torch.dtype, tiny: float) -> None:
    """Squares of these entries are zero in float16, or even in float32."""
    dy = (torch.tensor([[1.0, 3.0, 2.0]]) * tiny).to(dtype)
    x = (torch.tensor([[1.0, 2.0, 6.0]]) * tiny).to(dtype)
    dW = dy.t().float() @ x.float()
    assert not (dW.half() if dtype == torch.float16 else dW).square().any()
    (grad,) = CollectTopK().grads(dy, x, [torch.zeros(5)])
    _, rows, cols = CollectTopK.decode(grad)
    assert (rows.tolist(), cols.tolist()) == transcribed_top(dW, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_topk_marks_what_is_not_finite(bad: float) -> None:
    x, dy = torch.ones(2, 4), torch.ones(2, 3)
    dy[1, 2] = bad
    (grad,) = CollectTopK().grads(dy, x, [torch.zeros(7)])
    count, _, cols = CollectTopK.decode(grad)
    assert count == 1
    assert cols.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("op", ["linear", "materialize"])
def test_a_second_backward_shows_in_the_count(make_case: MakeCase, op: str) -> None:
    case = make_case(base="nf4", terms=("low_rank", "collect_topk"))
    probe = case.delta[-1].requires_grad_()
    for calls in (1, 2):
        if op == "linear":
            y = ops.linear(case.x, None, case.base, case.delta, case.layout.key)
        else:
            y = case.x @ ops.materialize(case.base, case.delta, case.layout.key).t()
        y.backward(case.dy)
        assert probe.grad is not None
        assert CollectTopK.decode(probe.grad)[0] == calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_several_backwards_sum_in_float32(make_case: MakeCase, dtype: torch.dtype) -> None:
    case = make_case(base="nf4", terms=("low_rank", "collect_gradient"), dtype=dtype, m=7)
    probe = case.delta[-1].requires_grad_()
    for _ in range(2):
        ops.linear(case.x, None, case.base, case.delta, case.layout.key).backward(case.dy)
    dW = case.dy.t().float() @ case.x.float()
    assert probe.grad is not None
    assert torch.equal(probe.grad, dW + dW)


def test_collected_gradient_is_no_view_of_the_dense_one() -> None:
    """The optimizer of somebody else's weight may write into dW."""
    dW = torch.randn(3, 4)
    (grad,) = CollectGradient().grads_from_dense(dW, [torch.zeros(3, 4)])
    assert torch.equal(grad, dW)
    assert grad.data_ptr() != dW.data_ptr()
    (grad,) = CollectGradient().grads_from_dense(dW.t(), [torch.zeros(4, 3)])
    assert grad.is_contiguous()


@pytest.mark.parametrize("extra", ["collect_gradient", "collect_topk", "collect_received"])
def test_collecting_changes_no_result(make_case: MakeCase, extra: str) -> None:
    plain, watched = (make_case(base="nf4", terms=terms) for terms in (("low_rank",), ("low_rank", extra)))
    for case in (plain, watched):
        case.out = ops.linear(case.x, None, case.base, case.delta, case.layout.key)
        case.weight = ops.materialize(case.base, case.delta, case.layout.key)
        case.grads = ops.linear_grads(case.dy, case.x, case.delta, case.layout.key)
    assert torch.equal(plain.out, watched.out)
    assert torch.equal(plain.weight, watched.weight)
    assert all(torch.equal(a, b) for a, b in zip(plain.grads, watched.grads[:2], strict=True))


# --- layouts -----------------------------------------------------------------------------------------------------

bases = st.one_of(
    st.builds(base_format, st.sampled_from(["dense", "int8"])),
    st.builds(
        base_format,
        st.sampled_from(["nf4", "fp4"]),
        blocksize=st.sampled_from([64, 128, 4096]),
        double_quant=st.booleans(),
    ),
)
kinds = st.one_of(
    st.builds(term, st.just("low_rank"), scale=st.floats(allow_nan=False, allow_infinity=False)),
    st.sampled_from(["sparse", "collect_gradient", "collect_topk"]).map(term),
)
layouts = st.builds(
    Layout,
    st.tuples(st.integers(1, 2**31), st.integers(1, 2**31)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    bases,
    st.lists(kinds, max_size=4).map(tuple),
    st.booleans(),
)


@settings(deadline=None)
@given(layouts)
def test_layout_round_trip(layout: Layout) -> None:
    parsed = Layout.parse(layout.key)
    assert parsed == layout
    assert parsed.key == layout.key
    assert parsed is Layout.parse(str(layout.key))
    assert hash(parsed) == hash(layout)


def test_equal_layouts_have_equal_keys_and_others_do_not() -> None:
    first, second = (Layout((2, 3), torch.float32, base_format("nf4"), (term("low_rank", scale=1.0),)) for _ in "ab")
    assert first.key == second.key
    others = [
        first.with_dtype(torch.bfloat16),
        Layout((3, 2), first.dtype, first.base, first.terms),
        Layout(first.shape, first.dtype, base_format("fp4"), first.terms),
        Layout(first.shape, first.dtype, first.base, (term("low_rank", scale=1.5),)),
        Layout(first.shape, first.dtype, first.base, ()),
        Layout(first.shape, first.dtype, first.base, first.terms, strict=True),
    ]
    assert len({layout.key for layout in [first, *others]}) == 7


def test_layout_splits_the_delta() -> None:
    layout = Layout((2, 3), torch.float32, base_format("dense"), tuple(map(term, ["sparse", "collect_topk"])))
    tensors = [torch.tensor(float(i)) for i in range(4)]
    assert [(item.kind, [int(t) for t in part]) for item, part in layout.split(tensors)] == [
        ("sparse", [0, 1, 2]),
        ("collect_topk", [3]),
    ]
    assert layout.trainable == (0, 3)
    assert not layout.additive


def test_unknown_terms_and_fields_are_refused() -> None:
    key = Layout((2, 3), torch.float32, base_format("dense"), (term("sparse"),)).key
    with pytest.raises(RosaError, match=r"'butterfly'.*low_rank, sparse"):
        Layout.parse(key.replace("sparse", "butterfly"))
    with pytest.raises(RosaError, match="dense2"):
        Layout.parse(key.replace('"dense"', '"dense2"'))
    with pytest.raises(RosaError, match=r"sparse.*colour"):
        term("sparse", colour=1)
    with pytest.raises(RosaError, match="scale"):
        term("low_rank")
