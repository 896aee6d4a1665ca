"""Adapters on disk: equal outputs after a round trip, refusals that leave everything untouched, interrupted writes."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaError, RosaSpec, adapter_format, atomic
from rosa_fx.adapter_format import CONFIG, PENDING, TENSORS
from rosa_fx.fingerprint import as_text, fingerprint

N, K = 48, 64


class Net(nn.Module):
    """Three linears, two of which share their weight, and a bare weight."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(K, N)
        self.b = nn.Linear(N, K, bias=False)
        self.c = nn.Linear(K, N)
        self.w = nn.Parameter(torch.randn(K, N) / 8)
        self.head = nn.Linear(K, 5)
        if tied:
            self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.tanh(self.a(x)))
        return self.head(torch.tanh(self.c(x)) @ self.w.T)


def plain(seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net(tied).to(dtype)


def spec_of(**fields: Any) -> RosaSpec:
    patterns = ["a.weight", "b.weight", "c.weight", "w"]
    return RosaSpec(**{"base": "nf4", "rank": 4, "density": 0.05, "targets": patterns, **fields})


@torch.no_grad()
def train(model: nn.Module, masks: bool = True) -> nn.Module:
    """Stand-in for training: random adapter values, and random masks."""
    generator = torch.Generator().manual_seed(7)
    state = rosa_fx.adapter_state(model)
    if masks:
        found = {}
        for name, target in model._rosa_fx_state.targets.items():  # type: ignore[union-attr]
            if target.nnz:
                flat = torch.randperm(target.shape[0] * target.shape[1], generator=generator)[: target.nnz]
                dense = torch.zeros(target.shape, dtype=torch.bool)
                dense.view(-1)[flat] = True
                found[name] = dense
        rosa_fx.set_masks(model, found)
    for key, tensor in state.items():
        if tensor.is_floating_point() and (masks or "sparse" not in key):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
    return model


def trained(tied: bool = False, dtype: torch.dtype = torch.float32, masks: bool = True, **fields: Any) -> nn.Module:
    return train(rosa_fx.transform(plain(tied=tied, dtype=dtype), spec_of(**fields)), masks)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def assert_refused(model: nn.Module, folder: Path, message: str) -> None:
    """Refused with this message, and the model is what it was."""
    before, kind, modes = contents(model), type(model), [p.requires_grad for p in model.parameters()]
    phases = [getattr(m, "phase", None) for m in model.modules()]
    with pytest.raises(RosaError, match=message):
        rosa_fx.load_adapter(model, folder)
    assert_same(before, contents(model))
    assert type(model) is kind
    assert modes == [p.requires_grad for p in model.parameters()]
    assert phases == [getattr(m, "phase", None) for m in model.modules()]


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any], resign: bool = True) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    if resign:
        rest = {key: value for key, value in config.items() if key != "sha256"}
        config["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changed tensors under valid checksums: what a faulty or hostile writer could make."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / TENSORS).items()}
    change(tensors)
    save_file(tensors, folder / TENSORS)

    def sign(config: dict[str, Any]) -> None:
        size, digest = (folder / TENSORS).stat().st_size, atomic.sha256(folder / TENSORS)
        config["tensors"] |= {"bytes": size, "sha256": digest}

    edit_config(folder, sign)


