"""The data as the rest of edgestill sees it: arrays in memory or mapped from disk, and what is needed to repeat it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Task = Literal["multiclass", "multilabel"]
SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class InputSpec:
    """The shape of one sample, without the batch dimension.

    `kind` "image": uint8, (channels, height, width), values 0 to 255, RGB or grey; `mean` and `std` per channel of the
    training split scaled to 0..1. The normalisation is the first layer of every student, so it is in every graph.
    `kind` "tokens": int64, (length,), padded with `pad_id`.
    """

    kind: Literal["image", "tokens"]
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    vocabulary: int = 0
    pad_id: int = 0

    @property
    def name(self) -> str:
        """The name of the graph's input: "image" or "tokens"."""
        return self.kind

    @property
    def dtype(self) -> str:
        """NumPy name of the input's type: "uint8" or "int64"."""
        return "uint8" if self.kind == "image" else "int64"


@dataclass(frozen=True)
class Split:
    """One split.

    inputs: (N, *shape), see InputSpec. labels: int64 (N,) for multiclass, uint8 (N, C) of 0/1 for multilabel.
    mask: bool (N, C), True where a multilabel label is known; None when all are. texts: the raw texts of token data.
    rows: int64 (N,), each sample's row in the split of the source that it came from (the whole source, where the splits
    were made here), to line it up with arrays of the user's. source: which split of the source that is; source_size:
    how many samples that has. None where the source is not known.
    """

    inputs: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    mask: np.ndarray[Any, Any] | None = None
    texts: tuple[str, ...] | None = None
    rows: np.ndarray[Any, Any] | None = None
    source: SplitName | None = None
    source_size: int | None = None

    def __len__(self) -> int:
        return int(self.inputs.shape[0])


@dataclass(frozen=True)
class Dataset:
    """Three splits that share classes and input shape.

    key: hash of content and preprocessing. preprocessing: resize rule, size, colour order and so on, as they go into
    manifests. tokenizer: the `tokenizers` JSON file of token data. revision: the hub's commit that was loaded, None for
    other sources (and where the library did not tell). left_out: int64, rows of the source's training split that are in
    no split here, because train_size or imbalance left them out; None where the source is not known.
    """

    name: str
    task: Task
    classes: tuple[str, ...]
    input: InputSpec
    train: Split
    validation: Split
    test: Split
    key: str
    preprocessing: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    citation: str = ""
    tokenizer: Path | None = None
    revision: str | None = None
    left_out: np.ndarray[Any, Any] | None = None

    def split(self, name: SplitName) -> Split:
        """The split of that name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


def subset(dataset: Dataset, rows: np.ndarray[Any, Any]) -> Dataset:
    """The data set with these rows of its training split only; validation, test and preprocessing stay as they are.

    Args:
        dataset: the whole.
        rows: int64 (n,), in the order that they get.
    """
    import numpy as np

    from profiles.artifact import content_key

    split = dataset.train
    left_out = dataset.left_out
    if left_out is not None and split.rows is not None:
        left_out = np.union1d(left_out, np.delete(split.rows, rows))
    train = replace(
        split,
        inputs=split.inputs[rows],
        labels=split.labels[rows],
        mask=None if split.mask is None else split.mask[rows],
        texts=None if split.texts is None else tuple(split.texts[row] for row in rows.tolist()),
        rows=None if split.rows is None else split.rows[rows],
    )
    return replace(dataset, train=train, left_out=left_out, key=content_key("rows", dataset.key, rows))
