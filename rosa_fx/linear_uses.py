"""Which attributes a module class multiplies with, read from the source of the class.

A weight that a hand-written module holds as a bare ``nn.Parameter`` says nothing about its use, so the class's own
source is parsed (never executed). The reading is deliberately plain: what it does not recognise is simply not reported,
and a user names such a weight by pattern.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

# Calls whose operands are multiplied; in `addmm` and `baddbmm` the first of three operands is added instead.
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot"}
_PRODUCTS |= {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
_SUMS = {"addmm", "baddbmm"}
# The products that are tensor methods too: `self.w.mm(x)` is one, `self.linear(x)` is a call of a submodule.
_METHODS = {"matmul", "mm", "bmm"}
# Calls and attributes whose result is the same weight in another shape, order, dtype or piece.
_VIEWS = {"t", "transpose", "permute", "view", "reshape", "to", "contiguous", "float", "half", "bfloat16", "type_as"}
_VIEWS |= {
    "unsqueeze",
    "squeeze",
    "expand",
    "flatten",
    "unflatten",
    "narrow",
    "chunk",
    "split",
    "unbind",
    "tensor_split",
    "index_select",
}
_VIEW_ATTRIBUTES = {"T", "mT", "H", "mH", "data"}
_ITERATORS = {"zip", "enumerate", "reversed", "list", "tuple"}


@dataclass(frozen=True)
class Uses:
    """Dotted attribute paths below ``self`` (``"w"``, ``"proj.weight"``), by how the class uses them."""

    products: frozenset[str] = frozenset()  # an operand of a matrix product
    lookups: frozenset[str] = frozenset()  # indexed by something that is no slice or constant, or one of `tables`
    tables: frozenset[str] = frozenset()  # the table of an `embedding` call
    # How products read a weight with more than two dimensions: (path, leading dimensions that number matrices, or None for
    # all but the last two, dimensions that are rows). An `einsum` that reads it otherwise gives none.
    readings: frozenset[tuple[str, int | None, int]] = frozenset()

    def __or__(self, other: Uses) -> Uses:
        return Uses(*(getattr(self, field.name) | getattr(other, field.name) for field in fields(Uses)))


def attribute_uses(cls: type, attribute: str | None = None) -> Uses:
    """How the methods of ``cls`` and of its bases outside ``torch`` use attributes of ``self``.

    A use is found directly or through local variables, views and casts (``.T``, ``.t()``, ``.transpose``, ``.view``,
    ``.to``, slices, ``chunk``, ...), in ``@`` or as an argument of ``linear``, ``matmul``, ``mm``, ``bmm``, ``addmm``,
    ``baddbmm``, ``einsum``, ``tensordot`` or ``grouped_mm``. A class without readable source contributes nothing. Code is
    not run.

    With ``attribute``, classes whose compiled methods never name it may be left out: reading source costs about a
    second for the large base classes that a Hugging Face model has.
    """
    found = Uses()
    for each in cls.__mro__:
        if each is object or each.__module__.partition(".")[0] == "torch":
            continue
        if attribute is None or attribute in _names_in(each):
            found |= _own_uses(each)
    return found


@functools.lru_cache(maxsize=1024)
def _own_uses(cls: type) -> Uses:
    """The uses in the body of this one class."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return Uses()  # made at run time or in an interpreter without source
    reader = _Reader()
    for definition in tree.body:
        for method in definition.body if isinstance(definition, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef) and method.args.args:
                reader.method(method)
    lookups = reader.lookups | reader.tables
    return Uses(frozenset(reader.products), frozenset(lookups), frozenset(reader.tables), frozenset(reader.readings))


@functools.lru_cache(maxsize=1024)
def _names_in(cls: type) -> frozenset[str]:
    """Every global and attribute name in the compiled methods of this one class, decorated ones included."""
    names: set[str] = set()
    members = [value.fget if isinstance(value, property) else value for value in vars(cls).values()]
    pending: list[Any] = [inspect.unwrap(value) for value in members if callable(value)]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.CodeType):
            names.update(value.co_names)
            pending += [constant for constant in value.co_consts if isinstance(constant, types.CodeType)]
        elif isinstance(value, types.FunctionType):
            pending.append(value.__code__)
            # A decorator that hides what it wraps still holds it in a cell.
            cells = [cell for cell in value.__closure__ or () if cell != types.CellType()]
            pending += [cell.cell_contents for cell in cells]
    return frozenset(names)


