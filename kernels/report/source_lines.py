"""Which lines of a kernel's source load through which of its pointers."""

from __future__ import annotations

import ast
from collections import defaultdict


def _root(node: ast.AST, origins: dict[str, str]) -> str:
    """The argument that an address is computed from: the leftmost name, followed through assignments."""
    while True:
        if isinstance(node, ast.BinOp):
            node = node.left
        elif isinstance(node, ast.Call) and node.args:
            node = node.args[0]
        elif isinstance(node, (ast.Subscript, ast.Attribute)):
            node = node.value
        else:
            break
    return origins.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def load_lines(source: str) -> dict[str, set[int]]:
    """Lines of every `tl.load`, by the name of the kernel argument whose memory it reads (without Inductor's `arg_`)."""
    tree = ast.parse(source)
    origins: dict[str, str] = {}
    found: dict[str, set[int]] = defaultdict(set)
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    for node in sorted(assignments, key=lambda item: item.lineno):
        for target in node.targets:
            # A pointer that moves on (`p = p + n`) keeps its first origin.
            if isinstance(target, ast.Name) and isinstance(node.value, (ast.Name, ast.BinOp)):
                origins.setdefault(target.id, _root(node.value, origins))
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "load" and call.args:
            name = _root(call.args[0], origins).removeprefix("arg_")
            found[name] |= set(range(call.lineno, (call.end_lineno or call.lineno) + 1))
    return dict(found)


def entry_lines(source: str) -> set[int]:
    """Lines that read what belongs to single entries of a sparse part: they assign to names that begin with "entry"."""
    assignments = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign))
    found = [node for node in assignments if isinstance(node.targets[0], ast.Name) and node.targets[0].id.startswith("entry")]
    return {line for node in found for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
