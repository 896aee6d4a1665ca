"""The products y = x (D(Q) + S)ᵀ + s (x Aᵀ) Bᵀ + b and dx = dy (D(Q) + S) + ... out of GEMMs of the vendor's library.

Cost of a product of M rows with a weight [N, K], over that of the GEMM of a frozen dense weight, 2·M·N·K operations:

    tiles (CPU)   N·K elements decoded, S included, into a tile that stays in cache: one pass of N·K/2 bytes over memory
                  for 4-bit codes, where dequantising and reading back a whole fp32 weight takes 8.5 bytes per element.
                  Rows that are not float32 are widened and y is narrowed: M·(K + N) elements.
    few rows      the same decoding and M·N·K multiply-adds from the L1 cache; no tile.
    dy W          the GEMM of low precision reads its right operand down the rows: it is slower by a tenth where these are
                  long. So the tile is a row of panels, each narrow and by itself, filled in one pass over the weight.
    terms first   where the GEMM is in low precision, in which S would be lost: its sums start from x Sᵀ and a thin low-rank
                  product in float32, M·(nnz + R·(N + K)) multiply-adds and M·(K + N) elements (`cpu/terms.cpp`). In
                  the backward pass dS, dA and dB come with dy S for M·(nnz + R·(N + K)) more and M·K elements.
    whole         the weight dequantised, N·K elements written and read; S scattered into it.
    low rank      x Aᵀ and (x Aᵀ) Bᵀ: R·(1/N + 1/K) of the GEMM's operations, and one pass over y.

Low precision is computed natively only where the CPU multiplies it natively. Elsewhere its GEMM is emulated at a third of
float32's speed, so that widening pays although it decodes twice the bytes; the result is then rounded once.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_fx.kernels import definition
from rosa_fx.kernels.cpu import gemm, rows
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.stack import Stack, pieces_of_region
from rosa_fx.kernels.terms.base import Region, Shape, Term

# Up to so many rows of x the weight is multiplied as it is decoded; beyond, a GEMM makes better use of the registers.
FEW_ROWS = 64
# Bytes of a decoded tile, and the least outputs in it: thinner GEMMs pack their other operand too often, and every tile is
# another change between two parallel programs (4096x4096 with 512 rows in bf16: 1 ms of 25 more in four tiles than in one).
_TILE_BYTES = 32 << 20
_TILE_OUTPUTS = 512
# Columns of a panel of such a tile in low precision, where its rows would otherwise be at least so long.
_PANEL, _LONG_ROWS = 512, 2048
# Scratch memory up to this size is kept by each thread: fresh large blocks would be page-faulted in every time.
_KEPT_BYTES = 64 << 20

# Up to these ranks the low-rank term of a product in low precision is multiplied in float32; beyond, the GEMM is faster, which
# needs it beside the weight: in a tile, or in a copy of a whole weight.
_FP32_RANK, _FP32_RANK_WHOLE = 32, 64

# Elements of a weight up to which products in float32 make the pass of `joined_product` (Zen 5, two cores, 1,024 rows, products
# and gradients of a layer: 192x576 takes 0.79 of the time, 576x576 0.90, 1536x576 0.96, 2048x2048 1.04).
_SMALL_WEIGHT = 1 << 20

_LOW = (torch.bfloat16, torch.float16)
_Weighted = list[tuple[Term, Sequence[Tensor]]]
_Pairs = list[tuple[Tensor, Tensor]]


class Joined(NamedTuple):
    """A product, and what else was made in its pass over x: the thin product `left` [M, R], gradients of the delta."""

    out: Tensor
    left: Tensor | None = None
    gradients: Sequence[Tensor] = ()


def product(
    x: Tensor, bias: Tensor | None, base: Sequence[Tensor], delta: Sequence[Tensor], parsed: Layout, transposed: bool
) -> Tensor:
    """x Wᵀ + b [*, N] of x [*, K], or x W + b [*, K] of x [*, N] if `transposed`, in x's dtype, for the layout's part of W."""
    return joined_product(x, bias, base, delta, parsed, transposed).out


def joined_product(
    x: Tensor,
    bias: Tensor | None,
    base: Sequence[Tensor],
    delta: Sequence[Tensor],
    parsed: Layout,
    transposed: bool,
    *,
    left: bool = False,
    other: Tensor | None = None,
    kept: Tensor | None = None,
) -> Joined:
    """`product`, with more out of its pass over x, where it makes one: where it starts from the terms, of a whole weight.

    `left` asks for s x Aᵀ, or s x B if `transposed`, [M, R] in x's dtype. `other`, of the shape of the product and like x in
    dtype, is the second factor of the weight gradient, and asks for the gradient of the sparse values, [nnz] float32; with
    `kept`, which is the `left` of the product with `other`, those of A and of B follow. What cannot be had is left out.
    """
    if parsed.stack > 1:
        return Joined(_stacked_product(x, bias, base, delta, parsed, transposed))
    terms = [(item, tensors) for item, tensors in parsed.split(delta) if item.contributes]
    folded = [(item, tensors) for item, tensors in terms if item.folds]
    beside = [
        (item, tensors if parsed.region is None else item.cut(tensors, parsed.region))
        for item, tensors in terms
        if not item.folds
    ]
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    source = _source(x, base, folded, parsed)
    if source is not None and not transposed and flat.shape[0] <= FEW_ROWS:
        out = _few(flat, bias, source, beside, parsed)
        return Joined(out.view(*x.shape[:-1], out.shape[-1]))
    # In float32 S is part of the tile, at no cost, unless there is more to be had from the pass.
    first = source if folded and (_is_low(x) or left or kept is not None) else None
    if first is not None:
        folded = []
        source = None if first.holds(x.dtype) else first.base_only()
    low_rank = None
    if not folded and _starts_with_low_rank(x, beside, source is None, first is not None):
        first = first or rows.source(parsed.shape, parsed.base.stored(base), None)
        low_rank = beside.pop(0) if first is not None else None
    begin = made = tile = None
    gradients: Sequence[Tensor] = ()
    if first is not None:
        begin = x.new_empty(flat.shape[0], parsed.out_shape[1 if transposed else 0])
        pair, given = (None, None) if low_rank is None else (low_rank[0].pair(low_rank[1]), low_rank[0].thin(low_rank[1]))
        if left and pair is not None:
            made = x.new_empty(flat.shape[0], len(pair[0]))
        if other is not None and (parsed.region is not None or other.dtype != x.dtype or not (first.nnz or pair)):
            other = None
        if other is not None:
            other = other if other.dim() == 2 else other.reshape(-1, other.shape[-1])
        if source is not None and not beside:
            tile = _only_tile(parsed, transposed, x.dtype)
        gradients = first.terms(
            _region(parsed),
            flat,
            begin,
            transposed,
            pair,
            given,
            made=made,
            other=other,
            kept=kept if pair else None,
            tile=tile,
        )
    if source is None:
        out = _whole(flat, bias, base, folded, beside, parsed, transposed, begin)
    else:
        out = _tiled(flat, bias, source, beside, parsed, transposed, begin, tile)
    return Joined(out.view(*x.shape[:-1], out.shape[-1]), made, gradients)


def _stacked_product(
    x: Tensor, bias: Tensor | None, base: Sequence[Tensor], delta: Sequence[Tensor], parsed: Layout, transposed: bool
) -> Tensor:
    """`product` with rows of a stack, which are part of one matrix or go across several."""
    stack = Stack(base, delta, parsed)
    pieces = list(pieces_of_region(parsed))
    if len(pieces) == 1:
        return product(x, bias, *stack.matrix(*pieces[0]), transposed)
    if not transposed:
        out = torch.cat([product(x, None, *stack.matrix(*piece), transposed) for piece in pieces], -1)
        return out if bias is None else out + bias.to(x.dtype)
    parts = x.to(definition.accumulate_dtype(x.dtype)).split([row_stop - row for _, (row, row_stop, _, _) in pieces], -1)
    total = bias
    for part, piece in zip(parts, pieces):
        out = product(part, None, *stack.matrix(*piece), transposed)
        total = out if total is None else total + out
    assert total is not None
    return total.to(x.dtype)


@functools.cache
def native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` at least as fast as float32 ones."""
    cpu = torch.cpu
    if dtype == torch.bfloat16:
        return bool(cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())
    return dtype not in _LOW or bool(cpu._is_amx_fp16_supported())


