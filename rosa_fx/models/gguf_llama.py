"""GGUF files of the Llama architecture, read by hand: transformers' generic loader takes several times as long."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import nn

from rosa_fx.errors import RosaError
from rosa_fx.models.gguf_file import GgufFile

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")


def hugging_face_name(name: str) -> str | None:
    """The Hugging Face name of a Llama tensor called `name` in GGUF; None if it is not one of them."""
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK_NAME.fullmatch(name)
    if match and match[2] in _BLOCK:
        return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.weight"
    return None


def is_plain_llama(file: GgufFile) -> bool:
    """Whether `file` holds only what `load_llama` understands: no biases, experts or rescaled rotary positions."""
    meta = file.metadata
    if meta.get("general.architecture") != "llama" or any(f"llama.{key}" not in meta for key in _REQUIRED):
        return False
    head_dim = _head_dim(meta)
    return (
        all(hugging_face_name(name) is not None for name in file.tensors)
        and not any(key.startswith("llama.rope.scaling") for key in meta)
        and not isinstance(meta["llama.attention.head_count"], list)
        and meta.get("llama.rope.dimension_count", head_dim) == head_dim
        and meta.get("llama.attention.value_length", head_dim) == head_dim
    )


def _head_dim(meta: dict[str, Any]) -> int:
    default = meta["llama.embedding_length"] // meta["llama.attention.head_count"]
    return int(meta.get("llama.attention.key_length", default))


def llama_config(file: GgufFile) -> Any:
    """The `transformers.LlamaConfig` that the file's metadata describes."""
    from transformers import LlamaConfig

    meta = file.metadata
    heads = int(meta["llama.attention.head_count"])
    tokens = {
        key: meta.get(f"tokenizer.ggml.{name}_token_id")
        for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
    }
    return LlamaConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=int(meta["llama.embedding_length"]),
        intermediate_size=int(meta["llama.feed_forward_length"]),
        num_hidden_layers=int(meta["llama.block_count"]),
        num_attention_heads=heads,
        num_key_value_heads=int(meta.get("llama.attention.head_count_kv", heads)),
        head_dim=_head_dim(meta),
        max_position_embeddings=int(meta.get("llama.context_length", 2048)),
        rms_norm_eps=float(meta.get("llama.attention.layer_norm_rms_epsilon", 1e-6)),
        rope_parameters={"rope_type": "default", "rope_theta": float(meta.get("llama.rope.freq_base", 10000.0))},
        tie_word_embeddings="output.weight" not in file.tensors,
        architectures=["LlamaForCausalLM"],
        **tokens,
    )


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order: it interleaves the two halves of every head, Hugging Face keeps them apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def load_llama(file: GgufFile, dtype: torch.dtype) -> nn.Module:
    """Build `LlamaForCausalLM` from a GGUF file, weights dequantised to `dtype`, on the CPU, in eval mode.

    At most one float32 tensor beyond the model itself is held at a time.
    Raises RosaError if a weight is missing or has the wrong shape.
    """
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    config = llama_config(file)
    # Parameters on the meta device, buffers (rotary frequencies, which no file holds) real.
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    wanted = dict(model.named_parameters())
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name in file.tensors:
        target = str(hugging_face_name(name))
        expected = wanted.pop(target, None)
        if expected is None or tuple(expected.shape) != file.tensors[name].shape:
            shape = "no such weight" if expected is None else f"{tuple(expected.shape)}"
            raise RosaError(f"{file.path}: {name!r} is {file.tensors[name].shape}, the model's {target} is {shape}")
        array = file.dequantize(name)
        part = name.split(".")[-2]
        if part in heads:
            array = _unpermute(array, heads[part])
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
        owner, _, attribute = target.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))
    missing = [name for name in wanted if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing:
        raise RosaError(f"{file.path}: {len(missing)} weights are missing, {missing[0]} first: the file is incomplete")
    model.tie_weights()
    model.config.dtype = dtype
    return model.eval()


def load_tokenizer(file: GgufFile) -> Any | None:
    """The file's byte-level BPE tokenizer with its chat template, or None for a kind that transformers must convert.

    Digits are split one by one before spaces are joined to words, as SmolLM2's own tokenizer does (and llama.cpp's
    `smollm` rule); transformers' GGUF loader leaves that rule out.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    meta = {key.removeprefix("tokenizer."): value for key, value in file.metadata.items()}
    splits = {"smollm": [pre_tokenizers.Digits(individual_digits=True)], "gpt-2": []}
    if meta.get("ggml.model") != "gpt2" or meta.get("ggml.pre") not in splits or "ggml.merges" not in meta:
        return None
    tokens = meta["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits[meta["ggml.pre"]], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, meta.get("ggml.token_type", ())) if kind == 3]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: meta.get(f"ggml.{name}_token_id") for key, name in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=meta.get("chat_template"),
        model_max_length=int(file.metadata.get("llama.context_length", 10**9)),
        clean_up_tokenization_spaces=False,
        **{key: tokens[index] for key, index in ids.items() if index is not None},
    )
