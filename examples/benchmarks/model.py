"""Training steps of whole models in lockstep, every compiled peer compiled block by block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import rosa_fx
from benchmarks import common, layer
from benchmarks.common import Bar, Part
from benchmarks.reference import replace_linears
from rosa_fx.state import state_of

LORA, LORA_COMPILED = "PEFT LoRA, eager", "PEFT LoRA, compiled"
FLOOR = "floor: frozen model, compiled"
QLORA, QLORA_COMPILED = "QLoRA, eager", "QLoRA, compiled"
REFERENCE, QROSA = "reference RoSA NF4 (transcribed), eager", "QRoSA, compiled"
LOW_RANK, MASK = "QRoSA before its masks, compiled", "QRoSA mask step, compiled"
RANK, DENSITY = 16, 0.006

LLAMAS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "llama-27m": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "llama-tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def load(name: str, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A random Llama of that size, or SmolLM2-135M, in `dtype` on `device`, ready to train."""
    if name in LLAMAS:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 2048, "max_position_embeddings": 2048} | LLAMAS[name]
        with torch.device(device):
            model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes))
        model = model.to(dtype)
    else:
        from rosa_fx.models import load_model

        model = load_model(name, dtype)[0].to(device)
    model.config.use_cache = False  # type: ignore[union-attr]
    return model.train()


def quantised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every linear but the head becomes bitsandbytes' NF4 linear."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.linear4bit(module.weight.detach(), dtype))
    return model


def transformed(model: nn.Module, masked: bool = True) -> nn.Module:
    """QRoSA on every linear but the head, with random masks if `masked`."""
    rosa_fx.transform(model, rosa_fx.RosaSpec(rank=RANK, alpha=RANK, density=DENSITY))
    if masked:
        rosa_fx.set_masks(model, common.random_masks(model, DENSITY))
        rosa_fx.MaskSchedule(model, "wl0").begin_step()
    return model


def build(peer: str, name: str, dtype: torch.dtype, base: nn.Module | None = None, compiled: bool = True) -> nn.Module:
    """A peer's model, from a copy of `base` if given. LoRA as PEFT sets it up: on all linears but the head."""
    model = load(name, dtype) if base is None else copy.deepcopy(base)
    if peer == FLOOR:
        model.requires_grad_(False)
        model.enable_input_require_grads()  # type: ignore[operator]  # gradients go back to the embeddings and into no weight
    elif peer in (LORA, LORA_COMPILED):
        model = layer.with_lora(model, RANK)
    elif peer in (QLORA, QLORA_COMPILED):
        model = layer.with_lora(quantised(model, dtype), RANK)
    elif peer == REFERENCE:
        source = transformed(copy.deepcopy(model))
        model = replace_linears(model.requires_grad_(False), source)
    else:
        model = transformed(model, masked=peer == QROSA)
    if compiled and peer in (FLOOR, LORA_COMPILED, QLORA_COMPILED, QROSA, LOW_RANK, MASK):
        rosa_fx.compile_blocks(model)
    return model


def batch(model: nn.Module, tokens: tuple[int, int]) -> dict[str, Tensor]:
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    ids = torch.randint(0, int(vocabulary), tokens, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "labels": ids}


def training_step(model: nn.Module, data: dict[str, Tensor], mask: bool = False) -> Callable[[], float]:
    """Forward, backward, AdamW as Hugging Face's Trainer and `rosa_fx.train` have it.

    With `mask`, a step that collects gradients and makes the masks, which are then forgotten.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True) if parameters else None

    def run() -> float:
        schedule = rosa_fx.MaskSchedule(model, "wl0", micro_batches=1) if mask else None
        if schedule:
            schedule.begin_step()
        loss = model(**data).loss
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if schedule:
            schedule.end_step()
            for weight in state_of(model).weights.values():
                assert weight.sparse is not None
                weight.sparse.has_mask = False
        return float(loss.detach())

    return run


def verify(base: nn.Module, data: dict[str, Tensor], peers: dict[str, nn.Module]) -> None:
    """The transformed model's first loss is that of the same base in bitsandbytes' modules, to their distance from float64.

    All adapters are still zero, so float64 with the dequantised weights is what both have to give.
    """
    exact = copy.deepcopy(base)
    with torch.no_grad():
        for name in state_of(peers[QROSA]).weights:
            exact.get_parameter(name).copy_(rosa_fx.base_weight(peers[QROSA], name))
        exact = exact.double()
        right = exact(**data).logits
        ours, plain = (peers[name](**data).logits for name in (QROSA, QLORA))
    common.compare("logits", right, ours, plain)


def run(
    names: Sequence[str], dtypes: Sequence[str], rounds: int, tokens: tuple[int, int] = (4, 256), compiled: bool = True
) -> Part:
    part = Part("model", "A training step: time over that of PEFT LoRA, eager, in the same dtype")
    part.notes = [
        f"{tokens[0]}x{tokens[1]} tokens, rank {RANK}, {DENSITY:.1%} sparse, NF4 in blocks of 64, all linears but the head, "
        "AdamW (fused). Compiled: `rosa_fx.compile_blocks` for every peer. The mask step makes its masks; it is compared with "
        "a step of the phase before them, low-rank only. The floor trains nothing: y and dx of every weight, and what is "
        "between them."
    ]
    peers = [FLOOR, LORA, LORA_COMPILED, QLORA, QLORA_COMPILED, REFERENCE, QROSA, LOW_RANK, MASK]
    for name in names:
        for kind in dtypes:
            dtype = common.DTYPES[kind]
            torch._dynamo.reset()
            base = load(name, dtype)
            data = batch(base, tokens)
            models = {peer: build(peer, name, dtype, base, compiled) for peer in peers}
            verify(base, data, models)
            del base
            steps = {peer: training_step(model, data, peer == MASK) for peer, model in models.items()}
            seconds = common.interleaved(steps, rounds, warm_up=2)
            part.add(common.timing_rows(seconds, LORA, "x LoRA", model=name, dtype=kind))
            where = f"{name}, {kind}"

            def ratio(of: str, to: str, seconds: dict[str, list[float]] = seconds) -> float:
                return common.quartiles(common.ratios(seconds, of, to))[0]

            part.bars += [
                Bar(f"{QROSA}, {where}: x {QLORA_COMPILED}", ratio(QROSA, QLORA_COMPILED), 1.0),
                Bar(f"{QROSA}, {where}: x {LORA}", ratio(QROSA, LORA), 0.7),
                Bar(f"{where}: {REFERENCE} over {QROSA}", ratio(REFERENCE, QROSA), 2.8, at_least=True),
                Bar(f"{MASK}, {where}: x plain step", ratio(MASK, LOW_RANK), 1.6),
            ]
            part.panels[where] = {"x LoRA": [(peer, ratio(peer, LORA)) for peer in reversed(peers)]}
    return part
