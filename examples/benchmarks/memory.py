"""Resident set of a training step and of `transform`: each peer in a fresh process, with the C library's own defaults."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import rosa_fx
from benchmarks import common, model, scaling
from benchmarks.cold import fresh
from benchmarks.common import Bar, Part
from rosa_fx.state import state_of

PEERS = (model.LORA_COMPILED, model.QLORA_COMPILED, model.REFERENCE, model.QROSA)


def resident() -> int:
    """Bytes of this process that lie in memory now, freed ones given back first."""
    gc.collect()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def child(peer: str, name: str, dtype_name: str, tokens: tuple[int, int]) -> None:
    """Bytes: rise of the peak in `transform`, of the resident set by a peer's set-up, and of the peak in its third step."""
    dtype = common.DTYPES[dtype_name]
    base = model.load(name, dtype)
    data = model.batch(base, tokens)
    found: dict[str, int] = {}
    if peer == model.QROSA:
        found |= _transform(base)
        rosa_fx.compile_blocks(base)
        made = base
    else:
        made = model.build(peer, name, dtype, base)
        del base
    step = model.training_step(made, data)
    loaded = resident()
    step()
    step()
    warm = resident()
    reset_peak()
    step()
    found |= {"loaded": loaded, "warm": warm, "peak": _status("VmHWM")}
    print(json.dumps(found))


def _transform(base: nn.Module) -> dict[str, int]:
    """`transform` and masks, with proof that no original weight survives; raises SystemExit if one does."""
    spec = rosa_fx.RosaSpec(rank=model.RANK, alpha=model.RANK, density=model.DENSITY)
    linears = {f"{path}.weight": module for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    originals = {name: weakref.ref(module.weight) for name, module in linears.items()}
    storages = {name: weakref.ref(module.weight.untyped_storage()) for name, module in linears.items()}
    sizes = {name: module.weight.nbytes for name, module in linears.items()}
    del linears
    # The codecs' libraries are code, not weights: they are loaded before the count begins.
    rosa_fx.transform(nn.Sequential(nn.Linear(64, 64, dtype=next(base.parameters()).dtype)), spec)
    before = resident()
    reset_peak()
    rosa_fx.transform(base, spec)
    peak = _status("VmHWM")
    after = resident()
    weights = state_of(base).weights
    alive = [name for name in weights if name in originals and (originals[name]() is not None or storages[name]() is not None)]
    if alive:
        raise SystemExit(f"full-precision weights survive transform: {', '.join(alive)}")
    rosa_fx.set_masks(base, common.random_masks(base, model.DENSITY))
    rosa_fx.MaskSchedule(base, "wl0").begin_step()
    parameters = sum(weight.shape[0] * weight.shape[1] for weight in weights.values())
    frozen = sum(tensor.nbytes for weight in weights.values() for tensor in weight.base.tensors())
    adapters = sum(tensor.nbytes for weight in weights.values() for tensor in weight.delta_tensors())
    return {
        "transform peak": peak - before,
        "transform kept": after - before,
        "replaced": sum(sizes[name] for name in weights),
        "largest": max(sizes[name] for name in weights),
        "parameters": parameters,
        "base": frozen,
        "adapters": adapters,
    }


def mask_extra(shape: tuple[int, int], dtype: torch.dtype) -> float:
    """What a step that makes masks allocates above a plain step, over the float32 gradient of the largest weight.

    On two layers, by torch's own count of live CPU memory; compiled.
    """
    rows, columns = shape
    net = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=dtype), nn.Linear(rows, columns, bias=False, dtype=dtype))
    rosa_fx.transform(net, rosa_fx.RosaSpec(rank=model.RANK, alpha=model.RANK, density=model.DENSITY))
    compiled = torch.compile(net)
    x = torch.randn(64, columns, dtype=dtype)

    def plain() -> None:
        compiled(x).square().sum().backward()
        net.zero_grad(set_to_none=True)

    def mask() -> None:
        schedule.begin_step()
        plain()

    plain()
    before = scaling.peak(plain)
    schedule = rosa_fx.MaskSchedule(net, "wl0", micro_batches=1)
    mask()
    after = scaling.peak(mask)
    schedule.end_step()
    return (after - before) / (4 * rows * columns)


def run(
    names: Sequence[str], dtype: str, tokens: tuple[int, int] = (4, 256), mask_shape: tuple[int, int] = (4096, 4096)
) -> Part:
    part = Part("memory", "Memory: resident set over the loaded model, in MB")
    part.notes = [
        "Each peer in a fresh process, default allocator settings, freed memory given back before each reading. `loaded` is "
        "the process with the peer's model set up, `kept` what two steps (compilation among them) left, `peak` the highest "
        "of the third step, both over `loaded`; `step` is that peak over the process right before the step."
    ]
    for name in names:
        found = {peer: fresh("memory-child", peer, name, dtype, f"{tokens[0]}x{tokens[1]}") for peer in PEERS}
        over = {peer: values["peak"] - values["loaded"] for peer, values in found.items()}
        for peer, values in found.items():
            row = {"model": name, "peer": peer, "loaded": values["loaded"], "kept": values["warm"] - values["loaded"]}
            row |= {"peak": over[peer], "step": values["peak"] - values["warm"]}
            part.add([{key: value if isinstance(value, str) else round(value / 1e6, 1) for key, value in row.items()}])
        ours = found[model.QROSA]
        where = f"{name}, {dtype}"
        part.bars += [
            Bar(f"{where}: peak of a step, x the reference's", over[model.QROSA] / over[model.REFERENCE], 1.0),
            Bar(f"{where}: peak of a step, x compiled QLoRA's", over[model.QROSA] / over[model.QLORA_COMPILED], 1.0),
            # 4-bit codes and a float32 scale for every 64 of them.
            Bar(f"{where}: bytes of base per base parameter", ours["base"] / ours["parameters"], 0.5625),
            # What was replaced is gone, but for the allocator's slack; and at no time was a second model there.
            Bar(
                f"{where}: resident set kept by transform, less base and adapters, over the weights it replaced",
                (ours["transform kept"] + ours["replaced"] - ours["base"] - ours["adapters"]) / ours["replaced"],
                0.15,
            ),
            Bar(f"{where}: peak of transform over the weights it replaced", ours["transform peak"] / ours["replaced"], 0.25),
        ]
        part.panels[where] = {
            "peak of a step over the loaded model, MB": [(peer, over[peer] / 1e6) for peer in reversed(PEERS)]
        }
    extra = mask_extra(mask_shape, common.DTYPES[dtype])
    part.bars.append(Bar(f"mask step's extra, x a {mask_shape[0]}x{mask_shape[1]} float32 gradient", extra, 1.1))
    return part
