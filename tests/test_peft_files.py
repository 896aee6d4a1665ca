"""Adapters that PEFT reads, and LoRAs of PEFT that rosa_fx reads: equal outputs, and refusals with names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import assert_same, contents, inputs, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaError, RosaSpec
from rosa_fx.adapter_format import CONFIG, TENSORS

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
EPS = torch.finfo(torch.float32).eps


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 48)
        self.down = nn.Linear(48, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """`up` is a module by itself and the end of other modules' names; `same` shares its weight with it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.up = nn.Linear(64, 64)
        self.same = nn.Linear(64, 64)
        self.same.weight = self.up.weight
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.same(torch.tanh(self.up(x)))))


def plain(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def spec(**fields: Any) -> RosaSpec:
    return RosaSpec(**{"base": "keep", "rank": 4, "density": 0.0, "schedule": "lora_only", **fields})


def trained(model: nn.Module | None = None, **fields: Any) -> nn.Module:
    return train(rosa_fx.transform(model or plain(), spec(**fields)), masks=fields.get("density", 0) > 0)


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 64 * EPS * b.norm())


def of_peft(model: nn.Module, folder: Path) -> nn.Module:
    loaded = peft.PeftModel.from_pretrained(model, folder)
    assert not any("unused" in name for name in loaded.state_dict())
    return loaded.eval()


SPECS: list[dict[str, Any]] = [
    {},
    {"rank_stabilized": True, "alpha": 5},
    {"overrides": {"blocks.1.up.weight": {"rank": 7, "alpha": 3}}},
    {"overrides": {"up.weight": {"rank": 2}, "blocks.0.up.weight": {"alpha": 1.5}}},
    {"targets": ["up.weight"]},
    {"targets": ["blocks.0.up.weight", "blocks.1.down.weight"]},
]


@pytest.mark.parametrize("fields", SPECS, ids=str)
@torch.no_grad()
def test_peft_computes_the_same_and_it_comes_back(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = trained(**fields).eval()
    expected = model(inputs())
    rosa_fx.export_peft(model, tmp_path / "lora")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [CONFIG, TENSORS]
    theirs = of_peft(plain(), tmp_path / "lora")
    assert close(theirs(inputs()), expected)
    assert not close(plain()(inputs()), expected)
    adapted = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}
    assert len(adapted) == len(load_file(tmp_path / "lora" / TENSORS)) / 2, "no module more than those exported"

    ours = rosa_fx.import_peft(plain(), tmp_path / "lora").eval()
    assert_same({k: v for k, v in contents(model).items() if "fingerprint" not in k}, _without(contents(ours)))
    assert torch.equal(ours(inputs()), expected)
    state = rosa_fx.state.state_of(ours)
    assert {n: (t.rank, t.scale) for n, t in state.targets.items()} == {
        n: (t.rank, t.scale) for n, t in rosa_fx.state.state_of(model).targets.items()
    }
    again = rosa_fx.import_peft(rosa_fx.transform(plain(), spec(**fields)), tmp_path / "lora").eval()
    assert torch.equal(again(inputs()), expected)
    # Through PEFT and back, in the files that it writes itself.
    theirs.save_pretrained(tmp_path / "again")
    assert close(rosa_fx.import_peft(plain(), tmp_path / "again").eval()(inputs()), expected)


def _without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if "fingerprint" not in key}


def test_lora_made_by_peft(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=r"blocks.*\.(up|down)",
        rank_pattern={"blocks.1.up": 5},
        alpha_pattern={r"blocks\.\d\.down": 2},
        use_rslora=True,
    )
    theirs = peft.get_peft_model(plain(), config)
    torch.manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "lora")
    chosen = RosaSpec(base="keep", density=0.05, schedule="wl3", adapter_dtype="float32")
    model = rosa_fx.import_peft(plain(), tmp_path / "lora", spec=chosen)
    with torch.no_grad():
        assert close(model.eval()(inputs()), theirs.eval()(inputs()))
    targets = rosa_fx.state.state_of(model).targets
    assert {name: (t.rank, t.alpha) for name, t in targets.items()} == {
        "blocks.0.up.weight": (3, 7),
        "blocks.0.down.weight": (3, 2),
        "blocks.1.up.weight": (5, 7),
        "blocks.1.down.weight": (3, 2),
    }
    assert all(target.nnz for target in targets.values()), "the rest of the spec holds"
    # Another scale than the model's goes into B.
    names = dict.fromkeys(targets, None)
    other = RosaSpec(
        base="keep",
        rank=3,
        alpha=1,
        density=0.0,
        schedule="lora_only",
        targets=tuple(names),
        overrides={"blocks.1.up.weight": {"rank": 5}},
    )
    again = rosa_fx.import_peft(rosa_fx.transform(plain(), other), tmp_path / "lora")
    with torch.no_grad():
        assert close(again.eval()(inputs()), theirs(inputs()))


