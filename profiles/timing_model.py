"""What one query of an ONNX graph makes the runtime do: every node of its own optimised graph, with the work in it.

The work is counted in quantities to which a kernel's time is about proportional (vector instructions, steps of the
inner loop, bytes, calls), so that `profiles.calibration` can find a device's time per quantity by a linear fit. They
follow from how ONNX Runtime's kernels walk over their tensors (its library MLAS): tiles that are not full, borders, and
channels that are padded to a vector cost time that operations alone do not show.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from profiles.errors import EdgestillError
from profiles.section import Section

if TYPE_CHECKING:
    from profiles.runtimes.onnxruntime import TracedNode

Shape = tuple[int, ...]

FORM = 1
"""Raise when a rule below counts otherwise, or a class changes: times that were fitted before are for other counts."""
OTHER = "other"
"""The class of operators that no rule below knows: priced by their bytes."""
_VECTOR = 8
"""Channels of a block in which float convolutions are counted; a wider vector scales all of them alike."""
_FILTERS = 4
"""Blocks of output channels that one call of a float convolution's kernel computes at once."""
_COLUMNS = 3
"""Neighbouring outputs that it computes at once."""
_GEMM_ROWS, _GEMM_COLUMNS = 6, 16
_QUANT_ROWS, _QUANT_COLUMNS = 4, 16
"""Tiles of the matrix products and of the quantised convolutions."""

# ruff: noqa: SIM905  (operator names read better as text)
_SHAPES = frozenset("Reshape Unsqueeze Squeeze Flatten Identity Shape".split())
_ELEMENTWISE = frozenset(
    """Abs Add And Clip Div Equal Greater GreaterOrEqual HardSigmoid HardSwish LeakyRelu Less LessOrEqual Max Min Mul
    Neg Not Or Pow Reciprocal Relu Sqrt Sub Where""".split()
)
_TRANSCENDENTAL = frozenset("Erf Exp Gelu BiasGelu FastGelu Log QuickGelu Sigmoid Silu Swish Tanh Elu".split())
_REDUCTIONS = frozenset(
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceLogSumExp ReduceL2 ArgMax GlobalAveragePool".split()
)
_NORMALISATIONS = frozenset("LayerNormalization SkipLayerNormalization RMSNormalization".split())
_QUANT_ELEMENTWISE = frozenset("QLinearAdd QLinearMul".split())
_CODES = {
    "float": 4, "double": 8, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "int8": 1, "bool": 1,
}  # fmt: skip


class PricedNode(Section):
    """One node of the optimised graph, and the work in it.

    kind: class of nodes that share their times per quantity. work: quantity -> how much of it; "nodes" is 1. moved:
    bytes that it reads and writes, weights included. microseconds: of its kernel where it was measured.
    """

    kind: str
    operator: str
    work: dict[str, float]
    moved: float
    microseconds: float | None = None


class PricedGraph(NamedTuple):
    """nodes: as they run. weight_mib: constants that the runtime holds. activation_mib: the most that lives at once."""

    nodes: tuple[PricedNode, ...]
    weight_mib: float
    activation_mib: float


def priced_graph(model: Path, batch: int = 1, *, threads: int = 1, runs: int = 1) -> PricedGraph:
    """The nodes that the runtime executes for one query of `batch` samples.

    The runtime itself optimises the graph, exactly as it does when it is measured, and runs it under its profiler:
    sizes of tensors come from that run, because no other shape inference knows the runtime's own operators.

    Args:
        model: ONNX file whose inputs are dynamic in their first dimension at most.
        batch: samples of the query.
        threads: threads inside an operator.
        runs: queries; the more, the surer are the nodes' times.

    Raises:
        InputError: missing or damaged file, or a batch that the graph does not take.
        EdgestillError: the runtime cannot load or run it.
    """
    import onnx

    from profiles.runtimes.onnxruntime import random_inputs, trace

    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        inputs = random_inputs(model, batch)
        traced = trace(model, inputs, optimised, threads=threads, runs=runs)
        graph = onnx.load(str(optimised), load_external_data=False).graph
    tensors = _Tensors(graph, {name: array.shape for name, array in inputs.items()}, traced)
    nodes = tuple(
        PricedNode(
            kind=kind,
            operator=node.op_type,
            work=work,
            moved=tensors.moved(node),
            microseconds=seen.microseconds if runs > 1 else None,
        )
        for node, seen in tensors.ran
        for kind, work in [priced(node, tensors)]
    )
    return PricedGraph(nodes, tensors.weight_bytes / 2**20, tensors.live_bytes() / 2**20)


