"""Two processes under DistributedDataParallel, in a loop of one's own: masks and training are those of one process."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from reference_rosa import D, Pair, Tiny, assert_same_masks, batch, feed_forward, loss_of, spec_of, transcribe
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import together

import rosa_fx
from rosa_fx.kernels.inductor import CustomGraphPass

STEPS = 5
RATE = 0.1


def plain_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Tiny() if name == "attention" else Pair(D, 24, D)


class Recorder(CustomGraphPass):
    """Notes what compiled graphs call. No identity: such graphs are not taken from a cache."""

    def __init__(self) -> None:
        self.calls: set[str] = set()

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls |= {str(node.target) for node in graph.nodes if node.op == "call_function"}

    def uuid(self) -> None:
        return None


def train_in(rank: int, name: str, compiled: str, micro: int, fields: dict[str, Any]) -> dict[str, Any]:
    """In one process: its share of the micro-batches of each step. `compiled`: "", "inside" or "outside" of the wrapper."""
    recorder = Recorder()
    torch._inductor.config.post_grad_custom_post_pass = recorder
    model: Any = plain_model(name)
    torch.manual_seed(rank)  # the adapters of the processes are not alike at first
    rosa_fx.transform(model, spec_of(**fields))
    inner = torch.compile(model) if compiled == "inside" else model
    # The smallest buckets: where it can, Dynamo splits the graph at every one of them.
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000
    wrapper: nn.Module = DistributedDataParallel(inner, bucket_cap_mb=0.001)
    schedule = rosa_fx.MaskSchedule(wrapper)
    first = {key: tensor.clone() for key, tensor in rosa_fx.adapter_state(model).items()}
    call = torch.compile(wrapper) if compiled == "outside" else wrapper
    optimizer = torch.optim.SGD(rosa_fx.trainable_parameters(model, RATE, RATE))
    held = 0
    for step in range(STEPS):
        schedule.begin_step()
        collection = schedule._collection
        for index in range(micro):
            x = batch(step, 2 * index + rank)
            loss_of(call(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.end_step()
        held = collection.order.held if collection is not None else held
    return {
        "first": first,
        "state": {key: tensor.clone() for key, tensor in rosa_fx.adapter_state(model).items()},
        "held": held,
        "calls": recorder.calls,
        "breaks": dict(torch._dynamo.utils.counters["graph_break"]),
        "sent": [
            name for name, _ in wrapper.named_parameters() if name.removeprefix("module.") not in wrapper.parameters_to_ignore
        ],
        "buffers": [name for name, _ in wrapper.named_module_buffers],
    }


def oracle_of(name: str, first: dict[str, Tensor], micro: int, fields: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A transformed model of one process that starts alike, and the float64 transcription after the same steps."""
    plain = plain_model(name)
    spec = spec_of(**fields)
    model = rosa_fx.transform(copy.deepcopy(plain), spec)
    rosa_fx.load_adapter_state(model, first)
    oracle = transcribe(model, plain, spec, torch.float64)
    optimizer = torch.optim.SGD(oracle.groups(RATE, RATE))
    for step in range(STEPS):
        batches = [batch(step, number) for number in range(2 * micro)]
        oracle.step(batches, lambda out, x: loss_of(out, x) / 2, optimizer)
    return model, oracle


@pytest.mark.parametrize(
    ("name", "compiled", "micro", "fields"),
    [
        ("attention", "", 1, {}),
        ("attention", "", 2, {"num_grads": 2, "grad_mode": "mean"}),
        ("pair", "inside", 1, {"base": "nf4"}),
        ("pair", "outside", 1, {"grad_mode": "mean", "schedule": "wl2"}),
    ],
)
def test_as_one_process(name: str, compiled: str, micro: int, fields: dict[str, Any]) -> None:
    results = together(train_in, name, compiled, micro, fields)
    states = [result["state"] for result in results]
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), f"{key} differs between the processes"
    model, oracle = oracle_of(name, results[0]["first"], micro, fields)
    rosa_fx.load_adapter_state(model, states[0])
    assert_same_masks(model, oracle)
    for key, weight in oracle.weights.items():
        mine = rosa_fx.adapter(model, key)
        assert mine.low_rank is not None
        assert mine.sparse is not None
        ours = [mine.low_rank.A, mine.low_rank.B, mine.sparse.mask.to_dense() * 0.0]
        theirs = [weight.A, weight.B, weight.S * weight.mask]
        ours[2][mine.sparse.mask.rows(), mine.sparse.mask.cols.long()] = mine.sparse.values.detach()
        for part, exact in zip(ours, theirs, strict=True):
            assert (part - exact).abs().max() <= 1e-5 * exact.abs().max(), key
        assert weight.S.abs().max() > 0, "sparse values have trained"
    for result in results:
        if compiled:
            calls = {call.removeprefix("rosa_fx.").removesuffix(".default") for call in result["calls"] if "rosa_fx" in call}
            assert {"linear", "linear_grads"} <= calls
            assert not {"materialize", "materialize_backward"} & calls, "no dense weight or gradient"
        if compiled == "inside":
            assert result["breaks"] == {}
        assert result["buffers"] == []
        assert {name.rsplit(".", 1)[1] for name in result["sent"]} - {"bias"} == {"A", "B"}
        if micro == 1:
            assert result["held"] <= 4, "few layers' gradients at a time"


