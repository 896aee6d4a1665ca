"""examples/bench_gpu.py and bench_gpu_model.py in their CPU modes, and what is done with a wrong result."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from other_process import ROOT, run_python

SCRIPT = ROOT / "examples" / "bench_gpu.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    return run_python(script, *arguments)


def test_a_trial_run_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    options = ["--rank=4", "--density=0.05", "--dtype=fp32", "--repeats=3", "--device=cpu", f"--out={out}"]
    done = run("--shapes", "96x64", "--rows", "5", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    with out.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    contenders = ["dense", "rosa_fx composed"]
    if importlib.util.find_spec("peft"):
        contenders.insert(1, "bitsandbytes+peft")
    for name in ("forward", "forward+backward"):
        timed = [line for line in lines if line["pass"] == name]
        assert [line["contender"] for line in timed] == contenders
        assert all(float(line["quartile1_ms"]) <= float(line["median_ms"]) <= float(line["quartile3_ms"]) for line in timed)
        assert timed[0]["times_dense"] == "1.000"
        assert 0 < float(timed[-1]["error_ratio"]) <= 1.1
    assert {"rosa_fx triton": "Triton kernels need a GPU"}.items() <= {
        line["contender"]: line["note"] for line in lines if not line["pass"]
    }.items()
    assert all(line["gpu"] == "cpu" and line["torch"] == torch.__version__ and line["driver"] for line in lines)
    assert {(line["n"], line["k"], line["m"], line["rank"], line["density"]) for line in lines} == {
        ("96", "64", "5", "4", "0.05")
    }


def test_a_trial_run_of_a_model(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    out = tmp_path / "model.csv"
    options = ["--model=llama-tiny", "--tokens=2x16", "--rounds=2", "--device=cpu", f"--out={out}"]
    done = run(*options, script=SCRIPT.with_name("bench_gpu_model.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    with out.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["peer"].split(",")[0] for line in lines] == ["floor: frozen model", "PEFT LoRA", "QLoRA", "QLoRA", "QRoSA"]
    assert lines[0]["x floor"] == "1.0"
    assert all(float(line["ms q1"]) <= float(line["ms"]) <= float(line["ms q3"]) for line in lines)


@pytest.mark.parametrize("part", ["forward", "gradient"])
def test_a_wrong_result_is_noticed(bench: ModuleType, part: str) -> None:
    layer = bench.make_layer(48, 64, 9, 4, 0.0, torch.bfloat16, "cpu")
    right = bench.dense(layer)
    assert bench.error_ratio(right, layer) <= bench.ERROR_LIMIT
    weight = layer.weight.clone()
    weight[3, 5] += 0.1
    # The second gives the right value with the gradient of a wrong weight.
    wrong = torch.nn.functional.linear
    module = {
        "forward": lambda x: wrong(x, weight),
        "gradient": lambda x: wrong(x, weight) + (wrong(x, layer.weight) - wrong(x, weight)).detach(),
    }[part]
    contender = bench.Contender("wrong", module, [], layer.weight, adapted=False)
    assert bench.error_ratio(contender, layer) > bench.ERROR_LIMIT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu", "--shapes", "4096"], "'4096' is not NxK"),
        (["--device", "cpu", "--repeats", "1"], "--repeats takes 2 or more"),
        (["--device", "cpu", "--profile"], "--profile needs a GPU"),
    ],
)
def test_bad_arguments(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
    with pytest.raises(SystemExit):
        bench.main()
    assert said in capsys.readouterr().err
