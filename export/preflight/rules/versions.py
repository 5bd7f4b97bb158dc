"""Operator set, IR version, precisions, memory: the graph as a whole against the stack and the device."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from export.preflight.finding import EVERYWHERE, TENSORRT, Case, Finding, note, refused, rule
from export.preflight.graph import activation_bytes, peak_activation_bytes
from export.preflight.precisions import graph_precisions
from profiles.opening import tensor_bytes

_GIB = 2**30
_TURING = ("7.5",)
_SHARED = 0.5


@rule("opset", "the operator set is one that the stack reads")
def opset(case: Case) -> Iterator[Finding]:
    stack, found = case.stack, case.graph.opset
    if found > stack.max_opset:
        yield refused(
            f"the graph is too new for {stack.name}",
            f"opset {found}; {stack.runtime} {stack.runtime_version} reads up to {stack.max_opset} ({stack.source})",
            f"export in opset {stack.max_opset}: torch.onnx.export(..., opset_version={stack.max_opset})",
        )


@rule("ir-version", "the IR version is one that the stack reads")
def ir_version(case: Case) -> Iterator[Finding]:
    stack, found = case.stack, int(case.graph.model.ir_version)
    if found > stack.max_ir:
        yield refused(
            f"the file is too new for {stack.name}",
            f"IR version {found}; {stack.runtime} {stack.runtime_version} reads up to {stack.max_ir} ({stack.source})",
            f"set model.ir_version = {stack.max_ir} where no newer data type is used, and save it again",
        )


@rule("opset-old", "the operator set is not older than the runtime promises to read")
def opset_old(case: Case) -> Iterator[Finding]:
    lowest, source = (
        (7, "ONNX Runtime, docs/Versioning.md: opset 7 and higher")
        if case.stack.runtime == "onnxruntime"
        else (9, "NVIDIA TensorRT documentation, ONNX opset guide: 9 and above")
    )
    if case.graph.opset < lowest:
        yield note(
            "the operator set is older than the runtime promises to read",
            f"opset {case.graph.opset} ({source})",
            "onnx.version_converter.convert_version(model, 13), or export it again",
        )


@rule("precision", "the device computes in the graph's precisions")
def precision(case: Case) -> Iterator[Finding]:
    for found in graph_precisions(case.graph.model):
        reason = case.device.why_not(found) if found != "fp32" else None
        if reason is not None:
            usable = ", ".join(name.upper() for name in case.device.precisions)
            yield refused(
                f"{case.device.title} cannot compute in {found.upper()}",
                f"{reason} ({case.device.sources[0]})",
                f"export in one of: {usable}",
            )


@rule("weak-typing", "the graph leaves the precision to the builder of TensorRT 8", on=("tensorrt",))
def weak_typing(case: Case) -> Iterator[Finding]:
    found = [name for name in ("fp16", "int8") if name in graph_precisions(case.graph.model)]
    if case.stack.dialect == "weak-tensorrt" and found:
        flags = " ".join(f"--{name}" for name in found)
        yield note(
            "the precision in the graph is not what TensorRT 8 computes in",
            f"TensorRT {case.stack.runtime_version} knows weak typing only: a flag of its builder decides "
            "(TensorRT developer guide, strongly typed networks came with 9.0)",
            f"trtexec --onnx=model.onnx {flags}",
        )


@rule("turing-fp32", "a Turing GPU gets no FP32 matrix products from TensorRT-RTX", on=("tensorrt-rtx",))
def turing_fp32(case: Case) -> Iterator[Finding]:
    if case.device.compute_capability not in _TURING:
        return
    wide = [
        node.name
        for node in case.graph.of("Conv", "ConvTranspose", "Gemm", "MatMul")
        if case.graph.value(node.outputs[0]).dtype == TensorProto.FLOAT
    ]
    if wide:
        yield refused(
            "FP32 convolutions and matrix products on Turing",
            f"compute capability {case.device.compute_capability}; TensorRT-RTX 1.7.1's builder says "
            '"FP32 GEMM is not supported" (found by building)',
            "export in FP16; with INT8, let the rest be FP16 as well",
            wide,
        )


@rule("memory", "weights and activations fit the device's memory", on=EVERYWHERE)
def memory(case: Case) -> Iterator[Finding]:
    if case.device.memory_gib is None:
        return
    model = case.graph.model
    weights = sum(tensor_bytes(tensor) for _, tensor in case.graph.weights)
    held, room = activation_bytes(model, case.batch), case.device.memory_gib * _GIB
    shared = ", which the system shares" if case.device.unified_memory else ""
    said = (
        f"{weights / _GIB:.1f} GiB of weights and at least {held / _GIB:.1f} GiB of activations at batch {case.batch}, "
        f"{case.device.memory_gib:g} GiB of memory{shared}"
    )
    if weights + held > room:
        fix = "a smaller batch" if held > weights else "a smaller model, or FP16 or INT8 weights"
        yield refused("the model does not fit the memory", f"{said} ({case.device.sources[0]})", fix)
        return
    peak = peak_activation_bytes(model, case.batch)
    if weights + peak > room * (_SHARED if case.device.unified_memory else 1.0):
        yield note(
            "the model may not fit the memory",
            f"{weights / _GIB:.1f} GiB of weights and {peak / _GIB:.1f} GiB of activations at batch {case.batch} if "
            f"nothing is fused, {case.device.memory_gib:g} GiB of memory{shared} ({case.device.sources[0]})",
            "measure it on the device before relying on it, or take a smaller batch",
        )


@rule("local-functions", "the parser reads the model's own functions", on=TENSORRT)
def local_functions(case: Case) -> Iterator[Finding]:
    names = sorted({function.name for function in case.graph.model.functions})
    if names and case.tensorrt < (9, 0):
        yield refused(
            "the model defines functions of its own",
            f"{', '.join(names[:3])}; TensorRT reads local functions from 9.0 on (onnx-tensorrt, docs/Changelog.md)",
            "inline them: onnx.inliner.inline_local_functions(model)",
            names,
        )
