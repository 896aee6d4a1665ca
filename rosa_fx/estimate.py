"""What a rewritten weight costs, beside what it cost when it was dense and trained whole: bytes and FLOPs.

Estimates from shapes. Counted are the products and what the terms add to them; element-wise work (dequantising, activations)
and memory for gradients and optimizer states are not. Thin products
that layers with one input share are counted for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from rosa_fx.passes.report import Work
from rosa_fx.weight import RosaWeight


def weight_bytes(weight: RosaWeight) -> tuple[int, int, int]:
    """Bytes of the weight: dense in the dtype that the model sees; as its frozen base; of the terms, indices included."""
    dense = prod(weight.shape) * weight.base.dtype.itemsize
    base = sum(tensor.nbytes for tensor in weight.base.tensors())
    terms = [module for module in (weight.low_rank, weight.sparse) if module is not None]
    return dense, base, sum(t.nbytes for m in terms for t in (*m.parameters(), *m.buffers()))


def flops(weight: RosaWeight, work: Iterable[Work]) -> tuple[int, int]:
    """FLOPs of the captured call with this weight: dense and trained whole; rewritten, with both terms in force.

    A product of M rows costs 2·M·N·K either way, to which low-rank adds 2·M·R·(N + K) and sparse 2·M·nnz. The weight
    gradient costs 2·M·N·K dense; from its factors 4·M·R·(N + K) + 2·M·nnz. What stays dense pays for both.
    """
    rank = 0 if weight.low_rank is None else weight.low_rank.rank
    entries = 0 if weight.sparse is None else weight.sparse.values.numel()
    before = after = 0
    for item in work:
        nnz = entries * item.n * item.k // prod(weight.shape)  # of the part of the weight that is used
        thin = rank * (item.n + item.k)
        before += item.flops
        if item.kind == "product":
            after += item.flops + 2 * item.rows * (thin + nnz)
        elif item.kind == "gradient":
            after += 2 * item.rows * (2 * thin + nnz)
        elif item.kind == "dense product":
            after += item.flops + 2 * rank * item.n * item.k  # B A is formed
        else:
            after += item.flops + 4 * rank * item.n * item.k  # Bᵀ dW and dW Aᵀ
    return before, after
