"""The sparse part of a fused product of many rows: S xᵀ, or Sᵀ dyᵀ for grad input, in a kernel of its own.

`cost` has the cost model. Grad input sums over rows of S and needs its entries by column: sorted in the graph, because
masks may change between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from rosa_fx.kernels import inductor, tiling
from rosa_fx.kernels.lower_grads import transposed
from rosa_fx.kernels.product import Product
from rosa_fx.kernels.triton_templates import sparse_template

ops = torch.ops.rosa_fx

_by_column: WeakKeyDictionary[Any, dict[Any, list[Any]]] = WeakKeyDictionary()


def sparse_product(x: Any, csr: Sequence[Any], product: Product) -> Any:
    """[outputs, M] in the product's dtype, for x [M, depth] and the CSR tensors of S [N, K] as IR nodes."""
    inputs = inductor.realize(transposed(x), *_lists(csr, product))
    size = [product.outputs, x.get_size()[0]]
    return inductor.template_output("rosa_sparse", sparse_template(), inputs, size, product.dtype, [_options(product)])


def sparse_timer(x: Any, csr: Sequence[Any], product: Product) -> Callable[[torch.Tensor, Sequence[torch.Tensor]], float]:
    """`timer(x, csr)`: milliseconds that `sparse_product` takes on such tensors, transposition aside."""
    inputs = inductor.realize(transposed(x), *_lists(csr, product))
    size = [product.outputs, x.get_size()[0]]
    timer = inductor.template_timer(sparse_template(), inputs, size, product.dtype, _options(product))

    def time(example: torch.Tensor, tensors: Sequence[torch.Tensor]) -> float:
        out = torch.empty(product.outputs, example.shape[0], dtype=product.dtype, device=example.device)
        if not product.transposed:
            return timer(example.t().contiguous(), *tensors, out=out)
        sorting = inductor.time_call(lambda: ops.by_column(*tensors, product.k), example.device)
        return sorting + timer(example.t().contiguous(), *ops.by_column(*tensors, product.k), out=out)

    return time


def _lists(csr: Sequence[Any], product: Product) -> list[Any]:
    """Values, offsets and positions of the rows of what is multiplied by xᵀ, made once per graph."""
    if not product.transposed:
        return list(csr)
    known = _by_column.setdefault(inductor.graph(), {})
    name = tuple(buffer.get_name() for buffer in inductor.realize(*csr))
    if name not in known:
        known[name] = list(inductor.call(ops.by_column.default, *csr, product.k))
    return known[name]


def _options(product: Product) -> dict[str, Any]:
    tile = tiling.gather_tile(product)
    return {"BLOCK_S": tile.entries, "BLOCK_K": tile.rows, "num_warps": tile.warps, "num_stages": 1}
