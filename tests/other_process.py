"""Running Python in a process of its own, as a user does; a test that waits for good fails with what was printed until then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 270
"""Seconds: less than a test may take, which ends without a word of the other process."""


def run_python(
    *arguments: str | Path, cwd: Path | None = None, limit: float = LIMIT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python *arguments` with rosa_fx in its path, `variables` in its environment, and nothing of it left afterwards."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # Launchers start processes of their own, which hold the pipes.
        for descendant in psutil.Process(process.pid).children(recursive=True):
            descendant.kill()
        process.kill()
        printed, errors = process.communicate()
        pytest.fail(f"{' '.join(command)}: not done after {limit} s\n{printed[-3000:]}\n{errors[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, printed, errors)
