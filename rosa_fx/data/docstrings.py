"""The demo's data: functions of Python's standard library and the first line of their docstrings.

Real text that every Python installation has: nothing is downloaded. The docstring is cut out of the source shown.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rosa_fx.data.jsonl import Message, Row
from rosa_fx.errors import RosaError

# Third-party packages, tests and generated tables are not what "the standard library" means here.
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "encodings",
}
_HELD_OUT_SHARE = 0.2
_ASK = "Write the one-line docstring of this Python function.\n\n"


@dataclass(frozen=True)
class Function:
    """A function: dotted module name, dedented source without the docstring, the docstring's first line."""

    module: str
    source: str
    docstring: str


def messages_for(source: str) -> list[Message]:
    """The chat that asks for the docstring of `source`. Its system message keeps templates from adding a longer one."""
    return [{"role": "system", "content": "You document Python."}, {"role": "user", "content": _ASK + source}]


def docstring_rows(max_characters: int = 400, stdlib: str | Path | None = None) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of chat messages, in a fixed order; a module is wholly in one or the other.

    Which side a module is on depends on a hash of its top-level package's name only, so that it is the same everywhere.
    `max_characters` bounds the source shown. Raises RosaError if the standard library's sources are not installed.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    seen: set[str] = set()
    for function in stdlib_functions(max_characters, stdlib):
        if function.source in seen:  # copies between modules would leak from one side to the other
            continue
        seen.add(function.source)
        answer = {"role": "assistant", "content": function.docstring}
        row = Row(f"module {function.module}", messages=(*messages_for(function.source), answer))
        (held_out if is_held_out(function.module) else train).append(row)
    if not train or not held_out:
        raise RosaError("the sources of Python's standard library were not found: the demo needs its .py files")
    return train, held_out


def is_held_out(module: str) -> bool:
    """Whether the module's functions are held out: a fifth of the top-level packages are."""
    digest = hashlib.sha256(module.partition(".")[0].encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELD_OUT_SHARE * 2**32


def stdlib_functions(max_characters: int, stdlib: str | Path | None = None) -> Iterator[Function]:
    """Functions with a docstring whose first line stands by itself, in order of module and line."""
    root = Path(stdlib or sysconfig.get_paths()["stdlib"])
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED and not f.startswith("config-"))
        for name in sorted(files):
            if not name.endswith(".py"):
                continue
            path = Path(folder, name)
            try:
                text = path.read_text(encoding="utf-8")
                tree = ast.parse(text)
            except (OSError, ValueError, SyntaxError):  # a few of the library's files are broken on purpose
                continue
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            lines = text.splitlines(keepends=True)
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    function = _function(node, lines, module, max_characters)
                    if function is not None:
                        yield function


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], module: str, max_characters: int
) -> Function | None:
    """The function without its docstring, or None if it is too long, has no body besides, or no usable first line."""
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2:
        return None
    first, _, rest = docstring.partition("\n")
    first = first.strip()
    whole = not rest.strip() or rest.startswith("\n") or first.endswith(".")
    if not whole or not 12 <= len(first) <= 90 or not first[0].isupper():
        return None
    statement = node.body[0]
    # Cut whole lines only; a docstring that shares a line with code is rare and not worth the column arithmetic.
    if node.lineno >= statement.lineno or (statement.end_lineno or 0) >= node.body[1].lineno:
        return None
    kept = lines[node.lineno - 1 : statement.lineno - 1] + lines[statement.end_lineno : node.end_lineno]
    indent = " " * node.col_offset
    source = "".join(line.removeprefix(indent) for line in kept if line.strip()).rstrip()
    if len(source) > max_characters:
        return None
    return Function(module, source, first)
