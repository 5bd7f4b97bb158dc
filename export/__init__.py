"""From a trained student to a bundle that a device can use. The heavy parts load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.availability import available, refusal_of
    from export.bundle import write_bundle
    from export.candidate import Candidate, Engine, Plan, Rung
    from export.own import export_model, parse_example
    from export.planning import plan

_HOMES = {
    "Candidate": "candidate",
    "Engine": "candidate",
    "Plan": "candidate",
    "Rung": "candidate",
    "available": "availability",
    "export_model": "own",
    "parse_example": "own",
    "plan": "planning",
    "refusal_of": "availability",
    "write_bundle": "bundle",
}

__all__ = [
    "Candidate",
    "Engine",
    "Plan",
    "Rung",
    "available",
    "export_model",
    "parse_example",
    "plan",
    "refusal_of",
    "write_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"export.{_HOMES[name]}"), name)
