"""An ONNX graph as the rules read it: nodes of all subgraphs, constants, inferred types and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from profiles.opening import itemsize, open_tensor, tensor_bytes

Array = NDArray[Any]

_SMALL = 4096
"""Bytes up to which a constant is kept for shape inference: shapes and axes are small, weights need not be copied."""
_LOOKED_AT = 16 << 30
"""Bytes of weights whose values are looked at: a minute or so of reading."""
_PART = 1 << 17
"""Values of a weight that are looked at together: they stay in the processor's cache."""
FP16_MIN = 2.0**-24
"""The smallest number above zero that FP16 has."""
_LONGEST = 120
"""Letters of a name that are shown."""
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Value:
    """Type and shape of a value. `dtype` is a TensorProto type, 0 when unknown; `shape` None when the rank is unknown;
    a dimension is a number, a name, or None."""

    dtype: int
    shape: tuple[int | str | None, ...] | None


UNKNOWN = Value(0, None)


@dataclass(frozen=True)
class Node:
    """One node, wherever it stands: in the graph, in a branch or body, or in a function of the model."""

    proto: NodeProto
    name: str
    function: bool = False
    """It is part of a function of the model, so nothing is known about its inputs."""

    @property
    def op(self) -> str:
        return str(self.proto.op_type)

    @property
    def domain(self) -> str:
        """Empty for ONNX's own operators."""
        return "" if self.proto.domain == "ai.onnx" else str(self.proto.domain)

    @property
    def inputs(self) -> list[str]:
        return list(self.proto.input)

    @property
    def outputs(self) -> list[str]:
        return list(self.proto.output)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value, text decoded."""
        for entry in self.proto.attribute:
            if entry.name == name:
                value = onnx.helper.get_attribute_value(entry)
                return value.decode(errors="replace") if isinstance(value, bytes) else value
        return default


@dataclass(frozen=True)
class Weight:
    """What a real-valued weight holds. highest: finite magnitude. vanishing: values that FP16 rounds to zero."""

    rank: int
    nan: bool
    infinite: bool
    highest: float
    nonzero: int
    vanishing: int


@dataclass
class Graph:
    """A model, read once for all rules.

    path: of the file, where there is one; what lies beside it is checked too.
    """

    model: onnx.ModelProto
    path: Path | None = None
    _names: dict[str, int] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """Where external data may lie."""
        return None if self.path is None else self.path.parent

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes, in order; a subgraph's after the node that holds it."""
        found = [Node(proto, _name(proto)) for proto in _walk(self.model.graph)]
        found += [
            Node(proto, f"{function.name}/{_name(proto)}", function=True)
            for function in self.model.functions
            for node in function.node
            for proto in (node, *_inside(node))
        ]
        return tuple(found)

    def of(self, *operators: str) -> Iterator[Node]:
        """The nodes of ONNX's own domain with one of these operators."""
        return (node for node in self.nodes if node.op in operators and node.domain == "")

    @cached_property
    def opset(self) -> int:
        """Version of the default operator set."""
        return next((int(entry.version) for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 0)

    @cached_property
    def graphs(self) -> tuple[onnx.GraphProto, ...]:
        """The graph and all its subgraphs."""
        return (self.model.graph, *_subgraphs(self.model.graph))

    @cached_property
    def tensors(self) -> dict[str, TensorProto]:
        """Constants by name: initialisers and the outputs of Constant nodes."""
        found = {tensor.name: tensor for graph in self.graphs for tensor in graph.initializer}
        for node in self.nodes:
            value = node.attribute("value") if node.op == "Constant" and not node.function else None
            if isinstance(value, TensorProto) and node.outputs:
                found[node.outputs[0]] = value
        return found

    @cached_property
    def weights(self) -> list[tuple[str, TensorProto]]:
        """Every stored tensor with the name that it goes by."""
        stored = list(self.tensors.items())
        for function in self.model.functions:
            for node in function.node:
                stored += [(_name(node), entry.t) for entry in node.attribute if entry.name == "value"]
        return [(name, tensor) for name, tensor in stored if tensor.data_type]

    @cached_property
    def weight_facts(self) -> dict[str, Weight]:
        """What the real-valued weights hold, by name; None of those whose values cannot be read: see `unread`."""
        found, left = {}, _LOOKED_AT
        for name, tensor in self.weights:
            if tensor.data_type not in _REAL or tensor_bytes(tensor) > left:
                continue
            values = open_tensor(tensor, self.folder)
            if values is not None:
                found[name] = weight_of(values)
                left -= tensor_bytes(tensor)
        return found

    @property
    def unread(self) -> list[str]:
        """Real-valued weights that `weight_facts` lacks."""
        return [name for name, tensor in self.weights if tensor.data_type in _REAL and name not in self.weight_facts]

    def constant(self, name: str) -> Array | None:
        """The value of a constant that the file holds or that lies beside it, None for everything else."""
        for _ in range(8):
            tensor = self.tensors.get(name)
            if tensor is not None:
                return open_tensor(tensor, self.folder)
            node = self.producers.get(name)
            if node is None:
                return None
            if node.op == "Constant":
                return _listed(node)
            if node.op not in ("Identity", "Cast") or not node.inputs:
                return None
            name = node.inputs[0]
        return None

    def is_constant(self, name: str) -> bool:
        """Whether the value is known when an engine is built: from constants alone."""
        return self.origin(name) == "constant"

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that makes a value."""
        return {name: node for node in self.nodes if not node.function for name in node.outputs if name}

    @cached_property
    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that read a value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def inputs(self) -> dict[str, Value]:
        """What must be given at run time."""
        return {
            entry.name: _value(entry.type)
            for entry in self.model.graph.input
            if not any(tensor.name == entry.name for tensor in self.model.graph.initializer)
        }

    @cached_property
    def values(self) -> dict[str, Value]:
        """Types and shapes of all values, as far as ONNX infers them."""
        found = {name: Value(tensor.data_type, tuple(tensor.dims)) for name, tensor in self.tensors.items()}
        for graph in (self._inferred, *_subgraphs(self._inferred)):
            for entry in (*graph.input, *graph.value_info, *graph.output):
                known = _value(entry.type)
                if known.dtype and (known.shape is not None or entry.name not in found):
                    found[entry.name] = known
        return found

    def value(self, name: str) -> Value:
        """Type and shape of a value; `UNKNOWN` where they are."""
        return self.values.get(name, UNKNOWN)

    def rank(self, name: str) -> int | None:
        """Number of dimensions, where it is known."""
        shape = self.value(name).shape
        return None if shape is None else len(shape)

    @cached_property
    def _inferred(self) -> onnx.GraphProto:
        light = without_weights(self.model, self.folder)
        try:
            return onnx.shape_inference.infer_shapes(light, data_prop=True).graph
        except Exception:  # a graph that cannot be inferred is the checker's to describe
            return light.graph

    def origin(self, name: str) -> str:
        """Where a value comes from: "constant", "shape" (of something), "input" (integers that the caller gives),
        "data" (what the network computes), or "float" (integers cast from computed real numbers); the last that
        applies.
        """
        order = ("constant", "shape", "input", "data", "float")
        worst, seen, waiting = 0, set(), [name]
        while waiting:
            current = waiting.pop()
            if not current or current in seen or current in self.tensors:
                continue
            seen.add(current)
            node = self.producers.get(current)
            if node is None:
                real = self.value(current).dtype in _REAL
                found = "data" if current not in self.inputs else "float" if real else "input"
            elif node.op in ("Shape", "Size"):
                found = "shape"
            elif node.op in _COMPUTED:
                found = "data"
            else:
                found = "constant"
                waiting += [entry for entry in node.inputs if entry]
                if any(True for _ in _inside(node.proto)) or (not node.inputs and node.op != "Constant"):
                    found = "data"
            worst = max(worst, order.index(found))
        return order[worst]


_REAL = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_COMPUTED = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "ArgMax", "ArgMin", "TopK")
"""Their integers depend on real numbers without a cast."""


def external(tensor: TensorProto) -> bool:
    """The bytes lie in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def type_name(data_type: int) -> str:
    """FLOAT, INT64, ...; a number that ONNX does not name as it is."""
    try:
        return str(TensorProto.DataType.Name(data_type))
    except ValueError:
        return f"type {data_type}"


def printable(text: str, longest: int = _LONGEST) -> str:
    """Text out of a file as it may be shown: without line breaks and what steers a terminal, and not endless."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= longest else clean[: longest - 3] + "..."


def weight_of(values: Array) -> Weight:
    """What a stored tensor holds; a large one is read in parts."""
    flat = values.reshape(-1)
    parts = [_part(flat[start : start + _PART]) for start in range(0, flat.size, _PART)]
    return Weight(
        rank=values.ndim,
        nan=any(part.nan for part in parts),
        infinite=any(part.infinite for part in parts),
        highest=max((part.highest for part in parts), default=0.0),
        nonzero=sum(part.nonzero for part in parts),
        vanishing=sum(part.vanishing for part in parts),
    )


def _part(values: Array) -> Weight:
    real = values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)
    size = np.abs(real)
    highest = float(np.max(size, initial=0.0))  # NaN when one is
    nonzero = int(np.count_nonzero(size))
    zeros_and_vanishing = int(np.count_nonzero(size < FP16_MIN / 2))
    finite = None if math.isfinite(highest) else np.isfinite(size)
    return Weight(
        rank=values.ndim,
        nan=math.isnan(highest),
        infinite=finite is not None and bool(np.isinf(size).any()),
        highest=highest if finite is None else float(np.max(size, initial=0.0, where=finite)),
        nonzero=nonzero,
        vanishing=zeros_and_vanishing - (size.size - nonzero),
    )


def without_weights(model: onnx.ModelProto, folder: Path | None = None) -> onnx.ModelProto:
    """A copy for shape inference in which no weight has its bytes: types and shapes are enough.

    Args:
        folder: where small constants may lie in external data; None: they are left out.
    """
    light = onnx.ModelProto()
    light.ir_version = model.ir_version
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    for tensor in model.graph.initializer:
        small = tensor_bytes(tensor) <= _SMALL
        value = open_tensor(tensor, folder) if small and external(tensor) else None
        if value is not None:
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), tensor.name))
        elif small and not external(tensor):
            graph.initializer.append(tensor)
        else:
            known = {entry.name for entry in graph.input}
            if tensor.name not in known:
                # an input with its shape says the same as a weight without its bytes
                graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return light


def activation_bytes(model: onnx.ModelProto, batch: int) -> int:
    """A lower bound of the bytes that the activations of `batch` samples take at once: the inputs of the graph and the
    largest output of a node with weights (convolution, matrix product), which no runtime fuses away.

    Such an output counts one byte per value in a graph that is quantised, where it may exist in INT8 only. A shape
    that cannot be inferred counts nothing.
    """
    sized = Sized(model, batch)
    quantized = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    largest = 0
    for node in model.graph.node:
        if node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in sized.constants:
            largest = max(largest, sized.bytes_of(node.output[0], 1 if quantized else None))
    return largest + sized.inputs


def peak_activation_bytes(model: onnx.ModelProto, batch: int) -> int:
    """The most bytes that are alive between two nodes when the nodes run in the file's order and nothing is fused.

    A runtime that fuses needs less, one that keeps workspace for its kernels more. A shape that cannot be inferred
    counts nothing.
    """
    sized = Sized(model, batch)
    last: dict[str, int] = {}
    for position, node in enumerate(model.graph.node):
        names = {*node.input, *(name for inner in _inside(node) for name in inner.input)}
        last.update((name, position) for name in names if name not in sized.constants)
    end = len(model.graph.node)
    last.update((entry.name, end) for entry in model.graph.output)
    dying: dict[int, list[str]] = {}
    for name, position in last.items():
        dying.setdefault(position, []).append(name)
    alive = {entry.name for entry in sized.graph.input if entry.name not in sized.constants}
    held = sum(sized.bytes_of(name) for name in alive)
    peak = held
    for position, node in enumerate(model.graph.node):
        made = [name for name in node.output if name and name not in sized.constants]
        held += sum(sized.bytes_of(name) for name in made)
        alive.update(made)
        peak = max(peak, held)
        for name in [*dying.get(position, ()), *(name for name in made if name not in last)]:
            if name in alive:
                alive.remove(name)
                held -= sized.bytes_of(name)
    return peak


class Sized:
    """A model's values at one batch size."""

    def __init__(self, model: onnx.ModelProto, batch: int) -> None:
        weights = {tensor.name for tensor in model.graph.initializer}
        light = without_weights(model)
        for entry in light.graph.input:
            dims = entry.type.tensor_type.shape.dim
            if entry.name not in weights and dims and dims[0].dim_param:
                dims[0].dim_value = batch
        # shapes that were inferred for any batch would be kept
        del light.graph.value_info[:]
        for entry in light.graph.output:
            entry.type.tensor_type.ClearField("shape")
        try:
            self.graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
        except Exception:  # what cannot be inferred counts nothing
            self.graph = light.graph
        self.constants = set(weights)
        for node in model.graph.node:
            if node.op_type == "Constant" or (node.op_type == "DequantizeLinear" and node.input[0] in self.constants):
                self.constants.update(node.output)
        self._entries = {entry.name: entry for entry in (*self.graph.input, *self.graph.value_info, *self.graph.output)}

    @property
    def inputs(self) -> int:
        """Bytes of what must be given."""
        return sum(self.bytes_of(entry.name) for entry in self.graph.input if entry.name not in self.constants)

    def bytes_of(self, name: str, size: int | None = None) -> int:
        """Bytes of a value, with `size` bytes each where it is given; 0 when a dimension is not known."""
        entry = self._entries.get(name)
        if entry is None:
            return 0
        kind = entry.type.tensor_type
        if not kind.HasField("shape") or any(not dim.HasField("dim_value") for dim in kind.shape.dim):
            return 0
        count = math.prod(max(int(dim.dim_value), 0) for dim in kind.shape.dim)
        return count * (itemsize(kind.elem_type) if size is None else size)


def _value(kind: onnx.TypeProto) -> Value:
    tensor = kind.tensor_type
    if not kind.HasField("tensor_type"):
        return UNKNOWN
    if not tensor.HasField("shape"):
        return Value(tensor.elem_type, None)
    dims = [int(dim.dim_value) if dim.HasField("dim_value") else (dim.dim_param or None) for dim in tensor.shape.dim]
    return Value(tensor.elem_type, tuple(dims))


def _name(node: NodeProto) -> str:
    return printable(str(node.name or f"{node.op_type} -> {next(iter(node.output), '?')}"))


def _inside(node: NodeProto) -> Iterator[NodeProto]:
    for entry in node.attribute:
        for graph in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
            yield from _walk(graph)


def _walk(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        yield from _inside(node)


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for entry in node.attribute:
            for inner in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
                yield inner
                yield from _subgraphs(inner)


def _listed(node: Node) -> Array | None:
    """The value of a Constant node that is not given as a tensor."""
    for name in ("value_int", "value_ints", "value_float", "value_floats"):
        value = node.attribute(name)
        if value is not None:
            return np.asarray(value)
    return None
