"""Following a tensor through views and casts back to where it came from.

`trace(node)` replays the chain of views on a *shadow*, a meta tensor laid over the source's contiguous storage, so that
the shadow's sizes and strides say how the node's dimensions map to the source's. One rule then covers every spelling:
`.t()`, `.mT`, permutes, reshapes, einsum's unsqueeze-permute-view chains, and copies and casts in between.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rosa_fx.kernels.terms.base import Region, Shape

aten = torch.ops.aten

# Change values' representation or memory at most, never which element is where.
SAME_ELEMENTS = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.lift_fresh_copy.default,
    torch.ops.prims.convert_element_type.default,
}


# Several views at once; `getitem` picks one.
SPLITS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
}


@dataclass(frozen=True)
class Traced:
    """`source` seen through views: `shadow` has the node's sizes, and strides into the source's contiguous storage."""

    source: Node
    shadow: Tensor


def is_view(node: Node) -> bool:
    if is_getitem(node):
        return isinstance(node.args[0], Node) and node.args[0].target in SPLITS
    if node.target in SPLITS:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and (
        node.target.is_view or node.target is aten._unsafe_view.default or node.target is aten.reshape.default
    )


def value(node: object) -> Tensor | None:
    """The fake tensor of a node, if it has one."""
    found = node.meta.get("val") if isinstance(node, Node) else None
    return found if isinstance(found, Tensor) else None


def trace(node: Node, batch: int | None = None) -> Traced | None:
    """The nearest ancestor of `node` that is neither view nor cast, and the shadow of `node` over it.

    `batch` stands for the ancestor's first size where that is not static.
    None if a step cannot be expressed by strides (a reshape that has to copy, sizes that are not static).
    """
    chain: list[Node] = []
    while node.op == "call_function" and (is_view(node) or node.target in SAME_ELEMENTS):
        chain.append(node)
        parent = node.args[0]
        if not isinstance(parent, Node):
            return None
        node = parent
    source = value(node)
    if source is None:
        return None
    sizes = list(source.shape)
    if batch is not None and sizes and not isinstance(sizes[0], int):
        sizes[0] = batch
    if not all(isinstance(size, int) for size in sizes):
        return None
    shadow: Any = torch.empty(sizes, device="meta")
    for step in reversed(chain):
        if step.target in SAME_ELEMENTS:
            continue
        if any(isinstance(arg, Node) for arg in step.all_input_nodes[1:]):
            return None
        copying = step.target in (aten._unsafe_view.default, aten.reshape.default)
        target: Any = aten.view.default if copying else step.target
        try:
            shadow = target(shadow, *step.args[1:], **step.kwargs)
        except (RuntimeError, ValueError):
            return None
    return Traced(node, shadow) if isinstance(shadow, Tensor) else None


def matrix_region(traced: Traced, shape: Shape) -> tuple[bool, Region] | None:
    """What part of a contiguous source [N, K] a matrix shows: (False as stored or True transposed, its region).

    None if it is no such matrix. Leading dimensions of size 1, or expanded (stride 0), do not count.
    """
    shadow = traced.shadow
    if shadow.dim() < 2:
        return None
    if any(size != 1 and stride != 0 for size, stride in zip(shadow.shape[:-2], shadow.stride()[:-2], strict=True)):
        return None
    rows, columns = shape
    start, column = divmod(int(shadow.storage_offset()), columns)

    def region(sizes: tuple[int, ...], strides: tuple[int, ...]) -> Region | None:
        lies = all(size == 1 or stride == wanted for size, stride, wanted in zip(sizes, strides, (columns, 1), strict=True))
        fits = start + sizes[0] <= rows and column + sizes[1] <= columns
        return (start, start + sizes[0], column, column + sizes[1]) if lies and fits else None

    sizes, strides = tuple(shadow.shape[-2:]), tuple(shadow.stride()[-2:])
    whole = (0, rows, 0, columns)
    stored, turned = region(sizes, strides), region(sizes[::-1], strides[::-1])
    if turned is not None and (turned == whole or stored is None):
        return True, turned
    return None if stored is None else (False, stored)


def is_getitem(node: Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem
