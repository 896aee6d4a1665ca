"""Masks in a file of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import assert_same, contents, plain, spec_of, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rosa_fx
from rosa_fx import RosaError


def edited(file: Path, change: Any = None, signed: bool = True, **header: Any) -> None:
    """Changed tensors or header fields, under a checksum that is right if `signed`."""
    from rosa_fx.atomic import json_digest, tensor_digest

    with safe_open(file, "pt") as stored:
        content = json.loads(stored.metadata()["rosa_fx"])
    tensors: dict[str, Tensor] = {key: tensor.clone() for key, tensor in load_file(file).items()}
    if change:
        change(tensors)
    content |= header
    if signed:
        content |= {"checksum": tensor_digest(tensors), "shapes_checksum": json_digest(content["shapes"])}
    save_file(tensors, file, metadata={"rosa_fx": json.dumps(content)})


def test_masks_serve_every_rank_dtype_and_base(tmp_path: Path) -> None:
    model = trained()
    rosa_fx.save_masks(model, tmp_path / "deep" / "masks.safetensors")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["masks.safetensors"]
    stored = load_file(tmp_path / "deep" / "masks.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.int32}
    for fields in ({"rank": 1, "base": "int8"}, {"dtype": torch.bfloat16, "adapter_dtype": "bfloat16"}, {"rank": 0}):
        dtype: Any = fields.pop("dtype", torch.float32)
        other = rosa_fx.transform(plain(dtype=dtype, seed=4), spec_of(**fields))
        rosa_fx.load_masks(other, tmp_path / "deep" / "masks.safetensors")
        for name, mask in rosa_fx.masks(model).items():
            found = rosa_fx.masks(other)[name]
            assert torch.equal(found.cols, mask.cols)
            assert torch.equal(found.row_offsets, mask.row_offsets)
            assert rosa_fx.adapter(other, name).sparse.values.requires_grad
            assert not rosa_fx.adapter(other, name).sparse.values.any()


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "masks.safetensors"
    model = trained()

    def refused(message: str, onto: Any = None) -> None:
        onto = onto or trained()
        before = contents(onto)
        with pytest.raises(RosaError, match=message):
            rosa_fx.load_masks(onto, file)
        assert_same(before, contents(onto))
        rosa_fx.save_masks(model, file)

    refused("is damaged or no safetensors file")
    with pytest.raises(RosaError, match="no weight has a mask yet"):
        rosa_fx.save_masks(trained(masks=False), file)
    refused("the weight trains", rosa_fx.transform(plain(), spec_of(density=0.1)))
    refused("no rewritten weight is called", rosa_fx.transform(plain(), spec_of(targets=["a.weight"])))
    refused("is not transformed", plain())
    file.write_bytes(file.read_bytes()[:-9])
    refused("is damaged")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    refused("its checksum differs")
    edited(file, version=2)
    refused("has the format version 2, this rosa_fx reads version 1")
    edited(file, format="x")
    refused("is not in the format 'rosa_fx masks'")
    save_file({"w.cols": torch.zeros(2)}, file)
    refused("is not in the format")
    edited(file, lambda t: t.pop("w.cols"))
    refused("'w.cols' is missing")
    edited(file, lambda t: t.update(x=torch.zeros(1)))
    refused("'x' is not named")
    edited(file, lambda t: t["w.cols"][0].fill_(-1))
    refused("w: column -1")
    edited(file, lambda t: t["w.row_offsets"].fill_(-4))
    refused("w: row_offsets must rise")
    edited(file, lambda t: t.update({"w.cols": t["w.cols"].long()}))
    refused("w: mask indices must be int32")
    edited(file, lambda t: t.update({"w.cols": t["w.cols"].float()}))
    refused("w: mask indices must be int32")
    edited(file, shapes={"w": [1, 2], "a.weight": [48, 64], "b.weight": [64, 48], "c.weight": [48, 64]})
    refused(r"w: the mask has shape \[1, 2\]")
    before = file.read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(RosaError, match="could not write the masks"):
        rosa_fx.save_masks(model, tmp_path / "file" / "below")
    assert file.read_bytes() == before
