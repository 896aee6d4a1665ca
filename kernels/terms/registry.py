"""The terms that exist, by kind. A new term is one new file and one entry here."""

from __future__ import annotations

from typing import Any

from rosa_fx.errors import RosaError
from rosa_fx.kernels.terms.base import Term
from rosa_fx.kernels.terms.collect import CollectGradient, CollectReceived, CollectTopK
from rosa_fx.kernels.terms.low_rank import LowRank
from rosa_fx.kernels.terms.low_rank_given import LowRankGiven
from rosa_fx.kernels.terms.sparse import Sparse

_ALL = (LowRank, Sparse, CollectGradient, CollectTopK, CollectReceived, LowRankGiven)
TERMS: dict[str, type[Term]] = {term.kind: term for term in _ALL}


def term(kind: str, **fields: Any) -> Term:
    """The term of that kind. Raises RosaError for an unknown kind, and for fields that are unknown or missing."""
    if kind not in TERMS:
        raise RosaError(f"unknown delta term {kind!r}: use one of {', '.join(TERMS)}")
    try:
        return TERMS[kind](**fields)
    except TypeError as error:
        raise RosaError(f"delta term {kind!r} does not take the fields {fields}: {error}") from None