def uses_linearly(modules: dict[str, nn.Module], names: Iterable[str]) -> bool:
    """True if a module multiplies with the parameter that has these names, and none looks rows up in it.

    ``modules``: every module by every name. Each ancestor of the parameter is asked for the path that leads to it from
    there, so ``x @ self.holder.w`` in a parent counts; an ``nn.ParameterList`` or ``ParameterDict`` that holds the
    parameter stands for its entries.
    """
    found = list(_uses_of(modules, names))
    if any(paths[0] in uses.lookups for uses, paths in found):
        return False
    return any(path in uses.products for uses, paths in found for path in paths)


def stack_reading(modules: dict[str, nn.Module], names: Iterable[str]) -> tuple[int | None, int] | None:
    """How the model multiplies with a parameter of more than two dimensions that has these names; None if it does not.

    (leading dimensions that number matrices, or None for all but the last two; dimensions that are rows of each). One that
    is indexed by a tensor may be a stack of experts; only an ``embedding`` call makes it a table. Where products differ, an
    ``einsum`` gives way to the others, and a stack to a matrix.
    """
    found = list(_uses_of(modules, names))
    if any(paths[0] in uses.tables for uses, paths in found):
        return None
    readings = {(stacked, rows) for uses, paths in found for path, stacked, rows in uses.readings if path in paths}
    return min(readings, key=lambda reading: (reading[0] is not None, reading[0] or 0, reading[1]), default=None)


def _uses_of(modules: dict[str, nn.Module], names: Iterable[str]) -> Iterator[tuple[Uses, tuple[str, ...]]]:
    """What each ancestor of a parameter says, and the paths by which it means it: its own first, then of its container."""
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            cls: Any = type(modules[".".join(parts[:depth])])
            path = ".".join(parts[depth:])
            held = isinstance(modules[".".join(parts[:-1])], nn.ParameterList | nn.ParameterDict)
            yield attribute_uses(cls, parts[depth]), (path, path.rpartition(".")[0]) if held else (path,)


