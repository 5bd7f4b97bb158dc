"""What a task gives to the grid, and the arms that it is run with. It lives in a folder; every process opens it.

A task has few labelled samples, an unlabelled rest, a small validation split and a test split. Every seed draws its
own labelled samples, so that intervals over seeds cover that draw; validation, test, generator and the teacher that
knows all labels are the same for all seeds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.data import Dataset
from distill.data.section import AugmentSection
from distill.data.unlabelled import Unlabelled
from distill.exploration.explore import Exploration
from distill.exploration.generated import build_generated
from distill.exploration.generator import ImageGenerator, TextGenerator
from distill.exploration.section import GENERATED, Around, ExploreKind, ExploreSection, GeneratorSection
from distill.students import Student, build_student
from distill.students.section import StudentSection
from distill.teachers import Teacher, TeacherCache, build_cache
from distill.train_section import TrainSection
from profiles import artifact

Knowledge = Literal["all", "few"]
"""Where the teacher's knowledge comes from: all labels of the pool, or the student's own few."""
ONE_VIEW = AugmentSection(views=1)


@dataclass(frozen=True)
class Arm:
    """One row of the tables.

    kind: where further inputs come from; None: labels alone, without a teacher. settings: further keys of `[explore]`.
    main: part of the comparison; the others are single choices, run last and with teacher "all" only.
    """

    name: str
    kind: ExploreKind | None
    around: Around = "train"
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    main: bool = True
    about: str = ""

    @property
    def explores(self) -> bool:
        """Whether it has a radius."""
        return self.kind in ("random", "gradient")


LABELS = Arm("labels alone", None, about="no teacher")
KD = Arm("KD", "real", about="further inputs: the labelled ones again")
AUGMENTED = Arm("KD, strong augmentation", "augmented", about="the labelled ones under strong augmentation")
RECONSTRUCTED = Arm("KD on reconstructions", "reconstructed", about="what the generator makes of the labelled ones")
RANDOM = Arm("TGT random", "random", about="sampled around the labelled ones")
GRADIENT = Arm("TGT gradient", "gradient", about="around the labelled ones, where student and teacher disagree")
UNLABELLED = Arm("KD on unlabelled", "real", "unlabelled", about="real ones of the unlabelled rest")


@dataclass(frozen=True)
class Choice:
    """What validation chose on seed 0, and all arms of a task share.

    tau: temperature, on real and further inputs. hard_weight: of the labels. weight: lambda_2, of the further inputs.
    sigmas: kind of exploration -> radius; empty where the further inputs have none.
    """

    tau: float
    hard_weight: float
    weight: float
    sigmas: Mapping[str, float] = field(default_factory=dict, hash=False)


class Task(ABC):
    """One task in a folder of its own below `root`.

    Subclasses set the attributes and define the abstract methods; what a method makes is an artefact in `folder`, so
    that a second call, and another process, opens it.

    Attributes:
        name: of folder and labels, short: "fashion-10". title: for the report.
        group: tasks of group 0 run seed by seed before those of group 1.
        student_arch, train, explore_batch: the same for all arms. `train.validations` is 1, so that the weights kept
            are those of the last epoch, and validation chooses hyper-parameters only.
        arms: in the order in which they run within a seed.
        teacher_settings: plain values that decide how both teachers are made.
        taus, hard_weights, weights: candidates, judged on seed 0 with the arm KD and teacher "all", all combinations.
        sigmas: candidates of the radius, then judged with each kind that explores; empty: the task has none (texts).
        versions: of all arms but gradient; None: new inputs in every step.
        generator_section: `[explore.generator]`.
    """

    name: str
    title: str
    group: int = 0
    student_arch: str
    train: TrainSection
    explore_batch: int
    arms: tuple[Arm, ...]
    generator_section: GeneratorSection
    teacher_settings: object
    versions: int | None = None
    taus: tuple[float, ...] = (1.0, 4.0)
    hard_weights: tuple[float, ...] = (0.1, 0.5)
    weights: tuple[float, ...] = (0.5, 1.0, 2.0)
    sigmas: tuple[float, ...] = ()

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def folder(self) -> Path:
        """Of all that it makes for itself alone."""
        return self.root / self.name

    @property
    def tuned_on(self) -> str:
        """Name of the task whose choice it uses."""
        return self.name

    # -- what a task defines ------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, seeds: int) -> dict[str, Any]:
        """Makes all that workers open: the data of so many seeds, the generator, the teacher that knows all labels.

        Runs in one process before the workers start, with as many threads as there will be workers.

        Returns:
            Facts for the report: "samples" (split -> number, and "unlabelled"), "counts" (of the classes in the
            training split), "classes", "teacher" (its architecture), "teacher_parameters", "student_parameters",
            "generator" (a few words), "seconds" (what was made -> seconds).
        """

    @abstractmethod
    def dataset(self, seed: int) -> Dataset:
        """The few labelled training samples that this seed draws; validation and test are the same for all seeds."""

    @abstractmethod
    def unlabelled(self, seed: int) -> Unlabelled:
        """The rest of the pool: what this seed did not draw."""

    @abstractmethod
    def make_teacher(self, seed: int) -> None:
        """Trains the teacher of "few" on `dataset(seed)`, in a worker, unless it is there."""

    @abstractmethod
    def teacher(self, knowledge: Knowledge, seed: int) -> Teacher:
        """Frozen; made by `prepare` ("all", the same for every seed) or `make_teacher` ("few")."""

    @abstractmethod
    def generator(self) -> ImageGenerator | TextGenerator:
        """Frozen; made by `prepare` from the pool's inputs, labels unused."""

    # -- what all tasks share -----------------------------------------------------------------------------------------

    def cache(self, knowledge: Knowledge, seed: int) -> TeacherCache:
        """What the teacher says of `dataset(seed)`; made by the first call, in a worker."""
        folder = self.folder / "cache" / f"{knowledge}-{seed}"
        return build_cache(
            self.teacher(knowledge, seed), self.dataset(seed), ONE_VIEW, folder, seed=seed, dtype="float32"
        )

    def student(self, seed: int) -> Student:
        """A fresh student; the same seed gives the same weights to every arm."""
        dataset = self.dataset(seed)
        section = StudentSection(arch=self.student_arch)
        return build_student(section, dataset.input, len(dataset.classes), seed=seed, base=self.folder)

    def section(self, arm: Arm, choice: Choice) -> ExploreSection | None:
        """The `[explore]` table of an arm; None: labels alone."""
        if arm.kind is None:
            return None
        keys: dict[str, Any] = {
            "kind": arm.kind,
            "match": "kd",
            "tau": choice.tau,
            "weight": choice.weight,
            "around": arm.around,
            "batch_size": self.explore_batch,
        }
        if arm.kind != "gradient" and self.versions is not None:
            keys["versions"] = self.versions
        if arm.explores and self.sigmas:
            keys["sigma"] = choice.sigmas[arm.kind]
        if arm.kind in GENERATED:
            keys["generator"] = self.generator_section
        return ExploreSection(**{**keys, **arm.settings})

    def exploration(self, section: ExploreSection, knowledge: Knowledge, seed: int, folder: Path) -> Exploration:
        """What the training loop asks. folder: of a stored set of generated inputs, where there is one."""
        teacher, dataset = self.teacher(knowledge, seed), self.dataset(seed)
        generator = self.generator() if section.generates else None
        unlabelled = self.unlabelled(seed) if section.around != "train" else None
        generated = None
        if section.versions is not None:
            generated = build_generated(
                section, teacher, dataset, folder, generator=generator, unlabelled=unlabelled, seed=seed
            )
        return Exploration(
            section, teacher, dataset, generator=generator, unlabelled=unlabelled, tau=section.tau, generated=generated
        )

    def key(self, knowledge: Knowledge | None, seed: int) -> str:
        """Hash of data, teacher (None: none is asked), generator and training; "few" need not be trained for it."""
        told: list[object] = [] if knowledge is None else [knowledge, self.generator().key, self.teacher_settings]
        if knowledge == "all":
            told.append(self.teacher(knowledge, seed).key)
        return artifact.content_key(self.dataset(seed).key, self.student_arch, self.train, told)
