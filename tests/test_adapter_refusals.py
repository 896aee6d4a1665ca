"""Adapters that are refused: other models, other specs, damaged and foreign files. Refusals leave everything untouched."""

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
from adapter_models import K, N, assert_refused, inputs, plain, spec_of, trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaError, adapter_format, atomic
from rosa_fx.adapter_format import CONFIG, TENSORS


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
        (_config(lambda c: c["weights"]["w"].update(shape=[3])), "shape must be"),
        (_config(lambda c: c["weights"]["w"].update(shape=[1, 2, 3])), "are not what a parameter of shape"),
        (_config(lambda c: c["weights"]["w"].update(matrices=[2, 3])), "matrices must be"),
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


def test_entry_fields_are_those_checked() -> None:
    names = {field.name for field in dataclasses.fields(adapter_format.WeightEntry)}
    assert names == {"shape", "matrices", "rank", "nnz", "base", "dtype", "has_mask", "fingerprint"}


def test_files_of_before_there_were_stacks_load(tmp_path: Path) -> None:
    model = trained()
    rosa_fx.save_adapter(model, tmp_path / "a")
    edit_config(tmp_path / "a", lambda config: [entry.pop("matrices") for entry in config["weights"].values()])
    assert torch.equal(rosa_fx.load_adapter(plain(), tmp_path / "a")(inputs()), model(inputs()))
