"""Adapters on disk: what the files hold, and equal outputs after a round trip."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import K, N, assert_refused, assert_same, contents, inputs, plain, spec_of, trained
from safetensors.torch import load_file

import rosa_fx
from rosa_fx import RosaSpec
from rosa_fx.adapter_format import CONFIG, TENSORS
from rosa_fx.fingerprint import as_text, fingerprint


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
        "matrices": [1, K, N],
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
