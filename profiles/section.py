"""The base of every recipe section and of every stored document."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A recipe section or stored document: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Unfit(ValueError):
    """What a validator refuses, with the value or command that would be right.

    Args:
        message: what is wrong, one sentence.
        fix: as that of `profiles.errors.EdgestillError`.
    """

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Refuses numbers that a stored recipe and a hash of it cannot hold: JSON has neither infinity nor NaN."""
    for place, value in _numbers("", values):
        if not math.isfinite(value):
            raise ValueError(
                f"{place} = {value}: arguments are stored, and infinity and NaN cannot be; let the factory make the "
                f'number of a word, such as float("{value}")'
            )
    return values


def _numbers(place: str, value: Any) -> list[tuple[str, float]]:
    """Every float in nested tables and lists, with its place."""
    if isinstance(value, dict):
        return [found for key, entry in value.items() for found in _numbers(f"{place}.{key}" if place else key, entry)]
    if isinstance(value, list):
        return [found for index, entry in enumerate(value) for found in _numbers(f"{place}[{index}]", entry)]
    return [(place, value)] if isinstance(value, float) else []


Arguments = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Keyword arguments of a user's factory, as TOML gives them."""
