"""What is generated for a GPU that is not there: which code, and from which switches. Nothing is executed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rosa_fx.kernels import inductor

_HEAD = """
import torch
from rosa_fx.kernels import inductor_offline as offline, lowering, ops
from rosa_fx.kernels.bases.base import base_format
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.report.architectures import ARCHITECTURES
from rosa_fx.kernels.terms.registry import term

def generate(kind, rows, shape, transposed, nnz=0):
    form, dtype, (n, k) = base_format(kind), torch.bfloat16, shape
    terms = [term("low_rank", scale=1.3)] + [term("sparse")] * bool(nnz)
    key = Layout(shape, dtype, form, tuple(terms)).key
    op = ops.linear_t if transposed else ops.linear

    def make():
        empty = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device="cuda")
        parts = form.layout(shape, dtype)
        base = [empty(*part.shape, dtype=part.dtype) for part in parts]
        delta = [empty(4, k), empty(n, 4)]
        if nnz:
            delta += [empty(nnz), empty(n + 1, dtype=torch.int32), empty(nnz, dtype=torch.int32)]
        return [empty(rows, n if transposed else k, dtype=dtype), *base, *delta]

    base = len(form.layout(shape, dtype))
    run = lambda x, *rest: op(x, None, list(rest[:base]), list(rest[base:]), key)
    with offline.present(ARCHITECTURES["sm_90"].device):
        lowering.register()
        module = offline.generate(run, make, lambda name, choices: choices[0])
    return module, [kernel for kernel in offline.kernels(module) if kernel.is_template]
"""


def execute(code: str) -> str:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    environment = {name: value for name, value in os.environ.items() if name != "ROSA_FX_TRITON"}
    done = subprocess.run([sys.executable, "-c", _HEAD + code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_kernels_are_generated_for_a_gpu() -> None:
    """By the switches that decide it on a real one; no operator is called."""
    code = """
for rows in (1, 16, 2048):
    for transposed in (False, True):
        module, kernels = generate("nf4", rows, (256, 512), transposed, nnz=700)
        print(bool(kernels), "torch.ops.rosa_fx.linear.default(" in module or "torch.ops.rosa_fx.linear_t.default(" in module)
"""
    assert execute(code).split() == ["True", "False"] * 6


def test_codes_that_share_a_scale_are_of_one_row() -> None:
    """Few rows by int8: four codes at a time take the scale of the first. Where rows are no multiple of four, one at a time."""
    code = """
for k in (2, 15, 18, 20, 128):
    (kernel,) = generate("int8", 4, (32, k), True)[1]
    print("fma.rn.bf16x2" in kernel.source, "tile_scale[:, None] * INT8_STEP" in kernel.source)
"""
    assert execute(code).split() == ["False", "True"] * 3 + ["True", "False"] * 2


@pytest.mark.parametrize(
    ("hip", "asked", "wanted"), [(None, None, True), (None, "0", False), ("6.4", None, False), ("6.4", "1", True)]
)
def test_who_gets_triton_kernels(monkeypatch: pytest.MonkeyPatch, hip: str | None, asked: str | None, wanted: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.delenv("ROSA_FX_TRITON", raising=False)
    if asked is not None:
        monkeypatch.setenv("ROSA_FX_TRITON", asked)
    assert inductor.triton_devices() == wanted
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not inductor.triton_devices()
