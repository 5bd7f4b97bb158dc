"""The `[study]` table of a recipe: which settings are compared. Light: pydantic only."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from profiles.section import Section


def _flat(value: Any) -> Any:
    """`{data: {train_size: [500]}}`, which TOML makes of an unquoted dotted key, as `{"data.train_size": [500]}`."""
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, dict):
            found |= {f"{key}.{inner}": values for inner, values in _flat(entry).items()}
        else:
            found[key] = entry
    return found


class VariantSection(Section):
    """One method of a study that needs more than an objective: `set` holds KEY=VALUE, as `--set` takes them."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    set: tuple[str, ...] = ()


class StudySection(Section):
    """What `edgestill study` compares.

    `vary`: dotted recipe keys with the values that they take. "objective", "teacher.strategy", "explore.kind" and the
    variants are the methods, every other key is a factor; all combinations are trained with every seed. `control`: the
    method that the others are compared with, by its name in the table; None: "supervised" if it is among them, else the
    first.
    `tune`: trials of the tuning of every combination on the validation split, before its cells; None: none.
    """

    seeds: int = Field(5, ge=1, le=1000)
    control: str | None = None
    tune: int | None = Field(None, ge=1)
    vary: Annotated[dict[str, tuple[Any, ...]], BeforeValidator(_flat)] = Field(default_factory=dict)
    variant: tuple[VariantSection, ...] = ()

    @field_validator("vary")
    @classmethod
    def _values_given(cls, vary: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in vary.items():
            if not values:
                raise ValueError(f'"{key}" has no values to vary')
        return vary
