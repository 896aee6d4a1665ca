"""Which weights select_targets takes, and what it says when it cannot."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from target_models import names, only, sequential
from torch import nn

from rosa_fx.errors import RosaError
from rosa_fx.linear_uses import attribute_uses
from rosa_fx.spec import RosaSpec
from rosa_fx.targets import select_targets


class HandWritten(nn.Module):
    """A transformer block's worth of spellings: packed qkv, einsum, a raw parameter, a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.positions = nn.Parameter(torch.zeros(16, 8))
        self.qkv = nn.Parameter(torch.randn(24, 8))
        self.out = nn.Parameter(torch.randn(8, 2, 4))
        self.up = nn.Parameter(torch.randn(8, 32))
        self.down = nn.Parameter(torch.randn(8, 32))
        self.gain = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.positions[: ids.shape[1]]
        wq, wk, wv = self.qkv.chunk(3)
        q, k, v = x @ wq.T, F.linear(x, wk), torch.matmul(x, wv.transpose(0, 1))
        x = x + torch.softmax(q @ k.mT, -1) @ v
        down = self.down.to(x.dtype)
        x = x + torch.einsum("bsf,df->bsd", torch.relu(x @ self.up), down)
        return self.head(x * self.gain.sum())


def test_plain_sequential() -> None:
    model = sequential()
    first, second = select_targets(model, RosaSpec(rank=2, alpha=8, density=0.1))
    assert (first.name, first.shape, first.rank, first.alpha, first.scale) == ("0.weight", (12, 8), 2, 8.0, 4.0)
    assert (first.density, first.nnz, first.base, first.note) == (0.1, int(0.1 * 12 * 8), "nf4", "")
    assert first.owners == ((model[0], "weight"),)
    assert (second.name, second.shape) == ("3.weight", (4, 12))


def test_selection_changes_nothing() -> None:
    model = sequential()
    before = {name: (id(value), value.detach().clone()) for name, value in model.named_parameters()}
    select_targets(model, RosaSpec(density=0.1))
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())


def test_multihead_attention() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    expected = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert names(layer) == expected
    separate = nn.MultiheadAttention(8, 2, kdim=6, vdim=10)
    assert names(separate) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    stack = nn.TransformerEncoder(layer, 2)
    assert names(stack) == [f"layers.{index}.{name}" for index in range(2) for name in expected]


def test_hand_written_model() -> None:
    assert names(HandWritten()) == ["qkv", "up", "down"]
    assert names(HandWritten(), targets=["gain", "head.weight"]) == ["gain", "head.weight"]
    assert names(HandWritten(), targets="positions") == ["positions"]
    out = only(HandWritten(), targets="out", rank=2)
    assert (out.shape, str(out.reading), out.note) == ((8, 2, 4), "8 matrices 2 x 4", "read as 8 matrices 2 x 4")
    with pytest.raises(RosaError, match=r"'weight' belongs to a convolution with kernel_size \(3, 3\), not 1"):
        names(nn.Conv2d(4, 4, 3, bias=False), targets="weight")
    # A pattern may match things that are no targets, as long as something is.
    mixed = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    assert names(mixed, targets="*") == ["1.weight"]


def test_source_that_cannot_be_read() -> None:
    space: dict[str, Any] = {"nn": nn, "torch": torch}
    source = (
        "class Made(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = nn.Parameter(torch.ones(4, 4))\n"
        "    def forward(self, x):\n"
        "        return x @ self.w\n"
    )
    exec(source, space)
    with pytest.raises(RosaError, match=r"'all-linear' selects no weight of Made"):
        names(space["Made"]())
    assert names(space["Made"](), targets="w") == ["w"]


class Spellings(nn.Module):
    def forward(self, x: torch.Tensor, index: torch.Tensor) -> Any:
        me = self
        a = self.a if x.dim() == 2 else self.b
        c, d = self.c, self.d.view(4, -1)
        if x.is_cuda:
            c = c + 1
        renamed = self.plain
        renamed = x
        for w, bias in zip(self.ws, self.biases):
            x = x @ w.t() + bias
        x @= self.e
        y = torch.addmm(self.added, x, self.f) + torch.addmm(input=self.added, mat1=x, mat2=self.g)
        z = [torch.tensordot(x, each, 1) for each in self.tensors]
        self.h.to(x.dtype).mm(x)
        if (late := self.late) is not None:
            x.matmul(late)
        F.linear(x, weight=self.i.float(), bias=self.biases[0])
        self.linear(self.latents)
        return me, x @ a, x @ c, x @ d, y, z, renamed @ x, self.lookup[index], self.lookup @ x, self.j[1:, None] @ x

    def more(self, x: torch.Tensor) -> torch.Tensor:
        return F.embedding(x, self.tied) @ self.tied.T + torch.transpose(self.k, 0, 1) @ self.child.w.T


