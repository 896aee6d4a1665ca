"""Rows of training data, and how they are read from a JSONL file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rosa_fx.errors import RosaError

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One training example: either `messages`, or `prompt` and `completion`. `where` names its origin in errors."""

    where: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""


def read_jsonl(path: str | Path) -> list[Row]:
    """Read rows of `{"messages": [{"role", "content"}, ...]}` or `{"prompt", "completion"}`; blank lines are skipped.

    Other keys of a row are ignored. Raises RosaError with file and line number for text that is not UTF-8, malformed
    JSON, a missing key, a value of the wrong type, a conversation without an assistant's turn; and for an empty file.
    """
    path = Path(path)
    if path.is_dir():
        raise RosaError(f"data {str(path)!r} is a directory: name a JSONL file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RosaError(f"data {str(path)!r} cannot be read: {error.strerror or error}") from error
    rows = []
    # Split at newlines only: str.splitlines would also cut at separators that JSON allows inside a string.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RosaError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}): convert the file") from error
        except (ValueError, RecursionError) as error:
            raise RosaError(f"{where}: not valid JSON: {error}") from error
        rows.append(parse_row(value, where))
    if not rows:
        raise RosaError(f"data {str(path)!r} has no rows: write one JSON object per line")
    return rows


def parse_row(value: Any, where: str) -> Row:
    """Check one decoded row. Raises RosaError that begins with `where`."""
    if not isinstance(value, dict):
        raise RosaError(f"{where}: a row is a JSON object, this is {_kind(value)}")
    if "messages" in value:
        return Row(where, messages=_messages(value["messages"], where))
    if "prompt" in value or "completion" in value:
        texts = {}
        for key in ("prompt", "completion"):
            if key not in value:
                raise RosaError(f"{where}: the key {key!r} is missing beside {', '.join(map(repr, value))}")
            if not isinstance(value[key], str):
                raise RosaError(f"{where}: {key!r} is {_kind(value[key])}, a string is needed")
            texts[key] = value[key]
        return Row(where, **texts)
    keys = ", ".join(map(repr, value)) or "none"
    raise RosaError(f"{where}: neither 'messages' nor 'prompt' and 'completion' (its keys: {keys})")


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RosaError(f"{where}: 'messages' is {_kind(value)}, a list of {{'role', 'content'}} objects is needed")
    messages = []
    for position, message in enumerate(value):
        if not isinstance(message, dict):
            raise RosaError(f"{where}: messages[{position}] is {_kind(message)}, an object is needed")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _kind(message[key]) if key in message else "missing"
                raise RosaError(f"{where}: messages[{position}][{key!r}] is {found}, a string is needed")
        messages.append({"role": message["role"], "content": message["content"]})
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(sorted({message["role"] for message in messages}))
        raise RosaError(f"{where}: no message has the role 'assistant' (roles: {roles}), so there is nothing to learn")
    return tuple(messages)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")
