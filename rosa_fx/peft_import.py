"""`import_peft`: a LoRA that PEFT saved, as the low-rank term of a transformed model."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rosa_fx.adapter_format import CONFIG, TENSORS
from rosa_fx.atomic import tensor_digest
from rosa_fx.attach import transform
from rosa_fx.distributed.shard import refuse_sharded
from rosa_fx.errors import RosaError
from rosa_fx.fingerprint import as_text, fingerprint
from rosa_fx.peft_names import PREFIX, PeftModule, config_digest, peft_modules
from rosa_fx.spec import RosaSpec
from rosa_fx.state import is_transformed

# Settings that make the adapter more than s·B A, with the values that mean that they are off.
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"), (False, None)),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"), (None, [], {})),
    **dict.fromkeys(("alora_invocation_tokens", "monteclora_config", "velora_config"), (None, [], {})),
}
# Initialisations that leave the base weights as they are.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "true", "false")


@dataclasses.dataclass(frozen=True)
class _Lora:
    """A verified file: by module (A [R, in], B [out, R]), scale parts, and fingerprints of the base where it tells."""

    folder: Path
    config: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]]
    fingerprints: dict[str, str]

    def alpha(self, module: str) -> float:
        return float(_by_pattern(self.config.get("alpha_pattern") or {}, module, self.config.get("lora_alpha", 8)))

    @property
    def rank_stabilized(self) -> bool:
        return bool(self.config.get("use_rslora", False))

    def scale(self, module: str) -> float:
        rank = self.factors[module][0].shape[0]
        return self.alpha(module) / (math.sqrt(rank) if self.rank_stabilized else rank)


def import_peft(model: nn.Module, directory: str | os.PathLike[str], *, spec: RosaSpec | None = None) -> nn.Module:
    """Load a PEFT LoRA as the low-rank term, in place, and return the same object.

    Args:
        model: plain: it is transformed, with ranks, alphas and targets from the LoRA. Or transformed already: its low-rank
            parts must be those of the LoRA in name and rank; a different scale is multiplied into B.
        directory: `adapter_config.json` and `adapter_model.safetensors`, as PEFT saves them (or `rosa_fx.export_peft`).
        spec: for a plain model: everything else, such as base, density and schedule. By default the base is kept as it is and
            the low-rank term trains alone.

    Raises:
        RosaError: no LoRA, or one that is more than B A (DoRA, biases, saved modules, changed base weights); another model
            (names, shapes, ranks, fingerprints); damaged files; NaN or infinity. The model is then untouched.
    """
    refuse_sharded(model, "rosa_fx.import_peft")
    lora = _read(Path(directory))
    if is_transformed(model):
        if spec is not None:
            raise RosaError("spec is for a plain model: this one is transformed already, with a spec of its own")
        _load(lora, model)
        return model
    plain = getattr(model, "_orig_mod", model)
    chosen = _spec(lora, plain, spec or RosaSpec(base="keep", density=0.0, schedule="lora_only"))
    transform(plain, chosen)
    _load(lora, model)
    return model


def _spec(lora: _Lora, model: nn.Module, spec: RosaSpec) -> RosaSpec:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    _check_shared(lora, list(owners.values()))
    overrides = {}
    for name, (A, B) in lora.factors.items():
        weight_name = f"{name}.weight"
        if weight_name not in parameters:
            near = difflib.get_close_matches(weight_name, parameters, n=3) or list(parameters)[:3]
            raise RosaError(
                f"the LoRA {lora.folder} is for a module {name!r}, which this model does not have "
                f"(near names: {', '.join(near)})"
            )
        weight = parameters[weight_name]
        packed = getattr(weight, "quant_state", None)
        shape = tuple(packed.shape if packed is not None else weight.shape)
        expected = (B.shape[0], A.shape[1])
        if not isinstance(modules[name], nn.Linear):
            expected = (A.shape[1], B.shape[0])
        _check_shape(lora, name, expected, shape)
        known = lora.fingerprints.get(name)
        here = as_text(fingerprint(weight)) if packed is None and weight.is_floating_point() else None
        _check_fingerprint(lora, name, known, here)
        overrides[weight_name] = {"rank": A.shape[0], "alpha": lora.alpha(name)}
    return dataclasses.replace(
        spec,
        targets=tuple(overrides),
        overrides={**overrides, **spec.overrides} if spec.overrides else overrides,
        rank_stabilized=lora.rank_stabilized,
    )


@torch.no_grad()
def _load(lora: _Lora, model: nn.Module) -> None:
    present = {module.name: module for module in peft_modules(model) if module.weight.low_rank is not None}
    owners: dict[int, list[str]] = {}
    for name, found in present.items():
        owners.setdefault(id(found.weight), []).append(name)
    _check_shared(lora, list(owners.values()))
    for name in sorted(lora.factors.keys() ^ present.keys()):
        where = "has nothing for" if name in present else "is for"
        raise RosaError(f"the LoRA {lora.folder} {where} the module {name!r}, unlike the transformed model")
    ready: list[tuple[PeftModule, Tensor, Tensor]] = []
    for name, (A, B) in lora.factors.items():
        module = present[name]
        low_rank = module.weight.low_rank
        assert low_rank is not None
        if module.flipped:
            A, B = B.t(), A.t()
        _check_shape(lora, name, (B.shape[0], A.shape[1]), module.weight.shape)
        if A.shape[0] != low_rank.A.shape[0]:
            raise RosaError(f"{name}: rank is {A.shape[0]} in the LoRA {lora.folder} and {low_rank.A.shape[0]} in this model")
        _check_fingerprint(lora, name, lora.fingerprints.get(name), as_text(module.weight.base.get_buffer("fingerprint")))
        if lora.scale(name) != module.weight.scale:
            B = B.double() * (lora.scale(name) / module.weight.scale)
        ready.append((module, A, B))
    for module, A, B in ready:
        assert module.weight.low_rank is not None
        module.weight.low_rank.A.copy_(A)
        module.weight.low_rank.B.copy_(B)


def _check_shared(lora: _Lora, groups: list[list[str]]) -> None:
    """Modules that share a weight have one delta here, but factors each for itself in PEFT."""
    for names in groups:
        adapted = [name for name in names if name in lora.factors]
        pairs = [lora.factors[name] for name in adapted]
        same = all(torch.equal(A, pairs[0][0]) and torch.equal(B, pairs[0][1]) for A, B in pairs)
        if adapted and (len(adapted) < len(names) or not same or len({lora.scale(name) for name in adapted}) > 1):
            raise RosaError(
                f"the modules {' and '.join(names)} share their weight, and the LoRA {lora.folder} does not adapt them alike: "
                "a rewritten weight has one delta for all its uses. Untie them first, or merge the LoRA with PEFT"
            )


def _check_shape(lora: _Lora, name: str, of_file: tuple[int, ...], of_model: tuple[int, ...]) -> None:
    if tuple(of_file) != tuple(of_model):
        raise RosaError(f"{name}: the LoRA {lora.folder} is for a weight {list(of_file)}, this model's is {list(of_model)}")


def _check_fingerprint(lora: _Lora, name: str, known: str | None, here: str | None) -> None:
    if known and here and known != here:
        raise RosaError(
            f"{name}: the base weight has other values than the one the LoRA {lora.folder} was trained on "
            f"(fingerprint {known}, here {here}): load that base model"
        )


def _by_pattern(found: dict[str, Any], name: str, default: Any) -> Any:
    try:
        return next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", name)), default)
    except re.error as error:
        raise RosaError(f"a pattern of the PEFT configuration is no regular expression: {error}") from error


def _read(folder: Path) -> _Lora:
    config_file, tensor_file = folder / CONFIG, folder / TENSORS
    if not config_file.is_file():
        raise RosaError(f"{folder} holds no {CONFIG}: give the folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RosaError(f"{config_file} is damaged: {error}; copy the adapter again") from error
    _check_config(config_file, config)
    if not tensor_file.is_file():
        bins = " (adapter_model.bin is a pickle, which is not read: save it again with safe_serialization=True)"
        raise RosaError(f"{tensor_file} is missing{bins if (folder / 'adapter_model.bin').exists() else ''}")
    try:
        with safe_open(tensor_file, "pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        ours = json.loads(metadata.get("rosa_fx", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise RosaError(f"{tensor_file} is damaged: {error}; copy the adapter again") from error
    ours = ours if isinstance(ours, dict) else {}
    if ours.get("checksum", "") not in ("", tensor_digest(tensors)):  # PEFT itself writes none
        raise RosaError(f"{tensor_file} is damaged (its checksum differs): copy the adapter again")
    lora = _Lora(folder, config, _factors(tensor_file, tensors), ours.get("base") or {})
    for name in lora.factors:
        alpha = lora.alpha(name)
        if not math.isfinite(alpha) or alpha <= 0:
            raise RosaError(f"{config_file}: the alpha of {name!r} is {alpha}: it must be a number above 0")
    if ours.get("config", "") not in ("", config_digest(config)):
        raise RosaError(
            f"{config_file} is damaged or was edited: its ranks or alphas are not those that were exported; export the adapter "
            "again, or copy it again"
        )
    return lora


def _check_config(file: Path, config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        hint = ": use rosa_fx.load_adapter" if isinstance(config, dict) and "rosa_fx" in config else ""
        raise RosaError(f"{file} is no LoRA (peft_type {found!r}){hint}; rosa_fx.import_peft takes PEFT's LoRA")
    for field, off in _OFF.items():
        if field in config and config[field] not in off:
            raise RosaError(
                f"{file}: {field} is {config[field]!r}, which a low-rank term does not hold; merge it with PEFT first"
            )
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise RosaError(
            f"{file}: init_lora_weights is {init!r}, which changed the base weights: convert it to a plain LoRA with PEFT "
            "(path_initial_model_for_weight_conversion) first"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise RosaError(f"{file}: {field} is {config[field]!r}: it must map names to numbers")


def _factors(file: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None or not all(match[1].split(".")) or any(c in match[1] for c in "/\\\0"):
            raise RosaError(f"{file} holds {key!r}, which is no factor of a LoRA on a linear module")
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise RosaError(f"{file}: {key} is {tensor.dtype} {list(tensor.shape)}, not a matrix of floating-point numbers")
        if not bool(torch.isfinite(tensor).all()):
            raise RosaError(f"{file}: {key} holds NaN or infinity: use an earlier adapter")
        found.setdefault(match[1], {})[match[2]] = tensor
    factors = {}
    for name, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise RosaError(f"{file} lacks the other factor of {name!r} (it has lora_{next(iter(pair))} only)")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise RosaError(f"{file}: the factors of {name!r} have ranks {pair['A'].shape[0]} and {pair['B'].shape[1]}")
        factors[name] = (pair["A"], pair["B"])
    if not factors:
        raise RosaError(f"{file} holds no LoRA factors")
    return factors