# Round trips


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"base": "keep"},
        {"base": "int8"},
        {"base": "fp4", "blocksize": 128},
        {"double_quant": True},
        {"adapter_dtype": "bfloat16"},
        {"base": "keep", "dtype": torch.bfloat16},
        {"dtype": torch.float16, "adapter_dtype": "float16"},
        {"dtype": torch.float64, "base": "keep"},
        {"rank": 0, "schedule": "spa_only"},
        {"density": 0.0, "schedule": "lora_only"},
        {"density": 0.0001, "overrides": {"a.weight": {"density": 0.1}}},
        {"overrides": {"a.*": {"rank": 7, "base": "keep"}, "w": {"density": 0.0, "alpha": 3}, "b.*": {"rank": 0}}},
        {"tied": True, "targets": ["a.weight", "b.weight"]},
        {"masks": False},
        {"targets": "all-linear", "exclude": ["b.*"], "rank_stabilized": True},
    ],
    ids=lambda fields: ",".join(f"{k}={v}" for k, v in fields.items()) or "nf4",
)
@pytest.mark.parametrize("onto", ["plain", "transformed"])
def test_loaded_adapter_gives_equal_outputs(tmp_path: Path, fields: dict[str, Any], onto: str) -> None:
    model = trained(**fields)
    x = inputs(fields.get("dtype", torch.float32))
    rosa_fx.save_adapter(model, tmp_path / "adapter")
    base = plain(tied=fields.get("tied", False), dtype=fields.get("dtype", torch.float32))
    if onto == "transformed":
        torch.manual_seed(99)  # another initial A
        base = rosa_fx.transform(base, model._rosa_fx_state.spec)  # type: ignore[union-attr,assignment]
    loaded = rosa_fx.load_adapter(base, tmp_path / "adapter")
    assert loaded is base
    assert_same(contents(model), contents(loaded))
    assert torch.equal(model(x), loaded(x))
    ours, theirs = rosa_fx.trainable_parameters(model), rosa_fx.trainable_parameters(loaded)
    assert [[p.requires_grad for p in g["params"]] for g in ours] == [  # type: ignore[attr-defined]
        [p.requires_grad for p in g["params"]]  # type: ignore[attr-defined]
        for g in theirs
    ]
    with_mask = fields.get("masks", True)
    for name, weight in loaded._rosa_fx_state.weights.items():  # type: ignore[union-attr]
        if weight.sparse is not None and weight.sparse.values.numel():
            assert (weight.phase, weight.sparse.has_mask) == (("joint", True) if with_mask else ("low_rank", False))
            assert (name in rosa_fx.masks(loaded)) == with_mask
    assert rosa_fx.save_adapter(loaded, tmp_path / "again") is None
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / "adapter" / TENSORS).read_bytes()
    assert (tmp_path / "again" / CONFIG).read_bytes() == (tmp_path / "adapter" / CONFIG).read_bytes()


def test_files_say_what_they_hold(tmp_path: Path) -> None:
    model = trained()
    rosa_fx.save_adapter(model, str(tmp_path / "deep" / "adapter"))
    folder = tmp_path / "deep" / "adapter"
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]
    config = json.loads((folder / CONFIG).read_text())
    assert (config["format"], config["version"], config["rosa_fx"]) == ("rosa_fx adapter", 1, rosa_fx.__version__)
    assert RosaSpec.from_json(json.dumps(config["spec"])) == spec_of()
    assert config["weights"]["b.weight"] == {
        "shape": [K, N],
        "rank": 4,
        "nnz": int(0.05 * N * K),
        "base": {"kind": "nf4", "blocksize": 64, "double_quant": False},
        "dtype": "float32",
        "has_mask": True,
        "fingerprint": as_text(fingerprint(plain().b.weight)),
    }
    assert config["tensors"]["sha256"] == hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    tensors = load_file(folder / TENSORS)
    assert_same(dict(sorted(rosa_fx.adapter_state(model).items())), dict(sorted(tensors.items())))
    assert tensors["w.sparse.cols"].dtype == tensors["w.sparse.row_offsets"].dtype == torch.int32


def test_no_mask_saved_returns_to_low_rank(tmp_path: Path) -> None:
    fresh = trained(masks=False)
    rosa_fx.save_adapter(fresh, tmp_path / "a")
    model = rosa_fx.load_adapter(trained(), tmp_path / "a")
    assert not rosa_fx.masks(model)
    assert torch.equal(model(inputs()), fresh(inputs()))
    assert not any(w.sparse.values.requires_grad for w in model._rosa_fx_state.weights.values())  # type: ignore


