"""The examples and the README do what they say: run as a user runs them, and compared with the code they describe."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

import pytest
import torch
from other_process import ROOT, run_python
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import rosa_fx
from rosa_fx.cli import app
from rosa_fx.models import default_dtype

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def run(*arguments: str | Path, cwd: Path, **variables: str) -> str:
    """Standard output of `python *arguments`, run in `cwd`."""
    done = run_python(*arguments, cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


# --- examples ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a tokenizer that knows single characters only."""
    folder = tmp_path_factory.mktemp("model")
    words = list(dict.fromkeys(["<s>", "</s>", "?", *map(chr, range(33, 127))]))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(words[:2])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?", chat_template=TEMPLATE).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=1, **sizes)).save_pretrained(folder)
    return folder


def test_quickstart(model_dir: Path, tmp_path: Path) -> None:
    # The other examples, and the tests of the command line, compile; five graphs of a block here would take a minute.
    printed = run(ROOT / "examples" / "quickstart.py", model_dir, "7", cwd=tmp_path, TORCH_COMPILE_DISABLE="1")
    ((before, after),) = re.findall(r"held-out loss (\d+\.\d+) -> (\d+\.\d+), adapter in runs/quickstart", printed)
    assert float(after) < float(before)
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=default_dtype())
    rosa_fx.load_adapter(model, tmp_path / "runs" / "quickstart")
    assert len(rosa_fx.masks(model)) == 14, "seven weights in each of two blocks"


def test_hf_trainer(tmp_path: Path) -> None:
    program = ROOT / "examples" / "hf_trainer.py"
    printed = run(program, "--steps", "8", "--out", "run", cwd=tmp_path)
    before, after = numbers(r"phase joint after 8 steps, loss (\d+\.\d+) -> ", printed) + numbers(r" -> (\d+\.\d+)", printed)
    assert after < before
    assert "the merged model generates the same: True; adapter and merged model in run" in printed
    assert (tmp_path / "run" / "checkpoint-4" / "rosa_schedule.safetensors").is_file()
    model = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert model.config.vocab_size == 256


def test_sft_trainer(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    printed = run(ROOT / "examples" / "sft_trainer.py", "--out", "run", cwd=tmp_path)
    before, after = numbers(r"phase joint after 8 steps, loss (\d+\.\d+) -> ", printed) + numbers(r" -> (\d+\.\d+)", printed)
    assert after < before
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_own_loop(tmp_path: Path) -> None:
    printed = run(ROOT / "examples" / "own_loop.py", "--steps", "24", "--out", "adapter", cwd=tmp_path)
    assert re.findall(r"step (\d+): (\w+)", printed) == [("0", "low_rank"), ("6", "collect"), ("7", "joint"), ("23", "joint")]
    losses = numbers(r"loss (\d+\.\d+)", printed)
    assert losses[-1] < losses[0]
    (sparse,) = numbers(r"sparse: (\d+) parameters", printed)
    assert f"{sparse:.0f} entries in the masks; adapter in adapter" in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_not_hugging_face(tmp_path: Path) -> None:
    # Two steps: one that collects and one with both terms; the example before this one goes through all phases.
    printed = run(ROOT / "examples" / "not_hugging_face.py", "--steps", "2", "--blocks", "1", cwd=tmp_path)
    assert re.findall(r"^blocks\.0\.(\w+) .* (\w+)$", printed, flags=re.MULTILINE) == [
        ("qkv", "fused"),
        ("attention_out", "fused"),
        ("up", "fused"),
        ("down", "fused"),
    ]
    assert "4 targets: 4 fused, 0 dense, 0 unused; 0 graph breaks, 0 recompiles" in printed
    first, last = numbers(r"loss (\d+\.\d+)", printed)
    assert last < first
    (difference,) = numbers(r"outputs differ by at most (\S+)", printed)
    assert "merged: Parameters again" in printed
    assert difference < 1e-3


@pytest.mark.parametrize(
    ("example", "targets"),
    [
        ("mixer", ["mix_in", "mix_out", "widen.weight", "narrow.weight"]),
        ("state_space", [f"blocks.{i}.{name}" for i in range(2) for name in ("packed", "carry")]),
    ],
)
def test_odd_models(example: str, targets: list[str], tmp_path: Path) -> None:
    # What `explain` captures is rewritten; the steps run without generated code, which would take most of a minute.
    printed = run(ROOT / "examples" / f"{example}.py", "--steps", "9", "--eager", cwd=tmp_path)
    assert re.findall(r"^(\S+)  .* (?:fused|dense|unused)\b", printed, flags=re.MULTILINE) == targets
    assert "4 targets: 4 fused, 0 dense, 0 unused; 0 graph breaks, 0 recompiles" in printed
    first, last = numbers(r"loss (\d+\.\d+)", printed)
    assert last < first
    (difference,) = numbers(r"outputs differ by at most (\S+)", printed)
    assert difference < 1e-3


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["ddp", "fsdp"])
def test_two_processes(options: tuple[str, ...], tmp_path: Path) -> None:
    program = str(ROOT / "examples" / "two_processes.py")

    def launched(processes: int) -> str:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), program]
        return run(*launcher, "--steps", "12", "--out", "run", *options, cwd=tmp_path, OMP_NUM_THREADS="1")

    printed = launched(2)
    assert re.findall(r"step (\d+): next (\w+)", printed) == [("0", "low_rank"), ("10", "joint"), ("11", "joint")]
    ((before, after),) = re.findall(r"loss (\d+\.\d+) -> (\d+\.\d+)", printed)
    assert float(after) < float(before)
    assert "4 masks, the same in 2 of 2 processes" in printed
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    if options:  # what two wrote, one goes on with
        assert re.findall(r"step (\d+): next (\w+)", launched(1)) == [("6", "joint"), ("10", "joint"), ("11", "joint")]


