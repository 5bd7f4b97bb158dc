"""The `[student]` table of a recipe. Light: pydantic only, so that `--help` and recipe checks stay fast."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from distill.teachers.section import ImageInput
from profiles.section import Arguments

_TORCH_KEYS = frozenset({"factory", "kwargs", "weights", "head"}) | frozenset(ImageInput.model_fields)


class StudentSection(ImageInput):
    """What is trained and shipped. Paths are relative to the recipe's folder.

    kind "family": a network of an elastic `family` (None: conv for images, text for texts); `arch` (one word, such as
      conv-w24-d2-k3) is the architecture of every target that names none of its own, None: the family's default for the
      target's size class.
    kind "torch": `factory` ("package.module:name") called with `kwargs`; `weights` (.safetensors or a .pth state dict)
      are the initial ones; `head` is the dotted name of the final Linear, which is replaced by one of the right size
      (None: the last Linear); its input is the embedding. The keys of ImageInput say how pixels are scaled for it.
    """

    kind: Literal["family", "torch"] = "family"
    family: Literal["conv", "text"] | None = None
    arch: str | None = None
    factory: str | None = None
    kwargs: Arguments = Field(default_factory=dict)
    weights: str | None = None
    head: str | None = None

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        wrong = {"family", "arch"} if self.kind == "torch" else _TORCH_KEYS
        for name in sorted(wrong):
            # a stored recipe spells every default out, so only a value that differs from it counts as given
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if getattr(self, name) != default:
                other = "family" if self.kind == "torch" else "torch"
                raise ValueError(f'"{name}" belongs to a student of kind "{other}", this one is of kind "{self.kind}"')
        if self.kind == "torch" and self.factory is None:
            raise ValueError('a student of kind "torch" needs "factory"')
        return self


def torch_word(section: StudentSection) -> str:
    """The one word that a student of kind "torch" is called by, in folders and reports: `torch-<factory's name>`."""
    name = (section.factory or "").rpartition(":")[2]
    return "torch-" + re.sub(r"[^A-Za-z0-9_]+", "_", name)
