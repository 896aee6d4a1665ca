"""Eager training: what autograd keeps, what operations on a weight give, and the one warning."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_models import prepared
from test_op_memory import Allocations
from test_spellings import SPELLINGS
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaError, RosaSpec, eager
from rosa_fx.eager import LazyWeight
from rosa_fx.kernels.terms.low_rank import LowRank
from rosa_fx.kernels.terms.sparse import Sparse

EPS = torch.finfo(torch.float32).eps


def saved_by(call: Any) -> tuple[Any, list[Tensor]]:
    """The result of a call and every tensor that autograd saved for its backward."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), saved


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def materialised(monkeypatch: pytest.MonkeyPatch, call: Any) -> Any:
    """The same with an ordinary dense weight that autograd keeps."""
    with monkeypatch.context() as patch:
        patch.setattr(eager, "is_eager", lambda: False)
        return call()


# What is multiplied there is no weight and no part of one, but a new tensor that the model makes of it, and keeps.
MAKES_ITS_OWN = {"cat of its own parts"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_right_and_keeps_no_dense_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, shape, input_shape, _ = SPELLINGS[name]
    torch.manual_seed(0)
    model = prepared(fn, shape)
    x = torch.randn(input_shape)
    weight = next(iter(rosa_fx.state.state_of(model).weights.values()))
    _, saved = saved_by(lambda: model(x.requires_grad_()))
    own = {t.data_ptr() for t in [*weight.base.tensors(), *weight.delta_tensors()]}
    operands = [t for t in saved if not isinstance(t, LazyWeight) and t.data_ptr() not in own and t.dim()]
    # What is left is activations: none is a weight, transposed or cut.
    kept = [t for t in operands if t.untyped_storage().nbytes() == 4 * shape[0] * shape[1] and t.shape != x.shape]
    assert len(kept) == (1 if name in MAKES_ITS_OWN else 0)
    ours = gradients(model, x)
    exact = materialised(monkeypatch, lambda: gradients(model, x))
    assert len(ours) == len(exact) == 5
    for mine, theirs in zip(ours, exact):
        assert (mine - theirs).norm() <= 32 * EPS * theirs.norm()


def layered(base: str = "nf4", layers: int = 4, size: int = 256, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(layers)))
    fields = {"rank": 4, "density": 0.01, "schedule": "spa_only", "targets": ["*.weight"], **fields}
    rosa_fx.transform(model, RosaSpec(base=base, **fields))
    if fields["density"]:
        dense = {name: torch.zeros(w.shape, dtype=torch.bool) for name, w in rosa_fx.state.state_of(model).weights.items()}
        for name, mask in dense.items():
            mask.view(-1)[: rosa_fx.adapter(model, name).sparse.values.numel()] = True
        rosa_fx.set_masks(model, dense)
    return model


@pytest.mark.parametrize("base", ["nf4", "int8", "keep"])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_autograd_keeps_to_the_byte(base: str, autocast: bool) -> None:
    """Of each linear: its input, and nothing else that the model does not own anyway."""
    model, size, rows = layered(base), 256, 8
    x = torch.randn(rows, size, requires_grad=True)
    owned = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x)

    _, saved = saved_by(call)
    storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in saved if t.data_ptr() not in owned}
    inputs = 4 * rows * size * (2 if autocast else 4)  # of four layers
    biases = 4 * size * 2 if autocast else 0  # as autocast made them
    layers = sum(storages.values()) - (4 * rows * size if not autocast else 0)
    assert layers in (inputs + biases, inputs + biases - 4 * rows * size), "x itself belongs to the caller"


def test_step_allocates_no_more_than_a_few_weights() -> None:
    """Eight layers, of which an ordinary weight each would be alive at the end of the forward pass."""
    model, size = layered("nf4", layers=8, size=512), 512
    x = torch.randn(4, size)
    gradients(model, x)
    with Allocations() as seen:
        gradients(model, x)
    assert seen.peak < 3 * 4 * size * size


