"""The `[teacher]` table of a recipe. Light: pydantic only, so that `--help` and recipe checks stay fast."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from distill.teachers.strategy_section import COACHED, HELD_OUT, CoachedSection, GenericSection, Strategy
from distill.teachers.strategy_section import keys as strategy_keys
from profiles.section import Arguments, Section

TeacherKind = Literal["train", "array", "transformers", "onnx", "torch", "none"]
Pooling = Literal["mean", "cls", "max", "last"]


class ImageInput(Section):
    """How uint8 images become the float input of a network that somebody else trained.

    `normalization`: "dataset" (mean and standard deviation of the training split), "imagenet", or "none" (0 to 1).
    `mean` and `std`, per channel for values scaled to 0..1, take precedence and are given together.
    `input_size`: pixels; images are resized to a square of that side (bilinear, antialias), None: as they are.
    `input_channels`: 3 repeats grey images three times, None: as they are.
    """

    normalization: Literal["dataset", "imagenet", "none"] = "dataset"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: int | None = Field(default=None, ge=8, le=4096)
    input_channels: Literal[1, 3] | None = None

    @model_validator(mode="after")
    def _mean_with_std(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: give both, or neither")
        if self.mean is not None and self.std is not None:
            if len(self.mean) != len(self.std) or not self.mean:
                raise ValueError(f"mean has {len(self.mean)} values, std has {len(self.std)}: one of each per channel")
            if min(self.std) <= 0:
                raise ValueError("std must be positive")
        return self


class TeacherSection(ImageInput):
    """Who teaches. Paths are relative to the recipe's folder.

    kind "train": a wide network of the family that reads the data (conv for images, text for texts), trained on the
      labels first (`arch`, `epochs`, `learning_rate`; None: that family's default arch, and the values of `[train]`).
    kind "array": outputs computed elsewhere. `embeddings` and/or `logits` name a file (.npy, .npz, .safetensors) with
      one row per sample of the source, in its order: it serves all splits that edgestill makes. Where the source comes
      with splits, it is that of its training split, and `validation_*` and `test_*` (optional) name the others. An .npz
      or .safetensors file with arrays called "train", "validation" and "test" holds all splits at once. Two classes:
      logits of one column z (sigmoid) speak for the second class and count as [0, z].
    kind "transformers": `model` is a local folder or a hub name, `pooling` makes one embedding of the tokens,
      `max_length` cuts texts (tokens), `classification = true` also takes the logits of its classifier. Two classes: a
      single logit z speaks for the second class and counts as [0, z].
    kind "onnx": `file`; `output` names the logits, `embedding_output` the embedding (at least one of them). Two
      classes: a single logit z speaks for the second class and counts as [0, z].
    kind "torch": `factory` ("package.module:name") called with `kwargs`; `weights` (.safetensors or a .pth state dict);
      `embedding_layer` names the module whose output is the embedding, or `head` the final Linear whose input it is
      (None: the last Linear). Its output serves as logits when it has one column per class, or for two classes a single
      logit z, which speaks for the second class and counts as [0, z]; `classification = false` leaves it out (a teacher
      of another task that happens to have as many), `true` insists on it.
    kind "none": no teacher; only the `supervised` objective works.
    `cache_dtype`: how outputs are stored; the reconstruction error of float16 is reported.
    `batch_size`: samples per teacher forward pass while the cache is built.

    The second class is the second of `data.classes`, else of the data set's own order; loading the teacher names it.
    With several labels (`task = "multilabel"`) one column is one label.
    """

    kind: TeacherKind = "train"
    strategy: Strategy = "frozen"
    generic: GenericSection = GenericSection()
    coached: CoachedSection = CoachedSection()
    arch: str | None = None
    epochs: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    embeddings: str | None = None
    logits: str | None = None
    validation_embeddings: str | None = None
    validation_logits: str | None = None
    test_embeddings: str | None = None
    test_logits: str | None = None
    model: str | None = None
    pooling: Pooling = "mean"
    max_length: int | None = Field(default=None, ge=2)
    classification: bool | None = None
    file: str | None = None
    output: str | None = None
    embedding_output: str | None = None
    factory: str | None = None
    kwargs: Arguments = Field(default_factory=dict)
    weights: str | None = None
    embedding_layer: str | None = None
    head: str | None = None
    cache_dtype: Literal["float16", "float32"] = "float16"
    batch_size: int = Field(default=256, ge=1)

    @property
    def moves(self) -> bool:
        """Whether the teacher learns beside the student, so that what it said before training does not hold."""
        return self.strategy in COACHED

    @property
    def held_out(self) -> float | None:
        """Share of the training split that a coached student is judged by and not trained on; None: nothing."""
        if self.coached.held_out is None and self.strategy in ("meta", "lgtm"):
            return HELD_OUT
        return self.coached.held_out

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        fitting = COMMON_KEYS | KEYS_OF_KIND[self.kind]
        for name, field in type(self).model_fields.items():
            # a stored recipe spells every default out, so only a value that differs from it counts as given
            if name not in fitting and getattr(self, name) != field.get_default(call_default_factory=True):
                raise ValueError(
                    f'"{name}" does not belong to a teacher of kind "{self.kind}"; '
                    f"its keys: {', '.join(sorted(KEYS_OF_KIND[self.kind])) or 'none'}"
                )
        missing = [
            names for names in _REQUIRED.get(self.kind, ()) if all(getattr(self, name) is None for name in names)
        ]
        if missing:
            raise ValueError(f'a teacher of kind "{self.kind}" needs "{" or ".join(missing[0])}"')
        if self.embedding_layer and self.head:
            raise ValueError('name "embedding_layer" or "head", not both')
        self._keys_fit_the_strategy()
        return self

    def _keys_fit_the_strategy(self) -> None:
        for table, name, fitting in strategy_keys():
            if self.strategy not in fitting and name in _given(getattr(self, table)):
                raise ValueError(
                    f'"{table}.{name}" belongs to strategy {_or(fitting)}, this one is "{self.strategy}"; leave it '
                    "out, or change teacher.strategy"
                )
        choices = [name for name in ("widths", "depths", "kernels", "heads") if getattr(self.generic, name) is not None]
        if self.generic.archs is not None and choices:
            raise ValueError(f'name the pool by "generic.archs" or by "generic.{choices[0]}", not both')
        if self.strategy == "sftn" and self.generic.archs is not None and len(self.generic.archs) != 1:
            raise ValueError('strategy "sftn" is conditioned on one architecture; for several, strategy = "generic"')
        if self.generic.distribution != "uniform" and self.generic.paths < 2:
            raise ValueError(
                f'distribution = "{self.generic.distribution}" compares the architectures of a step: generic.paths = 2'
            )


_IMAGE_KEYS = frozenset(ImageInput.model_fields)
COMMON_KEYS = frozenset({"kind", "strategy", "generic", "coached", "cache_dtype", "batch_size"})
KEYS_OF_KIND: dict[TeacherKind, frozenset[str]] = {
    "train": frozenset({"arch", "epochs", "learning_rate"}),
    "array": frozenset({"embeddings", "logits"})
    | {f"{split}_{what}" for split in ("validation", "test") for what in ("embeddings", "logits")},
    "transformers": frozenset({"model", "pooling", "max_length", "classification"}),
    "onnx": frozenset({"file", "output", "embedding_output"}) | _IMAGE_KEYS,
    "torch": frozenset({"factory", "kwargs", "weights", "embedding_layer", "head", "classification"}) | _IMAGE_KEYS,
    "none": frozenset(),
}
_REQUIRED: dict[TeacherKind, tuple[tuple[str, ...], ...]] = {
    "array": (("embeddings", "logits"),),
    "transformers": (("model",),),
    "onnx": (("file",), ("output", "embedding_output")),
    "torch": (("factory",),),
}


def _given(section: Section) -> list[str]:
    """Keys whose values differ from the default."""
    return [
        name
        for name, field in type(section).model_fields.items()
        if getattr(section, name) != field.get_default(call_default_factory=True)
    ]


def _or(words: frozenset[str]) -> str:
    return " or ".join(f'"{word}"' for word in sorted(words))
