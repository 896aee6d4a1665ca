"""An MLP-Mixer that shares its weights between layers: python examples/mixer.py [--steps 30] [--eager]

Every layer reads the same four weights: the token-mixing ones by `einsum` over the patch axis, the channel-mixing ones as
1 x 1 convolutions. Convolutions are left alone unless a pattern names them; each shared weight has one adapter.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rosa_fx

SIDE, PATCH, WIDTH, CLASSES = 16, 4, 64, 4
PATCHES = (SIDE // PATCH) ** 2


class Mixer(nn.Module):
    """Images [batch, 1, SIDE, SIDE] -> logits [batch, CLASSES]."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = layers
        self.embed = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.mix_in = nn.Parameter(torch.randn(PATCHES, 2 * PATCHES) * PATCHES**-0.5)
        self.mix_out = nn.Parameter(torch.randn(2 * PATCHES, PATCHES) * (2 * PATCHES) ** -0.5)
        self.widen, self.narrow = nn.Conv1d(WIDTH, 2 * WIDTH, 1), nn.Conv1d(2 * WIDTH, WIDTH, 1)
        self.norm1, self.norm2 = nn.GroupNorm(1, WIDTH), nn.GroupNorm(1, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2)  # [batch, WIDTH, PATCHES]
        for _ in range(self.layers):
            hidden = F.gelu(torch.einsum("bcp,ph->bch", self.norm1(x), self.mix_in))
            x = x + torch.einsum("bch,hp->bcp", hidden, self.mix_out)
            x = x + self.narrow(F.gelu(self.widen(self.norm2(x))))
        return self.head(x.mean(-1))


def stripes(count: int = 32) -> tuple[Tensor, Tensor]:
    """Noisy stripes of four widths, and which width it is."""
    label = torch.randint(CLASSES, (count,))
    phase = torch.arange(SIDE) * (label[:, None] + 1) * (torch.pi / SIDE) + torch.rand(count, 1) * 6
    return phase.sin()[:, None, :, None] + 0.3 * torch.randn(count, 1, SIDE, SIDE), label


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eager", action="store_true", help="train without compiling")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = Mixer()
    targets = ["all-linear", "widen.weight", "narrow.weight"]
    rosa_fx.transform(model, rosa_fx.RosaSpec(targets=targets, rank=8, density=0.05, schedule=f"wl{arguments.steps // 3}"))
    images, labels = stripes()
    print(rosa_fx.explain(model, images))

    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model, lr=5e-3, lr_sparse=2e-3), weight_decay=0.0)
    call = model if arguments.eager else torch.compile(model)
    for step in range(arguments.steps):
        schedule.begin_step()
        loss = F.cross_entropy(call(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.end_step()
        if step in (0, arguments.steps - 1):
            print(f"step {step}: loss {loss.item():.3f}")

    with torch.no_grad():
        adapted = model(images)
        rosa_fx.merge(model)
        difference = (model(images) - adapted).abs().max().item()
    print(f"merged: {type(model.widen).__name__} again, outputs differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
