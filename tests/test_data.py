"""Rows, tokenising with labels, batches of one shape, and the corpus of the standard library's docstrings."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rosa_fx.data import docstring_rows, encode_rows, make_batches, pad_length, read_jsonl, split_rows
from rosa_fx.data.docstrings import is_held_out, stdlib_functions
from rosa_fx.data.encoding import IGNORED, EncodedRow
from rosa_fx.data.jsonl import Row
from rosa_fx.errors import RosaError

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# As models do that think aloud: only the last answer keeps what stands before the bar.
FORGETFUL = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('|')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "Who says?"},
    {"role": "assistant", "content": "I do|you do."},
]


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token per byte, and two special ones: every count in these tests can be done by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|start|>", "<|end|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|start|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>", chat_template=template)


class SlowTokenizer:
    """The same tokenizer without offsets, as Python tokenizers are."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        self.eos_token_id, self.chat_template = fast.eos_token_id, fast.chat_template
        self.apply_chat_template = fast.apply_chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._fast(text, add_special_tokens=add_special_tokens)["input_ids"]}


def chat_row(messages: list[dict[str, str]]) -> Row:
    return Row("here", messages=tuple(messages))


def learnt(row: EncodedRow, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


# JSONL


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


def test_both_kinds_of_rows_are_read(tmp_path: Path) -> None:
    # U+2028 is a line separator to Python, not to JSON.
    path = write(tmp_path / "a.jsonl", {"messages": CHAT, "id": 7}, "", '{"prompt": "a\u2028b", "completion": "c"}')
    rows = read_jsonl(path)
    assert list(rows[0].messages) == CHAT
    assert (rows[1].prompt, rows[1].completion) == ("a\u2028b", "c")
    assert rows[1].where.endswith("a.jsonl, line 3")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n')
    assert read_jsonl(path)[0].prompt == "a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'prompt': 1}", "not valid JSON"),
        ("[1]", "a row is a JSON object, this is a list"),
        ('{"text": "x"}', "neither 'messages' nor 'prompt' and 'completion' .*'text'"),
        ('{"prompt": "x"}', "'completion' is missing"),
        ('{"prompt": "x", "completion": 3}', "'completion' is a number"),
        ('{"messages": []}', "'messages' is an empty list"),
        ('{"messages": ["hi"]}', r"messages\[0\] is a string"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\]\['content'\] is missing"),
        ('{"messages": [{"role": "user", "content": null}]}', r"messages\[0\]\['content'\] is null"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message has the role 'assistant'"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, line)
    with pytest.raises(RosaError, match=f"a.jsonl, line 2: .*{message}"):
        read_jsonl(path)


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe4", "completion": "b"}\n')
    with pytest.raises(RosaError, match=r"line 2: not UTF-8 .*byte 12"):
        read_jsonl(path)


def test_empty_missing_and_odd_files(tmp_path: Path) -> None:
    with pytest.raises(RosaError, match="has no rows"):
        read_jsonl(write(tmp_path / "a.jsonl", "", " "))
    with pytest.raises(RosaError, match="cannot be read: No such file"):
        read_jsonl(tmp_path / "b.jsonl")
    with pytest.raises(RosaError, match="is a directory"):
        read_jsonl(tmp_path)


# Tokenising


@pytest.mark.parametrize("slow", [False, True])
def test_only_the_assistants_turns_are_learnt(slow: bool) -> None:
    fast = byte_tokenizer()
    tokenizer = SlowTokenizer(fast) if slow else fast
    row = encode_rows([chat_row(CHAT)], tokenizer, 1000).rows[0]
    assert fast.decode(row.input_ids) == fast.apply_chat_template(CHAT, tokenize=False)
    assert learnt(row, fast) == "Because.<|end|>I do|you do.<|end|>"
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels))


def test_what_the_prompt_of_generation_holds_is_not_learnt() -> None:
    tokenizer = byte_tokenizer()
    row = encode_rows([chat_row(CHAT[:2])], tokenizer, 1000).rows[0]
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=True)["input_ids"]
    first = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    assert row.input_ids[:first] == prompt


