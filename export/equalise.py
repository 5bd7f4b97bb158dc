"""Cross-layer equalisation and bias correction: the float graph changed so that INT8 loses less of it.

Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV
2019, arXiv 1906.04721. Weights have a scale for each output channel here, so what a tensor's single scale hurts is the
activations: their measured ranges take the place of the first layer's weights in the paper's formula.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
_ELEMENTWISE = ("Relu", "LeakyRelu", "Identity", "Dropout")
"""f(s x) = s f(x) for s > 0."""
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool")
"""The same, channel by channel of a map."""
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_REDUCING = ("ReduceMean", "ReduceSum")


@dataclass(frozen=True)
class Equalised:
    """The scaled graph. groups: sets of values that were scaled; 0: it is the graph as it was.

    stopped: operators at which other layers' channels could not be scaled, with how many sets each stopped: those that
    do not pass a scale on (Gelu, a normalisation behind a residual sum), and the Reshape into an attention's heads,
    through which it is not followed.
    """

    model: onnx.ModelProto
    groups: int
    stopped: Mapping[str, int]


def equalise(model: onnx.ModelProto, calibration: Mapping[str, NDArray[Any]]) -> Equalised:
    """The same function with channels scaled so that activations and the weights that read them share a range.

    For every set of values that have to be scaled alike (a layer's output, or a whole residual stream): with a_c the
    largest activation of channel c and w_c the largest weight that reads it, the layers that write it are divided by
    s_c = sqrt(a_c / w_c) and those that read it multiplied. Then a_c / s_c = w_c s_c: the paper's condition. A
    depthwise convolution has a scale for each channel of its own, so there the activations alone decide: s_c = a_c.
    Layers are convolutions and matrix products with constant weights; a layer normalisation's own weights write, too.
    Exact but for rounding where Clip (ReLU6) never cuts at its upper end on the calibration samples; other Clips stop
    it.

    Args:
        model: the prepared float graph: batch normalisation folded, all shapes known.
        calibration: real training samples by input.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    _untie_vectors(graph)
    regions, stopped = _regions(graph)
    watched = {name: axis for region in regions for name, axis in region.values.items()}
    if not watched:
        return Equalised(model, 0, stopped)
    largest = channel_extremes(changed, watched, calibration)
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
                reading = np.maximum(
                    reading, np.moveaxis(weight, _input_axis(node), 0).reshape(len(activations), -1).max(1)
                )
        live = activations > activations.max() / _LARGEST_FACTOR if activations.max() > 0 else activations > 0
        if not free:
            live &= reading > 0
        if not live.any():
            continue
        factors = np.ones_like(activations)
        factors[live] = activations[live] if free else np.sqrt(activations[live] / reading[live])
        # where the scale of the whole lies changes nothing but the numbers' size
        factors[live] /= math.exp(np.log(factors[live]).mean())
        _scale(weights, region, factors)
        for clip, _ in region.tops():
            clip.op_type = "Relu"
            del clip.input[1:]
        done += 1
    _drop_unread(graph)
    return Equalised(changed, done, stopped)


def _untie_vectors(graph: onnx.GraphProto) -> None:
    """Gives every reader of a shared vector (the exporter keeps equal biases once) one of its own."""
    vectors = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 1}
    seen: set[str] = set()
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in vectors and name in seen:
                copied = TensorProto()
                copied.CopyFrom(vectors[name])
                copied.name = f"{name}_of_{node.name}_{place}"
                graph.initializer.append(copied)
                node.input[place] = copied.name
            seen.add(name)


class _Region:
    """Values that must share one scale per channel, the layers that write and read them, and what is in between.

    values: with the axis of their channels. shifts: (constant that is added, number of its axes behind the channels').
    stopped: the operator that does not let the scale pass; None: it can be scaled. "": an input or output of the graph.
    """

    def __init__(self, constants: Mapping[str, TensorProto]) -> None:
        self.constants = constants
        self.values: dict[str, int] = {}
        self.writers: list[onnx.NodeProto] = []
        self.readers: list[onnx.NodeProto] = []
        self.clips: list[onnx.NodeProto] = []
        self.shifts: list[tuple[str, int]] = []
        self.stopped: str | None = None

    def stop(self, operator: str) -> None:
        self.stopped = self.stopped or operator

    def tops(self) -> list[tuple[onnx.NodeProto, float]]:
        """The Clips with their upper ends."""
        return [
            (clip, float(numpy_helper.to_array(self.constants[clip.input[2]]).reshape(-1)[0])) for clip in self.clips
        ]


