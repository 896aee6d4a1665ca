"""From rows to token ids with labels: the loss is on what the assistant says (or the completion), on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rosa_fx.data.jsonl import Message, Row
from rosa_fx.errors import RosaError

IGNORED = -100  # the label that PyTorch's and Hugging Face's cross entropy leave out
Span = tuple[int, int]


@dataclass(frozen=True)
class EncodedRow:
    """`input_ids` and `labels` of equal length; a label is the token itself where the loss is, else -100."""

    input_ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """Tokens that are predicted: the first one has nothing before it, so it never counts."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Encoded:
    """The rows that remain, and how many were cut to `max_length` or dropped (no target left within it, or too long)."""

    rows: list[EncodedRow]
    max_length: int
    truncated: int
    dropped: int
    why_dropped: str = "no target within"

    def describe(self) -> str:
        """One line: rows, tokens, targets, and what was cut or dropped."""
        tokens = sum(len(row.input_ids) for row in self.rows)
        text = f"{len(self.rows)} rows, {tokens:,} tokens, {sum(row.targets for row in self.rows):,} of them targets"
        if self.truncated:
            text += f"; {self.truncated} cut to {self.max_length} tokens"
        if self.dropped:
            text += f"; {self.dropped} dropped ({self.why_dropped} {self.max_length} tokens)"
        return text


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, max_length: int, long_rows: Literal["cut", "drop", "refuse"] = "cut"
) -> Encoded:
    """Tokenise rows; of those that exceed `max_length` tokens the end is cut off, or they are dropped, or refused.

    - `messages`: the tokenizer's chat template, applied to growing prefixes of the conversation; an assistant's turn
      runs from the generation prompt to its end-of-turn token, which is a target (what the template adds is not).
      Earlier turns that the template rewrites later on (thoughts it removes, for example) are context only.
    - `prompt`/`completion`: plain text, no template, one end-of-sequence token after it (a target).

    Raises RosaError if the tokenizer has no chat template but a row needs it, if the template rejects a row, if no row
    keeps a target, and for a row that is too long where `long_rows` is "refuse".
    """
    if max_length < 2:
        raise RosaError(f"max_length is {max_length}: at least 2 tokens are needed, one to read and one to predict")
    if long_rows not in ("cut", "drop", "refuse"):
        raise RosaError(f'long_rows is {long_rows!r}: use "cut", "drop" or "refuse"')
    kept, truncated, dropped = [], 0, 0
    for row in rows:
        encoded = _encode_chat(row, tokenizer) if row.messages else _encode_plain(row, tokenizer)
        length = len(encoded.input_ids)
        if length > max_length and long_rows == "refuse":
            raise RosaError(
                f"{row.where}: the row has {length} tokens, more than max_length={max_length}: shorten it, raise max_length, "
                "or have long rows cut or dropped"
            )
        cut = EncodedRow(encoded.input_ids[:max_length], encoded.labels[:max_length])
        if not cut.targets or (length > max_length and long_rows == "drop"):
            dropped += 1
            continue
        truncated += length > max_length
        kept.append(cut)
    if not kept:
        raise RosaError(
            f"none of the {len(rows)} rows "
            + ("fits" if long_rows == "drop" else "has a target token")
            + f" within max_length={max_length} tokens: raise max_length"
        )
    return Encoded(kept, max_length, truncated, dropped, "longer than" if long_rows == "drop" else "no target within")


def render(messages: Sequence[Message], tokenizer: Any, where: str, *, generate: bool = False) -> str:
    """The text of a conversation by the chat template; `generate` appends the assistant's generation prompt."""
    if not getattr(tokenizer, "chat_template", None):
        raise RosaError(
            f"{where}: the row has 'messages' but the tokenizer has no chat template: use a chat model, put a "
            "chat_template.jinja beside its tokenizer, or give rows of 'prompt' and 'completion'"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # whatever the template's author raises: jinja passes it through
        raise RosaError(f"{where}: the chat template rejects these messages: {error}") from error
    return str(text)


def _encode_chat(row: Row, tokenizer: Any) -> EncodedRow:
    text = render(row.messages, tokenizer, row.where)
    spans: list[Span] = []
    for index, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        whole = render(row.messages[: index + 1], tokenizer, row.where)
        starts = (render(row.messages[:index], tokenizer, row.where, generate=generate) for generate in (True, False) if index)
        start = next((s for s in starts if whole.startswith(s) and len(s) < len(whole)), None if index else "")
        if start is not None and text.startswith(whole):
            spans.append((len(start), len(whole)))
    if not spans:
        raise RosaError(
            f"{row.where}: the chat template writes no assistant's turn as a continuation of what precedes it, "
            "so the loss cannot be placed: use rows of 'prompt' and 'completion'"
        )
    # The template writes its own special tokens.
    return _label(text, spans, tokenizer, special=False)


def _encode_plain(row: Row, tokenizer: Any) -> EncodedRow:
    text = row.prompt + row.completion
    encoded = _label(text, [(len(row.prompt), len(text))], tokenizer, special=True)
    ids, labels, end = encoded.input_ids, encoded.labels, tokenizer.eos_token_id
    if end is not None:
        if ids and ids[-1] == end and labels[-1] == IGNORED:  # a tokenizer that appends it by itself
            ids, labels = ids[:-1], labels[:-1]
        ids, labels = [*ids, end], [*labels, end]
    return EncodedRow(ids, labels)


def _label(text: str, spans: Sequence[Span], tokenizer: Any, *, special: bool) -> EncodedRow:
    """Tokenise `text`; tokens that hold a character of a span are targets."""
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids = list(encoding["input_ids"])
        inside = [any(a < stop and b > start for start, stop in spans) for a, b in encoding["offset_mapping"]]
        ends = [b for _, b in encoding["offset_mapping"]]
    else:
        # No offsets: count the tokens of the prefixes.
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        inside, ends = [False] * len(ids), [0] * len(ids)
        for start, stop in spans:
            first, last = (len(tokenizer(text[:at], add_special_tokens=special)["input_ids"]) for at in (start, stop))
            for position in range(first, min(last, len(ids))):
                inside[position], ends[position] = True, stop
    for start, stop in spans:
        _trim(ids, inside, ends, (start, stop), tokenizer.eos_token_id)
    return EncodedRow(ids, [token if target else IGNORED for token, target in zip(ids, inside)])


def _trim(ids: list[int], inside: list[bool], ends: list[int], span: Span, end_token: int | None) -> None:
    """Take the tokens after a turn's last end token out of the loss: generation has stopped by then."""
    positions = [i for i, target in enumerate(inside) if target and span[0] < ends[i] <= span[1]]
    last = next((i for i in reversed(positions) if ids[i] == end_token), None)
    if last is not None:
        for position in positions:
            inside[position] = inside[position] and position <= last