class Experts(nn.Module):
    """Stacks of matrices, one used matrix by matrix and one in a batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 20, 16))
        self.down = nn.Parameter(torch.randn(3, 20, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([F.linear(part, self.up[number]) for number, part in enumerate(x)])
        z = torch.stack([part @ one.t() for part, one in zip(x, self.up)])
        return torch.bmm(torch.tanh(y + z), self.down)


def test_experts_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Experts()
    rosa_fx.transform(model, RosaSpec(base="nf4", rank=2, density=0.0, schedule="lora_only", targets=["up", "down"]))
    for weight in rosa_fx.state.state_of(model).weights.values():
        nn.init.normal_(weight.low_rank.B)
    x = torch.randn(3, 5, 16)
    _, saved = saved_by(lambda: model(x.clone().requires_grad_()))
    assert sum(isinstance(t, LazyWeight) for t in saved) == 1, "that of bmm"
    ours, theirs = gradients(model, x), materialised(monkeypatch, lambda: gradients(model, x))
    assert len(ours) == len(theirs) == 2 + 2 * 2
    for mine, their in zip(ours, theirs):
        assert (mine - their).norm() <= 64 * EPS * their.norm()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.inner(x, x, x, need_weights=False)
        return torch.einsum("bsd,de->bse", y, self.out)


@pytest.mark.parametrize("how", ["plain", "checkpoint", "autocast", "dropout"])
def test_attention(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that hands its weights to one opaque function."""
    torch.manual_seed(0)
    model = Attention()
    dropout = 0.5 if how == "dropout" else 0.0
    rosa_fx.transform(model, RosaSpec(base="keep", rank=2, density=0.0, schedule="lora_only", dropout=dropout))
    for weight in rosa_fx.state.state_of(model).weights.values():
        nn.init.normal_(weight.low_rank.B)
    run: Any = model
    if how == "checkpoint":
        run = nn.Module()
        run.inner = model
        run.forward = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    x = torch.randn(2, 5, 16)

    def call() -> list[Tensor]:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return gradients(run, x)

    ours, theirs = call(), materialised(monkeypatch, call)
    assert len(ours) == len(theirs) == 2 + 3 * 2
    for mine, their in zip(ours, theirs):
        assert (mine.float() - their.float()).norm() <= (64 * EPS if how != "autocast" else 2**-6) * their.float().norm()


def test_weight_taken_out_of_the_graph_is_an_ordinary_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layered(layers=1)
    linear: Any = model[0]
    expected = materialised(monkeypatch, lambda: linear.weight.detach())
    assert isinstance(linear.weight, LazyWeight)
    assert (linear.weight.shape, linear.weight.dtype, linear.weight.requires_grad) == ((256, 256), torch.float32, True)
    for taken in (
        linear.weight.detach(),
        linear.weight.data,
        linear.weight.clone(),
        torch.clone(linear.weight).detach(),
        linear.weight.contiguous(),
        copy.deepcopy(linear.weight.detach()),
        linear.weight + 0,
        torch.from_numpy(linear.weight.detach().numpy()),
        torch.tensor(linear.weight.tolist()),
        linear.weight.T.detach().T,
        torch.cat([part.detach() for part in linear.weight.chunk(3)]),
    ):
        assert type(taken) is Tensor
        assert torch.equal(taken, expected)
    assert str(expected[0, :2].tolist()[0])[:5] in repr(linear.weight)
    buffer = io.BytesIO()
    torch.save(linear.weight.detach(), buffer)
    for changes in (lambda w: w.mul_(2), lambda w: w.T.zero_(), lambda w: w[3].fill_(1), lambda w: torch.add(w, 1, out=w)):
        with torch.no_grad(), pytest.raises(RosaError, match="would change a rewritten weight"):
            changes(linear.weight)
    with torch.no_grad():
        assert torch.equal(linear.weight, expected)
    before = linear.weight
    kept = linear.weight.detach()
    with torch.no_grad():
        rosa_fx.adapter(model, "0.weight").low_rank.B.add_(1)
    assert torch.equal(kept, expected)
    assert not torch.equal(linear.weight, expected)
    with pytest.raises(RuntimeError, match="read before its adapter changed"):
        before.sum()


