"""The `[data]` table of a recipe. Light: pydantic only."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from profiles.section import Section

Resize = Literal["center-crop", "letterbox", "stretch"]
FILE_SOURCES = ("imagefolder", "csv", "jsonl", "parquet", "npz", "idx")
Side = Annotated[int, Field(ge=1, le=4096)]


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
    """Commit, tag or branch of a hub data set."""
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
        return self
