"""QRoSA fine-tuning of a pretrained language model: python examples/quickstart.py [MODEL] [STEPS] [FOLDER]"""

import sys

import rosa_fx
from rosa_fx.data import docstring_rows, encode_rows, make_batches
from rosa_fx.models import load_model

name, steps, folder = [*sys.argv[1:], *("smollm2-135m", "15", "runs/quickstart")[len(sys.argv) - 1 :]]
model, tokenizer = load_model(name)
train_rows, held_out_rows = (encode_rows(rows[:80], tokenizer, 128).rows for rows in docstring_rows())
train_batches, held_out = (make_batches(rows, 8, 128, tokenizer.eos_token_id) for rows in (train_rows, held_out_rows[:32]))

spec = rosa_fx.RosaSpec(base="nf4", rank=16, density=0.006, schedule="wl4")
model = rosa_fx.transform(model, spec)
model.enable_input_require_grads()  # the first block then runs the same graph as the others
for block in model.model.layers:
    block.compile()  # all blocks share one compiled graph, which starts much sooner than one of the whole model

config = rosa_fx.TrainConfig(max_steps=int(steps), lr=2e-3, lr_sparse=5e-4, warmup_steps=2, compile=False)
result = rosa_fx.train(model, train_batches, config, eval_batches=held_out)
rosa_fx.save_adapter(model, folder)
print(f"held-out loss {result.eval_loss_before:.3f} -> {result.eval_loss_after:.3f}, adapter in {folder}")
