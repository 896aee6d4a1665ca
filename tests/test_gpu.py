"""On a GPU: the generated Triton kernels, and whole models with and without them. Each file in a process of its own.

Which kernels a process generates is settled by its first graph.
"""

from __future__ import annotations

import pytest
import torch
from triton_process import run_on_gpu

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("name", ["kernels", "choices", "few_rows", "gradients", "collect"])
def test_generated_kernels(name: str) -> None:
    run_on_gpu(f"triton_{name}.py", triton=True)


@pytest.mark.parametrize("triton", [False, True])
def test_models(triton: bool) -> None:
    run_on_gpu("gpu_models.py", triton=triton)
