"""What the file holds: validity, external data, weights."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx

from export.preflight.finding import Case, Finding, named, note, refused, rule
from export.preflight.graph import FP16_MIN, external, printable, without_weights
from profiles.opening import Misplaced, misplaced, tensor_bytes

_PROTOBUF_BYTES = 2**31 - 1
_PROTOBUF_SOURCE = "Protocol Buffers: a serialised message ends at 2 GiB"
_EXTERNAL_SOURCE = "ONNX, docs/ExternalData.md"
_FP16_MAX = 65504.0
_FP16_SOURCE = "IEEE 754 binary16"
_UNDERFLOW_SHARE = 0.01


@rule("invalid-graph", "onnx.checker takes the graph")
def invalid_graph(case: Case) -> Iterator[Finding]:
    model = without_weights(case.graph.model)
    for entry in (*model.graph.input, *model.graph.output):
        # a value of unknown rank is valid to all runtimes, and to the checker only inside of the graph
        if entry.type.HasField("tensor_type") and not entry.type.tensor_type.HasField("shape"):
            entry.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
        for _, tensor in case.graph.weights:
            if not external(tensor):
                onnx.checker.check_tensor(tensor)
    except (onnx.checker.ValidationError, ValueError) as error:
        said = re.sub(r"\s+", " ", str(error).partition("==> Context")[0]).strip()
        yield refused(
            "the graph is not valid ONNX",
            f"{printable(said)} (onnx.checker of onnx {onnx.__version__})",
            "export it again; a graph edited by hand needs onnx.checker.check_model before it is saved",
        )


@rule("external-data-outside", "external data lies in the file's own folder")
def external_data_outside(case: Case) -> Iterator[Finding]:
    outside = [found for found in _misplaced(case) if found.kind == "outside"]
    if outside:
        nodes = [name for found in outside for name in found.names]
        places = named(f'"{found.place}"' for found in outside for _ in found.names)
        yield refused(
            "external data points out of the model's folder",
            f"{places}; a location must be relative, without .., and no link may lead elsewhere ({_EXTERNAL_SOURCE})",
            'onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data")',
            nodes,
        )


@rule("external-data-missing", "external data is there and long enough")
def external_data_missing(case: Case) -> Iterator[Finding]:
    if case.graph.path is None:
        return
    for found in _misplaced(case):
        if found.kind == "missing":
            yield refused(
                f'the external data "{found.place}" is missing',
                f"{len(found.names)} tensors lie in it ({_EXTERNAL_SOURCE})",
                f"copy {found.place} beside {case.graph.path.name}",
                found.names,
            )
        elif found.kind == "short":
            yield refused(
                f'the external data "{found.place}" is too short',
                f"{len(found.names)} tensors reach beyond its end ({_EXTERNAL_SOURCE})",
                f"copy {found.place} again, together with {case.graph.path.name}",
                found.names,
            )


@rule("weights-inline", "weights above 2 GiB lie in external data")
def weights_inline(case: Case) -> Iterator[Finding]:
    inline = sum(tensor_bytes(tensor) for _, tensor in case.graph.weights if not external(tensor))
    if inline > _PROTOBUF_BYTES:
        yield refused(
            "the weights do not fit one ONNX file",
            f"{inline / 2**30:.1f} GiB inside the file ({_PROTOBUF_SOURCE})",
            "onnx.save_model(model, path, save_as_external_data=True)",
        )


@rule("weights-not-finite", "no weight is NaN or infinite")
def weights_not_finite(case: Case) -> Iterator[Finding]:
    facts = case.graph.weight_facts
    broken = [name for name, weight in facts.items() if weight.nan]
    endless = [name for name, weight in facts.items() if weight.infinite and not weight.nan]
    if broken:
        yield refused(
            "weights are NaN",
            f"{named(broken)}; every output that depends on them is NaN (IEEE 754)",
            "train again, or export an earlier checkpoint",
            broken,
        )
    if endless:
        yield note(
            "weights are infinite",
            f"{named(endless)}; masks are written like this, weights that overflowed look the same (IEEE 754)",
            "a mask: -1e4 serves as well and survives FP16; a weight: export in FP32 or BF16",
            endless,
        )


@rule("weights-not-read", "the values of all weights can be looked at")
def weights_not_read(case: Case) -> Iterator[Finding]:
    unread = case.graph.unread
    if unread:
        yield note(
            "weights were not looked at",
            f"{named(unread)}: their bytes are missing, or there are too many (read from the graph); rules about "
            "values say nothing of them",
            "have the external data beside the file",
            unread,
        )


@rule("fp16-overflow", "weights fit the range of FP16")
def fp16_overflow(case: Case) -> Iterator[Finding]:
    if case.device.why_not("fp16") is not None:
        return
    facts = case.graph.weight_facts
    large = {name: weight.highest for name, weight in facts.items() if weight.highest > _FP16_MAX and weight.rank}
    if large:
        worst = max(large.values())
        yield note(
            "weights beyond the range of FP16",
            f"{named(large)}: up to {worst:.3g}; FP16 ends at {_FP16_MAX:.0f} ({_FP16_SOURCE})",
            "keep their nodes in FP32, or use BF16",
            large,
        )


@rule("fp16-underflow", "weights do not vanish in FP16")
def fp16_underflow(case: Case) -> Iterator[Finding]:
    if case.device.why_not("fp16") is not None:
        return
    vanishing = [
        name
        for name, weight in case.graph.weight_facts.items()
        if weight.nonzero > 1 and weight.vanishing > _UNDERFLOW_SHARE * weight.nonzero
    ]
    if vanishing:
        yield note(
            "weights that FP16 rounds to zero",
            f"{named(vanishing)}: more than 1 % of their values are below {FP16_MIN / 2:.1g} ({_FP16_SOURCE})",
            "scale them, keep their nodes in FP32, or use BF16",
            vanishing,
        )


@rule("duplicate-output", "every output is listed once, and every input is used")
def duplicate_output(case: Case) -> Iterator[Finding]:
    names = [entry.name for entry in case.graph.model.graph.output]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield note(
            "an output is listed twice",
            f"{named(twice)}; runtimes bind outputs by name (ONNX, docs/IR.md: names are unique)",
            "remove one, or give it its own Identity node",
            twice,
        )


@rule("unused-input", "every input is used")
def unused_input(case: Case) -> Iterator[Finding]:
    outputs = {entry.name for entry in case.graph.model.graph.output}
    unused = [name for name in case.graph.inputs if name not in case.graph.consumers and name not in outputs]
    if unused:
        yield note(
            "an input is not used",
            f"{named(unused)}; no node reads it, and some runtimes drop it (read from the graph)",
            "remove it from the exported arguments",
            unused,
        )


def _misplaced(case: Case) -> list[Misplaced]:
    return misplaced(case.graph.model, case.graph.folder)