@pytest.mark.parametrize("targets", [["up"], ["up", "same"]], ids=str)
def test_shared_weight_adapted_in_two_ways_is_refused(tmp_path: Path, targets: list[str]) -> None:
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=targets))
    theirs.save_pretrained(tmp_path / "lora")
    for model in (plain(), rosa_fx.transform(plain(), spec(rank=2))):
        with pytest.raises(RosaError, match=r"the modules up and same share their weight, .* does not adapt them alike"):
            rosa_fx.import_peft(model, tmp_path / "lora")


def test_gpt2_and_its_transposed_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def make() -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=32)
        return transformers.GPT2LMHeadModel(config).eval()

    model = trained(make(), rank=3).eval()
    rosa_fx.export_peft(model, tmp_path / "lora")
    ids = torch.arange(10).view(2, 5)
    theirs = of_peft(make(), tmp_path / "lora")
    assert type(theirs).__name__ == "PeftModelForCausalLM"
    with torch.no_grad():
        expected = model(ids).logits
        assert close(theirs(ids).logits, expected)
        ours = rosa_fx.import_peft(make(), tmp_path / "lora").eval()
        assert torch.equal(ours(ids).logits, expected)


def test_sparse_part_as_shira(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"rank": 0, "density": 0.07, "schedule": "spa_only", "targets": ["blocks.*.up.weight"]}
    model = trained(**fields).eval()
    rosa_fx.export_peft(model, tmp_path / "shira", part="sparse")
    config = json.loads((tmp_path / "shira" / CONFIG).read_text())
    assert (config["peft_type"], config["r"]) == ("SHIRA", 2), "int(0.07 · 48 · 64) = 215 entries need r = 2 of 112"
    with torch.no_grad():
        expected = model(inputs())
        assert close(of_peft(plain(), tmp_path / "shira")(inputs()), expected)
        assert not close(plain()(inputs()), expected)
    both = trained(density=0.07, schedule="wl1", targets=["blocks.*.up.weight"]).eval()
    with pytest.raises(RosaError, match=r"blocks.0.up.weight has a trained low-rank part, .* drop_low_rank=True"):
        rosa_fx.export_peft(both, tmp_path / "no", part="sparse")
    rosa_fx.export_peft(both, tmp_path / "yes", part="sparse", drop_low_rank=True)
    uneven = trained(rank=0, density=0.9, schedule="spa_only", overrides={"blocks.0.*": {"density": 0.3}})
    with pytest.raises(RosaError, match=r"one r for all modules, which must be \d+ here"):
        rosa_fx.export_peft(uneven, tmp_path / "no", part="sparse")
    with pytest.raises(RosaError, match="no weight has a sparse part with a mask"):
        rosa_fx.export_peft(trained(), tmp_path / "no", part="sparse", drop_low_rank=True)
    assert not (tmp_path / "no").exists()