def einsum_reading(equation: str, position: int) -> tuple[int, int] | None:
    """How ``einsum`` reads the operand at `position` if that is a stack of matrices which it multiplies with the others.

    (leading axes that number matrices, axes that are the rows of each). The operand's axes must be those of a batch first,
    then those that are summed over and those that only the result has, in either order. None for any other equation.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if position >= len(operands) or "." in operands[position]:
        return None
    axes = operands[position]
    others = set("".join(operands[:position] + operands[position + 1 :]))
    if not arrow:
        letters = left.replace(",", "")
        out = "".join(axis for axis in letters if letters.count(axis) == 1)
    # b: of the batch, s: summed over, f: free, x: summed over in this operand alone
    kinds = "".join({(1, 1): "b", (1, 0): "s", (0, 1): "f"}.get((axis in others, axis in out), "x") for axis in axes)
    match = re.fullmatch(r"(b*)(?:(s+)f+|(f+)s+)", kinds)
    return None if match is None else (len(match[1]), len(match[2] or match[3]))


class _Reader(ast.NodeVisitor):
    """Collects uses from methods, following local names in the order of the statements."""

    def __init__(self) -> None:
        self.products: set[str] = set()
        self.lookups: set[str] = set()
        self.tables: set[str] = set()
        self.readings: set[tuple[str, int | None, int]] = set()
        self._self = "self"
        self._locals: dict[str, set[str]] = {}
        self._branches = 0

    def method(self, node: ast.FunctionDef) -> None:
        self._self, self._locals, self._branches = node.args.args[0].arg, {}, 0
        for statement in node.body:
            self.visit(statement)

    def _paths(self, node: ast.expr | None) -> set[str]:
        """The attributes of which ``node`` is a view, a cast or a piece."""
        match node:
            case ast.Name():
                return self._locals.get(node.id, set())
            case ast.Attribute():
                if path := self._attribute(node):
                    return {path} | (self._paths(node.value) if node.attr in _VIEW_ATTRIBUTES else set())
                return self._paths(node.value) if node.attr in _VIEW_ATTRIBUTES else set()
            case ast.Subscript() | ast.Starred():
                return self._paths(node.value)
            case ast.NamedExpr():
                return self._paths(node.value)
            case ast.IfExp():
                return self._paths(node.body) | self._paths(node.orelse)
            case ast.List() | ast.Tuple():
                return set().union(*(self._paths(each) for each in node.elts))
            case ast.Call(func=ast.Attribute() as function) if function.attr in _VIEWS:
                # `w.transpose(0, 1)`, or the function `torch.transpose(w, 0, 1)`
                return self._paths(function.value) or (self._paths(node.args[0]) if node.args else set())
            case _:
                return set()

    def _attribute(self, node: ast.expr) -> str:
        """``self.a.b`` as ``"a.b"``; empty when the chain does not start at ``self``."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == self._self else ""

    def _bind(self, target: ast.expr, paths: set[str]) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            for each in target.elts:
                self._bind(each, paths)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, paths)
        elif isinstance(target, ast.Name):
            # In a branch or a loop the earlier meaning may still hold on another way through.
            self._locals[target.id] = paths | (self._locals.get(target.id, set()) if self._branches else set())

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            parts = node.value.elts if isinstance(node.value, ast.Tuple | ast.List) else []
            if isinstance(target, ast.Tuple) and len(target.elts) == len(parts):
                found = [self._paths(each) for each in parts]  # all of them before the first is bound, as in a swap
                for left, paths in zip(target.elts, found):
                    self._bind(left, paths)
            else:
                self._bind(target, self._paths(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
            self._bind(node.target, self._paths(node.value))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self._bind(node.target, self._paths(node.value))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        if isinstance(node.op, ast.MatMult):
            self._multiplied(self._paths(node.value))

    def _multiplied(self, paths: set[str]) -> None:
        self.products |= paths
        self.readings |= {(path, None, 1) for path in paths}

    def _einsum(self, equation: str, operands: Sequence[ast.expr]) -> None:
        for position, operand in enumerate(operands):
            paths, reading = self._paths(operand), einsum_reading(equation, position)
            self.products |= paths
            self.readings |= {(path, *reading) for path in paths} if reading is not None else set()

    def _branch(self, node: ast.AST) -> None:
        self._branches += 1
        self.generic_visit(node)
        self._branches -= 1

    def visit_If(self, node: ast.If) -> None:
        self._branch(node)

    def visit_While(self, node: ast.While) -> None:
        self._branch(node)

    def visit_Try(self, node: ast.Try) -> None:
        self._branch(node)

    def visit_For(self, node: ast.For) -> None:
        self._loop(node.target, node.iter)
        self._branch(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._loop(node.target, node.iter)
        self.generic_visit(node)

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp) -> None:
        for generator in node.generators:  # before the element, whose names they bind
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_GeneratorExp = visit_SetComp = visit_DictComp = _comprehension

    def _loop(self, target: ast.expr, iterated: ast.expr) -> None:
        if not (isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name) and iterated.func.id in _ITERATORS):
            self._bind(target, self._paths(iterated))
            return
        columns = [self._paths(each) for each in iterated.args]
        if iterated.func.id == "zip" and isinstance(target, ast.Tuple) and len(target.elts) == len(columns):
            for each, paths in zip(target.elts, columns):
                self._bind(each, paths)
        else:
            self._bind(target, set().union(*columns))

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):
            self._multiplied(self._paths(node.left) | self._paths(node.right))

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        arguments = list(node.args)
        arguments += [
            each.value for each in node.keywords if each.arg != "bias" and (each.arg, name in _SUMS) != ("input", True)
        ]
        if name in _PRODUCTS and not (name not in _METHODS and self._attribute(function)):
            if name in _METHODS and isinstance(function, ast.Attribute):
                arguments.append(function.value)
            elif name in _SUMS and len(node.args) >= 3:
                del arguments[0]
            match arguments:
                case [ast.Constant(value=str(equation)), *operands]:
                    self._einsum(equation, operands)
                case _:
                    self._multiplied(set().union(*(self._paths(each) for each in arguments)))
        elif name == "index_select":
            self.lookups |= self._paths(node)
        elif name in ("embedding", "embedding_bag"):
            self.tables |= set().union(*(self._paths(each) for each in arguments))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if not all(isinstance(each, ast.Slice | ast.Constant | ast.UnaryOp) for each in index):
            self.lookups |= self._paths(node.value)
