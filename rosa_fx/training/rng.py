"""Random-number state: captured and put back for exact resume, and streams that leave everyone else's state alone."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(*parts: int) -> None:
    """Seed Python's, NumPy's and torch's (all devices') generators from the numbers given."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    seed = int.from_bytes(digest, "little")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of every global generator, as tensors and JSON values (for a checkpoint)."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64, device="cpu"),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    numbers = {"numpy_kind": kind, "numpy_position": int(position), "numpy_has_gauss": int(has_gauss)}
    return tensors, {"python_version": version, "python_gauss": gauss, "numpy_cached": float(cached), **numbers}


def restore(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put back what `capture` returned. States of CUDA devices that are not here are left out."""
    random.setstate((values["python_version"], tuple(tensors["python"].tolist()), values["python_gauss"]))
    keys = tensors["numpy"].numpy().astype(np.uint32)
    state = (values["numpy_kind"], keys, values["numpy_position"], values["numpy_has_gauss"], values["numpy_cached"])
    np.random.set_state(state)
    torch.set_rng_state(tensors["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)


@contextmanager
def untouched() -> Iterator[None]:
    """The body may draw random numbers; afterwards every global generator is where it was before."""
    outer = capture()
    try:
        yield
    finally:
        restore(*outer)


class Stream:
    """A random stream of its own: inside `with stream.use():` the global generators are the stream's."""

    def __init__(self, *parts: int) -> None:
        self._parts = parts
        self._state: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    @contextmanager
    def use(self) -> Iterator[None]:
        with untouched():
            if self._state is None:
                seed_all(*self._parts)
            else:
                restore(*self._state)
            try:
                yield
            finally:
                self._state = capture()
