"""What `rosa_fx::linear` and `linear_t` become inside Inductor where it generates Triton: templates, or scratch + GEMM.

`cost` says which, `tiling` with which tiles. Nothing here runs before a rewritten weight is captured; on other devices the
operator is called.
The operators allocate nothing: every buffer is Inductor's, so that CUDA graphs and its memory planning see them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rosa_fx.kernels import cost, inductor, lower_grads, tiling
from rosa_fx.kernels.bases.fourbit import NESTED_BLOCKSIZE, FourBitFormat, _dynamic_map
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.lower_sparse import sparse_product, sparse_timer
from rosa_fx.kernels.product import AMD, Product
from rosa_fx.kernels.terms.low_rank import LowRank
from rosa_fx.kernels.terms.low_rank_given import LowRankGiven
from rosa_fx.kernels.terms.sparse import Sparse
from rosa_fx.kernels.tiling import Tiles
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
    low_rank: tuple[Any, Any] | None
    scale: float
    sparse: list[Any]
    given: Any = None

    @functools.cached_property
    def thin(self) -> Any:
        """x Aᵀ [M, R], or x (s B) [M, R] if transposed: what is given, or a product that Inductor sees."""
        if self.given is not None:
            return self.given
        assert self.low_rank is not None
        A, B = self.low_rank
        dtype = self.product.dtype
        if self.product.transposed:
            wide = inductor.lower(aten.mul.Tensor, inductor.cast(B, torch.float32), self.scale)
            return inductor.lower(aten.mm.default, self.x, inductor.cast(wide, dtype))
        return inductor.lower(aten.mm.default, self.x, inductor.lower(aten.permute.default, inductor.cast(A, dtype), [1, 0]))


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
    timed = inductor.max_autotune() and cost.choose_by_time(operands.product)
    out = _fused(operands, timed) if timed or cost.fuse(operands.product) else _scratch(operands)
    return out if len(sizes) == 2 else inductor.lower(aten.reshape.default, out, [*sizes[:-1], outputs])


def _operands(
    x: Any, bias: Any, base: Sequence[Any], delta: Sequence[Any], layout: Layout, transposed: bool
) -> Operands | None:
    low_rank: tuple[Any, Any] | None = None
    scale = 1.0
    sparse: list[Any] = []
    given: Any = None
    for item, tensors in layout.split(delta):
        nodes: list[Any] = list(tensors)
        if not item.contributes or 0 in nodes[0].get_size():
            continue
        if isinstance(item, LowRankGiven):
            # The one operand with as many rows as x, which may be dynamic.
            given = nodes.pop()
        if not all(inductor.is_static(node) for node in nodes):
            return None
        if isinstance(item, LowRank) and low_rank is None:
            low_rank, scale = (nodes[0], nodes[1]), item.scale
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
        blocksize=layout.base.blocksize if isinstance(layout.base, FourBitFormat) else 0,
        capability=AMD if torch.version.hip is not None else inductor.capability(device),
    )
    weight = list(base)
    if isinstance(layout.base, FourBitFormat) and layout.base.double_quant:
        weight.append(inductor.constant(_dynamic_map(torch.device("cpu")), device))
    return Operands(layout, product, x, bias, weight, low_rank, scale, sparse, given)


def _options(operands: Operands, columns: int) -> dict[str, Any]:
    """The constants of every template; `columns` of the weight that a tile has."""
    layout, product = operands.layout, operands.product
    n, k = layout.shape
    base = layout.base
    fourbit = base if isinstance(base, FourBitFormat) else None
    narrow = product.dtype in (torch.float16, torch.bfloat16)
    ptx = base.kind != "dense" and inductor.runs_ptx(operands.x.get_device())
    return {
        "DTYPE": _TRITON_DTYPES[product.dtype],
        "ALLOW_TF32": bool(torch.backends.cuda.matmul.allow_tf32),
        # Positions in the packed weight count its elements, of which there may be twice as many as bytes.
        "FLAT": "tl.int64" if n * k >= 2**31 else "tl.int32",
        "TRANSPOSED": product.transposed,
        "RANK": product.rank,
        "SCALE": float(operands.scale),
        "SPARSE": bool(operands.sparse),
        "GIVEN": cost.gathers(product),
        "BIAS": operands.bias is not None,
        "INT8_STEP": INT8_STEP,
        "PAIRED": k % 2 == 0,
        "IN_FOURS": k % 4 == 0,
        "BLOCKSIZE": fourbit.blocksize if fourbit else 0,
        "NESTED_BLOCKSIZE": NESTED_BLOCKSIZE,
        "DOUBLE_QUANT": fourbit is not None and fourbit.double_quant,
        "SCALES_PER_ROW": tiling.scales_per_row(k, fourbit.blocksize, columns) if fourbit else 0,
        # The permutes are PTX and keep 16 bits of mantissa: enough for what is rounded to 8 or 11.
        "ASM": ptx and narrow,
        "FEW": False,
        "PAIRS": ptx and tiling.permutes(product),
    }


def _factor(operands: Operands) -> Any:
    """The side of the low-rank part that belongs to the weight: A if transposed, else B."""
    assert operands.low_rank is not None
    return operands.low_rank[0 if operands.product.transposed else 1]


def _fused(operands: Operands, timed: bool) -> Any:
    """The fused kernel; if `timed`, or what an autotuner finds faster: one of its other tiles, or the scratch buffer."""
    product = operands.product
    inputs = [operands.x, *operands.weight]
    if operands.low_rank is not None:
        inputs += [operands.thin, _factor(operands)]
    examples = _code_examples(operands)
    if cost.gathers(product):
        inputs.append(sparse_product(operands.x, operands.sparse, product))
    else:
        examples |= _csr_examples(operands, len(inputs))
        inputs += operands.sparse
    if operands.bias is not None:
        inputs.append(operands.bias)
    inputs = list(inductor.realize(*inputs))
    choices = tiling.tile_choices(product)
    kept = choices if inductor.max_autotune() else choices[:1]
    name = "linear_t" if product.transposed else "linear_few" if tiling.scales_sums(product) else "linear"
    return inductor.template_output(
        f"rosa_{name}",
        template(name, product.kind),
        inputs,
        [operands.x.get_size()[0], product.outputs],
        product.dtype,
        [_fused_options(operands, tiles) for tiles in kept],
        examples,
        _scratch_alternative(operands, inputs) if timed else None,
    )


def _scratch_alternative(operands: Operands, inputs: list[Any]) -> inductor.Alternative:
    """The scratch buffer and the library's product, timed one after the other on tensors like `inputs` of the fused kernel.

    What the sparse part takes that only the fused kernel needs is subtracted.
    """
    product = operands.product
    n, k = operands.layout.shape
    weights, joined = len(operands.weight), _joined(product)
    thin = 1 + weights if product.rank else None
    kept = list(range(1, 1 + weights)) + ([2 + weights] if joined else [])
    size = [n + joined, k] if product.transposed else [n, k + joined]
    csr = [inductor.realize(part)[0] for part in operands.sparse]
    own = [inputs[i] for i in kept]
    timer = inductor.template_timer(
        template("scratch", product.kind), [*own, *csr], size, product.dtype, _dense_options(operands, joined)
    )
    gathering = sparse_timer(operands.x, operands.sparse, product) if operands.sparse else None

    def time(tensors: Sequence[torch.Tensor], out: torch.Tensor) -> float:
        dense = torch.empty(size, dtype=product.dtype, device=out.device)
        entries = [make() for make in _csr_examples(operands, 0).values()]
        if entries:
            entries.insert(0, torch.randn(product.nnz, dtype=operands.sparse[0].get_dtype(), device=out.device))
        spent = timer(*(tensors[i] for i in kept), *entries, out=dense)
        right = dense if product.transposed else dense.t()
        x = tensors[0]

        def multiply() -> object:
            left = torch.cat([x, tensors[thin]], 1) if joined and thin is not None else x
            if thin is None or joined:
                return torch.mm(left, right, out=out)
            factor = tensors[thin + 1].to(product.dtype)
            return torch.mm(left, right, out=out).addmm_(tensors[thin], factor if product.transposed else factor.t())

        spent += inductor.time_call(multiply, out.device)
        if gathering is not None:
            spent -= gathering(x, entries)
        return max(spent, 1e-6)

    return inductor.Alternative("rosa_scratch_and_mm", time, lambda: _scratch(operands))


def _code_examples(operands: Operands) -> dict[int, Callable[[], torch.Tensor]]:
    """Random codes to time kernels on: the values of integers that address a table decide how fast that goes."""
    device = operands.x.get_device()

    def codes(shape: list[int], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        limits = torch.iinfo(dtype)
        return lambda: torch.randint(limits.min, limits.max + 1, shape, dtype=dtype, device=device)

    parts = enumerate(operands.weight, 1)
    integers = {torch.uint8, torch.int8}
    return {
        at: codes([int(size) for size in part.get_size()], part.get_dtype())
        for at, part in parts
        if part.get_dtype() in integers
    }


def _csr_examples(operands: Operands, first: int) -> dict[int, Callable[[], torch.Tensor]]:
    """Row offsets and columns to time kernels on, for inputs from position `first`: valid, with the real number of entries."""
    if not operands.sparse:
        return {}
    product, device = operands.product, operands.x.get_device()

    def offsets() -> torch.Tensor:
        return torch.linspace(0, product.nnz, product.n + 1, dtype=torch.float64, device=device).to(torch.int32)

    def columns() -> torch.Tensor:
        return torch.randint(product.k, (product.nnz,), dtype=torch.int32, device=device)

    return {first + 1: offsets, first + 2: columns}


def _fused_options(operands: Operands, tiles: Tiles) -> dict[str, Any]:
    transposed = operands.product.transposed
    block_n, block_k = (tiles.block_sum, tiles.block_out) if transposed else (tiles.block_out, tiles.block_sum)
    n, k = operands.layout.shape
    return {
        **_options(operands, block_k),
        "UPRIGHT": tiling.upright(operands.product),
        "ROW_MASK": transposed and n % block_n != 0,
        "COLUMN_MASK": k % block_k != 0,
        # Rows of a decode step are few and would be read again; they are masked instead.
        "X_MASK": tiles.block_m <= 16,
        "FEW": tiles.block_m <= 16,
        "GROUP_K": tiling.group_columns(operands.product, block_k) if tiling.scales_sums(operands.product) else 0,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_R": tiling.rank_block(operands.product.rank),
        "BLOCK_S": tiling.sparse_block(tiles.block_m, tiles.block_out),
        "GROUP_M": tiles.group_m,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _joined(product: Product) -> int:
    """Ranks that ride in the library's product, as columns of its operands."""
    return product.rank if product.dtype != torch.float32 else 0


