"""The models that a calibration measures: architectures of every family, and graphs that only line layers up.

The architectures are exported as a run exports its students, with fresh weights, since time does not depend on them.
The graphs of layers hold the layer types of all families in sizes and orders of their own, so that a family which the
sample misses is priced from its layers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from distill.data import InputSpec
from distill.students import build_student
from distill.students.arch import Arch, ConvArch, TextArch, parse_arch
from distill.students.section import StudentSection
from export.onnx import DEFAULT_IR, choose_opset, export_graph, save
from export.precision import quantization_for, quantize
from export.section import ExportSection
from profiles.calibration import LAYERS
from profiles.device import Device

Array = NDArray[Any]

FAMILIES = ("conv", "convi", "text", "textc")
_IMAGES = ((1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 40, 40), (3, 96, 96))
_TEXTS = ((64, 2000), (32, 1000), (128, 4000), (48, 8000))
"""Tokens and vocabulary."""
_WIDEST = {28: 64, 32: 64, 40: 64, 64: 48, 96: 32}
"""Widest architecture by the side of its image: what runs within some ten milliseconds."""
_HEADS = (2, 4, 8)
_CALIBRATION_ROWS = 16
_OUTPUTS = (2, 10, 20, 100)


@dataclass(frozen=True)
class Sampled:
    """One model to be measured: an architecture with its input, or a graph of layers (arch None) from a seed."""

    name: str
    family: str
    spec: InputSpec
    arch: str | None = None
    seed: int = 0


def sample_architectures(
    per_family: int, seed: int = 0, *, families: Sequence[str] = FAMILIES, without: Sequence[str] = ()
) -> tuple[Sampled, ...]:
    """Architectures over the range of every family, with inputs of several sizes.

    Widths are spread evenly over their range, one from each part of it; the rest is drawn.

    Args:
        per_family: how many of each family.
        seed: of what is drawn; the same seed gives the same architectures.
        families: conv, convi, text or textc.
        without: words of architectures that are not to be drawn.
    """
    draw = random.Random(seed)
    return tuple(found for family in families for found in _sampled(family, per_family, draw, set(without)))


def _sampled(family: str, count: int, draw: random.Random, without: set[str]) -> Iterator[Sampled]:
    parts = draw.sample(range(count), count)
    for position in range(count):
        while True:
            share = (parts[position] + draw.random()) / count
            spec, arch = _draw_arch(family, share, position, draw)
            if str(arch) not in without:
                break
        without.add(str(arch))
        sides = "x".join(str(side) for side in spec.shape)
        yield Sampled(f"{arch} {sides}", family, spec, str(arch))


def _draw_arch(family: str, share: float, position: int, draw: random.Random) -> tuple[InputSpec, Arch]:
    """An architecture whose width lies at `share` of its range, and an input."""
    depth = draw.choice((1, 1, 2, 2, 3, 4))
    if family in ("conv", "convi"):
        shape = _IMAGES[position % len(_IMAGES)]
        widest = _WIDEST[shape[1]]
        width = 8 + 4 * int(share * ((widest - 8) // 4 + 1))
        arch: Arch = ConvArch(
            width, min(depth, 4 if width <= 32 else 2), draw.choice((3, 3, 5)), inverted=family == "convi"
        )
        return _image(shape), arch
    tokens, vocabulary = _TEXTS[position % len(_TEXTS)]
    width = 32 + 8 * int(share * 29)
    depth = min(depth, 4 if width <= 128 else 2)
    spec = InputSpec("tokens", (tokens,), vocabulary=vocabulary)
    if family == "textc":
        return spec, TextArch(width, depth, kernel=draw.choice((3, 5, 7)))
    return spec, TextArch(width, depth, heads=draw.choice([h for h in _HEADS if width % h == 0 and width // h >= 8]))


def _image(shape: tuple[int, ...]) -> InputSpec:
    return InputSpec("image", shape, mean=(0.45,) * shape[0], std=(0.25,) * shape[0])


def sample_layers(count: int, seed: int = 0) -> tuple[Sampled, ...]:
    """Graphs of layers: as many for images as for texts."""
    found = []
    for position in range(count):
        if position % 2 == 0:
            spec = _image(_IMAGES[position // 2 % len(_IMAGES)])
        else:
            tokens, vocabulary = _TEXTS[position // 2 % len(_TEXTS)]
            spec = InputSpec("tokens", (tokens,), vocabulary=vocabulary)
        found.append(Sampled(f"layers {seed}-{position}", LAYERS, spec, seed=1000 * seed + position))
    return tuple(found)


def realistic_rows(spec: InputSpec, count: int, seed: int = 0) -> Array:
    """Inputs (count, ...) that look like data: images that vary smoothly, texts of words that differ in frequency.

    Texts fill the length, as a query of the largest cost does.
    """
    generator = np.random.default_rng(seed)
    if spec.kind == "image":
        channels, height, width = spec.shape
        coarse = generator.normal(128, 60, (count, channels, -(-height // 4), -(-width // 4)))
        smooth = coarse.repeat(4, axis=2).repeat(4, axis=3)[:, :, :height, :width]
        rows = smooth + generator.normal(0, 12, (count, *spec.shape))
        return np.clip(rows, 0, 255).astype(np.uint8)
    # Zipf's law: the k-th word of a vocabulary is about 1 / k as frequent as the first
    ranks = np.arange(1, spec.vocabulary)
    return generator.choice(ranks, size=(count, *spec.shape), p=(1 / ranks) / (1 / ranks).sum()).astype(np.int64)


class _Logits(nn.Module):
    """What a run exports of a student: its logits."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head: torch.Tensor = self.student(x).head
        return head