def test_same_values_in_another_dtype_are_the_same_base(tmp_path: Path) -> None:
    model = trained(dtype=torch.bfloat16)
    rosa_fx.save_adapter(model, tmp_path / "a")
    wide = rosa_fx.load_adapter(plain(dtype=torch.bfloat16).float(), tmp_path / "a")
    assert torch.equal(rosa_fx.delta(wide, "w"), rosa_fx.delta(model, "w"))
    other = trained()
    rosa_fx.save_adapter(other, tmp_path / "b")
    assert_refused(plain(dtype=torch.bfloat16), tmp_path / "b", r"other values .* in float32 \(it is in bfloat16 here\)")


def test_adapter_cast_after_the_transform_is_widened(tmp_path: Path) -> None:
    model = trained().bfloat16()
    rosa_fx.save_adapter(model, tmp_path / "a")
    loaded = rosa_fx.load_adapter(plain(), tmp_path / "a")
    assert rosa_fx.adapter(loaded, "w").low_rank.A.dtype == torch.float32
    assert torch.equal(loaded.bfloat16()(inputs(torch.bfloat16)), model(inputs(torch.bfloat16)))
    narrow = rosa_fx.transform(plain(), spec_of()).bfloat16()
    rosa_fx.save_adapter(trained(), tmp_path / "b")
    assert_refused(narrow, tmp_path / "b", "would lose digits")


def test_fingerprint_follows_the_base_through_a_state_dict(tmp_path: Path) -> None:
    model = trained()
    moved = rosa_fx.transform(plain(seed=5), spec_of())
    moved.load_state_dict(model.state_dict())
    rosa_fx.save_adapter(moved, tmp_path / "a")
    assert torch.equal(rosa_fx.load_adapter(plain(), tmp_path / "a")(inputs()), model(inputs()))


def test_compiled_model(tmp_path: Path) -> None:
    model = torch.compile(trained(), backend="eager")
    with torch.no_grad():
        model(inputs())
    rosa_fx.save_adapter(model, tmp_path / "a")
    base = torch.compile(plain())  # a wrapper that never ran
    assert rosa_fx.load_adapter(base, tmp_path / "a") is base
    assert_same(contents(base._orig_mod), contents(trained()))
    assert torch.equal(base._orig_mod(inputs()), trained()(inputs()))


# Refusals


def test_wrong_models(tmp_path: Path) -> None:
    rosa_fx.save_adapter(trained(), tmp_path / "a")
    folder = tmp_path / "a"
    assert_refused(plain(seed=1), folder, "w: the base weight has other values .* load that base model")
    one = plain()
    with torch.no_grad():
        one.b.weight[3, 5] += 1e-6
    assert_refused(one, folder, "b.weight: the base weight has other values")
    assert_refused(rosa_fx.transform(one, spec_of()), folder, "b.weight: the base weight has other values")
    wider = plain()
    wider.b = nn.Linear(N, K + 2, bias=False)
    assert_refused(wider, folder, r"b.weight: shape is \(64, 48\) .* and \(66, 48\) in this model")
    renamed = plain()
    renamed.d = renamed.b
    del renamed.b
    assert_refused(renamed, folder, "does not fit this model: .*'b.weight' matches no parameter")
    assert_refused(nn.Linear(3, 3), folder, "does not fit this model")


def test_all_linear_names_missing_and_additional_weights(tmp_path: Path) -> None:
    folder, spec = tmp_path / "a", spec_of(targets="all-linear")
    rosa_fx.save_adapter(rosa_fx.transform(plain(), spec), folder)
    longer, renamed = plain(), plain()
    longer.extra = nn.Linear(4, 4)
    assert_refused(longer, folder, "has nothing for the weight")
    renamed.d = renamed.b
    del renamed.b
    assert_refused(renamed, folder, r"has nothing for the weight 'd.weight'")
    renamed.d = nn.Identity()
    assert_refused(renamed, folder, r"is for a weight 'b.weight', which is no target .*near names: ")


def test_other_spec_names_the_fields(tmp_path: Path) -> None:
    rosa_fx.save_adapter(trained(), tmp_path / "a")
    model = trained(rank=5, schedule="wl3")
    assert_refused(model, tmp_path / "a", r"rank \(saved 4, here 5\); schedule \(saved 'wl64', here 'wl3'\)")


