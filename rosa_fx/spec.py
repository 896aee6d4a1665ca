"""What to fine-tune and how: :class:`RosaSpec`, an immutable, versioned description, saved beside every adapter."""

from __future__ import annotations

import fnmatch
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from rosa_fx.errors import RosaError

ALL_LINEAR = "all-linear"
BASES = ("keep", "nf4", "fp4", "int8")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those bitsandbytes.functional.quantize_4bit takes
INITS = ("kaiming", "gaussian")
GRAD_MODES = ("mean_squared", "mean")
ADAPTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OVERRIDE_KEYS = ("rank", "alpha", "density", "base")


class FrozenMapping(Mapping[str, Any]):
    """A read-only, hashable, picklable mapping; equal to any mapping with equal items, in any order."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._items == dict(other)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


class OrderedFrozenMapping(FrozenMapping):
    """A :class:`FrozenMapping` whose order counts, because a later override wins over an earlier one."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self._items.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))


def pattern_matcher(pattern: str) -> Callable[[str], bool]:
    """A predicate over parameter names.

    ``"re:<regex>"`` must match the whole name (``re.fullmatch``); anything else is a case-sensitive glob over the whole
    name, in which ``*`` also crosses dots. Raises RosaError for a regular expression that does not compile.
    """
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise RosaError(f"the pattern {pattern!r} is not a valid regular expression: {error}") from None
        return lambda name: regex.fullmatch(name) is not None
    return lambda name: name == pattern or fnmatch.fnmatchcase(name, pattern)


