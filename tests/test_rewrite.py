"""The graph pass: which spellings are rewritten, how often, and that the rewritten graphs compute the same.

Most tests run the rewritten joint graph eagerly (capture without code generation); `test_compile.py` uses Inductor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rosa_fx
from rosa_fx.kernels.inductor import capture_backend
from rosa_fx.passes.joint import rewrite
from rosa_fx.passes.report import GraphReport, normalise

# Two float32 computations of one thing differ by the order of their sums: twice the other's error is within that.
FLOAT32 = 2.0

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


class Holder(nn.Module):
    """A model with one raw weight and one bias, used as `fn` spells it."""

    def __init__(self, fn: Spelling, shape: tuple[int, int], bias: int) -> None:
        super().__init__()
        self.fn = fn
        self.weight = nn.Parameter(torch.randn(shape) * 0.1)
        self.bias = nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, self.weight, self.bias)


def prepared(fn: Spelling, shape: tuple[int, int], base: str = "nf4", **spec: Any) -> Holder:
    """Transformed, with a random mask and every adapter tensor away from zero."""
    model = Holder(fn, shape, 32)
    settings = {"base": base, "rank": 4, "density": 0.1, "targets": ["weight"]} | spec
    rosa_fx.transform(model, rosa_fx.RosaSpec(**settings))
    fill(model)
    return model


def fill(model: nn.Module) -> None:
    for name, weight in rosa_fx.state.state_of(model).weights.items():
        if weight.low_rank is not None:
            nn.init.normal_(weight.low_rank.B, std=0.1)
        if weight.sparse is not None:
            nnz = weight.sparse.values.numel()
            dense = torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.bool)
            dense[torch.randperm(dense.numel())[:nnz]] = True
            rosa_fx.set_masks(model, {name: dense.view(weight.shape)})
            nn.init.normal_(weight.sparse.values, std=0.1)


def rewritten(model: nn.Module, **options: Any) -> tuple[Callable[..., Any], list[GraphReport]]:
    """The model compiled with the rewrite but without code generation, and the reports of its graphs."""
    reports: list[GraphReport] = []
    torch._dynamo.reset()
    backend = capture_backend(lambda graph: reports.append(rewrite(graph)))
    return torch.compile(model, backend=backend, **options), reports


def run(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, grad-input and the gradient of every trainable parameter, for a fixed random upstream gradient."""
    for parameter in model.parameters():
        parameter.grad = None
    x = x.detach().clone().requires_grad_()
    y = call(x)
    torch.manual_seed(7)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def exact(model: Holder, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same by autograd through plain torch in `dtype`, from D(Q) and the adapter tensors."""
    term = rosa_fx.adapter(model, "weight")
    leaves = [t.detach().to(dtype).requires_grad_() for t in (term.low_rank.A, term.low_rank.B, term.sparse.values)]
    A, B, values = leaves
    mask = term.sparse.mask
    S = torch.zeros(term.shape, dtype=dtype).index_put((mask.rows(), mask.cols.long()), values)
    weight = rosa_fx.base_weight(model, "weight").to(dtype) + S + term.scale * (B @ A)
    x = x.detach().to(dtype).requires_grad_()
    y = model.fn(x, weight, model.bias.detach().to(dtype))
    torch.manual_seed(7)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(dtype))
    return [y.detach(), x.grad, *(leaf.grad for leaf in leaves)]


def assert_budget(actual: list[Tensor], plain: list[Tensor], truth: list[Tensor], factor: float) -> None:
    """Root-mean-square error at most `factor` times that of the plain computation in the same precision.

    Where the plain error is accidentally tiny, half a unit in the last place of the result's size counts instead.
    """
    assert len(actual) == len(plain) == len(truth)
    for ours, theirs, right in zip(actual, plain, truth):
        size = right.double().pow(2).mean().sqrt()
        floor = size * torch.finfo(ours.dtype).eps / 2
        budget = factor * torch.maximum((theirs.double() - right).pow(2).mean().sqrt(), floor)
        assert (ours.double() - right).pow(2).mean().sqrt() <= budget


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
    "one output": (lambda x, w, b: F.linear(x, w), (1, 24), (2, 5, 24), 1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_fused_forward_and_backward(name: str) -> None:
    fn, shape, input_shape, products = SPELLINGS[name]
    torch.manual_seed(0)
    model = prepared(fn, shape)
    x = torch.randn(input_shape)
    call, reports = rewritten(model, fullgraph=True)
    actual = run(call, model, x)
    (report,) = reports
    use = report.uses["weight"]
    assert report.counts["linear"] + report.counts["linear_t"] == 2 * products, "y and dx"
    assert (use.products, use.gradients, use.dense) == (2 * products, products, [])
    assert report.counts["dense"] == 0
    truth, plain = exact(model, x, torch.float64), exact(model, x, torch.float32)
    assert_budget(actual, plain, truth, factor=FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model_runs_the_operators_in_the_dtype_of_the_activation(dtype: torch.dtype) -> None:
    """Bit for bit what the operators give; their own error is measured in `test_op_budget.py`."""
    torch.manual_seed(0)
    model = prepared(lambda x, w, b: F.linear(x, w, b), (32, 24)).to(dtype)
    term = rosa_fx.adapter(model, "weight").float()  # the adapter stays wide over a narrow model
    term.base.dtype = dtype
    term.refresh()
    x = torch.randn(5, 24).to(dtype)
    call, reports = rewritten(model, fullgraph=True)
    y, dx, *grads = run(call, model, x)
    assert reports[0].counts == {"linear": 1, "linear_t": 1, "linear_grads": 1, "dense": 0}
    torch.manual_seed(7)
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    base, delta = term.base.tensors(), term.delta_tensors()
    assert torch.equal(y, torch.ops.rosa_fx.linear(x, model.bias, base, delta, term.layout_key))
    assert torch.equal(dx, torch.ops.rosa_fx.linear_t(dy, None, base, delta, term.layout_key))
    expected = torch.ops.rosa_fx.linear_grads(dy, x, delta, term.layout_key)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected))


# Consumers that are no product: spelling -> what the reason must name.
UNFUSED: dict[str, tuple[Spelling, str]] = {
    "clamped": (lambda x, w, b: x @ w.clamp(-0.1, 0.1), "clamp"),
    "scaled": (lambda x, w, b: x @ (w * 2.0), "mul"),
    "summed beside the product": (lambda x, w, b: x @ w + w.sum(), "sum"),
    "every other column": (lambda x, w, b: x @ w[:, ::2], "mm"),
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


class Mixed(nn.Module):
    """nn.Linear, a raw parameter, packed self-attention and einsum in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Parameter(torch.randn(32, 64) * 0.1)
        self.mix = nn.Parameter(torch.randn(32, 32) * 0.1)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = F.gelu(self.up(x)) @ self.down.T
        return torch.einsum("bsd,od->bso", x, self.mix)


def test_whole_model_counts_and_agreement_with_eager() -> None:
    torch.manual_seed(0)
    model = Mixed()
    rosa_fx.transform(model, rosa_fx.RosaSpec(rank=4, density=0.1))
    fill(model)
    x = torch.randn(2, 5, 32)
    report = rosa_fx.explain(model, x)
    assert [t.name for t in report.targets] == [
        "down",
        "mix",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    assert report.fused == 5
    assert report.counts == {"linear": 5, "linear_t": 4, "linear_grads": 5, "dense": 0}, "x needs no gradient"
    assert (report.graph_breaks, report.recompiles) == (0, 0)
    call, _ = rewritten(model, fullgraph=True)
    actual, expected = run(call, model, x), run(model, model, x)
    wide = [t.double() for t in expected]
    assert len(actual) == 2 + 5 * 3
    for ours, theirs in zip(actual, wide):
        assert (ours.double() - theirs).norm() <= 64 * torch.finfo(torch.float32).eps * theirs.norm()


def test_no_dense_weight_or_gradient_in_the_training_graphs() -> None:
    """Forward and backward hold no [N, K] tensor, and nothing of that size is saved between them."""
    torch.manual_seed(0)
    model = prepared(lambda x, w, b: torch.tanh(F.linear(x, w, b)), (32, 24))
    graphs: list[torch.fx.Graph] = []

    def visit(graph: torch.fx.Graph) -> None:
        rewrite(graph)
        graphs.append(graph)

    torch._dynamo.reset()
    call = torch.compile(model, backend=capture_backend(visit), fullgraph=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        y = call(torch.randn(5, 24, requires_grad=True))
    y.sum().backward()
    (graph,) = graphs
    sizes = [n.meta["val"].numel() for n in graph.nodes if isinstance(n.meta.get("val"), Tensor) and n.op != "placeholder"]
    assert max(sizes) < 32 * 24
    assert max(saved) < 32 * 24
    targets = {node.target for node in graph.nodes}
    assert torch.ops.rosa_fx.materialize.default not in targets
    assert torch.ops.rosa_fx.materialize_backward.default not in targets


def test_autocast_no_grad_and_checkpointing() -> None:
    torch.manual_seed(0)
    model = prepared(lambda x, w, b: F.linear(x, w, b), (32, 24))
    x = torch.randn(4, 24)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    call, reports = rewritten(autocast, fullgraph=True)
    y = call(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert reports[0].counts == {"linear": 1, "linear_t": 1, "linear_grads": 1, "dense": 0}

    call, reports = rewritten(model, fullgraph=True)
    with torch.no_grad():
        actual, expected = call(x), model(x)
    assert (actual - expected).norm() <= 64 * torch.finfo(torch.float32).eps * expected.norm()
    assert reports[0].counts == {"linear": 1, "linear_t": 0, "linear_grads": 0, "dense": 0}

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(model(x)), x, use_reentrant=False)

    call, reports = rewritten(checkpointed, fullgraph=True)
    expected, actual = run(checkpointed, model, x), run(call, model, x)
    assert reports[0].counts["dense"] == 0
    for ours, theirs in zip(actual, expected):
        assert (ours - theirs).norm() <= 64 * torch.finfo(torch.float32).eps * theirs.norm()


def test_changed_batch_size_compiles_nothing_new_under_dynamic() -> None:
    model = prepared(lambda x, w, b: torch.tanh(F.linear(x, w, b)), (32, 24))
    call, reports = rewritten(model, dynamic=True, fullgraph=True)
    for rows in (5, 8, 13):
        run(call, model, torch.randn(rows, 24))
    assert len(reports) == 1
    assert reports[0].counts == {"linear": 1, "linear_t": 1, "linear_grads": 1, "dense": 0}


def test_weight_gradient_is_not_asked_for_where_the_weight_is_not_used() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = rosa_fx.transform(Two(), rosa_fx.RosaSpec(rank=2, density=0.1, blocksize=64))
    status = {t.name: t.status for t in rosa_fx.explain(model, torch.randn(3, 8)).targets}
    assert status == {"used.weight": "fused", "idle.weight": "unused"}


def test_shared_module_is_one_target_with_one_delta() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 24)
            self.layers = nn.ModuleList([self.layer] * 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    model = rosa_fx.transform(Shared(), rosa_fx.RosaSpec(rank=2, density=0.1))
    report = rosa_fx.explain(model, torch.randn(3, 24, requires_grad=True))
    (target,) = report.targets
    assert (target.name, target.status, target.products, target.gradients) == ("layer.weight", "fused", 6, 3)


def test_explain_leaves_buffers_and_random_state() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    rosa_fx.transform(model, rosa_fx.RosaSpec(rank=2, density=0.0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    report = rosa_fx.explain(model, torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(4), expected)
    assert report.fused == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert "1 targets: 1 fused" in str(report)
    assert report.to_dict()["targets"][0]["shape"] == [8, 8]


def test_paths_of_capture_become_names() -> None:
    assert normalise("L['self'].layers[0].up.parametrizations.weight.0") == "layers.0.up.weight"
    assert normalise("L['m']._modules['a']._modules['0'].parametrizations.in_proj_weight.0") == "a.0.in_proj_weight"
    assert normalise("L['fn'].parametrizations.w.0") == "w"


def test_hugging_face_models_are_fused_whole() -> None:
    """GPT-2's Conv1D stores [in, out]; Llama's projections are nn.Linear. Tied heads and embeddings stay as they are."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16))
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
        )
    )
    ids = torch.randint(0, 64, (2, 8))
    # Per layer 4 or 7 weights; the first projections read an embedding that needs no gradient.
    expected = {"gpt2": (8, {"linear": 7, "linear_t": 8}), "llama": (14, {"linear": 14, "linear_t": 11})}
    for model in (gpt, llama):
        rosa_fx.transform(model, rosa_fx.RosaSpec(rank=4, density=0.05))
        report = rosa_fx.explain(model, input_ids=ids, use_cache=False)
        targets, products = expected[model.config.model_type]
        assert (report.fused, len(report.targets), report.graph_breaks) == (targets, targets, 0)
        assert report.counts == products | {"linear_grads": targets, "dense": 0}
        assert not any("lm_head" in t.name or "wte" in t.name or "embed" in t.name for t in report.targets)


def test_dropout_drops_input_features_of_the_low_rank_part() -> None:
    torch.manual_seed(0)
    model = prepared(lambda x, w, b: F.linear(x, w), (32, 24), dropout=0.5, density=0.0)
    term = rosa_fx.adapter(model, "weight")
    x = torch.eye(24)
    call, reports = rewritten(model, fullgraph=True)
    full = term.scale * (term.low_rank.B @ term.low_rank.A).T
    model.eval()
    base = rosa_fx.base_weight(model, "weight").T
    assert (call(x) - base - full).norm() <= 64 * torch.finfo(torch.float32).eps * full.norm()
    model.train()
    part = call(x) - base
    dropped = part.abs().amax(dim=1) <= 1e-6
    assert 0 < int(dropped.sum()) < 24, "rows of zeros where a feature was dropped"
    kept = part[~dropped] - 2 * full[~dropped]
    assert kept.norm() <= 64 * torch.finfo(torch.float32).eps * full.norm() * 2
    assert [report.counts["dense"] for report in reports] == [0, 0]