def _flip(position: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / TENSORS).read_bytes())
        data[int(position * (len(data) - 1))] ^= 4
        (folder / TENSORS).write_bytes(bytes(data))

    return change


def _truncate(name: str, share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        os.truncate(folder / name, int((folder / name).stat().st_size * share))

    return change


def _config(change: Callable[[dict[str, Any]], Any], resign: bool = True) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, change, resign)


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def _rename_weight(name: str) -> Callable[[Path], None]:
    return _config(lambda c: c["weights"].update({name: c["weights"].pop("w")}))


BIG = 2**31 - 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate(TENSORS, 0.5), r"adapter_model.safetensors is truncated .* bytes\)"),
        (_truncate(TENSORS, 0), "truncated"),
        (_truncate(CONFIG, 0.7), "adapter_config.json is damaged"),
        (_flip(0.0), "is damaged .its checksum"),
        (_flip(0.5), "is damaged .its checksum"),
        (_flip(1.0), "is damaged .its checksum"),
        (lambda f: (f / TENSORS).unlink(), "adapter_model.safetensors is missing"),
        (lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json"),
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda f: (f / CONFIG).write_text("[" * 10**5), "is damaged"),
        (lambda f: (f / CONFIG).write_text("[1]"), "not in the format 'rosa_fx adapter'"),
        (lambda f: (f / CONFIG).write_text('{"peft_type": "LORA"}'), r"is a PEFT adapter \(LORA\)"),
        (_config(lambda c: c.update(version=2)), "format version 2, this rosa_fx reads version 1"),
        (_config(lambda c: c.update(version=2), resign=False), "format version 2"),
        (_config(lambda c: c["spec"].update(alpha=17), resign=False), "changed after it was saved"),
        (_config(lambda c: c["spec"].update(version=9)), "version of the spec is 9"),
        (_config(lambda c: c["spec"].update(rnak=4)), "unknown field 'rnak'"),
        (_config(lambda c: c.pop("weights")), "lacks 'weights' or 'tensors'"),
        (_config(lambda c: c["tensors"].update(file="../x.safetensors")), "tensor file must be"),
        (_rename_weight("../../etc/passwd"), "is no parameter name"),
        (_rename_weight("/etc/passwd"), "is no parameter name"),
        (_rename_weight("a\\b"), "is no parameter name"),
        (_rename_weight("v"), "nothing for the weight 'w'"),
        (_config(lambda c: c["weights"]["w"].pop("rank")), "entry of 'w' must have the fields"),
        (_config(lambda c: c["weights"]["w"].update(nnz="3")), "'w': nnz has the bad value '3'"),
        (_config(lambda c: c["weights"]["w"].update(shape=[1, 2, 3])), "shape must be"),
        (_config(lambda c: c["weights"]["w"].update(rank=5)), "w: rank is 5 in the adapter .* and 4 in this model"),
        (_config(lambda c: c["weights"]["w"]["base"].update(kind="fp4")), "w: base is .*fp4"),
        (_config(lambda c: c["weights"]["w"].update(has_mask=False)), "mask that its configuration knows nothing of"),
        (_tensors(lambda t: t["w.low_rank.A"].fill_(float("nan"))), "w.low_rank.A holds NaN or infinity"),
        (_tensors(lambda t: t["w.sparse.values"][3].fill_(float("inf"))), "w.sparse.values holds NaN or infinity"),
        (_tensors(lambda t: t.pop("w.low_rank.B")), "lacks the tensor 'w.low_rank.B'"),
        (_tensors(lambda t: t.update(extra=torch.ones(1))), "holds a tensor 'extra'"),
        (_tensors(lambda t: t.update({"w.low_rank.B": torch.ones(3, 4)})), r"w.low_rank.B has shape \[3, 4\]"),
        (_tensors(lambda t: t.update({"w.low_rank.B": t["w.low_rank.B"].double()})), "w.low_rank.B is torch.float64"),
        (_tensors(lambda t: t.update({"w.sparse.cols": t["w.sparse.cols"].long()})), "w.sparse.cols is torch.int64"),
        (_tensors(lambda t: t["w.sparse.cols"][0].fill_(-1)), "column -1"),
        (_tensors(lambda t: t["w.sparse.cols"][-1].fill_(N)), "outside 0..47"),
        (_tensors(lambda t: t["w.sparse.cols"].zero_()), "ascending"),
        (_tensors(lambda t: t["w.sparse.row_offsets"].zero_()), "must rise from 0"),
        # Differences of int32 that come out positive by overflow.
        (_tensors(lambda t: t["w.sparse.row_offsets"][1:3].copy_(torch.tensor([BIG, -BIG - 1]))), "must rise from 0"),
    ],
)
def test_damaged_or_foreign_files_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str, saved: Path
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    damage(folder)
    assert_refused(plain(), folder, message)
    assert_refused(trained(), folder, message)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    rosa_fx.save_adapter(trained(), folder)
    return folder


