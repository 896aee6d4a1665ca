"""Products with a decoded weight, tile by tile: decoded into scratch memory, multiplied there by the vendor's GEMM.

Their costs are in `composition.py`, which decides what is multiplied like that.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from rosa_fx.kernels.cpu import gemm, rows
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.base import Region, Term

# Bytes of a decoded tile, and the least outputs in it: thinner GEMMs pack their other operand too often, and every tile is
# another change between two parallel programs (4096x4096 with 512 rows in bf16: 1 ms of 25 more in four tiles than in one).
_TILE_BYTES = 32 << 20
_TILE_OUTPUTS = 512
# Columns of a panel of such a tile in low precision, where its rows would otherwise be at least so long.
_PANEL, _LONG_ROWS = 512, 2048
# Scratch memory up to this size is kept by each thread: fresh large blocks would be page-faulted in every time.
_KEPT_BYTES = 64 << 20

LOW = (torch.bfloat16, torch.float16)
Weighted = list[tuple[Term, Sequence[Tensor]]]
Pairs = list[tuple[Tensor, Tensor]]


def tiled(
    x: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    source: rows.Source,
    beside: Weighted,
    layout: Layout,
    transposed: bool,
    begin: Tensor | None,
) -> Tensor:
    """x Wᵀ + b, or x W + b if `transposed`, in x's dtype, of GEMMs in `dtype`.

    By tiles of outputs, each reduced in one GEMM: rows of the weight, or its columns. Sums start from `begin`, if given.
    """
    depth, outputs = layout.out_shape if transposed else layout.out_shape[::-1]
    wide = x if dtype == x.dtype else scratch("rows", x.shape, dtype).copy_(x)
    # A left factor that was computed elsewhere has x's dtype.
    pairs = [(left.to(dtype), thin) for left, thin in (item.factors(wide, tensors, transposed) for item, tensors in beside)]
    # As where the weight is whole: in low precision the terms ride in the accumulator.
    riders = pairs if dtype in LOW else []
    if riders:
        wide = torch.cat([wide, *(left for left, _ in riders)], dim=1)
        pairs = []
    out = x.new_empty(x.shape[0], outputs) if begin is None else begin
    made, add = out, begin is not None
    row, row_stop, column, _ = region_of(layout)
    width, panel = _tile_width(depth, outputs, transposed, dtype)
    for start in range(0, outputs, width):
        stop = min(outputs, start + width)
        if transposed:
            tile = scratch("tile", (-((stop - start) // -panel), wide.shape[1], min(panel, stop - start)), dtype)
            source.write((row, row_stop, column + start, column + stop), tile)
            made = _by_panels(wide, tile, bias, riders, pairs, out, start, stop, add)
            continue
        # One block where a row is multiplied at once.
        blocks = gemm.blocks(depth) if gemm.by_onednn(dtype, x.device) else [(0, wide.shape[1])]
        memory = scratch("tile", (wide.shape[1], stop - start), dtype)
        rights = []
        for first, last in blocks:
            tile = memory[first:last].view(stop - start, last - first)
            source.write((row + start, row + stop, column + first, column + min(last, depth)), tile)
            rights.append(tile.t())
        made = _multiply(wide, rights[0] if len(rights) == 1 else rights, bias, riders, pairs, out, start, stop, add)
    return made if panel >= outputs else out


def _tile_width(depth: int, outputs: int, transposed: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Outputs of a tile, and of a panel of it."""
    width = min(outputs, max(_TILE_OUTPUTS, _TILE_BYTES // (dtype.itemsize * max(1, depth)) // _PANEL * _PANEL))
    return width, _PANEL if transposed and dtype in LOW and width >= _LONG_ROWS else width


def only_tile(layout: Layout, transposed: bool, dtype: torch.dtype) -> Tensor | None:
    """Memory for all of the weight's part, if that is one tile: [outputs, depth]; if `transposed` its transpose, or panels."""
    depth, outputs = layout.out_shape if transposed else layout.out_shape[::-1]
    width, panel = _tile_width(depth, outputs, transposed, dtype)
    pieces = not transposed and gemm.by_onednn(dtype, torch.device("cpu")) and len(gemm.blocks(depth)) > 1
    if width < outputs or not outputs or pieces:
        return None
    if panel < outputs:
        return scratch("tile", (-(outputs // -panel), depth, panel), dtype)
    return scratch("tile", (depth, outputs) if transposed else (outputs, depth), dtype)


def of_tile(x: Tensor, tile: Tensor, bias: Tensor | None, transposed: bool, begin: Tensor) -> Tensor:
    """`begin` + x Wᵀ + b, or x W + b if `transposed`, from memory of `only_tile` that W was written to; all of one dtype."""
    if tile.dim() == 3:
        _by_panels(x, tile, bias, [], [], begin, 0, begin.shape[1], True)
        return begin
    right = tile if transposed else tile.t()
    return gemm.product(x, right, None if bias is None else bias.to(x.dtype), begin, True, keep=False)


def _by_panels(
    wide: Tensor,
    tile: Tensor,
    bias: Tensor | None,
    riders: Pairs,
    pairs: Pairs,
    out: Tensor,
    start: int,
    stop: int,
    add: bool,
) -> Tensor:
    """`_multiply` by the panels [P, depth, outputs of one] of a tile, one after another; what the last one gave."""
    made, panel = out, tile.shape[-1]
    for at, part in zip(range(start, stop, panel), tile):
        end = min(stop, at + panel)
        made = _multiply(wide, part[:, : end - at], bias, riders, pairs, out, at, end, add)
    return made


def _multiply(
    wide: Tensor,
    right: Tensor | list[Tensor],
    bias: Tensor | None,
    riders: Pairs,
    pairs: Pairs,
    out: Tensor,
    start: int,
    stop: int,
    add: bool,
) -> Tensor:
    """out[:, start:stop] = wide right + bias + pairs; += if `add`. The last rows of `right` are for those of `riders`.

    Where that is all of `out`, it may be in the returned tensor instead.
    """
    row = wide.shape[1]
    for _, thin in reversed(riders):
        assert isinstance(right, Tensor)
        row -= len(thin)
        right[row : row + len(thin)].copy_(thin[:, start:stop])
    target = out[:, start:stop]
    total = target if wide.dtype == out.dtype else scratch("out", target.shape, wide.dtype)
    keep = target.shape != out.shape or total is not target
    made = gemm.product(wide, right, None if bias is None else bias[start:stop].to(wide.dtype), total, add, keep=keep)
    for left, thin in pairs:
        made.addmm_(left, thin[:, start:stop])
    return made if made.dtype == out.dtype else target.copy_(made)


def region_of(layout: Layout) -> Region:
    return layout.region or (0, layout.shape[0], 0, layout.shape[1])


_MOST_VIEWS = 64


class _Kept(threading.local):
    """Scratch memory of a thread, by name, and views of it, which take longer to make than to find."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}
        self.views: dict[tuple[object, ...], Tensor] = {}


_kept = _Kept()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, this thread's own until it asks for the same name again."""
    key = (name, dtype, *shape)
    found = _kept.views.get(key)
    if found is not None:
        return found
    bytes_ = torch.Size(shape).numel() * dtype.itemsize
    if bytes_ > _KEPT_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = _kept.memory.get(name)
    # Views hold memory that has become too small.
    if memory is None or memory.numel() < bytes_ or len(_kept.views) == _MOST_VIEWS:
        _kept.views.clear()
    with torch.inference_mode(False):
        if memory is None or memory.numel() < bytes_:
            memory = _kept.memory[name] = torch.empty(bytes_, dtype=torch.uint8, device="cpu")
        found = _kept.views[key] = memory[:bytes_].view(dtype).view(torch.Size(shape))
    return found
