"""The `[data]` table of a recipe. Light: pydantic only."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from profiles.section import Section

Resize = Literal["center-crop", "letterbox", "stretch"]
Kind = Literal["image", "text"]
FILE_SOURCES = ("imagefolder", "csv", "jsonl", "parquet", "npz", "idx")
CATALOGUE_KINDS: dict[str, Kind] = {"fashion-mnist-small": "image", "fashion-mnist": "image", "movie-snippets": "text"}
"""What the data sets of the catalogue hold: known here, so that a recipe is checked without loading any data."""
_HUB = 'a hub\'s "owner/name"'
_COLUMNS = frozenset(
    {"image_column", "text_column", "label_column", "label_columns", "label_separator", "split_column"}
)
_TABLE = _COLUMNS | {"path", "validation_path", "test_path"}
KEYS_OF_SOURCE: dict[str, frozenset[str]] = {
    "imagefolder": _COLUMNS | {"path"},
    "csv": _TABLE,
    "jsonl": _TABLE,
    "parquet": _TABLE,
    "npz": frozenset(
        {"path", "validation_path", "test_path", "image_column", "label_column", "label_separator", "mask_key"}
    ),
    "idx": frozenset({"path"}),
    _HUB: _COLUMNS | {"subset", "revision"},
    "the catalogue": frozenset(),
}
"""The keys that only some sources read; every other key of `[data]` belongs to all of them."""
KEYS_OF_KIND: dict[Kind, frozenset[str]] = {
    "image": frozenset({"image_size", "resize", "channels"}),
    "text": frozenset({"length", "vocabulary", "tokenizer"}),
}
Side = Annotated[int, Field(ge=1, le=4096)]
UnlabelledSource = Literal["imagefolder", "csv", "jsonl", "parquet", "npz", "idx", "lines"]
KEYS_OF_UNLABELLED: dict[UnlabelledSource, frozenset[str]] = {
    "imagefolder": frozenset(),
    "csv": frozenset({"image_column", "text_column"}),
    "jsonl": frozenset({"image_column", "text_column"}),
    "parquet": frozenset({"image_column", "text_column"}),
    "npz": frozenset({"image_column"}),
    "idx": frozenset(),
    "lines": frozenset(),
}
"""The columns that each source of unlabelled inputs reads."""


class AugmentSection(Section):
    """Augmentation of training images; each view of a sample is a pure function of (seed, sample, view)."""

    crop: int = Field(0, ge=0, le=256)
    """Shift by up to this many pixels in each direction (reflected borders): "pad and crop"."""
    flip: bool = False
    """Mirror left-right with probability 1/2."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability that a random rectangle is replaced by a random grey level."""
    views: int = Field(4, ge=1, le=1024)
    """Different views of each sample; the teacher's outputs are cached for each. View 0 is the clean image."""
    reuse_clean_teacher: bool = False
    """Cache the teacher on the clean view only and use that for every view: less time and disk, less exact."""

    @property
    def changes_images(self) -> bool:
        """Whether any view can differ from the clean image."""
        return self.views > 1 and (self.crop > 0 or self.flip or self.erase > 0)

    @property
    def teacher_views(self) -> int:
        """Views that a teacher cache holds."""
        return self.views if self.changes_images and not self.reuse_clean_teacher else 1


