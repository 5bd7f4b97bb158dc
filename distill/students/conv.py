"""The convolutional family: residual or inverted-residual blocks, elastic in width, depth and kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.data.dataset import InputSpec
from distill.networks import Normalize
from distill.students.arch import ConvArch, stage_count, stem_stride

_EXPANSION = 4
"""Inverted residual: hidden channels per output channel."""
_FEW = 8
"""Below so many input channels a strided 1x1 convolution cannot be trained as it is; see `_FewStrided`."""


class ConvNet(nn.Module):
    """uint8 (N, C, H, W) -> embedding (N, D): normalisation, stem, stages, global average pooling.

    Rule for the input size: the stem is one convolution and a 2x2 maximum, which halve the resolution together (a
    quarter from 96 px on, where the convolution is strided as well); small images thus lose no detail before the first
    convolution, and no block works at full resolution. Then stages, each but the first halving the map and doubling the
    channels, until the map is at most 4 px on its longer side; at least 2 and at most 4 of them. 28 px: 14, 7, 4.
    32 px: 16, 8, 4. 224 px: 56, 28, 14, 7.

    BatchNorm, ReLU and ReLU6 only: they fold into the convolutions and quantise without surprises on every runtime.
    Width, depth and kernel shrink by slicing (first channels, first blocks, centre of the kernel): stage i of a smaller
    architecture is a part of stage i of a larger one.
    """

    def __init__(self, arch: ConvArch, spec: InputSpec) -> None:
        super().__init__()
        self.normalize = Normalize(spec.mean, spec.std)
        channels = arch.width
        self.stem = nn.Sequential(
            _conv_norm_act(spec.shape[0], channels, 3, stride=stem_stride(spec) // 2, act=nn.ReLU), nn.MaxPool2d(2)
        )
        block = InvertedResidual if arch.inverted else Residual
        self.stages = nn.ModuleList()
        for stage in range(stage_count(spec)):
            out = arch.width * 2**stage
            blocks = [
                block(channels if i == 0 else out, out, arch.kernel, 2 if i == 0 and stage else 1)
                for i in range(arch.depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
            channels = out
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.embedding_dim = channels
        _initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        return self.rest(self.stem(self.normalize(image)), 0)

    def rest(self, x: Tensor, first: int) -> Tensor:
        """What follows stage `first` - 1: its output x (N, C, H, W) -> embedding (N, D)."""
        for index in range(first, len(self.stages)):
            x = self.stages[index](x)
        pooled: Tensor = self.pool(x)
        return pooled.flatten(1)


class Residual(nn.Module):
    """relu(x + BN(conv(relu(BN(conv(x)))))), with a strided 1x1 projection of x where the shape changes."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm_act(channels, out, kernel, stride=stride, act=nn.ReLU)
        self.second = _conv_norm_act(out, out, kernel)
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else _conv_norm_act(channels, out, 1, stride=stride)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.second(self.first(x)) + self.shortcut(x))
        return result


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise kernel, linear 1x1 projection (MobileNetV2), added to x where the shape stays."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = _EXPANSION * channels
        self.expand = _conv_norm_act(channels, hidden, 1, act=nn.ReLU6)
        self.depthwise = _conv_norm_act(hidden, hidden, kernel, stride=stride, groups=hidden, act=nn.ReLU6)
        self.project = _conv_norm_act(hidden, out, 1)
        self.residual = channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def _conv_norm_act(
    channels: int,
    out: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.ReLU] | type[nn.ReLU6] | None = None,
) -> nn.Sequential:
    conv = _FewStrided if kernel == 1 and stride > 1 and channels < _FEW else nn.Conv2d
    layers: list[nn.Module] = [
        conv(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    if act is not None:
        layers.append(act(inplace=True))
    return nn.Sequential(*layers)


class _FewStrided(nn.Conv2d):
    """A strided 1x1 convolution of a few channels, in two steps where a gradient is wanted.

    oneDNN's backward passes of the single step (seen in torch 2.13 on a CPU with AVX2: channels last, below eight input
    channels) write past the end of their memory, and the process crashes. Skipping pixels first gives the same values.
    Without a gradient it is one convolution, so that exported graphs stay plain.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        down, right = self.stride
        return F.conv2d(x[:, :, ::down, ::right], self.weight)


def _initialise(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
