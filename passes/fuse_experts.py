"""Rewrite 3: products in which rows meet matrices of a stack W [E, N, K], all of them or those that were chosen.

bmm(x, Wᵀ)                          -> grouped_linear(x)               x [E, M, K]: experts or blocks side by side
bmm(x, W[i]ᵀ)                       -> grouped_linear(x, index=i)      x [S, M, K]: matrices gathered for every row
_grouped_mm(x, Wᵀ, offs)            -> grouped_linear(x, offs)         x [S, K]: rows sorted by expert
transformers' grouped_mm_fallback   -> grouped_linear(x, offs)         the same where `_grouped_mm` does not compile
its backward operator's grad-input  -> grouped_linear_t(dy, offs)

With W as stored in place of Wᵀ it is grouped_linear_t, and the other way round. One matrix out of a stack, W[3], is a region
of it and left to rewrite 1. The condition is that the operand shows the same part of every matrix, through views and casts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

import rosa_fx.kernels.grouped_ops  # noqa: F401  (registers the operators)
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.base import Region
from rosa_fx.passes.fuse_linear import PRODUCTS, add_bias, emit, emit_transpose
from rosa_fx.passes.views import SAME_ELEMENTS, Traced, is_getitem, is_view, matrix_region, trace, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx

# Stands for a number of rows that is not static. Only views that do not depend on it can be followed.
_ANY = 1_000_003


@dataclass(frozen=True)
class StackOperand:
    """A materialised stack as an operand: `transposed` matrices, the `region` of each that is shown.

    `index` says which matrix each entry of the batch meets, where that is not simply all of them; `copies` how often the
    whole stack is repeated in the batch (a broadcast).
    """

    source: Node
    layout: Layout
    transposed: bool
    region: Region
    index: Node | None = None
    copies: int = 1


def stack_operand(node: Node) -> StackOperand | None:
    """`node` [E, ·, ·] as all matrices of a materialised stack, or as some that were gathered from it."""
    traced, copies = trace(node, batch=_ANY), 1
    if traced is None:
        traced, copies = _broadcast(node)
    if traced is None:
        return None
    gathered = _gathered(traced.source)
    if gathered is not None:
        return _gathered_operand(traced, *gathered)
    if traced.source.target is not ops.materialize.default:
        return None
    layout = Layout.parse(str(traced.source.args[2]))
    if layout.stack == 1 or traced.shadow.dim() != 3 or traced.shadow.shape[0] != layout.stack:
        return None
    shown = _same_of_each(traced.shadow, layout.each_shape, traced.source)
    return None if shown is None else StackOperand(traced.source, layout, *shown, copies=copies)


def _same_of_each(shadow: torch.Tensor, shape: tuple[int, int], source: Node) -> tuple[bool, Region] | None:
    """(transposed, region of each) if `shadow` [E, ·, ·] shows the same part of each of E matrices of `shape` in a row."""
    rows, columns = shape
    if shadow.dim() != 3 or (shadow.shape[0] > 1 and shadow.stride(0) != rows * columns):
        return None
    return matrix_region(Traced(source, shadow[0]), shape)


def _broadcast(node: Node) -> tuple[Traced | None, int]:
    """A stack that was expanded to [..., E, ·, ·] and flattened into one batch: the stack, and how often it is there."""
    inner, turned = _copied(node), False
    while inner.target is aten.permute.default and inner.args[1] == [0, 2, 1]:
        inner, turned = _copied(inner.args[0]), not turned  # type: ignore[arg-type]
    if not is_view(inner) or not isinstance(inner.args[0], Node):
        return None, 1
    traced, flat = trace(_copied(inner.args[0])), value(inner)
    if traced is None or flat is None or flat.dim() != 3 or traced.shadow.dim() < 4:
        return None, 1
    shadow = traced.shadow
    copies = 1
    for size in shadow.shape[:-3]:
        copies *= int(size)
    if any(size != 1 and stride != 0 for size, stride in zip(shadow.shape[:-3], shadow.stride()[:-3], strict=True)):
        return None, 1
    if tuple(flat.shape) != (copies * shadow.shape[-3], *shadow.shape[-2:]):
        return None, 1
    while shadow.dim() > 3:
        shadow = shadow[0]
    return Traced(traced.source, shadow.mT if turned else shadow), copies


def _copied(node: Node) -> Node:
    while node.target in SAME_ELEMENTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _gathered(node: Node) -> tuple[Node, Node] | None:
    """(table, integers) where `node` gathers along the first dimension of the table."""
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        index, rest = indices[0], indices[1:]
        if any(other is not None for other in rest):
            return None
    elif node.target is aten.index_select.default and node.args[1] == 0:
        index = node.args[2]
    else:
        return None
    val = value(index)
    if val is None or val.dim() != 1 or val.dtype not in (torch.int32, torch.int64) or not isinstance(node.args[0], Node):
        return None
    return node.args[0], index


def _gathered_operand(traced: Traced, table: Node, index: Node) -> StackOperand | None:
    inner, chosen = stack_operand(table), value(traced.source)
    if inner is None or inner.index is not None or inner.copies != 1 or chosen is None or chosen.dim() != 3:
        return None
    shape = int(chosen.shape[1]), int(chosen.shape[2])
    shown = _same_of_each(traced.shadow, shape, traced.source)
    if shown is None or shown[1] != (0, shape[0], 0, shape[1]):
        return None
    return StackOperand(inner.source, inner.layout, inner.transposed != shown[0], inner.region, index)


# --- batched products --------------------------------------------------------------------------------------------


def fuse_batched_product(graph: Graph, node: Node) -> tuple[Node, str] | None:
    """Replace `node`, a `bmm` or `baddbmm`, if one side is a stack; (the weight, operator's name)."""
    bias_at, left_at, right_at = PRODUCTS[node.target]
    for weight_at, other_at in ((right_at, left_at), (left_at, right_at)):
        operand, other, out = node.args[weight_at], node.args[other_at], value(node)
        x = value(other)
        if not isinstance(operand, Node) or not isinstance(other, Node) or x is None or out is None:
            continue
        stack = stack_operand(operand)
        if stack is None or x.dtype != out.dtype or not x.dtype.is_floating_point:
            continue
        on_left = weight_at == left_at
        with graph.inserting_before(node):
            rows = emit_transpose(graph, other) if on_left else other
            new, name = _emit_product(graph, rows, stack, stack.transposed != on_left, node)
            new = emit_transpose(graph, new) if on_left else new
            if bias_at is not None:
                new = add_bias(graph, node, node.args[bias_at], new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return stack.source, name
    return None


def _emit_product(graph: Graph, x: Node, stack: StackOperand, transposed: bool, like: Node) -> tuple[Node, str]:
    """x [batch, M, ·] times the stack; right of x `grouped_linear` wants transposed matrices."""
    target = ops.grouped_linear.default if transposed else ops.grouped_linear_t.default
    base, delta, _ = stack.source.args
    key = stack.layout.part_of_each(stack.region).key
    if stack.copies > 1:
        x = _stack_first(graph, x, stack.copies, stack.layout.stack)
    new = emit(graph, target, x, None, stack.index, base, delta, key)
    _describe_like(new, like)
    if stack.copies > 1:
        new = _copies_first(graph, new, stack)
    return new, "linear" if transposed else "linear_t"


def _describe_like(new: Node, old: Node) -> None:
    """Where `new` comes from, as `old` says it, without what `old` knew of its own arguments and result."""
    own = ("val", "tensor_meta", "eager_input_vals")
    new.meta.update({key: value for key, value in old.meta.items() if key not in own})


def _stack_first(graph: Graph, x: Node, copies: int, size: int) -> Node:
    """[copies · E, M, K] -> [E, copies · M, K] with E = `size`"""
    _, rows, columns = value(x).shape  # type: ignore[union-attr]
    x = emit(graph, aten.reshape.default, x, [copies, size, rows, columns])
    x = emit(graph, aten.permute.default, x, [1, 0, 2, 3])
    return emit(graph, aten.reshape.default, x, [size, copies * rows, columns])


def _copies_first(graph: Graph, y: Node, stack: StackOperand) -> Node:
    """[E, copies · M, N] -> [copies · E, M, N]"""
    size, rows, columns = value(y).shape  # type: ignore[union-attr]
    y = emit(graph, aten.reshape.default, y, [size, stack.copies, rows // stack.copies, columns])
    y = emit(graph, aten.permute.default, y, [1, 0, 2, 3])
    return emit(graph, aten.reshape.default, y, [stack.copies * size, rows // stack.copies, columns])


# --- grouped products --------------------------------------------------------------------------------------------


def fallback_operator(name: str) -> Any:
    """An operator of transformers that stands for `_grouped_mm`; None unless transformers has registered it."""
    packet = getattr(torch.ops.transformers, name, None)
    return None if packet is None else packet.default


def grouped_targets() -> list[Any]:
    """The operators that multiply sorted rows by a stack."""
    fallback = fallback_operator("grouped_mm_fallback")
    return [aten._grouped_mm.default, *([] if fallback is None else [fallback])]


def grouped_backward_targets() -> list[Any]:
    """The operators that compute both gradients of such a product."""
    fallback = fallback_operator("grouped_mm_fallback_backward")
    return [] if fallback is None else [fallback]


def fuse_grouped_product(graph: Graph, node: Node) -> tuple[Node, str] | None:
    """Replace `node`, one of `grouped_targets`, if its second operand is a stack; (the weight, operator's name)."""
    x, weight, offs, *rest = (*node.args, *node.kwargs.values())
    out = value(node)
    if not all(isinstance(each, Node) for each in (x, weight, offs)) or any(each is not None for each in rest) or out is None:
        return None
    found = _grouped(graph, node, x, weight, offs, forward=True)  # type: ignore[arg-type]
    if found is None:
        return None
    new, source, name = found
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return source, name


def fuse_grouped_backward(graph: Graph, node: Node) -> tuple[Node, str] | None:
    """Replace the grad-input of `node`, one of `grouped_backward_targets`; its gradient of the stack is rewrite 2."""
    x, weight, offs, dy = node.args
    inputs = [user for user in node.users if is_getitem(user) and user.args[1] == 0 and user.users]
    if not inputs or not all(isinstance(each, Node) for each in (x, weight, offs, dy)):
        return None
    found = _grouped(graph, inputs[0], dy, weight, offs, forward=False)  # type: ignore[arg-type]
    if found is None:
        return None
    new, source, name = found
    for item in inputs:
        item.replace_all_uses_with(new)
        graph.erase_node(item)
    return source, name


def _grouped(graph: Graph, at: Node, x: Node, weight: Node, offs: Node, forward: bool) -> tuple[Node, Node, str] | None:
    rows, stack = value(x), stack_operand(weight)
    if stack is None or stack.index is not None or stack.copies != 1 or rows is None or rows.dim() != 2:
        return None
    transposed = stack.transposed == forward
    target = ops.grouped_linear.default if transposed else ops.grouped_linear_t.default
    base, delta, _ = stack.source.args
    with graph.inserting_before(at):
        new = emit(graph, target, x, offs, None, base, delta, stack.layout.part_of_each(stack.region).key)
    _describe_like(new, at)
    return new, stack.source, "linear" if transposed else "linear_t"


# --- gradients ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StackProduct:
    """`region` of each matrix's gradient gains scale · leftᵀ right, or its transpose if `turned`, over the rows it met."""

    left: Node
    right: Node
    turned: bool
    scale: float
    region: Region
    offs: Node | None = None
    index: Node | None = None

    def gradients(self, graph: Graph, delta: Any, layout: Layout) -> Node:
        """The gradients of the delta's parameters."""
        dy, x = (self.right, self.left) if self.turned else (self.left, self.right)
        if self.scale != 1:
            dy = emit(graph, aten.mul.Tensor, dy, self.scale)
        key = layout.part_of_each(self.region).key
        return emit(graph, ops.grouped_linear_grads.default, dy, x, self.offs, self.index, delta, key)


def stack_product(node: Node, turned: bool, scale: float, region: Region) -> StackProduct | None:
    """`node` [E, a, b], a gradient of all matrices, as the product that it is; None if it is none."""
    with node.graph.inserting_before(node):
        if node.target is aten.bmm.default:
            left, right = node.args
            return StackProduct(emit_transpose(node.graph, left), right, turned, scale, region)  # type: ignore[arg-type]
        if node.target is aten._grouped_mm.default:
            left, right, offs, *rest = (*node.args, *node.kwargs.values())
            val = value(left)
            if val is None or val.dim() != 2 or any(each is not None for each in rest):
                return None
            return StackProduct(emit_transpose(node.graph, left), right, turned, scale, region, offs)  # type: ignore[arg-type]
        if is_getitem(node) and node.args[1] == 1:
            both: Any = node.args[0]
            if both.target not in grouped_backward_targets():
                return None
            x, _, offs, dy = both.args
            return StackProduct(x, dy, turned, scale, region, offs)
        if node.target is aten.index_put.default:
            return _scattered_product(node, turned, scale, region)
        if node.target is aten.sum.dim_IntList:
            return _broadcast_product(node, turned, scale, region)
    return None


def _scattered_product(node: Node, turned: bool, scale: float, region: Region) -> StackProduct | None:
    """index_put(zeros, [i], left right, accumulate): the gradient of gathering matrices for every row."""
    into, indices, piece, *accumulate = node.args
    known = isinstance(indices, (list, tuple)) and len(indices) == 1 and isinstance(piece, Node)
    if not known or accumulate != [True] or not zeros(into):
        return None
    traced = trace(piece, batch=_ANY)  # type: ignore[arg-type]
    val = None if traced is None else value(traced.source)
    if traced is None or val is None or val.dim() != 3:
        return None
    shape = int(val.shape[1]), int(val.shape[2])
    shown = _same_of_each(traced.shadow, shape, traced.source)
    factors = _batched_factors(traced.source)
    if shown is None or shown[1] != (0, shape[0], 0, shape[1]) or factors is None:
        return None
    return StackProduct(*factors, turned != shown[0], scale, region, index=indices[0])  # type: ignore[index, arg-type]


def _batched_factors(node: Node) -> tuple[Node, Node] | None:
    """(left [S, M, a], right [S, M, b]) of a batch of products leftᵀ right, which for M = 1 are broadcast multiplications."""
    left, right = node.args[:2]
    if node.target is aten.bmm.default:
        return emit_transpose(node.graph, left), right  # type: ignore[arg-type, return-value]
    if node.target is not aten.mul.Tensor:
        return None
    column, row, out = value(left), value(right), value(node)
    if column is None or row is None or out is None:
        return None
    batch, rows, columns = out.shape
    if tuple(row.shape) == (batch, rows, 1) and tuple(column.shape) == (batch, 1, columns):
        left, right, column, row = right, left, row, column
    if tuple(column.shape) != (batch, rows, 1) or tuple(row.shape) != (batch, 1, columns):
        return None
    return emit_transpose(node.graph, left), right  # type: ignore[arg-type, return-value]


def _broadcast_product(node: Node, turned: bool, scale: float, region: Region) -> StackProduct | None:
    """sum(bmm(left, right).view(copies, E, a, b), 0): the gradient of a stack that was repeated in a batch."""
    inner, dims = node.args[0], node.args[1]
    wide, out = value(inner), value(node)
    if not isinstance(inner, Node) or dims != [0] or wide is None or wide.dim() != 4 or out is None:
        return None
    if not isinstance(wide.shape[0], int):
        return None
    product = inner
    while (is_view(product) or product.target in SAME_ELEMENTS) and isinstance(product.args[0], Node):
        product = product.args[0]
    flat = value(product)
    copies, size = int(wide.shape[0]), int(wide.shape[1])
    if product.target is not aten.bmm.default or flat is None or tuple(flat.shape) != (copies * size, *wide.shape[2:]):
        return None
    left, right = product.args
    left = _stack_first(node.graph, emit_transpose(node.graph, left), copies, size)  # type: ignore[arg-type]
    right = _stack_first(node.graph, right, copies, size)  # type: ignore[arg-type]
    return StackProduct(left, right, turned, scale, region)


def zeros(node: object) -> bool:
    """Whether `node` makes a tensor of zeros."""
    if not isinstance(node, Node):
        return False
    made = node.target in (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
    return made or bool(node.target is aten.full.default and node.args[1] == 0)
