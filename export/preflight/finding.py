"""What a rule found, and the registry of the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from export.preflight.graph import Graph, printable
from profiles.device import Device, Stack
from profiles.section import Section

Level = Literal["refused", "note"]
Runtime = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]

TENSORRT: tuple[Runtime, ...] = ("tensorrt", "tensorrt-rtx")
EVERYWHERE: tuple[Runtime, ...] = ("onnxruntime", *TENSORRT)
_NAMED_NODES = 3


class Finding(Section):
    """One thing that a device or stack says about a graph."""

    level: Level
    message: str
    fact: str
    """What it was refused or noted by, with its source."""
    rule: str = ""
    """Id of the rule; see `edgestill check --rules`."""
    fix: str | None = None
    """What would be right."""
    nodes: tuple[str, ...] = ()
    """Every node that it is about."""


@dataclass(frozen=True)
class Case:
    """What a rule looks at."""

    graph: Graph
    device: Device
    stack: Stack
    batch: int = 1

    @property
    def runtime(self) -> str:
        """The stack's runtime and version, as a sentence names it."""
        title = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
        return f"{title[self.stack.runtime]} {self.stack.runtime_version}"

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor version of the stack's runtime."""
        return version_of(self.stack)

    @property
    def tensorrt(self) -> tuple[int, int]:
        """The version whose TensorRT parser the stack has: TensorRT-RTX 1.x is of the 11 family."""
        return (11, 0) if self.rtx else self.version

    @property
    def rtx(self) -> bool:
        """The runtime is TensorRT-RTX."""
        return self.stack.runtime == "tensorrt-rtx"


Check = Callable[[Case], Iterable[Finding]]


@dataclass(frozen=True)
class Rule:
    """One thing that is checked. `title` is what a graph that passes does."""

    id: str
    title: str
    runtimes: tuple[Runtime, ...]
    check: Check

    def findings(self, case: Case) -> Iterator[Finding]:
        """What the rule says about a case; nothing for another runtime."""
        if case.stack.runtime in self.runtimes:
            for found in self.check(case):
                yield found.model_copy(update={"rule": self.id})


RULES: dict[str, Rule] = {}
"""Every rule by its id, in the order in which they are checked."""


def rule(identifier: str, title: str, *, on: tuple[Runtime, ...] = EVERYWHERE) -> Callable[[Check], Check]:
    """Registers a check under an id."""

    def register(check: Check) -> Check:
        if identifier in RULES:
            raise ValueError(f'two rules are called "{identifier}"')
        RULES[identifier] = Rule(identifier, title, on, check)
        return check

    return register


def refused(message: str, fact: str, fix: str | None = None, nodes: Iterable[str] = ()) -> Finding:
    """The stack or the device does not take the graph."""
    return Finding(level="refused", message=message, fact=fact, fix=fix, nodes=tuple(nodes))


def note(message: str, fact: str, fix: str | None = None, nodes: Iterable[str] = ()) -> Finding:
    """Worth knowing; the graph is taken."""
    return Finding(level="note", message=message, fact=fact, fix=fix, nodes=tuple(nodes))


def named(nodes: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    known = list(dict.fromkeys(printable(node) for node in nodes))
    more = f" and {len(known) - _NAMED_NODES} more" if len(known) > _NAMED_NODES else ""
    return ", ".join(known[:_NAMED_NODES]) + more


@dataclass
class Groups:
    """Nodes collected by what is wrong with them, so that a thousand of them make one finding."""

    nodes: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, node: str) -> None:
        """One node."""
        self.nodes.setdefault(what, []).append(node)

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        return iter(self.nodes.items())


def version_of(stack: Stack) -> tuple[int, int]:
    """Major and minor version of the stack's runtime."""
    numbers = [int(part) for part in stack.runtime_version.split(".")[:2] if part.isdigit()]
    return (numbers[0] if numbers else 0, numbers[1] if len(numbers) > 1 else 0)
