"""Training data: JSONL files, tokens with the loss on the answers only, batches of one shape, and the demo's corpus."""

from rosa_fx.data.batching import make_batches, pad_length, split_rows
from rosa_fx.data.docstrings import docstring_rows
from rosa_fx.data.encoding import Encoded, EncodedRow, encode_rows
from rosa_fx.data.jsonl import Row, read_jsonl

__all__ = [
    "Encoded",
    "EncodedRow",
    "Row",
    "docstring_rows",
    "encode_rows",
    "make_batches",
    "pad_length",
    "read_jsonl",
    "split_rows",
]
