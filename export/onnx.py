"""PyTorch to an ONNX FP32 graph with a dynamic batch, in the operator set that the target's stack reads."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from profiles.device import Stack
from profiles.errors import EdgestillError, InputError
from profiles.opening import tensor_bytes

DEFAULT_OPSET = 20
EXPORTER_OPSETS = (18, 25)
"""What torch.onnx.export writes by itself; older ones are reached by `lower_opset`."""
LARGE_BYTES = 2**30
"""Weights of more bytes go into a file beside the graph. A protobuf ends at 2 GiB, and what the conversions add must
fit, too."""
DEFAULT_IR = 10


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporter's and the quantiser's prints, logs and warnings away; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_lines(error: BaseException, count: int = 3) -> str:
    """The first lines of an error's deepest cause: what wraps it tells where it happened, not what."""
    while error.__cause__ is not None:
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return "; ".join(lines[:count]) or type(error).__name__


def choose_opset(asked: int | None, stack: Stack) -> int:
    """The operator set to export in: the asked one, or the newest up to 20 that the stack reads.

    Raises:
        InputError: the stack does not read the asked one.
    """
    if asked is None:
        return min(DEFAULT_OPSET, stack.max_opset)
    if asked > stack.max_opset:
        raise InputError(
            f"opset {asked} is too new for {stack.name}",
            where="export.opset",
            evidence=f"{stack.runtime} {stack.runtime_version} reads up to opset {stack.max_opset} ({stack.source})",
            fix=f"opset = {stack.max_opset}, or leave it out",
        )
    return asked


def graph_opset(model: onnx.ModelProto) -> int:
    """Version of the default operator set."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def export_graph(
    model: nn.Module,
    examples: Mapping[str, Tensor],
    path: Path,
    *,
    opset: int,
    max_ir: int = DEFAULT_IR,
    output_names: Sequence[str] = ("logits",),
    metadata: Mapping[str, Any] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> None:
    """Writes `model` as an ONNX FP32 graph whose batch (first dimension of every input and output) is dynamic.

    Args:
        model: in eval mode, on the CPU; called with the inputs in order.
        examples: name to example (N, ...) with N >= 2: the exporter would take a batch of 1 for a constant.
        opset: 13 to 25. Below 18 the graph is lowered, see `lower_opset`.
        max_ir: newest IR version that the reader takes.
        metadata: written to `metadata_props`; values that are not text as JSON.
        dynamic: names of further dimensions that are dynamic, by input and position; equal names are equal sizes.

    Raises:
        InputError: the model is in training mode, or a batch below 2.
        EdgestillError: it cannot be exported with a dynamic batch, or the checker refuses the graph.
    """
    if model.training:
        raise InputError("the model is in training mode", where=type(model).__name__, fix="call model.eval() first")
    if any(example.shape[0] < 2 for example in examples.values()):
        raise InputError("the example batch must be 2 or more", where=", ".join(examples))
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                tuple(examples.values()),
                dynamo=True,
                opset_version=max(opset, EXPORTER_OPSETS[0]),
                dynamic_shapes=dynamic_shapes(model, list(examples), dynamic),
                input_names=list(examples),
                output_names=list(output_names),
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds, all of which mean the same to the user
        raise EdgestillError(
            f"{type(model).__name__} cannot be exported to ONNX with a dynamic batch",
            where=type(model).__name__,
            evidence=first_lines(error),
            fix="avoid control flow and shapes that depend on values or on the batch size in forward()",
        ) from error
    if program is None:
        raise EdgestillError("torch.onnx.export returned no program", where=type(model).__name__)
    proto = program.model_proto
    _strip_traces(proto.graph)
    if opset < EXPORTER_OPSETS[0]:
        proto = lower_opset(proto, opset)
    # versions 9 and 10 added data types and metadata that these graphs do not use
    proto.ir_version = min(proto.ir_version, max_ir, DEFAULT_IR)
    proto.producer_name = "edgestill"
    proto.producer_version = own_version()
    set_metadata(proto, {"edgestill": own_version(), **(metadata or {})})
    save(proto, path)


def dynamic_shapes(
    model: nn.Module, names: Sequence[str], dynamic: Mapping[str, Mapping[int, str]] | None = None
) -> tuple[Any, ...]:
    """For the exporter: dynamic dimensions of every input. The first one is the batch."""
    given = dynamic or {}
    sizes = {"batch", *(size for each in given.values() for size in each.values())}
    known = {size: torch.export.Dim(size) for size in sizes}
    shapes = tuple(
        {0: known["batch"]} | {position: known[size] for position, size in given.get(name, {}).items()}
        for name in names
    )
    kinds = [entry.kind for entry in inspect.signature(model.forward).parameters.values()]
    return (shapes,) if kinds == [inspect.Parameter.VAR_POSITIONAL] else shapes


def save(model: onnx.ModelProto, path: Path) -> None:
    """Checks and writes a graph; the weights of a large one go to `<name>.data` beside it, see `LARGE_BYTES`.

    Raises:
        EdgestillError: onnx.checker refuses the graph.
    """
    large = is_large(model)
    if large:
        write(model, path)
    try:
        with quiet():
            onnx.checker.check_model(str(path) if large else model, full_check=True)
    except Exception as error:
        raise EdgestillError("onnx.checker refuses the graph", where=path.name, evidence=first_lines(error)) from error
    if not large:
        write(model, path)


def write(model: onnx.ModelProto, path: Path) -> None:
    """Like `save`, unchecked. `model` stays as it is."""
    remove(path)
    if not is_large(model):
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    onnx.save_model(model, str(path), save_as_external_data=True, location=data_file(path).name)
    onnx.load_external_data_for_model(model, str(path.parent))  # which saving moved out of the model


def is_large(model: onnx.ModelProto) -> bool:
    """Whether its weights, wherever they are stored, go beside the graph."""
    return weights_bytes(model) >= LARGE_BYTES


def weights_bytes(model: onnx.ModelProto) -> int:
    """Size of all initialisers."""
    return sum(tensor_bytes(tensor) for tensor in model.graph.initializer)


def data_file(path: Path) -> Path:
    """Where the weights of a large graph lie."""
    return path.with_name(f"{path.name}.data")


def remove(path: Path) -> None:
    """Deletes a graph and the weights beside it, as far as they exist."""
    path.unlink(missing_ok=True)
    data_file(path).unlink(missing_ok=True)


def own_version() -> str:
    """Version of edgestill, "unknown" when it runs from a folder that is not installed."""
    try:
        return version("edgestill")
    except PackageNotFoundError:
        return "unknown"


def set_metadata(model: onnx.ModelProto, entries: Mapping[str, Any]) -> None:
    """Sets `metadata_props`; values that are not text are written as JSON."""
    kept = {entry.key: entry.value for entry in model.metadata_props}
    for key, value in entries.items():
        kept[key] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    del model.metadata_props[:]
    helper.set_model_props(model, kept)


def _strip_traces(graph: onnx.GraphProto) -> None:
    """Removes the exporter's notes: stack traces with paths of this machine do not belong into a shipped file."""
    for entries in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer):
        for entry in entries:
            del entry.metadata_props[:]
    del graph.metadata_props[:]