class _View:
    """A graph with what the search for regions asks of it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.writers: dict[str, onnx.NodeProto] = {}
        self.uses: Counter[str] = Counter()
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            for name in node.output:
                self.writers[name] = node
            self.uses.update(set(node.input) & self.constants.keys())
        self.shapes = {
            entry.name: [int(dim.dim_value) for dim in entry.type.tensor_type.shape.dim]
            for entry in (*graph.value_info, *graph.output)
        } | {name: list(tensor.dims) for name, tensor in self.constants.items()}
        self.ends = {entry.name for entry in (*graph.input, *graph.output)}

    def rank(self, name: str) -> int:
        return len(self.shapes.get(name, []))

    def writes(self, node: onnx.NodeProto) -> int | None:
        """Axis of the channels that a layer writes; None: it is no layer whose weights are constant."""
        if len(node.input) < 2 or node.input[1] not in self.constants:
            return None
        last = self.rank(node.output[0]) - 1
        if node.op_type == "Conv":
            return 1
        if node.op_type == "Gemm":
            return 1 if _is_plain_gemm(node) else None
        if node.op_type == "MatMul":
            return last if self.rank(node.input[1]) == 2 and last >= 1 else None
        if node.op_type == "LayerNormalization":
            axis = next((int(entry.i) for entry in node.attribute if entry.name == "axis"), -1)
            return last if axis in (-1, last) and last >= 1 else None
        return None

    def reads(self, node: onnx.NodeProto, value: str, axis: int) -> bool:
        """Whether a layer with constant weights reads the value's channels as its own."""
        if node.op_type not in ("Conv", "Gemm", "MatMul") or list(node.input).count(value) != 1:
            return False
        if node.input[0] != value or node.input[1] not in self.constants:
            return False
        if node.op_type == "MatMul":
            return self.rank(node.input[1]) == 2 and axis == self.rank(value) - 1
        if node.op_type == "Gemm":
            return axis == 1 and _is_plain_gemm(node)
        return axis == 1 and (_groups(node) == 1 or _is_depthwise(node, self.constants[node.input[1]].dims))

    def onward(self, node: onnx.NodeProto, value: str, axis: int) -> int | None:
        """Axis of the channels behind a node that passes their scale on; None: it does not."""
        before, after = self.shapes.get(value, []), self.shapes.get(node.output[0], [])
        if value not in node.input or not 0 < axis < len(before):
            return None
        if node.op_type in ("Add", "Sum"):
            others = [name for name in node.input if name != value]
            alike = all(self.shapes.get(name) == after for name in others if name not in self.constants)
            shifts = all(self.shift(node, name, axis) is not None for name in others if name in self.constants)
            return axis if before == after and alike and shifts else None
        if node.op_type in ("Mul", "Div"):
            other = node.input[1] if node.input[0] == value else node.input[0]
            if other == value or before != after or (node.op_type == "Div" and node.input[0] != value):
                return None
            place = axis - (len(after) - self.rank(other))
            known = other in self.shapes
            return axis if known and (place < 0 or self.shapes[other][place] == 1) else None
        if node.input[0] != value:
            return None
        if node.op_type == "Clip":
            limits = [numpy_helper.to_array(self.constants[name]) for name in node.input[1:] if name in self.constants]
            fits = len(node.input) == 3 and len(limits) == 2 and float(limits[0].reshape(-1)[0]) == 0.0
            return axis if fits else None
        if node.op_type in _ELEMENTWISE:
            return axis
        if node.op_type in _POOLS:
            return 1 if axis == 1 else None
        if node.op_type == "Transpose":
            order = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), None)
            return order.index(axis) if order is not None else len(before) - 1 - axis
        if node.op_type in _RESHAPING:
            return _reshaped(before, after, axis)
        if node.op_type in _REDUCING:
            return self._reduced(node, before, axis)
        return None

    def _reduced(self, node: onnx.NodeProto, before: Sequence[int], axis: int) -> int | None:
        axes = next((list(entry.ints) for entry in node.attribute if entry.name == "axes"), [])
        if len(node.input) > 1 and node.input[1] in self.constants:
            axes = numpy_helper.to_array(self.constants[node.input[1]]).reshape(-1).tolist()
        gone = {entry % len(before) for entry in axes}
        if not gone or axis in gone:
            return None
        kept = next((bool(entry.i) for entry in node.attribute if entry.name == "keepdims"), True)
        return axis if kept else axis - sum(entry < axis for entry in gone)

    def shift(self, node: onnx.NodeProto, name: str, axis: int) -> int | None:
        """How many axes of a constant that is added lie behind the channels'; None: it is not one number for each."""
        after = self.shapes.get(node.output[0], [])
        shape = self.shapes[name]
        behind = len(after) - 1 - axis
        place = len(shape) - 1 - behind
        if place < 0 or shape[place] != after[axis] or math.prod(shape) != shape[place]:
            return None
        return behind

    def region(self, start: str, axis: int) -> _Region:
        """Everything that has to be scaled with a value."""
        region = _Region(self.constants)
        waiting = [(start, axis)]
        while waiting:
            value, axis = waiting.pop()
            if value in region.values:
                if region.values[value] != axis:
                    region.stop(self.writers[value].op_type)
                continue
            region.values[value] = axis
            writer = self.writers.get(value)
            if value in self.ends or writer is None:
                region.stop("")
                continue
            if self.writes(writer) == axis:
                region.writers.append(writer)
            else:
                sources = [
                    (name, place)
                    for name in dict.fromkeys(writer.input)
                    for place in range(1, self.rank(name))
                    if name not in self.constants and self.onward(writer, name, place) == axis
                ]
                if not sources:
                    region.stop(writer.op_type)
                waiting += sources
                if writer.op_type == "Clip":
                    region.clips.append(writer)
                if writer.op_type in ("Add", "Sum"):
                    shifts = [(name, self.shift(writer, name, axis)) for name in writer.input if name in self.constants]
                    region.shifts += [(name, behind) for name, behind in shifts if behind is not None]
            for reader in self.readers.get(value, []):
                after = self.onward(reader, value, axis)
                if self.reads(reader, value, axis):
                    region.readers.append(reader)
                elif after is not None:
                    waiting.append((reader.output[0], after))
                else:
                    region.stop(reader.op_type)
        touched = [name for node in region.writers for name in node.input[1:] if name]
        touched += [node.input[1] for node in region.readers] + [name for name, _ in region.shifts]
        if not all(name in self.constants and self.uses[name] == 1 for name in touched):
            region.stop("shared weights")
        return region


