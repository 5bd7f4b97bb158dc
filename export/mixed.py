"""Mixed precision in the graph itself: some nodes of an INT8 graph left in float, so that it holds on every runtime.

No flag of a builder is needed: a node computes in float because nothing that it reads is quantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import onnx

from export.onnx import sort_nodes
from export.precision import COMPUTE, Quantizer

_Item = TypeVar("_Item", bound=Hashable)


@dataclass(frozen=True)
class Unit:
    """What is quantised or left in float as one: a computing node (or Add, Concat), and what only passes its values on.

    multiply_adds: of one sample; 0 where the node has no weights, or its shape is not known.
    """

    name: str
    """What the model calls it."""
    operator: str
    nodes: frozenset[str]
    multiply_adds: int

    def __str__(self) -> str:
        return f"{self.operator} {self.name}"


def units_of(quantizer: Quantizer) -> tuple[Unit, ...]:
    """The quantised nodes in graph order, each with those behind it that compute nothing (Relu, MaxPool, Reshape)."""
    graph = quantizer.prepared.graph
    chosen = set(quantizer.nodes)
    constants = {tensor.name for tensor in graph.initializer}
    heads: dict[str, str] = {}  # value -> the unit that it comes from
    members: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.name not in chosen:
            continue
        above = next((heads[name] for name in node.input if name in heads), None)
        own = node.op_type in COMPUTE or sum(name in heads for name in node.input) > 1 or above is None
        head = node.name if own or above is None else above
        members.setdefault(head, []).append(node)
        for name in node.output:
            heads[name] = head
    found = []
    for head, nodes in members.items():
        first = nodes[0]
        found.append(
            Unit(
                name=_title(first, constants),
                operator=first.op_type,
                nodes=frozenset(node.name for node in nodes),
                multiply_adds=_multiply_adds(first, graph),
            )
        )
        assert first.name == head
    return tuple(found)


def _title(node: onnx.NodeProto, constants: set[str]) -> str:
    """What the model calls it: the name of its weights, else of its output."""
    if node.op_type in COMPUTE and node.input[1] in constants:
        return str(node.input[1]).removesuffix(".weight")
    return str(node.output[0])


def _multiply_adds(node: onnx.NodeProto, graph: onnx.GraphProto) -> int:
    weight = next(
        (tensor for tensor in graph.initializer if len(node.input) > 1 and tensor.name == node.input[1]), None
    )
    if node.op_type not in COMPUTE or weight is None:
        return 0
    place = node.input[0] if node.op_type == "ConvTranspose" else node.output[0]
    entry = next((entry for entry in (*graph.value_info, *graph.output) if entry.name == place), None)
    dims = [] if entry is None else [int(dim.dim_value) for dim in entry.type.tensor_type.shape.dim]
    # a convolution's weights are used at every position of the map, a matrix product's at every row of a sample
    positions = dims[2:] if node.op_type in ("Conv", "ConvTranspose") else dims[1:-1]
    return int(math.prod(weight.dims) * math.prod(positions))


def share_in_int8(units: Sequence[Unit], floating: Sequence[Unit]) -> float:
    """Share of the multiply-adds that stays in INT8 when `floating` are left in float, 0 to 1."""
    total = sum(unit.multiply_adds for unit in units)
    left = sum(unit.multiply_adds for unit in floating)
    return 1 - (left / total if total else len(floating) / max(1, len(units)))


def affordable(units: Sequence[Unit], order: Sequence[Unit], least: float) -> list[Unit]:
    """Those of `order` that may be left in float together: each, in turn, unless INT8's share would fall below `least`.

    A large one that does not fit is passed over; smaller ones behind it may.
    """
    taken: list[Unit] = []
    for unit in order:
        if share_in_int8(units, [*taken, unit]) >= least:
            taken.append(unit)
    return taken


def pools(units: Sequence[Unit], order: Sequence[Unit], least: float) -> list[list[Unit]]:
    """Sets that may be left in float together, the most promising first.

    `affordable` as ordered; then with each unit that did not fit in front, in place of what then does not fit.
    """
    first = affordable(units, order, least)
    others = [affordable(units, [unit, *(entry for entry in order if entry is not unit)], least)
              for unit in order if unit not in first]  # fmt: skip
    found = [first]
    found += [pool for pool in others if set(pool) not in [set(entry) for entry in found]]
    return [pool for pool in found if pool]


def leave_float(quantized: onnx.ModelProto, quantizer: Quantizer, floating: frozenset[str]) -> onnx.ModelProto:
    """The INT8 graph with the nodes of these names in float.

    A value keeps its rounding while a quantised node reads it or (in the dialects whose nodes write integers) writes
    it. ONNX Runtime's integer kernels need the only reader of their output to be its rounding, so there a node in float
    reads the rounded value as well; elsewhere it reads the value itself.

    Args:
        quantized: as `quantizer.quantized` gave it.
        floating: nodes of `quantizer.prepared`.
    """
    model = onnx.ModelProto()
    model.CopyFrom(quantized)
    graph = model.graph
    outputs = quantizer.form.outputs
    originals = {node.name: node for node in quantizer.prepared.graph.node}
    weights = {tensor.name: tensor for tensor in quantizer.prepared.graph.initializer}
    integer = set(quantizer.nodes) - floating
    present = {node.name for node in graph.node}
    roundings = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    pairs = {
        node.output[0]: (roundings[node.input[0]], node)
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in roundings
    }
    constant = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] not in roundings
    }
    # an activation that the rounding itself computes (Relu: its range starts at 0) is gone; it comes from the node
    # whose output got its name
    vanished = {node.output[0]: node for name, node in originals.items() if name not in present and name in floating}
    producers = {name: node for node in graph.node for name in node.output}
    dropped: list[onnx.NodeProto] = []
    removed: set[str] = set()
    renamed: dict[str, str] = {}
    for value, (rounding, widening) in pairs.items():
        raw = rounding.input[0]
        readers = [node for node in graph.node if value in node.input]
        wanted = any(node.name in integer for node in readers)
        if outputs and not wanted:
            writer = producers.get(raw)
            # the original writer of that value, which may be one that vanished
            wanted = (writer is not None and writer.name in integer) or _written_by(raw, originals, integer)
        if not wanted:
            dropped += [rounding, widening]
            if any(entry.name == value for entry in graph.output):
                renamed[raw] = value
            else:
                renamed[value] = raw
            continue
        if not outputs:
            for node in readers:
                if node.name in floating:
                    _replace(node, value, raw)
    removed.update(node.name for node in dropped)
    for node in graph.node:
        if node.name in removed:
            continue
        if node.name in floating:
            original = originals[node.name]
            for place, name in enumerate(node.input):
                if name not in constant:
                    continue
                node.input[place] = original.input[place]
                if node.input[place] == name:  # a dequantised bias is called as the float one was
                    node.input[place] = f"{name}_float"
                    weights[f"{name}_float"] = _renamed(weights[name], f"{name}_float")
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
        for place, name in enumerate(node.output):
            node.output[place] = renamed.get(name, name)
    nodes = [node for node in graph.node if node.name not in removed]
    still = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    for value, node in vanished.items():
        if value in still:
            continue  # its rounding is there and cuts what it would cut
        restored = onnx.NodeProto()
        restored.CopyFrom(node)
        before = restored.input[0]
        for other in nodes:
            for place, name in enumerate(other.output):
                if name == value:
                    other.output[place] = before
        nodes.append(restored)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    _tidy(graph, weights)
    sort_nodes(graph)
    return model


def _written_by(value: str, originals: dict[str, onnx.NodeProto], integer: set[str]) -> bool:
    return any(value in node.output and name in integer for name, node in originals.items())


def _renamed(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copied = onnx.TensorProto()
    copied.CopyFrom(tensor)
    copied.name = name
    return copied


def _replace(node: onnx.NodeProto, old: str, new: str) -> None:
    for place, name in enumerate(node.input):
        if name == old:
            node.input[place] = new


def _tidy(graph: onnx.GraphProto, weights: dict[str, onnx.TensorProto]) -> None:
    """Drops dequantised constants and initializers that nothing reads, and brings back float ones that are read."""
    outputs = {entry.name for entry in graph.output}
    while True:
        read = {name for node in graph.node for name in node.input} | outputs
        kept = [node for node in graph.node if any(name in read for name in node.output)]
        if len(kept) == len(graph.node):
            break
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)
    known = {tensor.name for tensor in graph.initializer}
    written = {name for node in graph.node for name in node.output}
    graph.initializer.extend(weights[name] for name in sorted(read - known - written) if name in weights)
    tensors = [onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def rescue(candidates: Sequence[_Item], keeps: Callable[[frozenset[_Item]], bool], limit: int = 64) -> frozenset[_Item]:
    """A minimal set of candidates for which `keeps` holds: without any one of them it does not.

    The smallest prefix of the candidates that holds is found by bisection; its last one is needed, so it is taken, and
    the search goes on among those before it. A set of k costs about k log2(n) questions.

    Args:
        candidates: the most likely ones first.
        keeps: monotone (a larger set holds where a smaller one does), and true of all candidates. Where it is not
            monotone, the result holds all the same and may not be minimal.
        limit: questions; after them the smallest set that is known to hold is returned.

    >>> sorted(rescue("abcdef", lambda chosen: chosen >= {"b", "e"}))
    ['b', 'e']
    """
    asked: dict[frozenset[_Item], bool] = {}

    def holds(chosen: frozenset[_Item]) -> bool:
        if chosen not in asked:
            asked[chosen] = keeps(chosen)
        return asked[chosen]

    taken: frozenset[_Item] = frozenset()
    pool = list(candidates)
    while not (len(asked) < limit and holds(taken)):
        if not pool:
            break
        low, high = 0, len(pool)  # prefix `high` holds, prefix `low` does not
        while high - low > 1 and len(asked) < limit:
            middle = (low + high) // 2
            if holds(taken | frozenset(pool[:middle])):
                high = middle
            else:
                low = middle
        if high - low > 1:
            return taken | frozenset(pool[:high])
        taken, pool = taken | {pool[high - 1]}, pool[: high - 1]
    return taken
