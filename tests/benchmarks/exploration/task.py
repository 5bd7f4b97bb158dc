"""What a task gives to the grid, and the arms that it is run with. A task lives in one folder and is opened per process.

A task has few labelled samples, an unlabelled rest, a small validation split and a test split. Every seed draws its
own labelled samples, so that intervals over seeds cover that draw; validation, test, generator and the teacher that
knows all labels are the same for all seeds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from distill.data import Dataset
from distill.data.unlabelled import Unlabelled
from distill.exploration.generator import ImageGenerator, TextGenerator
from distill.exploration.section import Around, ExploreKind, ExploreSection, GeneratorSection
from distill.students import Student, build_student
from distill.students.section import StudentSection
from distill.teachers import Teacher
from distill.train_section import TrainSection
from profiles import artifact

Knowledge = Literal["all", "few"]
"""Where the teacher's knowledge comes from: all labels of the pool, or the student's own few."""


@dataclass(frozen=True)
class Arm:
    """One row of the tables.

    kind: where further inputs come from; None: labels alone, without a teacher. settings: further keys of `[explore]`.
    main: part of the first comparison; the others come last.
    """

    name: str
    kind: ExploreKind | None
    around: Around = "train"
    settings: Mapping[str, Any] = field(default_factory=dict)
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
    sigmas: name of the arm -> radius.
    """

    tau: float
    hard_weight: float
    weight: float
    sigmas: Mapping[str, float] = field(default_factory=dict)


class Task(ABC):
    """One task in a folder of its own below `root`.

    Subclasses set the class or instance attributes and define the abstract methods; what a method makes is an artefact
    in `folder`, so that a second call, and another process, opens it. Nothing may change while workers run: they open
    what `prepare` and `make_teacher` made.

    Attributes:
        name: of folder and labels, short: "fashion-10". title: for the report.
        student_arch, train, explore_batch: the same for all arms. `train.validations` is 1, so that the weights are
            those of the last epoch and validation chooses hyper-parameters only.
        arms: in the order in which they run within a seed.
        tuned_on: name of the task on which the shared hyper-parameters were chosen (its own, by default).
        taus, hard_weights, weights: candidates, judged with the arm KD and teacher "all" on seed 0, all combinations.
        sigmas: candidates of the radius, judged with each exploring arm; empty: the arms have none (texts).
        versions: of the arms that are no gradient; None: new inputs in every step.
        generator_section: of `[explore.generator]`.
    """

    name: str
    title: str
    student_arch: str
    train: TrainSection
    explore_batch: int
    arms: tuple[Arm, ...]
    generator_section: GeneratorSection
    versions: int | None = None
    taus: tuple[float, ...] = (1.0, 2.0, 4.0)
    hard_weights: tuple[float, ...] = (0.1, 0.5)
    weights: tuple[float, ...] = (0.5, 1.0, 2.0)
    sigmas: tuple[float, ...] = ()
    knowledge: ClassVar[tuple[Knowledge, ...]] = ("all", "few")

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def folder(self) -> Path:
        """Of all that it makes."""
        return self.root / self.name

    @property
    def tuned_on(self) -> str:
        """Name of the task whose choice it uses."""
        return self.name

    # -- what a task defines -----------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, seeds: int) -> dict[str, Any]:
        """Makes all that does not depend on a seed, and the seeds' data: splits, generator, the teacher that knows all.

        Runs in one process before the workers start, with as many threads as they are.

        Returns:
            Facts for the report, plain values: at least "samples" (split -> number, and "unlabelled"), "teacher" (its
            architecture), "teacher_test" (accuracy of the teacher that knows all), "student_parameters",
            "teacher_parameters", and "seconds" (what was made -> seconds).
        """

    @abstractmethod
    def dataset(self, seed: int) -> Dataset:
        """The few labelled training samples that this seed draws; validation and test are the same for all seeds."""

    @abstractmethod
    def unlabelled(self, seed: int) -> Unlabelled:
        """The rest of the pool: what this seed did not draw."""

    @abstractmethod
    def make_teacher(self, seed: int) -> None:
        """Trains the teacher of "few" on `dataset(seed)`; found finished when it is there. One thread, a worker's."""

    @abstractmethod
    def teacher(self, knowledge: Knowledge, seed: int) -> Teacher:
        """Frozen, made by `prepare` ("all", the same for every seed) or `make_teacher` ("few")."""

    @abstractmethod
    def generator(self) -> ImageGenerator | TextGenerator:
        """Frozen, made by `prepare` from the pool's inputs; labels unused."""

    # -- what all tasks share ----------------------------------------------------------------------------------------

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
            keys["sigma"] = choice.sigmas[arm.name]
        section = ExploreSection(**{**keys, **arm.settings})
        return section.model_copy(update={"generator": self.generator_section}) if section.generates else section

    def key(self, knowledge: Knowledge | None, seed: int) -> str:
        """Hash of data, teacher (None: none is asked) and generator."""
        told = None if knowledge is None else (self.teacher(knowledge, seed).key, self.generator().key)
        return artifact.content_key(self.dataset(seed).key, self.unlabelled(seed).key, told)