class UnlabelledSection(Section):
    """Inputs without labels, beside the labelled ones: what the data left over, or a source of their own.

    They are brought to the shape of the data (its size, resize rule, channels, tokenizer). Those that are also in the
    validation or the test split are dropped.
    """

    rest: bool = False
    """The training samples that train_size or imbalance left out; their labels are not read."""
    source: UnlabelledSource | None = None
    """imagefolder: any folder of images, with or without class folders. lines: a text file, one text per line."""
    path: str | None = None
    """File or folder, relative to the recipe. For idx: the image file, or a folder that holds one."""
    image_column: str | None = None
    """Column with an image or an image's path (relative to the table); for npz the key, default "images"."""
    text_column: str | None = None
    """Column with a text. Default: data.text_column, "text" or "sentence"."""
    size: int | None = Field(None, ge=1)
    """Use so many of them only, drawn by the seed of the splits."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rest and (self.source is not None or self.path is not None):
            raise ValueError("rest = true takes what the data left over; source and path are another way")
        if not self.rest and (self.source is None or self.path is None):
            raise ValueError(
                "unlabelled inputs come from rest = true, or from a source with its path"
                if self.source is None and self.path is None
                else f'"{"path" if self.path is None else "source"}" is missing: source and path go together'
            )
        if self.image_column and self.text_column:
            raise ValueError("image_column and text_column exclude each other")
        read = frozenset[str]() if self.source is None else KEYS_OF_UNLABELLED[self.source]
        for name in ("image_column", "text_column"):
            if getattr(self, name) is not None and name not in read:
                reader = "rest = true" if self.source is None else f'source = "{self.source}"'
                raise ValueError(f"{reader} does not read {name}")
        return self

    @property
    def known_kind(self) -> Kind | None:
        """What the inputs are, where the keys alone tell; None: as the data, or its columns will tell."""
        if self.source == "lines" or self.text_column:
            return "text"
        if self.image_column or self.source in ("imagefolder", "npz", "idx"):
            return "image"
        return None

    def other_kind_message(self, kind: Kind | None) -> str:
        """Says that these inputs are of another kind than the data, `kind`."""
        ours, theirs = ("images", "texts") if kind == "text" else ("texts", "images")
        return f'source = "{self.source}" gives {ours}, the data holds {theirs}'


def kind_of_keys(source: str, image_column: str | None, text_column: str | None) -> Kind | None:
    """What the samples of a labelled source are, where its keys alone tell."""
    if text_column:
        return "text"
    if image_column or source in ("imagefolder", "npz", "idx"):
        return "image"
    return CATALOGUE_KINDS.get(source)


def imbalance_factor(word: str) -> float:
    """The factor F >= 1 of "exp:F".

    Raises:
        ValueError: another word, or a factor that is below 1 or not finite.

    >>> imbalance_factor("exp:100")
    100.0
    """
    found = re.fullmatch(r"exp:(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)", word)
    factor = float(found.group(1)) if found else 0.0
    if not found or not math.isfinite(factor) or factor < 1:
        raise ValueError(
            f'"{word}" is no imbalance: "exp:F" with a finite F of 1 or more, such as "exp:100": the first class keeps '
            "F times as many training samples as the last"
        )
    return factor


class DataSection(Section):
    """Where the data is, what its columns mean, how it is split and what one sample looks like."""

    source: str = Field("fashion-mnist-small", min_length=1)
    """A catalogue name (`edgestill data list`), imagefolder, csv, jsonl, parquet, npz, idx or a hub's "owner/name"."""
    path: str | None = None
    """File or folder, relative to the recipe. For idx: the folder of the files, or the image file."""
    validation_path: str | None = None
    """Separate file of the validation split (table and npz sources)."""
    test_path: str | None = None
    """Separate file of the test split (table and npz sources)."""
    subset: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set.

    None: the newest commit when the data is first loaded. The run keeps what it loaded, whatever the hub does later;
    the data folder's manifest tells the commit. Another run, or this one without its data folder, asks the hub again.
    """
    task: Literal["multiclass", "multilabel"] = "multiclass"

    image_column: str | None = None
    """Column with an image or an image's path (relative to the table); for npz the key, default "images"."""
    text_column: str | None = None
    """Column with a text; makes it a text data set."""
    label_column: str | None = None
    """Column with the label; for npz the key, default "labels". Default for tables: "label"."""
    label_columns: tuple[str, ...] = ()
    """Multilabel: one 0/1 column per class; empty and NaN entries are unknown (masked)."""
    label_separator: str = Field("|", min_length=1)
    """Multilabel: separates the names in a joined label string."""
    mask_key: str | None = None
    """npz: key of a bool array, True where a multilabel label is known. Default: "mask" where it exists."""
    split_column: str | None = None
    """Column whose value is train, validation (or valid, val, dev) or test."""
    classes: tuple[str, ...] = ()
    """Class names in label order. Default: the names in the data, sorted."""

    validation_fraction: float = Field(0.15, gt=0, lt=1)
    """Share of the training samples that becomes the validation split, where none is given."""
    test_fraction: float = Field(0.15, gt=0, lt=1)
    """Share of all samples that becomes the test split, where none is given."""
    split_seed: int | None = None
    """Seed of the splits that are made; default: the recipe's seed."""
    train_size: int | None = Field(None, ge=2)
    """Keep so many training samples only, class shares kept."""
    imbalance: str | None = None
    """"exp:F" makes the training split long-tailed, in class order: class i keeps n F^(-i/(C-1)) samples.

    n is as large as the training split (after train_size) allows. The test split is made balanced, by leaving samples
    of the larger classes out; the validation split stays as it is.
    """

    image_size: Side | tuple[Side, Side] | None = None
    """Pixels, one side or (height, width). Default: the images' own size when all have the same."""
    resize: Resize = "center-crop"
    """How an image of another shape is brought to `image_size`."""
    channels: Literal[1, 3, "auto"] = "auto"
    """1: grey, 3: RGB, auto: grey when every image is grey."""

    length: int = Field(48, ge=2, le=8192)
    """Tokens per text; longer texts are cut, shorter ones padded."""
    vocabulary: int = Field(4096, ge=64, le=1_000_000)
    """Size of the vocabulary that is trained on the training split."""
    tokenizer: str | None = None
    """A `tokenizer.json` to use instead of training one."""

    augment: AugmentSection = AugmentSection()
    unlabelled: UnlabelledSection | None = None
    """Further inputs without labels, for generators and exploration."""

    @field_validator("imbalance")
    @classmethod
    def _imbalance_is_a_law(cls, word: str | None, info: ValidationInfo) -> str | None:
        if word is not None:
            imbalance_factor(word)
            if info.data.get("task") == "multilabel":
                raise ValueError("a sample with several labels belongs to several classes: imbalance is for multiclass")
        return word

    @field_validator("unlabelled")
    @classmethod
    def _unlabelled_is_of_the_same_kind(
        cls, unlabelled: UnlabelledSection | None, info: ValidationInfo
    ) -> UnlabelledSection | None:
        kind = kind_of_keys(info.data.get("source", ""), info.data.get("image_column"), info.data.get("text_column"))
        if unlabelled is not None and None not in (kind, unlabelled.known_kind) and unlabelled.known_kind != kind:
            raise ValueError(unlabelled.other_kind_message(kind))
        return unlabelled

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_used(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A section without these keys reads, and hashes, as before there were any."""
        values: dict[str, Any] = handler(self)
        for name in ("imbalance", "unlabelled"):
            if values.get(name, ...) is None:
                del values[name]
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_column and self.text_column:
            raise ValueError("image_column and text_column exclude each other: a data set holds images or texts")
        if self.label_column and self.label_columns:
            raise ValueError("label_column and label_columns exclude each other")
        if self.label_columns and self.task != "multilabel":
            raise ValueError('label_columns (one column per class) need task = "multilabel"')
        if self.source in FILE_SOURCES and self.path is None:
            raise ValueError(f'source = "{self.source}" needs a path')
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes holds a name twice")
        self._refuse_keys_of_other_sources()
        if self.task != "multilabel" and (self.is_changed("label_separator") or self.is_changed("mask_key")):
            name = "label_separator" if self.is_changed("label_separator") else "mask_key"
            raise ValueError(f'"{name}" belongs to task = "multilabel"')
        if self.label_columns and self.is_changed("label_separator"):
            raise ValueError(
                '"label_separator" belongs to a joined label_column; label_columns have nothing to separate'
            )
        if self.split_column and (self.validation_path or self.test_path):
            other = "validation_path" if self.validation_path else "test_path"
            raise ValueError(f"split_column and {other} exclude each other: the column splits one file")
        if self.tokenizer is not None and self.is_changed("vocabulary"):
            raise ValueError('"vocabulary" is the size of a tokenizer trained here; the given tokenizer has its own')
        if self.image_size is None and self.is_changed("resize"):
            raise ValueError('"resize" belongs to "image_size": without it images keep their own size')
        kind = self.known_kind
        wrong = self.keys_of_other_kind(kind) if kind else []
        if wrong:
            raise ValueError(self.other_kind_message(wrong[0]))
        return self

    def _refuse_keys_of_other_sources(self) -> None:
        group = self.source
        if group in CATALOGUE_KINDS:
            group = "the catalogue"
        elif "/" in group:
            group = _HUB
        if group not in KEYS_OF_SOURCE:
            return  # loading names the nearest source
        for name in sorted(frozenset[str]().union(*KEYS_OF_SOURCE.values()) - KEYS_OF_SOURCE[group]):
            if self.is_changed(name):
                owners = ", ".join(source for source, keys in KEYS_OF_SOURCE.items() if name in keys)
                raise ValueError(f'"{name}" belongs to {owners}; source = "{self.source}" does not read it')

    def is_changed(self, name: str) -> bool:
        """Whether a key differs from its default; a stored recipe spells defaults out, so only that counts as given."""
        return bool(getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True))

    @property
    def known_kind(self) -> Kind | None:
        """What the samples are, where the keys alone tell; None: the columns of the data will tell."""
        return kind_of_keys(self.source, self.image_column, self.text_column)

    def keys_of_other_kind(self, kind: Kind) -> list[str]:
        """Keys that were given although samples of this kind do not read them."""
        other: Kind = "text" if kind == "image" else "image"
        return [name for name in sorted(KEYS_OF_KIND[other]) if self.is_changed(name)]

    @staticmethod
    def other_kind_message(name: str) -> str:
        """Says which kind of data such a key belongs to."""
        texts = name in KEYS_OF_KIND["text"]
        return f'"{name}" belongs to {"texts" if texts else "images"}, the data holds {"images" if texts else "texts"}'
