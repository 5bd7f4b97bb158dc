"""Fashion-MNIST with few labels, and long-tailed: a pool whose labels are mostly hidden, a VAE of it, two teachers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import Dataset, catalogue, load_dataset
from distill.data.arrays import read_idx
from distill.data.dataset import subset
from distill.data.section import DataSection
from distill.data.splits import long_tail_counts
from distill.data.unlabelled import Unlabelled
from distill.exploration.generator import ImageGenerator
from distill.exploration.make import make_image_generator
from distill.exploration.section import GeneratorSection
from distill.objectives.compose import build_objective
from distill.objectives.section import SupervisedSection
from distill.students import Student, build_student
from distill.students.section import StudentSection
from distill.teachers import ModuleTeacher
from distill.train_section import TrainSection
from distill.training import read_result, train
from profiles import artifact
from tests.benchmarks.exploration.task import (
    AUGMENTED,
    GRADIENT,
    KD,
    LABELS,
    ONE_VIEW,
    RANDOM,
    RECONSTRUCTED,
    UNLABELLED,
    Arm,
    Knowledge,
    Task,
)

KIND = "exploration images"
FORM = 1
CLASSES = 10
SEED = 0
"""Of what all seeds share: validation split, generator, the teacher that knows all labels."""
Array = np.ndarray[Any, Any]
EXTRAS = (
    Arm("TGT random around unlabelled", "random", "unlabelled", main=False, about="sampled around the unlabelled rest"),
    Arm(
        "TGT random, agreement",
        "random",
        settings={"filter": "agreement"},
        main=False,
        about="kept where the teacher says the same of both",
    ),
    Arm(
        "TGT random, confidence",
        "random",
        settings={"filter": "confidence", "threshold": 0.8},
        main=False,
        about="kept where the teacher is sure, 0.8",
    ),
)


@dataclass(frozen=True)
class Sizes:
    """How much there is and how long it is trained. pool, test: None: all. validation: images taken out of the pool."""

    pool: int | None = None
    validation: int = 1000
    test: int | None = None
    student: str = "conv-w8-d1-k3"
    teacher: str = "conv-w16-d1-k3"
    steps: int = 500
    teacher_epochs: int = 6
    few_teacher_steps: int = 500
    batch_size: int = 32
    generator: GeneratorSection = field(default_factory=lambda: GeneratorSection(kind="vae", width=16, epochs=10))
    generator_images: int | None = 20_000


class Pool:
    """What the image tasks share: images, the VAE of them, and the teacher that knows all labels.

    Args:
        folder: of its artefacts.
        sizes: as above.
    """

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes

    @cached_property
    def dataset(self) -> Dataset:
        """The pool with all its labels as training split; validation images drawn from the official training split,
        the same number of each class; the official test split."""
        source, size = self.folder / "source", self.sizes
        key = artifact.content_key(KIND, FORM, catalogue.FASHION_FILES, size.pool, size.validation, size.test)
        if artifact.current(source, KIND, key) is None:
            with artifact.create(source, KIND, key) as temporary:
                self._write(temporary)
        section = DataSection(
            source="npz",
            path="train.npz",
            validation_path="validation.npz",
            test_path="test.npz",
            classes=catalogue.entry_of("fashion-mnist").classes,
        )
        return load_dataset(section, seed=SEED, base=source, folder=self.folder / "data")

    def _write(self, folder: Path) -> None:
        whole = catalogue.fetch("fashion-mnist")
        labels = read_idx(whole / "train-labels-idx1-ubyte")
        images = read_idx(whole / "train-images-idx3-ubyte")
        size = self.sizes
        validation = draw(labels, np.full(CLASSES, size.validation // CLASSES), SEED)
        rest = np.setdiff1d(np.arange(len(labels)), validation)
        if size.pool is not None:
            rest = rest[draw(labels[rest], np.full(CLASSES, size.pool // CLASSES), SEED)]
        for name, rows in (("train", rest), ("validation", validation)):
            np.savez(folder / f"{name}.npz", images=images[rows], labels=labels[rows])
        test = slice(size.test)
        np.savez(
            folder / "test.npz",
            images=read_idx(whole / "t10k-images-idx3-ubyte")[test],
            labels=read_idx(whole / "t10k-labels-idx1-ubyte")[test],
        )

    @cached_property
    def generator(self) -> ImageGenerator:
        """The VAE, trained on the pool's first images without their labels."""
        images = self.dataset.train.inputs[: self.sizes.generator_images]
        return make_image_generator(
            self.sizes.generator, images, self.dataset.input, self.folder / "generator", seed=SEED, base=self.folder
        )

    @cached_property
    def teacher(self) -> ModuleTeacher:
        """Trained on all labels of the pool."""
        section = TrainSection(
            epochs=self.sizes.teacher_epochs, batch_size=2 * self.sizes.batch_size, learning_rate=0.004, validations=1
        )
        return ModuleTeacher(fitted(self.sizes.teacher, self.dataset, section, self.folder / "teacher", SEED))