def _integer(name: str, value: object, minimum: int) -> int:
    # bool is an int in Python, but rank=True is always a mistake; numpy integers are welcome.
    try:
        if isinstance(value, bool | torch.Tensor):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise RosaError(f"{name} must be an integer, got {value!r} ({type(value).__name__})") from None
    if number < minimum:
        raise RosaError(f"{name} must be at least {minimum}, got {number}")
    return number


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> float:
    bounds = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    try:
        if isinstance(value, bool | str | bytes | torch.Tensor):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RosaError(f"{name} must be a number in {bounds}, got {value!r} ({type(value).__name__})") from None
    below = number <= low if open_low else number < low
    above = number >= high if open_high else number > high
    if math.isnan(number) or below or above:
        raise RosaError(f"{name} must be a number in {bounds}, got {number}")
    return number


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RosaError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def _choice(name: str, value: object, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise RosaError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _pattern(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise RosaError(f"{name} must hold non-empty pattern strings (a glob or 're:<regex>'), got {value!r}")
    try:
        pattern_matcher(value)
    except RosaError as error:
        raise RosaError(f"{name}: {error}") from None
    return value


def _patterns(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_pattern(name, value),)
    if not isinstance(value, list | tuple):
        raise RosaError(f"{name} must be a pattern or a list of patterns, got {value!r} ({type(value).__name__})")
    return tuple(_pattern(name, each) for each in value)


def _alpha(name: str, value: object) -> float:
    return _number(name, value, 0.0, math.inf, open_low=True, open_high=True)


def _density(name: str, value: object) -> float:
    return _number(name, value, 0.0, 1.0)


def _override(pattern: str, value: object) -> FrozenMapping:
    where = f"overrides[{pattern!r}]"
    if not isinstance(value, Mapping) or not value:
        raise RosaError(f"{where} must map some of {', '.join(OVERRIDE_KEYS)} to values, got {value!r}")
    for key in value:
        if key not in OVERRIDE_KEYS:
            raise RosaError(f"{where} has the unknown key {key!r}; an override may set {', '.join(OVERRIDE_KEYS)}")
    checks: dict[str, Callable[[str, object], Any]] = {
        "rank": lambda name, rank: _integer(name, rank, 0),
        "alpha": _alpha,
        "density": _density,
        "base": lambda name, base: _choice(name, base, BASES),
    }
    return FrozenMapping({key: checks[key](f"{where}[{key!r}]", value[key]) for key in OVERRIDE_KEYS if key in value})


def _dtype_name(value: object) -> str:
    name = str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else value
    return _choice("adapter_dtype", name, tuple(ADAPTER_DTYPES))


def _schedule(value: object) -> str:
    if isinstance(value, str):
        if value in ("spa_only", "lora_only"):
            return value
        if warm_up := re.fullmatch(r"wl([0-9]+)", value):
            return f"wl{int(warm_up[1])}"
    raise RosaError(
        f"schedule must be 'wl<n>' (low-rank only for n steps, e.g. 'wl64'), 'spa_only' or 'lora_only', got {value!r}"
    )


@dataclass(frozen=True)
class RosaSpec:
    """How a model is fine-tuned: ``y = x (D(Q) + S)ᵀ + scale · (x Aᵀ) Bᵀ + b`` for every target weight ``[N, K]``.

    Immutable, hashable, picklable; equal when every field is equal; ``dataclasses.replace`` makes a changed copy. Every
    field is checked at construction: a bad one raises RosaError that names the field, its value and what is allowed.

    Fields:
        base: how the frozen weight is stored: ``"nf4"``, ``"fp4"`` (bitsandbytes' 4-bit formats), ``"int8"`` (its
            rowwise int8), or ``"keep"`` (left as it is).
        double_quant: quantise the block scales of ``nf4``/``fp4`` too; the other bases have none and do not read it.
        blocksize: weights per block scale in ``nf4``/``fp4``; one of 32, 64, 128, 256, 512, 1024, 2048, 4096.
        rank: R of the low-rank term, ``A [R, K]``, ``B [N, R]``; 0 leaves it out. Capped at min(N, K) of
            small weights.
        alpha: numerator of the low-rank term's scale, see :meth:`scale`.
        rank_stabilized: scale by ``alpha / sqrt(rank)`` in place of ``alpha / rank``.
        dropout: probability in [0, 1) of dropping an input of the low-rank term in training.
        init: distribution of A (B starts at zero): ``"kaiming"`` (uniform, a = sqrt 5) or ``"gaussian"``.
        density: share of a weight's entries that the sparse term trains, ``nnz = int(density * N * K)``; 0 leaves
            it out.
        targets: ``"all-linear"`` (every weight used linearly but embeddings and the output head) or patterns over
            parameter names, see :func:`pattern_matcher`. A lone string is kept as it is, a list becomes a tuple.
        exclude: patterns of weights that are left alone, stored as a tuple.
        overrides: pattern -> some of ``rank``, ``alpha``, ``density``, ``base`` for the weights it names. A later
            pattern wins over an earlier one, key by key, so the order counts for equality. Stored as a read-only
            mapping.
        adapter_dtype: dtype of A, B and the sparse values, ``"float32"``, ``"bfloat16"`` or ``"float16"``; a
            ``torch.dtype`` is taken too and stored as its name.
        schedule: ``"wl<n>"`` (low-rank only for n optimizer steps, then masks are made, then both terms),
            ``"spa_only"`` (sparse alone), ``"lora_only"`` (low-rank alone): the other term stays as it began, without effect.
        num_grads: optimizer steps whose gradients are collected for the masks, at least 1.
        grad_mode: what is averaged: ``"mean_squared"`` (g², the diagonal Fisher information) or ``"mean"`` (g).
    """

    VERSION: ClassVar[int] = 1

    base: str = "nf4"
    double_quant: bool = False
    blocksize: int = 64
    rank: int = 16
    alpha: float = 16.0
    rank_stabilized: bool = False
    dropout: float = 0.0
    init: str = "kaiming"
    density: float = 0.006
    targets: str | Sequence[str] = ALL_LINEAR
    exclude: Sequence[str] = ()
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    adapter_dtype: str = "float32"
    schedule: str = "wl64"
    num_grads: int = 1
    grad_mode: str = "mean_squared"

    def __post_init__(self) -> None:
        checked = {
            "base": _choice("base", self.base, BASES),
            "double_quant": _boolean("double_quant", self.double_quant),
            "blocksize": _integer("blocksize", self.blocksize, 1),
            "rank": _integer("rank", self.rank, 0),
            "alpha": _alpha("alpha", self.alpha),
            "rank_stabilized": _boolean("rank_stabilized", self.rank_stabilized),
            "dropout": _number("dropout", self.dropout, 0.0, 1.0, open_high=True),
            "init": _choice("init", self.init, INITS),
            "density": _density("density", self.density),
            "targets": self._checked_targets(),
            "exclude": _patterns("exclude", self.exclude),
            "overrides": self._checked_overrides(),
            "adapter_dtype": _dtype_name(self.adapter_dtype),
            "schedule": _schedule(self.schedule),
            "num_grads": _integer("num_grads", self.num_grads, 1),
            "grad_mode": _choice("grad_mode", self.grad_mode, GRAD_MODES),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.blocksize not in BLOCKSIZES:
            raise RosaError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize}")
        self._check_terms()

    def _checked_targets(self) -> str | tuple[str, ...]:
        patterns = _patterns("targets", self.targets)
        if not patterns:
            raise RosaError("targets is empty: nothing would be trained; give 'all-linear' or patterns")
        return patterns[0] if isinstance(self.targets, str) else patterns

    def _checked_overrides(self) -> OrderedFrozenMapping:
        if not isinstance(self.overrides, Mapping):
            raise RosaError(
                f"overrides must map patterns to settings, got {self.overrides!r} ({type(self.overrides).__name__})"
            )
        return OrderedFrozenMapping(
            {_pattern("overrides", pattern): _override(pattern, value) for pattern, value in self.overrides.items()}
        )

    def _check_terms(self) -> None:
        """Reject a schedule that contradicts the terms, and a spec that trains nothing."""
        ranks = {"rank": self.rank} | {f"overrides[{p!r}]['rank']": o.get("rank", 0) for p, o in self.overrides.items()}
        densities = {"density": self.density}
        densities |= {f"overrides[{p!r}]['density']": o.get("density", 0.0) for p, o in self.overrides.items()}
        if not any(ranks.values()) and not any(densities.values()):
            raise RosaError("rank=0 and density=0.0 leave nothing to train: raise rank or density")
        # A term that the schedule never trains keeps its initial state, which adds nothing to the weight.
        if self.schedule == "lora_only" and not any(ranks.values()):
            raise RosaError("schedule='lora_only' trains the low-rank term alone, but rank=0: raise it, or choose 'spa_only'")
        if self.schedule == "spa_only" and not any(densities.values()):
            raise RosaError(
                "schedule='spa_only' trains the sparse term alone, but density=0.0: raise it, or choose 'lora_only'"
            )

    @property
    def torch_adapter_dtype(self) -> torch.dtype:
        """``adapter_dtype`` as a ``torch.dtype``."""
        return ADAPTER_DTYPES[self.adapter_dtype]

    @property
    def target_patterns(self) -> tuple[str, ...]:
        """``targets`` as a tuple, whichever way it was given."""
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    def scale(self, rank: int, alpha: float | None = None) -> float:
        """The factor of the low-rank term of a weight of this rank.

        ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rank_stabilized``; 0.0 when rank is 0. ``rank`` is the
        rank the weight really has, after capping; ``alpha`` defaults to the spec's.
        """
        if rank == 0:
            return 0.0
        return (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def to_json(self) -> str:
        """This spec as JSON text; :meth:`from_json` gives an equal spec back."""
        content: dict[str, Any] = {"version": self.VERSION}
        for each in fields(self):
            value = getattr(self, each.name)
            content[each.name] = list(value) if isinstance(value, tuple) else value
        content["overrides"] = {pattern: dict(override) for pattern, override in self.overrides.items()}
        return json.dumps(content, indent=2)

    @classmethod
    def from_json(cls, text: str) -> RosaSpec:
        """The spec that :meth:`to_json` wrote; fields that are left out take their defaults.

        Raises RosaError for text that is no JSON object, for another version, and for unknown or bad fields by name.
        """
        try:
            content = json.loads(text)
        except (TypeError, ValueError) as error:
            raise RosaError(f"a spec must be JSON text: {error}") from None
        if not isinstance(content, dict):
            raise RosaError(f"a spec must be a JSON object, got {type(content).__name__}")
        version = content.pop("version", None)
        if version != cls.VERSION or isinstance(version, bool):
            raise RosaError(
                f"version of the spec is {version!r}, this rosa_fx reads version {cls.VERSION}: "
                "use the rosa_fx that wrote it, or write the spec again"
            )
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(content) - known):
            raise RosaError(f"unknown field {', '.join(map(repr, unknown))} in the spec; known: {', '.join(sorted(known))}")
        return cls(**content)
