"""Files and directories that either are on disk whole or are not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def new_directory(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives a hidden sibling of `final` to write files into; on leaving, it is on disk and has become `final`.

    Where `final` exists already it must be empty, unless `replace` is set: then it makes way at that moment. If the
    block or the writing raises, nothing of the new directory stays behind. The parent must exist.
    """
    new = final.with_name(f".{final.name}.new-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        flush_directory(new)
        old = None
        if final.exists():
            if replace:
                old = final.rename(_aside(final))
            else:
                final.rmdir()
        new.rename(final)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    flush(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory; by a rename first, so that an interrupted removal leaves no damaged `path` behind."""
    shutil.rmtree(path.rename(_aside(path)), ignore_errors=True)


def _aside(path: Path) -> Path:
    """A hidden name beside `path`, which is free."""
    hidden = path.with_name(f".{path.name}.old-{os.getpid()}")
    shutil.rmtree(hidden, ignore_errors=True)
    return hidden


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what a killed process left of writing these files and directories in `folder` by the functions here."""
    for name in names:
        for kind in ("new", "old"):
            for path in folder.glob(f".{name}.{kind}-*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file by a new one in one step, on disk when this returns."""
    beside = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        flush(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Replace a safetensors file by a new one in one step, on disk when this returns. Raises OSError or SafetensorError."""
    beside = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        save_file(plain_tensors(tensors), beside, metadata=metadata)
        flush(beside)
        beside.replace(path)
        flush(path.parent)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def flush_directory(path: Path) -> None:
    """Wait until the files of a directory, and the directory itself, are on disk."""
    for file in path.iterdir():
        flush(file)
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file or a directory is on disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, dtypes, shapes and bytes of tensors, whichever device they are on, in any order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """A checksum of a JSON value, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that own their storage: safetensors refuses views of shared storage."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.numel() * tensor.element_size() or storage.data_ptr() in seen:
            tensor = tensor.clone()
        if tensor.numel():
            seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain
