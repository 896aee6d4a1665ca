"""Running a test file in a process of its own where Triton is its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_in_interpreter(name: str) -> None:
    """Run tests/`name` and fail with what it printed unless its tests pass."""
    file = Path(__file__).with_name(name)
    # One thread: the interpreter is numpy on small arrays, and threads that wait would slow down each other.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # One process: a file stays in one anyway, and the others would only start up.
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--show-capture=no", str(file)]
    done = subprocess.run(command, env=environment, cwd=file.parent.parent, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