def test_refusals_of_save(tmp_path: Path) -> None:
    with pytest.raises(RosaError, match="not transformed"):
        rosa_fx.save_adapter(plain(), tmp_path / "a")
    model = trained()
    rosa_fx.save_adapter(model, tmp_path / "a")
    before = (tmp_path / "a" / TENSORS).read_bytes()
    rosa_fx.adapter(model, "w").low_rank.B.data[0, 0] = float("inf")
    with pytest.raises(RosaError, match=r"w\.low_rank\.B holds NaN or infinity and is not saved"):
        rosa_fx.save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a" / TENSORS).read_bytes() == before
    model = trained()
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / CONFIG).write_text('{"peft_type": "LORA"}')
    for name in ("file", "full", "peft"):
        with pytest.raises(RosaError, match=f"{name} exists and is no adapter: it is left alone"):
            rosa_fx.save_adapter(model, tmp_path / name)
    with pytest.raises(RosaError, match="could not write the adapter"):
        rosa_fx.save_adapter(model, tmp_path / "file" / "below")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file", "full", "peft"]


# Writing


def test_replacing_keeps_other_files_and_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    rosa_fx.save_adapter(trained(masks=False), tmp_path / "link")
    (tmp_path / "real" / "notes.md").write_text("mine")
    (tmp_path / "real" / "plots").mkdir()
    model = trained()
    rosa_fx.save_adapter(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == [CONFIG, TENSORS, "notes.md", "plots"]
    assert torch.equal(rosa_fx.load_adapter(plain(), tmp_path / "real")(inputs()), model(inputs()))


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Like a power cut at the `count`-th change of a directory or wait for the disk: no clean-up comes after it."""
    steps = [0]

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            steps[0] += 1
            if steps[0] >= count:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        return run

    for name in ("mkdir", "replace", "rename", "rmdir", "write_text"):
        monkeypatch.setattr(Path, name, guarded(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", guarded(os.fsync))
    monkeypatch.setattr(adapter_format, "save_file", guarded(save_file))
    monkeypatch.setattr(shutil, "rmtree", guarded(shutil.rmtree))
    return steps


def _steps_of_a_save(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        steps = _interrupt_at(patch, 10**9)
        rosa_fx.save_adapter(trained(), folder)
    return steps[0]


def test_old_or_new_after_an_interruption_anywhere(tmp_path: Path) -> None:
    old, new = trained(masks=False), trained()
    expected = {"old": old(inputs()), "new": new(inputs())}
    folder, seen = tmp_path / "a", []
    rosa_fx.save_adapter(old, folder)
    (folder / "notes.md").write_text("mine")
    for at in range(1, _steps_of_a_save(folder) + 1):
        shutil.rmtree(folder)
        rosa_fx.save_adapter(old, folder)
        (folder / "notes.md").write_text("mine")
        with pytest.MonkeyPatch.context() as patch:
            _interrupt_at(patch, at)
            with pytest.raises(KeyboardInterrupt):
                rosa_fx.save_adapter(new, folder)
        found = rosa_fx.load_adapter(plain(), folder)(inputs())
        seen.append(next(name for name, output in expected.items() if torch.equal(output, found)))
        # A second interruption, in the save that follows, loses nothing either.
        for again in (2, 4):
            with pytest.MonkeyPatch.context() as patch:
                _interrupt_at(patch, again)
                with pytest.raises(KeyboardInterrupt):
                    rosa_fx.save_adapter(new, folder)
            rosa_fx.load_adapter(plain(), folder)
        rosa_fx.save_adapter(new, folder)
        assert torch.equal(rosa_fx.load_adapter(plain(), folder)(inputs()), expected["new"])
        assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS, "notes.md"]
    assert sorted(seen, reverse=True) == seen  # first the old, from some moment on the new
    assert set(seen) == {"old", "new"}


def test_new_directory_is_whole_or_absent(tmp_path: Path) -> None:
    folder, seen = tmp_path / "b", []
    for at in range(1, _steps_of_a_save(tmp_path / "a") + 1):
        with pytest.MonkeyPatch.context() as patch:
            _interrupt_at(patch, at)
            with pytest.raises(KeyboardInterrupt):
                rosa_fx.save_adapter(trained(), folder)
        seen.append(folder.exists())
        if folder.exists():
            rosa_fx.load_adapter(plain(), folder)
            shutil.rmtree(folder)
    assert True in seen
    assert False in seen
    rosa_fx.save_adapter(trained(), folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_failed_write_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = trained(masks=False)
    rosa_fx.save_adapter(old, tmp_path / "a")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for name in ("a", "b"):
            with pytest.raises(RosaError, match=f"could not write the adapter .*{name}: .*No space left"):
                rosa_fx.save_adapter(trained(), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert not (tmp_path / "a" / PENDING).exists()
    assert torch.equal(rosa_fx.load_adapter(plain(), tmp_path / "a")(inputs()), old(inputs()))


def test_interrupted_replacement_loads_where_nothing_can_be_written(tmp_path: Path) -> None:
    rosa_fx.save_adapter(trained(masks=False), tmp_path / "a")
    rosa_fx.save_adapter(trained(), tmp_path / "b")
    pending = tmp_path / "a" / PENDING
    pending.mkdir()
    (tmp_path / "b" / CONFIG).rename(pending / CONFIG)
    (tmp_path / "b" / TENSORS).replace(tmp_path / "a" / TENSORS)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    assert torch.equal(rosa_fx.load_adapter(plain(), tmp_path / "a")(inputs()), trained()(inputs()))
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


# Fingerprints


def test_fingerprint_tells_values_and_not_storage() -> None:
    torch.manual_seed(0)
    weight = torch.randn(130, 70)
    text = as_text(fingerprint(weight))
    assert as_text(fingerprint(weight.double())) == text
    assert as_text(fingerprint(weight.T.contiguous().T)) == text
    assert as_text(fingerprint(weight.view(70, 130))) != text
    half, brain = weight.half(), weight.bfloat16()
    assert as_text(fingerprint(half)) == as_text(fingerprint(half.float()))
    assert as_text(fingerprint(brain)) == as_text(fingerprint(brain.float())) == as_text(fingerprint(brain.double()))
    assert len({as_text(fingerprint(w)) for w in (weight, half, brain, weight.double() + 1e-12)}) == 4
    assert as_text(fingerprint(torch.empty(3, 3, device="meta"))) is None
    # Fixed: a change of the definition would refuse every adapter saved before.
    assert as_text(fingerprint(torch.arange(5000.0).view(50, 100))) == "95397251fffed029ad2f6328afba6249"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fingerprint_sees_every_single_value(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    seen = {as_text(fingerprint(weight))}
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    for i in range(0, weight.numel(), 45):
        changed = weight.clone()
        changed.view(-1).view(integers)[i] ^= 1
        seen.add(as_text(fingerprint(changed)))
    assert len(seen) == 101


def test_entry_fields_are_those_checked() -> None:
    names = {field.name for field in dataclasses.fields(adapter_format.WeightEntry)}
    assert names == {"shape", "rank", "nnz", "base", "dtype", "has_mask", "fingerprint"}
