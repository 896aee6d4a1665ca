"""Moving nodes within a graph: what a new node needs goes up before it, what depends on it goes down behind it.

Random operators keep their order among each other, so that a seed gives the same numbers as before.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx import Node


def hoist(needed: Iterable[Node], before: Node) -> bool:
    """Move `needed`, and what they depend on, up before `before`, as far as they are not there. False if that cannot be."""
    moved: set[Node] = set()
    pending = list(needed)
    while pending:
        node = pending.pop()
        if node < before or node in moved:
            continue
        if node is before or _opaque(node):
            return False
        moved.add(node)
        pending += node.all_input_nodes
    if any(_random(node) for node in moved) and _passes_random(before, moved):
        return False
    for node in sorted(moved):
        before.prepend(node)
    return True


def dependents(nodes: Iterable[Node], before: Node) -> list[Node] | None:
    """What depends on `nodes` and stands before `before`, in order; None if it may not be moved behind `before`."""
    found: set[Node] = set()
    pending = [user for node in nodes for user in node.users]
    while pending:
        node = pending.pop()
        if before < node or node in found:
            continue
        if node is before or _random(node) or _opaque(node):
            return None
        found.add(node)
        pending += node.users
    return sorted(found)


def _passes_random(start: Node, moved: set[Node]) -> bool:
    """Whether a random node that stays lies between `start` and the last of `moved`."""
    last, node = max(moved), start
    while node is not last:
        if node not in moved and (_random(node) or _opaque(node)):
            return True
        node = node.next
    return False


def _random(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _opaque(node: Node) -> bool:
    """Not known to be a function of its inputs alone: it may draw random numbers or have effects."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    # `getitem`, and what is computed with sizes.
    arithmetic = node.op == "call_function" and getattr(node.target, "__module__", None) == operator.getitem.__module__
    return not arithmetic and node.op not in ("placeholder", "get_attr")
