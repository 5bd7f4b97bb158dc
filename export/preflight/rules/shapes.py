"""Batch, dynamic dimensions, shapes that depend on data, control flow."""

from __future__ import annotations

from collections.abc import Iterator

from export.preflight.finding import TENSORRT, Case, Finding, Groups, named, note, refused, rule
from export.preflight.graph import Graph, Node

_PROFILES = "TensorRT developer guide, working with dynamic shapes"
_MAX_RANK = 8

# operator -> positions of the inputs that decide the shape of its output
_SHAPE_INPUTS = {
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "ConstantOfShape": (0,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
    "Slice": (1, 2),
    "TopK": (1,),
}
_DATA_DEPENDENT = ("NonZero", "NonMaxSuppression")


@rule("batch", "the batch is dynamic or the target's")
def batch(case: Case) -> Iterator[Finding]:
    fixed = {
        name: value.shape[0]
        for name, value in case.graph.inputs.items()
        if value.shape is not None and len(value.shape) > 1 and isinstance(value.shape[0], int)
    }
    wrong = {name: size for name, size in fixed.items() if size != case.batch}
    if not wrong:
        return
    said = ", ".join(f"{name} takes {size}" for name, size in list(wrong.items())[:3])
    fix = "export with an example batch of 2 and dynamic_shapes that name the first dimension"
    # a first dimension of another size may be something else than a batch; of 1 it is one
    if case.batch > 1 and any(size == 1 for size in wrong.values()):
        yield refused(
            f"the graph cannot take a batch of {case.batch}",
            f"{said}: its first dimension is fixed (read from the graph)",
            fix,
            wrong,
        )
    else:
        yield note(f"the first dimension is not {case.batch}", f"{said} (read from the graph)", fix, wrong)


@rule("dynamic-dimension", "only the batch is dynamic", on=TENSORRT)
def dynamic_dimension(case: Case) -> Iterator[Finding]:
    loose = {
        name: [str(dim or "?") for dim in value.shape[1:] if not isinstance(dim, int)]
        for name, value in case.graph.inputs.items()
        if value.shape is not None
    }
    loose = {name: dims for name, dims in loose.items() if dims}
    if loose:
        said = ", ".join(f"{name} ({', '.join(dims)})" for name, dims in list(loose.items())[:3])
        yield note(
            "dimensions besides the batch are dynamic",
            f"{said}; an engine needs a smallest, a usual and a largest size of each ({_PROFILES})",
            "fix them in the export, or trtexec --minShapes --optShapes --maxShapes",
            loose,
        )


@rule("unknown-rank", "inputs have a known number of dimensions", on=TENSORRT)
def unknown_rank(case: Case) -> Iterator[Finding]:
    names = [name for name, value in case.graph.inputs.items() if value.shape is None]
    if names:
        yield refused(
            "an input has no shape",
            f"{named(names)}; an optimisation profile needs the number of dimensions ({_PROFILES})",
            "give the input a shape: onnx.tools.update_model_dims, or export it again",
            names,
        )


@rule("rank", "no value has more than 8 dimensions", on=TENSORRT)
def rank(case: Case) -> Iterator[Finding]:
    deep = [name for name, value in case.graph.values.items() if value.shape and len(value.shape) > _MAX_RANK]
    if deep:
        yield refused(
            f"values of more than {_MAX_RANK} dimensions",
            f"{named(deep)}; TensorRT's Dims holds {_MAX_RANK} (NvInferRuntimeBase.h, Dims::MAX_DIMS)",
            "merge dimensions with a Reshape",
            deep,
        )


@rule("data-dependent-shape", "no size depends on what the network computes", on=TENSORRT)
def data_dependent_shape(case: Case) -> Iterator[Finding]:
    graph, cast, open_sizes = case.graph, Groups(), []
    for node in graph.of(*_SHAPE_INPUTS, *_DATA_DEPENDENT):
        if node.function:
            continue
        if node.op in _DATA_DEPENDENT:
            open_sizes.append(node.name)
            continue
        places = [node.inputs[place] for place in _SHAPE_INPUTS[node.op] if place < len(node.inputs)]
        origins = {graph.origin(name) for name in places if name}
        if "float" in origins and graph.rank(node.outputs[0]) != 0 and not _real_range(graph, node):
            cast.add(node.op, node.name)
        elif "data" in origins:
            open_sizes.append(node.name)
    for operator, nodes in cast:
        yield refused(
            f"the shape of a {operator} is cast from computed real numbers",
            f"{named(nodes)}; TensorRT computes shapes from integers and shapes (TensorRT developer guide, execution "
            "tensors and shape tensors; TensorRT-RTX 1.7.1 refuses it)",
            "compute the size outside of the graph and give it as an INT64 input, or fix it",
            nodes,
        )
    if open_sizes:
        allocator = "an IOutputAllocator, since 8.5" if case.tensorrt >= (8, 5) else "nothing in this version"
        yield note(
            "sizes depend on the data",
            f"{named(open_sizes)}; what they need: {allocator} (TensorRT developer guide, data-dependent shapes)",
            "TopK with a constant K instead of a mask keeps the size fixed",
            open_sizes,
        )


@rule("shape-input", "no input is a shape", on=TENSORRT)
def shape_input(case: Case) -> Iterator[Finding]:
    graph = case.graph
    nodes = [
        node.name
        for node in graph.of(*_SHAPE_INPUTS)
        if not node.function
        and any(
            place < len(node.inputs) and node.inputs[place] and graph.origin(node.inputs[place]) == "input"
            for place in _SHAPE_INPUTS[node.op]
        )
    ]
    if nodes:
        yield note(
            "an input decides shapes",
            f"{named(nodes)}; an engine needs the range of its values in its profile ({_PROFILES}: shape tensor I/O)",
            "make it a constant, or trtexec --minShapes --optShapes --maxShapes with its values",
            nodes,
        )


@rule("if-rank", "both branches of an If have the same rank", on=TENSORRT)
def if_rank(case: Case) -> Iterator[Finding]:
    nodes = []
    for node in case.graph.of("If"):
        branches = [node.attribute("then_branch"), node.attribute("else_branch")]
        if None in branches or node.function or case.graph.is_constant(node.inputs[0]):
            continue
        for left, right in zip(branches[0].output, branches[1].output, strict=False):
            ranks = {case.graph.rank(left.name), case.graph.rank(right.name)} - {None}
            if len(ranks) > 1 and left.name != right.name:
                nodes.append(node.name)
                break
    if nodes:
        yield refused(
            "the branches of an If differ in rank",
            f"{named(nodes)}; both must have the same rank (onnx-tensorrt, docs/operators.md of TensorRT 10.15: If)",
            "reshape both branches to one rank, or decide outside of the graph",
            nodes,
        )


@rule("loop-carried-shape", "what a Loop carries keeps its shape", on=TENSORRT)
def loop_carried_shape(case: Case) -> Iterator[Finding]:
    nodes = []
    for node in case.graph.of("Loop"):
        body = node.attribute("body")
        if body is None:
            continue
        made = {name: inner for inner in body.node for name in inner.output}
        carried = [entry.name for entry in body.input[2:]]
        for given, result in zip(carried, (entry.name for entry in body.output[1:]), strict=False):
            inner = made.get(result)
            grows = inner is not None and inner.op_type == "Concat" and given in inner.input and len(inner.input) > 1
            before, after = case.graph.value(given).shape, case.graph.value(result).shape
            fixed = before and after and all(isinstance(dim, int) for dim in (*before, *after))
            if grows or (fixed and before != after):
                nodes.append(node.name)
                break
    if nodes:
        yield refused(
            "a Loop changes the shape of what it carries",
            f"{named(nodes)}; it must be the same in all iterations (onnx-tensorrt, docs/operators.md of TensorRT "
            "10.15: Loop)",
            "write into a tensor of the final size with ScatterElements, or unroll the loop",
            nodes,
        )


@rule("loop-scan-length", "the length of a Loop's collected outputs is fixed", on=TENSORRT)
def loop_scan_length(case: Case) -> Iterator[Finding]:
    nodes = []
    for node in case.graph.of("Loop"):
        body = node.attribute("body")
        collects = body is not None and len(body.output) > len(node.inputs) - 1
        trip = node.inputs[0] if node.inputs else ""
        if collects and not node.function and (not trip or case.graph.origin(trip) in ("data", "float")):
            nodes.append(node.name)
    if nodes:
        yield refused(
            "a Loop collects a number of outputs that is not known",
            f"{named(nodes)}; the length of scan outputs cannot be dynamic (onnx-tensorrt, docs/operators.md of "
            "TensorRT 10.15: Loop)",
            "a constant trip count",
            nodes,
        )


def _real_range(graph: Graph, node: Node) -> bool:
    """A Range over real numbers: its operands are real by themselves and not sizes that were cast."""
    return node.op == "Range" and graph.value(node.outputs[0]).dtype not in (6, 7)
