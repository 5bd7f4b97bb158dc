"""A file against a device: the rules, and the answers of the tools that are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from export.preflight.evidence import Evidence, ask_tools
from export.preflight.finding import RULES, Case, Finding
from export.preflight.graph import Graph, activation_bytes, peak_activation_bytes
from export.preflight.precisions import graph_precisions
from profiles.device import Device, Precision, Stack
from profiles.opening import read_graph, tensor_bytes
from profiles.section import Section

_OWN_FOLDER = ("external-data-outside", "external-data-missing")


class Memory(Section):
    """Bytes; the activations at the batch that was asked for."""

    weights: int
    activations_at_least: int
    """Inputs and the largest output that no runtime fuses away."""
    activations_unfused: int
    """The most that is alive at once when nothing is fused."""
    device: int | None


class Examination(Section):
    """Everything that was found out."""

    schema_version: Literal[1] = 1
    file: str
    device: str
    stack: str
    runtime: str
    batch: int
    opset: int
    ir_version: int
    nodes: int
    precisions: tuple[Precision, ...]
    memory: Memory
    rules: int
    """How many were checked for this runtime."""
    findings: tuple[Finding, ...]
    evidence: tuple[Evidence, ...]

    @property
    def refused(self) -> bool:
        """Something does not take the file."""
        return any(found.level == "refused" for found in self.findings)


def examine(path: Path, device: Device, stack: Stack, *, batch: int = 1) -> Examination:
    """Checks a file against a device and its stack.

    Raises:
        InputError: no such file, or not an ONNX model.
        EdgestillError: the file cannot be read.
    """
    model = read_graph(path)
    graph = Graph(model, path)
    case = Case(graph, device, stack, batch)
    findings = [found for checked in RULES.values() for found in checked.findings(case)]
    apart = [found for found in findings if found.rule in _OWN_FOLDER]
    if apart:
        evidence: tuple[Evidence, ...] = (
            Evidence(tool="the installed tools", verdict="not asked", detail="the external data does not fit"),
        )
    else:
        evidence = ask_tools(path, device, stack)
    explained = any(found.level == "refused" for found in findings)
    for answer in evidence:
        if answer.verdict == "refuses it" and answer.decides and not explained:
            fact = f"{answer.tool}: {answer.detail}"
            findings.append(
                Finding(
                    level="refused",
                    message=f"{case.runtime} refuses the file",
                    fact=fact,
                    fix="export it again for this stack, or name another version with --stack",
                    rule="tool",
                )
            )
    memory = Memory(
        weights=sum(tensor_bytes(tensor) for _, tensor in graph.weights),
        activations_at_least=activation_bytes(model, batch),
        activations_unfused=peak_activation_bytes(model, batch),
        device=None if device.memory_gib is None else int(device.memory_gib * 2**30),
    )
    return Examination(
        file=str(path),
        device=device.name,
        stack=stack.name,
        runtime=case.runtime,
        batch=batch,
        opset=graph.opset,
        ir_version=int(model.ir_version),
        nodes=len(graph.nodes),
        precisions=graph_precisions(model),
        memory=memory,
        rules=sum(stack.runtime in checked.runtimes for checked in RULES.values()),
        findings=tuple(sorted(findings, key=lambda found: found.level != "refused")),
        evidence=evidence,
    )