def test_gradient_of_the_weight_itself() -> None:
    """Who looks at the weight's gradient gets it, and the adapters theirs."""
    model = layered(layers=1)
    linear: Any = model[0]
    x = torch.randn(5, 256)
    seen: list[Tensor] = []
    weight = linear.weight
    weight.register_hook(seen.append)
    weight.retain_grad()
    F.linear(x, weight, linear.bias).square().sum().backward()
    hidden = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    y = linear(x)
    y.square().sum().backward()
    exact = (2 * y.detach()).t() @ x
    assert (seen[0] - exact).norm() <= 32 * EPS * exact.norm()
    assert torch.equal(weight.grad, seen[0])
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - hidden[name]).norm() <= 32 * EPS * hidden[name].norm() + 1e-12, name


def test_a_use_that_is_no_product_computes_the_gradients_of_what_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the fused operators do (see test_ops): a frozen term costs nothing in backward."""
    model = layered(layers=1)
    linear: Any = model[0]
    linear.weight.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    computed: list[str] = []
    for kind in (LowRank, Sparse):
        whole = kind.grads_from_dense
        monkeypatch.setattr(
            kind, "grads_from_dense", lambda self, *args, whole=whole: (computed.append(self.kind), whole(self, *args))[1]
        )
    for frozen, kinds in ((("A", "B"), ["sparse"]), (("values",), ["low_rank"]), (("A",), ["low_rank", "sparse"])):
        model.zero_grad()
        computed.clear()
        trains = {name: p for name, p in model.named_parameters() if name in expected}
        for name, parameter in trains.items():
            parameter.requires_grad_(not name.endswith(frozen))
        linear.weight.square().sum().backward()
        assert computed == kinds
        for name, parameter in trains.items():
            assert (parameter.grad is None) == name.endswith(frozen)
            assert parameter.grad is None or torch.equal(parameter.grad, expected[name])


def test_operands_that_do_not_fit_fail_as_ever() -> None:
    linear: Any = layered(layers=1)[0]
    for x, message in (
        (torch.randn(3, 7), "shapes cannot be multiplied"),
        (torch.randn(3, 256).double(), "dtype"),
        (torch.randint(0, 5, (3, 256)), "dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear(x)


def test_functional_transforms_still_work() -> None:
    model = layered("keep", layers=1)
    x = torch.randn(4, 256)
    rows = torch.func.vmap(lambda row: model(row))(x)
    assert (rows - model(x)).norm() <= 32 * EPS * rows.norm()


def test_one_warning_says_what_compiling_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layered(layers=2), torch.randn(3, 256)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        monkeypatch.setattr(eager, "_warned", False)
        with torch.no_grad():
            model(x)
        model.eval()(x)
        assert not seen, "not for inference"
        model.train()
        for _ in range(3):
            model(x).sum().backward()
        assert [w.category for w in seen] == [rosa_fx.EagerTrainingWarning]
        assert "compile_blocks(model)" in str(seen[0].message)
        monkeypatch.setattr(eager, "_warned", False)
        seen.clear()
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
        assert not [w for w in seen if w.category is rosa_fx.EagerTrainingWarning]


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_may_be_changed_in_place(shape: tuple[int, ...], transposed: bool) -> None:
    def model(scale_in_place: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layer = prepared((lambda x, w, b: x @ w) if transposed else F.linear, (32, 32))
        x = torch.linspace(-1, 1, 192)[: torch.Size(shape).numel()].reshape(shape).requires_grad_()
        y = layer(x)
        assert not y._is_view()
        if scale_in_place:
            y *= 2
            F.relu(y, inplace=True)
        else:
            y = F.relu(y * 2)
        y.square().sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    changed, copied = model(True), model(False)
    assert len(changed) > 4
    assert all(torch.equal(a, b) for a, b in zip(changed, copied, strict=True))
