"""Rows of activations: whether two nodes hold the same ones, whatever their leading dimensions, and how many there are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from rosa_fx.passes.views import SAME_ELEMENTS, is_view, value

aten = torch.ops.aten

_ROW_MAJOR = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim}
_SAME = SAME_ELEMENTS - {aten._to_copy.default, torch.ops.prims.convert_element_type.default}
# Rows where capture knows no number.
_MANY = 4096


def row_count(source: Node) -> int:
    """M, or what it is in the example that is captured."""
    sizes = value(source).shape[:-1]  # type: ignore[union-attr]
    return math.prod(size if isinstance(size, int) else size.node.hint or _MANY for size in sizes)


def rows_identity(node: Any) -> Any:
    """Equal for nodes with the same rows, whatever their leading dimensions: views are told by what they do."""
    while isinstance(node, Node):
        parent = node.args[0] if node.args else None
        if _keeps_rows(node):
            node = parent
        elif _turns(node) and _turns(parent):
            node = parent.args[0]  # type: ignore[union-attr]
        else:
            break
    if isinstance(node, Node):
        if node.op != "call_function" or not (is_view(node) or node.target in SAME_ELEMENTS):
            return node
        return (node.target, *map(rows_identity, node.args), *((name, rows_identity(arg)) for name, arg in node.kwargs.items()))
    return tuple(map(rows_identity, node)) if isinstance(node, (list, tuple)) else node


def _keeps_rows(node: Node) -> bool:
    if node.op != "call_function" or not (node.target in _ROW_MAJOR or node.target in _SAME):
        return False
    before, after = value(node.args[0]), value(node)
    if before is None or after is None or not (before.dim() and after.dim()):
        return False
    return bool(before.shape[-1] == after.shape[-1])


def _turns(node: Any) -> bool:
    """Whether the last two dimensions change places, and nothing else."""
    if not isinstance(node, Node) or node.target is not aten.permute.default:
        return False
    dims = [dim % len(node.args[1]) for dim in node.args[1]]  # type: ignore[arg-type, operator, union-attr]
    return len(dims) > 1 and dims == [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]
