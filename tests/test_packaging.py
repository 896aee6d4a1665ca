"""What is installed, and what importing it does: no top-level `kernels` or `passes`, no heavy imports, no CUDA."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (
    "kernels/ops.py",
    "kernels/cpu/rosa_cpu.cpp",
    "kernels/terms/low_rank.py",
    "passes/joint.py",
    "cli/app.py",
    "report_page/style.css",
    "report_page/page.js",
    "py.typed",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without the network from a copy of the tree, so that no build folder is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("rosa_fx", "kernels", "passes", "tests", "examples"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_passes_and_kernels_are_folders_linked_into_the_package() -> None:
    for name in ("kernels", "passes"):
        link = ROOT / "rosa_fx" / name
        assert link.is_symlink()
        assert Path(os.readlink(link)) == Path("..", name)
        assert not list((ROOT / name).rglob("__init__.py")), "with __init__.py a bare `import kernels` would find the folder"
        assert (ROOT / name).samefile(link)


@pytest.mark.parametrize("name", ["kernels", "passes"])
def test_only_the_package_can_import_them(name: str) -> None:
    """A bare `import kernels` finds someone else's package, nothing, or (in the checkout) a folder without a module."""
    assert getattr(importlib.import_module(f"rosa_fx.{name}"), "__file__", None) is None
    found = importlib.util.find_spec(name)
    assert found is None or found.origin is None or not Path(found.origin).is_relative_to(ROOT / name)
    assert not str(getattr(sys.modules.get(name), "__file__", None) or "").startswith(str(ROOT / name))


def test_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rosa_fx"}
    assert {f"rosa_fx/{name}" for name in SHIPPED} <= names
    suffixes = (".py", ".cpp", ".h", ".jinja")
    for name in ("kernels", "passes"):
        files = {f"rosa_fx/{path.relative_to(ROOT)}" for path in (ROOT / name).rglob("*") if path.suffix in suffixes}
        assert files == {entry for entry in names if entry.startswith(f"rosa_fx/{name}/")}


def test_installed_wheel_imports_lightly(wheel: Path, tmp_path: Path) -> None:
    """From the wheel alone, elsewhere than in the checkout."""
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = f"""
import importlib.util, pathlib, sys
sys.path = [entry for entry in sys.path if entry != {str(ROOT)!r}]
import rosa_fx
assert pathlib.Path(rosa_fx.__file__).is_relative_to({str(target)!r}), rosa_fx.__file__
# RosaCallback is a class of transformers, which is loaded when it is asked for.
assert all(hasattr(rosa_fx, name) for name in rosa_fx.__all__ if name != "RosaCallback")
import rosa_fx.kernels.ops, rosa_fx.passes.joint
assert rosa_fx.kernels.ops.__file__.startswith({str(target)!r})
assert importlib.util.find_spec("passes") is None
heavy = {{"transformers", "bitsandbytes", "matplotlib", "gguf", "accelerate", "kernels"}} & set(sys.modules)
assert not heavy, heavy
import torch
assert not torch.cuda.is_initialized()
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(target), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def test_requirements_cover_the_commands() -> None:
    """The first command needs the `hf` extra, the second one the `test` extra with what its tests build and measure with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {requirement.split(">")[0].split("=")[0].split("<")[0].strip() for requirement in requirements}

    assert {"torch", "bitsandbytes", "numpy", "safetensors", "rich", "typer"} <= names(project["dependencies"])
    assert {"transformers", "gguf", "matplotlib", "accelerate"} <= names(extras["hf"])
    assert {"rosa-fx[hf]", "pytest", "pytest-timeout", "hypothesis", "psutil", "setuptools"} <= names(extras["test"])
    assert {"ruff", "mypy"} <= names(extras["lint"])
    assert project["scripts"] == {"rosa-fx": "rosa_fx.cli:main"}
