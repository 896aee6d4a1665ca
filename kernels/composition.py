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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_fx.kernels import definition
from rosa_fx.kernels.cpu import gemm, rows
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.stack import Stack, pieces_of_region
from rosa_fx.kernels.terms.base import Shape, Term
from rosa_fx.kernels.tiles import LOW, Weighted, of_tile, only_tile, region_of, tiled

# Up to so many rows of x the weight is multiplied as it is decoded; beyond, a GEMM makes better use of the registers.
FEW_ROWS = 64
# Up to these ranks the low-rank term of a product in low precision is summed in float32 before it; beyond, the GEMM is faster,
# which needs it beside the weight: in a tile, or in a copy of a whole weight.
_FP32_RANK, _FP32_RANK_WHOLE = 32, 64

# Elements of a weight up to which products in float32 make the pass of `joined_product` (Zen 5, two cores, 1,024 rows, products
# and gradients of a layer: 192x576 takes 0.79 of the time, 576x576 0.90, 1536x576 0.96, 2048x2048 1.04).
_SMALL_WEIGHT = 1 << 20


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
    folded = [(item, delta[place]) for item, place in parsed.folded]
    beside = [(item, delta[place]) for item, place in parsed.beside]
    if parsed.region is not None:
        beside = [(item, item.cut(tensors, parsed.region)) for item, tensors in beside]
    flat = definition.flat(x)
    source = _source(x, base, folded, parsed)
    if source is not None and not transposed and flat.shape[0] <= FEW_ROWS:
        return Joined(_like(x, _few(flat, bias, source, beside, parsed)))
    # In float32 S is part of the tile, at no cost, unless there is more to be had from the pass.
    starts = _is_low(x) or (x.dtype == torch.float32 and (left or kept is not None))
    first = source if folded and starts else None
    if first is not None:
        folded = []
        source = None if first.holds(x.dtype) else first
    low_rank = None
    if not folded and starts and _starts_with_low_rank(beside, source is None):
        first = first or rows.source(parsed.shape, parsed.base.stored(base), None)
        low_rank = beside.pop(0) if first is not None else None
    started = _Started()
    if first is not None:
        room = only_tile(parsed, transposed, x.dtype) if source is not None and not beside else None
        started = _start(flat, first, low_rank, parsed, transposed, left, other, kept, room)
    if source is None:
        out = _whole(flat, bias, base, folded, beside, parsed, transposed, started.begin)
    elif started.tile is not None and started.begin is not None:
        out = of_tile(flat, started.tile, bias, transposed, started.begin)
    else:
        # S is not added twice.
        out = tiled(
            flat,
            flat.dtype if native(flat.dtype) else torch.float32,
            bias,
            source.base_only() if source is first else source,
            beside,
            parsed,
            transposed,
            started.begin,
        )
    return Joined(_like(x, out), started.left, started.gradients)


def _like(x: Tensor, out: Tensor) -> Tensor:
    """Rows [M, N] as [*, N] for x [*, K]."""
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


class _Started(NamedTuple):
    """The terms [M, outputs] from which the sums of a product start, what was made beside them, and the weight's only tile."""

    begin: Tensor | None = None
    left: Tensor | None = None
    gradients: Sequence[Tensor] = ()
    tile: Tensor | None = None


def _start(
    x: Tensor,
    first: rows.Source,
    low_rank: tuple[Term, Sequence[Tensor]] | None,
    layout: Layout,
    transposed: bool,
    left: bool,
    other: Tensor | None,
    kept: Tensor | None,
    tile: Tensor | None,
) -> _Started:
    """The pass over x [M, inputs] that `joined_product` is about; `tile` is filled."""
    begin = x.new_empty(x.shape[0], layout.out_shape[1 if transposed else 0])
    pair = given = made = None
    if low_rank is not None:
        item, tensors = low_rank
        pair, given = item.pair(tensors), item.thin(tensors)
    if left and pair is not None:
        made = x.new_empty(x.shape[0], len(pair[0]))
    if other is not None and layout.region is None and other.dtype == x.dtype and (first.nnz or pair):
        other = definition.flat(other)
    else:
        other = None
    if pair is None:
        kept = None
    region = region_of(layout)
    gradients = first.terms(region, x, begin, transposed, pair, given, made=made, other=other, kept=kept, tile=tile)
    return _Started(begin, made, gradients, tile)


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
    return dtype not in LOW or bool(cpu._is_amx_fp16_supported())


def _source(x: Tensor, base: Sequence[Tensor], folded: Weighted, layout: Layout) -> rows.Source | None:
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
    return x.device.type == "cpu" and x.dtype in LOW and native(x.dtype)


def joins_values(x: Tensor, rows: int) -> bool:
    """Whether a product of so many rows like x makes a pass from which the gradient of S's values can come."""
    return _is_low(x) and rows > FEW_ROWS


def joins_all(x: Tensor, rows: int, rank: int, shape: Shape) -> bool:
    """Whether products with a low-rank term, and maybe S, should make the pass of `joined_product` for all gradients.

    In float32, where S costs nothing in the tile, that pays for small weights: the calls that it saves are as long as the rest.
    """
    small = x.device.type == "cpu" and x.dtype == torch.float32 and shape[0] * shape[1] <= _SMALL_WEIGHT
    return (_is_low(x) or small) and rows > FEW_ROWS and rank <= _FP32_RANK


def _starts_with_low_rank(beside: Weighted, whole: bool) -> bool:
    """Whether the first term is among those from which the product starts.

    `whole`: there is no tile with room for its right factor.
    """
    pair = beside[0][0].pair(beside[0][1]) if beside else None
    return pair is not None and len(pair[0]) <= (_FP32_RANK_WHOLE if whole else _FP32_RANK)


def _whole(
    x: Tensor,
    bias: Tensor | None,
    base: Sequence[Tensor],
    folded: Weighted,
    beside: Weighted,
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
    if pairs and x.dtype in LOW:
        # y rounded to 8 or 11 bits would swallow an early delta, so the terms ride in the accumulator of one GEMM:
        # y = [x, x Aᵀ] [W, s B]ᵀ. It costs a copy of x and of the weight just written, and saves the passes over y.
        x = torch.cat([x, *(left for left, _ in pairs)], dim=1)
        if transposed:
            right = torch.cat([weight, *(thin for _, thin in pairs)], dim=0)
        else:
            right = torch.cat([weight, *(thin.t() for _, thin in pairs)], dim=1).t()
        pairs = []
    out = gemm.product(x, right, None if bias is None else bias.to(x.dtype), begin, begin is not None, keep=False)
    for left, thin in pairs:
        out.addmm_(left, thin)
    return out


def _few(x: Tensor, bias: Tensor | None, source: rows.Source, beside: Weighted, layout: Layout) -> Tensor:
    # A product that exists already is taken.
    pair = beside[0][0].pair(beside[0][1]) if beside and beside[0][0].thin(beside[0][1]) is None else None
    rest = beside[pair is not None :]
    out = x.new_empty(x.shape[0], layout.out_shape[0], dtype=torch.float32 if rest or bias is not None else x.dtype)
    # As `torch.set_float32_matmul_precision("medium")` says, which is what bitsandbytes' kernels do unasked.
    low = x.dtype is torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    source.few(region_of(layout), x if x.stride(1) == 1 else x.contiguous(), out, pair, low=low)
    for item, tensors in rest:
        left, thin = item.factors(x.float(), tensors, False)
        out.addmm_(left.float(), thin)
    if bias is not None:
        out += bias
    return out if out.dtype is x.dtype else out.to(x.dtype)
