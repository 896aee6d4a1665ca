"""Are two SQL texts the same query? By their normalised text, and by what they answer in sqlite on made-up rows."""

from __future__ import annotations

import random
import re
import sqlite3
from collections.abc import Sequence

_CREATE = re.compile(r"CREATE TABLE\s+(\S+)\s*\(([^)]*)\)", re.IGNORECASE)
_LITERAL = re.compile(r"'([^']*)'|\"([^\"]*)\"|\b(\d+(?:\.\d+)?)\b")
ROWS, TABLES_TRIED = 12, 4


def normalise(query: str) -> str:
    """Lower case, one kind of quotes, single spaces, no space around punctuation, no final semicolon."""
    text = query.strip().rstrip(";").replace('"', "'").lower()
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"\s*([(),=<>!]+)\s*", r"\1", text).strip()


def same_answers(schema: str, expected: str, found: str) -> bool | None:
    """Whether both queries answer alike on several made-up contents of the tables in `schema`.

    None if the expected query does not run on that schema, or answers nothing on any content: equal answers then mean nothing.
    Upper and lower case are the same, as in `normalise`: such data write names now in one way, now in the other.
    """
    expected, found = expected.lower(), found.lower()
    informative = False
    for seed in range(TABLES_TRIED):
        rows = _answers(schema, expected, seed, expected)
        if rows is None:
            return None
        other = _answers(schema, found, seed, expected)
        if other is None or sorted(map(repr, rows)) != sorted(map(repr, other)):
            return False
        informative |= any(value not in (None, 0) for row in rows for value in row)
    return True if informative else None


def _answers(schema: str, query: str, seed: int, literals_of: str) -> Sequence[tuple[object, ...]] | None:
    """The rows that `query` gives on tables filled with values that occur in `literals_of`, and others."""
    pick = random.Random(seed)
    pool: list[object] = [next(filter(None, match.groups()), "") for match in _LITERAL.finditer(literals_of)]
    connection = sqlite3.connect(":memory:")
    try:
        for name, body in _CREATE.findall(schema):
            columns = [column.split() for column in body.split(",") if column.strip()]
            connection.execute(f"CREATE TABLE {name} ({body})")
            marks = ",".join("?" * len(columns))
            for _ in range(ROWS):
                values = [_value(column[1] if len(column) > 1 else "", pool, pick) for column in columns]
                connection.execute(f"INSERT INTO {name} VALUES ({marks})", values)
        return connection.execute(query).fetchmany(1000)
    except sqlite3.Error:
        return None
    finally:
        connection.close()


def _value(kind: str, pool: Sequence[object], pick: random.Random) -> object:
    # Values that the query asks for must occur often enough to be found, others to be left out.
    if pool and pick.random() < 0.6:
        return pick.choice(pool)
    return pick.randint(0, 9) if kind.upper().startswith(("INT", "REAL", "NUM", "FLOAT")) else pick.choice("abcd")
