"""What the page shows of one weight: its mask in cells, the singular values of its low-rank part, norms of both parts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rosa_fx.mask import Mask

CELLS = 64  # rows and columns of a mask's picture at most
_CHUNK = 1 << 16


@dataclass(frozen=True)
class MaskPicture:
    """A mask [N, K] counted in cells.

    cells: int64 [H, W], entries of each cell, H, W <= CELLS. rows [H], columns [W]: how dense each stripe is, relative to the
    whole mask (1: as dense). top_rows, top_columns: share of the entries that the fullest tenth of the rows (columns) holds.
    used_rows, used_columns: share of the rows (columns) with any entry.
    """

    cells: Tensor
    rows: list[float]
    columns: list[float]
    top_rows: float
    top_columns: float
    used_rows: float
    used_columns: float


@dataclass(frozen=True)
class Layer:
    """One rewritten weight, (N, K) or a stack (E, N, K) of them. Norms are Frobenius norms; NaN where a tensor holds NaN.

    `singular_values` of s·B A, descending, empty without a low-rank part; of a stack their root mean squares over it. The
    mask is that of the matrix [E·N, K]. `sparse` says whether there is a sparse part;
    `mask` is None while it has no mask.
    """

    name: str
    kind: str
    block: int | None
    shape: tuple[int, ...] | None
    rank: int
    nnz: int
    sparse: bool
    mask: MaskPicture | None
    low_rank_norm: float
    sparse_norm: float
    delta_norm: float
    singular_values: list[float]

    @property
    def sparse_share(self) -> float:
        """‖S‖² / (‖s·BA‖² + ‖S‖²), NaN while both are zero."""
        low, sparse = self.low_rank_norm**2, self.sparse_norm**2
        return sparse / (low + sparse) if low + sparse > 0 else math.nan

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values as shares of their sum; NaN while they are zero."""
        total = sum(self.singular_values)
        if not total > 0:
            return math.nan
        shares = [value / total for value in self.singular_values if value > 0]
        return math.exp(-sum(p * math.log(p) for p in shares))


def layers_of(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], scales: Mapping[str, float]) -> list[Layer]:
    """The weights of an adapter state (`rosa_fx.adapter_state`'s keys), in its order.

    `shapes` (as one matrix) and `scales` by weight name, as far as known: a weight without its shape has that of A and B,
    and without a scale the products B A are taken as they are.
    """
    names = dict.fromkeys(re.sub(r"\.(low_rank|sparse)\.\w+$", "", key) for key in tensors)
    return [_layer(name, tensors, shapes.get(name), scales.get(name, 1.0)) for name in names]


@torch.no_grad()
def _layer(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int] | None, scale: float) -> Layer:
    A, B = tensors.get(f"{name}.low_rank.A"), tensors.get(f"{name}.low_rank.B")
    values, offsets, cols = (tensors.get(f"{name}.sparse.{part}") for part in ("values", "row_offsets", "cols"))
    singular: list[float] = []
    stack = 1
    if A is not None and B is not None:
        # One matrix is a stack of one.
        A, B = A.view(-1, *A.shape[-2:]), B.view(-1, *B.shape[-2:])
        stack = A.shape[0]
        shape = shape or (stack * B.shape[1], A.shape[2])
        singular = _singular_values(A, B, scale)
    low, sparse, inner = math.sqrt(stack * sum(s * s for s in singular)), 0.0, 0.0
    picture = None
    if values is not None and offsets is not None and cols is not None:
        sparse = float(values.double().norm())
        if shape is not None and bool(offsets.any()):
            mask = Mask(offsets, cols, shape)
            picture = _picture(mask)
            if A is not None and B is not None:
                inner = _inner(A, B, scale, mask, values)
    squares = low * low + sparse * sparse + 2 * inner
    stem = name.removesuffix(".weight")
    block = re.search(r"(?:^|\.)(\d+)(?:\.|$)", stem)
    return Layer(
        name=name,
        kind=re.sub(r"\.?\b\d+\b", "", stem).rpartition(".")[2] or stem,
        block=int(block[1]) if block else None,
        shape=shape if shape is None or stack == 1 else (stack, shape[0] // stack, shape[1]),
        rank=0 if A is None else A.shape[-2],
        nnz=0 if values is None else values.numel(),
        sparse=values is not None,
        mask=picture,
        low_rank_norm=low,
        sparse_norm=sparse,
        delta_norm=squares if math.isnan(squares) else math.sqrt(max(0.0, squares)),
        singular_values=singular,
    )


def _singular_values(A: Tensor, B: Tensor, scale: float) -> list[float]:
    """Of s·B A, by way of the R×R matrix between the two QR decompositions; A [E, R, K], B [E, N, R]."""
    if not (bool(A.isfinite().all()) and bool(B.isfinite().all())):
        return [math.nan] * A.shape[1]
    left, right = torch.linalg.qr(B.double()).R, torch.linalg.qr(A.double().mT).R
    values = torch.linalg.svdvals(left @ right.mT)
    return (abs(scale) * values.square().mean(0).sqrt()).tolist()


def _inner(A: Tensor, B: Tensor, scale: float, mask: Mask, values: Tensor) -> float:
    """<s·B A, S>, in pieces."""
    rows, columns, total = mask.rows(), mask.cols.long(), 0.0
    for start in range(0, mask.nnz, _CHUNK):
        piece = slice(start, start + _CHUNK)
        number, row = rows[piece] // B.shape[1], rows[piece] % B.shape[1]
        products = (B[number, row].double() * A[number, :, columns[piece]].double()).sum(1)
        total += float(products @ values[piece].double())
    return scale * total


def _picture(mask: Mask) -> MaskPicture:
    (N, K), rows, columns = mask.shape, mask.rows(), mask.cols.long()
    H, W = min(CELLS, N), min(CELLS, K)
    cells = torch.bincount((rows * H // N) * W + columns * W // K, minlength=H * W).view(H, W)
    per_row, per_column = torch.bincount(rows, minlength=N), torch.bincount(columns, minlength=K)
    return MaskPicture(
        cells=cells,
        rows=_density(cells.sum(1), N, H, mask.nnz),
        columns=_density(cells.sum(0), K, W, mask.nnz),
        top_rows=_top(per_row, mask.nnz),
        top_columns=_top(per_column, mask.nnz),
        used_rows=float((per_row > 0).double().mean()),
        used_columns=float((per_column > 0).double().mean()),
    )


def _density(counts: Tensor, size: int, stripes: int, nnz: int) -> list[float]:
    """Density of each stripe relative to the whole; stripes of `size` rows or columns differ by one in width."""
    widths = torch.bincount(torch.arange(size) * stripes // size, minlength=stripes)
    return (counts.double() / widths * size / nnz).tolist()


def _top(counts: Tensor, nnz: int) -> float:
    chosen = counts.topk(max(1, math.ceil(counts.numel() / 10))).values
    return float(chosen.sum()) / nnz
