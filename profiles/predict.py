"""What a model costs on paper: operations and bytes per node of its ONNX graph, and the roofline bound of a device.

Only a bound ("at least 0.3 ms") comes out of this, never an estimate that looks like a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from profiles.device import Device, PowerMode, Precision
from profiles.errors import InputError
from profiles.section import Section

ON_CHIP_BYTES = 64 * 2**20
"""Traffic up to this much is not held against the bandwidth: a model that runs again and again may stay in the
last-level cache, and 64 MiB is more than any GPU in the device files has (H200: 50 MB)."""

Shape = tuple[int, ...]

# ruff: noqa: SIM905  (a hundred operator names read better as text than as a hundred lines)
_ELEMENTWISE = frozenset(
    """Abs Add And BatchNormalization Cast CastLike Ceil Celu Clip Cos DequantizeLinear Div DynamicQuantizeLinear Elu
    Equal Erf Exp Floor Gelu Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish InstanceNormalization IsNaN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow
    QuantizeLinear RMSNormalization Reciprocal Relu Round Selu Sigmoid Sign Sin Softmax Softplus Softsign Sqrt Sub Sum
    Swish Tan Tanh ThresholdedRelu Where Xor""".split()
)
"""Counted as one operation per output element: the fewest that they can take."""
_FREE = frozenset(
    """ArgMax ArgMin Concat Constant ConstantOfShape DepthToSpace Dropout Expand EyeLike Flatten Gather GatherElements
    GatherND Identity NonZero OneHot Pad Range Reshape Resize ScatterElements ScatterND Shape Size Slice SpaceToDepth
    Split Squeeze Tile TopK Transpose Trilu Unsqueeze Upsample""".split()
)
"""Move or choose values."""
_REDUCTIONS = frozenset(
    """CumSum GlobalAveragePool GlobalLpPool GlobalMaxPool ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare""".split()
)
_POOLS = frozenset(("AveragePool", "MaxPool", "LpPool"))
_INTEGER = frozenset(("ConvInteger", "QLinearConv", "MatMulInteger", "QLinearMatMul"))
_PASSING = frozenset("Flatten Identity Reshape Squeeze Transpose Unsqueeze".split())
"""Stand between a value's dequantisation and its reader without changing it."""
_COMPUTED: dict[str, Precision] = {
    "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT8": "int8", "UINT8": "int8", "FLOAT8E4M3FN": "fp8",
    "FLOAT4E2M1": "fp4",
}  # fmt: skip
"""By the type of what is read."""


class NodeCost(Section):
    """One node. A multiply-add counts as two operations."""

    name: str
    operator: str
    flops: int
    matrix: bool
    """A convolution, matrix product or attention: work that no graph optimisation removes."""
    weight_bytes: int
    """Constants that this node reads and no node before it did, in their stored type: INT8 weights count one byte."""
    activation_bytes: int
    """Other inputs, and outputs."""
    precision: Precision | None = None
    """What matrix work computes in, as the types of its inputs say; None for other nodes, or where they do not say."""


class Roofline(Section):
    """The time below which a device cannot be."""

    flops: int
    """All nodes."""
    matrix_flops: int
    """Of convolutions, matrix products and attention, by the direct algorithm (Winograd's takes fewer)."""
    bytes: int
    """Weights, inputs and outputs of the graph, once each: activations between nodes may stay on the chip."""
    bound_ms: float | None
    """At least this long; None when the facts do not give a bound."""
    limiting: Literal["compute", "memory"] | None
    missing: tuple[str, ...]
    """The facts that the device file does not have."""
    unpriced: tuple[str, ...]
    """Operators that were counted as free because their work is not known."""


def node_costs(model: Path, batch: int = 1) -> tuple[NodeCost, ...]:
    """Every node's operations and bytes, in the order of the graph.

    Args:
        model: ONNX file; a dynamic first dimension of its inputs is set to `batch`.

    Raises:
        InputError: missing or damaged file.
    """
    return _Graph(model, batch).costs


