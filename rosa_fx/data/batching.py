"""Micro-batches of one shape, so that `torch.compile` makes one graph per phase for training and evaluation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rosa_fx.data.encoding import IGNORED, EncodedRow
from rosa_fx.errors import RosaError

T = TypeVar("T")


def pad_length(rows: Sequence[EncodedRow], max_length: int, multiple: int = 64) -> int:
    """The one length that a run pads to: the longest row rounded up to `multiple`, but at most `max_length`."""
    longest = max(len(row.input_ids) for row in rows)
    return min(max_length, -(-longest // multiple) * multiple)


def make_batches(
    rows: Sequence[EncodedRow],
    batch_size: int,
    length: int,
    pad_token: int,
    *,
    seed: int | None = None,
) -> list[dict[str, Tensor]]:
    """Micro-batches `{"input_ids", "labels"}`, each int64 [batch_size, length], padded on the right.

    There is no attention mask: under causal attention no token sees the padding to its right, and padding has label
    -100, so loss and gradients are those of the rows alone, while the graph is the same for every batch. A last batch
    that is not full is filled with rows of padding, which weigh nothing. `seed` shuffles the rows; None keeps order.

    Raises RosaError for a batch size below 1 and for rows longer than `length`.
    """
    if batch_size < 1:
        raise RosaError(f"batch size is {batch_size}: at least 1 row is needed")
    longest = max((len(row.input_ids) for row in rows), default=0)
    if longest > length:
        raise RosaError(f"a row has {longest} tokens, more than the length {length} to pad to: encode with max_length")
    order = list(range(len(rows)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    batches = []
    for start in range(0, len(order), batch_size):
        ids = torch.full((batch_size, length), pad_token, dtype=torch.int64, device="cpu")
        labels = torch.full((batch_size, length), IGNORED, dtype=torch.int64, device="cpu")
        for i, index in enumerate(order[start : start + batch_size]):
            row = rows[index]
            ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids, device="cpu")
            labels[i, : len(row.labels)] = torch.tensor(row.labels, device="cpu")
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def split_rows(rows: Sequence[T], share: float, seed: int = 0) -> tuple[list[T], list[T]]:
    """A deterministic split into (training, held out), each in the given order; `share` in [0, 1) is held out.

    A positive share holds out at least one row and leaves at least one. Raises RosaError where that is impossible.
    """
    if not 0 <= share < 1:
        raise RosaError(f"the held-out share is {share}: use a number in [0, 1)")
    if share == 0:
        return list(rows), []
    if len(rows) < 2:
        raise RosaError(f"{len(rows)} row cannot be split into training and held-out rows: hold out nothing, or add rows")
    count = min(max(round(share * len(rows)), 1), len(rows) - 1)
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]