def test_a_turn_that_the_template_rewrites_later_is_context_only() -> None:
    tokenizer = byte_tokenizer(FORGETFUL)
    messages = [CHAT[0], CHAT[3], CHAT[2], CHAT[1]]
    row = encode_rows([chat_row(messages)], tokenizer, 1000).rows[0]
    assert learnt(row, tokenizer) == "Because.<|end|>"


def test_an_opening_assistants_turn_is_learnt_with_its_header() -> None:
    tokenizer = byte_tokenizer()
    row = encode_rows([chat_row(CHAT[1:2])], tokenizer, 1000).rows[0]
    assert learnt(row, tokenizer) == "<|start|>assistant\nBecause.<|end|>"
    assert row.targets == len(row.labels) - 2  # neither the first token nor the last newline


@pytest.mark.parametrize("slow", [False, True])
def test_a_completion_is_learnt_to_its_end_token(slow: bool) -> None:
    fast = byte_tokenizer(None)
    row = encode_rows([Row("here", prompt="1+1=", completion="2 é")], SlowTokenizer(fast) if slow else fast, 1000).rows[0]
    assert fast.decode(row.input_ids) == "1+1=2 é<|end|>"
    assert learnt(row, fast) == "2 é<|end|>"


def test_long_rows_are_cut_or_dropped_and_counted() -> None:
    tokenizer = byte_tokenizer(None)
    rows = [
        Row("fits", prompt="ab", completion="c"),
        Row("is cut", prompt="ab", completion="cdef"),
        Row("is dropped", prompt="abcdef", completion="g"),
    ]
    encoded = encode_rows(rows, tokenizer, 4)
    assert [tokenizer.decode(row.input_ids) for row in encoded.rows] == ["abc<|end|>", "abcd"]
    assert (encoded.truncated, encoded.dropped) == (1, 1)
    assert encoded.describe() == (
        "2 rows, 8 tokens, 4 of them targets; 1 cut to 4 tokens; 1 dropped (no target within 4 tokens)"
    )
    with pytest.raises(RosaError, match="none of the 1 rows has a target token within max_length=4"):
        encode_rows(rows[2:], tokenizer, 4)
    with pytest.raises(RosaError, match="max_length is 1"):
        encode_rows(rows, tokenizer, 1)


def test_long_rows_are_dropped_or_refused_where_asked() -> None:
    tokenizer = byte_tokenizer(None)
    rows = [Row("fits", prompt="ab", completion="c"), Row("too long", prompt="ab", completion="cdef")]
    encoded = encode_rows(rows, tokenizer, 4, "drop")
    assert [tokenizer.decode(row.input_ids) for row in encoded.rows] == ["abc<|end|>"]
    assert encoded.describe() == "1 rows, 4 tokens, 2 of them targets; 1 dropped (longer than 4 tokens)"
    with pytest.raises(RosaError, match="too long: the row has 7 tokens, more than max_length=4"):
        encode_rows(rows, tokenizer, 4, "refuse")
    with pytest.raises(RosaError, match="none of the 1 rows fits within max_length=4"):
        encode_rows(rows[1:], tokenizer, 4, "drop")
    with pytest.raises(RosaError, match="long_rows is 'split'"):
        encode_rows(rows, tokenizer, 4, "split")  # type: ignore[arg-type]


def test_templates_that_cannot_be_used() -> None:
    with pytest.raises(RosaError, match=r"here: .* no chat template"):
        encode_rows([chat_row(CHAT)], byte_tokenizer(None), 100)
    with pytest.raises(RosaError, match=r"here: the chat template rejects these messages: no system"):
        encode_rows([chat_row(CHAT)], byte_tokenizer("{{ raise_exception('no system') }}"), 100)
    with pytest.raises(RosaError, match=r"here: .*no assistant's turn"):
        encode_rows([chat_row(CHAT)], byte_tokenizer("{{ messages | length }}"), 100)


# Batches


def encoded_rows(*lengths: int) -> list[EncodedRow]:
    return [EncodedRow([i + 1] * n, [IGNORED] + [i + 1] * (n - 1)) for i, n in enumerate(lengths)]


