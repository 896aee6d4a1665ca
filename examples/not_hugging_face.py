"""A transformer written by hand, whose weights are no nn.Linear: python examples/not_hugging_face.py [--steps 30] [--blocks 2]

The packed query-key-value weight, the attention output and the feed-forward weights are bare parameters, read by
`@`, `einsum` and `F.linear`. rosa_fx needs no change to the model: it rewrites the weights wherever they are used.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rosa_fx

WIDTH, HEADS, LENGTH, VOCABULARY = 128, 4, 32, 16


class Block(nn.Module):
    """Pre-norm attention and feed-forward, x [batch, length, WIDTH] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * WIDTH**-0.5)
        self.attention_out = nn.Parameter(torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)
        self.up = nn.Parameter(torch.randn(WIDTH, 4 * WIDTH) * WIDTH**-0.5)  # stored as [in, out]
        self.down = nn.Parameter(torch.randn(WIDTH, 4 * WIDTH) * (4 * WIDTH) ** -0.5)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        packed = self.norm1(x) @ self.qkv.T
        q, k, v = (part.view(batch, length, HEADS, -1) for part in packed.chunk(3, dim=-1))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        attention = scores.masked_fill(future, float("-inf")).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", attention, v).reshape(batch, length, WIDTH)
        x = x + torch.einsum("blk,nk->bln", mixed, self.attention_out)
        return x + F.linear(F.gelu(self.norm2(x) @ self.up), self.down)


class Transformer(nn.Module):
    """Tokens [batch, length] -> logits [batch, length, VOCABULARY]."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def repeated(rows: int = 16) -> tuple[Tensor, Tensor]:
    """Sequences whose second half repeats the first: inputs and next tokens [rows, LENGTH - 1], -100 where unpredictable."""
    half = torch.randint(VOCABULARY, (rows, LENGTH // 2))
    tokens = torch.cat([half, half], dim=1)
    targets = tokens[:, 1:].clone()
    targets[:, : LENGTH // 2 - 1] = -100
    return tokens[:, :-1], targets


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--blocks", type=int, default=2)
    arguments = parser.parse_args()
    steps = arguments.steps

    torch.manual_seed(0)
    model = Transformer(arguments.blocks)
    rosa_fx.transform(model, rosa_fx.RosaSpec(base="nf4", rank=16, density=0.05, schedule=f"wl{steps // 3}"))
    tokens, targets = repeated()
    print(rosa_fx.explain(model, tokens))

    schedule = rosa_fx.MaskSchedule(model, micro_batches=1)
    optimizer = torch.optim.AdamW(rosa_fx.trainable_parameters(model, lr=1e-2, lr_sparse=3e-3), weight_decay=0.0)
    compiled = torch.compile(model)
    for step in range(steps):
        schedule.begin_step()
        loss = F.cross_entropy(compiled(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.end_step()
        if step in (0, steps - 1):
            print(f"step {step}: loss {loss.item():.3f}")

    with torch.no_grad():
        adapted = model(tokens)
        rosa_fx.merge(model)
        difference = (model(tokens) - adapted).abs().max().item()
    print(f"merged: {type(model.blocks[0].qkv).__name__}s again, outputs differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