def refuse_in(rank: int, kind: str) -> str | None:
    """What one process is told when rank 1 brings something that does not fit."""
    torch.manual_seed(rank if kind == "base" else 0)
    model: Any = feed_forward()
    rosa_fx.transform(model, spec_of(schedule="wl0", num_grads=2 if kind == "late" else 1))
    if kind == "mask":
        rosa_fx.set_masks(model, {"0.weight": first_entries(rank, rosa_fx.adapter(model, "0.weight"))})
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    before = rosa_fx.adapter_state(model)
    schedule.begin_step()
    x = batch(0, rank)
    for _ in range(2 if kind == "parts" and rank == 1 else 1):
        loss_of(model(x * float("nan") if kind in ("nan", "late") and rank == 1 else x), x).backward()
    try:
        schedule.end_step()
    finally:
        assert rosa_fx.masks(model) == {}
        assert all(torch.equal(before[key], tensor) for key, tensor in rosa_fx.adapter_state(model).items())
    return None


def first_entries(shift: int, weight: Any) -> Tensor:
    flat = torch.zeros(weight.matrix[0] * weight.matrix[1], dtype=torch.bool)
    flat[shift : shift + weight.sparse.values.numel()] = True
    return flat.view(weight.matrix)


def refuse_all(rank: int) -> list[str]:
    found = []
    for kind in ("nan", "late", "parts", "base", "mask"):
        try:
            found.append(str(refuse_in(rank, kind)))
        except rosa_fx.RosaError as error:
            found.append(str(error))
    return found


def test_all_are_told() -> None:
    """What is wrong in one process stops both, with its rank and the weight."""
    first, second = together(refuse_all)
    assert first == second
    nan, late, parts, base, mask = first
    assert nan.startswith("rank 1: 0.weight: its gradient holds NaN or infinity")
    assert late.startswith("rank 1: 0.weight: its gradient holds NaN or infinity")
    assert parts.startswith("rank 1: 0.weight: its gradient arrived in 2 parts while 1 backward call(s) were")
    assert base.startswith("rank 1: the base weight 0.weight is not that of rank 0")
    assert mask.startswith("rank 1: the mask of 0.weight is not that of rank 0")


def merged_in(rank: int) -> list[str]:
    model: Any = rosa_fx.transform(plain_model("pair"), spec_of())
    model._ddp_params_and_buffers_to_ignore.insert(0, "other")
    rosa_fx.merge(model)
    return model._ddp_params_and_buffers_to_ignore


def test_merged_model_is_all_seen() -> None:
    assert merged_in(0) == ["other"]


class Branches(nn.Module):
    """Layers of which a micro-batch may leave some out, as experts that none of its rows chose."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D, bias=False) for _ in range(6)])

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        for index in used:
            x = x + torch.tanh(self.layers[index](x))
        return x


USED = [[0, 1, 5], [0, 2, 3, 4]]


def uneven_in(rank: int) -> tuple[dict[str, Tensor], float]:
    torch.manual_seed(0)
    model: Any = rosa_fx.transform(Branches(), spec_of(schedule="wl0"))
    wrapper = DistributedDataParallel(model, find_unused_parameters=True)
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    started = time.monotonic()
    for step in range(2):
        schedule.begin_step()
        x = batch(step, rank)
        loss_of(wrapper(x, USED[rank]), x).backward()
        schedule.end_step()
    found = {name: mask.to_dense() for name, mask in rosa_fx.masks(model).items()}
    found |= {f"{name} gradient": rosa_fx.adapter(model, name).sparse.values.grad for name in found}
    return found, time.monotonic() - started


def test_weights_that_some_do_not_use() -> None:
    """No process waits for good for what another never has."""
    (first, seconds), (second, _) = together(uneven_in)
    assert len(first) == 12
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert seconds < 30
