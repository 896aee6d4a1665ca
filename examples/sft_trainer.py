"""RoSA inside TRL's SFTTrainer: python examples/sft_trainer.py [--model DIR] [--steps 8] [--out FOLDER]

Needs `pip install trl`. Without --model a Llama of random weights learns, in seconds, to answer arithmetic chats.
"""

import argparse

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import rosa_fx

TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def small_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    words = ["<s>", "</s>", "?", "user", "assistant", "plus", "is", *map(str, range(20))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "?", "unk_token": "?"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **names)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes)
    ), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default="runs/sft_trainer")
    arguments = parser.parse_args()

    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    else:
        model, tokenizer = small_model()
    chats = [
        [{"role": "user", "content": f"{a} plus {b} is"}, {"role": "assistant", "content": str(a + b)}]
        for a in range(10)
        for b in range(10)
    ]
    warm_up = max(1, arguments.steps // 4)
    rosa_fx.transform(model, rosa_fx.RosaSpec(base="nf4", rank=8, density=0.02, schedule=f"wl{warm_up}"))

    callback = rosa_fx.RosaCallback()
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            max_length=32,
            logging_steps=max(1, arguments.steps // 4),
            save_strategy="no",
            report_to=[],
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"messages": chats}),
        processing_class=tokenizer,
        optimizers=(rosa_fx.optimizer_for(model, lr=5e-3, lr_sparse=2e-3), None),
        callbacks=[callback],
    )
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"phase {callback.schedule.phase} after {trainer.state.global_step} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    rosa_fx.save_adapter(model, f"{arguments.out}/adapter")
    print(f"adapter in {arguments.out}/adapter")


if __name__ == "__main__":
    main()