def _scratch(operands: Operands) -> Any:
    """[x, x Aᵀ] [D(Q) + S, s B]ᵀ: the low-rank part rides in the accumulator of the library's product.

    In float32 it is added by a thin product of its own, which rounds no worse and copies neither x nor the weight.
    """
    product = operands.product
    joined = _joined(product)
    dense = _dense(operands, joined)
    left = operands.x
    if joined:
        left = inductor.lower(aten.cat.default, [left, operands.thin], 1)
    right = dense if product.transposed else inductor.lower(aten.permute.default, dense, [1, 0])
    if operands.bias is None:
        out = inductor.lower(aten.mm.default, left, right)
    else:
        out = inductor.lower(aten.addmm.default, inductor.cast(operands.bias, product.dtype), left, right)
    if not product.rank or joined:
        return out
    factor = inductor.cast(_factor(operands), product.dtype)
    if product.transposed:
        return inductor.lower(aten.addmm.default, out, operands.thin, factor)
    thin = inductor.lower(aten.permute.default, factor, [1, 0])
    return inductor.lower(aten.addmm.default, out, operands.thin, thin, alpha=operands.scale)


def _dense(operands: Operands, rank: int) -> Any:
    """The scratch buffer: D(Q) + S, with the low-rank factor beside it or below it if `rank` is not 0."""
    product = operands.product
    n, k = operands.layout.shape
    inputs = list(operands.weight)
    if rank:
        inputs.append(_factor(operands))
    inputs += operands.sparse
    return inductor.template_output(
        "rosa_scratch",
        template("scratch", product.kind),
        inductor.realize(*inputs),
        [n + rank, k] if product.transposed else [n, k + rank],
        product.dtype,
        [_dense_options(operands, rank)],
    )


def _dense_options(operands: Operands, rank: int) -> dict[str, Any]:
    n, k = operands.layout.shape
    tile = tiling.scratch_tile(k)
    return _options(operands, tile.columns) | {
        "RANK": rank,
        "ROWS": n,
        "COLUMNS": k,
        "ROW_MASK": True,
        "COLUMN_MASK": True,
        "BLOCK_K": tile.columns,
        "BLOCK_R": tiling.rank_block(rank),
        "BLOCK_S": 64,
        "num_warps": tile.warps,
        "num_stages": 1,
    }
