"""The real thing: `torch.compile` with Inductor and nothing else to call. Caches are off unless a test is about them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn
from torch._dynamo.utils import counters, get_compilation_metrics

import rosa_fx
from rosa_fx.kernels.inductor import CustomGraphPass, joint_passes
from rosa_fx.passes.inductor_pass import RosaPass, source_files
from rosa_fx.passes.install import install
from rosa_fx.passes.joint import rewrite

ROOT = Path(__file__).resolve().parent.parent
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.usefixtures("no_caches")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def blocks(width: int = 24, depth: int = 2, **spec: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(depth)))
    return rosa_fx.transform(model, rosa_fx.RosaSpec(**({"rank": 4, "density": 0.05, "schedule": "wl1"} | spec)))


def new_compilations(before: list[Any]) -> int:
    """Compilations since. Dynamo keeps the newest 64 only, so they are told by identity."""
    known = {id(metrics) for metrics in before}
    return sum(id(metrics) not in known for metrics in get_compilation_metrics())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_every_phase_agrees_with_eager_and_compiles_once() -> None:
    model = blocks()
    step = torch.compile(model, fullgraph=True)
    schedule = rosa_fx.MaskSchedule(model)
    optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model))
    phases, compilations = [], []
    for _ in range(5):
        x = torch.randn(6, 24)
        schedule.begin_step()
        phases.append(schedule.phase)
        before = get_compilation_metrics()
        loss = step(x).square().mean()
        loss.backward()
        compilations.append(new_compilations(before))
        if schedule.phase != "collect":
            ours = gradients(model)
            expected = model(x).square().mean()
            expected.backward()
            assert (loss - expected).abs() <= 16 * EPS * expected
            for name, grad in gradients(model).items():
                assert (ours[name] - grad).norm() <= 64 * EPS * grad.norm(), name
                model.get_parameter(name).grad = grad
        optimizer.step()
        optimizer.zero_grad()
        schedule.end_step()
    assert phases == ["low_rank", "collect", "joint", "joint", "joint"]
    assert compilations[3:] == [0, 0], "no recompiles within a phase"
    assert sum(n > 0 for n in compilations) == 3, "one per phase"
    assert not counters["graph_break"]


def test_changed_batch_size_compiles_nothing_under_dynamic() -> None:
    model = blocks(depth=1)
    step = torch.compile(model, dynamic=True)
    step(torch.randn(6, 24)).sum().backward()
    before = get_compilation_metrics()
    for rows in (9, 17):
        step(torch.randn(rows, 24)).sum().backward()
    assert new_compilations(before) == 0


def test_identical_blocks_compile_once() -> None:
    model = blocks(depth=4)
    for block in model:
        block.compile()
    before = counters["stats"]["unique_graphs"]
    model(torch.randn(6, 24, requires_grad=True)).sum().backward()
    assert counters["stats"]["unique_graphs"] - before == 1


def test_user_passes_are_kept_and_run() -> None:
    seen: list[int] = []

    class Mine(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(len(list(graph.nodes)))

        def uuid(self) -> str:
            return "mine"

    mine = Mine()
    with inductor_config.patch(joint_custom_pre_pass=mine):
        model = blocks(depth=1)
        assert joint_passes()[0] is mine
        assert sum(isinstance(p, RosaPass) for p in joint_passes()) == 1
        install()
        assert len(joint_passes()) == 2, "installing again adds nothing"
        torch.compile(model)(torch.randn(3, 24))
    assert seen


def test_compile_options_that_replace_the_passes_stay_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`options` override the configuration while one model compiles; the pass hooks itself in again."""
    counts: list[dict[str, int]] = []
    monkeypatch.setattr("rosa_fx.passes.inductor_pass.rewrite", lambda graph: counts.append(rewrite(graph).counts))
    model = blocks(depth=1)
    x = torch.randn(3, 24)
    step = torch.compile(model, options={"joint_custom_pre_pass": None})
    assert (step(x) - model(x)).norm() <= 64 * EPS * model(x).norm()
    assert counts == [{"linear": 2, "linear_t": 1, "linear_grads": 2, "dense": 0}]


def test_peak_memory_of_a_compiled_step_holds_no_dense_copies() -> None:
    """Between forward and backward nothing as large as a weight is alive beyond the activations."""
    width, depth = 512, 6
    model = blocks(width=width, depth=depth, base="nf4", schedule="lora_only", density=0.0)
    step = torch.compile(model)
    x = torch.randn(4, width)
    step(x).sum().backward()
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True) as profile:
        step(x).sum().backward()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            alive += event.nbytes()
            peak = max(peak, alive)
    one_weight = 2 * width * width * 4
    assert peak < 2.5 * one_weight, f"{peak / one_weight:.2f} dense weights at once, of {2 * depth} in the model"


def test_no_full_precision_copy_survives_transform() -> None:
    import gc
    import weakref

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    alive = [weakref.ref(layer.weight) for layer in model]
    rosa_fx.transform(model, rosa_fx.RosaSpec(rank=2, density=0.01))
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    stored = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if ".base." in name)
    assert stored <= 0.57 * 2 * 64 * 64 + 64, "bytes per base parameter, and a fingerprint"


def test_identity_of_the_pass_covers_every_source(tmp_path: Path) -> None:
    files = {Path(f).name for f in source_files()}
    assert {"joint.py", "fuse_linear.py", "fuse_grads.py", "ops.py", "low_rank.py", "rosa_cpu.cpp", "fourbit.py"} <= files


PROGRAM = """
import sys, torch, rosa_fx
from torch._dynamo.utils import counters
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 16))
rosa_fx.transform(model, rosa_fx.RosaSpec(rank=2, density=0.0, base="keep"))
with torch.no_grad():
    y = torch.compile(model)(torch.ones(3, 16))
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print("RESULT", float(y.sum()), hits)
"""


def test_edited_pass_is_not_served_from_a_stale_cache(tmp_path: Path) -> None:
    """Three processes over one cache: the second hits it, the third runs an edited rewrite and must not."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("rosa_fx", "passes", "kernels"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    environment = os.environ | {"PYTHONPATH": str(source), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}

    def result() -> tuple[float, int]:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM)], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        assert lines, done.stderr[-2000:]
        return float(lines[0].split()[1]), int(lines[0].split()[2])

    first, hits = result()
    assert hits == 0
    again, hits = result()
    assert again == first
    assert hits > 0, "an unchanged pass is served from the cache"
    edited = source / "passes" / "fuse_linear.py"
    text = edited.read_text()
    old = "    new = emit(graph, target, x, bias, *weight)\n"
    assert text.count(old) == 1
    edited.write_text(text.replace(old, old + "    new = emit(graph, aten.mul.Tensor, new, 2.0)\n"))
    doubled, hits = result()
    assert hits == 0
    assert abs(doubled - 2 * first) <= 1e-4 * abs(first)
