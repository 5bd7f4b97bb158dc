"""What a device or its stack cannot do, said before anything is built, each with the fact that it was refused by."""

from __future__ import annotations

from pathlib import Path

import onnx

from export.preflight import rules as _rules  # noqa: F401  registers the rules
from export.preflight.finding import RULES, Case, Finding, Rule, version_of
from export.preflight.graph import Graph, activation_bytes, peak_activation_bytes
from export.preflight.precisions import graph_precisions
from profiles.device import Device, Stack

__all__ = [
    "RULES",
    "Finding",
    "Rule",
    "activation_bytes",
    "graph_precisions",
    "peak_activation_bytes",
    "preflight",
    "refusal",
    "version_of",
]


def preflight(graph: Path | onnx.ModelProto, device: Device, stack: Stack, *, batch: int = 1) -> tuple[Finding, ...]:
    """Everything that the device or the stack refuses in the graph, and what is worth knowing; empty: nothing found.

    Args:
        batch: of the target; the activations grow with it.
    """
    read = Graph(onnx.load(str(graph), load_external_data=False), graph) if isinstance(graph, Path) else Graph(graph)
    case = Case(read, device, stack, batch)
    found = [entry for checked in RULES.values() for entry in checked.findings(case)]
    return tuple(sorted(found, key=lambda entry: entry.level != "refused"))


def refusal(findings: tuple[Finding, ...]) -> str | None:
    """The reasons of all refusals in one line, or None."""
    return "; ".join(f"{found.message}: {found.fact}" for found in findings if found.level == "refused") or None