def test_what_peft_has_no_place_for(tmp_path: Path) -> None:
    def refused(model: nn.Module, message: str, **options: Any) -> None:
        with pytest.raises(RosaError, match=message):
            rosa_fx.export_peft(model, tmp_path / "lora", **options)
        assert not (tmp_path / "lora").exists()

    both = trained(density=0.05, schedule="wl1")
    refused(both, r"blocks.0.up.weight has a trained sparse part, .* drop_sparse=True")
    attention = nn.Sequential(nn.MultiheadAttention(16, 2))
    refused(trained(attention, targets=["0.in_proj_weight"]), "0.in_proj_weight cannot be exported .* the parameter 'in_proj")
    attention = nn.Sequential(nn.MultiheadAttention(16, 2))
    refused(trained(attention, targets=["0.out_proj.weight"]), "nn.MultiheadAttention reads it without calling")
    broken = trained()
    rosa_fx.adapter(broken, "up.weight").low_rank.B.data[0, 0] = float("nan")
    refused(broken, "lora_B.weight holds NaN")
    refused(plain(), "not transformed")
    refused(trained(), "part is 'all'", part="all")
    refused(trained(rank=0, density=0.1, schedule="spa_only"), "no weight has a low-rank part", drop_sparse=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(RosaError, match="is not empty: it is left alone"):
        rosa_fx.export_peft(trained(), tmp_path / "full")
    rosa_fx.export_peft(both, tmp_path / "dropped", drop_sparse=True)


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return edit


def _tensors(change: Callable[[dict[str, Tensor]], Any], signed: bool = False) -> Callable[[Path], None]:
    """Changed tensors, in a file without rosa_fx's own metadata, as PEFT writes it, or with it as it was."""

    def edit(folder: Path) -> None:
        with safe_open(folder / TENSORS, "pt") as stored:
            metadata = stored.metadata()
        tensors = {key: tensor.clone() for key, tensor in load_file(folder / TENSORS).items()}
        change(tensors)
        save_file(tensors, folder / TENSORS, metadata=metadata if signed else None)

    return edit


KEY = "base_model.model.blocks.0.up.lora_A.weight"


def _rename(name: str) -> Callable[[Path], None]:
    return _tensors(lambda t: t.update({name: t.pop(KEY)}))


def _truncate(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) // 2])


def _flip(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-5] ^= 1
    (folder / TENSORS).write_bytes(bytes(data))


def _pickled(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "adapter_model.safetensors is damaged"),
        (_flip, "its checksum differs"),
        (_pickled, "is missing .adapter_model.bin is a pickle, which is not read"),
        (lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json"),
        (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json is damaged"),
        (lambda f: (f / CONFIG).write_text("[]"), "is no LoRA .peft_type 'list'"),
        (_edit(lambda c: c.update(peft_type="LOHA")), "is no LoRA .peft_type 'LOHA'"),
        (_edit(lambda c: c.update(use_dora=True)), "use_dora is True, which a low-rank term does not hold"),
        (_edit(lambda c: c.update(bias="all")), "bias is 'all'"),
        (_edit(lambda c: c.update(modules_to_save=["head"])), r"modules_to_save is \['head'\]"),
        (_edit(lambda c: c.update(init_lora_weights="pissa")), "'pissa', which changed the base weights"),
        (_edit(lambda c: c.update(rank_pattern=3)), "rank_pattern is 3"),
        (_edit(lambda c: c.update(alpha_pattern={"(": 3})), "is no regular expression"),
        (_edit(lambda c: c.update(lora_alpha=-1)), "the alpha of .* is -1.0"),
        (_tensors(lambda t: t[KEY].fill_(float("nan"))), "lora_A.weight holds NaN or infinity"),
        (_tensors(lambda t: t[KEY].add_(1), signed=True), "its checksum differs"),
        (_tensors(lambda t: t.pop(KEY)), "lacks the other factor of 'blocks.0.up'"),
        (_tensors(lambda t: t.update({KEY: torch.ones(4)})), r"lora_A.weight is torch.float32 \[4\], not a matrix"),
        (_tensors(lambda t: t.update({KEY: torch.ones(3, 64)})), "have ranks 3 and 4"),
        (_tensors(lambda t: t.update({KEY: torch.ones(4, 63)})), r"for a weight \[48, 63\], this model's is \[48, 64\]"),
        (
            _tensors(lambda t: t.update({"base_model.model.x.lora_embedding_A": t[KEY].clone()})),
            "no factor of a LoRA on a linear",
        ),
        (_rename("base_model.model.../etc/passwd.lora_A.weight"), "no factor of a LoRA"),
        (_tensors(lambda t: t.clear()), "holds no LoRA factors"),
        (
            _tensors(lambda t: t.update({k.replace("blocks.0", "blocks.7"): t.pop(k) for k in list(t) if "blocks.0.up" in k})),
            r"module 'blocks.7.up', .*which this model does not have|for the module 'blocks.0.up', unlike the transformed",
        ),
    ],
)
def test_damaged_or_foreign_loras_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    rosa_fx.export_peft(trained(), tmp_path / "lora")
    damage(tmp_path / "lora")
    for model in (plain(), rosa_fx.transform(plain(), spec())):
        before = contents(model)
        with pytest.raises(RosaError, match=message):
            rosa_fx.import_peft(model, tmp_path / "lora")
        assert_same(before, contents(model))


def test_other_models_are_refused(tmp_path: Path) -> None:
    rosa_fx.export_peft(trained(), tmp_path / "lora")
    for other in (plain(1), rosa_fx.transform(plain(1), spec())):
        with pytest.raises(RosaError, match="the base weight has other values than the one the LoRA"):
            rosa_fx.import_peft(other, tmp_path / "lora")
    with pytest.raises(RosaError, match=r"rank is 4 in the LoRA .* and 5 in this model"):
        rosa_fx.import_peft(rosa_fx.transform(plain(), spec(rank=5)), tmp_path / "lora")
    with pytest.raises(RosaError, match="unlike the transformed model"):
        rosa_fx.import_peft(rosa_fx.transform(plain(), spec(targets=["up.weight"])), tmp_path / "lora")
    with pytest.raises(RosaError, match="spec is for a plain model"):
        rosa_fx.import_peft(rosa_fx.transform(plain(), spec()), tmp_path / "lora", spec=spec())
