"""Operators that the runtime does not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from export.preflight.finding import EVERYWHERE, TENSORRT, Case, Finding, Groups, named, note, refused, rule
from export.preflight.graph import Graph, Node, type_name
from export.preflight.operators import KERNEL_SOURCE, TENSORRT_SOURCE, Kernels, kernels_of, schema_of, tensorrt_has

_HANDLED_BY_TYPE = {"float16": "float"}
"""ONNX Runtime puts casts around a node that has no FP16 kernel."""
_TENSORRT_DOMAINS = ("", "trt", "com.nvidia", "nvidia")


@rule("operator", "TensorRT has every operator", on=TENSORRT)
def operator(case: Case) -> Iterator[Finding]:
    lacking: dict[str, tuple[str, list[str]]] = {}
    unsure: dict[str, tuple[str, list[str]]] = {}
    for node in case.graph.nodes:
        if node.domain or _is_function(case.graph, node):
            continue
        has, fact = tensorrt_has(node.op, case.tensorrt, rtx=case.rtx)
        if not has:
            (unsure if has is None else lacking).setdefault(node.op, (fact, []))[1].append(node.name)
    for name, (fact, nodes) in lacking.items():
        yield refused(
            f"{case.runtime} has no {name}",
            f"{named(nodes)}; {fact}",
            _instead(case, name),
            nodes,
        )
    for name, (fact, nodes) in unsure.items():
        yield note(f"{case.runtime} may not have {name}", f"{named(nodes)}; {fact}", _instead(case, name), nodes)


@rule("custom-operator", "every operator belongs to a domain that the runtime knows", on=EVERYWHERE)
def custom_operator(case: Case) -> Iterator[Finding]:
    onnxruntime = case.stack.runtime == "onnxruntime"
    table = kernels_of(case.stack.runtime_version) if onnxruntime else None
    groups = Groups()
    for node in case.graph.nodes:
        if not node.domain or _is_function(case.graph, node):
            continue
        if table is not None and table.has(node.op, node.domain, 0):
            continue
        if table is None and (
            node.domain in _TENSORRT_DOMAINS or tensorrt_has(node.op, case.tensorrt, rtx=case.rtx)[0]
        ):
            continue  # the parser looks at the operator's name alone
        groups.add(f"{node.domain}:{node.op}", node.name)
    for name, nodes in groups:
        domain = name.partition(":")[0]
        where = (
            f"{case.runtime}'s CPU provider has no kernel for it ({KERNEL_SOURCE})"
            if onnxruntime
            else f"TensorRT has no such operator and looks for a plugin of that name ({TENSORRT_SOURCE})"
        )
        optimised = domain in ("com.microsoft", "com.microsoft.nchwc") and not onnxruntime
        yield refused(
            f"the operator {name} is not ONNX's own",
            f"{named(nodes)}; {where}",
            "export again without ONNX Runtime's optimisation: it wrote operators of its own"
            if optimised
            else "write it with ONNX's operators, or ship its library and register it on the device",
            nodes,
        )


@rule("kernel", "ONNX Runtime has a kernel for every operator and type", on=("onnxruntime",))
def kernel(case: Case) -> Iterator[Finding]:
    table = kernels_of(case.stack.runtime_version)
    missing, types = Groups(), Groups()
    for node in case.graph.nodes:
        if node.domain or node.op == "Constant" or _is_function(case.graph, node):
            continue
        schema = schema_of(node.op, case.graph.opset)
        if schema is None:
            continue  # the checker's to describe
        if not table.has(node.op, "", schema.since_version):
            # without a kernel ONNX Runtime puts the operator's own definition in its place, where it has one
            if not (schema.has_function or schema.has_context_dependent_function):
                missing.add(f"{node.op} of opset {schema.since_version}", node.name)
        elif not node.function:
            for kind in _unserved(case.graph, node, schema, table):
                types.add(f"{node.op} on {kind}", node.name)
    for name, nodes in (*missing, *types):
        yield refused(
            f"{case.runtime} has no kernel for {name}",
            f"{named(nodes)}; the CPU provider does not list it ({KERNEL_SOURCE} in {table.release})",
            "export in FP32" if "bfloat16" in name else f"another operator than {name.split()[0]}, or another type",
            nodes,
        )


def _unserved(graph: Graph, node: Node, schema: Any, table: Kernels) -> Iterator[str]:
    """Types of the node's inputs that no kernel takes."""
    formal = list(schema.inputs)
    seen = set()
    for position, name in enumerate(node.inputs):
        kind = type_name(graph.value(name).dtype).lower() if name and graph.value(name).dtype else ""
        if not kind or not formal or formal[min(position, len(formal) - 1)].type_str in seen:
            continue
        parameter = formal[min(position, len(formal) - 1)].type_str
        seen.add(parameter)
        served = table.types(node.op, schema.since_version, parameter)
        if served is None:
            continue
        if kind not in served and _HANDLED_BY_TYPE.get(kind) not in served:
            yield kind


def _is_function(graph: Graph, node: Node) -> bool:
    return any(entry.name == node.op and entry.domain in (node.domain, "ai.onnx") for entry in graph.model.functions)


_INSTEAD = {
    "NonZero": "TopK with a constant K, or return the mask",
    "DeformConv": "GridSample and Conv, or a stack with TensorRT 10.1 instead of TensorRT-RTX",
    "HardSwish": "HardSigmoid and Mul",
    "Gelu": "x * 0.5 * (1 + erf(x / sqrt(2))), as opset 19 and below write it",
    "Mish": "x * tanh(softplus(x))",
    "Swish": "x * sigmoid(x)",
    "LayerNormalization": "opset 16, which writes it with ReduceMean, Sub, Pow and Div",
    "GroupNormalization": "Reshape and InstanceNormalization",
    "Reciprocal": "1 / x",
    "OneHot": "Equal with a constant Range",
    "DynamicQuantizeLinear": "static quantisation with calibration data (QuantizeLinear, DequantizeLinear)",
    "QLinearConv": "the QDQ form: quant_format=QuantFormat.QDQ",
    "QLinearMatMul": "the QDQ form: quant_format=QuantFormat.QDQ",
    "ConvInteger": "the QDQ form: quant_format=QuantFormat.QDQ",
    "MatMulInteger": "the QDQ form: quant_format=QuantFormat.QDQ",
}


def _instead(case: Case, name: str) -> str:
    if name in _INSTEAD:
        return _INSTEAD[name]
    newer = next(
        (
            stack
            for stack in case.device.stacks
            if stack.runtime == "tensorrt" and tensorrt_has(name, _version(stack.runtime_version))[0]
        ),
        None,
    )
    if newer is not None:
        return f"--stack {newer.name} ({newer.runtime} {newer.runtime_version} has it)"
    return "compute it outside of the graph, write it with other operators, or give it a plugin"


def _version(text: str) -> tuple[int, int]:
    numbers = [int(part) for part in text.split(".")[:2] if part.isdigit()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)