class _Tensors:
    """The optimised graph's nodes in the order in which they ran, with the shape and size of every tensor."""

    def __init__(self, graph: Any, inputs: Mapping[str, Shape], traced: Sequence[TracedNode]) -> None:
        self.shapes: dict[str, Shape] = dict(inputs)
        self.bytes: dict[str, int] = {}
        self.constants: set[str] = set()
        self.weight_bytes = 0
        for tensor in graph.initializer:
            shape = tuple(tensor.dims)
            self.constants.add(tensor.name)
            self.shapes[tensor.name] = shape
            self.bytes[tensor.name] = math.prod(shape) * _item_bytes(tensor.data_type)
            self.weight_bytes += self.bytes[tensor.name]
        self.types = {info.name: info.type.tensor_type.elem_type for info in graph.input}
        for name, shape in inputs.items():
            self.bytes[name] = math.prod(shape) * _item_bytes(self.types[name])
        named: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for node in graph.node:
            named[node.name, node.op_type].append(node)
        self.ran: list[tuple[Any, TracedNode]] = []
        for seen in traced:
            found = named[seen.name, seen.operator]
            if not found:
                raise EdgestillError(
                    "the runtime ran a node that its optimised graph does not have",
                    where=seen.operator,
                    evidence=seen.name,
                )
            node = found.pop(0)
            self.ran.append((node, seen))
            for name, (dtype, shape) in zip([name for name in node.output if name], seen.outputs, strict=False):
                self.shapes[name] = shape
                self.bytes[name] = math.prod(shape) * _CODES.get(dtype, 4)

    def shape(self, name: str) -> Shape:
        """KeyError where it is not known."""
        return self.shapes[name]

    def moved(self, node: Any) -> float:
        """Bytes of a node's inputs and outputs."""
        return float(sum(self.bytes.get(name, 0) for name in {*node.input, *node.output} if name))

    def live_bytes(self) -> int:
        """The most bytes of activations that live at once, each from the node that makes it to the last that reads."""
        last = {name: i for i, (node, _) in enumerate(self.ran) for name in (*node.input, *node.output) if name}
        live: dict[str, int] = {}
        most = 0
        for i, (node, _) in enumerate(self.ran):
            live.update({name: self.bytes.get(name, 0) for name in node.output if name})
            most = max(most, sum(live.values()))
            live = {name: size for name, size in live.items() if last[name] > i}
        return most


def priced(node: Any, tensors: _Tensors) -> tuple[str, dict[str, float]]:
    """Class and work of one node."""
    try:
        return _priced(node, tensors)
    except (KeyError, IndexError, ValueError):  # a form of the operator that no rule knows
        return OTHER, _counted(bytes=tensors.moved(node))


