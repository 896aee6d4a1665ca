"""The Triton kernels, executed on the CPU: files in processes of their own, where Triton is its interpreter."""

from __future__ import annotations

import pytest
from triton_process import run_in_interpreter

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")


@pytest.mark.timeout(600)
def test_kernels_in_the_interpreter() -> None:
    run_in_interpreter("triton_kernels.py")


@pytest.mark.timeout(600)
def test_choices_in_the_interpreter() -> None:
    run_in_interpreter("triton_choices.py")


@pytest.mark.timeout(600)
def test_few_rows_in_the_interpreter() -> None:
    run_in_interpreter("triton_few_rows.py")
