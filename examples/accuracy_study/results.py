"""Results of a study as one JSONL file: a row per finished run, so that an interrupted study goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """Rows by their key, the settings that say which run it was. A row is on the disk before the next run begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = list(_read(path)) if path.exists() else []
        self._done = {_identity(row["key"]) for row in self.rows}

    def missing(self, keys: Iterable[Row]) -> list[Row]:
        """The keys that have no row yet, in order."""
        return [key for key in keys if _identity(key) not in self._done]

    def add(self, key: Row, values: Row) -> None:
        row = {"key": key, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self._done.add(_identity(key))


def _identity(key: Row) -> str:
    return json.dumps(key, sort_keys=True)


def _read(path: Path) -> Iterator[Row]:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            # Only the last line can be half a row: the run that wrote it was cut off, and is done again.
            if number < len(lines):
                raise SystemExit(f"{path}, line {number}: {error}; remove that line to run it again") from None
            path.write_text("".join(kept + "\n" for kept in lines[:-1]))
