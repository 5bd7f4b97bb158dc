"""FP16 and INT8 graphs from the FP32 one. Precision lives in the graph, so one file says what will be computed.

Dialects (what the runtimes take was found by running them, see the tests):
- x86, ONNX Runtime: QDQ with U8 activations and S8 weights; `reduce_range` (7-bit weights) without VNNI, whose absence
  lets pairs of products saturate in 16 bits.
- aarch64, ONNX Runtime: S8 activations and weights.
- TensorRT >= 10 and TensorRT-RTX, strongly typed: symmetric S8S8, weights per channel, bias not quantised (TensorRT
  refuses INT32 DequantizeLinear and non-zero zero points). What is not quantised stays FP32 unless it is converted:
  both are offered.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export.onnx import first_lines, quiet, save, set_metadata, sort_nodes
from export.section import ExportSection
from profiles.device import Device, Stack
from profiles.errors import EdgestillError

_CALIBRATION_BATCH = 64
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
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        try:
            with quiet():
                # symbolic shape inference has no rule for ReduceMax and others and fails on them; the exporter writes
                # all shapes into the graph anyway
                quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
                nodes = _to_quantise(onnx.load(str(prepared)), form.operators)
                if not nodes:
                    raise EdgestillError(
                        "the graph has nothing to quantise", where=source.name, evidence=f"no {COMPUTE}"
                    )
                quantize_static(
                    str(prepared),
                    str(quantized),
                    _Reader(calibration),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(form.operators),
                    nodes_to_quantize=nodes,
                    per_channel=True,
                    reduce_range=form.reduce_range,
                    activation_type=QuantType.QUInt8 if form.activations == "uint8" else QuantType.QInt8,
                    weight_type=QuantType.QInt8,
                    calibrate_method=methods[section.calibration_method],
                    extra_options={
                        "ActivationSymmetric": form.symmetric,
                        "WeightSymmetric": True,
                        "QuantizeBias": form.bias,
                        "CalibPercentile": section.calibration_percentile,
                    },
                )
        except EdgestillError:
            raise
        except Exception as error:
            raise EdgestillError(
                "ONNX Runtime's quantiser cannot quantise the graph",
                where=source.name,
                evidence=f"{type(error).__name__}: {first_lines(error)}",
            ) from error
        model = onnx.load(str(quantized))
    # the quantiser leaves the domains that its own optimiser might have used
    domains = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx") or entry.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    original = onnx.load(str(source), load_external_data=False)
    model.ir_version = original.ir_version
    set_metadata(model, {entry.key: entry.value for entry in original.metadata_props} | dict(metadata or {}))
    save(model, target)


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