def _source(x: Tensor, base: Sequence[Tensor], folded: _Weighted, layout: Layout) -> rows.Source | None:
    """The weight for the row kernels, or None where the whole weight is needed, or is there already."""
    csr = [item.csr(tensors) for item, tensors in folded]
    if x.device.type != "cpu" or x.dtype == torch.float64 or len(csr) > 1 or None in csr:
        return None
    stored = layout.base.stored(base)
    wide = x.dtype if native(x.dtype) else torch.float32
    if stored is None or (not csr and stored.kind == "dense" and stored.data.dtype == wide):
        return None
    return rows.source(layout.shape, stored, csr[0] if csr else None)


def _is_low(x: Tensor) -> bool:
    """Whether the product is computed in low precision by the CPU, which then takes sums that start from the terms."""
    return x.device.type == "cpu" and x.dtype in _LOW and native(x.dtype)


def joins_values(x: Tensor, rows: int) -> bool:
    """Whether a product of so many rows like x makes a pass from which the gradient of S's values can come."""
    return _is_low(x) and rows > FEW_ROWS


def joins_all(x: Tensor, rows: int, rank: int, shape: Shape) -> bool:
    """Whether products with S and a low-rank term should make the pass of `joined_product` for all gradients.

    In float32, where S costs nothing in the tile, that pays for small weights: the calls that it saves are as long as the rest.
    """
    small = x.device.type == "cpu" and x.dtype == torch.float32 and shape[0] * shape[1] <= _SMALL_WEIGHT
    return (_is_low(x) or small) and rows > FEW_ROWS and rank <= _FP32_RANK


