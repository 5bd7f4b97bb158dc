"""The precisions that a graph asks for."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from profiles.device import Precision


def graph_precisions(model: onnx.ModelProto) -> tuple[Precision, ...]:
    """Precisions that the graph asks for, by the types of its constants, casts and inputs, widest first."""
    types = {tensor.data_type for tensor in model.graph.initializer}
    types |= {entry.type.tensor_type.elem_type for entry in model.graph.input}
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
