"""Files with any one bit flipped, or cut off anywhere: refused by name, or read as what was written; never anything else."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import assert_same, contents, plain, spec_of, trained
from torch import nn

import rosa_fx
from rosa_fx import RosaError
from rosa_fx.training import checkpoint as checkpoints

FLIPS, CUTS = 60, 12


def save_checkpoint(model: nn.Module, folder: Path) -> None:
    checkpoints.save(folder, checkpoints.Checkpoint(3, {"adapter": rosa_fx.adapter_state(model)}, {"step": 3}), keep=1)


def load_checkpoint(model: nn.Module, folder: Path) -> None:
    found = checkpoints.load_latest(folder, lambda text: None)
    assert found is not None
    assert (found.step, found.state) == (3, {"step": 3})
    rosa_fx.load_adapter_state(model, found.tensors["adapter"])


def blank(**fields: Any) -> nn.Module:
    return rosa_fx.transform(plain(), spec_of(**fields))


LORA: dict[str, Any] = {"density": 0.0, "schedule": "lora_only", "targets": ["a.weight", "b.weight"]}

# what -> (spec of the model that is saved, save, load)
FILES: dict[str, tuple[dict[str, Any], Callable[[nn.Module, Path], Any], Callable[[nn.Module, Path], Any]]] = {
    "adapter": ({}, rosa_fx.save_adapter, rosa_fx.load_adapter),
    "masks": ({}, lambda m, f: rosa_fx.save_masks(m, f / "masks"), lambda m, f: rosa_fx.load_masks(m, f / "masks")),
    "lora": (LORA, rosa_fx.export_peft, rosa_fx.import_peft),
    "checkpoint": ({}, save_checkpoint, load_checkpoint),
}


def damaged(data: bytes, generator: random.Random) -> list[bytes]:
    """Flips all over the file, as many of them among the first bytes, where lengths and headers are; and cuts."""
    found = []
    for number in range(FLIPS):
        changed = bytearray(data)
        where = generator.randrange(len(data) if number % 2 else min(len(data), 600))
        changed[where] ^= 1 << generator.randrange(8)
        found.append(bytes(changed))
    return found + [data[: generator.randrange(len(data))] for _ in range(CUTS)]


def attempt(load: Callable[[nn.Module, Path], Any], model: nn.Module, folder: Path) -> str | None:
    """What a refusal said."""
    try:
        load(model, folder)
    except RosaError as error:
        return str(error)
    return None


@pytest.mark.parametrize("what", FILES)
def test_damage_is_refused_or_harmless(what: str, tmp_path: Path) -> None:
    fields, save, load = FILES[what]
    save(trained(masks="density" not in fields, **fields), tmp_path / "whole")
    model = blank(**fields)
    untouched = contents(model)
    load(model, tmp_path / "whole")
    expected = contents(model)
    assert any(not torch.equal(expected[name], tensor) for name, tensor in untouched.items())
    generator, refused = random.Random(8), 0
    files = [file for file in (tmp_path / "whole").rglob("*") if file.is_file()]
    for file in files:
        for number, data in enumerate(damaged(file.read_bytes(), generator)):
            copy = tmp_path / f"{file.name}-{number}"
            shutil.copytree(tmp_path / "whole", copy)
            (copy / file.relative_to(tmp_path / "whole")).write_bytes(data)
            model = blank(**fields)
            said = attempt(load, model, copy)
            refused += said is not None
            assert said is None or str(copy) in said, "the file is named"
            assert_same(contents(model), expected if said is None else untouched)
    # PEFT's configuration has fields that change nothing here, such as paths.
    assert refused > (0.7 if what == "lora" else 0.9) * len(files) * (FLIPS + CUTS)