def _starts_with_low_rank(x: Tensor, beside: _Weighted, whole: bool, started: bool) -> bool:
    """Whether the first term is among those from which the product starts.

    `whole`: there is no tile with room for its right factor; `started`: there is S, so that the pass is made anyway.
    """
    if not beside or not (started or (whole and _is_low(x))):
        return False
    pair = beside[0][0].pair(beside[0][1])
    return pair is not None and len(pair[0]) <= (_FP32_RANK_WHOLE if whole else _FP32_RANK)


def _whole(
    x: Tensor,
    bias: Tensor | None,
    base: Sequence[Tensor],
    folded: _Weighted,
    beside: _Weighted,
    layout: Layout,
    transposed: bool,
    begin: Tensor | None,
) -> Tensor:
    weight = (layout.base.dequantize if folded else layout.base.read)(base, layout.shape, x.dtype)
    for item, tensors in folded:
        item.fold_(weight, tensors)
    weight = layout.cut(weight)
    pairs = [item.factors(x, tensors, transposed) for item, tensors in beside]
    right = weight if transposed else weight.t()
    if pairs and x.dtype in _LOW:
        # y rounded to 8 or 11 bits would swallow an early delta, so the terms ride in the accumulator of one GEMM:
        # y = [x, x Aᵀ] [W, s B]ᵀ. It costs a copy of x and of the weight just written, and saves the passes over y.
        x = torch.cat([x, *(left for left, _ in pairs)], dim=1)
        if transposed:
            right = torch.cat([weight, *(thin for _, thin in pairs)], dim=0)
        else:
            right = torch.cat([weight, *(thin.t() for _, thin in pairs)], dim=1).t()
        pairs = []
    out = gemm.product(x, right, None if bias is None else bias.to(x.dtype), begin, begin is not None)
    for left, thin in pairs:
        out.addmm_(left, thin)
    return out


def _few(x: Tensor, bias: Tensor | None, source: rows.Source, beside: _Weighted, layout: Layout) -> Tensor:
    # A product that exists already is taken.
    pair = beside[0][0].pair(beside[0][1]) if beside and beside[0][0].thin(beside[0][1]) is None else None
    rest = beside[pair is not None :]
    out = x.new_empty(x.shape[0], layout.out_shape[0], dtype=torch.float32 if rest or bias is not None else x.dtype)
    source.few(_region(layout), x if x.stride(1) == 1 else x.contiguous(), out, pair)
    for item, tensors in rest:
        left, thin = item.factors(x.float(), tensors, False)
        out.addmm_(left.float(), thin)
    if bias is not None:
        out += bias
    return out.to(x.dtype)


