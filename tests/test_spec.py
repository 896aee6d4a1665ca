"""RosaSpec: checks at construction, identity, and the JSON round trip."""

import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rosa_fx.errors import RosaError
from rosa_fx.spec import ADAPTER_DTYPES, BASES, BLOCKSIZES, GRAD_MODES, INITS, RosaSpec, pattern_matcher

patterns = st.text(alphabet='abc.*?_0é"\\', min_size=1, max_size=8) | st.just("re:.*attn.*")
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
override = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.integers(0, 512),
        "alpha": positive,
        "density": st.floats(0, 1),
        "base": st.sampled_from(BASES),
    },
).filter(bool)
specs = st.builds(
    RosaSpec,
    base=st.sampled_from(BASES),
    double_quant=st.booleans(),
    blocksize=st.sampled_from(BLOCKSIZES),
    rank=st.integers(1, 512),
    alpha=positive,
    rank_stabilized=st.booleans(),
    dropout=st.floats(0, 1, exclude_max=True),
    init=st.sampled_from(INITS),
    density=st.floats(0, 1),
    targets=st.just("all-linear") | patterns | st.lists(patterns, min_size=1, max_size=3),
    exclude=st.lists(patterns, max_size=3),
    overrides=st.dictionaries(patterns, override, max_size=3),
    adapter_dtype=st.sampled_from(sorted(ADAPTER_DTYPES)),
    schedule=st.integers(0, 1000).map("wl{}".format),
    num_grads=st.integers(1, 64),
    grad_mode=st.sampled_from(GRAD_MODES),
)


@given(specs)
def test_json_round_trip(spec: RosaSpec) -> None:
    again = RosaSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_json() == spec.to_json()
    assert list(again.overrides) == list(spec.overrides)  # the order decides which override wins
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert dataclasses.replace(spec) == spec


def test_defaults_are_the_documented_ones() -> None:
    assert json.loads(RosaSpec().to_json()) == {
        "version": 1,
        "base": "nf4",
        "double_quant": False,
        "blocksize": 64,
        "rank": 16,
        "alpha": 16.0,
        "rank_stabilized": False,
        "dropout": 0.0,
        "init": "kaiming",
        "density": 0.006,
        "targets": "all-linear",
        "exclude": [],
        "overrides": {},
        "adapter_dtype": "float32",
        "schedule": "wl64",
        "num_grads": 1,
        "grad_mode": "mean_squared",
    }


