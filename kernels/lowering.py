"""What `rosa_fx::linear` and `linear_t` become inside Inductor where it generates Triton: templates, or scratch + GEMM.

`heuristics` says which. Nothing here runs before a rewritten weight is captured; on other devices the operator is called.
The operators allocate nothing: every buffer is Inductor's, so that CUDA graphs and its memory planning see them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rosa_fx.kernels import heuristics, inductor, lower_grads
from rosa_fx.kernels.bases.fourbit import NESTED_BLOCKSIZE, FourBitFormat, _dynamic_map
from rosa_fx.kernels.heuristics import Product, Tiles
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.low_rank import LowRank
from rosa_fx.kernels.terms.sparse import Sparse
from rosa_fx.kernels.triton_templates import INT8_STEP, template

aten = torch.ops.aten
ops = torch.ops.rosa_fx

_TRITON_DTYPES = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32"}


@dataclass
class Operands:
    """A product as IR nodes: x [M, depth], the weight's tensors, A [R, K] and B [N, R] or None, CSR tensors or empty."""

    layout: Layout
    product: Product
    x: Any
    bias: Any
    weight: list[Any]
    low_rank: tuple[Any, ...] | None
    scale: float
    sparse: list[Any]


def register() -> None:
    """Offer Inductor the lowerings, if it has a device to generate Triton for. Doing so twice is harmless."""
    if not inductor.triton_devices():
        return
    inductor.register_lowering(ops.linear.default, _linear)
    inductor.register_lowering(ops.linear_t.default, _linear_t)
    lower_grads.register()


def _linear(x: Any, bias: Any, base: Sequence[Any], delta: Sequence[Any], key: str) -> Any:
    return _lower(x, bias, base, delta, key, transposed=False)


def _linear_t(x: Any, bias: Any, base: Sequence[Any], delta: Sequence[Any], key: str) -> Any:
    return _lower(x, bias, base, delta, key, transposed=True)


def _lower(x: Any, bias: Any, base: Sequence[Any], delta: Sequence[Any], key: str, transposed: bool) -> Any:
    """The product [*, outputs], or None where the templates do not apply."""
    device = x.get_device()
    sizes = list(x.get_size())
    if not inductor.generates_triton(device) or x.get_dtype() not in _TRITON_DTYPES or 0 in sizes:
        return None
    layout = Layout.parse(key)
    if layout.stack != 1:
        return None
    outputs = layout.shape[1] if transposed else layout.shape[0]
    if layout.shape == (1, 1) or (outputs == 1 and all(size == 1 for size in sizes[:-1])):
        # Inductor drops the mask of a store that has one address only.
        return None
    flat = x if len(sizes) == 2 else inductor.lower(aten.reshape.default, x, [-1, sizes[-1]])
    operands = _operands(flat, bias, base, delta, layout, transposed)
    if operands is None:
        return None
    out = _fused(operands) if heuristics.fuse(operands.product) else _scratch(operands)
    return out if len(sizes) == 2 else inductor.lower(aten.reshape.default, out, [*sizes[:-1], outputs])


def _operands(
    x: Any, bias: Any, base: Sequence[Any], delta: Sequence[Any], layout: Layout, transposed: bool
) -> Operands | None:
    low_rank: tuple[Any, ...] | None = None
    scale = 1.0
    sparse: list[Any] = []
    for item, tensors in layout.split(delta):
        nodes: list[Any] = list(tensors)
        if not item.contributes or 0 in nodes[0].get_size():
            continue
        # A product with the activations, behind A and B, has as many rows as those.
        if not all(inductor.is_static(node) for node in (nodes[:2] if isinstance(item, LowRank) else nodes)):
            return None
        if isinstance(item, LowRank) and low_rank is None:
            low_rank, scale = tuple(nodes), item.scale
        elif isinstance(item, Sparse) and not sparse:
            sparse = nodes
        else:
            return None
    if layout.base.kind == "dense" and base[0].get_dtype() not in _TRITON_DTYPES:
        return None
    n, k = layout.shape
    device = x.get_device()
    product = Product(
        rows=inductor.size_hint(x.get_size()[0]),
        n=n,
        k=k,
        kind=layout.base.kind,
        dtype=x.get_dtype(),
        rank=inductor.size_hint(low_rank[0].get_size()[0]) if low_rank else 0,
        nnz=inductor.size_hint(sparse[0].get_size()[0]) if sparse else 0,
        transposed=transposed,
        capability=inductor.capability(device),
    )
    weight = list(base)
    if isinstance(layout.base, FourBitFormat) and layout.base.double_quant:
        weight.append(inductor.constant(_dynamic_map(torch.device("cpu")), device))
    return Operands(layout, product, x, bias, weight, low_rank, scale, sparse)


def _options(operands: Operands, columns: int) -> dict[str, Any]:
    """The constants of every template; `columns` of the weight that a tile has."""
    layout, product = operands.layout, operands.product
    n, k = layout.shape
    base = layout.base
    fourbit = base if isinstance(base, FourBitFormat) else None
    narrow = product.dtype in (torch.float16, torch.bfloat16)
    return {
        "DTYPE": _TRITON_DTYPES[product.dtype],
        "ALLOW_TF32": bool(torch.backends.cuda.matmul.allow_tf32),
        # Positions in the packed weight count its elements, of which there may be twice as many as bytes.
        "FLAT": "tl.int64" if n * k >= 2**31 else "tl.int32",
        "TRANSPOSED": product.transposed,
        "RANK": product.rank,
        "SCALE": float(operands.scale),
        "SPARSE": bool(operands.sparse),
        "BIAS": operands.bias is not None,
        "INT8_STEP": INT8_STEP,
        "PAIRED": k % 2 == 0,
        "BLOCKSIZE": fourbit.blocksize if fourbit else 0,
        "NESTED_BLOCKSIZE": NESTED_BLOCKSIZE,
        "DOUBLE_QUANT": fourbit is not None and fourbit.double_quant,
        "SCALES_PER_ROW": heuristics.scales_per_row(k, fourbit.blocksize, columns) if fourbit else 0,
        # The permutes are PTX and keep 16 bits of mantissa: enough for what is rounded to 8 or 11.
        "ASM": fourbit is not None and narrow and inductor.runs_ptx(operands.x.get_device()),
    }