def roofline(
    model: Path, device: Device, precision: Precision, batch: int = 1, power_mode: PowerMode | None = None
) -> Roofline:
    """The roofline bound (Williams, Waterman, Patterson, 2009) of one query of `batch` samples.

    The larger of operations / peak and bytes / bandwidth, for the whole graph. What fusion, folding or a cache could
    save is left out, so that the device cannot be faster: `matrix_flops` alone count, and bytes above `ON_CHIP_BYTES`.
    FP32 on a device with TF32 is held to the TF32 peak, since runtimes use it unasked. In a graph that is quantised in
    part, every node is held to the peak of what it computes in itself.

    Raises:
        InputError: missing or damaged file.
    """
    graph = _Graph(model, batch)
    flops = sum(cost.flops for cost in graph.costs)
    matrix_flops = sum(cost.flops for cost in graph.costs if cost.matrix)
    moved = graph.input_output_bytes + sum(cost.weight_bytes for cost in graph.costs)

    def peak_of(computed: Precision) -> float | None:
        return device.peak("tf32" if computed == "fp32" and "tf32" in device.precisions else computed, power_mode)

    peak = peak_of(precision)
    bandwidth = device.bandwidth(power_mode)
    missing = []
    if peak is None:
        missing.append(f"{precision} peak of {device.name}")
    if bandwidth is None:
        missing.append(f"memory bandwidth of {device.name}")
    quantised = any(cost.precision == precision for cost in graph.costs if cost.matrix)
    compute_ms = sum(
        cost.flops / ((peak_of(cost.precision) if quantised and cost.precision else None) or peak) * 1e3
        for cost in graph.costs
        if cost.matrix and peak
    )
    memory_ms = max(0, moved - ON_CHIP_BYTES) / bandwidth * 1e3 if bandwidth else 0.0
    bound = max(compute_ms, memory_ms)
    limiting: Literal["compute", "memory"] = "compute" if compute_ms >= memory_ms else "memory"
    return Roofline(
        flops=flops,
        matrix_flops=matrix_flops,
        bytes=moved,
        bound_ms=bound if bound > 0 else None,
        limiting=limiting if bound > 0 else None,
        missing=tuple(missing),
        unpriced=tuple(sorted({cost.operator for cost in graph.costs if cost.operator in graph.unpriced})),
    )


