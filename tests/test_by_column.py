"""The entries of a sparse term by column."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosa_fx.kernels.terms.sparse import by_column
from rosa_fx.mask import Mask


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_the_transpose_in_csr(n: int, k: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < density)
    mask, flipped = Mask.from_dense(dense != 0), Mask.from_dense(dense.t() != 0)
    values, offsets, rows = by_column(dense[dense != 0], mask.row_offsets, mask.cols, k)
    assert torch.equal(values, dense.t()[dense.t() != 0])
    assert torch.equal(offsets, flipped.row_offsets)
    assert torch.equal(rows, flipped.cols)
    assert offsets.dtype == rows.dtype == torch.int32


def test_a_mask_that_was_never_set_has_no_entries() -> None:
    zeros = torch.zeros(5, dtype=torch.int32)
    _, offsets, _ = by_column(torch.ones(5), torch.zeros(4, dtype=torch.int32), zeros, 7)
    assert torch.equal(offsets, torch.zeros(8, dtype=torch.int32))


@pytest.mark.parametrize("entries", [0, 4])
def test_the_operator_is_what_it_says(entries: int) -> None:
    offsets = torch.tensor([0, min(entries, 1), entries], dtype=torch.int32)
    cols = torch.arange(entries, dtype=torch.int32)
    torch.library.opcheck(by_column, (torch.rand(entries), offsets, cols, 6))
