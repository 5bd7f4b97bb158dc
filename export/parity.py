"""The parity ladder: every graph against the PyTorch model in FP32, on real held-out samples."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.candidate import Rung
from export.onnx import data_file, dynamic_shapes, first_lines, graph_opset, quiet, save, write
from export.preflight.graph import without_weights
from export.section import ExportSection
from profiles.device import Precision
from profiles.errors import EdgestillError
from profiles.metrics import Difference

Samples = Mapping[str, NDArray[Any]]
DifferenceOf = Callable[[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]], Difference]
"""(logits, reference logits, their rows in the held-out samples) to the task metric's paired difference."""

_REFERENCE_BATCH = 256
_BATCH_SAMPLES = 16
"""Samples per small batch size: what depends on the batch shows in a few."""


@dataclass(frozen=True)
class Limits:
    """What a rung must hold; see ExportSection. None: that is not asked.

    tolerance: of the relative error. agreement: share of equal decisions. spread: of `spread_error`.
    """

    tolerance: float | None
    agreement: float | None
    spread: float | None = None


def limits_of(precision: Precision, section: ExportSection, *, judged: bool) -> Limits:
    """What a graph of that precision must hold. judged: a task metric says what its error costs, so that INT8's and
    FP8's is not bounded besides."""
    if precision in ("int8", "fp8"):
        return Limits(None, section.int8_agreement, None if judged else section.int8_tolerance)
    if precision == "fp16":
        return Limits(section.fp16_tolerance, section.fp16_agreement)
    if precision == "bf16":  # 8 bits of mantissa where FP16 has 11
        return Limits(8 * section.fp16_tolerance, section.fp16_agreement)
    return Limits(section.fp32_tolerance, section.fp32_agreement)


def open_session(
    path: Path, *, optimised: bool = True, fuse_quantized: bool = True, optimised_to: Path | None = None
) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        fuse_quantized: False computes QDQ graphs as they are written, in float between Quantize and Dequantize. ONNX
            Runtime's integer kernels are right for its own dialects only: its fusions give wrong figures for FP16
            scales (1.31.1), and without VNNI its S8S8 kernels saturate.
        optimised_to: where to save the optimised graph.

    Raises:
        EdgestillError: it cannot be loaded.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    if not fuse_quantized:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if optimised_to is not None:
        options.optimized_model_filepath = str(optimised_to)
        if data_file(path).is_file():
            key = "session.optimized_model_external_initializers_file_name"
            options.add_session_config_entry(key, data_file(optimised_to).name)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EdgestillError(
            "ONNX Runtime cannot load the graph", where=str(path), evidence=first_lines(error)
        ) from error


def run_session(session: Any, samples: Samples, batch: int) -> NDArray[np.float32]:
    """The first output (N, ...) for all samples, `batch` at a time; the last batch may be smaller."""
    count = len(next(iter(samples.values())))
    parts = [
        session.run(None, {name: array[start : start + batch] for name, array in samples.items()})[0]
        for start in range(0, count, batch)
    ]
    return np.concatenate(parts).astype(np.float32, copy=False)


def run_torch(model: nn.Module, samples: Samples, batch: int = _REFERENCE_BATCH) -> NDArray[np.float32]:
    """The model's output (N, ...) in FP32 on the CPU."""
    count = len(next(iter(samples.values())))
    parts = []
    with torch.inference_mode():
        for start in range(0, count, batch):
            out = model(*(torch.from_numpy(np.array(array[start : start + batch])) for array in samples.values()))
            parts.append((out[0] if isinstance(out, tuple | list) else out).float().numpy())
    return np.concatenate(parts)


