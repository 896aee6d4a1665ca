"""Rewrite 3: thin products of the low-rank parts are computed once, and those of one input in one product.

    linear_q(x), linear_k(x), linear_v(x)  -> U = x [A_q; A_k; A_v]ᵀ, and each takes its columns of U
    linear(x), linear_grads(dy, x)         -> the gradient of B, s dyᵀ U, takes the U of the forward pass
    linear_t(dy), linear_grads(dy, x)      -> one V = dy (s B) for grad-input and for the gradient of A, Vᵀ x
    linear_grads_q(.., x), .._k, .._v      -> [V_q, V_k, V_v]ᵀ x, and each takes its rows

Weights stored [in, out] have the roles of A and B exchanged; the rule is the same. Gradients become plain products, which
Inductor sees, or on the CPU in float32 those of `kernels/thin_ops.py`; what else a layer collects stays in its `linear_grads`,
and what nobody asks for is dropped.

Kept for the backward pass: U [M, R] for each layer, R / K of the size of x.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

import rosa_fx.kernels.thin_ops  # noqa: F401  (registers the operators)
from rosa_fx.kernels.layout import Layout
from rosa_fx.kernels.terms.low_rank import LowRank
from rosa_fx.kernels.terms.low_rank_given import LowRankGiven
from rosa_fx.passes.fuse_linear import emit
from rosa_fx.passes.order import dependents, hoist
from rosa_fx.passes.rows import row_count, rows_identity
from rosa_fx.passes.views import is_getitem, value

aten = torch.ops.aten
ops = torch.ops.rosa_fx
convert = torch.ops.prims.convert_element_type.default

# Elements of the activations from which on a product outweighs the call of an operator that Python implements.
_OWN_ELEMENTS = 1 << 17


def stacking_pays(rows: int, ranks: Sequence[int]) -> bool:
    """Whether one product of x [M, K] with stacked matrices beats one with each.

    In elements of memory over K: n times x [M, K] and each [R, K] once, against x once and all [R, K] three times, since they
    are copied into one. With few rows the copy costs more than reading x again.
    """
    return (len(ranks) - 1) * rows > 2 * sum(ranks)


@dataclass(frozen=True)
class Factor:
    """A thin matrix that the input of several layers is multiplied by: Aᵀ [K, R], or s B [N, R] if `scale` is given.

    `span` is the part of its long side that belongs to a region of the weight.
    """

    matrix: Node
    scale: float | None
    span: tuple[int, int]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        shape = value(self.matrix).shape  # type: ignore[union-attr]
        return int(shape[0 if self.scale is None else 1])

    def emit(self, graph: Graph) -> Node:
        """As rows, [R, K] or [R, N]."""
        dim = 1 if self.scale is None else 0
        node = self.matrix
        if self.span != (0, int(value(node).shape[dim])):  # type: ignore[union-attr]
            node = emit(graph, aten.slice.Tensor, node, dim, *self.span)
        if self.scale is None:
            return _cast(graph, node, self.dtype)
        return emit(graph, aten.permute.default, _scaled(graph, node, self.scale, self.dtype), [1, 0])


@dataclass(frozen=True)
class Layer:
    """An operator on a layout with one low-rank term, whose A stands at position `at` of `delta`."""

    node: Node
    delta: Sequence[Node]
    layout: Layout
    at: int
    scale: float

    @property
    def region(self) -> tuple[int, int, int, int]:
        return self.layout.region or (0, self.layout.shape[0], 0, self.layout.shape[1])

    def side_a(self, dtype: torch.dtype) -> Factor:
        return Factor(self.delta[self.at], None, self.region[2:], dtype)

    def side_b(self, dtype: torch.dtype) -> Factor:
        return Factor(self.delta[self.at + 1], self.scale, self.region[:2], dtype)

    def wanted(self) -> dict[int, list[Node]]:
        """Gradients that are used, by their position in `delta`: the `getitem` nodes."""
        found: dict[int, list[Node]] = defaultdict(list)
        for item in self.node.users:
            assert is_getitem(item)
            if item.users:
                found[self.layout.trainable[item.args[1]]].append(item)  # type: ignore[index]
        return found

    def products(self) -> Iterator[tuple[Node, Factor]]:
        """The thin products that the operator computes: (input, factor)."""
        first: Any = self.node.args[0]
        dtype = value(first).dtype  # type: ignore[union-attr]
        if self.node.target is ops.linear.default:
            yield first, self.side_a(dtype)
        elif self.node.target is ops.linear_t.default:
            yield first, self.side_b(dtype)
        else:
            wanted = self.wanted()
            second: Any = self.node.args[1]
            if self.at + 1 in wanted:
                yield second, self.side_a(dtype)
            if self.at in wanted:
                yield first, self.side_b(dtype)


@dataclass
class Shared:
    """What was shared: stacked products, thin products with several users, stacked gradients.

    `deltas`: of each `linear` and `linear_t` that takes such a product, the tensors that it had before.
    """

    stacked: int = 0
    reused: int = 0
    gradients: int = 0
    deltas: list[tuple[Node, ...]] = field(default_factory=list)


def share_inputs(graph: Graph) -> Shared:
    """Rewrite `graph` in place."""
    shared = Shared()
    layers = [layer for node in graph.nodes for layer in _layers(node)]
    made = _thin_products(graph, layers, shared)
    gradients: dict[Any, list[Gradient]] = defaultdict(list)
    for layer in layers:
        products = [made.get((rows_identity(source), factor)) for source, factor in layer.products()]
        if layer.node.target is ops.linear_grads.default:
            # Without products neither A's nor B's gradient is asked for: they go.
            if not products or any(product is not None for product in products):
                for gradient in _take_apart(graph, layer, made):
                    gradients[gradient.of_a, rows_identity(gradient.right)].append(gradient)
        elif products[0] is not None:
            _give(layer, products[0])
            shared.deltas.append(tuple(layer.delta))
    for group in gradients.values():
        shared.gradients += _emit_gradients(graph, group)
    return shared


def _layers(node: Node) -> Iterator[Layer]:
    if node.target in (ops.linear.default, ops.linear_t.default):
        delta, key = node.args[3:]
        operands = node.args[:1]
    elif node.target is ops.linear_grads.default:
        delta, key = node.args[2:]
        operands = node.args[:2]
    else:
        return
    layout = Layout.parse(str(key))
    if layout.stack > 1:
        return  # a low-rank part for each matrix
    tensors: list[Any] = list(delta)  # type: ignore[arg-type]
    found = [(item, own[0]) for item, own in layout.split(tensors) if type(item) is LowRank]
    if len(found) != 1 or len({value(operand).dtype for operand in operands}) != 1:  # type: ignore[union-attr]
        return
    item, matrix = found[0]
    if value(matrix).numel():  # type: ignore[union-attr]
        yield Layer(node, tensors, layout, tensors.index(matrix), item.scale)


# --- thin products -----------------------------------------------------------------------------------------------


def _thin_products(graph: Graph, layers: list[Layer], shared: Shared) -> dict[tuple[Any, Factor], Node]:
    """The products [M, R] to be computed once, by identity of the input and by factor."""
    users: dict[tuple[Any, Factor], list[tuple[Node, Node]]] = defaultdict(list)
    by_source: dict[Any, list[Factor]] = defaultdict(list)
    for layer in layers:
        for source, factor in layer.products():
            identity = rows_identity(source)
            users[identity, factor].append((layer.node, source))
            if factor not in by_source[identity]:
                by_source[identity].append(factor)
    made: dict[tuple[Any, Factor], Node] = {}
    for identity, factors in by_source.items():
        user, source = min(users[identity, factor][0] for factor in factors)
        together = factors if stacking_pays(row_count(source), [factor.rank for factor in factors]) else []
        together = [factor for factor in together if hoist([factor.matrix], user)]
        if stacking_pays(row_count(source), [factor.rank for factor in together]):
            with graph.inserting_before(user):
                rows = emit(graph, aten.cat.default, [factor.emit(graph) for factor in together])
                stack = _thin(graph, source, rows, user)
                start = 0
                for factor in together:
                    made[identity, factor] = emit(graph, aten.slice.Tensor, stack, 1, start, start + factor.rank)
                    start += factor.rank
            shared.stacked += 1
        for factor in factors:
            if (identity, factor) not in made and len(users[identity, factor]) > 1:
                user, source = users[identity, factor][0]
                with graph.inserting_before(user):
                    made[identity, factor] = _thin(graph, source, factor.emit(graph), user)
            shared.reused += len(users[identity, factor]) > 1
    return made


def _thin(graph: Graph, source: Node, rows: Node, user: Node) -> Node:
    """source rowsᵀ [M, R]."""
    flat = _flat(graph, source)
    if _by_own_kernels(flat):
        node = emit(graph, ops.thin_product.default, flat, rows)
    else:
        node = emit(graph, aten.mm.default, flat, emit(graph, aten.permute.default, rows, [1, 0]))
    # Marks of checkpointing, above all: it is computed again where its user is.
    node.meta.update({k: v for k, v in user.meta.items() if k not in ("val", "tensor_meta")})
    return node


def _give(layer: Layer, product: Node) -> None:
    terms = tuple(LowRankGiven(layer.scale) if type(item) is LowRank else item for item in layer.layout.terms)
    after = layer.at + 2
    delta = [*layer.delta[:after], product, *layer.delta[after:]]
    layer.node.args = (*layer.node.args[:3], delta, replace(layer.layout, terms=terms).key)


def _flat(graph: Graph, node: Node) -> Node:
    val = value(node)
    assert val is not None
    return node if val.dim() == 2 else emit(graph, aten.reshape.default, node, [-1, int(val.shape[-1])])


# --- gradients ---------------------------------------------------------------------------------------------------


@dataclass
class Gradient:
    """thinᵀ right, the gradient of A [R, K], or its transpose scaled, that of B [N, R]; it replaces `items`."""

    layer: Layer
    of_a: bool
    thin: Node
    right: Node
    items: list[Node]

    @property
    def rank(self) -> int:
        return int(value(self.thin).shape[1])  # type: ignore[union-attr]

    def finish(self, graph: Graph, node: Node) -> None:
        """Scale, pad to the whole matrix, round to the parameter's dtype, and take the place of `items`."""
        parameter = self.layer.delta[self.layer.at + (0 if self.of_a else 1)]
        val = value(parameter)
        assert val is not None
        node = _cast(graph, node, val.dtype) if self.of_a else _scaled(graph, node, self.layer.scale, val.dtype)
        start, stop = self.layer.region[2:] if self.of_a else self.layer.region[:2]
        size = self.layer.layout.shape[1 if self.of_a else 0]
        if (start, stop) != (0, size):
            # The last dimension comes first.
            padding = [start, size - stop] if self.of_a else [0, 0, start, size - stop]
            node = emit(graph, aten.constant_pad_nd.default, node, padding)
        if node.target is aten.slice.Tensor:
            # Gradients of several parameters should not be parts of one buffer.
            node = emit(graph, aten.clone.default, node)
        for item in self.items:
            item.replace_all_uses_with(node)


