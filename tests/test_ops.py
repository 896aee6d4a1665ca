"""The fused operators: registration, any shape against the float64 definition, gradients.

Single elements are held to the rounding bound of the composition (`rounding_bound`); `test_op_budget.py` compares the
error over many elements with that of plain code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rosa_fx.kernels import definition, ops
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.low_rank import LowRank
from rosa_fx.kernels.terms.sparse import Sparse

MakeCase = Callable[..., Any]

BASES = [("dense", False), ("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]
TERMS: list[tuple[str, ...]] = [
    (),
    ("low_rank",),
    ("sparse",),
    ("low_rank", "sparse"),
    ("low_rank", "collect_gradient"),
    ("low_rank", "collect_topk"),
]
each_base = pytest.mark.parametrize(("base", "double_quant"), BASES, ids=lambda value: str(value))
each_terms = pytest.mark.parametrize("terms", TERMS, ids=lambda value: "+".join(value) or "none")


# --- registration ------------------------------------------------------------------------------------------------


def products(case: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The differentiable operators with arguments that require gradients."""
    leaf = lambda tensor: tensor.detach().requires_grad_()  # noqa: E731
    key, base = case.layout.key, case.base
    return {
        "materialize": (ops.materialize, (base, case.leaves(), key)),
        "linear": (ops.linear, (leaf(case.x), leaf(case.bias), base, case.leaves(), key)),
        "linear_t": (ops.linear_t, (leaf(case.dy), None, base, case.leaves(), key)),
    }


@each_terms
@each_base
def test_schema_fake_and_autograd_registration(
    make_case: MakeCase, base: str, double_quant: bool, terms: tuple[str, ...]
) -> None:
    case = make_case(base=base, double_quant=double_quant, terms=terms)
    for op, args in products(case).values():
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


BOTH: tuple[str, ...] = ("low_rank", "sparse")
COVER = [("linear", *base, BOTH) for base in BASES]
COVER += [(name, "nf4", True, BOTH) for name in ("materialize", "linear_t")]
COVER += [("linear", "nf4", False, terms) for terms in TERMS if terms != BOTH]
COVER += [(name, "nf4", False, terms) for name in ("materialize", "linear_t") for terms in TERMS[-2:]]


@pytest.mark.parametrize(("name", "base", "double_quant", "terms"), COVER, ids=str)
def test_opcheck_differentiable(make_case: MakeCase, name: str, base: str, double_quant: bool, terms: tuple[str, ...]) -> None:
    """A cover of operators, bases and terms: ahead-of-time dispatch costs half a second each."""
    op, args = products(make_case(base=base, double_quant=double_quant, terms=terms))[name]
    torch.library.opcheck(op, args, test_utils=("test_aot_dispatch_dynamic",))


@each_terms
def test_opcheck_gradients(make_case: MakeCase, terms: tuple[str, ...]) -> None:
    case = make_case(terms=terms)
    torch.library.opcheck(ops.linear_grads, (case.dy, case.x, case.delta, case.layout.key))
    torch.library.opcheck(ops.materialize_backward, (case.dy.t() @ case.x, case.delta, case.layout.key))


