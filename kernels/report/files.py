"""Rows of the report in a file, with what they hold for: versions of the compilers and the text of the kernels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rosa_fx.errors import RosaError
from rosa_fx.kernels.inductor import hash_files
from rosa_fx.kernels.report import tools
from rosa_fx.kernels.report.rows import Row

_DERIVED = ("resident", "warpgroups", "in_flight", "latency_cover", "issue_over_bytes")
_KERNELS = Path(__file__).resolve().parent.parent


def _identity() -> dict[str, Any]:
    sources = sorted(str(file) for file in _KERNELS.rglob("*") if file.suffix in (".py", ".jinja"))
    return {"versions": tools.versions(), "sources": hash_files(sources).hex()}


def write(file: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON, with what follows from them (resident programs and warpgroups, programs in flight, cover) beside them."""
    data = [dataclasses.asdict(row) | {name: getattr(row, name) for name in _DERIVED} for row in rows]
    file.write_text(json.dumps({**_identity(), "rows": data}, indent=1) + "\n", encoding="utf-8")


def read(file: Path) -> list[Row]:
    """Rows that `write` wrote. Raises RosaError unless they are of these compilers and these kernels."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [{name: value for name, value in row.items() if name not in _DERIVED} for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RosaError(f"{file} holds no rows of the report ({error}); write it with --json") from error
    for name, now in _identity().items():
        if content.get(name) != now:
            raise RosaError(f"{file} is of other {name} than there are now; compile again with --json {file}")
    for row in rows:
        row["tile"] = tuple(row["tile"])
        row["traffic"] = tuple(row["traffic"]) if row["traffic"] else None
    return [Row(**row) for row in rows]