def _tiled(
    x: Tensor,
    bias: Tensor | None,
    source: rows.Source,
    beside: _Weighted,
    layout: Layout,
    transposed: bool,
    begin: Tensor | None,
    written: Tensor | None,
) -> Tensor:
    """Tiles of outputs, each reduced in one GEMM: rows of the weight, or its columns if `transposed`.

    `written`: the only tile, where somebody has written it already.
    """
    depth, outputs = layout.out_shape if transposed else layout.out_shape[::-1]
    dtype = x.dtype if native(x.dtype) else torch.float32
    wide = x if dtype == x.dtype else _scratch("rows", x.shape, dtype).copy_(x)
    # A left factor that was computed elsewhere has x's dtype.
    pairs = [(left.to(dtype), thin) for left, thin in (item.factors(wide, tensors, transposed) for item, tensors in beside)]
    # As in `_whole`: in low precision the terms ride in the accumulator.
    riders = pairs if dtype in _LOW else []
    if riders:
        wide = torch.cat([wide, *(left for left, _ in riders)], dim=1)
        pairs = []
    out = x.new_empty(x.shape[0], outputs) if begin is None else begin
    made, add = out, begin is not None
    row, row_stop, column, _ = _region(layout)
    width, panel = _tile_width(depth, outputs, transposed, dtype)
    for start in range(0, outputs, width):
        stop = min(outputs, start + width)
        if transposed:
            tile = written
            if tile is None:
                tile = _scratch("tile", (-((stop - start) // -panel), wide.shape[1], min(panel, stop - start)), dtype)
                source.write((row, row_stop, column + start, column + stop), tile)
            for at, part in zip(range(start, stop, panel), tile):
                end = min(stop, at + panel)
                made = _multiply(wide, part[:, : end - at], bias, riders, pairs, out, at, end, add)
            continue
        if written is not None:
            made = _multiply(wide, written.t(), bias, riders, pairs, out, start, stop, add)
            continue
        # One block where a row is multiplied at once.
        blocks = gemm.blocks(depth) if gemm.by_onednn(dtype, x.device) else [(0, wide.shape[1])]
        memory = _scratch("tile", (wide.shape[1], stop - start), dtype)
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
    return width, _PANEL if transposed and dtype in _LOW and width >= _LONG_ROWS else width


def _only_tile(layout: Layout, transposed: bool, dtype: torch.dtype) -> Tensor | None:
    """Memory for all of the weight's part, if that is one tile: [outputs, depth], or panels if `transposed`."""
    depth, outputs = layout.out_shape if transposed else layout.out_shape[::-1]
    width, panel = _tile_width(depth, outputs, transposed, dtype)
    pieces = not transposed and gemm.by_onednn(dtype, torch.device("cpu")) and len(gemm.blocks(depth)) > 1
    if width < outputs or not outputs or pieces:
        return None
    return _scratch("tile", (-(outputs // -panel), depth, panel) if transposed else (outputs, depth), dtype)


def _multiply(
    wide: Tensor,
    right: Tensor | list[Tensor],
    bias: Tensor | None,
    riders: _Pairs,
    pairs: _Pairs,
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
    total = target if wide.dtype == out.dtype else _scratch("out", target.shape, wide.dtype)
    keep = target.shape != out.shape or total is not target
    made = gemm.product(wide, right, None if bias is None else bias[start:stop].to(wide.dtype), total, add, keep=keep)
    for left, thin in pairs:
        made.addmm_(left, thin[:, start:stop])
    return made if made.dtype == out.dtype else target.copy_(made)


def _region(layout: Layout) -> Region:
    return layout.region or (0, layout.shape[0], 0, layout.shape[1])


_kept = threading.local()


def _scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, this thread's own until it asks for the same name again."""
    count = torch.Size(shape).numel()
    bytes_ = count * dtype.itemsize
    if bytes_ > _KEPT_BYTES:
        return torch.empty(shape, dtype=dtype)
    kept: Tensor | None = getattr(_kept, name, None)
    if kept is None or kept.numel() < bytes_:
        with torch.inference_mode(False):
            kept = torch.empty(bytes_, dtype=torch.uint8)
        setattr(_kept, name, kept)
    return kept[:bytes_].view(dtype).view(torch.Size(shape))
