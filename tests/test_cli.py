"""The command line, run on a tiny Llama with a tiny tokenizer."""

from __future__ import annotations

import copy
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import save_chat_model
from other_process import run_python
from rewritten_models import FLOAT32, assert_budget
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import rosa_fx
from rosa_fx import compile_blocks
from rosa_fx.cli import app
from rosa_fx.cli import demo as demo_module
from rosa_fx.cli.common import resume_command
from rosa_fx.cli.demo import choose_out
from rosa_fx.data import docstring_rows
from rosa_fx.errors import RosaError

TINY = ["--rank", "2", "--density", "0.05", "--dtype", "float32", "--device", "cpu", "--no-download"]
QUICK = [*TINY, "--no-compile", "--max-steps", "4", "--schedule", "wl1", "--batch", "2", "--max-length", "64"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows: list[Any] = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(10)]
    rows += [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 10
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def trained(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs") / "a"
    return out, run("train", "-m", model_dir, "-d", data, "-o", out, *QUICK, "--eval-share", "0.2").output


def test_help_names_every_command_and_loads_no_torch() -> None:
    assert all(name in run("--help").output for name in ("demo", "train", "report", "explain", "merge"))
    for name in ("demo", "train", "report", "explain", "merge"):
        assert "Example" in run(name, "--help").output
    imports = "import sys, rosa_fx.cli.app, rosa_fx.report_picture"
    code = f"{imports}; print(any(m in sys.modules for m in ('transformers', 'matplotlib')))"
    done = run_python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_train_writes_adapter_curve_and_metrics(trained: tuple[Path, str]) -> None:
    out, output = trained
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((out / "adapter").iterdir())
    events = [json.loads(line)["event"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert events.count("step") == 4
    assert events.count("eval") == 2
    for word in ("held-out loss", "trainable, low-rank", "trainable, sparse", "tokens/s", "peak memory", "16 rows"):
        assert word in one_line(output)


def test_the_saved_adapter_is_what_was_trained(trained: tuple[Path, str], model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    rosa_fx.load_adapter(model, trained[0] / "adapter")
    name = "model.layers.0.mlp.up_proj.weight"
    assert rosa_fx.adapter(model, name).low_rank.B.abs().max() > 0
    assert int(rosa_fx.masks(model)[name].row_offsets[-1]) == int(0.05 * 128 * 64)


def test_a_run_is_neither_overwritten_nor_mixed(trained: tuple[Path, str], model_dir: Path, data: Path) -> None:
    out, _ = trained
    result = run("train", "-m", model_dir, "-d", data, "-o", out, *QUICK, code=1)
    assert "already holds a run: add --resume" in one_line(result.output)
    before = load_file(next((out / "adapter").glob("*.safetensors")))
    run("train", "-m", model_dir, "-d", data, "-o", out, *QUICK, "--eval-share", "0.2", "--resume")
    after = load_file(next((out / "adapter").glob("*.safetensors")))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_interrupted_run_says_how_to_go_on(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: tuple[Path, str]
) -> None:
    from rosa_fx.training.engine import Engine

    out, calls, accumulate = tmp_path / "b", [0], Engine.accumulate

    def press_ctrl_c(self: Engine, group: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return accumulate(self, group)

    arguments = ["train", "-m", str(model_dir), "-d", str(data), "-o", str(out), *QUICK, "--eval-share", "0.2"]
    monkeypatch.setattr(sys, "argv", ["rosa-fx", *arguments])
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "accumulate", press_ctrl_c)
        output = one_line(run(*arguments, code=130).output)
    assert "nterrupted after step 3" in output
    assert "rosa-fx train" in output
    assert "--resume" in output
    run(*arguments, "--resume")
    resumed, whole = (load_file(next((d / "adapter").glob("*.safetensors"))) for d in (out, trained[0]))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_sigterm_ends_a_run_with_its_own_exit_code(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: tuple[Path, str]
) -> None:
    from rosa_fx.training.engine import Engine

    calls, accumulate = [0], Engine.accumulate

    def terminate(self: Engine, group: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            signal.raise_signal(signal.SIGTERM)
        return accumulate(self, group)

    arguments = ["train", "-m", str(model_dir), "-d", str(data), "-o", str(tmp_path / "b"), *QUICK, "--eval-share", "0.2"]
    monkeypatch.setattr(sys, "argv", ["rosa-fx", *arguments])
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "accumulate", terminate)
        output = one_line(run(*arguments, code=143).output)
    assert "Terminated. Interrupted after step 2; go on with: rosa-fx train" in output
    run(*arguments, "--resume")
    resumed, whole = (load_file(next((d / "adapter").glob("*.safetensors"))) for d in (tmp_path / "b", trained[0]))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_long_rows_and_bad_steps_are_treated_as_asked(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rosa_fx.training.engine import Engine

    arguments = ["train", "-m", model_dir, "-d", data, *QUICK, "--max-length", "16", "--eval-share", "0"]
    result = run(*arguments, "-o", tmp_path / "a", "--long-rows", "refuse", code=1)
    assert "tokens, more than max_length=16: shorten it" in one_line(result.output)
    calls, loss = [0], Engine.loss

    def bad(self: Engine, batch: Any) -> torch.Tensor:
        calls[0] += 1
        return loss(self, batch) * (float("nan") if calls[0] == 1 else 1.0)

    monkeypatch.setattr(Engine, "loss", bad)
    output = one_line(run(*arguments, "-o", tmp_path / "b", "--long-rows", "drop", "--on-nonfinite", "skip").output)
    assert "dropped (longer than 16 tokens)" in output
    assert "skipped steps" in output
    calls[0] = 0
    result = run(*arguments, "-o", tmp_path / "c", "--long-rows", "drop", code=1)
    assert "step 1 (low_rank): the loss is nan" in one_line(result.output)


def test_merge_gives_an_ordinary_model(trained: tuple[Path, str], model_dir: Path, tmp_path: Path) -> None:
    arguments = ["merge", "-m", model_dir, "-a", trained[0] / "adapter", "-o", tmp_path / "merged", "--dtype", "float32"]
    run(*arguments)
    assert "is not empty: add --overwrite" in one_line(run(*arguments, code=1).output)
    run(*arguments, "--overwrite")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    rosa_fx.load_adapter(adapted, trained[0] / "adapter").eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        actual, plain, truth = (model(input_ids=ids).logits for model in (merged, adapted, copy.deepcopy(adapted).double()))
    assert_budget([actual], [plain], [truth], FLOAT32)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_merge_into_the_same_format(trained: tuple[Path, str], model_dir: Path, tmp_path: Path) -> None:
    arguments = ["merge", "-m", model_dir, "-a", trained[0] / "adapter", "-o", tmp_path / "merged", "--dtype", "float32"]
    printed = run(*arguments, "--into", "same").output
    assert len(re.findall(r"model\.layers\.\d\..*_proj\.weight +nf4", printed)) == 2 * 7
    assert "largest error" in printed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.is_loaded_in_4bit
    adapted = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    report = rosa_fx.merge(rosa_fx.load_adapter(adapted, trained[0] / "adapter"), into="same")
    assert f"{report.error:.2%} of the weight" in one_line(printed)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        assert torch.equal(merged.get_submodule(name).weight.data, adapted.get_submodule(name).weight.data)


def test_explain_accounts_for_every_weight(model_dir: Path, data: Path, tmp_path: Path) -> None:
    report = json.loads(run("explain", "-m", model_dir, "-d", data, "--json", *TINY).stdout)
    assert len(report["targets"]) == 2 * 7
    assert {target["status"] for target in report["targets"]} == {"fused"}
    assert report["graph_breaks"] == 0
    picture = tmp_path / "model.svg"
    table = run("explain", "-m", model_dir, *TINY, "--target", "*up_proj*", "--picture", picture).output
    assert picture.read_bytes().startswith(b"<?xml")
    assert "is an .svg or a .png file" in one_line(run("explain", "-m", model_dir, "--picture", "model.gif", code=1).output)
    assert "model.layers.1.mlp.up_proj.weight" in table
    assert "2 targets: 2 fused" in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"-m": "./nowhere"}, "model './nowhere': no such directory"),
        ({"-d": "nowhere.jsonl"}, "'nowhere.jsonl' cannot be read"),
        ({"--schedule": "warm"}, "schedule must be"),
        ({"--device": "toaster"}, "--device 'toaster'"),
        ({"--target": "nothing.*"}, "nothing.*"),
        ({"--lr": "nan"}, "TrainConfig.lr is nan"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    model_dir: Path, data: Path, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    given = {"-m": str(model_dir), "-d": str(data), "-o": str(tmp_path / "out"), **change}
    result = run("train", *(part for pair in given.items() for part in pair), "--no-download", code=1)
    assert message in one_line(result.output)
    assert result.output.count("\n") <= 3  # the line itself, and what was said of the data before
    assert "Traceback" not in result.output


def test_a_tokenizer_of_another_model_is_noticed(model_dir: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / name).write_bytes((model_dir / name).read_bytes())
    result = run("train", "-m", other, "-d", data, "-o", tmp_path / "out", *QUICK, code=1)
    assert "embedding has 20 rows: the tokenizer belongs to another model" in one_line(result.output)


def test_the_demo_runs_from_end_to_end(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Path(json.__file__).parent.parent
    (tmp_path / "library").mkdir()
    for name in ("heapq.py", "textwrap.py", "configparser.py", "queue.py"):  # two for each side of the split
        (tmp_path / "library" / name).write_bytes((library / name).read_bytes())
    monkeypatch.setattr(demo_module, "docstring_rows", lambda: docstring_rows(stdlib=tmp_path / "library"))
    sizes = ["--steps", "4", "--batch", "2", "--max-length", "256", "--held-out", "2", "--no-compile", "--lr", "0.02"]
    output = run("demo", "-m", model_dir, "-o", tmp_path / "demo", *TINY, *sizes).output
    for word in ("reloaded adapter", "answer before", "answer after", "tokens/s", "peak memory", "trainable, sparse"):
        assert word in one_line(output)
    assert (tmp_path / "demo" / "loss.png").is_file()
    assert any((tmp_path / "demo" / "adapter").iterdir())


def test_demos_do_not_overwrite_each_other(tmp_path: Path) -> None:
    first = tmp_path / "demo"
    assert choose_out(first, False) == choose_out(first, True) == first
    first.mkdir()
    assert choose_out(first, False) == tmp_path / "demo-2"
    assert choose_out(first, True) == first
    (tmp_path / "demo-2").mkdir()
    assert choose_out(first, False) == tmp_path / "demo-3"
    assert choose_out(first, True) == tmp_path / "demo-2"


def test_the_hint_is_the_command_itself() -> None:
    assert resume_command(["train", "-o", "a b"], Path("a b")) == "rosa-fx train -o 'a b' --resume"
    assert resume_command(["demo"], Path("runs/demo-2")) == "rosa-fx demo --out runs/demo-2 --resume"
    assert resume_command(["demo", "--out=x", "--resume"], Path("x")) == "rosa-fx demo --out=x --resume"


def test_blocks_share_one_graph_per_mode(model_dir: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.config.use_cache = False
    rosa_fx.transform(model, rosa_fx.RosaSpec(rank=2, density=0.05))
    ids = torch.arange(12).reshape(2, 6)
    expected = model(input_ids=ids, labels=ids).loss
    assert compile_blocks(model, "aot_eager") == 2
    counters.clear()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_model_without_blocks_is_compiled_whole() -> None:
    with pytest.raises(RosaError, match="compile the whole model"):
        compile_blocks(nn.Linear(2, 2))