def take(samples: Samples, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Those rows of every input."""
    return {name: np.ascontiguousarray(array[rows]) for name, array in samples.items()}


def spread(count: int, wanted: int) -> NDArray[np.int64]:
    """Up to `wanted` rows of `count`, evenly spread, so that samples sorted by class are all represented.

    >>> spread(10, 3).tolist()
    [0, 4, 9]
    """
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))


def relative_error(reference: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    """(max |a - b|, the same over max |reference|); infinite when `other` is not finite."""
    if not np.isfinite(other).all():
        return float("inf"), float("inf")
    difference = float(np.max(np.abs(reference.astype(np.float64) - other.astype(np.float64)), initial=0.0))
    scale = float(np.max(np.abs(reference), initial=0.0))
    return difference, difference / scale if scale > 0 else difference


def spread_error(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Root mean square of the error over the spread of the reference, 0 to 1; 1 is what a constant output would have.

    The spread is the root mean square of what samples differ in: of the reference without its mean over the samples.
    Outputs of several columns (the shorter of the second and the last axis: the channels of a map, the boxes and
    scores of a detector) are each held to their own spread, at most 1 each, and averaged as squares: columns of small
    numbers count like those of large ones. Columns in which the samples do not differ say nothing and are left out;
    where there are no others, the error is relative to the values themselves.

    Args:
        reference: (N, ...).
        other: of the same shape; not finite: 1.

    >>> spread_error(np.array([[0.0], [2.0], [4.0]]), np.array([[2.0], [2.0], [2.0]]))
    1.0
    """
    if not np.isfinite(other).all():
        return 1.0
    wanted = reference.astype(np.float64).reshape(len(reference), *(reference.shape[1:] or (1,)))
    axis = 1 if wanted.shape[1] <= wanted.shape[-1] else wanted.ndim - 1

    def per_column(values: NDArray[np.float64]) -> NDArray[np.float64]:
        squares: NDArray[np.float64] = np.square(np.moveaxis(values, axis, 0)).reshape(values.shape[axis], -1).mean(1)
        return squares

    error = per_column(other.astype(np.float64).reshape(wanted.shape) - wanted)
    size, spread = per_column(wanted), per_column(wanted - wanted.mean(0))
    told = spread > size * np.finfo(np.float32).eps
    scale = spread if told.any() else size
    told = told if told.any() else size > 0
    if not told.any():
        return float(np.sqrt(error.mean()).clip(max=1))
    return float(np.sqrt(np.minimum(error[told] / scale[told], 1).mean()))


def agreement(reference: NDArray[Any], other: NDArray[Any], *, exclusive: bool) -> float:
    """Share of equal decisions: argmax over the last axis for exclusive classes, else the sign of every logit."""
    if exclusive and reference.ndim > 1:
        return float(np.mean(reference.argmax(-1) == other.argmax(-1)))
    return float(np.mean((reference > 0) == (other > 0)))


def climb(
    name: str,
    session: Any,
    reference: NDArray[np.float32],
    samples: Samples,
    rows: NDArray[np.int64],
    batches: Sequence[int],
    limits: Limits,
    *,
    exclusive: bool,
    decides: bool = True,
    difference: DifferenceOf | None = None,
) -> Rung:
    """Compares one graph with the reference at every batch size.

    The largest batch (at least 256) runs all samples; the others run a few. Fewer samples than the batch are repeated.

    Args:
        exclusive: see `agreement`.
        decides: the output is class logits; else it holds no decisions that could agree.
    """
    count = len(reference)
    worst_abs = worst_relative = 0.0
    agreed: float | None = None
    spread_off = 0.0
    scale = max(float(np.max(np.abs(reference), initial=0.0)), 1e-30)

    def account(expected: NDArray[np.float32], found: NDArray[np.float32], share: bool) -> None:
        nonlocal worst_abs, worst_relative, agreed, spread_off
        if found.shape != expected.shape:
            raise EdgestillError(
                f"{name}: the output has shape {found.shape}, PyTorch's {expected.shape}", where="parity ladder"
            )
        largest, _ = relative_error(expected, found)
        worst_abs, worst_relative = max(worst_abs, largest), max(worst_relative, largest / scale)
        if share:
            agreed = agreement(expected, found, exclusive=exclusive) if decides else None
            spread_off = spread_error(expected, found)

    for batch in sorted(set(batches)):
        some = np.arange(max(batch, min(_BATCH_SAMPLES, count) // batch * batch)) % count
        account(reference[some], run_session(session, take(samples, some), batch), share=False)
    everything = run_session(session, samples, max(_REFERENCE_BATCH, *batches))
    account(reference, everything, share=True)
    passed = bool(np.isfinite(worst_abs))
    if limits.tolerance is not None:
        passed = passed and worst_relative <= limits.tolerance
    if limits.agreement is not None and agreed is not None:
        passed = passed and agreed >= limits.agreement
    if limits.spread is not None:
        passed = passed and spread_off <= limits.spread
    finite = bool(np.isfinite(everything).all())
    return Rung(
        name=name,
        batches=tuple(sorted(set(batches))),
        samples=count,
        max_abs=worst_abs,
        relative=worst_relative,
        agreement=agreed,
        spread_error=spread_off,
        difference=difference(everything, reference, rows) if difference is not None and finite else None,
        passed=passed,
    )


def first_divergence(
    reference: Mapping[str, NDArray[Any]], path: Path, samples: Samples, tolerance: float
) -> str | None:
    """The first node of the graph at `path` whose output leaves `tolerance`, e.g. "Conv getitem (relative error 0.3)".

    Args:
        reference: values by name, of another graph or of PyTorch; names that only one side knows are passed over.

    Returns:
        None when no common value is out of tolerance.
    """
    model = onnx.load(str(path))
    values = graph_values(path, samples)
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for name in node.output:
            expected, found = reference.get(name), values.get(name)
            if expected is None or found is None or expected.shape != found.shape or expected.dtype.kind != "f":
                continue
            _, error = relative_error(expected, found)
            if error > tolerance:
                # `emulate_half` puts a rounding Cast behind the node that computes
                computing = producers.get(f"{name}_wide", node)
                return f"{computing.op_type} {name} (relative error {error:.2g})"
    return None


def graph_values(path: Path, samples: Samples) -> dict[str, NDArray[Any]]:
    """Every floating-point value of a graph, by name, computed without optimisation."""
    model = onnx.load(str(path))
    known = {entry.name for entry in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                known.add(name)
                model.graph.output.append(onnx.ValueInfoProto(name=name))
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        instrumented = Path(folder) / "instrumented.onnx"
        write(model, instrumented)
        session = open_session(instrumented, optimised=False)
        names = [entry.name for entry in session.get_outputs()]
        found = session.run(names, dict(samples))
    return {
        name: value.astype(np.float32)
        for name, value in zip(names, found, strict=True)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
    }


def torch_values(model: nn.Module, samples: Samples) -> dict[str, NDArray[Any]]:
    """Every value of the PyTorch model under the name that torch.onnx.export gives it."""
    inputs = tuple(torch.from_numpy(np.array(array)) for array in samples.values())
    shapes = dynamic_shapes(model, list(samples))
    with quiet(), torch.no_grad():
        program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
        if program is None or program.exported_program is None:
            return {}
        recorder = _Recorder(program.exported_program.module())
        recorder.run(*inputs)
    return recorder.values


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.values: dict[str, NDArray[Any]] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, torch.Tensor) and result.is_floating_point():
            self.values[n.name] = result.detach().float().numpy()
        return result


def optimised_graph(path: Path, target: Path) -> onnx.ModelProto:
    """The graph as ONNX Runtime runs it here, also written to `target`."""
    open_session(path, optimised_to=target)
    return onnx.load(str(target))


def emulate(source: Path, target: Path) -> None:
    """Writes a QDQ graph with every Quantize and Dequantize as plain arithmetic, for scoring it away from its device.

    The result computes what a runtime of the other dialect computes, up to the order of its sums, on any ONNX Runtime:
    Quantize is clip(round(x / scale) + zero point), Dequantize (q - zero point) * scale, constants are folded.

    Raises:
        EdgestillError: a scale or zero point that is not constant.
    """
    model = onnx.load(str(source))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    added: list[TensorProto] = []

    def constant(name: str, value: NDArray[Any]) -> str:
        added.append(numpy_helper.from_array(value, name))
        return name

    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            nodes.append(node)
            continue
        if node.input[1] not in constants or (len(node.input) > 2 and node.input[2] not in constants):
            raise EdgestillError("a scale of the graph is not constant", where=node.name)
        scale = numpy_helper.to_array(constants[node.input[1]])
        zero = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 else np.zeros((), np.uint8)
        out, kind = node.output[0], scale.dtype
        offset = constant(f"{out}_offset", zero.astype(np.float32).astype(kind))
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            stored = numpy_helper.to_array(constants[node.input[0]])
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
            shape = [-1 if position == axis % max(stored.ndim, 1) else 1 for position in range(stored.ndim)]
            wide = scale.reshape(shape) if scale.ndim else scale
            steps = stored.astype(np.float64) - (zero.reshape(shape) if zero.ndim else zero).astype(np.float64)
            constant(out, (steps * wide.astype(np.float64)).astype(kind))
        elif zero.dtype == ml_dtypes.float8_e4m3fn and node.op_type == "DequantizeLinear":
            wide_type = helper.np_dtype_to_tensor_dtype(kind)
            nodes.append(helper.make_node("Cast", [node.input[0]], [f"{out}_steps"], name=f"{out}_steps", to=wide_type))
            nodes.append(helper.make_node("Mul", [f"{out}_steps", node.input[1]], [out], name=node.name))
        elif zero.dtype == ml_dtypes.float8_e4m3fn:
            low, high = constant(f"{out}_low", np.array(-448, kind)), constant(f"{out}_high", np.array(448, kind))
            nodes.append(helper.make_node("Div", list(node.input[:2]), [f"{out}_ratio"], name=f"{node.name}_ratio"))
            nodes.append(
                helper.make_node("Clip", [f"{out}_ratio", low, high], [f"{out}_clipped"], name=f"{node.name}_clip")
            )
            narrow = TensorProto.FLOAT8E4M3FN
            nodes.append(helper.make_node("Cast", [f"{out}_clipped"], [out], name=node.name, to=narrow))
        elif node.op_type == "DequantizeLinear":
            nodes.append(helper.make_node("Sub", [node.input[0], offset], [f"{out}_steps"], name=f"{node.name}_steps"))
            nodes.append(helper.make_node("Mul", [f"{out}_steps", node.input[1]], [out], name=node.name))
        else:
            limits = np.iinfo(zero.dtype)
            low, high = (
                constant(f"{out}_low", np.array(limits.min, kind)),
                constant(f"{out}_high", np.array(limits.max, kind)),
            )
            nodes.append(
                helper.make_node("Div", [node.input[0], node.input[1]], [f"{out}_ratio"], name=f"{node.name}_ratio")
            )
            nodes.append(helper.make_node("Round", [f"{out}_ratio"], [f"{out}_round"], name=f"{node.name}_round"))
            nodes.append(helper.make_node("Add", [f"{out}_round", offset], [f"{out}_moved"], name=f"{node.name}_moved"))
            nodes.append(helper.make_node("Clip", [f"{out}_moved", low, high], [out], name=node.name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    model.graph.initializer.extend(added)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if graph_opset(model) < 13:
        raise EdgestillError("a QDQ graph below opset 13", where=source.name)
    save(model, target)


def emulate_half(source: Path, target: Path, *, half: int = TensorProto.FLOAT16) -> None:
    """Writes an FP16 graph in FP32 with every value rounded to FP16, so that a CPU shows what FP16 costs.

    `half` may be BFLOAT16, for a graph in that type.

    ONNX Runtime drops the casts between the nodes of an FP16 graph on a CPU and computes in FP32: such a run shows
    neither rounding nor overflow. Sums inside a node stay in FP32, as in tensor cores.
    """
    model = onnx.load(str(source))
    inferred = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    full = TensorProto.FLOAT
    types = {entry.name: entry.type.tensor_type.elem_type for entry in (*inferred.value_info, *inferred.output)}

    def widen(tensor: TensorProto) -> None:
        if tensor.data_type == half:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widen(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = full
        nodes.append(node)
        for position, name in enumerate(list(node.output)):
            if types.get(name) != half:
                continue
            node.output[position] = f"{name}_wide"
            nodes.append(helper.make_node("Cast", [f"{name}_wide"], [f"{name}_half"], name=f"{name}_round", to=half))
            nodes.append(helper.make_node("Cast", [f"{name}_half"], [name], name=f"{name}_widen", to=full))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    for entry in (*model.graph.input, *model.graph.output):
        if entry.type.tensor_type.elem_type == half:
            entry.type.tensor_type.elem_type = full
    save(model, target)