def lower_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same graph in an older operator set, 13 to 17, for TensorRT 8.x.

    onnx.version_converter has no adapters for several of these steps, so the few that matter are taken here: axes
    of the Reduce operators as an attribute (18 made them an input), HardSwish as HardSigmoid and Mul, and
    attributes that came later dropped at their default. Anything else that the older set does not have is refused.
    The parity ladder then compares the result with PyTorch like every other graph.

    Raises:
        EdgestillError: an operator of the graph does not exist in `opset`.
    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    graph = lowered.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "HardSwish":  # TensorRT 8 does not know it, whatever the opset
            gate = f"{node.output[0]}_gate"
            nodes.append(
                helper.make_node(
                    "HardSigmoid", [node.input[0]], [gate], name=f"{node.name}_gate", alpha=1 / 6, beta=0.5
                )
            )
            nodes.append(helper.make_node("Mul", [node.input[0], gate], list(node.output), name=node.name))
            continue
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and opset < 18:
            _axes_to_attribute(node, constants)
        if node.op_type == "Reshape" and opset < 14:
            # only an empty dimension could tell allowzero apart, and a batch is never empty
            _drop(node, "allowzero")
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for entry in lowered.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    for node in graph.node:
        try:
            onnx.defs.get_schema(node.op_type, opset, node.domain)
        except onnx.defs.SchemaError as error:
            raise EdgestillError(
                f"{node.op_type} does not exist in opset {opset}",
                where=node.name,
                evidence=f"{node.op_type} is in opset {graph_opset(model)}, in which it was exported",
                fix="a student without it, or a newer stack",
            ) from error
    return lowered


def _axes_to_attribute(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> None:
    _drop(node, "noop_with_empty_axes")
    if len(node.input) < 2 or not node.input[1]:
        return
    tensor = constants.get(node.input[1])
    if tensor is None:
        raise EdgestillError(f"{node.op_type} has axes that are not constant", where=node.name)
    axes = [int(axis) for axis in numpy_helper.to_array(tensor).reshape(-1)]
    del node.input[1:]
    node.attribute.append(helper.make_attribute("axes", axes))


def _drop(node: onnx.NodeProto, name: str) -> None:
    kept = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Puts every node after the nodes whose outputs it reads, otherwise in the order that they had."""
    produced = {name for node in graph.node for name in node.output}
    done: set[str] = set()
    waiting, ordered = list(graph.node), []
    while waiting:
        later = []
        for node in waiting:
            if all(name not in produced or name in done for name in node.input):
                ordered.append(node)
                done.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise EdgestillError("the graph has a cycle", where=later[0].name)
        waiting = later
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)