def test_every_batch_has_one_shape_and_every_row_is_in_one() -> None:
    rows = encoded_rows(3, 70, 5, 1, 2)
    length = pad_length(rows, 1000)
    assert length == 128
    assert pad_length(rows, 100) == 100
    batches = make_batches(rows, 2, length, pad_token=0, seed=3)
    assert {tuple(t.shape) for batch in batches for t in batch.values()} == {(2, 128)}
    found = [
        (ids[: int(ids.count_nonzero())].tolist(), labels[labels != IGNORED].tolist())
        for batch in batches
        for ids, labels in zip(batch["input_ids"], batch["labels"])
    ]
    expected = [(row.input_ids, [x for x in row.labels if x != IGNORED]) for row in rows] + [([], [])]
    assert sorted(found) == sorted(expected)
    assert found[:5] != expected[:5]


def test_the_order_is_a_function_of_the_seed() -> None:
    rows = encoded_rows(*range(1, 20))
    first, again, other = (make_batches(rows, 4, 64, 0, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other))


def test_bad_batch_settings() -> None:
    with pytest.raises(RosaError, match="batch size is 0"):
        make_batches(encoded_rows(3), 0, 64, 0)
    with pytest.raises(RosaError, match="a row has 65 tokens, more than the length 64"):
        make_batches(encoded_rows(65), 1, 64, 0)


def test_a_split_is_a_partition_and_deterministic() -> None:
    rows = list(range(100))
    train, held = split_rows(rows, 0.1, seed=5)
    assert len(held) == 10
    assert sorted(train + held) == rows
    assert split_rows(rows, 0.1, seed=5) == (train, held)
    assert split_rows(rows, 0.1, seed=6) != (train, held)
    assert split_rows(rows, 0.0) == (rows, [])
    assert [len(part) for part in split_rows([1, 2], 0.01)] == [1, 1]
    with pytest.raises(RosaError, match="1 row cannot be split"):
        split_rows([1], 0.5)
    with pytest.raises(RosaError, match="share is 1"):
        split_rows(rows, 1.0)


def test_padding_changes_neither_loss_nor_gradients() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, use_cache=False, **sizes)).double()

    def summed_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:  # the model's own loss is rounded to float32
        logits = model(input_ids=batch["input_ids"]).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    rows = encoded_rows(7, 4)
    alone = sum(summed_loss(make_batches([row], 1, len(row.input_ids), 0)[0]).item() for row in rows)
    gradients = []
    for length in (7, 24):
        model.zero_grad()
        loss = summed_loss(make_batches(rows, 2, length, pad_token=9)[0])
        loss.backward()
        assert loss.item() == pytest.approx(alone, rel=1e-12)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


# The corpus


MODULE = '''
class A:
    def one(self):
        """Return one, always the same."""

        return 1

    def no_doc(self):
        return 2

    def only_doc(self):
        """Do nothing whatsoever here."""

    def cut_off(self):
        """Start a sentence which goes
        on in the next line."""
        return 3

    def summary(self, x):
        """Return the summary of x

        and then some more."""
        # a remark
        return x
'''


def test_functions_are_shown_without_their_docstring(tmp_path: Path) -> None:
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha" / "__init__.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.py").write_text(MODULE)
    found = list(stdlib_functions(400, tmp_path))
    assert [(f.module, f.docstring) for f in found] == [
        ("alpha", "Return one, always the same."),
        ("alpha", "Return the summary of x"),
    ]
    assert found[0].source == "def one(self):\n    return 1"
    assert found[1].source == "def summary(self, x):\n    # a remark\n    return x"
    assert list(stdlib_functions(20, tmp_path)) == []
    assert list(stdlib_functions(400, tmp_path)) == found


def test_the_corpus_of_this_python() -> None:
    train, held = docstring_rows(240)
    assert len(train) > 500
    assert len(held) > 100
    sides = [{row.where.removeprefix("module ").partition(".")[0] for row in part} for part in (train, held)]
    assert not sides[0] & sides[1]
    assert all(is_held_out(name) for name in sides[1])
    questions = [row.messages[1]["content"] for row in (*train, *held)]
    assert len(set(questions)) == len(questions)
    for row in held[:100]:
        source = row.messages[1]["content"].partition("\n\n")[2]
        assert ast.get_docstring(ast.parse(source).body[0]) is None  # type: ignore[arg-type]


def test_a_python_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RosaError, match="standard library were not found"):
        docstring_rows(stdlib=tmp_path)
