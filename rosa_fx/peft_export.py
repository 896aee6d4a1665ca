"""`export_peft`: one term of the adapter as files that PEFT loads without rosa_fx."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rosa_fx.adapter_format import CONFIG, TENSORS
from rosa_fx.atomic import new_directory, plain_tensors, tensor_digest
from rosa_fx.distributed.shard import refuse_sharded
from rosa_fx.errors import RosaError
from rosa_fx.fingerprint import as_text
from rosa_fx.peft_names import PREFIX, PeftModule, config_digest, patterns, peft_modules, short_targets
from rosa_fx.state import state_of, unwrap

PARTS = {"low_rank": "LORA", "sparse": "SHIRA"}


def export_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    part: str = "low_rank",
    drop_sparse: bool = False,
    drop_low_rank: bool = False,
) -> None:
    """Write one term as a PEFT adapter: `peft.PeftModel.from_pretrained(base, directory)` then computes the same.

    The base model is the one that was transformed, loaded the same way: where the spec quantised it, load it quantised
    alike (`BitsAndBytesConfig`), or outputs differ by the error of quantisation.

    Args:
        model: transformed. Its weights are the `weight` of linear modules (`nn.Linear`, bitsandbytes', `Conv1D`).
        directory: new or empty.
        part: "low_rank", a LoRA with its ranks and alphas per module; or "sparse", a SHiRA. That format has one number of
            entries, r (N + K), for a module [N, K], so the masks are filled up with zeros.
        drop_sparse, drop_low_rank: write the one part although the other one is trained too and is lost.

    Raises:
        RosaError: a weight that PEFT has no place for (by name), the other part is not zero, a value is not finite, nothing
            to write, or the directory is not empty or cannot be written.
    """
    if part not in PARTS:
        raise RosaError(f"part is {part!r}: use {' or '.join(map(repr, PARTS))}")
    refuse_sharded(model, "rosa_fx.export_peft")
    modules = peft_modules(model)
    inner = unwrap(model)
    if part == "low_rank":
        _refuse_other(modules, "sparse", drop_sparse, "drop_sparse")
        config, tensors = _lora(inner, modules)
    else:
        _refuse_other(modules, "low_rank", drop_low_rank, "drop_low_rank")
        config, tensors = _shira(inner, modules)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RosaError(f"{name} holds NaN or infinity and is not exported; load an earlier checkpoint")
    _write(Path(directory), inner, config, tensors, _fingerprints(modules))


def _refuse_other(modules: list[PeftModule], other: str, dropped: bool, option: str) -> None:
    for module in modules:
        weight = module.weight
        sparse = weight.sparse is not None and weight.sparse.has_mask and bool(weight.sparse.values.any())
        low_rank = weight.low_rank is not None and bool(weight.low_rank.B.any())
        if not dropped and (sparse if other == "sparse" else low_rank):
            raise RosaError(
                f"{module.weight_name} has a trained {other.replace('_', '-')} part, which this PEFT format does not hold: "
                f"merge the model, use rosa_fx.save_adapter, or say {option}=True to leave it out"
            )


def _lora(model: nn.Module, modules: list[PeftModule]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = state_of(model)
    modules = [module for module in modules if module.weight.low_rank is not None]
    if not modules:
        raise RosaError("no weight has a low-rank part (rank 0): there is no LoRA to export")
    ranks = {module.name: state.targets[module.weight_name].rank for module in modules}
    alphas = {module.name: state.targets[module.weight_name].alpha for module in modules}
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    tensors: dict[str, Tensor] = {}
    for module in modules:
        low_rank = module.weight.low_rank
        assert low_rank is not None
        A, B = low_rank.A.detach(), low_rank.B.detach()
        if module.flipped:  # ΔW [in, out] = s B A, and PEFT's is s (B' A')ᵀ
            A, B = B.t(), A.t()
        tensors |= {f"{PREFIX}{module.name}.lora_A.weight": A, f"{PREFIX}{module.name}.lora_B.weight": B}
    config = {
        "peft_type": PARTS["low_rank"],
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": state.spec.dropout,
        "use_rslora": state.spec.rank_stabilized,
        "fan_in_fan_out": all(module.flipped for module in modules),
        "bias": "none",
        "target_modules": short_targets(model, list(ranks)),
        "rank_pattern": patterns(dict(ranks), rank),
        "alpha_pattern": patterns(alphas, alpha),
    }
    return config, tensors


def _shira(model: nn.Module, modules: list[PeftModule]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    modules = [module for module in modules if module.weight.sparse is not None and module.weight.sparse.has_mask]
    if not modules:
        raise RosaError("no weight has a sparse part with a mask: there is no SHiRA to export")
    need = {}
    for module in modules:
        if module.flipped:
            raise RosaError(f"{module.weight_name} is stored [in, out], and PEFT's SHiRA takes nn.Linear only")
        assert module.weight.sparse is not None
        need[module.name] = -(module.weight.sparse.values.numel() // -sum(module.weight.shape))
    rank = max(1, *need.values())
    tensors: dict[str, Tensor] = {}
    for module in modules:
        (rows, columns), sparse = module.weight.shape, module.weight.sparse
        assert sparse is not None
        mask = sparse.mask
        assert mask is not None
        spare = rank * (rows + columns) - mask.nnz
        if rank * (rows + columns) > rows * columns:
            raise RosaError(
                f"{module.weight_name}: PEFT's SHiRA has one r for all modules, which must be {rank} here, and "
                f"that is more entries than this weight {list(module.weight.shape)} has: use the same density everywhere, or "
                "leave it out of the spec's targets"
            )
        indices = torch.stack([mask.rows(), mask.cols.long()]).to(torch.int32)
        tensors[f"{PREFIX}{module.name}.shira_weight"] = torch.cat([sparse.values.detach(), sparse.values.new_zeros(spare)])
        # Entries of value zero change nothing, wherever they are.
        tensors[f"{PREFIX}{module.name}.shira_indices"] = torch.cat([indices, indices.new_zeros(2, spare)], dim=1)
    config = {
        "peft_type": PARTS["sparse"],
        "r": rank,
        "mask_type": "random",  # the one it knows; the indices come from the file
        "fan_in_fan_out": False,
        "init_weights": True,
        "target_modules": short_targets(model, [module.name for module in modules]),
    }
    return config, tensors


def _fingerprints(modules: list[PeftModule]) -> dict[str, str]:
    found = {module.name: as_text(module.weight.base.get_buffer("fingerprint")) for module in modules}
    return {name: text for name, text in found.items() if text}


def _write(folder: Path, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], prints: dict[str, str]) -> None:
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    origin = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    config |= {"task_type": "CAUSAL_LM" if causal else None, "base_model_name_or_path": origin, "inference_mode": True}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RosaError(f"{folder} exists and is not empty: it is left alone; choose a new or an empty directory")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(Path(os.path.realpath(folder))) as new:
            # What the base was, and checksums, are beside the tensors, where PEFT does not look.
            beside = {"base": prints, "checksum": tensor_digest(tensors), "config": config_digest(config)}
            metadata = {"format": "pt", "rosa_fx": json.dumps(beside)}
            save_file(plain_tensors(tensors), new / TENSORS, metadata=metadata)
            (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise RosaError(f"could not write the PEFT adapter {folder}: {error}; free space or choose another place") from error