def test_attribute_uses() -> None:
    uses = attribute_uses(Spellings)
    found = {path for path in uses.products if not path.endswith(".T")}
    assert found == {*"abcdefghijk", "ws", "tensors", "late", "lookup", "tied", "child.w"}
    assert uses.lookups == {"lookup", "tied"}


def hiding(method: Any) -> Any:
    def wrapper(*args: Any) -> Any:
        return method(*args)

    return wrapper


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 4))

    @hiding
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([each @ self.w for each in x])


class Derived(Decorated):
    pass


def test_decorated_and_inherited_methods_are_read() -> None:
    assert names(Derived()) == ["w"]


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([torch.ones(4, 4), torch.ones(4)])
        self.by_name = nn.ParameterDict({"a": torch.ones(4, 4), "b": torch.ones(4, 4)})
        self.holder = nn.Module()
        self.holder.w = nn.Parameter(torch.ones(4, 4))
        self.holder.unused = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for w in self.ws:
            x = x @ w
        for name in ("a", "b"):
            x = F.linear(x, self.by_name[name])
        return F.linear(x, self.holder.w)


def test_parameters_held_for_a_parent() -> None:
    assert set(names(Parent())) == {"ws.0", "by_name.a", "by_name.b", "holder.w"}


def test_modules_that_are_not_linear() -> None:
    model = nn.ModuleDict(
        {
            "bilinear": nn.Bilinear(4, 4, 4),
            "lstm": nn.LSTM(4, 4),
            "cell": nn.GRUCell(4, 4),
            "conv": nn.Conv1d(4, 4, 1),
            "table": nn.Embedding(9, 4),
            "bag": nn.EmbeddingBag(9, 4),
            "fc": nn.Linear(4, 4),
        }
    )
    assert names(model) == ["fc.weight"]
    assert names(model, targets="cell.*") == ["cell.weight_ih", "cell.weight_hh"]
    with pytest.raises(RosaError, match=r"'lstm.weight_ih_l0', which is read by LSTM through its own flat list"):
        names(model, targets="lstm.*")
    assert names(model, targets="conv.*") == ["conv.weight"], "of kernel size 1, which is a product"
    with pytest.raises(RosaError, match=r"matches nothing usable.*'bilinear.weight' has 3 dim.*'bilinear.bias' has 1 dim"):
        names(model, targets="bilinear.*")


# The output head


def language_model(head: str = "to_vocabulary", size: int = 50) -> nn.Module:
    model = nn.Module()
    model.table = nn.Embedding(50, 8)
    model.position_table = nn.Embedding(8, 8)
    model.stem = nn.Linear(8, 8)
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 50), nn.Linear(50, 8))])
    model.add_module(head, nn.Linear(8, size, bias=False))
    return model


@pytest.mark.parametrize("wrap", [0, 2])
@pytest.mark.parametrize(
    "model", [language_model(), language_model("lm_head", 64), language_model("score", 2)], ids=["own name", "lm_head", "score"]
)
def test_head_is_left_out(model: nn.Module, wrap: int) -> None:
    prefix = ""
    for _ in range(wrap):
        wrapper = nn.Module()
        wrapper.inner = model
        model, prefix = wrapper, f"{prefix}inner."
    expected = ["stem.weight", "blocks.0.0.weight", "blocks.0.1.weight"]
    assert names(model) == [prefix + name for name in expected]


def test_last_of_several_candidates_is_the_head() -> None:
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert names(model) == ["1.weight"]


def test_a_head_is_kept_where_nothing_else_is_left() -> None:
    model = nn.Module()
    model.head = nn.Linear(4, 4)
    assert names(model) == ["head.weight"]
    assert names(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))) == ["1.weight"]


def test_head_can_be_named() -> None:
    assert names(language_model(), targets=["all-linear", "to_vocabulary.weight"])[-1] == "to_vocabulary.weight"


def test_compound_head_gives_up_its_last_layer_only() -> None:
    model = nn.Module()
    model.body = nn.Linear(4, 4)
    model.classifier = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    assert names(model) == ["body.weight", "classifier.0.weight"]


# Shared weights


def test_parameter_shared_by_linears_is_one_target() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    target, _ = select_targets(model, RosaSpec(density=0.2))
    assert target.name == "0.weight"
    assert target.owners == ((model[0], "weight"), (model[1], "weight"))
    assert only(model, targets="1.weight").name == "0.weight"  # by its other name
    assert names(model, exclude="1.weight") == ["2.weight"]
    assert select_targets(model, RosaSpec(density=0.2, overrides={"1.weight": {"rank": 1}}))[0].rank == 1


