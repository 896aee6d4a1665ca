"""Which spellings of a product are rewritten, how often, and that the rewritten graphs compute the same."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import FLOAT32, Holder, Spelling, assert_budget, exact, prepared, rewritten, run
from torch import Tensor

import rosa_fx


def ones(x: Tensor, *shape: int) -> Tensor:
    """A tensor that is no weight, for a product in the dtype of x."""
    return torch.ones(shape, dtype=x.dtype)


# spelling -> (function, weight shape, input shape, products of the forward pass)
SPELLINGS: dict[str, tuple[Spelling, tuple[int, int], tuple[int, ...], int]] = {
    "linear 3-D": (lambda x, w, b: F.linear(x, w, b), (32, 24), (2, 5, 24), 1),
    "linear 2-D": (lambda x, w, b: F.linear(x, w, b), (32, 24), (7, 24), 1),
    "linear 1-D": (lambda x, w, b: F.linear(x, w, b), (32, 24), (24,), 1),
    "linear without bias": (lambda x, w, b: F.linear(x, w), (32, 24), (2, 5, 24), 1),
    "one row": (lambda x, w, b: F.linear(x, w, b), (32, 24), (1, 24), 1),
    "@ .T": (lambda x, w, b: x @ w.T, (32, 24), (2, 5, 24), 1),
    "@ .t() + bias": (lambda x, w, b: x @ w.t() + b, (32, 24), (7, 24), 1),
    "@ .mT": (lambda x, w, b: x @ w.mT, (32, 24), (2, 5, 24), 1),
    "matmul of [in, out]": (lambda x, w, b: torch.matmul(x, w), (24, 32), (2, 5, 24), 1),
    "vector @ weight": (lambda x, w, b: x @ w, (24, 32), (24,), 1),
    "weight on the left": (lambda x, w, b: w @ x.mT, (32, 24), (2, 5, 24), 1),
    "weight.T on the left": (lambda x, w, b: w.T @ x.T, (24, 32), (7, 24), 1),
    "mm": (lambda x, w, b: torch.mm(x, w.transpose(0, 1)), (32, 24), (7, 24), 1),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (24, 32), (7, 24), 1),
    "addmm with factors": (lambda x, w, b: torch.addmm(b, x, w, alpha=0.5, beta=2), (24, 32), (7, 24), 1),
    "addmm with matrix": (lambda x, w, b: torch.addmm(x, x, w), (24, 24), (7, 24), 1),
    "bmm, expanded": (lambda x, w, b: torch.bmm(x, w.expand(2, 24, 32)), (24, 32), (2, 5, 24), 1),
    "baddbmm, expanded": (lambda x, w, b: torch.baddbmm(b, x, w.expand(2, 24, 32)), (24, 32), (2, 5, 24), 1),
    "einsum": (lambda x, w, b: torch.einsum("bsd,od->bso", x, w), (32, 24), (2, 5, 24), 1),
    "einsum with dots": (lambda x, w, b: torch.einsum("...i,oi->...o", x, w), (32, 24), (2, 5, 24), 1),
    "einsum, heads": (lambda x, w, b: torch.einsum("bsd,dhk->bshk", x, w.view(24, 4, 8)), (24, 32), (2, 5, 24), 1),
    "einsum, weight first": (lambda x, w, b: torch.einsum("oi,bsi->bos", w, x), (32, 24), (2, 5, 24), 1),
    "tensordot": (lambda x, w, b: torch.tensordot(x, w, dims=([2], [1])), (32, 24), (2, 5, 24), 1),
    "permuted input": (lambda x, w, b: F.linear(x.permute(1, 0, 2), w, b), (32, 24), (2, 5, 24), 1),
    "strided input": (lambda x, w, b: F.linear(x[:, ::2], w, b), (32, 24), (2, 6, 24), 1),
    "used twice": (lambda x, w, b: torch.tanh(x @ w) @ w, (24, 24), (2, 5, 24), 2),
    "used both ways": (lambda x, w, b: torch.tanh(x @ w) @ w.T, (24, 24), (2, 5, 24), 2),
    "square": (lambda x, w, b: F.linear(x, w), (24, 24), (7, 24), 1),
    "some rows": (lambda x, w, b: F.linear(x, w[8:24], b[8:24]), (32, 24), (2, 5, 24), 1),
    "some columns": (lambda x, w, b: x @ w[:, :16], (24, 32), (2, 5, 24), 1),
    "a block": (lambda x, w, b: x[..., 3:20] @ w[3:20, 5:30], (24, 32), (2, 5, 24), 1),
    "rows of the transpose": (lambda x, w, b: x @ w.T[:, 4:9], (32, 24), (2, 5, 24), 1),
    "chunks of qkv": (lambda x, w, b: torch.cat([F.linear(x, part) for part in w.chunk(3)], -1), (48, 24), (2, 5, 24), 3),
    "split unevenly": (lambda x, w, b: x @ w.split([20, 12])[0].T, (32, 24), (2, 5, 24), 1),
    "narrow": (lambda x, w, b: x @ w.narrow(1, 2, 7), (24, 32), (2, 5, 24), 1),
    "weight @ vector": (lambda x, w, b: w @ x, (32, 24), (24,), 1),
    "mv": (lambda x, w, b: torch.mv(w.T, x), (24, 32), (24,), 1),
    "tiny, one row": (lambda x, w, b: F.linear(x, w, b[:8]), (8, 8), (1, 8), 1),
    "one row of many": (lambda x, w, b: F.linear(x, w[5:6]), (32, 24), (2, 5, 24), 1),
    "one column of many": (lambda x, w, b: x @ w[:, 7:8], (24, 32), (2, 5, 24), 1),
    "conv1d": (lambda x, w, b: F.conv1d(x, w[:, :, None], b), (32, 24), (2, 24, 5), 1),
    "conv1d, not batched": (lambda x, w, b: F.conv1d(x, w[:, :, None]), (32, 24), (24, 5), 1),
    "conv1d of the transpose": (lambda x, w, b: F.conv1d(x, w.T[:, :, None], b), (24, 32), (2, 24, 5), 1),
    "conv1d, some filters": (lambda x, w, b: F.conv1d(x, w[4:9, :, None], b[:5]), (32, 24), (2, 24, 5), 1),
    "conv2d": (lambda x, w, b: F.conv2d(x, w.view(32, 24, 1, 1), b).flatten(2), (32, 24), (2, 24, 5, 3), 1),
    "conv2d, channels last": (
        lambda x, w, b: F.conv2d(x.contiguous(memory_format=torch.channels_last), w[..., None, None]),
        (32, 24),
        (2, 24, 5, 3),
        1,
    ),
    "conv3d": (lambda x, w, b: F.conv3d(x, w[..., None, None, None], b), (32, 24), (2, 24, 2, 3, 1), 1),
    "cat, side by side": (lambda x, w, b: x @ torch.cat([w, ones(x, 24, 8)], 1), (24, 32), (2, 5, 24), 1),
    "cat, along the contraction": (lambda x, w, b: x @ torch.cat([ones(x, 8, 32), w]), (24, 32), (2, 5, 32), 1),
    "cat, transposed": (lambda x, w, b: F.linear(x, torch.cat([w, ones(x, 8, 24)]), ones(x, 40)), (32, 24), (2, 5, 24), 1),
    "cat, on the left": (lambda x, w, b: torch.cat([w, ones(x, 8, 24)]) @ x.T, (32, 24), (7, 24), 1),
    "cat of its own parts": (lambda x, w, b: x @ torch.cat([w[:, 8:], w[:, :8]], 1), (24, 32), (2, 5, 24), 2),
    "vmapped heads": (lambda x, w, b: torch.vmap(lambda head: x @ head.T)(w.view(4, 8, 24)), (32, 24), (7, 24), 1),
    "one output": (lambda x, w, b: F.linear(x, w), (1, 24), (2, 5, 24), 1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_fused_forward_and_backward(name: str) -> None:
    fn, shape, input_shape, products = SPELLINGS[name]
    torch.manual_seed(0)
    model = prepared(fn, shape)
    inputs = [torch.randn(input_shape) for _ in range(4)]
    call, reports = rewritten(model, fullgraph=True)
    # Sums of so few rows are rounded by chance: errors are compared over several inputs.
    actual = pooled(run(call, model, x) for x in inputs)
    (report,) = reports
    use = report.uses["weight"]
    assert report.counts["linear"] + report.counts["linear_t"] == 2 * products, "y and dx"
    assert (use.products, use.gradients, use.dense) == (2 * products, products, [])
    assert report.counts["dense"] == 0
    truth, plain = (pooled(exact(model, x, dtype) for x in inputs) for dtype in (torch.float64, torch.float32))
    assert_budget(actual, plain, truth, factor=FLOAT32)


def pooled(results: Iterable[list[Tensor]]) -> list[Tensor]:
    """Output and gradients of several runs, one after the other in each tensor."""
    return [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*results, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model_under_an_error_budget(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = prepared(lambda x, w, b: F.linear(x, w, b), (32, 24)).to(dtype)
    term = rosa_fx.adapter(model, "weight").float()  # the adapter stays wide over a narrow model
    term.base.dtype = dtype
    term.refresh()
    x = torch.randn(5, 24).to(dtype)
    call, reports = rewritten(model, fullgraph=True)
    actual = run(call, model, x)
    assert reports[0].counts == {"linear": 1, "linear_t": 1, "linear_grads": 1, "dense": 0}
    assert [each.dtype for each in actual] == [dtype, dtype] + [torch.float32] * 3
    narrow = [each if each.dtype == dtype else each.to(dtype) for each in actual]
    assert_budget(narrow, exact(model, x, dtype), exact(model, x, torch.float64), factor=1.1)


# Consumers that are no product: spelling -> what the reason must name.
UNFUSED: dict[str, tuple[Spelling, str]] = {
    "clamped": (lambda x, w, b: x @ w.clamp(-0.1, 0.1), "clamp"),
    "scaled": (lambda x, w, b: x @ (w * 2.0), "mul"),
    "summed beside the product": (lambda x, w, b: x @ w + w.sum(), "sum"),
    "masked": (lambda x, w, b: x @ (w * ones(x, 24, 32)), "mul"),
    "every other column": (lambda x, w, b: x @ w[:, ::2], "mm"),
    "a column as a vector": (lambda x, w, b: (x * w[:, 3]).sum(-1), "mul"),
    "rows by index": (lambda x, w, b: x[..., :2] @ w[torch.tensor([1, 7])], "index"),
    "softmax of it": (lambda x, w, b: x @ w.softmax(-1), "softmax"),
    "strided conv1d": (lambda x, w, b: F.conv1d(x.mT, w.T[:, :, None], stride=2), "convolution"),
    "padded conv1d": (lambda x, w, b: F.conv1d(x.mT, w.T[:, :, None], padding=1), "convolution"),
    "grouped conv1d": (lambda x, w, b: F.conv1d(x.mT, w[:, :12, None], groups=2), "convolution"),
    "transposed conv1d": (lambda x, w, b: F.conv_transpose1d(x.mT, w[:, :, None]), "convolution"),
    "bilinear": (lambda x, w, b: F.bilinear(x, x, w.view(1, 24, 32)[..., :24]), "aten."),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_other_uses_stay_dense_and_right_and_are_named(name: str) -> None:
    fn, word = UNFUSED[name]
    torch.manual_seed(0)
    model = prepared(fn, (24, 32))
    x = torch.randn(2, 5, 24)
    call, reports = rewritten(model, fullgraph=True)
    actual = run(call, model, x)
    assert reports[0].counts["dense"] == 1
    assert any(word in reason for reason in reports[0].uses["weight"].dense)
    assert_budget(actual, exact(model, x, torch.float32), exact(model, x, torch.float64), factor=FLOAT32)
    target = rosa_fx.explain(model, x).targets[0]
    assert target.status == "dense"
    assert word in target.reason


def test_strict_turns_a_dense_use_into_an_error_with_name_operator_and_shape() -> None:
    model = Holder(lambda x, w, b: x @ w.clamp(-0.1, 0.1), (24, 32), 32)
    rosa_fx.transform(model, rosa_fx.RosaSpec(targets=["weight"], rank=2), strict=True)
    call, _ = rewritten(model)
    with pytest.raises(Exception, match=r"weight \[24, 32\] cannot be fused.*where"):
        call(torch.randn(3, 24))
    assert rosa_fx.explain(model, torch.randn(3, 24)).dense == 1, "explain reports instead of raising"
