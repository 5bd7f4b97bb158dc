"""QDQ graphs in a TensorRT parser."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from export.preflight.finding import TENSORRT, Case, Finding, Groups, named, note, refused, rule
from export.preflight.graph import Node, type_name

_QDQ = ("QuantizeLinear", "DequantizeLinear")
_SOURCE = "onnx-tensorrt, docs/operators.md: QuantizeLinear, DequantizeLinear"
_SINCE = {
    TensorProto.INT8: (8, 0),
    TensorProto.UINT8: (8, 0),
    TensorProto.FLOAT8E4M3FN: (9, 0),
    TensorProto.INT4: (10, 0),
    TensorProto.FLOAT4E2M1: (10, 15),
}
_BIAS = TensorProto.INT32


@rule("int32-bias", "no bias is quantised to INT32", on=TENSORRT)
def int32_bias(case: Case) -> Iterator[Finding]:
    nodes = [node.name for node in case.graph.of("DequantizeLinear") if _quantized_type(case, node) == _BIAS]
    if nodes:
        yield refused(
            "a bias is quantised",
            f"{named(nodes)} dequantises INT32; TensorRT takes INT8, FP8 and INT4 ({_SOURCE})",
            'quantize_static(..., extra_options={"QuantizeBias": False})',
            nodes,
        )


@rule("zero-point", "quantisation is symmetric", on=TENSORRT)
def zero_point(case: Case) -> Iterator[Finding]:
    nodes = []
    for node in case.graph.of(*_QDQ):
        zero = case.graph.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
        if zero is not None and _quantized_type(case, node) in _SINCE and np.any(zero.astype(np.float32) != 0):
            nodes.append(node.name)
    if nodes:
        yield refused(
            "activations are quantised asymmetrically",
            f"{named(nodes)} has a non-zero zero point; TensorRT takes symmetric quantisation only ({_SOURCE})",
            'quantize_static(..., activation_type=QuantType.QInt8, extra_options={"ActivationSymmetric": True})',
            nodes,
        )


@rule("quantized-type", "values are quantised to a type that TensorRT has", on=TENSORRT)
def quantized_type(case: Case) -> Iterator[Finding]:
    groups = Groups()
    for node in case.graph.of(*_QDQ):
        kind = _quantized_type(case, node)
        if kind not in (0, _BIAS) and case.tensorrt < _SINCE.get(kind, (99, 0)):
            groups.add(type_name(kind), node.name)
    for name, nodes in groups:
        first = _SINCE.get(getattr(TensorProto, name, 0))
        since = f"TensorRT has it from {first[0]}.{first[1]} on" if first else "TensorRT quantises to no such type"
        yield refused(
            f"values are quantised to {name}",
            f"{named(nodes)}; {since} ({_SOURCE})",
            "quantise to INT8" + (", or FP8 E4M3FN where the device has it" if name.startswith("FLOAT8") else ""),
            nodes,
        )


@rule("dynamic-scale", "scales are constants", on=("tensorrt",))
def dynamic_scale(case: Case) -> Iterator[Finding]:
    nodes = [
        node.name
        for node in case.graph.of(*_QDQ)
        if len(node.inputs) > 1 and not case.graph.is_constant(node.inputs[1])
    ]
    if nodes and case.tensorrt < (9, 0):
        yield refused(
            "a scale is computed at run time",
            f"{named(nodes)}; TensorRT 8 folds scales into the engine (TensorRT developer guide, explicit "
            "quantization: scales are build-time constants)",
            "quantise statically, with calibration data",
            nodes,
        )


@rule("per-channel-activation", "activations have one scale", on=TENSORRT)
def per_channel_activation(case: Case) -> Iterator[Finding]:
    nodes = []
    for node in case.graph.of("QuantizeLinear"):
        scale = case.graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if scale is not None and scale.size > 1 and not case.graph.is_constant(node.inputs[0]):
            nodes.append(node.name)
    if nodes:
        yield note(
            "activations are quantised per channel",
            f"{named(nodes)}; TensorRT runs INT8 convolutions and matrix products on activations with one scale only "
            "(TensorRT developer guide, explicit quantization: per-channel is for weights)",
            "per-tensor activations, per-channel weights",
            nodes,
        )


def _quantized_type(case: Case, node: Node) -> int:
    """The integer type of a QDQ node, 0 when it is not known."""
    if len(node.inputs) > 2 and node.inputs[2]:
        return case.graph.value(node.inputs[2]).dtype
    if node.op == "DequantizeLinear":
        return case.graph.value(node.inputs[0]).dtype
    return int(node.attribute("output_dtype", 0)) or TensorProto.UINT8
