"""Data types that a TensorRT parser takes, converts, or refuses."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from export.preflight.finding import TENSORRT, Case, Finding, named, note, refused, rule
from export.preflight.graph import Node, type_name

_TYPES_SOURCE = "onnx-tensorrt, docs/operators.md: data types"
_EVERY = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64})
_TAKEN = _EVERY | {TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL}
# newer types and the first TensorRT whose table lists them
_LATER = {
    TensorProto.BFLOAT16: (9, 0),
    TensorProto.FLOAT8E4M3FN: (9, 0),
    TensorProto.INT4: (10, 0),
    TensorProto.FLOAT4E2M1: (10, 15),
}
_FOR_UINT8 = ("Cast", "CastLike", "Identity", "Flatten", "QuantizeLinear", "DequantizeLinear", "Equal")


@rule("string-tensor", "no value is text", on=TENSORRT)
def string_tensor(case: Case) -> Iterator[Finding]:
    names = [name for name, kind in _types(case) if kind == TensorProto.STRING]
    if names:
        yield refused(
            "the graph handles text",
            f"{named(names)}; TensorRT has no text tensors ({_TYPES_SOURCE})",
            "tokenize before the graph, and give it token numbers",
            names,
        )


@rule("data-type", "every value has a type that TensorRT has", on=TENSORRT)
def data_type(case: Case) -> Iterator[Finding]:
    found: dict[int, list[str]] = {}
    for name, kind in _types(case):
        lacking = kind not in _TAKEN and case.tensorrt < _LATER.get(kind, (99, 0))
        if kind and kind != TensorProto.STRING and lacking:
            found.setdefault(kind, []).append(name)
    for kind, names in found.items():
        first = _LATER.get(kind)
        since = f"TensorRT has it from {first[0]}.{first[1]} on" if first else "TensorRT has no such type"
        yield refused(
            f"values of type {type_name(kind)}",
            f"{named(names)}; {since} ({_TYPES_SOURCE})",
            "cast to INT32, INT64 or FLOAT in the model before exporting",
            names,
        )


@rule("int64", "integers fit 32 bits where TensorRT has no INT64", on=("tensorrt",))
def int64(case: Case) -> Iterator[Finding]:
    if case.tensorrt >= (9, 0):
        return
    bound = [name for name, value in case.graph.inputs.items() if value.dtype == TensorProto.INT64]
    bound += [
        entry.name for entry in case.graph.model.graph.output if entry.type.tensor_type.elem_type == TensorProto.INT64
    ]
    if bound:
        yield note(
            "INT64 inputs or outputs",
            f"{named(bound)}; TensorRT before 9.0 casts INT64 to INT32 and binds INT32 "
            "(onnx-tensorrt, docs/Changelog.md, 9.0 EA)",
            "give and read INT32 on the device; values must fit 32 bits",
            bound,
        )


@rule("double", "no value needs 64-bit floating point", on=TENSORRT)
def double(case: Case) -> Iterator[Finding]:
    names = [name for name, kind in _types(case) if kind == TensorProto.DOUBLE]
    if names:
        yield note(
            "double precision",
            f"{named(names)}; TensorRT casts DOUBLE to FLOAT and clamps it ({_TYPES_SOURCE})",
            "export the model in float32: model.float()",
            names,
        )


@rule("uint8-input", "inputs are not UINT8 before TensorRT 8.5", on=("tensorrt",))
def uint8_input(case: Case) -> Iterator[Finding]:
    names = [name for name, value in case.graph.inputs.items() if value.dtype == TensorProto.UINT8]
    if names and case.tensorrt < (8, 5):
        yield refused(
            "an input is uint8",
            f"{named(names)}; TensorRT {case.stack.runtime_version} has no UINT8 inputs, they came with 8.5 "
            "(onnx-tensorrt, docs/Changelog.md)",
            "let the input be FLOAT or INT32, and convert before the graph",
            names,
        )


@rule("uint8-compute", "UINT8 values are cast before anything else reads them", on=TENSORRT)
def uint8_compute(case: Case) -> Iterator[Finding]:
    if case.tensorrt < (8, 5):
        return
    graph = case.graph
    outputs = {entry.name for entry in graph.model.graph.output}

    def wrong(node: Node) -> bool:
        """It reads UINT8 as something else than an input that is converted, or makes it for another node."""
        if node.op == "Cast" and graph.value(node.outputs[0]).dtype == TensorProto.UINT8:
            return node.outputs[0] not in outputs
        reads = [name for name in node.inputs if name and graph.value(name).dtype == TensorProto.UINT8]
        if node.op == "DequantizeLinear":
            return any(name in graph.inputs for name in reads)
        return bool(reads) and node.op not in _FOR_UINT8

    nodes = [node.name for node in graph.nodes if not node.function and wrong(node)]
    if nodes:
        yield refused(
            "nodes compute on UINT8",
            f"{named(nodes)}; UINT8 is supported for inputs and outputs of the network only ({_TYPES_SOURCE})",
            "cast the input first: image.to(torch.float32) at the start of forward()",
            nodes,
        )


def _types(case: Case) -> list[tuple[str, int]]:
    """Type of every input, output, constant, and of what a Cast makes."""
    graph = case.graph
    found = {name: value.dtype for name, value in graph.inputs.items()}
    found |= {name: tensor.data_type for name, tensor in graph.weights}
    found |= {entry.name: entry.type.tensor_type.elem_type for entry in graph.model.graph.output}
    for node in graph.of("Cast"):
        found[node.outputs[0] if node.outputs else node.name] = int(node.attribute("to", 0))
    zero_points = {node.inputs[2] for node in graph.of("QuantizeLinear", "DequantizeLinear") if len(node.inputs) > 2}
    quantized = {node.inputs[0] for node in graph.of("DequantizeLinear") if node.inputs}
    # the rules of quantisation say it better
    return [(name, kind) for name, kind in found.items() if name not in zero_points | quantized]
