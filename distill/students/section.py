"""The `[student]` table of a recipe. Light: pydantic only, so that `--help` and recipe checks stay fast."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from distill.teachers.section import ImageInput
from profiles.section import Arguments, Section

_TORCH_KEYS = frozenset({"factory", "kwargs", "weights", "head"}) | frozenset(ImageInput.model_fields)


class ChoiceSection(Section):
    """How the student of a target is chosen from `[student] pool`.

    A kind in the pool (conv, convi, text or textc) stands for every combination of `widths`, `depths`, and `kernels`
    (conv, convi, textc) or `heads` (text); None: the family's own choices, up to the teacher's size where a teacher of
    the same family is trained.
    """

    widths: tuple[int, ...] | None = Field(None, min_length=1, description="widths in the pool")
    depths: tuple[int, ...] | None = Field(None, min_length=1, description="depths in the pool")
    kernels: tuple[int, ...] | None = Field(None, min_length=1, description="kernel sizes in the pool")
    heads: tuple[int, ...] | None = Field(None, min_length=1, description="attention heads in the pool (transformers)")
    rank: Literal["auto", "supernet", "trials", "capacity"] = Field(
        "auto",
        description="what orders the candidates before any is trained in full; supernet: accuracy with the weights "
        "that the pool shares (teacher.strategy generic); trials: short trainings; capacity: multiply-adds; auto: "
        "supernet where there is one, else trials",
    )
    finalists: int = Field(3, ge=1, le=32, description="students that are trained in full for a target at most, k")
    trials: int = Field(8, ge=1, le=256, description="students in the first round of trials, over all targets at most")
    trial_share: float = Field(
        0.05, gt=0, le=0.5, description="share of train.epochs in the first round; three times as many in the next one"
    )
    margin: float = Field(
        1.0, ge=1, le=3, description="a predicted latency may be up to so many times the limit; measuring decides"
    )
    assumed_efficiency: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the roofline that a device without calibration is taken to reach; default: what the "
        "calibrated devices reach",
    )

    @model_validator(mode="after")
    def _enough_trials(self) -> Self:
        if self.rank in ("auto", "trials") and self.trials < self.finalists:
            raise ValueError(
                f"{self.trials} trials cannot tell {self.finalists} finalists from the others: trials of at least "
                f"{self.finalists}, or finalists = {self.trials}"
            )
        return self


class StudentSection(ImageInput):
    """What is trained and shipped. Paths are relative to the recipe's folder.

    kind "family": a network of an elastic `family` (None: conv for images, text for texts); `arch` (one word, such as
      conv-w24-d2-k3) is the architecture of every target that names none of its own, None: the family's default for the
      target's size class. `pool` instead of `arch`: the student of such a target is chosen under its limits, from a
      kind (conv, convi, text or textc) or a list of kinds and architectures; `choice` says how.
    kind "torch": `factory` ("package.module:name") called with `kwargs`; `weights` (.safetensors or a .pth state dict)
      are the initial ones; `head` is the dotted name of the final Linear, which is replaced by one of the right size
      (None: the last Linear); its input is the embedding. The keys of ImageInput say how pixels are scaled for it.
    """

    kind: Literal["family", "torch"] = "family"
    family: Literal["conv", "text"] | None = None
    arch: str | None = None
    pool: str | tuple[str, ...] | None = None
    choice: ChoiceSection = ChoiceSection()
    factory: str | None = None
    kwargs: Arguments = Field(default_factory=dict)
    weights: str | None = None
    head: str | None = None

    @field_validator("pool", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        # here, as an error of the union itself would come once for each of its types
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
            raise ValueError('a pool is a kind such as "conv", or a list of kinds and architectures')
        if not value:
            raise ValueError('nothing to choose from: a pool is a kind such as "conv", or a list of architectures')
        return tuple(value)

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        wrong = {"family", "arch", "pool", "choice"} if self.kind == "torch" else _TORCH_KEYS
        for name in sorted(wrong):
            # a stored recipe spells every default out, so only a value that differs from it counts as given
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if getattr(self, name) != default:
                other = "family" if self.kind == "torch" else "torch"
                raise ValueError(f'"{name}" belongs to a student of kind "{other}", this one is of kind "{self.kind}"')
        if self.kind == "torch" and self.factory is None:
            raise ValueError('a student of kind "torch" needs "factory"')
        return self

    @model_validator(mode="after")
    def _pool_or_arch(self) -> Self:
        if self.pool is None:
            if self.choice != ChoiceSection():
                raise ValueError(
                    '"choice" says how a student is chosen from a pool: add pool = "conv", or leave it out'
                )
            return self
        if self.arch is not None:
            raise ValueError(
                f'"pool" and "arch" exclude each other: the pool is there to choose, arch = "{self.arch}" has chosen '
                "(a target may name an arch of its own beside a pool)"
            )
        entries = (self.pool,) if isinstance(self.pool, str) else self.pool
        other = next((entry for entry in entries if self.family and not entry.startswith(self.family)), None)
        if other is not None:
            raise ValueError(f'"{other}" in the pool does not belong to family = "{self.family}": leave the family out')
        return self


def torch_word(section: StudentSection) -> str:
    """The one word that a student of kind "torch" is called by, in folders and reports: `torch-<factory's name>`."""
    name = (section.factory or "").rpartition(":")[2]
    return "torch-" + re.sub(r"[^A-Za-z0-9_]+", "_", name)
