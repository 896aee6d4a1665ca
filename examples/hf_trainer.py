"""RoSA inside transformers' Trainer: python examples/hf_trainer.py [--model DIR] [--steps 12] [--compile] [--out FOLDER]

Without --model a Llama of random weights is trained, in seconds, to continue Python source byte by byte. A run that was
interrupted goes on with --resume.
"""

import argparse
import inspect
import json

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import rosa_fx


def small_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a folder or hub name; its vocabulary must hold the 256 bytes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", default="runs/hf_trainer")
    arguments = parser.parse_args()

    source = torch.tensor(list(inspect.getsource(json).encode()))
    rows = [{"input_ids": row, "labels": row} for row in source.unfold(0, 64, 32)]

    model = AutoModelForCausalLM.from_pretrained(arguments.model) if arguments.model else small_model()
    warm_up = max(1, arguments.steps // 4)
    rosa_fx.transform(model, rosa_fx.RosaSpec(base="nf4", rank=8, density=0.02, schedule=f"wl{warm_up}"))

    callback = rosa_fx.RosaCallback()  # drives the phases, and resumes them
    trainer = Trainer(
        model,
        TrainingArguments(
            arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            torch_compile=arguments.compile,
            save_steps=max(1, arguments.steps // 2),
            logging_steps=max(1, arguments.steps // 4),
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=rows,
        # All adapter parameters from the start, with a learning rate for each of the two adapters.
        optimizers=(rosa_fx.optimizer_for(model, lr=5e-3, lr_sparse=2e-3), None),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=arguments.resume)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"phase {callback.schedule.phase} after {trainer.state.global_step} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    rosa_fx.save_adapter(model, f"{arguments.out}/adapter")

    prompt = source[:16].unsqueeze(0).to(model.device)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    adapted = model.generate(prompt, **options)
    rosa_fx.merge(model).save_pretrained(f"{arguments.out}/merged")
    merged = AutoModelForCausalLM.from_pretrained(f"{arguments.out}/merged").to(model.device)
    same = torch.equal(merged.generate(prompt, **options), adapted)
    print(f"the merged model generates the same: {same}; adapter and merged model in {arguments.out}")


if __name__ == "__main__":
    main()
