"""A small transformer encoder with a classifier, seeded: a network of matmuls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

TOKENS, WIDTH, HEADS, LAYERS, CLASSES = 64, 256, 4, 2, 100


def load(seed: int = 0) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the encoder in evaluation mode and an example, float32 (1, TOKENS, WIDTH).

    Attention is written out in matmuls and a softmax, so that an exporter finds those.
    """
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (
                nn.Linear(WIDTH, WIDTH) for _ in range(4)
            )
            self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.grow, self.shrink = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def heads(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, TOKENS, HEADS, WIDTH // HEADS).transpose(1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key, value = (self.heads(f(x)) for f in (self.query, self.key, self.value))
            scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
            mixed = torch.softmax(scores, -1) @ value
            x = self.first(x + self.out(mixed.transpose(1, 2).reshape(-1, TOKENS, WIDTH)))
            return self.second(x + self.shrink(torch.relu(self.grow(x))))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers(x).mean(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Encoder().eval().requires_grad_(False)
    return module, torch.from_numpy(tokens(1, seed))


def tokens(count: int, seed: int = 0) -> np.ndarray:
    """Return seeded inputs, float32 (count, TOKENS, WIDTH): tokens of an input have a part in
    common, by which inputs differ.
    """
    each = [np.random.default_rng((seed, i)) for i in range(count)]
    common = np.stack([rng.normal(size=(1, WIDTH)) for rng in each])
    own = np.stack([rng.normal(size=(TOKENS, WIDTH)) for rng in each])
    return (common + own).astype("float32")
