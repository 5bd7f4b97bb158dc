"""resnet32x4 and resnet8x4 for 32x32 images, as in the distillation literature (Tian et al. 2020). torch only."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Body(nn.Sequential):
    """Normalised images (N, 3, 32, 32) -> embedding (N, 256). depth 32 or 8, four times the usual width."""

    def __init__(self, depth: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        width_in = 32
        for width, stride in ((64, 1), (128, 2), (256, 2)):
            for position in range((depth - 2) // 6):
                layers.append(Block(width_in, width, stride if position == 0 else 1))
                width_in = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def resnet(depth: int, classes: int) -> nn.Sequential:
    """Body and head; resnet32x4 has 7.4 million parameters, resnet8x4 1.2 million (100 classes)."""
    return nn.Sequential(Body(depth), nn.Linear(256, classes))
