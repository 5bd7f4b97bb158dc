"""Cross-layer equalisation and bias correction: the float graph changed so that INT8 loses less of it.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV
2019, arXiv 1906.04721. Weights have a scale for each output channel here, so what a tensor's single scale hurts is the
activations: their measured ranges take the place of the first layer's weights in the paper's formula.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from export.onnx import write
from export.parity import emulate, open_session

_BATCH = 64
_LARGEST_FACTOR = 1e4
"""Channels are scaled by at most this against each other; a channel that is always 0 needs no scale."""
_SAME_CHANNEL = (
    "Relu",
    "LeakyRelu",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Add",
    "Sum",
    "Identity",
    "Dropout",
)
"""f(s x) = s f(x) for s > 0, channel by channel."""
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "ReduceMean")
"""The same where only positions go and the channels stay the second dimension."""


def equalise(model: onnx.ModelProto, calibration: Mapping[str, NDArray[Any]]) -> tuple[onnx.ModelProto, int]:
    """The same function with channels scaled so that activations and the weights that read them share a range.

    For every set of values that have to be scaled alike (a layer's output, or a whole residual stream): with a_c the
    largest activation of channel c and w_c the largest weight that reads it, the layers that write it are divided by
    s_c = sqrt(a_c / w_c) and those that read it multiplied. Then a_c / s_c = w_c s_c: the paper's condition. A
    depthwise convolution has a scale for each channel of its own, so there the activations alone decide: s_c = a_c.
    Exact but for rounding where Clip (ReLU6) never cuts at its upper end on the calibration samples; other Clips stop
    it.

    Args:
        model: the prepared float graph: batch normalisation folded, all shapes known.
        calibration: real training samples by input.

    Returns:
        The graph, and how many sets of values were scaled; 0: nothing could be.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    regions = _regions(graph)
    watched = {name for region in regions for name in region.values}
    if not watched:
        return changed, 0
    largest = channel_extremes(changed, sorted(watched), calibration)
    done = 0
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for region in regions:
        if any(np.max(largest[clip.output[0]], initial=0.0) >= top for clip, top in region.tops()):
            continue  # a ReLU6 that cuts
        activations = np.max([largest[name] for name in region.values], axis=0)
        free, reading = True, np.zeros_like(activations)
        for node in region.readers:
            weight = np.abs(numpy_helper.to_array(weights[node.input[1]]))
            if not _is_depthwise(node, weight.shape):
                free = False
                reading = np.maximum(reading, _by_input_channel(node, weight).reshape(len(activations), -1).max(1))
        live = activations > activations.max() / _LARGEST_FACTOR if activations.max() > 0 else activations > 0
        if not free:
            live &= reading > 0
        if not live.any():
            continue
        factors = np.ones_like(activations)
        factors[live] = activations[live] if free else np.sqrt(activations[live] / reading[live])
        # where the scale of the whole lies changes nothing but the numbers' size
        factors[live] /= math.exp(np.log(factors[live]).mean())
        _scale(graph, weights, region, factors)
        for clip, _ in region.tops():
            clip.op_type = "Relu"
            del clip.input[1:]
        done += 1
    _drop_unread(graph)
    return changed, done


class _Region:
    """Values that must share one scale per channel, the layers that write and read them, and Clips in between."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.values: set[str] = set()
        self.writers: list[onnx.NodeProto] = []
        self.readers: list[onnx.NodeProto] = []
        self.clips: list[onnx.NodeProto] = []

    def tops(self) -> list[tuple[onnx.NodeProto, float]]:
        """The Clips with their upper ends."""
        constants = {tensor.name: tensor for tensor in self.graph.initializer}
        return [(clip, float(numpy_helper.to_array(constants[clip.input[2]]).reshape(-1)[0])) for clip in self.clips]


def _regions(graph: onnx.GraphProto) -> list[_Region]:
    """The regions that can be scaled: written by convolutions alone, read by convolutions and Gemms alone."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    writers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        for name in node.output:
            writers[name] = node
    shapes = {
        entry.name: [int(dim.dim_value) for dim in entry.type.tensor_type.shape.dim]
        for entry in (*graph.value_info, *graph.output)
    }
    ends = {entry.name for entry in (*graph.input, *graph.output)}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in set(node.input) & constants.keys():
            uses[name] = uses.get(name, 0) + 1
    seen: set[str] = set()
    found = []
    for start in graph.node:
        if start.op_type != "Conv" or start.output[0] in seen:
            continue
        region, sound, waiting = _Region(graph), True, [start.output[0]]
        while waiting:
            value = waiting.pop()
            if value in region.values:
                continue
            region.values.add(value)
            writer = writers.get(value)
            if value in ends or writer is None or len(shapes.get(value, [])) < 2:
                sound = False
                continue
            if writer.op_type == "Conv":
                region.writers.append(writer)
            elif _passes(writer, constants, shapes):
                waiting += [name for name in writer.input[: _inputs(writer)] if name not in region.values]
                if writer.op_type == "Clip":
                    region.clips.append(writer)
            else:
                sound = False
            for reader in readers.get(value, []):
                if reader.op_type in ("Conv", "Gemm") and reader.input[0] == value and reader.input[1] in constants:
                    region.readers.append(reader)
                elif _passes(reader, constants, shapes) and value in reader.input[: _inputs(reader)]:
                    waiting.append(reader.output[0])
                else:
                    sound = False
        seen |= region.values
        touched = [name for node in region.writers for name in node.input[1:] if name]
        touched += [node.input[1] for node in region.readers]
        sound = sound and all(name in constants and uses[name] == 1 for name in touched)
        sound = sound and all(_groups_fit(node, constants) for node in region.readers)
        if sound and region.readers:
            found.append(region)
    return found


def _inputs(node: onnx.NodeProto) -> int:
    return len(node.input) if node.op_type in ("Add", "Sum") else 1


def _passes(node: onnx.NodeProto, constants: Mapping[str, TensorProto], shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether scaling the channels of the inputs scales those of the output."""
    before, after = shapes.get(node.input[0], []) if node.input else [], shapes.get(node.output[0], [])
    if node.op_type in ("Add", "Sum"):
        # a constant would have to be scaled, too; a broadcast would mix channels
        return not any(name in constants for name in node.input) and all(
            list(shapes.get(name, [])) == list(after) for name in node.input
        )
    if node.op_type == "Clip":
        limits = [numpy_helper.to_array(constants[name]) for name in node.input[1:] if name in constants]
        return len(node.input) == 3 and len(limits) == 2 and float(limits[0].reshape(-1)[0]) == 0.0
    if node.op_type in _SAME_CHANNEL:
        return len(before) >= 2
    if node.op_type in _RESHAPING:
        if len(before) < 3 or len(after) < 2 or before[1] != after[1] or before[1] == 0:
            return False
        if node.op_type != "ReduceMean":
            return math.prod(before[2:]) == 1 and math.prod(after[2:]) == 1
        axes = [entry.ints for entry in node.attribute if entry.name == "axes"]
        if len(node.input) > 1 and node.input[1] in constants:
            axes = [numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()]
        return len(axes) == 1 and all(axis % len(before) >= 2 for axis in axes[0])
    return False


def _groups(node: onnx.NodeProto) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == "group"), 1)


def _is_depthwise(node: onnx.NodeProto, shape: Sequence[int]) -> bool:
    return node.op_type == "Conv" and shape[1] == 1 and _groups(node) == shape[0] and _groups(node) > 1


def _groups_fit(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    """Plain, or one filter for each channel: other groups are not scaled."""
    if node.op_type == "Gemm":
        factors = {entry.name: entry.f for entry in node.attribute if entry.name == "alpha"}
        return factors.get("alpha", 1.0) == 1.0 and not any(
            entry.name == "transA" and entry.i for entry in node.attribute
        )
    return _groups(node) == 1 or _is_depthwise(node, constants[node.input[1]].dims)


def _input_axis(node: onnx.NodeProto) -> int:
    """Axis of the weights along which a reader's input channels lie."""
    if node.op_type == "Conv":
        return 1
    return 1 if any(entry.name == "transB" and entry.i for entry in node.attribute) else 0


def _by_input_channel(node: onnx.NodeProto, weight: NDArray[Any]) -> NDArray[Any]:
    return np.moveaxis(weight, _input_axis(node), 0)


def _scale(
    graph: onnx.GraphProto, weights: Mapping[str, TensorProto], region: _Region, factors: NDArray[np.float64]
) -> None:
    """Divides what writes the region by `factors` (C,) and multiplies what reads it."""

    def write(name: str, array: NDArray[Any]) -> None:
        weights[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))

    for node in region.writers:
        weight = numpy_helper.to_array(weights[node.input[1]]).astype(np.float64)
        write(node.input[1], weight / factors.reshape(-1, *[1] * (weight.ndim - 1)))
        if len(node.input) > 2 and node.input[2]:
            write(node.input[2], numpy_helper.to_array(weights[node.input[2]]).astype(np.float64) / factors)
    for node in region.readers:
        weight = numpy_helper.to_array(weights[node.input[1]]).astype(np.float64)
        axis = 0 if _is_depthwise(node, weight.shape) else _input_axis(node)
        shape = [-1 if position == axis else 1 for position in range(weight.ndim)]
        write(node.input[1], weight * factors.reshape(shape))


def channel_extremes(
    model: onnx.ModelProto, values: Sequence[str], samples: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float64]]:
    """The largest |x| of every channel (second dimension) of these values over all samples, by value."""
    found: dict[str, NDArray[np.float64]] = {}
    for outputs in _watch(model, values, samples):
        for name, array in outputs.items():
            largest = np.abs(np.moveaxis(array, 1, 0)).reshape(array.shape[1], -1).max(1).astype(np.float64)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found