def test_frozen_and_normalised() -> None:
    overrides = {"a*": {"base": "int8", "rank": np.int64(4)}}
    spec = RosaSpec(alpha=8, targets=["x", "y"], exclude="z", overrides=overrides, adapter_dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert spec.alpha == 8.0
    assert isinstance(spec.alpha, float)
    assert spec.targets == spec.target_patterns == ("x", "y")
    assert spec.exclude == ("z",)
    assert spec.overrides == {"a*": {"rank": 4, "base": "int8"}}
    assert type(spec.overrides["a*"]["rank"]) is int
    assert spec.adapter_dtype == "bfloat16"
    assert spec.torch_adapter_dtype is torch.bfloat16
    overrides["a*"]["rank"] = 99  # the caller's dictionary is not the spec's
    assert spec.overrides["a*"]["rank"] == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.rank = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.overrides["b"] = {}  # type: ignore[index]
    assert RosaSpec(schedule="wl007").schedule == "wl7"
    assert dataclasses.replace(spec, rank=3).overrides == spec.overrides


def test_order_of_overrides_counts_and_order_of_keys_does_not() -> None:
    first, second = (
        {"a": {"rank": 1, "alpha": 2.0}, "b": {"rank": 2}},
        {"b": {"rank": 2}, "a": {"rank": 1, "alpha": 2.0}},
    )
    assert RosaSpec(overrides=first) != RosaSpec(overrides=second)
    swapped = {"a": {"alpha": 2.0, "rank": 1}, "b": {"rank": 2}}
    assert RosaSpec(overrides=first) == RosaSpec(overrides=swapped)
    assert len({RosaSpec(overrides=first), RosaSpec(overrides=swapped), RosaSpec(overrides=second)}) == 2


def test_scale() -> None:
    assert RosaSpec(alpha=16).scale(8) == 2.0
    assert RosaSpec(alpha=16, rank_stabilized=True).scale(16) == 4.0
    assert RosaSpec().scale(4, alpha=2.0) == 0.5
    assert RosaSpec().scale(0) == 0.0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"base": "int4"}, "base .*'keep', 'nf4', 'fp4', 'int8'.*'int4'"),
    ({"base": None}, "base"),
    ({"double_quant": 1}, "double_quant"),
    ({"blocksize": 48}, "blocksize .*48"),
    ({"blocksize": 64.0}, "blocksize"),
    ({"rank": -1}, "rank .*-1"),
    ({"rank": True}, "rank .*bool"),
    ({"rank": "16"}, "rank .*str"),
    ({"rank": 16.0}, "rank .*float"),
    ({"rank": np.True_}, "rank"),
    ({"alpha": 0}, "alpha"),
    ({"alpha": -1.0}, "alpha"),
    ({"alpha": math.nan}, "alpha .*nan"),
    ({"alpha": math.inf}, "alpha .*inf"),
    ({"alpha": "16"}, "alpha .*str"),
    ({"alpha": 10**400}, "alpha"),
    ({"rank_stabilized": "yes"}, "rank_stabilized"),
    ({"dropout": 1.0}, r"dropout .*\[0, 1\).*1.0"),
    ({"dropout": -0.1}, "dropout"),
    ({"init": "zeros"}, "init"),
    ({"density": -0.1}, "density"),
    ({"density": 1.01}, r"density .*\[0, 1\].*1.01"),
    ({"density": math.nan}, "density"),
    ({"density": True}, "density"),
    ({"targets": []}, "targets is empty"),
    ({"targets": ""}, "targets"),
    ({"targets": 3}, "targets"),
    ({"targets": ["a", 3]}, "targets"),
    ({"targets": "re:("}, r"targets: the pattern 're:\('"),
    ({"exclude": ["re:["]}, "exclude"),
    ({"exclude": None}, "exclude"),
    ({"overrides": [("a", 1)]}, "overrides"),
    ({"overrides": {"a": 3}}, r"overrides\['a'\]"),
    ({"overrides": {"a": {}}}, r"overrides\['a'\]"),
    ({"overrides": {"a": {"ranks": 3}}}, r"overrides\['a'\] .*'ranks'"),
    ({"overrides": {"a": {"rank": -1}}}, r"overrides\['a'\]\['rank'\] .*-1"),
    ({"overrides": {"a": {"density": 2}}}, r"overrides\['a'\]\['density'\]"),
    ({"overrides": {"a": {"base": "nf5"}}}, r"overrides\['a'\]\['base'\]"),
    ({"overrides": {"re:(": {"rank": 1}}}, "overrides"),
    ({"adapter_dtype": "float64"}, "adapter_dtype"),
    ({"adapter_dtype": torch.int8}, "adapter_dtype"),
    ({"adapter_dtype": 16}, "adapter_dtype"),
    ({"schedule": "wl"}, "schedule"),
    ({"schedule": "wl-1"}, "schedule"),
    ({"schedule": "spa"}, "schedule"),
    ({"schedule": 64}, "schedule"),
    ({"num_grads": 0}, "num_grads"),
    ({"num_grads": 1.5}, "num_grads"),
    ({"grad_mode": "max"}, "grad_mode"),
    ({"rank": 0, "density": 0}, "nothing to train"),
    ({"rank": 0, "density": 0, "overrides": {"a": {"alpha": 3}}}, "nothing to train"),
    ({"schedule": "lora_only", "rank": 0}, "lora_only.*rank=0"),
    ({"schedule": "spa_only", "density": 0}, "spa_only.*density=0"),
    ({"schedule": "spa_only", "rank": 0, "density": 0}, "nothing to train"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:60])
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RosaError, match=message):
        RosaSpec(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 0},
        {"density": 0},
        {"density": 1},
        {"schedule": "lora_only", "density": 0},
        {"schedule": "spa_only", "rank": 0},
        {"schedule": "spa_only"},
        {"schedule": "lora_only"},
        {"schedule": "wl8", "rank": 0},
        {"schedule": "wl0"},
        {"rank": 0, "density": 0, "overrides": {"a": {"rank": 3}}},
        {"adapter_dtype": torch.float16},
        {"density": np.float32(0.5)},
    ],
    ids=str,
)
def test_edges_that_are_allowed(fields: dict[str, Any]) -> None:
    spec = RosaSpec(**fields)
    assert RosaSpec.from_json(spec.to_json()) == spec


def test_unknown_field_of_the_constructor() -> None:
    with pytest.raises(TypeError, match="foo"):
        RosaSpec(foo=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("{}", "version .*None"),
        ('{"version": 2}', "version .*2.*version 1"),
        ('{"version": true}', "version"),
        ('{"version": 1, "foo": 1, "bar": 2}', "'bar', 'foo'"),
        ('{"version": 1, "rank": -3}', "rank .*-3"),
        ('{"version": 1, "alpha": NaN}', "alpha"),
        (None, "JSON"),
    ],
)
def test_bad_json(text: Any, message: str) -> None:
    with pytest.raises(RosaError, match=message):
        RosaSpec.from_json(text)


def test_json_may_leave_fields_out() -> None:
    assert RosaSpec.from_json('{"version": 1, "rank": 4}') == RosaSpec(rank=4)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("*.q_proj.weight", "model.layers.0.q_proj.weight", True),
        ("q_proj", "model.layers.0.q_proj.weight", False),
        ("*Q_proj*", "model.q_proj.weight", False),
        ("re:.*layers\\.[01]\\..*", "model.layers.1.fc.weight", True),
        ("re:layers", "model.layers.1.fc.weight", False),
        ("layers.[01].weight", "layers.0.weight", True),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert pattern_matcher(pattern)(name) is matches