def test_eager_step_stays_within_that_of_lora(tmp_path: Path) -> None:
    """At most 1.3 of the memory of bitsandbytes with PEFT's LoRA. (Of the time too, on a machine that does nothing else.)"""
    pytest.importorskip("peft")
    small = ("--hidden", "256", "--tokens", "64", "--rounds", "1")
    printed = run(ROOT / "examples" / "bench_eager.py", *small, cwd=tmp_path)
    (memory,) = numbers(r"QRoSA / LoRA: .* memory (\S+)", printed)
    assert 0 < memory <= 1.3, printed


def test_quickstart_is_short() -> None:
    lines = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 22


# --- README ------------------------------------------------------------------------------------------------------


def test_python_blocks_run_one_after_the_other(tmp_path: Path) -> None:
    program = tmp_path / "readme.py"
    program.write_text("\n".join(blocks("python")), encoding="utf-8")
    printed = run(program, cwd=tmp_path)
    assert "2 targets: 2 fused, 0 dense, 0 unused; 0 graph breaks, 0 recompiles" in printed
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


def spec_table() -> str:
    """The README's table of RosaSpec, from the fields and their text in the docstring."""
    text = textwrap.dedent((rosa_fx.RosaSpec.__doc__ or "").split("Fields:\n")[1])
    described = dict(re.findall(r"^(\w+): (.*?)(?=^\w+: |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(rosa_fx.RosaSpec):
        default = getattr(rosa_fx.RosaSpec(), field.name)
        shown = f'"{default}"' if isinstance(default, str) else repr(default)
        meaning = re.sub(r":\w+:`(\w+)`", r"`\1`", " ".join(described[field.name].split())).replace("``", "`")
        meaning = meaning.removesuffix(".").replace("|", "\\|")
        rows.append(f"| `{field.name}` | `{shown}` | {meaning} |")
    return "\n".join(rows)


def test_spec_table_is_that_of_the_code() -> None:
    table = spec_table()
    assert table in README, f"README.md does not have the table of RosaSpec's fields as they are now:\n{table}"


def test_every_public_name_is_there() -> None:
    code = " ".join(re.findall(r"`([^`]+)`", README.split("## Public interface")[1]))
    assert [name for name in rosa_fx.__all__ if not re.search(rf"\b{name}\b", code)] == []


@pytest.mark.parametrize("command", ["demo", "train", "explain", "merge"])
def test_options_named_exist(command: str) -> None:
    (row,) = (line for line in README.splitlines() if line.startswith(f"| `rosa-fx {command}"))
    wide = CliRunner(env={"COLUMNS": "200"})
    shown = wide.invoke(app, [command, "--help"]).output
    named = set(re.findall(r"--[a-z-]+", row))
    assert named
    assert {option for option in named if not re.search(rf"{option}\b", shown)} == set()


def test_commands_are_those_that_are_checked() -> None:
    """The second block is the one that `.ci/run` runs, and both install extras that exist."""
    first, second = (block.strip() for block in blocks("bash"))
    assert "rosa-fx demo" in first
    assert f"'{second}'" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"\[(\w+)\]", first + second) == ["hf", "test"]


def test_what_the_comparison_is_shown_by_exists() -> None:
    table = README.split("## Beside other libraries")[1].split("\n## ")[0]
    names = [name for row in table.splitlines() if row.startswith("|") for name in re.findall(r"`([^`]+\.py[^`]*)`", row)]
    assert len(names) > 12
    for name in names:
        file, _, function = name.partition("::")
        path = ROOT / ("tests" if file.startswith("test_") else "examples") / file
        assert re.search(rf"^def {function}\(" if function else "", path.read_text(encoding="utf-8"), flags=re.MULTILINE), name


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
