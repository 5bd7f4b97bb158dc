"""Small trained models and real samples for the export's tests."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class TinyConv(nn.Module):
    """uint8 images (N, 1, 16, 16) to logits (N, 4); normalisation is its first layer."""

    def __init__(self, width: int = 8, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(110.0))
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            activation(),
            nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            activation(),
        )
        self.mix = nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.body((image.to(torch.float32) - self.mean) / 60.0)
        x = torch.relu(x + self.mix(x))
        return self.head(x.mean((2, 3)))


class TinyText(nn.Module):
    """int64 tokens (N, 12) to logits (N, 3): one attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)  # one head: (N, 1, T, 16)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.head(x.mean(1))


def samples(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of a bright bar whose position is the class (4), with noise; labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    images = rng.normal(90, 35, (count, 1, 16, 16))
    for row, label in enumerate(labels):
        images[row, 0, 4 * label : 4 * label + 4] += 70
    return np.clip(images, 0, 255).astype(np.uint8), labels


@lru_cache(maxsize=4)
def trained(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """A TinyConv after a few seconds of training; about 95 % right."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = TinyConv(activation=activation)
    images, labels = samples(512, 1)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(60):
        rows = torch.arange(64) + 64 * (step % 8)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def calibration() -> NDArray[Any]:
    return samples(512, 1)[0][:128]
