"""How masks chosen from real gradients lie in a weight: in few rows, in few columns, in the same places again?"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_study.gradients import dense_gradients, over_base
from accuracy_study.results import Row
from torch import Tensor, nn

import rosa_fx
from rosa_fx.kernels.cpu.sparse import select_topk

DENSITIES = (0.006, 0.02)
BATCH_ROWS = (4, 32)
TILE = 32
FULLEST = 0.01
"""Share of rows (of columns) that counts as the fullest."""


@dataclass(frozen=True)
class Shape:
    """Of one mask: shares of empty rows and columns, entries in the fullest of them, and the longest over the mean row."""

    empty_rows: float
    empty_columns: float
    top_rows: float
    top_columns: float
    longest_row: float
    longest_in_tile: float

    @classmethod
    def of(cls, mask: rosa_fx.Mask) -> Shape:
        rows, columns = mask.row_offsets.diff().long(), torch.bincount(mask.cols.long(), minlength=mask.shape[1])
        mean = mask.nnz / mask.shape[0]
        # A program of a kernel for few rows of x owns as many rows of the weight, and takes as long as the longest of them.
        tiles = torch.stack([tile.max() for tile in rows.split(TILE)]).double()
        return cls(
            float((rows == 0).double().mean()),
            float((columns == 0).double().mean()),
            _top(rows),
            _top(columns),
            float(rows.max()) / mean,
            float(tiles.mean()) / mean,
        )


def _top(counts: Tensor) -> float:
    number = max(1, round(FULLEST * counts.numel()))
    return float(counts.sort(descending=True).values[:number].sum() / counts.sum())


def mask_of(gradient: Tensor, density: float) -> rosa_fx.Mask:
    """The recipe's mask of one gradient [N, K]: the int(density · N · K) largest."""
    shape = (gradient.shape[0], gradient.shape[1])
    return rosa_fx.Mask(*select_topk(gradient.abs(), int(density * gradient.numel())), shape)


def overlap(one: rosa_fx.Mask, other: rosa_fx.Mask) -> float:
    """Share of the entries of one mask that the other has too; two random masks share as many as the density says."""
    return float((one.to_dense() & other.to_dense()).sum() / one.nnz)


def kind_of(name: str) -> str:
    """The layer kind in a parameter's name: what precedes `.weight`."""
    return name.split(".")[-2]


def measure(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> tuple[list[Row], dict[str, rosa_fx.Mask]]:
    """A row per layer kind, density and rows in the batch, each a mean over the layers; and masks of default density to draw.

    `batches` are of `BATCH_ROWS[0]` rows each, enough for two disjoint batches of the largest number of rows.
    """
    rows, drawn = [], {}
    for count in BATCH_ROWS:
        each = count // BATCH_ROWS[0]
        first, second = batches[:each], batches[each : 2 * each]
        found = {(base, 0): dense_gradients(over_base(model, base), first) for base in ("keep", "nf4")}
        found["nf4", 1] = dense_gradients(over_base(model, "nf4"), second)
        for density in DENSITIES:
            values: dict[str, list[dict[str, float]]] = defaultdict(list)
            for name in found["nf4", 0]:
                ours, exact, other = (mask_of(found[key][name], density) for key in (("nf4", 0), ("keep", 0), ("nf4", 1)))
                between = {"overlap_batches": overlap(ours, other), "overlap_bases": overlap(ours, exact)}
                values[kind_of(name)].append(vars(Shape.of(ours)) | between)
                if density == DENSITIES[0] and count == BATCH_ROWS[-1]:
                    drawn[name] = ours
            for kind, layers in values.items():
                means = {field: statistics.fmean(layer[field] for layer in layers) for field in layers[0]}
                rows.append({"key": {"kind": kind, "density": density, "batch_rows": count}, "layers": len(layers), **means})
    return rows, drawn


def draw(masks: dict[str, rosa_fx.Mask], path: Path) -> None:
    """Per layer kind: the mask of the middle layer, and how entries concentrate in rows and in columns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_kind: dict[str, list[rosa_fx.Mask]] = defaultdict(list)
    for name, mask in masks.items():
        by_kind[kind_of(name)].append(mask)
    figure, axes = pyplot.subplots(2, len(by_kind), figsize=(2.4 * len(by_kind), 5), layout="constrained", squeeze=False)
    for (above, below), (kind, layers) in zip(axes.T, by_kind.items()):
        middle = layers[len(layers) // 2]
        above.imshow(
            _coarse(middle.to_dense()), cmap="Blues", vmin=0, interpolation="nearest", aspect="auto", extent=(0, 1, 1, 0)
        )
        above.set_title(f"{kind} {middle.shape[0]}×{middle.shape[1]}", fontsize=9)
        above.set_xticks([])
        above.set_yticks([])
        for label, axis, colour in (("rows", 1, "#1f6fb4"), ("columns", 0, "#d9822b")):
            below.plot(*_concentration([m.to_dense().sum(axis) for m in layers]), label=label, color=colour)
        below.plot([0, 1], [0, 1], ":", color="#888888", label="even")
        below.set_xlabel("share, fullest first", fontsize=8)
        below.tick_params(labelsize=7)
        below.grid(alpha=0.25)
    axes[0, 0].set_ylabel("rows, middle layer", fontsize=8)
    axes[1, 0].set_ylabel("share of the entries", fontsize=8)
    axes[1, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _coarse(dense: Tensor, cells: int = 48) -> Any:
    """Entries per cell, square root for the eye."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(dense[None, None].float(), cells)[0, 0]
    return pooled.sqrt().numpy()


def _concentration(counts: list[Tensor]) -> tuple[list[float], list[float]]:
    """(share of rows, share of entries in them), a mean over layers."""
    shares = [c.sort(descending=True).values.cumsum(0).double() / c.sum() for c in counts]
    mean = torch.stack(shares).mean(0)
    return (torch.arange(1, mean.numel() + 1) / mean.numel()).tolist(), mean.tolist()