class FashionTask(Task):
    """Fashion-MNIST of which a seed sees some labels.

    Args:
        root: folder of the benchmark.
        name: of the task.
        title: for the report.
        counts: labels of each class.
        sizes: others than the committed ones, for a quick look.
        extras: whether the single choices are run, too.
    """

    explore_batch = 32
    sigmas = (0.25, 0.5, 1.0)
    arms: tuple[Arm, ...] = (LABELS, KD, RANDOM, GRADIENT, AUGMENTED, RECONSTRUCTED, UNLABELLED)

    def __init__(
        self,
        root: Path,
        *,
        name: str,
        title: str,
        counts: Array,
        sizes: Sizes = Sizes(),
        group: int = 0,
        extras: bool = False,
    ) -> None:
        super().__init__(root)
        self.name, self.title, self.counts, self.sizes, self.group = name, title, counts, sizes, group
        self.student_arch = sizes.student
        self.explore_batch = sizes.batch_size
        self.train = _few_steps(sizes.steps, sizes.batch_size)
        self.generator_section = sizes.generator
        self.teacher_settings = [FORM, SEED, *asdict(replace(sizes, generator=GeneratorSection())).values()]
        if extras:
            self.arms = (*self.arms, *EXTRAS)
        self.pool = Pool(root / "images", sizes)
        self._dataset: tuple[int, Dataset] | None = None
        self._rest: tuple[int, Unlabelled] | None = None

    @property
    def tuned_on(self) -> str:
        return TUNED_ON

    def prepare(self, seeds: int) -> dict[str, Any]:
        pool = self.pool
        network = pool.teacher.network
        return {
            "samples": {
                "train": int(self.counts.sum()),
                "unlabelled": len(pool.dataset.train) - int(self.counts.sum()),
                "validation": len(pool.dataset.validation),
                "test": len(pool.dataset.test),
            },
            "counts": self.counts.tolist(),
            "classes": list(pool.dataset.classes),
            "teacher": self.sizes.teacher,
            "teacher_parameters": sum(p.numel() for p in network.parameters()),
            "student_parameters": sum(p.numel() for p in self.student(SEED).parameters()),
            "generator": self._about_generator(),
            "seconds": {"teacher that knows all": read_result(pool.folder / "teacher").seconds},
        }

    def _about_generator(self) -> str:
        section, network = self.sizes.generator, self.pool.generator.network
        images = min(len(self.pool.dataset.train), self.sizes.generator_images or len(self.pool.dataset.train))
        metrics = (self.pool.folder / "generator" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last: dict[str, float] = json.loads(metrics[-1])
        losses = ", ".join(f"{name[5:]} {value:.4g}" for name, value in last.items() if name.startswith("loss/"))
        return (
            f"VAE, latent {section.latent}, width {section.width}, "
            f"{sum(p.numel() for p in network.parameters()):,} parameters, {section.epochs} epochs on {images:,} "
            f"images of the pool without labels; losses of the last: {losses}"
        )

    def dataset(self, seed: int) -> Dataset:
        if self._dataset is None or self._dataset[0] != seed:
            whole = self.pool.dataset
            self._dataset = seed, subset(whole, draw(whole.train.labels, self.counts, seed))
        return self._dataset[1]

    def unlabelled(self, seed: int) -> Unlabelled:
        if self._rest is None or self._rest[0] != seed:
            whole = self.pool.dataset
            drawn = draw(whole.train.labels, self.counts, seed)
            rest = np.setdiff1d(np.arange(len(whole.train)), drawn)
            key = artifact.content_key(KIND, FORM, whole.key, rest)
            self._rest = seed, Unlabelled(whole.train.inputs[rest], None, key, "the rest of the pool")
        return self._rest[1]

    def make_teacher(self, seed: int) -> None:
        self._few(seed)

    def _few(self, seed: int) -> Student:
        section = _few_steps(self.sizes.few_teacher_steps, self.sizes.batch_size)
        return fitted(self.sizes.teacher, self.dataset(seed), section, self.folder / "teachers" / str(seed), seed)

    def teacher(self, knowledge: Knowledge, seed: int) -> ModuleTeacher:
        return self.pool.teacher if knowledge == "all" else ModuleTeacher(self._few(seed))

    def generator(self) -> ImageGenerator:
        return self.pool.generator


def _few_steps(steps: int, batch_size: int) -> TrainSection:
    """At least so many steps, and the weights of the last epoch: the only one that is validated."""
    return TrainSection(epochs=1, min_steps=steps, batch_size=batch_size, learning_rate=0.004, validations=1)


def fitted(arch: str, dataset: Dataset, section: TrainSection, folder: Path, seed: int) -> Student:
    """A network trained on the labels alone, or loaded where that was done."""
    student_section = StudentSection(arch=arch)
    network = build_student(student_section, dataset.input, len(dataset.classes), seed=seed, base=folder)
    objective = build_objective((SupervisedSection(),), dataset, None, student_dim=network.embedding_dim)
    train(network, objective, dataset, None, section, ONE_VIEW, folder, seed=seed, device="cpu")
    return network


def draw(labels: Array, counts: Array, seed: int) -> Array:
    """Rows, ascending: so many of each class; fewer of a class are among those that more of it would give.

    Raises:
        ValueError: a class has fewer.
    """
    rows = []
    for label, count in enumerate(counts.tolist()):
        own = np.random.default_rng((seed, label)).permutation(np.flatnonzero(labels == label))
        if len(own) < count:
            raise ValueError(f"class {label} has {len(own)} samples, not {count}")
        rows.append(own[:count])
    return np.sort(np.concatenate(rows))


TUNED_ON = "fashion-40"
TASKS: Mapping[str, Any] = {
    **{
        f"fashion-{count}": partial(
            FashionTask,
            name=f"fashion-{count}",
            title=f"Fashion-MNIST, {count} labels per class",
            counts=np.full(CLASSES, count),
            group=int(count > 100),
            extras=count == 10,
        )
        for count in (10, 40, 200)
    },
    "fashion-long-tail": partial(
        FashionTask,
        name="fashion-long-tail",
        title="Fashion-MNIST, long-tailed, factor 100",
        counts=long_tail_counts(np.full(CLASSES, 500), 100),
        extras=True,
    ),
}
"""Name -> what opens the task, given `root` and `sizes`; in the order in which they run within a seed."""