def _take_apart(graph: Graph, layer: Layer, made: dict[tuple[Any, Factor], Node]) -> list[Gradient]:
    """The gradients of A and B of a `linear_grads` node. It keeps its other terms, as far as they are asked for."""
    dy, x = layer.node.args[:2]
    assert isinstance(dy, Node)
    assert isinstance(x, Node)
    wanted = layer.wanted()
    found: list[Gradient] = []
    with graph.inserting_before(layer.node):
        for source, factor in layer.products():
            name = rows_identity(source), factor
            if name not in made:
                made[name] = _thin(graph, source, factor.emit(graph), layer.node)
            of_a = factor.scale is not None
            right, position = (x, layer.at) if of_a else (dy, layer.at + 1)
            found.append(Gradient(layer, of_a, made[name], right, wanted[position]))
        _rest(graph, layer, wanted)
    return found


def _rest(graph: Graph, layer: Layer, wanted: dict[int, list[Node]]) -> None:
    """A `linear_grads` of the other terms with a gradient that is asked for."""
    others = range(layer.at, layer.at + 2)
    keep = [position in wanted and position not in others for position in range(len(layer.delta))]
    layout, positions = layer.layout.only(keep)
    if not positions:
        return
    delta = [layer.delta[position] for position in positions]
    node = emit(graph, ops.linear_grads.default, *layer.node.args[:2], delta, layout.key)
    for index, trainable in enumerate(layout.trainable):
        for old in wanted.get(positions[trainable], []):
            old.replace_all_uses_with(emit(graph, operator.getitem, node, index))


