"""The text family: token embedding, then a small transformer or a convolutional encoder; elastic in width and depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.data.dataset import InputSpec
from distill.students.arch import TextArch

_MASKED = -1e4
"""Added to the attention scores of padding; finite in float16, and exp() of it is zero."""


class TextNet(nn.Module):
    """int64 (N, T) -> embedding (N, D): mean over the real tokens of the last block; padding changes nothing.

    A row that holds padding alone gives a zero embedding. Token ids outside the vocabulary are undefined.
    """

    def __init__(self, arch: TextArch, spec: InputSpec) -> None:
        super().__init__()
        self.pad_id = spec.pad_id
        self.tokens = nn.Embedding(spec.vocabulary, arch.width)
        self.positions = nn.Parameter(torch.empty(spec.shape[0], arch.width))
        nn.init.normal_(self.tokens.weight, std=0.5)
        nn.init.normal_(self.positions, std=0.02)
        blocks: list[nn.Module] = [
            ConvBlock(arch.width, arch.kernel) if arch.kernel else TransformerBlock(arch.width, arch.heads)
            for _ in range(arch.depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(arch.width)
        self.embedding_dim = arch.width

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rest(self.tokens(tokens) + self.positions, self.real(tokens), 0)

    def real(self, tokens: Tensor) -> Tensor:
        """(N, T) -> (N, T, 1): 1 at real tokens, 0 at padding."""
        return tokens.ne(self.pad_id).to(self.positions.dtype).unsqueeze(-1)

    def rest(self, x: Tensor, real: Tensor, first: int) -> Tensor:
        """What follows block `first` - 1: its output x (N, T, W), and real (N, T, 1) -> embedding (N, W)."""
        for index in range(first, len(self.blocks)):
            x = self.blocks[index](x, real)
        x = self.norm(x) * real
        return x.sum(1) / real.sum(1).clamp(min=1)


class TransformerBlock(nn.Module):
    """Pre-norm attention and a two-layer ReLU network, each with a residual connection.

    The attention is written out (no fused kernel, no `nn.TransformerEncoderLayer`): it exports to plain MatMul and
    Softmax, and forward-mode differentiation works through it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.hidden, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x (N, T, W), real (N, T, 1) of 0/1 -> (N, T, W)."""
        h = self.norm1(x)
        q, k, v = (self._split(layer(h)) for layer in (self.query, self.key, self.value))  # (N, heads, T, W / heads)
        scores = q @ k.transpose(-1, -2) * self.scale + ((1 - real) * _MASKED).transpose(1, 2).unsqueeze(1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        result: Tensor = x + self.project(self.hidden(self.norm2(x)).relu())
        return result

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads).transpose(1, 2)


class ConvBlock(nn.Module):
    """x + relu(BN(conv(x))) over the tokens, with padding held at zero.

    A 2-D convolution over a height of one: quantised 1-D convolutions do not fuse in TensorRT.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, (1, kernel), padding=(0, kernel // 2), bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x (N, T, W), real (N, T, 1) of 0/1 -> (N, T, W)."""
        h: Tensor = self.norm(self.conv((x * real).transpose(1, 2).unsqueeze(2))).relu()
        return x + h.squeeze(2).transpose(1, 2)
