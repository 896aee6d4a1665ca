"""A gated linear recurrence, as state-space models have: python examples/state_space.py [--steps 30] [--eager]

One packed weight gives input, gate and decay; the state runs through a loop over time whose step multiplies with a square
weight; the readout is tied to the packed weight's first rows. rosa_fx finds every product, inside the loop and out.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rosa_fx

WIDTH, LENGTH, SYMBOLS = 48, 6, 8


class Recurrence(nn.Module):
    """x [batch, length, WIDTH] -> the same, by h_t = decay_t * h_{t-1} W + input_t."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * WIDTH**-0.5)
        self.carry = nn.Parameter(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inputs, gate, decay = (self.norm(x) @ self.packed.mT).chunk(3, dim=-1)
        state, states = torch.zeros_like(inputs[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.sigmoid(decay[:, t]) * (state @ self.carry) + inputs[:, t]
            states.append(state)
        mixed = torch.stack(states, 1) * F.silu(gate)
        return x + mixed @ self.packed[:WIDTH]


class Model(nn.Module):
    """Symbols [batch, length] -> logits [batch, SYMBOLS] of the one that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(SYMBOLS, WIDTH)
        self.blocks = nn.ModuleList(Recurrence() for _ in range(2))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.table(symbols)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, -1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eager", action="store_true", help="train without compiling")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = Model()
    rosa_fx.transform(model, rosa_fx.RosaSpec(rank=8, density=0.05, schedule=f"wl{arguments.steps // 3}"), strict=True)
    symbols = torch.randint(SYMBOLS, (64, LENGTH))
    wanted = symbols[:, 0]  # remember the first
    print(rosa_fx.explain(model, symbols))

    schedule = rosa_fx.MaskSchedule(model)  # not told how many backward calls a step has: it counts them
    optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model, lr=5e-3, lr_sparse=2e-3), weight_decay=0.0)
    call = model if arguments.eager else torch.compile(model)
    for step in range(arguments.steps):
        schedule.begin_step()
        loss = F.cross_entropy(call(symbols), wanted)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.end_step()
        if step in (0, arguments.steps - 1):
            print(f"step {step}: loss {loss.item():.3f}")

    with torch.no_grad():
        adapted = model(symbols)
        rosa_fx.merge(model)
        difference = (model(symbols) - adapted).abs().max().item()
    print(f"merged: outputs differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