def _priced(node: Any, tensors: _Tensors) -> tuple[str, dict[str, float]]:
    operator = node.op_type
    if operator in ("Conv", "FusedConv", "NhwcFusedConv"):
        return _float_conv(node, tensors)
    if operator in ("QLinearConv", "ConvInteger"):
        return _quantised_conv(node, tensors)
    if operator in ("MatMul", "FusedMatMul", "Gemm", "FusedGemm"):
        return _matrix_product("gemm", node, tensors, node.input[0], node.input[1])
    if operator in ("QLinearMatMul", "QGemm"):
        return _matrix_product("qgemm", node, tensors, node.input[0], node.input[3])
    if operator in ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        return _matrix_product("qgemm", node, tensors, node.input[0], node.input[1])
    if operator in ("MaxPool", "AveragePool", "NhwcMaxPool", "QLinearAveragePool"):
        return _pool(node, tensors)
    if operator in _SHAPES:
        return "shape", _counted(bytes=tensors.moved(node))
    if operator in ("Transpose",):
        return _transpose(node, tensors)
    if operator in ("ReorderInput", "ReorderOutput"):
        return "reorder", _counted(values=math.prod(tensors.shape(node.output[0])))
    out = tensors.shape(node.output[0])
    if operator in _NORMALISATIONS:
        return "normalise", _counted(values=math.prod(out), rows=math.prod(out[:-1]))
    if operator in ("Softmax", "QLinearSoftmax", "LogSoftmax"):
        return operator.lower(), _counted(values=math.prod(out), rows=math.prod(out[:-1]))
    if operator in _REDUCTIONS:
        read = tensors.shape(node.input[0])
        return "reduce", _counted(values=math.prod(read), rows=math.prod(out))
    if operator in ("Cast",):
        return "cast", _counted(values=math.prod(out))
    if operator in ("Gather",):
        return "gather", _counted(values=math.prod(out), rows=math.prod(tensors.shape(node.input[1])))
    if operator in ("QuantizeLinear", "DequantizeLinear"):
        return operator.lower(), _counted(values=math.prod(out))
    if operator in _QUANT_ELEMENTWISE:
        return "qelementwise", _counted(
            values=math.prod(out), spans=_spans(tensors.shape(node.input[0]), tensors.shape(node.input[3]), out)
        )
    if operator in _TRANSCENDENTAL:
        return "transcendental", _counted(values=math.prod(out))
    if operator in _ELEMENTWISE:
        shapes = [tensors.shape(name) for name in node.input if name]
        if len(shapes) < 2:
            return "elementwise", _counted(values=math.prod(out), spans=1)
        return "elementwise", _counted(values=math.prod(out), spans=_spans(shapes[0], shapes[1], out))
    return OTHER, _counted(bytes=tensors.moved(node))


def _counted(**work: float) -> dict[str, float]:
    """Quantities of one node: itself, and those that are given."""
    return {"nodes": 1.0, **{name: float(value) for name, value in work.items() if value}}


