"""A small depthwise student whose plain INT8 graph fails: a few channels of its activations are very wide."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.export.models import samples

TRAINING_IMAGES, TRAINING_LABELS = samples(512, 1)
WIDE = 400.0


class Depthwise(nn.Module):
    """uint8 images (N, 1, 16, 16) to logits (N, 4): stem, two inverted residuals without a sum, mean, head.

    groups: of each block's spatial convolution: its channels, or a number that leaves several in each group.
    """

    def __init__(self, groups: tuple[int, int]) -> None:
        super().__init__()
        self.stem = _layer(1, 8, 3, stride=2)
        self.expand1, self.spatial1 = _layer(8, 24, 1), _layer(24, 24, 3, groups=groups[0])
        self.project1 = _layer(24, 12, 1, act=False)
        self.expand2, self.spatial2 = _layer(12, 24, 1), _layer(24, 24, 3, stride=2, groups=groups[1])
        self.head = nn.Linear(24, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem((image.to(torch.float32) - 110.0) / 60.0)
        x = self.project1(self.spatial1(self.expand1(x)))
        x = self.spatial2(self.expand2(x))
        return self.head(x.mean((2, 3)))


def _layer(
    channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU() if act else nn.Identity())


Fails = Literal["depthwise", "grouped", "everywhere"]
_GROUPS: dict[str, tuple[int, int]] = {"depthwise": (24, 24), "grouped": (24, 4), "everywhere": (4, 4)}


@lru_cache(maxsize=3)
def sound(fails: Fails) -> Depthwise:
    """The trained network before any channel is made wide."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Depthwise(_GROUPS[fails])
    x, y = torch.from_numpy(TRAINING_IMAGES), torch.from_numpy(TRAINING_LABELS)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(48):
        rows = torch.arange(64) + 64 * (step % 8)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def failing(fails: Fails) -> Depthwise:
    """The same function with three channels made `WIDE` times wider and the weights that read them narrower.

    One INT8 scale for all channels then leaves nothing of the others. "depthwise": channels of the first block, which
    equalisation can scale back. "grouped": channels of the second block, which it cannot, since its convolution reads
    several in each group. "everywhere": such channels in both blocks, which are most of the network.
    """
    model = copy.deepcopy(sound(fails))
    if fails != "grouped":
        _widen(model.expand1, model.spatial1)
    if fails != "depthwise":
        _widen(model.expand2, model.spatial2)
    return model


@torch.no_grad()
def _widen(writer: nn.Sequential, reader: nn.Sequential) -> None:
    norm, convolution = writer[1], reader[0]
    out, size = convolution.weight.shape[:2]
    for channel in (1, 9, 17):
        norm.weight[channel] *= WIDE
        norm.bias[channel] *= WIDE
        first = channel // size * (out // convolution.groups)
        convolution.weight[first : first + out // convolution.groups, channel % size] /= WIDE


def calibration_images() -> NDArray[np.uint8]:
    return TRAINING_IMAGES[:128]
