"""What `rosa_fx::linear_grads` becomes inside Inductor where it generates Triton.

Gradients of A and B are products of the vendor's library. Those of the sparse values are a sampled product (SDDMM),
dS[j] = Σ_m dy[m, row_j] x[m, col_j], in a kernel of its own:

- Work is split over the entries, not over rows: masks cluster in few rows and columns. A program owns consecutive entries,
  finds their rows by binary search in the row offsets, and its entries of one row read the same dy. No atomics, one order of
  summation: the same result every time. Sums are float32.
- Operands are transposed first. From x [M, K] as it lies each lane would read 2 of the 32 bytes of a sector: at 0.6 % of
  4096×4096, 100,000 entries times 32 M bytes, against 8 M (N + K) bytes of transposition and 4 M bytes an entry afterwards, an
  eighth. Layers with one input share its transpose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rosa_fx.kernels import inductor
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.product import AMD, power_of_two
from rosa_fx.kernels.terms.collect import CollectGradient, CollectReceived, CollectTopK
from rosa_fx.kernels.terms.low_rank import LowRank
from rosa_fx.kernels.terms.sparse import Sparse
from rosa_fx.kernels.tiling import gradient_tiles
from rosa_fx.kernels.triton_templates import FOLDER

aten = torch.ops.aten
ops = torch.ops.rosa_fx

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Programs that fill a large device twice over.
_PROGRAMS = 264

_transposes: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Chunk:
    """`entries` of the mask per program, `rows` of M per step."""

    entries: int
    rows: int
    warps: int


def chunks(rows: int, nnz: int) -> list[Chunk]:
    """Sizes for the sampled product over M = `rows`, best first: lanes hold 32 sums, and small masks still fill the device."""
    block_m = power_of_two(rows, 16, 128)
    most = power_of_two(max(nnz // _PROGRAMS, 1), 4, 64)
    found: list[Chunk] = []
    for entries, wanted, warps in ((32, 128, 4), (64, 64, 4), (16, 256, 4), (64, 128, 8), (8, 128, 1)):
        chunk = Chunk(min(entries, most), min(wanted, block_m), warps)
        if chunk not in found:
            found.append(chunk)
    return found


def search_steps(rows: int) -> int:
    """Halvings that leave one of `rows` rows."""
    return max(rows - 1, 0).bit_length()


def register() -> None:
    """Offer Inductor the lowering. Doing so twice is harmless."""
    inductor.register_lowering(ops.linear_grads.default, _linear_grads)


def _linear_grads(dy: Any, x: Any, delta: Sequence[Any], key: str) -> list[Any] | None:
    """The gradients, or None where the operator is called instead."""
    layout = Layout.parse(key)
    sizes = [*dy.get_size(), *x.get_size()]
    supported = dy.get_dtype() == x.get_dtype() and x.get_dtype() in _DTYPES and 0 not in sizes
    if layout.stack > 1 or not (supported and inductor.generates_triton(x.get_device())):
        return None
    makers: list[Callable[[Any, Any, Sequence[Any], Layout], list[Any]]] = []
    for item, tensors in layout.split(delta):
        maker = _MAKERS.get(type(item))
        if maker is None or not all(inductor.is_static(tensor) for tensor in tensors):
            return None
        makers.append(maker)
    dy, x = _flat(dy), _flat(x)
    split = zip(makers, layout.split(delta), strict=True)
    return [grad for maker, (item, tensors) in split for grad in maker(dy, x, (item, *tensors), layout)]


def _flat(node: Any) -> Any:
    sizes = list(node.get_size())
    return node if len(sizes) == 2 else inductor.lower(aten.reshape.default, node, [-1, sizes[-1]])


def _low_rank(dy: Any, x: Any, term: Sequence[Any], layout: Layout) -> list[Any]:
    """dA = (dy (s B))ᵀ x and dB = s dyᵀ (x Aᵀ), zero outside of the region."""
    item, A, B = term
    row, row_stop, column, column_stop = layout.region or (0, layout.shape[0], 0, layout.shape[1])
    dtype = x.get_dtype()
    if 0 in A.get_size():
        return [inductor.lower(aten.full.default, node.get_size(), 0, **_like(node)) for node in (A, B)]
    part_a = inductor.cast(inductor.lower(aten.slice.Tensor, A, 1, column, column_stop), dtype)
    part_b = _scaled(inductor.lower(aten.slice.Tensor, B, 0, row, row_stop), item.scale, dtype)
    dA = inductor.lower(aten.mm.default, _turned(inductor.lower(aten.mm.default, dy, part_b)), x)
    dB = inductor.lower(aten.mm.default, _turned(dy), inductor.lower(aten.mm.default, x, _turned(part_a)))
    dA, dB = inductor.cast(dA, A.get_dtype()), _scaled(dB, item.scale, B.get_dtype())
    if layout.region is not None:
        dA = inductor.lower(aten.constant_pad_nd.default, dA, [column, layout.shape[1] - column_stop])
        dB = inductor.lower(aten.constant_pad_nd.default, dB, [0, 0, row, layout.shape[0] - row_stop])
    return [dA, dB]


def _sparse(dy: Any, x: Any, term: Sequence[Any], layout: Layout) -> list[Any]:
    """dS of the values."""
    _, values, row_offsets, cols = term
    (nnz,) = values.get_size()
    if nnz == 0:
        return [inductor.lower(aten.full.default, [0], 0, **_like(values))]
    inputs = inductor.realize(transposed(dy), transposed(x), row_offsets, cols)
    row, row_stop, column, column_stop = layout.region or (0, layout.shape[0], 0, layout.shape[1])
    choices = chunks(inductor.size_hint(x.get_size()[0]), int(nnz))
    options = [
        {
            "ROWS": layout.shape[0],
            "SEARCH_STEPS": search_steps(layout.shape[0]),
            "REGION": layout.region is not None,
            "ROW": row,
            "ROW_STOP": row_stop,
            "COLUMN": column,
            "COLUMN_STOP": column_stop,
            "BLOCK_E": chunk.entries,
            "BLOCK_M": chunk.rows,
            "num_warps": chunk.warps,
            "num_stages": 2,
        }
        for chunk in (choices if inductor.max_autotune() else choices[:1])
    ]
    device = x.get_device()
    examples = {
        2: lambda: torch.linspace(0, int(nnz), layout.shape[0] + 1, dtype=torch.float64, device=device).to(torch.int32),
        3: lambda: torch.randint(layout.shape[1], (int(nnz),), dtype=torch.int32, device=device),
    }
    out = inductor.template_output("rosa_sddmm", _template(), inputs, [nnz], values.get_dtype(), options, examples)
    return [out]


@functools.cache
def _template() -> Any:
    return inductor.flat_template("rosa_sddmm", "BLOCK_E", (FOLDER / "sddmm.jinja").read_text())


def transposed(node: Any) -> Any:
    """[M, C] as a buffer [C, M] with M in one piece, made once per graph."""
    (buffer,) = inductor.realize(node)
    known = _transposes.setdefault(inductor.graph(), {})
    name = (buffer.get_name(), str(buffer.get_layout()))
    if name not in known:
        known[name] = inductor.contiguous(_turned(node))
    return known[name]


def _turned(node: Any) -> Any:
    return inductor.lower(aten.permute.default, node, [1, 0])


def _scaled(node: Any, scale: float, dtype: torch.dtype) -> Any:
    """scale · node, rounded to `dtype` once."""
    return inductor.cast(inductor.lower(aten.mul.Tensor, inductor.cast(node, torch.float32), scale), dtype)


def _like(node: Any) -> dict[str, Any]:
    return {"dtype": node.get_dtype(), "device": node.get_device()}


# --- collecting for masks ----------------------------------------------------------------------------------------


def _weight_gradient(dy: Any, x: Any, layout: Layout) -> Any:
    """dyᵀ x in float32, zero outside of the region: the products of 16-bit factors are exact, and none is converted first."""
    row, row_stop, column, column_stop = layout.region or (0, layout.shape[0], 0, layout.shape[1])
    size = [row_stop - row, column_stop - column]
    rows = inductor.size_hint(x.get_size()[0])
    capability = AMD if torch.version.hip is not None else inductor.capability(x.get_device())
    tile_n, tile_k, step = gradient_tiles(size[0], size[1], rows, x.get_dtype(), capability)
    options = {"BLOCK_M": tile_n, "BLOCK_N": tile_k, "BLOCK_K": step, "TRANSPOSED": False, "num_warps": 8, "num_stages": 3}
    inputs = inductor.realize(dy, x)
    out = inductor.template_output("rosa_weight_gradient", _gradient_template(), inputs, size, torch.float32, [options])
    if layout.region is None:
        return out
    padding = [column, layout.shape[1] - column_stop, row, layout.shape[0] - row_stop]
    return inductor.lower(aten.constant_pad_nd.default, out, padding)


@functools.cache
def _gradient_template() -> Any:
    return inductor.triton_template("rosa_weight_gradient", False, (FOLDER / "weight_gradient.jinja").read_text())


def _collect_gradient(dy: Any, x: Any, term: Sequence[Any], layout: Layout) -> list[Any]:
    """The dense weight gradient."""
    return [_weight_gradient(dy, x, layout)]


def _collect_topk(dy: Any, x: Any, term: Sequence[Any], layout: Layout) -> list[Any]:
    """The mask, from one dense buffer: its size is taken where the tiles are stored."""
    (size,) = term[1].get_size()
    score = inductor.lower(aten.abs.default, _weight_gradient(dy, x, layout))
    return [inductor.call(ops.select_mask.default, score, (int(size) - 1) // 2)]


def _collect_received(dy: Any, x: Any, term: Sequence[Any], layout: Layout) -> list[Any]:
    """A count; the factors go to the receiver, whose kernel adds their product to its sum (`triton_accumulate`)."""
    _, probe, number = term
    region = layout.region or (0, layout.shape[0], 0, layout.shape[1])
    return [inductor.call(ops.give_product.default, *inductor.realize(dy, x), probe, number, [*layout.shape], [*region])]


_MAKERS: dict[type, Callable[[Any, Any, Sequence[Any], Layout], list[Any]]] = {
    LowRank: _low_rank,
    Sparse: _sparse,
    CollectGradient: _collect_gradient,
    CollectTopK: _collect_topk,
    CollectReceived: _collect_received,
}