def _float_conv(node: Any, tensors: _Tensors) -> tuple[str, dict[str, float]]:
    """A convolution of floats: in blocks of channels (domain com.microsoft.nchwc), or any other."""
    read, out = tensors.shape(node.input[0]), tensors.shape(node.output[0])
    filters = tensors.shape(node.input[1])  # (C_out, C_in / groups, kernel height, kernel width)
    groups = int(_attribute(node, "group", 1))
    batch, kernel = out[0], filters[2:]
    if node.domain != "com.microsoft.nchwc" or len(out) != 4:
        work = math.prod(out) * math.prod(filters[1:])
        # the general way gathers the inputs of every output in a matrix first, but for a kernel of one
        gathered = math.prod(out[2:]) * math.prod(filters[1:]) * batch * groups if math.prod(kernel) > 1 else 0
        kind = "conv-general" if groups == 1 else "conv-grouped"
        return kind, _counted(products=work, gathered=gathered, values=math.prod(out))
    strides, pads = _attribute(node, "strides", [1, 1]), _attribute(node, "pads", [0, 0, 0, 0])
    rows, row_taps = _axis(read[2], out[2], kernel[0], strides[0], pads[0])
    columns, column_taps = _axis(read[3], out[3], kernel[1], strides[1], pads[1])
    blocks = -(-filters[0] // _VECTOR)
    sets = [_FILTERS] * (blocks // _FILTERS) + ([blocks % _FILTERS] if blocks % _FILTERS else [])
    added = 1.0 if len(node.input) > 3 and node.input[3] else 0.0
    outputs = batch * out[2] * out[3] * blocks
    if groups > 1:
        # one product per tap and output; borders are walked output by output
        return "conv-depthwise", _counted(
            products=batch * blocks * row_taps * column_taps, calls=batch * blocks * out[2], values=outputs,
            borders=batch * blocks * row_taps * (columns.left + columns.right) * kernel[1],
        )  # fmt: skip
    channels = filters[1]
    if kernel == (1, 1) and not any(pads):
        # whole planes at once where nothing is skipped, else row by row
        positions = out[2] * out[3] if tuple(strides) == (1, 1) else out[3]
        passes = 1 if tuple(strides) == (1, 1) else out[2]
        depth = -(-channels // 128)
        return "conv-pointwise", _counted(
            products=outputs * channels,
            steps=batch * passes * sum(_tiles(positions, size) for size in sets) * channels,
            values=outputs * depth * (1 + added),
            calls=batch * passes * len(sets) * depth,
            weights=math.prod(filters),
        )
    kind = "conv-direct" if channels >= _VECTOR and channels % _VECTOR == 0 else "conv-input"
    taps = row_taps * kernel[1]  # over the rows; a border's column walks all of its taps
    walked = columns.inner * taps + (columns.left + columns.right) * taps
    inner = sum(_tiles(columns.inner, size) for size in sets) + sum(
        _tile(1, size) * (columns.left + columns.right) for size in sets
    )
    depth = -(-channels // _VECTOR) if kind == "conv-direct" else channels
    return kind, _counted(
        products=batch * blocks * walked * channels,
        steps=batch * inner * taps * channels,
        values=outputs * (depth + added),
        calls=batch * rows.total * len(sets) * depth,
        weights=math.prod(filters),
        strided=batch * blocks * walked * channels if strides[1] > 1 else 0,
    )


class _Outputs(NamedTuple):
    """Outputs along one axis: those that need the left border, those that need none, those that need the right one."""

    left: int
    inner: int
    right: int

    @property
    def total(self) -> int:
        return self.left + self.inner + self.right


def _axis(read: int, out: int, kernel: int, stride: int, pad: int) -> tuple[_Outputs, int]:
    """The outputs along one axis, and how many taps of the kernel fall on real inputs, over all of them."""
    taps = 0
    left = inner = 0
    for position in range(out):
        start = position * stride - pad
        inside = min(start + kernel, read) - max(start, 0)
        taps += max(inside, 0)
        if start < 0:
            left += 1
        elif start + kernel <= read:
            inner += 1
    return _Outputs(left, inner, out - left - inner), taps


def _tile(columns: int, filters: int) -> float:
    """Half the products of one step of a tile, but never less than the time that a chain of additions takes."""
    return max(columns * filters / 2, 2.0)


def _tiles(positions: int, filters: int) -> float:
    """Of a row of outputs: full tiles, and the one or two outputs that are left."""
    full, rest = divmod(positions, _COLUMNS)
    return full * _tile(_COLUMNS, filters) + (_tile(rest, filters) if rest else 0.0)


def _quantised_conv(node: Any, tensors: _Tensors) -> tuple[str, dict[str, float]]:
    """QLinearConv: by a kernel that reads the image where the channels suit it, else as a matrix product."""
    read, out = tensors.shape(node.input[0]), tensors.shape(node.output[0])
    filters = tensors.shape(node.input[3 if node.op_type == "QLinearConv" else 1])
    groups = int(_attribute(node, "group", 1))
    last = bool(_attribute(node, "channels_last", 0))
    batch, made, kernel = out[0], filters[0], math.prod(filters[2:])
    positions = math.prod(out[1:-1] if last else out[2:])
    values = math.prod(out)
    reordered = 0 if last else math.prod(read) + values  # to channels last and back
    if groups > 1 and filters[1] == 1 and made == groups:
        kind = "qconv-depthwise" if groups % 16 == 0 else "qconv-depthwise-rest"
        return kind, _counted(
            products=batch * positions * kernel * -(-made // 16) * 16, values=values, reordered=reordered,
            positions=batch * positions * kernel,
        )  # fmt: skip
    channels = filters[1]
    if groups == 1 and channels % 4 == 0 and made % 8 == 0 and made >= _QUANT_COLUMNS:
        tiles = -(-positions // _QUANT_ROWS) * -(-made // _QUANT_COLUMNS)
        kind = "qconv" if kernel > 1 else "qconv-pointwise"
        return kind, _counted(
            products=batch * positions * made * channels * kernel,
            steps=batch * tiles * kernel * channels * _QUANT_ROWS * _QUANT_COLUMNS,
            tiles=batch * tiles * kernel,
            values=values,
            reordered=reordered,
            weights=math.prod(filters),
        )
    inner = channels * kernel
    return "qconv-general", _counted(
        **_tiled(batch * positions, made // groups, inner, groups),
        gathered=batch * positions * inner * groups if kernel > 1 else 0,
        copies=batch * positions * kernel if kernel > 1 else 0,
        values=values,
        reordered=reordered,
    )


def _matrix_product(kind: str, node: Any, tensors: _Tensors, left: str, right: str) -> tuple[str, dict[str, float]]:
    a, b, out = tensors.shape(left), tensors.shape(right), tensors.shape(node.output[0])
    columns = out[-1]
    inner = a[0] if node.op_type in ("Gemm", "QGemm") and _attribute(node, "transA", 0) else a[-1]
    constant = right in tensors.constants
    if constant or len(b) <= 2:
        times, rows = 1, math.prod(out[:-1])
    else:
        times, rows = math.prod(out[:-2]), out[-2]
    if not constant:
        kind += "-variable"
    elif rows == 1:
        kind += "-vector"
    work = {name: value * times for name, value in _tiled(rows, columns, inner, 1).items()}
    return kind, _counted(
        **work,
        values=math.prod(out),
        packed=0 if constant else times * inner * columns,
        calls=times if not constant else 0,
        weights=inner * columns if constant else 0,
    )


def _tiled(rows: int, columns: int, inner: int, groups: int) -> dict[str, float]:
    """Products of a matrix product, and those of its tiles were they all full."""
    wide = -(-columns // _GEMM_COLUMNS) * _GEMM_COLUMNS
    high = -(-rows // _GEMM_ROWS) * _GEMM_ROWS
    return {
        "products": float(rows * wide * inner * groups),
        "steps": float(high * wide * inner * groups),
        "tiles": float(high * wide * groups),
    }


def _pool(node: Any, tensors: _Tensors) -> tuple[str, dict[str, float]]:
    out = tensors.shape(node.output[0])
    kernel = math.prod(_attribute(node, "kernel_shape", [1]))
    blocked = "-blocked" if node.domain == "com.microsoft.nchwc" else ""
    kind = "qpool" if node.op_type.startswith(("Nhwc", "QLinear")) else f"pool{blocked}"
    return kind, _counted(values=math.prod(out), taps=math.prod(out) * kernel, rows=math.prod(out[:-1]))


def _transpose(node: Any, tensors: _Tensors) -> tuple[str, dict[str, float]]:
    """Without axes of size 1, which move nothing: in blocks where the last axis stays the last, else value by value."""
    read = tensors.shape(node.input[0])
    order = [axis for axis in _attribute(node, "perm", list(range(len(read)))[::-1]) if read[axis] > 1]
    values = math.prod(read)
    width = tensors.bytes.get(node.output[0], 4 * values) // max(values, 1)
    if order == sorted(order):
        return "shape", _counted(bytes=2 * width * values)
    if order[-1] == max(order):
        return "transpose-blocks", _counted(bytes=width * values, blocks=values / read[order[-1]])
    return f"transpose-{width}", _counted(values=values)


def _spans(a: Shape, b: Shape, out: Shape) -> float:
    """Runs of an element-wise operator's inner loop: the trailing axes in which both inputs go on alike."""
    size = len(out)
    a, b = (1,) * (size - len(a)) + a, (1,) * (size - len(b)) + b
    if math.prod(a) == 1 or math.prod(b) == 1 or a == b:
        return 1.0
    run = 1
    pattern: tuple[bool, bool] | None = None
    for axis in reversed(range(size)):
        if out[axis] == 1:
            continue
        current = (a[axis] == 1, b[axis] == 1)
        if pattern is None:
            pattern = current
        if current != pattern:
            break
        run *= out[axis]
    return math.prod(out) / run


def _item_bytes(data_type: int) -> int:
    import onnx

    if data_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
        return 0
    return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)).itemsize)


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx.helper import get_attribute_value

    for attribute in node.attribute:
        if attribute.name == name:
            return get_attribute_value(attribute)
    return default
