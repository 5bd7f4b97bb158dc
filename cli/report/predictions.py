"""What a target's model said of every test sample, kept so that two runs can be compared sample by sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from profiles import artifact
from profiles.errors import InputError
from profiles.metrics import primary_metric

PREDICTIONS = "predictions"
"""Folder in the run folder; one folder per target below it. Also the artefacts' kind."""

Array = np.ndarray[Any, Any]


class Predictions(NamedTuple):
    """Answers and labels of the test split in its order.

    One class per sample: `answers` are the classes with the highest logit, int32 (N,), and so are `labels`. Several
    labels: `answers` are the logits, float32 (N, C), `labels` 0/1 (N, C), `mask` bool (N, C) where a label is known.
    """

    answers: Array
    labels: Array
    mask: Array | None = None

    @classmethod
    def of(cls, task: str, logits: Array, labels: Array, mask: Array | None) -> Predictions:
        """Of a model's logits (N, C)."""
        if primary_metric(task) == "top1":
            return cls(logits.argmax(axis=1).astype(np.int32), np.asarray(labels).astype(np.int32))
        return cls(logits.astype(np.float32), np.asarray(labels), None if mask is None else np.asarray(mask))


class Stored(NamedTuple):
    """Predictions with what they belong to. test_key: of the test split; model_key: of the file that gave them."""

    predictions: Predictions
    test_key: str
    model_key: str


def save_predictions(folder: Path, predictions: Predictions, *, test_key: str, model_key: str) -> None:
    """Writes them as an artefact, unless they are there already.

    Raises:
        EdgestillError: the disk is full or the folder cannot be written.
    """
    key = artifact.content_key(test_key, model_key, predictions.answers)
    if artifact.current(folder, PREDICTIONS, key) is not None:
        return
    info = {"test_key": test_key, "model_key": model_key}
    with artifact.create(folder, PREDICTIONS, key, info) as temporary:
        for name, array in predictions._asdict().items():
            if array is not None:
                np.save(temporary / f"{name}.npy", array)


def load_predictions(folder: Path) -> Stored | None:
    """What `save_predictions` wrote; None where there is nothing.

    Raises:
        InputError: damaged, or of another edgestill.
    """
    if not (folder / artifact.MANIFEST).is_file():
        return None
    manifest = artifact.read_manifest(folder, PREDICTIONS)
    found = {name: artifact.open_array(folder, manifest, name, title=PREDICTIONS) for name in Predictions._fields}
    answers, labels = found["answers"], found["labels"]
    if answers is None or labels is None or answers.shape != labels.shape:
        raise InputError("damaged predictions", where=str(folder), fix=f"delete {folder} and run again")
    return Stored(
        Predictions(answers, labels, found["mask"]),
        str(manifest.info.get("test_key", "")),
        str(manifest.info.get("model_key", "")),
    )
