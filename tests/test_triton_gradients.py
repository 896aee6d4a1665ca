"""The Triton kernels of gradients, executed on the CPU: `triton_gradients.py` in a process where Triton is its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")


@pytest.mark.timeout(600)
def test_gradients_in_the_interpreter() -> None:
    file = Path(__file__).with_name("triton_gradients.py")
    # One thread: the interpreter is numpy on small arrays, and threads that wait would slow down each other.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", str(file)]
    done = subprocess.run(command, env=environment, cwd=file.parent.parent, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
