"""Running a test file of generated Triton in a process of its own: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

from pathlib import Path

from other_process import ROOT, run_python


def run_in_interpreter(name: str) -> None:
    """Run tests/`name` and fail with what it printed unless its tests pass."""
    # One thread: the interpreter is numpy on small arrays, and threads that wait would slow down each other.
    # One process: a file stays in one anyway, and the others would only start up.
    _run(name, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, ["-n0"])


def run_on_gpu(name: str, triton: bool) -> None:
    """Run tests/`name` on the GPU, with rosa_fx's own Triton kernels or without; fail with what it printed unless it passes."""
    # Most of the time is compilation, on the host.
    environment = {"TRITON_INTERPRET": "0", "ROSA_FX_TRITON": str(int(triton)), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    _run(name, environment, ["-n4", "--dist=load"])


def _run(name: str, environment: dict[str, str], options: list[str]) -> None:
    file = Path(__file__).with_name(name)
    command = ["-m", "pytest", "-q", *options, "-p", "no:cacheprovider", "--show-capture=no", str(file)]
    done = run_python(*command, cwd=ROOT, limit=580, **environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
