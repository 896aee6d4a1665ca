"""Loading causal language models: local directories, hub names, GGUF files, SmolLM2-135M from the package index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rosa_fx.errors import RosaError

__all__ = ["SMOLLM2", "default_dtype", "load_model", "load_tokenizer"]

SMOLLM2 = "smollm2-135m"


def default_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively (CUDA, AMX or AVX512-BF16 CPUs), else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text().split()) if flags.is_file() else set()
    return torch.bfloat16 if words & {"amx_bf16", "avx512_bf16"} else torch.float32


def load_model(name_or_dir: str | Path, dtype: torch.dtype | None = None, *, download: bool = True) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer.

    `name_or_dir` is `"smollm2-135m"`, a `.gguf` file, a local directory (with `config.json` or one `.gguf` file), or a
    Hugging Face hub name. `dtype` None means `default_dtype()`. The model comes back on the CPU, in eval mode.
    `download=False` forbids fetching anything.

    Raises RosaError for a directory that does not exist or has no configuration, weights or tokenizer, for a damaged
    GGUF file, and for a hub name that cannot be had.
    """
    dtype = dtype or default_dtype()
    file = _gguf_path(name_or_dir, download)
    if file is not None:
        return _load_gguf(file, dtype)
    from transformers import AutoModelForCausalLM

    _check_directory(name_or_dir)
    tokenizer = load_tokenizer(name_or_dir, download=download)
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_dir, dtype=dtype, local_files_only=not download)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RosaError(f"model {str(name_or_dir)!r} could not be loaded: {_first_line(error)}") from error
    return model.eval(), tokenizer


def load_tokenizer(name_or_dir: str | Path, *, download: bool = True) -> Any:
    """The tokenizer of the model that `load_model` would load. Raises RosaError if there is none."""
    from transformers import AutoTokenizer

    file = _gguf_path(name_or_dir, download)
    if file is not None:
        return _gguf_tokenizer(file)
    _check_directory(name_or_dir)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_dir, local_files_only=not download)
    except Exception as error:  # transformers raises a dozen types here, all meaning the same
        raise RosaError(
            f"model {str(name_or_dir)!r} has no usable tokenizer ({_first_line(error)}); "
            "put tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if not getattr(tokenizer, "vocab_size", 0):
        raise RosaError(
            f"model {str(name_or_dir)!r} has no tokenizer files: put tokenizer.json and tokenizer_config.json there"
        )
    return tokenizer


def _gguf_path(name_or_dir: str | Path, download: bool) -> Path | None:
    """The GGUF file that the name stands for, or None if it is not GGUF."""
    if str(name_or_dir) == SMOLLM2:
        from rosa_fx.models.smollm2 import smollm2_file

        return smollm2_file(download=download)
    path = Path(name_or_dir)
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise RosaError(f"model {str(path)!r} is a file but not a .gguf file; give the model's directory")
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            raise RosaError(f"model directory {str(path)!r} has {len(found)} .gguf files: name one of them")
        return found[0] if found else None
    return None


def _check_directory(name_or_dir: str | Path) -> None:
    """Tell a mistyped path from a hub name, and a directory without a model from one with."""
    path = Path(name_or_dir)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RosaError(f"model directory {str(path)!r} has neither config.json nor a .gguf file")
        return
    text = str(name_or_dir)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or not text.strip():
        raise RosaError(f"model {text!r}: no such directory")


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    try:
        import gguf  # noqa: F401  (named here, so that its absence is one clear line)
    except ImportError as error:
        raise RosaError(f"{path} needs the package gguf: pip install 'rosa-fx[hf]'") from error
    from rosa_fx.models.gguf_file import read_gguf
    from rosa_fx.models.gguf_llama import is_plain_llama, load_llama

    file = read_gguf(path)
    tokenizer = _gguf_tokenizer(path)
    if is_plain_llama(file):
        return load_llama(file, dtype), tokenizer
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    except Exception as error:  # an architecture transformers cannot convert comes as any of several types
        raise RosaError(f"transformers cannot read {path}: {_first_line(error)}") from error
    if hasattr(model.config, "quantization_config"):
        # The weights are dense by now; left in, the saved model would claim to be a GGUF checkpoint.
        del model.config.quantization_config
    return model.eval(), tokenizer


def _gguf_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    from rosa_fx.models import gguf_llama
    from rosa_fx.models.gguf_file import read_gguf

    if (path.parent / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(path.parent)
    tokenizer = gguf_llama.load_tokenizer(read_gguf(path))
    if tokenizer is not None:
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # as above
        raise RosaError(f"transformers cannot build a tokenizer from {path}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
