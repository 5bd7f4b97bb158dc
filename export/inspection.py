"""What a built engine really does: its layers, their precisions, reformats and times, as TensorRT itself tells them.

Light: pydantic only. Two JSON formats are read: the engine inspector's (`EngineInspector.get_engine_information(JSON)`,
or `trtexec --exportLayerInfo`, of an engine built with detailed profiling verbosity) and `trtexec --exportProfile`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from profiles.errors import InputError
from profiles.section import Section

_TYPES = {
    "float": "fp32",
    "fp32": "fp32",
    "half": "fp16",
    "fp16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp8": "fp8",
    "int8": "int8",
    "uint8": "uint8",
    "int4": "int4",
    "fp4": "fp4",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
_TYPE = re.compile(rf"\b({'|'.join(_TYPES)})\b", re.IGNORECASE)
_TYPE_KEYS = ("Format/Datatype", "Datatype", "Format")
"""TensorRT 8.2 to 11 write the first, in words ("Row major linear FP16 format") or as a plain type ("Half")."""
_IDLE = ("noop", "constant", "signal", "wait", "shapehosttodevice", "devicetoshapehost")
"""Kinds of layers that compute nothing."""
_COMPUTING = ("fp32", "fp16", "bf16", "fp8", "int8", "int4", "fp4")
_HOW = "build with detailed profiling verbosity (trtexec --profilingVerbosity=detailed --exportLayerInfo=FILE)"


class EngineLayer(Section):
    """One layer of an engine, after fusion."""

    name: str
    kind: str = ""
    """Such as "CaskConvolution", "gemm", "kgen", "Reformat"; empty: not told."""
    precision: str | None = None
    """Type of its weights, else of its first input: fp32, fp16, bf16, int8, ...; None: not told."""
    reformat: bool = False
    """Only changes layout or type."""
    tactic: str = ""
    milliseconds: float | None = None
    """Per run; None: not measured."""

    @property
    def computes(self) -> bool:
        """It does arithmetic in a known precision."""
        return not self.reformat and self.kind.lower() not in _IDLE and self.precision in _COMPUTING


class Inspection(Section):
    """The layers of an engine, in the order in which they run."""

    source: str
    """Who told, such as "TensorRT 10.3.0"."""
    layers: tuple[EngineLayer, ...]

    @property
    def precisions(self) -> dict[str, int]:
        """Computing layers by precision, most first."""
        return dict(Counter(str(layer.precision) for layer in self.layers if layer.computes).most_common())

    @property
    def reformats(self) -> tuple[EngineLayer, ...]:
        """Layers that only change layout or type."""
        return tuple(layer for layer in self.layers if layer.reformat)

    @property
    def milliseconds(self) -> float | None:
        """Sum over the layers; None: not measured."""
        times = [layer.milliseconds for layer in self.layers if layer.milliseconds is not None]
        return sum(times) if times else None

    def __str__(self) -> str:
        """Such as "int8 in 9 of 12 layers, fp16 in 3; 4 reformats take 12% of the time (TensorRT 10.3.0)"."""
        found = self.precisions
        if not found:
            return f"{len(self.layers)} layers, precisions not told ({self.source})"
        total = sum(found.values())
        first, *others = found.items()
        said = f"{first[0]} in {first[1]} of {total} layers" + "".join(f", {name} in {count}" for name, count in others)
        if self.reformats:
            said += f"; {len(self.reformats)} reformats"
            whole = self.milliseconds
            if whole:
                share = sum(layer.milliseconds or 0.0 for layer in self.reformats) / whole
                said += f" take {share:.0%} of the time"
        return f"{said} ({self.source})"


def parse_inspection(text: str, source: str) -> Inspection:
    """Reads the engine inspector's JSON.

    Raises:
        InputError: it is something else.
    """
    document = _document(text, source)
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        raise InputError('no engine inspector\'s JSON: it has no list "Layers"', where=source, fix=_HOW)
    return Inspection(source=source, layers=tuple(_layer(entry, source) for entry in layers))


def parse_times(text: str, source: str) -> dict[str, float]:
    """Reads `trtexec --exportProfile`: milliseconds per run by layer.

    Raises:
        InputError: it is something else.
    """
    document = _document(text, source)
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise InputError("no layer profile: not a list of objects", where=source, fix="trtexec --exportProfile=FILE")
    times: Counter[str] = Counter()
    for entry in document:
        # the first entry holds the count of runs alone
        if isinstance(entry.get("name"), str) and isinstance(entry.get("averageMs"), int | float):
            times[entry["name"]] += entry["averageMs"]
    return dict(times)


def with_times(inspection: Inspection, times: Mapping[str, float]) -> Inspection:
    """The same with milliseconds; a timed layer that the inspector did not list is added, reformats by their name."""
    layers = [
        layer.model_copy(update={"milliseconds": times[layer.name]}) if layer.name in times else layer
        for layer in inspection.layers
    ]
    listed = {layer.name for layer in layers}
    layers += [
        EngineLayer(name=name, reformat=_is_reformat(name, ""), milliseconds=value)
        for name, value in times.items()
        if name not in listed
    ]
    return inspection.model_copy(update={"layers": tuple(layers)})


def _document(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=source, fix=_HOW) from error


def _layer(entry: Any, source: str) -> EngineLayer:
    if isinstance(entry, str):  # an engine that was built with layer names only
        return EngineLayer(name=entry, reformat=_is_reformat(entry, ""))
    if not isinstance(entry, dict) or not isinstance(entry.get("Name"), str):
        raise InputError("no engine inspector's JSON: a layer without a name", where=source, fix=_HOW)
    kind = str(entry.get("LayerType") or "")
    return EngineLayer(
        name=entry["Name"],
        kind=kind,
        precision=_precision(entry),
        reformat=_is_reformat(entry["Name"], kind) or entry.get("ParameterType") == "Reformat",
        tactic=str(entry.get("TacticName") or ""),
    )


def _is_reformat(name: str, kind: str) -> bool:
    return kind == "Reformat" or name.startswith("Reformatting CopyNode")


def _precision(layer: Mapping[str, Any]) -> str | None:
    weights = layer.get("Weights")
    if isinstance(weights, dict) and (found := _type_in(weights.get("Type"))) is not None:
        return found
    for side in ("Inputs", "Outputs"):
        tensors = layer.get(side)
        for tensor in tensors if isinstance(tensors, list) else ():
            for key in _TYPE_KEYS if isinstance(tensor, dict) else ():
                if (found := _type_in(tensor.get(key))) is not None:
                    return found
    return None


def _type_in(text: Any) -> str | None:
    found = _TYPE.search(text) if isinstance(text, str) else None
    return _TYPES[found.group().lower()] if found else None
