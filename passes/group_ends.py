"""Rewrite 4: the ends of groups are read by the host once for all products of rows with a stack, forward and backward.

    grouped_linear(x, offs), grouped_linear(y, offs), grouped_linear_grads(dy, x, offs)
        -> ends = offs on the CPU; grouped_linear(x, ends), grouped_linear(y, ends), grouped_linear_grads(dy, x, ends)

The operators go through the matrices one at a time and ask the host which rows meet each. On a device that is a wait for all
that was asked of it, and a layer has some six such products. The copy is kept for the backward pass: it is a few numbers.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

import rosa_fx.kernels.grouped_ops  # noqa: F401  (registers the operators)
from rosa_fx.passes.fuse_linear import emit
from rosa_fx.passes.views import value

ops = torch.ops.rosa_fx
_HOST = torch.device("cpu")

# target -> position of offs
_OFFS = {
    ops.grouped_linear.default: 1,
    ops.grouped_linear_t.default: 1,
    ops.grouped_linear_grads.default: 2,
}


def read_ends_once(graph: Graph) -> int:
    """Give the products that share ends of groups one copy of them on the host; how many such copies there are."""
    copies: dict[Node, Node] = {}
    for node in graph.nodes:  # in order: a copy stands before the first product that asks for it
        at = _OFFS.get(node.target) if node.op == "call_function" else None
        offs = None if at is None else node.args[at]
        if not isinstance(offs, Node):
            continue
        assert at is not None
        if _on_host(offs):
            continue
        if offs not in copies:
            with graph.inserting_before(node):
                copies[offs] = emit(graph, torch.ops.prims.device_put.default, offs, _HOST, False)
            # To make it again in the backward pass would be to wait again.
            copies[offs].meta["recompute"] = CheckpointPolicy.MUST_SAVE
        node.update_arg(at, copies[offs])
    return len(copies)


def _on_host(node: Node) -> bool:
    val = value(node)
    return val is None or val.device.type == "cpu"