def _emit_gradients(graph: Graph, group: list[Gradient]) -> int:
    """Emit the gradients of one input, together where that pays; how many products of several that made."""
    group = sorted(group, key=lambda gradient: gradient.layer.node)
    last = group[-1].layer.node
    columns = int(value(group[0].right).shape[-1])  # type: ignore[union-attr]
    behind = [dependents(gradient.items, last) for gradient in group]
    together = [gradient for gradient, nodes in zip(group, behind, strict=True) if nodes is not None]
    stacked = stacking_pays(columns, [gradient.rank for gradient in together])
    if stacked:
        with graph.inserting_before(last):
            thin = emit(graph, aten.cat.default, [gradient.thin for gradient in together], 1)
            stack = _transposed_product(graph, thin, together[0])
            start = 0
            for gradient in together:
                dim = 0 if gradient.of_a else 1
                gradient.finish(graph, emit(graph, aten.slice.Tensor, stack, dim, start, start + gradient.rank))
                start += gradient.rank
        for node in sorted({node for nodes in behind for node in nodes or []}):
            last.prepend(node)
    for gradient in group:
        if not (stacked and gradient in together):
            with graph.inserting_before(gradient.layer.node):
                gradient.finish(graph, _transposed_product(graph, gradient.thin, gradient))
    return int(stacked)