class _Graph:
    """An ONNX graph with inferred shapes and its costs."""

    def __init__(self, path: Path, batch: int) -> None:
        import onnx

        if not path.is_file():
            raise InputError("no such model file", where=str(path), fix="name an .onnx file that exists")
        try:
            model: Any = onnx.load(str(path), load_external_data=False)
            if model.functions:
                from onnx.inliner import inline_local_functions

                model = inline_local_functions(model)
            model = onnx.shape_inference.infer_shapes(_with_batch(model, batch), data_prop=True)
        except Exception as error:  # protobuf's and onnx's errors share no base class
            raise InputError(
                "not an ONNX model, or a damaged one", where=str(path), evidence=str(error).splitlines()[0]
            ) from error
        if not model.graph.node:
            raise InputError("the model has no nodes", where=str(path), fix="export it again")
        self.unpriced: set[str] = set()
        self._shapes: dict[str, Shape] = {}
        self._bytes: dict[str, int] = {}
        self._constants: set[str] = set()
        self._types: dict[str, int] = {}
        graph = model.graph
        self._producers = {name: node for node in graph.node for name in node.output}
        for tensor in graph.initializer:
            self._constant(tensor.name, tensor)
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self._constant(node.output[0], attribute.t)
        for info in (*graph.input, *graph.value_info, *graph.output):
            self._value(info)
        self.input_output_bytes = sum(
            self._bytes.get(info.name, 0) for info in (*graph.input, *graph.output) if info.name not in self._constants
        )
        seen: set[str] = set()
        self.costs = tuple(self._cost(node, seen) for node in graph.node)

    def _constant(self, name: str, tensor: Any) -> None:
        self._constants.add(name)
        self._types[name] = tensor.data_type
        self._shapes[name] = tuple(tensor.dims)
        self._bytes[name] = _size(math.prod(tensor.dims), tensor.data_type)

    def _value(self, info: Any) -> None:
        tensor = info.type.tensor_type
        self._types.setdefault(info.name, tensor.elem_type)
        if info.name in self._shapes or not tensor.HasField("shape"):
            return
        if all(dimension.HasField("dim_value") for dimension in tensor.shape.dim):
            shape = tuple(dimension.dim_value for dimension in tensor.shape.dim)
            self._shapes[info.name] = shape
            self._bytes[info.name] = _size(math.prod(shape), tensor.elem_type)

    def _cost(self, node: Any, seen: set[str]) -> NodeCost:
        inputs = [name for name in node.input if name]
        weights = {name for name in inputs if name in self._constants} - seen
        seen |= weights
        flops, matrix = self._flops(node)
        activations = [name for name in (*dict.fromkeys(inputs), *node.output) if name not in self._constants]
        return NodeCost(
            name=node.name or (node.output[0] if node.output else node.op_type),
            operator=node.op_type,
            flops=flops,
            matrix=matrix,
            weight_bytes=sum(self._bytes[name] for name in weights),
            activation_bytes=sum(self._bytes.get(name, 0) for name in activations),
            precision=self._computes(node) if matrix else None,
        )

    def _computes(self, node: Any) -> Precision | None:
        """In the narrow type where both factors are dequantised from it, as runtimes fuse that; else in their own."""
        if node.op_type in _INTEGER:
            return "int8"
        stored = {self._stored(name) for name in node.input[:2]}
        if len(stored) == 1:
            return stored.pop()
        return self._computed(node.input[0])

    def _stored(self, name: str) -> Precision | None:
        """The type in which a value is kept before it is dequantised, or its own."""
        source = self._producers.get(name)
        while source is not None and source.op_type in _PASSING:
            name = source.input[0]
            source = self._producers.get(name)
        if source is not None and source.op_type == "DequantizeLinear":
            name = source.input[0]
        return self._computed(name)

    def _computed(self, name: str) -> Precision | None:
        from onnx import TensorProto

        return _COMPUTED.get(TensorProto.DataType.Name(self._types.get(name, TensorProto.UNDEFINED)))

    def _flops(self, node: Any) -> tuple[int, bool]:
        """Operations of a node, and whether it is matrix work. What cannot be priced is free and remembered."""
        try:
            return self._priced(node)
        except (KeyError, IndexError):
            self.unpriced.add(node.op_type)
            return 0, False

    def _priced(self, node: Any) -> tuple[int, bool]:
        operator = node.op_type
        if operator in _FREE:
            return 0, False
        out = math.prod(self._shapes[node.output[0]])
        shapes = [self._shapes.get(name) for name in node.input]

        def shape(index: int) -> Shape:
            found = shapes[index]
            if found is None:
                raise KeyError(index)
            return found

        if operator in ("Conv", "ConvInteger", "QLinearConv"):
            # weights (C_out, C_in / groups, *kernel); the bias is the last input
            kernel = shape(3 if operator == "QLinearConv" else 1)
            bias = len(node.input) > {"Conv": 2, "ConvInteger": 4, "QLinearConv": 8}[operator]
            return 2 * out * math.prod(kernel[1:]) + (out if bias else 0), True
        if operator == "ConvTranspose":
            return 2 * math.prod(shape(0)) * math.prod(shape(1)[1:]), True
        if operator == "Gemm":
            inner = shape(0)[0] if _attribute(node, "transA", 0) else shape(0)[1]
            return 2 * out * inner + (out if len(node.input) > 2 else 0), True
        if operator in ("MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul"):
            return 2 * out * shape(0)[-1], True
        if operator == "Attention" and node.domain in ("", "ai.onnx"):
            # scores and their product with the values, (B, H, S, D) or (B, S, H D) alike
            return 2 * shape(1)[-2] * (math.prod(shape(0)) + out), True
        if operator == "Einsum":
            return _einsum_flops(
                _attribute(node, "equation", b"").decode(), [shape(i) for i in range(len(shapes))]
            ), True
        if operator in _POOLS:
            return out * math.prod(_attribute(node, "kernel_shape", [])), False
        if operator in _REDUCTIONS:
            return math.prod(shape(0)), False
        if operator in _ELEMENTWISE:
            return out, False
        raise KeyError(operator)


def _with_batch(model: Any, batch: int) -> Any:
    """The model with the dynamic first dimension of its inputs set, and without shapes that were inferred before."""
    names = set()
    for info in model.graph.input:
        dimensions = info.type.tensor_type.shape.dim
        if dimensions and not dimensions[0].HasField("dim_value"):
            names.add(dimensions[0].dim_param)
            dimensions[0].dim_value = batch
    for info in (*model.graph.input, *model.graph.output):
        for dimension in info.type.tensor_type.shape.dim:
            if dimension.dim_param and dimension.dim_param in names:
                dimension.dim_value = batch
    del model.graph.value_info[:]
    return model


def _size(elements: int, data_type: int) -> int:
    """Bytes of so many elements of an ONNX type; 4-bit types are packed in pairs."""
    import onnx
    from onnx import TensorProto

    packed = {getattr(TensorProto, name, None) for name in ("INT4", "UINT4", "FLOAT4E2M1")}
    if data_type in packed:
        return (elements + 1) // 2
    if data_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        return 0
    return elements * int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx.helper import get_attribute_value

    for attribute in node.attribute:
        if attribute.name == name:
            return get_attribute_value(attribute)
    return default


def _einsum_flops(equation: str, shapes: Sequence[Shape]) -> int:
    """Two operations per combination of all indices; KeyError for an equation with an ellipsis."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if "." in term:
            raise KeyError(equation)
        sizes.update(zip(term, shape, strict=True))
    return 2 * math.prod(sizes.values())
