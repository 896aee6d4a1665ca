"""An eager training step of QRoSA against bitsandbytes' Linear4bit with PEFT's LoRA: python examples/bench_eager.py

A small Llama with an NF4 base and rank 16 in both; QRoSA also trains 0.6 % of every weight. The steps take turns in one
process. Needs `pip install peft`.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rosa_fx


def llama(hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4 // 64 * 64, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_attention_heads=8, num_key_value_heads=4, **sizes))


def with_lora(model: LlamaForCausalLM) -> tuple[nn.Module, Any]:
    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.float32, **options)
            new.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, module=new, **options).to("cpu")
            path, _, attribute = name.rpartition(".")
            setattr(model.model.get_submodule(path), attribute, new)
    model.is_loaded_in_4bit = True
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def with_rosa(model: LlamaForCausalLM) -> tuple[nn.Module, Any]:
    rosa_fx.transform(model, rosa_fx.RosaSpec(base="nf4", rank=16, density=0.006))
    masks: dict[str, Tensor] = {}
    for name, parameter in rosa_fx.adapter_state(model).items():
        if name.endswith(".sparse.values"):
            weight = name.removesuffix(".sparse.values")
            mask = torch.zeros(rosa_fx.adapter(model, weight).shape, dtype=torch.bool)
            mask.view(-1)[torch.randperm(mask.numel())[: parameter.numel()]] = True
            masks[weight] = mask
    rosa_fx.set_masks(model, masks)
    return model, rosa_fx.trainable_parameters(model)


def step_of(model: nn.Module, parameters: Any, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak(step: Callable[[], None]) -> int:
    """The largest number of bytes that torch's allocator has given out at a time during a step, above those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events: Any = profile.profiler
    changes = [e for e in events.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        live += change.nbytes()
        most = max(most, live)
    return most


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", rosa_fx.EagerTrainingWarning)

    ids = torch.randint(0, 1000, (arguments.rows, arguments.tokens))
    makers = {"bitsandbytes + PEFT LoRA": with_lora, "QRoSA": with_rosa}
    steps = {name: step_of(*make(llama(arguments.hidden)), ids) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= 2:  # the first ones warm up
                times[name].append(time.perf_counter() - start)
    seconds = [statistics.median(found) for found in times.values()]
    memory = [peak(step) for step in steps.values()]
    for name, took, most in zip(steps, seconds, memory):
        print(f"{name:26} {took * 1e3:8.0f} ms  {most / 2**20:8.1f} MiB")
    print(f"QRoSA / LoRA: time {seconds[1] / seconds[0]:.2f}, memory {memory[1] / memory[0]:.2f}")


if __name__ == "__main__":
    main()