def _regions(graph: onnx.GraphProto) -> tuple[list[_Region], Counter[str]]:
    """The regions that can be scaled, and what stopped the others."""
    view = _View(graph)
    seen: set[str] = set()
    found: list[_Region] = []
    stopped: Counter[str] = Counter()
    for start in graph.node:
        axis = view.writes(start)
        if axis is None or start.output[0] in seen:
            continue
        region = view.region(start.output[0], axis)
        seen |= region.values.keys()
        if region.stopped:
            stopped[region.stopped] += 1
        elif region.stopped is None and region.readers:
            found.append(region)
    return found, stopped


def _reshaped(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    if axis == len(before) - 1 and len(after) >= 2 and before[-1] == after[-1] > 0:
        return len(after) - 1  # the last axis stays the last one whatever becomes of those before it
    fits = axis == 1 and len(after) >= 2 and before[1] == after[1] > 0
    return 1 if fits and math.prod(before[2:]) == 1 and math.prod(after[2:]) == 1 else None


def _groups(node: onnx.NodeProto) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == "group"), 1)


def _is_depthwise(node: onnx.NodeProto, shape: Sequence[int]) -> bool:
    return node.op_type == "Conv" and shape[1] == 1 and _groups(node) == shape[0] and _groups(node) > 1


def _is_plain_gemm(node: onnx.NodeProto) -> bool:
    factors = {entry.name: entry.f for entry in node.attribute if entry.name in ("alpha", "beta")}
    transposed = any(entry.name == "transA" and entry.i for entry in node.attribute)
    return not transposed and all(factor == 1.0 for factor in factors.values())


def _input_axis(node: onnx.NodeProto) -> int:
    """Axis of the weights along which a layer's input channels lie; the other one of the first two has its outputs."""
    if node.op_type == "Conv":
        return 1
    return 1 if any(entry.name == "transB" and entry.i for entry in node.attribute) else 0


