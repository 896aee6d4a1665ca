"""How one rewritten weight is laid out: its shape, its base format and the terms of its delta.

A layout travels through graphs as a short canonical JSON string, next to two lists of tensors: `base`, which holds D(Q), and
`delta`, the tensors of all terms in order. Weights of equal layout give equal graphs, so identical blocks compile once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate

import torch
from torch import Tensor

from rosa_fx.kernels.bases.base import BaseFormat
from rosa_fx.kernels.terms.base import Region, Shape, Term
from rosa_fx.kernels.terms.registry import term


@dataclass(frozen=True)
class Layout:
    """Shape [N, K] and dtype of the weight as the model sees it, base format, terms.

    A weight that is a stack of `stack` matrices [N / stack, K], one below the other, has all of them in this shape; each has
    a low-rank term of its own.

    `strict` makes a consumer that cannot be fused an error at compile time. `region` says which part of the weight a product
    uses, [row start, row stop) and [column start, column stop), where that is not all of it (a packed qkv projection).
    """

    shape: Shape
    dtype: torch.dtype
    base: BaseFormat
    terms: tuple[Term, ...] = field(default=())
    strict: bool = False
    region: Region | None = None
    stack: int = 1

    @property
    def out_shape(self) -> Shape:
        """(N, K) of the part of the weight that a product uses."""
        if self.region is None:
            return self.shape
        return self.region[1] - self.region[0], self.region[3] - self.region[2]

    @property
    def each_shape(self) -> Shape:
        """(N, K) of one matrix of the stack, or of its part where a grouped product uses the same region of each."""
        return (self.shape[0] // self.stack, self.shape[1]) if self.region is None else self.out_shape

    @cached_property
    def key(self) -> str:
        return _encode(self)

    @staticmethod
    @cache
    def parse(key: str) -> Layout:
        data = json.loads(key)
        return Layout(
            shape=(data["shape"][0], data["shape"][1]),
            dtype=getattr(torch, data["dtype"]),
            base=BaseFormat.from_dict(data["base"]),
            terms=tuple(term(t.pop("kind"), **t) for t in data["terms"]),
            strict=data["strict"],
            region=None if data["region"] is None else tuple(data["region"]),
            stack=data["stack"],
        )

    def with_dtype(self, dtype: torch.dtype) -> Layout:
        return replace(self, dtype=dtype)

    def part(self, region: Region) -> Layout:
        """The layout of a product with that part of the weight."""
        part = None if region == (0, self.shape[0], 0, self.shape[1]) else region
        return self if part == self.region else replace(self, region=part)

    def part_of_each(self, region: Region) -> Layout:
        """The layout of a grouped product with that part of each matrix of the stack."""
        rows, columns = replace(self, region=None).each_shape
        return replace(self, region=None if region == (0, rows, 0, columns) else region)

    def cut(self, weight: Tensor) -> Tensor:
        """The region of a dense weight [N, K], as a view."""
        if self.region is None:
            return weight
        row, row_stop, column, column_stop = self.region
        return weight[row:row_stop, column:column_stop]

    def split(self, delta: Sequence[Tensor]) -> Iterator[tuple[Term, Sequence[Tensor]]]:
        """Each term with its own tensors out of the flat list `delta`."""
        for item, place in self._places:
            yield item, delta[place]

    @cached_property
    def _places(self) -> tuple[tuple[Term, slice], ...]:
        """Where the tensors of each term are in `delta`."""
        stops = list(accumulate(len(item.tensor_names) for item in self.terms))
        return tuple((item, slice(start, stop)) for item, start, stop in zip(self.terms, [0, *stops], stops))

    @cached_property
    def folded(self) -> tuple[tuple[Term, slice], ...]:
        """The terms that kernels add into the weight, and where the tensors of each are in `delta`."""
        return tuple((item, place) for item, place in self._places if item.contributes and item.folds)

    @cached_property
    def beside(self) -> tuple[tuple[Term, slice], ...]:
        """The same for terms that have a product of their own."""
        return tuple((item, place) for item, place in self._places if item.contributes and not item.folds)

    def only(self, keep: Sequence[bool]) -> tuple[Layout, list[int]]:
        """The layout of those terms that have a tensor marked in `keep`, and where their tensors are in `delta`."""
        terms: list[Term] = []
        positions: list[int] = []
        for item, own in self.split(range(len(keep))):  # type: ignore[arg-type]
            if any(keep[position] for position in own):  # type: ignore[call-overload]
                terms.append(item)
                positions += own  # type: ignore[arg-type]
        return replace(self, terms=tuple(terms)), positions

    @property
    def trainable(self) -> tuple[int, ...]:
        """Positions in `delta` of the tensors that receive gradients, in the order of the gradients."""
        return tuple(place.start + item.tensor_names.index(name) for item, place in self._places for name in item.trainable)

    @property
    def additive(self) -> bool:
        """Whether the gradients of several uses of the weight may be computed apart and summed."""
        return all(item.additive for item in self.terms)


@cache
def _encode(layout: Layout) -> str:
    return json.dumps(
        {
            "shape": layout.shape,
            "dtype": str(layout.dtype).removeprefix("torch."),
            "base": layout.base.to_dict(),
            "terms": [{"kind": item.kind, **item.fields()} for item in layout.terms],
            "strict": layout.strict,
            "region": layout.region,
            "stack": layout.stack,
        },
        separators=(",", ":"),
    )
