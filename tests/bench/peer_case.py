"""A small causal model and its rows in plain torch, for both sides of `tests.bench.peer`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

#: Vocabulary, width, inner width, layers, heads, tokens, by P.
SIZES = {
    "0.5M": (1024, 96, 384, 3, 4, 64),
    "2M": (2048, 192, 768, 4, 4, 64),
    "5M": (4096, 256, 1024, 5, 8, 64),
}
SAMPLES, BATCH = 128, 8


class Layer(nn.Module):
    """Attention and a two-layer network, each behind a norm."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        q, k, v = (
            part.view(size, length, self.heads, -1).transpose(1, 2)
            for part in self.inward(self.norm1(x)).chunk(3, -1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        hidden = torch.ones(length, length, dtype=torch.bool).tril().logical_not()
        mixed = scores.masked_fill(hidden, -1e9).softmax(-1) @ v
        x = x + self.outward(mixed.transpose(1, 2).reshape(size, length, width))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Embedding, layers, head."""

    def __init__(self, size: str) -> None:
        super().__init__()
        vocabulary, width, inner, layers, heads, _ = SIZES[size]
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Layer(width, inner, heads) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def case(size: str) -> tuple[Model, list[Tensor]]:
    """The model and batches of tokens."""
    torch.manual_seed(0)
    vocabulary, tokens = SIZES[size][0], SIZES[size][-1]
    return Model(size), list(torch.randint(vocabulary, (SAMPLES, tokens)).split(BATCH))


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean over samples of the mean loss of the second half of the tokens."""
    return sample_losses(model, batch).mean()


def sample_losses(model: nn.Module, batch: Tensor) -> Tensor:
    """(B,) the same by sample."""
    start = batch.shape[1] // 2
    logits = model(batch)[:, start - 1 : -1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, batch[:, start:], reduction="none").mean(1)
