"""Narrower graphs from the FP32 one. Precision lives in the graph, so one file says what will be computed.

Dialects (what the runtimes take was found by running them, see the tests):
- x86, ONNX Runtime: QDQ with U8 activations and S8 weights; `reduce_range` (7-bit weights) without VNNI, whose absence
  lets pairs of products saturate in 16 bits.
- aarch64, ONNX Runtime: S8 activations and weights.
- TensorRT >= 10 and TensorRT-RTX, strongly typed: symmetric S8S8, weights per channel, bias not quantised (TensorRT
  refuses INT32 DequantizeLinear and non-zero zero points). What is not quantised stays FP32 unless it is converted:
  both are offered.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from export.availability import BF16_OPSET
from export.onnx import first_lines, graph_opset, is_large, quiet, save, set_metadata, sort_nodes, write
from export.section import ExportSection
from profiles.device import Device, Stack
from profiles.errors import EdgestillError
from profiles.quantspec import QuantSpec

_CALIBRATION_BATCH = 64
_FP8_LARGEST = 448.0
"""The largest finite value of E4M3FN."""
COMPUTE = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_ALONG = (
    "Add",
    "Relu",
    "Clip",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
    "Reshape",
    "Transpose",
    "Flatten",
)
"""Operators that run in INT8 between two computing ones, so that activations need not leave it."""


@dataclass(frozen=True)
class Quantization:
    """The form of an INT8 graph."""

    activations: str
    """uint8 or int8."""
    symmetric: bool
    """Zero points of the activations are 0."""
    bias: bool
    """Biases are quantised to INT32."""
    reduce_range: bool
    """Weights have 7 bits."""
    operators: tuple[str, ...]

    @property
    def outputs(self) -> bool:
        """What a node writes is quantised, too, not only what it reads.

        ONNX Runtime's integer kernels write integers. TensorRT's advice is to quantise the inputs of nodes with weights
        alone: the activation behind a convolution is then fused with it, and its range holds no negative half.
        """
        return not self.symmetric

    @property
    def spec(self) -> QuantSpec:
        """The grids in plain values, for a quantisation-aware training."""
        activations: Literal["uint8", "int8"] = "uint8" if self.activations == "uint8" else "int8"
        limit = 64 if self.reduce_range else 127
        return QuantSpec(activations=activations, symmetric=self.symmetric, weight_limit=limit)

    def __str__(self) -> str:
        parts = [f"{self.activations[0]}8s8", "symmetric" if self.symmetric else "asymmetric"]
        return " ".join([*parts, *(["7-bit weights"] if self.reduce_range else [])])


def quantization_for(device: Device, stack: Stack) -> Quantization:
    """The form of INT8 that the stack takes."""
    if stack.runtime != "onnxruntime":
        return Quantization("int8", symmetric=True, bias=False, reduce_range=False, operators=(*COMPUTE, "Add"))
    if stack.dialect == "qdq-u8s8":
        return Quantization(
            "uint8", symmetric=False, bias=True, reduce_range="vnni" not in device.isa, operators=(*COMPUTE, *_ALONG)
        )
    return Quantization("int8", symmetric=False, bias=True, reduce_range=False, operators=(*COMPUTE, *_ALONG))


def to_fp16(source: Path, target: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes the graph in FP16; inputs and outputs keep their types.

    Raises:
        EdgestillError: it cannot be converted, or the checker refuses the result.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    try:
        with quiet():
            # the library's own shape inference fails on quantised graphs, and the types it would add are not needed
            converted = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True, disable_shape_infer=True)
    except Exception as error:
        raise EdgestillError(
            "cannot convert the graph to FP16", where=source.name, evidence=first_lines(error)
        ) from error
    # types of intermediate values that were inferred in FP32 are wrong now, and nobody needs them
    del converted.graph.value_info[:]
    sort_nodes(converted.graph)  # the library appends the Casts around operators that stay in FP32
    set_metadata(converted, metadata or {})
    save(converted, target)


def to_bf16(source: Path, target: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes the graph in BF16, in an operator set that has it; inputs and outputs keep their types.

    Raises:
        EdgestillError: it cannot be converted, or the checker refuses the result.
    """
    original = onnx.load(str(source))
    try:
        with quiet():
            if graph_opset(original) < BF16_OPSET:
                original = onnx.version_converter.convert_version(original, BF16_OPSET)
    except Exception as error:
        raise EdgestillError(
            f"cannot convert the graph to opset {BF16_OPSET}", where=source.name, evidence=first_lines(error)
        ) from error
    ir_version = original.ir_version
    weights = {tensor.name: tensor for tensor in original.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        raised, half = Path(folder) / "raised.onnx", Path(folder) / "half.onnx"
        write(original, raised)
        to_fp16(raised, half, metadata)
        model = onnx.load(str(half))

    def narrow(tensor: TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT16:
            exact = numpy_helper.to_array(weights.get(tensor.name, tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(exact.astype(ml_dtypes.bfloat16), tensor.name))

    for tensor in model.graph.initializer:
        narrow(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                narrow(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
    model.ir_version = ir_version
    save(model, target)


class Quantizer:
    """One FP32 graph on its way to INT8: prepared once, its ranges measured once for each method.

    Args:
        source: the FP32 graph.
        calibration: real training samples, input name to array (N, ...).
        form: of the INT8 graph.
        percentile: of the activations inside the range, for the method "percentile".

    Raises:
        EdgestillError: nothing in it can be quantised, or the quantiser fails.
    """

    def __init__(
        self, source: Path, calibration: Mapping[str, NDArray[Any]], form: Quantization, percentile: float
    ) -> None:
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.source, self.calibration, self.form, self.percentile = source, calibration, form, percentile
        self._ranges: dict[str, Any] = {}
        original = onnx.load(str(source), load_external_data=False)
        self._ir_version = original.ir_version
        self._metadata = {entry.key: entry.value for entry in original.metadata_props}
        with tempfile.TemporaryDirectory(prefix="edgestill-") as folder, self._explained():
            prepared = Path(folder) / "prepared.onnx"
            # symbolic shape inference has no rule for ReduceMax and others and fails on them; the exporter writes
            # all shapes into the graph anyway
            quant_pre_process(
                str(source),
                str(prepared),
                skip_symbolic_shape=True,
                save_as_external_data=is_large(original),
                all_tensors_to_one_file=True,
                external_data_location=f"{prepared.name}.data",
            )
            self.prepared: onnx.ModelProto = load_model_with_shape_infer(prepared)
        self.nodes = _to_quantise(self.prepared, form.operators)
        if not self.nodes:
            raise EdgestillError("the graph has nothing to quantise", where=source.name, evidence=f"no {COMPUTE}")

    def of(self, prepared: onnx.ModelProto, *, keep_ranges: bool = False) -> Quantizer:
        """The same for another prepared graph with the same nodes. keep_ranges: its activations are alike."""
        other = copy.copy(self)
        other.prepared = prepared
        other._ranges = self._ranges if keep_ranges else {}
        return other

    def ranges(self, method: str) -> Any:
        """The quantiser's ranges of all activations: "minmax", "entropy" or "percentile"."""
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        methods = {
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }
        if method not in self._ranges:
            with tempfile.TemporaryDirectory(prefix="edgestill-") as folder, self._explained():
                prepared = Path(folder) / "prepared.onnx"
                write(self.prepared, prepared)
                calibrator = create_calibrator(
                    prepared,
                    list(self.form.operators),
                    augmented_model_path=str(Path(folder) / "augmented.onnx"),
                    calibrate_method=methods[method],
                    use_external_data_format=is_large(self.prepared),
                    extra_options={"percentile": self.percentile},
                )
                calibrator.collect_data(_Reader(self.calibration))
                self._ranges[method] = calibrator.compute_data()
        return self._ranges[method]

    def quantized(self, method: str) -> onnx.ModelProto:
        """The whole graph as INT8 QDQ, with the metadata of the FP32 one."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        form = self.form
        ranges = self.ranges(method)
        with self._explained():
            copied = onnx.ModelProto()
            copied.CopyFrom(self.prepared)
            quantizer = QDQQuantizer(
                copied,
                per_channel=True,
                reduce_range=form.reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8 if form.activations == "uint8" else QuantType.QInt8,
                tensors_range=ranges,
                nodes_to_quantize=self.nodes,
                nodes_to_exclude=[],
                op_types_to_quantize=list(form.operators),
                extra_options={
                    "ActivationSymmetric": form.symmetric,
                    "WeightSymmetric": True,
                    "QuantizeBias": form.bias,
                    "OpTypesToExcludeOutputQuantization": [] if form.outputs else list(form.operators),
                },
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            model: onnx.ModelProto = quantizer.model.model
        # the quantiser leaves the domains that its own optimiser might have used
        domains = {node.domain for node in model.graph.node}
        kept = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx") or entry.domain in domains]
        del model.opset_import[:]
        model.opset_import.extend(kept)
        model.ir_version = self._ir_version
        set_metadata(model, self._metadata)
        return model

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with quiet():
                yield
        except EdgestillError:
            raise
        except Exception as error:
            raise EdgestillError(
                "ONNX Runtime's quantiser cannot quantise the graph",
                where=self.source.name,
                evidence=f"{type(error).__name__}: {first_lines(error)}",
            ) from error


def quantize(
    source: Path,
    target: Path,
    calibration: Mapping[str, NDArray[Any]],
    form: Quantization,
    section: ExportSection,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes the FP32 graph `source` as INT8 QDQ, ranges measured on `calibration`.

    Args:
        calibration: real training samples, input name to array (N, ...).

    Raises:
        EdgestillError: nothing in it can be quantised, or the quantiser fails.
    """
    quantizer = Quantizer(source, calibration, form, section.calibration_percentile)
    model = quantizer.quantized(section.calibration_method)
    set_metadata(model, metadata or {})
    save(model, target)


def to_fp8(quantized: onnx.ModelProto, prepared: onnx.ModelProto) -> onnx.ModelProto:
    """A symmetric INT8 graph as FP8 (E4M3FN) QDQ: the same ranges, each scaled to 448, weights per channel.

    Args:
        quantized: as `Quantizer.quantized` gives it for TensorRT.
        prepared: the float graph that it was made from.

    Raises:
        EdgestillError: a zero point that is not 0.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    originals = {node.name: node for node in prepared.graph.node}
    weights = {tensor.name: tensor for tensor in prepared.graph.initializer}
    readers = {name: (node, place) for node in model.graph.node for place, name in enumerate(node.input)}
    widened: dict[str, NDArray[Any]] = {}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        if scale.name not in widened:
            widened[scale.name] = numpy_helper.to_array(scale).astype(np.float32) * (127 / _FP8_LARGEST)
            scale.CopyFrom(numpy_helper.from_array(widened[scale.name].astype(np.float32), scale.name))
        if zero.data_type != TensorProto.FLOAT8E4M3FN:
            if np.any(numpy_helper.to_array(zero)):
                raise EdgestillError("FP8 has no zero points", where=node.name)
            shape = tuple(zero.dims)
            zero.CopyFrom(numpy_helper.from_array(np.zeros(shape, ml_dtypes.float8_e4m3fn), zero.name))
        stored = constants.get(node.input[0])
        if stored is None or stored.data_type == TensorProto.FLOAT8E4M3FN:
            continue
        reader, place = readers[node.output[0]]
        weight = numpy_helper.to_array(weights[originals[reader.name].input[place]]).astype(np.float32)
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        steps = widened[scale.name]
        if steps.ndim:
            steps = steps.reshape([-1 if position == axis % weight.ndim else 1 for position in range(weight.ndim)])
        rounded = np.clip(weight / steps, -_FP8_LARGEST, _FP8_LARGEST).astype(ml_dtypes.float8_e4m3fn)
        stored.CopyFrom(numpy_helper.from_array(rounded, stored.name))
    # types of intermediate values that were inferred in INT8 are wrong now
    del model.graph.value_info[:]
    return model


def types_of(model: onnx.ModelProto) -> str:
    """Types that the graph's computing nodes use, such as "int8, rest fp16", or "int8 in 7 of 9 nodes, rest fp32"."""
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    rest = "fp32"
    if TensorProto.FLOAT16 in kinds:
        rest = "fp16"
    if TensorProto.BFLOAT16 in kinds:
        rest = "bf16"
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return rest
    narrow = "fp8" if TensorProto.FLOAT8E4M3FN in kinds else "int8"
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    # the converter to FP16 may put a Cast between the two
    dequantized |= {
        node.output[0] for node in model.graph.node if node.op_type == "Cast" and node.input[0] in dequantized
    }
    computing = [node for node in model.graph.node if node.op_type in COMPUTE]
    quantized = sum(all(name in dequantized for name in node.input[:2]) for node in computing)
    return (
        f"{narrow}, rest {rest}"
        if quantized == len(computing)
        else (f"{narrow} in {quantized} of {len(computing)} Conv, Gemm and MatMul nodes, rest {rest}")
    )


def _to_quantise(model: onnx.ModelProto, operators: tuple[str, ...]) -> list[str]:
    """Names of the nodes to quantise: computing ones, those of `operators` between them, and directly after the last.

    What comes before the first (the cast of the pixels and their normalisation) is one exact pass over the input and
    stays float. So does what other operators separate from the last: the log-sum-exp of a split head adds a logarithm
    to a maximum, and steps of 1/256 of the logits' range there would cost accuracy and save nothing.
    """
    awaited: set[str] = set()  # values from which a computing node can be reached
    for node in reversed(model.graph.node):
        if node.op_type in COMPUTE or any(name in awaited for name in node.output):
            awaited.update(node.input)
    computed: set[str] = set()  # values that come from a computing node
    direct: set[str] = set()  # those that only quantised nodes made from it
    names: list[str] = []
    for node in model.graph.node:
        inputs = [name for name in node.input if name in computed]
        if node.op_type not in COMPUTE and not inputs:
            continue
        computed.update(node.output)
        between = node.op_type in COMPUTE or any(name in awaited for name in node.output)
        if node.op_type in operators and (between or all(name in direct for name in inputs)):
            direct.update(node.output)
            names.append(node.name)
    return names


class _Reader:
    """Hands the calibration samples to the quantiser in equal batches (its histograms want equal shapes)."""

    def __init__(self, samples: Mapping[str, NDArray[Any]]) -> None:
        self._samples = samples
        count = min(len(array) for array in samples.values())
        self._size = max(size for size in range(1, min(_CALIBRATION_BATCH, count) + 1) if count % size == 0)
        if self._size < min(16, count):  # a prime count: leave the remainder out rather than run one by one
            self._size = min(_CALIBRATION_BATCH, count)
        self._count = count - count % self._size
        self._batches = self._iterate()

    def _iterate(self) -> Iterator[dict[str, NDArray[Any]]]:
        for start in range(0, self._count, self._size):
            yield {
                name: np.ascontiguousarray(array[start : start + self._size]) for name, array in self._samples.items()
            }

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._batches, None)

    def rewind(self) -> None:
        self._batches = self._iterate()

    def set_range(self, start_index: int, end_index: int) -> None:
        """Part of the library's reader protocol for strided calibration, which is not used."""


def computed_in_int8(model: onnx.ModelProto) -> tuple[int, int]:
    """(nodes that compute in INT8, all computing nodes) of a graph that ONNX Runtime has optimised."""
    integer = (
        "QLinearConv",
        "QLinearMatMul",
        "QGemm",
        "MatMulInteger",
        "ConvInteger",
        "MatMulIntegerToFloat",
        "QAttention",
    )
    quantized = sum(node.op_type in integer for node in model.graph.node)
    floating = sum(node.op_type in (*COMPUTE, "FusedConv", "FusedMatMul", "FusedGemm") for node in model.graph.node)
    return quantized, quantized + floating
