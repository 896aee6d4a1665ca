"""The Triton kernels of gradients, executed on the CPU: `triton_gradients.py` in a process where Triton is its interpreter."""

from __future__ import annotations

import pytest
from triton_process import run_in_interpreter

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")


@pytest.mark.timeout(600)
def test_gradients_in_the_interpreter() -> None:
    run_in_interpreter("triton_gradients.py")


@pytest.mark.timeout(600)
def test_collecting_in_the_interpreter() -> None:
    run_in_interpreter("triton_collect.py")
