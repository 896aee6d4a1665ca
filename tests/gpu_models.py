"""Whole models on a GPU, from `transform` to a saved adapter. Run by `test_gpu.py`, with and without ROSA_FX_TRITON=1."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build_case
from test_op_budget import all_results, over_budget, rms
from torch import Tensor, nn
from torch._dynamo.utils import counters
from trainer_models import VOCAB, llama

import rosa_fx
from rosa_fx.state import state_of

GPU = torch.device("cuda")
SPEC: dict[str, Any] = {"base": "nf4", "rank": 8, "alpha": 16, "density": 0.02, "schedule": "wl2"}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def on_gpu(case: Any) -> Any:
    moved = copy.copy(case)
    moved.base, moved.delta = ([tensor.to(GPU) for tensor in tensors] for tensors in (case.base, case.delta))
    moved.x, moved.dy, moved.bias = case.x.to(GPU), case.dy.to(GPU), case.bias.to(GPU)
    return moved


# --- operators as they are, without Inductor ----------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("how", ["fused", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("base", "double_quant"), [("dense", False), ("nf4", False), ("nf4", True), ("fp4", False), ("int8", False)], ids=str
)
def test_operators_keep_the_error_budget(base: str, double_quant: bool, dtype: torch.dtype, how: str) -> None:
    case = on_gpu(build_case((96, 192), base, double_quant=double_quant, rank=12, mask=0.1, m=160, dtype=dtype))
    exact, ours, plain = (all_results(case, each) for each in ("exact", how, "plain"))
    # float32 products of the vendor's library round by how they are split, which depends on their sizes.
    times = 2.0 if dtype == torch.float32 else 1.1
    failures = {name: over_budget(exact[name], ours[name], plain[name], times) for name in exact}
    assert not any(failures.values()), {name: text for name, text in failures.items() if text}


def test_weights_are_quantised_as_on_the_cpu() -> None:
    """As well as there: a weight between two codes may get either."""
    weight = torch.randn(256, 320)
    for kind in ("nf4", "fp4", "int8"):
        form = build_case((256, 320), kind).layout.base
        here, there = ([t.cpu() for t in form.quantize(weight.to(device))] for device in ("cpu", "cuda"))
        errors = [(form.dequantize(each, (256, 320), torch.float32) - weight).square().mean() for each in (here, there)]
        assert abs(errors[1] / errors[0] - 1) < 1e-4


# --- models -------------------------------------------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float32, **spec: Any) -> nn.Module:
    """A Llama of two blocks on the GPU with masks and adapters that are not zero."""
    model: nn.Module = llama(hidden=128, attention_dropout=0.0, num_key_value_heads=4).to(dtype)
    model.config.use_cache = False  # type: ignore[union-attr]
    rosa_fx.transform(model, rosa_fx.RosaSpec(**{**SPEC, **spec}))
    return model.to(GPU)


def batch(rows: int = 4, length: int = 24, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed)).to(GPU)
    return {"input_ids": ids, "labels": ids}


def filled(model: nn.Module) -> nn.Module:
    """Random masks, and values in every adapter."""
    generator = torch.Generator().manual_seed(1)
    chosen = {}
    for name, weight in state_of(model).weights.items():
        assert weight.sparse is not None
        flat = torch.zeros(weight.shape[0] * weight.shape[1], dtype=torch.bool)
        flat[torch.randperm(flat.numel(), generator=generator)[: weight.sparse.values.numel()]] = True
        chosen[name] = flat.view(weight.shape).to(GPU)
    rosa_fx.set_masks(model, chosen)
    rosa_fx.MaskSchedule(model).begin_step()
    with torch.no_grad():
        for name, tensor in rosa_fx.adapter_state(model).items():
            if tensor.is_floating_point() and not name.endswith("low_rank.A"):
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
    return model


def gradients(model: nn.Module, run: Callable[..., Any], data: dict[str, Tensor]) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    output = run(**data)
    return [output.logits, *torch.autograd.grad(output.loss, parameters)]


def exact_copy(model: nn.Module) -> nn.Module:
    """The model in float64, in eager mode."""
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}, {"mode": "max-autotune-no-cudagraphs"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_models_are_as_exact_as_eager_ones(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Logits and every gradient, against the same in float64; CUDA graphs hold all of it."""
    model = filled(small(dtype))
    data = batch()
    exact, plain = (gradients(each, each, data) for each in (exact_copy(model), model))
    compiled = torch.compile(model, fullgraph=True, **options)
    for _ in range(3 if options.get("mode") == "reduce-overhead" else 1):
        torch.compiler.cudagraph_mark_step_begin()
        ours = [result.clone() for result in gradients(model, compiled, data)]
    for got, usual, want in zip(ours, plain, exact, strict=True):
        # Sums in another order; roundings of a network of this depth differ by chance.
        floor = 16 * torch.finfo(dtype).eps * rms(want)
        assert rms(got - want) <= max(1.1 * rms(usual - want), floor)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_steps_wait_for_nothing_and_compile_nothing() -> None:
    """After the masks: forward, backward and optimizer, enqueued without one wait of the host for the device."""
    model = small(torch.bfloat16)
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    compiled = torch.compile(model, fullgraph=True)
    optimizer = rosa_fx.optimizer_for(model)
    data = batch()

    def step() -> None:
        schedule.begin_step()
        compiled(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.end_step()

    for _ in range(5):
        step()
    assert schedule.phase == "joint"
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("micro", [1, 2])
def test_schedule_and_masks_are_those_of_the_cpu(micro: int) -> None:
    """The same transformed model trained on both devices in float32: losses, and nearly every entry of every mask."""
    first = small(grad_mode="mean_squared")
    models = {"cpu": copy.deepcopy(first).cpu(), "cuda": first}
    losses: dict[str, list[float]] = {}
    for device, model in models.items():
        schedule = rosa_fx.MaskSchedule(model, micro_batches=micro)
        run = torch.compile(model) if device == "cuda" else model
        optimizer = torch.optim.SGD(rosa_fx.trainable_parameters(model, lr=0.5, lr_sparse=0.5))
        losses[device] = []
        for step in range(5):
            schedule.begin_step()
            for number in range(micro):
                data = {key: value.to(device) for key, value in batch(seed=10 * step + number).items()}
                loss = run(**data).loss
                (loss / micro).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.end_step()
            losses[device].append(loss.item())
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
    ours, theirs = (rosa_fx.masks(model) for model in (models["cuda"], models["cpu"]))
    for name, mask in ours.items():
        assert mask.cols.is_cuda
        kept, wanted = mask.to_dense().cpu(), theirs[name].to_dense()
        assert (kept & wanted).sum() >= 0.98 * wanted.sum(), name


def test_trainer_adapter_and_merge(tmp_path: Path) -> None:
    """`rosa_fx.train` on the GPU; the adapter's files give the same model there, and on the CPU nearly the same."""
    model = small(torch.bfloat16)
    fresh = copy.deepcopy(model)
    data = [batch(seed=seed) for seed in range(2)]
    config = rosa_fx.TrainConfig(max_steps=12, lr=0.01, lr_sparse=0.002, warmup_steps=1, log_every=4, progress=False)
    result = rosa_fx.train(model, data, config, out=tmp_path / "run")
    assert result.losses[-1] < 0.9 * result.losses[0]
    rosa_fx.save_adapter(model, tmp_path / "adapter")
    rosa_fx.load_adapter(fresh, tmp_path / "adapter")
    with torch.no_grad():
        trained = model.eval()(**data[0])
        assert torch.equal(trained.logits, fresh.eval()(**data[0]).logits)
        there = fresh.cpu()(**{key: value.cpu() for key, value in data[0].items()})
        assert there.loss.item() == pytest.approx(trained.loss.item(), rel=0.02)
        rosa_fx.merge(model)
        assert model(**data[0]).loss.item() == pytest.approx(trained.loss.item(), rel=0.05)


def test_eight_bit_adam_and_checkpoints(tmp_path: Path) -> None:
    """A stopped and resumed run gives the bits of an uninterrupted one."""
    data = [batch(seed=seed) for seed in range(4)]
    common: dict[str, Any] = {"max_steps": 6, "progress": False, "optimizer": "adamw8bit", "compile": False, "warmup_steps": 1}
    whole, stopped, resumed = small(), small(), small()
    rosa_fx.train(whole, data, rosa_fx.TrainConfig(**common))
    rosa_fx.train(stopped, data, rosa_fx.TrainConfig(**common, stop_at_step=4), out=tmp_path)
    rosa_fx.train(resumed, data, rosa_fx.TrainConfig(**common), out=tmp_path, resume=True)
    for name, tensor in rosa_fx.adapter_state(whole).items():
        assert torch.equal(tensor, rosa_fx.adapter_state(resumed)[name]), name


def peak(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_of_a_step(compiled: bool) -> None:
    """One dense weight at a time, no dense gradient, and nothing of that size is kept between forward and backward."""
    size = 2048
    dense = size * size * 2
    model = nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=torch.bfloat16) for _ in range(4))).to(GPU)
    with_dense = torch.cuda.memory_allocated()
    transforming = peak(lambda: rosa_fx.transform(model, rosa_fx.RosaSpec(**SPEC, targets="*.weight")))
    # One float32 copy and its codes; the dense weights go one by one.
    assert transforming <= 4 * dense
    kept = [*model.parameters(), *model.buffers()]
    slack = 64 << 10  # the allocator rounds each of them up
    assert torch.cuda.memory_allocated() <= with_dense - 4 * dense + sum(tensor.nbytes for tensor in kept) + slack
    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    run: Any = torch.compile(model) if compiled else model
    x = torch.randn(32, size, device=GPU, dtype=torch.bfloat16)

    def step() -> None:
        schedule.begin_step()
        F.mse_loss(run(x), x).backward()
        model.zero_grad(set_to_none=True)
        schedule.end_step()

    for _ in range(4):
        step()
    small_things = 24 * x.nbytes + 16 * size * size * 0.02 * 4
    # In eager mode the factors of the sampled product are gathered, in bf16 and in float32, and multiplied: a piece at a time.
    piece = 0 if compiled else 16 * min(len(x) * int(0.02 * size * size), 4 << 20)
    assert peak(step) <= 1.3 * dense + small_things + piece


