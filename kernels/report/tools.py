"""NVIDIA's ptxas, nvdisasm and cuobjdump, which Triton ships."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from rosa_fx.errors import RosaError


@functools.cache
def tool(name: str) -> Path:
    """The path of a tool: $CUDA_HOME/bin, what Triton ships, or PATH. Raises RosaError where there is none."""
    try:
        import triton
    except ImportError as error:
        raise RosaError("triton is not installed; the report compiles with it: pip install triton") from error
    places = [Path(triton.__file__).parent / "backends/nvidia/bin" / name]
    if home := os.environ.get("CUDA_HOME"):
        places.append(Path(home) / "bin" / name)
    if found := shutil.which(name):
        places.append(Path(found))
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            return place
    looked = ", ".join(map(str, places))
    raise RosaError(f"{name} is missing (looked at {looked} and in PATH); install Triton's Linux wheel or the CUDA toolkit")


def run(name: str, *arguments: str | Path) -> str:
    """Standard output of a tool. Raises RosaError with what it printed if it fails."""
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RosaError(f"{name} failed: {(done.stderr or done.stdout).strip()[:500]}")
    return done.stdout


def versions() -> dict[str, str]:
    """Of torch, Triton and ptxas (of the one for Blackwell too, where Triton has its own)."""
    import torch
    import triton

    found = {"torch": str(torch.__version__), "triton": str(triton.__version__)}
    for name in ("ptxas", "ptxas-blackwell"):
        try:
            printed = run(name, "--version")
        except RosaError:
            continue
        release = re.search(r"release [\d.]+, V([\d.]+)", printed)
        found[name] = release.group(1) if release else "unknown"
    return found