def _thin(operands: Operands) -> Any:
    """x Aᵀ [M, R], or x (s B) [M, R] if transposed, as a product that Inductor sees."""
    assert operands.low_rank is not None
    A, B, *given = operands.low_rank
    if given:
        return given[0]
    dtype = operands.product.dtype
    if operands.product.transposed:
        wide = inductor.lower(aten.mul.Tensor, inductor.cast(B, torch.float32), operands.scale)
        return inductor.lower(aten.mm.default, operands.x, inductor.cast(wide, dtype))
    return inductor.lower(aten.mm.default, operands.x, inductor.lower(aten.permute.default, inductor.cast(A, dtype), [1, 0]))


def _factor(operands: Operands) -> Any:
    """The side of the low-rank part that belongs to the weight: A if transposed, else B."""
    assert operands.low_rank is not None
    return operands.low_rank[0 if operands.product.transposed else 1]


def _fused(operands: Operands) -> Any:
    product = operands.product
    inputs = [operands.x, *operands.weight]
    if operands.low_rank is not None:
        inputs += [_thin(operands), _factor(operands)]
    examples = _csr_examples(operands, len(inputs))
    inputs += operands.sparse
    if operands.bias is not None:
        inputs.append(operands.bias)
    choices = heuristics.tile_choices(product)
    kept = choices if inductor.max_autotune() else choices[:1]
    name = "linear_t" if product.transposed else "linear"
    return inductor.template_output(
        f"rosa_{name}",
        template(name, product.kind),
        inductor.realize(*inputs),
        [operands.x.get_size()[0], product.outputs],
        product.dtype,
        [_fused_options(operands, tiles) for tiles in kept],
        examples,
    )


def _csr_examples(operands: Operands, first: int) -> dict[int, Callable[[], torch.Tensor]]:
    """Row offsets and columns to time kernels on, for inputs from position `first`: valid, with the real number of entries."""
    if not operands.sparse:
        return {}
    product, device = operands.product, operands.x.get_device()

    def offsets() -> torch.Tensor:
        return torch.linspace(0, product.nnz, product.n + 1, dtype=torch.float64).to(device, torch.int32)

    def columns() -> torch.Tensor:
        return torch.randint(product.k, (product.nnz,), dtype=torch.int32).to(device)

    return {first + 1: offsets, first + 2: columns}


def _fused_options(operands: Operands, tiles: Tiles) -> dict[str, Any]:
    transposed = operands.product.transposed
    block_n, block_k = (tiles.block_sum, tiles.block_out) if transposed else (tiles.block_out, tiles.block_sum)
    return {
        **_options(operands, block_k),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_R": heuristics.rank_block(operands.product.rank),
        "BLOCK_S": heuristics.sparse_block(tiles.block_m, tiles.block_out),
        "GROUP_M": tiles.group_m,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _scratch(operands: Operands) -> Any:
    """[x, x Aᵀ] [D(Q) + S, s B]ᵀ: the low-rank part rides in the accumulator of the library's product.

    In float32 it is added by a thin product of its own, which rounds no worse and copies neither x nor the weight.
    """
    product = operands.product
    joined = product.rank if product.dtype != torch.float32 else 0
    dense = _dense(operands, joined)
    left = operands.x
    if joined:
        left = inductor.lower(aten.cat.default, [left, _thin(operands)], 1)
    right = dense if product.transposed else inductor.lower(aten.permute.default, dense, [1, 0])
    if operands.bias is None:
        out = inductor.lower(aten.mm.default, left, right)
    else:
        out = inductor.lower(aten.addmm.default, inductor.cast(operands.bias, product.dtype), left, right)
    if not product.rank or joined:
        return out
    factor = inductor.cast(_factor(operands), product.dtype)
    if product.transposed:
        return inductor.lower(aten.addmm.default, out, _thin(operands), factor)
    thin = inductor.lower(aten.permute.default, factor, [1, 0])
    return inductor.lower(aten.addmm.default, out, _thin(operands), thin, alpha=operands.scale)


def _dense(operands: Operands, rank: int) -> Any:
    """The scratch buffer: D(Q) + S, with the low-rank factor beside it or below it if `rank` is not 0."""
    product = operands.product
    n, k = operands.layout.shape
    inputs = list(operands.weight)
    if rank:
        inputs.append(_factor(operands))
    inputs += operands.sparse
    block = heuristics.power_of_two(k if product.transposed else k + rank, 16, 1024)
    options = {"RANK": rank, "ROWS": n, "COLUMNS": k, "BLOCK_K": block, "BLOCK_S": 64, "num_warps": 4, "num_stages": 1}
    return inductor.template_output(
        "rosa_scratch",
        template("scratch", product.kind),
        inductor.realize(*inputs),
        [n + rank, k] if product.transposed else [n, k + rank],
        product.dtype,
        [_options(operands, block) | options],
    )
