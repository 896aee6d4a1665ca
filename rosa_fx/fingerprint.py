"""A fingerprint of a weight's values, by which an adapter knows the base model it was trained on.

It is taken of the weight as the model brings it, before quantisation. That names the checkpoint and not the codec: the
bytes of D(Q) depend on the device and the release that quantised, and cost about ten times as much to make on a CPU.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

BYTES = 16
_WIDTH = 4096
_ROWS = 128  # rows at a time: 4 MiB of int64 products, which stay in the cache
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(weight: Tensor) -> Tensor:
    """The fingerprint of a floating-point tensor: uint8 [16], on the CPU. Zeros (unknown) for a tensor without data.

    Equal values of equal shape give equal fingerprints whatever the dtype and the device: the bits are those of the
    narrowest of bfloat16, float32 and float64 that holds all values. Any single changed value changes the fingerprint;
    it guards against mistakes, not against forgery.
    """
    if weight.is_meta or is_fake(weight):
        return torch.zeros(BYTES, dtype=torch.uint8, device="cpu")
    values = _narrowest(weight.detach())
    bits = values.contiguous().view(-1).view(_INTEGERS[values.itemsize])
    factors = _factors(bits.device)
    whole = bits.numel() // _WIDTH * _WIDTH
    # Sums of products modulo 2^64: exact in any order, so every device gives the same. An odd factor cannot hide a
    # change of one value, and fixed random ones make two changes cancel with probability 2^-64.
    sums = [(rows * factors).sum(1) for rows in bits[:whole].view(-1, _WIDTH).split(_ROWS)]
    if whole < bits.numel():
        sums.append((bits[whole:] * factors[: bits.numel() - whole]).sum().view(1))
    digest = hashlib.blake2b(f"{values.dtype} {list(weight.shape)}".encode(), digest_size=BYTES)
    digest.update(torch.cat(sums).cpu().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def as_text(stored: Tensor) -> str | None:
    """A fingerprint in hexadecimal; None if it is unknown."""
    content = bytes(stored.tolist())
    return content.hex() if any(content) else None


def _narrowest(weight: Tensor) -> Tensor:
    if weight.dtype == torch.float16:
        weight = weight.float()
    for dtype in (torch.bfloat16, torch.float32):
        # A few values tell in nearly all cases, so that the whole is seldom converted in vain.
        few = weight.reshape(-1)[:_WIDTH] if weight.is_contiguous() else weight[:1]
        if weight.itemsize > dtype.itemsize and torch.equal(few.to(dtype).to(weight.dtype), few):
            narrow = weight.to(dtype)
            if torch.equal(narrow.to(weight.dtype), weight):
                return narrow
    return weight


@functools.cache
def _factors(device: torch.device) -> Tensor:
    # From a hash and not from a random generator, whose stream may change between releases of torch.
    content = b"".join(hashlib.blake2b(f"rosa_fx {i}".encode()).digest() for i in range(_WIDTH * 8 // 64))
    return (torch.frombuffer(bytearray(content), dtype=torch.int64) | 1).to(device)