def build(sampled: Sampled, device: Device, folder: Path) -> dict[str, Path]:
    """Writes the model in FP32 and INT8 into `folder`; precision -> file.

    Raises:
        EdgestillError: it cannot be exported or quantised.
    """
    stack = device.stacks[0]
    stem = sampled.name.replace(" ", "_")
    fp32, int8 = folder / f"{stem}.fp32.onnx", folder / f"{stem}.int8.onnx"
    opset = choose_opset(None, stack)
    spec = sampled.spec
    rows = realistic_rows(spec, _CALIBRATION_ROWS, sampled.seed)
    if sampled.arch is None:
        save(_layers(spec, random.Random(sampled.seed), opset), fp32)
    else:
        parse_arch(sampled.arch)
        head = random.Random(sampled.name).choice(_OUTPUTS)
        student = build_student(StudentSection(), spec, head, arch=sampled.arch, seed=0, base=Path())
        export_graph(
            _Logits(student).eval(), {spec.name: torch.from_numpy(rows[:2])}, fp32, opset=opset, max_ir=stack.max_ir
        )
    quantize(fp32, int8, {spec.name: rows}, quantization_for(device, stack), ExportSection())
    return {"fp32": fp32, "int8": int8}


def _layers(spec: InputSpec, draw: random.Random, opset: int) -> onnx.ModelProto:
    """A graph of layers in random sizes."""
    lines = _Lines(draw)
    name = spec.name
    if spec.kind == "image":
        value = lines.image(name, spec)
        shape: tuple[int, ...] = spec.shape
        for _ in range(7):
            value, shape = lines.image_layer(value, shape)
        value = lines.add("ReduceMean", [value, lines.integers([2, 3])], keepdims=0)
        columns = shape[0]
    else:
        value, columns = lines.embedding(name, spec)
        tokens = spec.shape[0]
        for _ in range(5):
            value, columns = lines.token_layer(value, tokens, columns)
        value = lines.add("ReduceSum", [value, lines.integers([1])], keepdims=0)
    outputs = draw.choice(_OUTPUTS)
    lines.add("Gemm", [value, lines.weights(outputs, columns), lines.weights(outputs)], "logits", transB=1)
    kind = TensorProto.UINT8 if spec.kind == "image" else TensorProto.INT64
    graph = helper.make_graph(
        lines.nodes,
        "layers",
        [helper.make_tensor_value_info(name, kind, ["batch", *spec.shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", outputs])],
        lines.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=DEFAULT_IR)
    return onnx.shape_inference.infer_shapes(model)


class _Lines:
    """Nodes and constants of a graph that is written from its input on."""

    def __init__(self, draw: random.Random) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self._draw = draw
        self._values = np.random.default_rng(draw.randrange(2**32))

    def add(self, operator: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """One node; returns the name of its output."""
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"n{len(self.nodes)}", **attributes))
        return output

    def weights(self, *shape: int) -> str:
        """A constant that keeps the size of what it is multiplied with."""
        values = self._values.normal(0, 1 / math.sqrt(max(math.prod(shape[1:]), 1)), shape)
        return self._constant(values.astype(np.float32))

    def integers(self, values: Sequence[int]) -> str:
        """A constant list of integers."""
        return self._constant(np.asarray(values, dtype=np.int64))

    def _constant(self, values: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def image(self, name: str, spec: InputSpec) -> str:
        """Pixels to numbers around zero, as the students do it."""
        value = self.add("Cast", [name], to=TensorProto.FLOAT)
        scale = self._constant(np.full((1, spec.shape[0], 1, 1), 1 / 64, np.float32))
        shift = self._constant(np.full((1, spec.shape[0], 1, 1), -1.8, np.float32))
        return self.add("Add", [self.add("Mul", [value, scale]), shift])

    def image_layer(self, value: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """A convolution (dense, 1x1 or depthwise), a residual pair or a pooling."""
        channels, height, width = shape
        kinds = ["dense", "pointwise", "depthwise", "residual", "inverted", "strided"]
        kind = self._draw.choice(kinds if channels >= 8 else ["dense"])
        kernel = self._draw.choice((3, 3, 5))
        made = 4 * self._draw.randint(2, 24 if height < 33 else 8)
        stride = 2 if height > 33 or (height > 6 and self._draw.random() < 0.35) else 1
        down = (-(-height // stride), -(-width // stride))
        if kind == "dense":
            pooled = stride == 2 and height % 2 == 0 and self._draw.random() < 0.5
            value = self._relu(self.conv(value, channels, made, kernel, 1 if pooled else stride))
            if pooled:
                value = self.add("MaxPool", [value], kernel_shape=[2, 2], strides=[2, 2])
            return value, (made, *down)
        if kind == "pointwise":
            return self._clip(self.conv(value, channels, made, 1)), (made, height, width)
        if kind == "depthwise":
            return self._clip(self.conv(value, channels, channels, kernel, stride, channels)), (channels, *down)
        if kind == "residual":
            inner = self._relu(self.conv(value, channels, channels, kernel))
            inner = self.conv(inner, channels, channels, kernel)
            return self._relu(self.add("Add", [inner, value])), shape
        if kind == "inverted":
            hidden = 4 * channels
            inner = self._clip(self.conv(value, channels, hidden, 1))
            inner = self._clip(self.conv(inner, hidden, hidden, kernel, stride, hidden))
            inner = self.conv(inner, hidden, channels, 1)
            return (self.add("Add", [inner, value]) if stride == 1 else inner), (channels, *down)
        first = self.conv(value, channels, made, kernel, stride)
        return self._relu(self.add("Add", [first, self.conv(value, channels, made, 1, stride)])), (made, *down)

    def conv(self, value: str, channels: int, made: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
        """A square convolution with a bias."""
        filters = self.weights(made, channels // groups, kernel, kernel)
        pad = kernel // 2
        return self.add(
            "Conv",
            [value, filters, self.weights(made)],
            kernel_shape=[kernel, kernel],
            pads=[pad] * 4,
            strides=[stride, stride],
            group=groups,
        )

    def _relu(self, value: str) -> str:
        return self.add("Relu", [value])

    def _clip(self, value: str) -> str:
        low, high = self._constant(np.asarray(0, np.float32)), self._constant(np.asarray(6, np.float32))
        return self.add("Clip", [value, low, high])

    def embedding(self, name: str, spec: InputSpec) -> tuple[str, int]:
        """Tokens to vectors, with their positions added."""
        columns = 8 * self._draw.randint(4, 24)
        value = self.add("Gather", [self.weights(spec.vocabulary, columns), name])
        return self.add("Add", [value, self.weights(spec.shape[0], columns)]), columns

    def token_layer(self, value: str, tokens: int, columns: int) -> tuple[str, int]:
        """A product, a normalisation, an attention or a convolution over the tokens."""
        kind = self._draw.choice(("product", "normalisation", "attention", "convolution", "feedforward"))
        if kind == "product":
            made = 8 * self._draw.randint(4, 32)
            return self.linear(value, columns, made), made
        if kind == "feedforward":
            inner = self._relu(self.linear(value, columns, 4 * columns))
            return self.add("Add", [self.linear(inner, 4 * columns, columns), value]), columns
        if kind == "attention":
            return self.attention(value, tokens, columns), columns
        if kind == "convolution":
            return self.token_conv(value, columns), columns
        return self.normalisation(value, columns), columns

    def linear(self, value: str, columns: int, made: int) -> str:
        """A product with a constant, and its bias."""
        return self.add("Add", [self.add("MatMul", [value, self.weights(columns, made)]), self.weights(made)])

    def normalisation(self, value: str, columns: int) -> str:
        """Layer normalisation."""
        ones = self._constant(np.ones(columns, np.float32))
        return self.add("LayerNormalization", [value, ones, self.weights(columns)], axis=-1)

    def attention(self, value: str, tokens: int, columns: int) -> str:
        """Attention of every token to every token, in heads."""
        heads = self._draw.choice([h for h in (1, 2, 4, 8) if columns % h == 0])
        split = self.integers([0, tokens, heads, columns // heads])
        query, key, held = (self.add("Reshape", [self.linear(value, columns, columns), split]) for _ in range(3))
        query, held = (self.add("Transpose", [each], perm=[0, 2, 1, 3]) for each in (query, held))
        key = self.add("Transpose", [key], perm=[0, 2, 3, 1])
        scale = self._constant(np.asarray((columns // heads) ** -0.5, np.float32))
        scores = self.add("Mul", [self.add("MatMul", [query, key]), scale])
        mixed = self.add("MatMul", [self.add("Softmax", [scores], axis=-1), held])
        joined = self.add("Transpose", [mixed], perm=[0, 2, 1, 3])
        joined = self.add("Reshape", [joined, self.integers([0, tokens, columns])])
        return self.add("Add", [self.linear(joined, columns, columns), value])

    def token_conv(self, value: str, columns: int) -> str:
        """A convolution over the tokens, as one over an image of height one."""
        kernel = self._draw.choice((3, 5, 7))
        turned = self.add("Transpose", [value], perm=[0, 2, 1])
        turned = self.add("Unsqueeze", [turned, self.integers([2])])
        made = self.add(
            "Conv",
            [turned, self.weights(columns, columns, 1, kernel), self.weights(columns)],
            kernel_shape=[1, kernel],
            pads=[0, kernel // 2, 0, kernel // 2],
        )
        flat = self.add("Squeeze", [self._relu(made), self.integers([2])])
        return self.add("Add", [self.add("Transpose", [flat], perm=[0, 2, 1]), value])