def _scale(weights: Mapping[str, TensorProto], region: _Region, factors: NDArray[np.float64]) -> None:
    """Divides what writes the region by `factors` (C,) and multiplies what reads it."""

    def scaled(name: str, by: NDArray[np.float64], axis: int) -> None:
        array = numpy_helper.to_array(weights[name]).astype(np.float64)
        if array.ndim:
            by = by.reshape([-1 if position == axis % array.ndim else 1 for position in range(array.ndim)])
        weights[name].CopyFrom(numpy_helper.from_array((array * by).astype(np.float32), name))

    for node in region.writers:
        if node.op_type == "LayerNormalization":
            scaled(node.input[1], 1 / factors, -1)
        else:
            scaled(node.input[1], 1 / factors, 1 - _input_axis(node))
        if len(node.input) > 2 and node.input[2]:
            scaled(node.input[2], 1 / factors, -1)
    for name, behind in region.shifts:
        scaled(name, 1 / factors, -1 - behind)
    for node in region.readers:
        depthwise = _is_depthwise(node, weights[node.input[1]].dims)
        scaled(node.input[1], factors, 0 if depthwise else _input_axis(node))


def channel_extremes(
    model: onnx.ModelProto, values: Mapping[str, int], samples: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float64]]:
    """The largest |x| of every channel of these values over all samples, by value. values: with the channels' axis."""
    found: dict[str, NDArray[np.float64]] = {}
    for outputs in _watch(model, list(values), samples):
        for name, array in outputs.items():
            channels = np.moveaxis(array, values[name], 0)
            largest = np.abs(channels).reshape(len(channels), -1).max(1).astype(np.float64)
            found[name] = np.maximum(found[name], largest) if name in found else largest
    return found


def channel_means(
    model: onnx.ModelProto, values: Mapping[str, int], samples: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float64]]:
    """The mean of every channel of these values over all samples and positions, by value. values: as above."""
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    for outputs in _watch(model, list(values), samples):
        for name, array in outputs.items():
            channels = np.moveaxis(array, values[name], 0)
            flat = channels.reshape(len(channels), -1).astype(np.float64)
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

    The paper's correction with the expectation measured (its appendix): for each convolution and matrix product in
    graph order, the mean over samples and positions of what the float graph writes minus what the INT8 one does, with
    the layers before it corrected already, is added to its bias. A MatMul without a bias is left as it is.

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
    layers = _biased_layers(changed.graph)
    twins = {node.name: node for node in corrected.graph.node}
    layers = [(node, axis) for node, axis in layers if node.name in twins]
    expected = channel_means(changed, {node.output[0]: axis for node, axis in layers}, samples)
    for node, axis in layers:
        twin = twins[node.name]
        # the activation behind it may be gone from the INT8 graph: then the twin writes under that one's name
        found = channel_means(corrected, {twin.output[0]: axis}, samples)[twin.output[0]]
        error = expected[node.output[0]] - found
        _add_bias(changed.graph, node, error)
        _add_bias(corrected.graph, twin, error)
    _drop_unread(changed.graph)
    return changed, len(layers)


def _biased_layers(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, int]]:
    """The nodes that add a layer's bias, in graph order, with the axis of the channels.

    A convolution or Gemm does it itself, and may get a bias that it did not have; behind a MatMul it is the Add that
    reads nothing else but a constant.
    """
    view = _View(graph)
    found = []
    for node in graph.node:
        axis = view.writes(node)
        if axis is None or node.op_type == "LayerNormalization":
            continue
        if node.op_type != "MatMul":
            found.append((node, axis))
            continue
        readers = view.readers.get(node.output[0], [])
        if len(readers) == 1 and readers[0].op_type == "Add" and node.output[0] not in view.ends:
            constant = [name for name in readers[0].input if name in view.constants]
            if len(constant) == 1 and view.shift(readers[0], constant[0], axis) == 0:
                found.append((readers[0], axis))
    return found


def _add_bias(graph: onnx.GraphProto, node: onnx.NodeProto, error: NDArray[np.float64]) -> None:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    place = 2 if node.op_type != "Add" else next(i for i, entry in enumerate(node.input) if entry in constants)
    bias = constants.get(node.input[place]) if len(node.input) > place else None
    name = f"{node.name}_corrected_bias"
    value = error if bias is None else numpy_helper.to_array(bias).astype(np.float64) + error
    if len(node.input) > place:
        node.input[place] = name
    else:
        node.input.append(name)
    graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Drops constants that nothing reads any more."""
    read = {name for node in graph.node for name in node.input} | {entry.name for entry in graph.output}
    kept = [TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