def test_shared_module_has_one_owner() -> None:
    layer = nn.Linear(4, 4)
    assert only(nn.Sequential(layer, nn.ReLU(), layer)).owners == ((layer, "weight"),)
    assert only(nn.Sequential(layer, nn.ReLU(), layer), targets="2.weight").name == "0.weight"


def test_tied_head() -> None:
    model = language_model()
    model.to_vocabulary.weight = model.table.weight  # type: ignore[union-attr]
    assert "table.weight" not in names(model)
    for pattern in ("to_vocabulary.weight", "*"):
        with pytest.raises(RosaError, match=r"'table.weight'.*not linear: exclude it \(exclude=\['table.weight'\]\)"):
            names(model, targets=pattern)
    assert "table.weight" not in names(model, targets="*", exclude="to_vocabulary.weight")


# Patterns, overrides, caps


def test_exclude() -> None:
    assert names(sequential(), exclude=["3.*"]) == ["0.weight"]
    with pytest.raises(RosaError, match=r"selects no weight of Sequential: '0.weight' is excluded; '3.weight' is excl"):
        names(sequential(), exclude=["*"])
    with pytest.raises(RosaError, match=r"targets: the pattern '0.weight' matches nothing usable.*'0.weight' is excluded"):
        names(sequential(), targets="0.weight", exclude="0.*")


@pytest.mark.parametrize("field", ["targets", "exclude", "overrides"])
def test_pattern_that_matches_nothing(field: str) -> None:
    value = {"encodr.fc": {"rank": 1}} if field == "overrides" else "encodr.fc"
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    with pytest.raises(RosaError, match=rf"{field}: the pattern 'encodr.fc' matches no parameter.*'encoder.fc.weight'"):
        names(model, **{field: value})


def test_hint_for_a_part_of_a_name() -> None:
    with pytest.raises(RosaError, match=r"'q_proj' matches no.*close names: 'in.q_proj.weight'.*covers the whole"):
        names(nn.ModuleDict({"in": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})}), targets="q_proj")


def test_override_that_names_no_target() -> None:
    with pytest.raises(RosaError, match=r"overrides: the pattern '\*.bias' names no target, only '0.bias'; '2.bias'; '3.bias'"):
        names(sequential(), overrides={"*.bias": {"rank": 1}})


def test_later_overrides_win_key_by_key() -> None:
    overrides = {"*": {"rank": 3, "alpha": 6, "base": "int8"}, "3.*": {"rank": 1, "density": 0.5}}
    first, second = select_targets(sequential(), RosaSpec(density=0.1, overrides=overrides))
    assert (first.rank, first.alpha, first.scale, first.density, first.base) == (3, 6.0, 2.0, 0.1, "int8")
    assert (second.rank, second.alpha, second.scale, second.density, second.base) == (1, 6.0, 6.0, 0.5, "int8")
    assert second.nnz == 24
    backwards = dict(reversed(overrides.items()))
    assert select_targets(sequential(), RosaSpec(density=0.1, overrides=backwards))[1].rank == 3


def test_general_rank_is_capped_and_overrides_are_not() -> None:
    first, second = select_targets(sequential(), RosaSpec(rank=6, alpha=12, density=0.1, rank_stabilized=True))
    assert (first.rank, first.note) == (6, "")
    assert (second.rank, second.note) == (4, "rank capped from 6 to 4 = min(N, K)")
    assert second.scale == 12 / math.sqrt(4)
    with pytest.raises(RosaError, match=r"overrides\['3.\*'\]: rank 6 exceeds min\(N, K\) = 4 of the weight '3.weight'"):
        names(sequential(), overrides={"3.*": {"rank": 6}})
    assert len(names(sequential(), overrides={"3.*": {"rank": 4}})) == 2


def test_terms_that_are_left_out() -> None:
    assert (only(nn.Linear(4, 4), rank=0).rank, only(nn.Linear(4, 4), rank=0).scale) == (0, 0.0)
    assert only(nn.Linear(4, 4), density=0).nnz == 0
    tiny = only(nn.Linear(4, 4), density=0.006)
    assert (tiny.nnz, tiny.note) == (
        0,
        "rank capped from 16 to 4 = min(N, K); density 0.006 of 4 x 4 is less than one entry: no sparse term",
    )
    with pytest.raises(RosaError, match=r"'weight' of shape 4 x 4 has rank 0 and density 0.006.*nothing to train"):
        only(nn.Linear(4, 4), rank=0, density=0.006)
    with pytest.raises(RosaError, match=r"'0.weight'.*nothing to train there; exclude it"):
        names(sequential(), overrides={"0.*": {"rank": 0, "density": 0}})


def test_full_density() -> None:
    assert only(nn.Linear(7, 5), density=1).nnz == 35