def test_mask_step_needs_one_gradient() -> None:
    size = 2048
    model = nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=torch.bfloat16) for _ in range(3))).to(GPU)
    rosa_fx.transform(model, rosa_fx.RosaSpec(**{**SPEC, "schedule": "wl0"}, targets="*.weight"))
    run = torch.compile(model)
    x = torch.randn(32, size, device=GPU, dtype=torch.bfloat16)

    def backward() -> None:
        F.mse_loss(run(x), x).backward()
        model.zero_grad(set_to_none=True)

    backward()
    plain = peak(backward)
    for _ in range(2):
        schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
        schedule.begin_step()
        masking = peak(backward)
        schedule.end_step()
        for weight in state_of(model).weights.values():
            assert weight.sparse is not None
            weight.sparse.has_mask = False
    # Its float32 magnitudes, and what selects among them.
    assert masking - plain <= 3 * 4 * size * size


def test_models_of_bitsandbytes_are_taken_over() -> None:
    """`Linear4bit` on the GPU: its codes become the base, and the compiled model computes what it computed."""
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(256, 512, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)).to(GPU)
    x = torch.randn(40, 256, device=GPU, dtype=torch.bfloat16)
    before = model(x)
    rosa_fx.transform(model, rosa_fx.RosaSpec(**{**SPEC, "base": "keep"}, targets="*.weight"))
    with torch.no_grad():
        after = torch.compile(model, fullgraph=True)(x)
    assert rms(after - before) <= 2.0**-8 * rms(before)
