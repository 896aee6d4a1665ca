"""The graph pass on whole models: counts, graphs without dense tensors, agreement with eager.

Most tests run the rewritten joint graph eagerly (capture without code generation); `test_compile.py` uses Inductor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rewritten_models import fill, prepared, rewritten, run
from torch import Tensor, nn

import rosa_fx
from rosa_fx.kernels.inductor import capture_backend
from rosa_fx.passes.joint import rewrite
from rosa_fx.passes.report import normalise


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
    assert normalise("L['args'][0].model.layers[3].q.parametrizations.weight.0") == "model.layers.3.q.weight"
    assert normalise("L['args'][0].parametrizations.w.0") == "w"
    assert normalise("L['self'].a[0].__dict__['_modules']['q'].parametrizations.weight.0") == "a.0.q.weight"


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


def test_parts_that_are_captured_after_a_graph_break_are_named_from_the_whole() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.inner(x)

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Part(), Part()])
            self.idle = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = torch.tanh(part(x))
            return x

    model = rosa_fx.transform(Parts(), rosa_fx.RosaSpec(rank=2, density=0.1))
    report = rosa_fx.explain(model, torch.randn(3, 8))
    assert report.graph_breaks > 0
    status = {target.name: target.status for target in report.targets}
    assert status == {"parts.0.inner.weight": "fused", "parts.1.inner.weight": "fused", "idle.weight": "unused"}