@pytest.mark.parametrize("view", ["vector", "three", "strided", "transposed", "expanded", "none"])
def test_fake_follows_the_strides_of_the_input(make_case: MakeCase, view: str) -> None:
    case = make_case(base="nf4")
    for op, width in ((ops.linear, 16), (ops.linear_t, 12)):
        args = (viewed(view, 5, width, torch.float32), None, case.base, case.delta, case.layout.key)
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_no_second_derivative_rather_than_a_wrong_one(make_case: MakeCase) -> None:
    op, args = products(make_case())["linear"]
    A = args[3][0]
    (first,) = torch.autograd.grad(op(*args).square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(first.sum(), A)


# --- shapes ------------------------------------------------------------------------------------------------------


def viewed(view: str, m: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    match view:
        case "vector":
            return randn(width)
        case "three":
            return randn(2, m, width)
        case "strided":
            return randn(2 * m, 2 * width)[::2, ::2]
        case "transposed":
            return randn(width, m).t()
        case "expanded":
            return randn(m, 1, width).expand(m, 3, width)
        case "none":
            return randn(0, width)
        case _:
            return randn(m, width)


def rounding_bound(magnitude: Tensor, unit: float, length: int, largest: float) -> Tensor:
    """Elementwise bound on the error of a result whose terms have absolute values that sum to `magnitude`.

    On the longest way from operand to result a value is rounded to low precision 5 times (operand, scaled operand, thin
    product, product, sum), 6 covers products of roundings; float32 sums have `length` terms in all. A float16 below its
    normal range is off by up to 2^-25 per element whatever its size, multiplied by at most two operands.
    """
    return magnitude * (6 * unit + (length + 8) * 2.0**-24) + length * 2.0**-24 * max(1.0, largest) ** 2 * (unit > 1e-4)


def random_mask(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    if kind == "one row":
        mask[seed % shape[0]] = True
    elif kind == "full":
        mask[:] = True
    elif kind == "some rows":
        mask[::3] = torch.rand(shape, generator=torch.Generator().manual_seed(seed))[::3] < 0.3
    return mask


SIZES = st.sampled_from([1, 2, 3, 7, 13, 31, 32, 33, 63, 64, 65, 127, 128, 129])


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(SIZES, SIZES),
    m=st.sampled_from([1, 2, 5, 17, 63, 64, 65]),
    view=st.sampled_from(["plain", "vector", "three", "strided", "transposed", "expanded", "none"]),
    base=st.sampled_from(BASES),
    terms=st.sampled_from(TERMS[:4]),
    rank=st.sampled_from([0, 1, 3, 16, 64]),
    mask=st.sampled_from(["empty", "one row", "full", "some rows"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    adapter_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@example((1, 1), 1, "vector", ("nf4", False), ("low_rank", "sparse"), 64, "full", torch.float32, torch.float32, True, 0)
@example((128, 64), 64, "none", ("nf4", True), ("low_rank", "sparse"), 16, "full", torch.bfloat16, torch.float32, True, 0)
def test_any_shape(
    make_case: MakeCase,
    shape: tuple[int, int],
    m: int,
    view: str,
    base: tuple[str, bool],
    terms: tuple[str, ...],
    rank: int,
    mask: str,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    with_bias: bool,
    seed: int,
) -> None:
    """Both products and all gradients of any shape, strides and mask, for every base, within the rounding bound."""
    N, K = shape
    case = make_case(
        shape, base[0], double_quant=base[1], terms=terms, rank=rank, mask=random_mask(mask, shape, seed), dtype=dtype,
        adapter_dtype=adapter_dtype, step=0.5, seed=seed,
    )  # fmt: skip
    key, delta, delta64, layout64 = case.layout.key, case.delta, case.delta64, case.layout64
    x, dy = (viewed(view, m, width, dtype, seed + i) for i, width in enumerate((K, N)))
    bias, bias_t = (case.bias, case.bias.new_ones(K)) if with_bias else (None, None)
    double: Callable[[Any], Any] = lambda tensor: None if tensor is None else tensor.double()  # noqa: E731
    size: Callable[[Any], Any] = lambda tensor: None if tensor is None else tensor.double().abs()  # noqa: E731
    absolute = [tensor.abs() for tensor in delta64]
    # The same definition over absolute values gives, for each element, the sum of its terms' absolute values.
    abs_base, abs_layout = [case.base64.abs()], Layout(shape, torch.float64, base_format("dense"), layout64.terms)
    unit = max(torch.finfo(dtype).eps, torch.finfo(adapter_dtype).eps) / 2
    length, largest = N + K + x.numel() // K + rank, max([1.0] + [t.abs().max().item() for t in (x, dy) if t.numel()])

    def check(ours: Tensor, exact: Tensor, magnitude: Tensor, name: str) -> None:
        assert ours.shape == exact.shape, name
        bound = rounding_bound(magnitude, unit, length, largest)
        assert bool(((ours.double() - exact).abs() <= bound).all()), name

    y = ops.linear(x, bias, case.base, delta, key)
    assert y.dtype == dtype
    assert y.shape == (*x.shape[:-1], N)
    check(
        y,
        definition.linear(x.double(), double(bias), case.base, delta64, layout64),
        definition.linear(size(x), size(bias), abs_base, absolute, abs_layout),
        "linear",
    )
    out = ops.linear_t(dy, bias_t, case.base, delta, key)
    check(
        out,
        definition.linear_t(dy.double(), double(bias_t), case.base, delta64, layout64),
        definition.linear_t(size(dy), size(bias_t), abs_base, absolute, abs_layout),
        "linear_t",
    )
    grads = ops.linear_grads(dy, x, delta, key)
    exact = definition.linear_grads(dy.double(), x.double(), delta64, layout64)
    magnitude = definition.linear_grads(size(dy), size(x), absolute, abs_layout)
    names = [case.names[i] for i in case.layout.trainable]
    assert [grad.dtype for grad in grads] == [adapter_dtype] * len(names)
    for name, grad, value, bound in zip(names, grads, exact, magnitude, strict=True):
        check(grad, value, bound, name)
    dW = (dy.reshape(-1, N).double().t() @ x.reshape(-1, K).double()).to(dtype)
    dense_grads = ops.materialize_backward(dW, delta, key)
    for name, grad, value, bound in zip(names, dense_grads, exact, magnitude, strict=True):
        check(grad, value, bound, f"{name} from dW")
    weight = ops.materialize(case.base, delta, key)
    check(
        weight,
        definition.dense_weight(case.base, delta64, layout64, torch.float64),
        definition.dense_weight(abs_base, absolute, abs_layout, torch.float64),
        "materialize",
    )


# --- gradients ---------------------------------------------------------------------------------------------------


@each_base
@pytest.mark.parametrize("name", ["materialize", "linear", "linear_t"])
def test_gradcheck(make_case: MakeCase, name: str, base: str, double_quant: bool) -> None:
    """Every base composes in float64, because D(Q) is exact there. (Collecting terms are float32 by definition.)"""
    case = make_case(
        (5, 7), base, double_quant=double_quant, m=3, dtype=torch.float64, weight_dtype=torch.float64,
        adapter_dtype=torch.float64, rank=2,
    )  # fmt: skip
    op, _ = products(case)[name]
    floats = [i for i, tensor in enumerate(case.delta) if tensor.is_floating_point()]
    x, bias = (case.x, case.bias) if name == "linear" else (case.dy, torch.ones(7, dtype=torch.float64))

    def run(x: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        delta = list(case.delta)
        for position, parameter in zip(floats, parameters, strict=True):
            delta[position] = parameter
        front = () if name == "materialize" else (x, bias)
        weight = op(*front, case.base, delta, case.layout.key)
        return weight if front else weight * x.sum() + bias.sum()

    inputs = [tensor.detach().requires_grad_() for tensor in (x, bias, *(case.delta[i] for i in floats))]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("terms", TERMS[1:5], ids="+".join)
def test_three_ways_to_the_same_gradients(make_case: MakeCase, terms: tuple[str, ...]) -> None:
    """linear, materialize with a plain linear, and linear_t with the factors swapped agree in float64."""
    case = make_case((33, 65), "nf4", terms=terms, m=17, dtype=torch.float64, adapter_dtype=torch.float64)
    layout = case.layout64.key
    results = []
    for how in range(3):
        x, delta = case.x.detach().requires_grad_(), case.leaves()
        if how == 0:
            loss = (ops.linear(x, None, case.base, delta, layout) * case.dy).sum()
        elif how == 1:
            loss = (F.linear(x, ops.materialize(case.base, delta, layout)) * case.dy).sum()
        else:  # <dy W, x> = <x Wᵀ, dy>
            loss = (ops.linear_t(case.dy, None, case.base, delta, layout) * x).sum()
        results.append(torch.autograd.grad(loss, [x, *(t for t in delta if t.requires_grad)]))
    for first, second, third in zip(*results, strict=True):
        # CollectGradient is float32 whatever the operands are.
        tolerance = (1e-6 if "collect_gradient" in terms else 1e-13) * first.abs().max()
        assert (first - second).abs().max() <= tolerance
        assert (first - third).abs().max() <= tolerance


@pytest.mark.parametrize("op", [ops.linear, ops.linear_t])
def test_only_gradients_that_are_asked_for_are_computed(make_case: MakeCase, op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen terms cost nothing in backward; a term with one trainable tensor is computed."""
    case = make_case((12, 16))
    x, dy = (case.x, case.dy) if op is ops.linear else (case.dy, case.x)
    seen: list[list[str]] = [[]]
    for kind in (LowRank, Sparse):
        whole = kind.grads
        monkeypatch.setattr(kind, "grads", lambda self, *args, whole=whole: (seen[-1].append(self.kind), whole(self, *args))[1])
    factors = (dy, x) if op is ops.linear else (x, dy)
    expected = dict(zip(("A", "B", "values"), ops.linear_grads(*factors, case.delta, case.layout.key), strict=True))
    for wanted, kinds in (([], []), (["values"], ["sparse"]), (["B"], ["low_rank"]), (["A", "values"], ["low_rank", "sparse"])):
        delta = [t.detach().requires_grad_(name in wanted) for name, t in zip(case.names, case.delta, strict=True)]
        leaf = x.detach().requires_grad_()
        y = op(leaf, None, case.base, delta, case.layout.key)
        seen.append([])
        y.backward(dy)
        assert seen[-1] == kinds
        grads = {name: t.grad for name, t in zip(case.names, delta, strict=True) if t.grad is not None}
        assert list(grads) == wanted
        assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())
