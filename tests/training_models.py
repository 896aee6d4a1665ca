"""A small language model, its data, and what the tests of the trainer compare."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rosa_fx
from rosa_fx import RosaSpec, TrainConfig
from rosa_fx.adapters import adapter_state

VOCAB, WIDTH = 11, 16
EPS = torch.finfo(torch.float32).eps


class Tiny(nn.Module):
    """A language model in Hugging Face's calling convention, with dropout so that random state matters."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        logits = self.head(x + self.down(self.drop(F.relu(self.up(x)))))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def make_model(dropout: float = 0.1, **spec: Any) -> nn.Module:
    torch.manual_seed(3)
    fields: dict[str, Any] = {"base": "keep", "rank": 2, "alpha": 4, "density": 0.05, "schedule": "wl3"}
    targets = ("up.weight", "down.weight")
    return rosa_fx.transform(Tiny(dropout), RosaSpec(**{**fields, "targets": targets, **spec}))


def make_data(count: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    data = []
    for i in range(count):
        ids = torch.randint(0, VOCAB, (2, 5), generator=generator)
        labels = (ids * 3 + 1) % VOCAB
        labels[0, : i % 4] = -100
        data.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return data


def config(**fields: Any) -> TrainConfig:
    # bf16: results are compared in float32, on whatever hardware.
    defaults = {"max_steps": 8, "compile": False, "progress": False, "warmup_steps": 2, "log_every": 1, "bf16": False}
    return TrainConfig(**{**defaults, "lr": 0.01, "lr_sparse": 0.01, **fields})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state(model).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
