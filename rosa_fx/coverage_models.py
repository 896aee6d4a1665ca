"""Tiny random models of transformers' architectures, and inputs that they take, without a download.

Sizes are shrunk by the names of the configuration's attributes. What that does not get right is tried again with only layers,
vocabulary and experts shrunk, and a small table corrects single architectures.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rosa_fx.coverage_tables import FAMILIES, FIRST, FIXES, LIGHT, LISTS, RULES

_LIMIT = 60_000_000  # parameters: more is not a tiny model, and the next way of shrinking is tried


def architectures() -> dict[str, tuple[str, str]]:
    """model type -> (family, class name), the diverse ones of `FIRST` at the front, the others in transformers' order."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str]] = {}
    for family, mapping in FAMILIES:
        for model_type, names in getattr(modeling_auto, mapping).items():
            name = names if isinstance(names, str) else names[0]
            found.setdefault(model_type, (family, name))
    return {name: found[name] for name in [*(each for each in FIRST if each in found), *found]}


def tiny_config(model_type: str, light: bool = False) -> Any:
    """The configuration of an architecture with small sizes; `light` shrinks layers, vocabulary and experts only."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_shrunk(config_class(), light, FIXES.get(model_type, {}) if not light else {}))


def _shrunk(config: Any, light: bool, fixes: dict[str, Any]) -> dict[str, Any]:
    rules = RULES[:LIGHT] if light else RULES
    values = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if hasattr(value, "to_dict"):
            changed[key] = {"model_type": value.model_type} | _shrunk(value, light, {})
        elif isinstance(value, int) and not isinstance(value, bool):
            small = next((limit for pattern, limit in rules if re.search(pattern, key)), None)
            if small is not None and value > small:
                changed[key] = small
        elif isinstance(value, (list, tuple)) and not light:
            small_list = next((sizes for pattern, sizes in LISTS if re.search(pattern, key)), None)
            if small_list is not None and value and all(isinstance(each, int) for each in value):
                changed[key] = type(value)((*small_list, *small_list[-1:] * len(value))[: len(value)])
    if "num_attention_heads" in changed and values.get("num_key_value_heads") == values["num_attention_heads"]:
        changed["num_key_value_heads"] = changed["num_attention_heads"]  # attention without groups stays so
    _choose_layers(values, changed)
    changed |= fixes
    vocabulary = changed.get("vocab_size", values.get("vocab_size"))
    if isinstance(vocabulary, int) and vocabulary > 32:
        changed |= _token_ids(values, vocabulary)
    return changed


def _choose_layers(values: dict[str, Any], changed: dict[str, Any]) -> None:
    """Per-layer lists are cut to one layer of each kind, at least two and at most four."""
    key = next((k for k in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(values.get(k), int)), None)
    if key is None or key not in changed:
        return
    lists = {k: v for k, v in values.items() if isinstance(v, (list, tuple)) and len(v) == values[key] and k != "conv_dim"}
    if not lists:
        return
    kinds: dict[str, int] = {}
    for index in range(values[key]):
        kinds.setdefault(repr([each[index] for each in lists.values()]), index)
    chosen = [*kinds.values()][:4]
    chosen = chosen if len(chosen) > 1 else [0, 1]
    changed[key] = len(chosen)
    for name, each in lists.items():
        changed[name] = type(each)(each[index] for index in chosen)


def _token_ids(values: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Ids inside the small vocabulary, above those that `inputs` draws."""
    free = iter(range(vocabulary - 1, vocabulary // 2, -1))
    low = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    ids: dict[str, Any] = {}
    for key, value in values.items():
        if not re.search(r"_token_(id|index)$", key) or value is None:
            continue
        if key in low and (isinstance(value, (list, tuple)) or value >= vocabulary):
            ids[key] = low[key]
        elif isinstance(value, int) and value >= vocabulary // 2:
            ids[key] = next(free)
    return ids


def tiny_model(model_type: str, class_name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A random model in eval mode and inputs that its forward pass takes.

    Raises:
        RuntimeError: no way of shrinking gave a model that runs; the message holds the errors of all of them.
    """
    import transformers

    errors = []
    for light in (False, True):
        try:
            config = tiny_config(model_type, light)
            config.use_cache = False
            cls = getattr(transformers, class_name)
            with torch.device("meta"):
                count = sum(p.numel() for p in cls(config).parameters())
            if count > _LIMIT:
                raise RuntimeError(f"{count / 1e6:.0f} M parameters")
            torch.manual_seed(0)
            model = cls(config).float().eval()
        except Exception as error:
            errors.append(f"{'light' if light else 'tiny'}: {_short(error)}")
            continue
        for inputs in candidate_inputs(model):
            try:
                with torch.no_grad():
                    outputs = tensors(model(**inputs))
                if not outputs:
                    raise RuntimeError("no floating-point output")
                if not all(bool(torch.isfinite(each).all()) for each in outputs):
                    raise RuntimeError("outputs are not finite")
                return model, inputs
            except Exception as error:
                errors.append(f"{'light' if light else 'tiny'}, {'+'.join(inputs)}: {_short(error)}")
    raise RuntimeError(" | ".join(errors[:6]))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def tensors(output: Any) -> list[Tensor]:
    """Every floating-point tensor of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [each for item in output for each in tensors(item)] if isinstance(output, (list, tuple)) else []


def candidate_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs that the model may take, the fullest first."""
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    common: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 64
    generator = torch.Generator().manual_seed(1)

    def ids(length: int = 16) -> Tensor:
        return torch.randint(3, max(4, min(vocabulary // 2, 60)), (2, length), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    decoder = {"decoder_input_ids": ids(8)} if "decoder_input_ids" in accepted else {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids" or "input_ids" in accepted:
        words = {"input_ids": ids()}
        words |= {"attention_mask": torch.ones(2, 16, dtype=torch.long)} if "attention_mask" in accepted else {}
        if "pixel_values" in accepted:
            for pixels in _pixels(config, noise):
                yield words | {"pixel_values": pixels} | decoder | common
        yield words | decoder | common
        yield {"input_ids": words["input_ids"]} | common
    if "pixel_values" in accepted:
        for pixels in _pixels(config, noise):
            yield {"pixel_values": pixels} | decoder | common
    for name in ("input_features", "input_values"):
        if name in accepted:
            for shape in _audio_shapes(config):
                yield {name: noise(*shape) * 0.5} | decoder | common
    if "past_values" in accepted:
        length, channels = getattr(config, "context_length", 32), getattr(config, "num_input_channels", 1)
        yield {"past_values": noise(2, length, channels)} | common
        length += max(getattr(config, "lags_sequence", None) or [0])
        future = getattr(config, "prediction_length", 8)
        features = getattr(config, "num_time_features", 0)
        yield {
            "past_values": noise(2, length),
            "past_time_features": noise(2, length, features),
            "past_observed_mask": torch.ones(2, length),
            "future_values": noise(2, future),
            "future_time_features": noise(2, future, features),
        } | common
    if "inputs" in accepted:
        yield {"inputs": ids()} | common


def _pixels(config: Any, noise: Any) -> Iterator[Tensor]:
    vision = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    size = getattr(vision, "image_size", None) or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", None) or 3
    channels = channels if isinstance(channels, int) else 3
    frames = getattr(vision, "num_frames", None)
    if isinstance(frames, int):
        yield noise(2, frames, channels, height, width)
    yield noise(2, channels, height, width)
    if (height, width) != (64, 64):
        yield noise(2, channels, 64, 64)


def _audio_shapes(config: Any) -> Iterator[tuple[int, ...]]:
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    mels = getattr(audio, "num_mel_bins", None) or getattr(audio, "input_feat_per_channel", None) or 80
    positions = getattr(audio, "max_source_positions", None) or 32
    if getattr(audio, "max_length", None):
        yield 2, audio.max_length, mels
    yield 2, mels, 2 * positions
    yield 2, 64, mels
    yield 2, 64, getattr(audio, "feature_projection_input_dim", None) or mels
    yield 2, 4000
    yield 2, 1, 4000