def channel_means(
    model: onnx.ModelProto, values: Sequence[str], samples: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float64]]:
    """The mean of every channel (second dimension) of these values over all samples and positions, by value."""
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    for outputs in _watch(model, values, samples):
        for name, array in outputs.items():
            flat = np.moveaxis(array, 1, 0).reshape(array.shape[1], -1).astype(np.float64)
            sums[name] = sums.get(name, np.zeros(len(flat))) + flat.sum(1)
            counts[name] = counts.get(name, 0) + flat.shape[1]
    return {name: total / counts[name] for name, total in sums.items()}


def _watch(
    model: onnx.ModelProto, values: Sequence[str], samples: Mapping[str, NDArray[Any]]
) -> Iterable[dict[str, NDArray[Any]]]:
    """The values of a graph, batch by batch, computed as it is written."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        path = Path(folder) / "watched.onnx"
        write(watched, path)
        session = open_session(path)
    count = len(next(iter(samples.values())))
    for start in range(0, count, _BATCH):
        batch = {name: array[start : start + _BATCH] for name, array in samples.items()}
        yield dict(zip(values, session.run(list(values), batch), strict=True))


def correct_biases(
    model: onnx.ModelProto, quantized: onnx.ModelProto, samples: Mapping[str, NDArray[Any]]
) -> tuple[onnx.ModelProto, int]:
    """The float graph with biases that take back the mean error of every output channel, layer by layer.

    The paper's correction with the expectation measured (its appendix): for each convolution and Gemm in graph order,
    the mean over samples and positions of what the float graph writes minus what the INT8 one does, with the layers
    before it corrected already, is added to its bias.

    Args:
        model: the prepared float graph.
        quantized: the INT8 graph made from it, with every node's name kept.
        samples: real training samples by input.

    Returns:
        The float graph, to be quantised anew with the same ranges, and the number of biases that changed.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    corrected = onnx.ModelProto()
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        path = Path(folder) / "quantized.onnx"
        write(quantized, path)
        emulate(path, path)
        corrected.CopyFrom(onnx.load(str(path)))
    constants = {tensor.name for tensor in changed.graph.initializer}
    layers = [
        node
        for node in changed.graph.node
        if node.op_type in ("Conv", "Gemm") and node.input[1] in constants and _plain_bias(node)
    ]
    twins = {node.name: node for node in corrected.graph.node}
    layers = [node for node in layers if node.name in twins]
    expected = channel_means(changed, [node.output[0] for node in layers], samples)
    for node in layers:
        twin = twins[node.name]
        # the activation behind it may be gone from the INT8 graph: then the twin writes under that one's name
        found = channel_means(corrected, [twin.output[0]], samples)[twin.output[0]]
        error = expected[node.output[0]] - found
        _add_bias(changed.graph, node, error)
        _add_bias(corrected.graph, twin, error)
    _drop_unread(changed.graph)
    return changed, len(layers)


def _plain_bias(node: onnx.NodeProto) -> bool:
    return node.op_type == "Conv" or all(entry.f == 1.0 for entry in node.attribute if entry.name in ("alpha", "beta"))


def _add_bias(graph: onnx.GraphProto, node: onnx.NodeProto, error: NDArray[np.float64]) -> None:
    bias = next((t for t in graph.initializer if len(node.input) > 2 and t.name == node.input[2]), None)
    name = f"{node.name}_corrected_bias"
    value = error if bias is None else numpy_helper.to_array(bias).astype(np.float64) + error
    if len(node.input) > 2:
        node.input[2] = name
    else:
        node.input.append(name)
    graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Drops constants that nothing reads any more."""
    read = {name for node in graph.node for name in node.input} | {entry.name for entry in graph.output}
    kept = [TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
