"""What a device or its stack cannot do, said before anything is built, each with the fact that it was refused by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.onnx import check_stack
from profiles.device import Device, Precision, Stack
from profiles.section import Section

# docs/operators.md of onnx-tensorrt as of TensorRT 8.4 (operators marked Y)
_TENSORRT_8_SOURCE = "operator table of the onnx-tensorrt parser, TensorRT 8.4"
_TENSORRT_8 = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip
    Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout
    Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GRU HardSigmoid Identity If ImageScaler InstanceNormalization
    IsNaN LeakyRelu Less LessOrEqual Log LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean Min
    Mul Neg NonMaxSuppression Not Or Pad ParametricSoftplus Pow PRelu QuantizeLinear RandomUniform RandomUniformLike
    Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize ReverseSequence RNN Round ScaledTanh Scan Scatter ScatterElements ScatterND
    Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum
    Tan Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze Upsample Where Xor
    """.split()  # noqa: SIM905
)


_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Finding(Section):
    """One thing that a device or stack says about a graph."""

    level: Literal["refused", "note"]
    message: str
    fact: str


def graph_precisions(model: onnx.ModelProto) -> tuple[Precision, ...]:
    """Precisions that the graph asks for, by the types of its constants and casts, widest first."""
    types = {tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        types |= {entry.i for entry in node.attribute if entry.name == "to"}
        types |= {entry.t.data_type for entry in node.attribute if entry.name == "value"}
    quantized: set[int] = set()
    constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            quantized.add(constants.get(node.input[2], TensorProto.UINT8))
    found: list[Precision] = []
    if TensorProto.FLOAT in types:
        found.append("fp32")
    if TensorProto.FLOAT16 in types:
        found.append("fp16")
    if TensorProto.BFLOAT16 in types:
        found.append("bf16")
    if quantized & {TensorProto.INT8, TensorProto.UINT8}:
        found.append("int8")
    if quantized & {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2}:
        found.append("fp8")
    if TensorProto.FLOAT4E2M1 in quantized:
        found.append("fp4")
    return tuple(found)


def preflight(graph: Path | onnx.ModelProto, device: Device, stack: Stack, *, batch: int = 1) -> tuple[Finding, ...]:
    """Everything that the device or the stack refuses in the graph, and what is worth knowing; empty: nothing found.

    Args:
        batch: of the target; the activations grow with it.
    """
    model = onnx.load(str(graph), load_external_data=False) if isinstance(graph, Path) else graph
    findings: list[Finding] = []

    def refuse(message: str, fact: str) -> None:
        findings.append(Finding(level="refused", message=message, fact=fact))

    if fact := check_stack(model, stack):
        refuse(f"the graph is too new for {stack.name}", f"{fact} ({stack.source})")
    precisions = graph_precisions(model)
    for precision in precisions:
        if precision == "fp32":
            continue
        if reason := device.why_not(precision):
            refuse(f"{device.title} cannot compute in {precision.upper()}", reason)
    weights = sum(_tensor_bytes(tensor) for tensor in model.graph.initializer)
    activations = activation_bytes(model, batch)
    if device.memory_gib is not None and weights + activations > device.memory_gib * 2**30:
        refuse(
            "the model does not fit the memory",
            f"{weights / 2**30:.1f} GiB of weights and at least {activations / 2**30:.1f} GiB of activations at batch "
            f"{batch}, {device.memory_gib:g} GiB of memory",
        )
    if stack.runtime != "onnxruntime":
        findings += _tensorrt(model, stack, precisions)
    return tuple(findings)


def activation_bytes(model: onnx.ModelProto, batch: int) -> int:
    """A lower bound of the bytes that the activations of `batch` samples take at once: the inputs of the graph and the
    largest output of a node with weights (convolution, matrix product), which no runtime fuses away.

    Such an output counts one byte per value in a graph that is quantised, where it may exist in INT8 only. A shape
    that cannot be inferred counts nothing.
    """
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for entry in sized.graph.input:
        dims = entry.type.tensor_type.shape.dim
        if dims and dims[0].dim_param:
            dims[0].dim_value = batch
    # shapes that were inferred for any batch would be kept
    del sized.graph.value_info[:]
    for entry in sized.graph.output:
        entry.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    quantized = any(node.op_type == "DequantizeLinear" for node in graph.node)
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" or (node.op_type == "DequantizeLinear" and node.input[0] in constants):
            constants.update(node.output)
    entries = {entry.name: entry for entry in (*graph.value_info, *graph.output)}
    largest = 0
    for node in graph.node:
        if node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in constants:
            entry = entries.get(node.output[0])
            if entry is not None:
                largest = max(largest, _value_bytes(entry, 1 if quantized else None))
    return largest + sum(_value_bytes(entry) for entry in graph.input if entry.name not in constants)


def refusal(findings: tuple[Finding, ...]) -> str | None:
    """The reasons of all refusals in one line, or None."""
    return "; ".join(f"{found.message}: {found.fact}" for found in findings if found.level == "refused") or None


def version_of(stack: Stack) -> tuple[int, int]:
    """Major and minor version of the stack's runtime."""
    numbers = [int(part) for part in stack.runtime_version.split(".")[:2] if part.isdigit()]
    return (numbers[0] if numbers else 0, numbers[1] if len(numbers) > 1 else 0)


def _tensorrt(model: onnx.ModelProto, stack: Stack, precisions: tuple[Precision, ...]) -> list[Finding]:
    findings: list[Finding] = []
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
            continue
        zero = constants.get(node.input[2])
        if zero is None:
            continue
        if zero.data_type == TensorProto.INT32:
            fact = f"{node.name or node.op_type} dequantises INT32; TensorRT takes INT8, FP8 and INT4"
            findings.append(Finding(level="refused", message="a bias is quantised", fact=fact))
            break
        if zero.data_type in (TensorProto.INT8, TensorProto.UINT8) and np.any(numpy_helper.to_array(zero) != 0):
            fact = f"{node.name or node.op_type} has a non-zero zero point; TensorRT takes symmetric quantisation only"
            findings.append(Finding(level="refused", message="activations are quantised asymmetrically", fact=fact))
            break
    if stack.dialect != "weak-tensorrt":
        return findings
    if version_of(stack) < (8, 5) and any(
        entry.type.tensor_type.elem_type == TensorProto.UINT8 for entry in model.graph.input
    ):
        fact = f"TensorRT {stack.runtime_version} has no UINT8 inputs; {_TENSORRT_8_SOURCE}"
        findings.append(Finding(level="refused", message="an input is uint8", fact=fact))
    unknown = sorted({node.op_type for node in model.graph.node if node.domain == ""} - _TENSORRT_8)
    if unknown:
        level: Literal["refused", "note"] = "refused" if version_of(stack) < (8, 5) else "note"
        message = f"operators that TensorRT {stack.runtime_version} may not know: " + ", ".join(unknown)
        findings.append(Finding(level=level, message=message, fact=_TENSORRT_8_SOURCE))
    if {"fp16", "int8"} & set(precisions):
        findings.append(
            Finding(
                level="refused",
                message="precision in the graph",
                fact=f"TensorRT {stack.runtime_version} knows weak typing only: a flag of its builder decides",
            )
        )
    return findings


def _value_bytes(entry: onnx.ValueInfoProto, itemsize: int | None = None) -> int:
    """Bytes of a value; 0 when a dimension is not known."""
    kind = entry.type.tensor_type
    if not kind.HasField("shape") or any(not dim.HasField("dim_value") for dim in kind.shape.dim):
        return 0
    count = math.prod(int(dim.dim_value) for dim in kind.shape.dim)
    return count * (_itemsize(kind.elem_type) if itemsize is None else itemsize)


def _tensor_bytes(tensor: TensorProto) -> int:
    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4}.get(tensor.data_type)
    if bits is None:
        bits = 8 * _itemsize(tensor.data_type)
    return int(np.prod(tensor.dims, dtype=np.int64)) * bits // 8


def _itemsize(data_type: int) -> int:
    """Bytes of one element of an ONNX type; 0 for text."""
    try:
        return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
    except (KeyError, TypeError):
        return 0