def _transposed_product(graph: Graph, thin: Node, gradient: Gradient) -> Node:
    """thinᵀ right for A [R, K], rightᵀ thin for B [N, R]."""
    right = _flat(graph, gradient.right)
    if _by_own_kernels(right):
        return emit(graph, ops.thin_gradient.default, thin, right, not gradient.of_a)
    left, right = (thin, right) if gradient.of_a else (right, thin)
    return emit(graph, aten.mm.default, emit(graph, aten.permute.default, left, [1, 0]), right)


def _by_own_kernels(node: Node) -> bool:
    """Whether `kernels/thin_ops.py` has the faster product for activations [M, K] like that, not the vendor."""
    val = value(node)
    assert val is not None
    return val.device.type == "cpu" and val.dtype == torch.float32 and row_count(node) * int(val.shape[-1]) >= _OWN_ELEMENTS


def _cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    return node if value(node).dtype == dtype else emit(graph, convert, node, dtype)  # type: ignore[union-attr]


def _scaled(graph: Graph, node: Node, scale: float, dtype: torch.dtype) -> Node:
    """scale · node, rounded to `dtype` once."""
    wide = torch.promote_types(torch.promote_types(value(node).dtype, dtype), torch.float32)  # type: ignore[union-attr]
    return _cast(graph, emit(graph, aten.mul.Tensor, _cast(graph, node, wide), scale), dtype)
