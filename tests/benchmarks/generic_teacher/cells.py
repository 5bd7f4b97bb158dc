"""Trains one cell, by the library alone, and keeps what it says about the test split; and runs many, in processes."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.data import Dataset, catalogue, load_dataset
from distill.data.section import AugmentSection, DataSection
from distill.objectives.compose import Composition, build_objective, head_size
from distill.objectives.section import AnyObjective, KDSection, LELPSection, SupervisedSection
from distill.strategies.generic import FORM as STRATEGY_FORM
from distill.strategies.generic import POOL_FILE, Generic
from distill.students import Student, build_student, load_student, parse_arch
from distill.students.section import StudentSection
from distill.teachers import ModuleTeacher, TeacherCache, build_cache
from distill.teachers.strategy_section import GenericSection
from distill.train_section import TrainSection
from distill.training import FORM as TRAINING_FORM
from distill.training import evaluate_logits, read_result, train
from profiles import artifact
from profiles.errors import EdgestillError, Interrupted
from tests.benchmarks.evidence import images
from tests.benchmarks.generic_teacher.plan import (
    ARMS,
    TEACHER,
    Cell,
    StudentCell,
    Teacher,
    TeacherCell,
    choose_tau,
    next_cell,
    plan,
    tuning_cells,
)

KIND = "generic teacher cell"
IMAGES_KIND = "generic teacher images"
FORM = 1
"""Raise when the way a cell is made changes, so that older cells are made anew."""
ONE_VIEW = AugmentSection(views=1)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is trained, on how many images. train_size None: all 10,000. other_size: None: whole other splits."""

    train_size: int | None = None
    other_size: int | None = None
    teacher_epochs: int = 6
    student_epochs: int = 6
    learning_rate: float = 0.004


QUICK = Sizes(train_size=300, other_size=200, teacher_epochs=1, student_epochs=1)


@dataclass(frozen=True)
class Measured:
    """What a finished cell says. test, validation: accuracies, fractions. logits: float32 (N, C) of the test split."""

    test: float
    validation: float
    seconds: float
    best_epoch: int
    created: str
    versions: dict[str, str]
    logits: Array


class Cells:
    """One folder with all trainings.

    Args:
        folder: of everything that is made.
        sizes: how much is trained.
    """

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes

    @cached_property
    def dataset(self) -> Dataset:
        """Fashion-MNIST: the packaged 10,000 training and 2,000 validation images, the whole official test split.

        Raises:
            EdgestillError: the data cannot be fetched.
        """
        source = self.folder / "images"
        size = self.sizes.other_size
        packaged = artifact.file_hash(catalogue.fetch("fashion-mnist-small"))
        key = artifact.content_key(IMAGES_KIND, packaged, catalogue.FASHION_FILES, size)
        if artifact.current(source, IMAGES_KIND, key) is None:
            with artifact.create(source, IMAGES_KIND, key) as temporary:
                for split, part in images.fashion().items():
                    rows = slice(None) if split == "train" else slice(size)
                    np.savez_compressed(temporary / f"{split}.npz", images=part.images[rows], labels=part.classes[rows])
        section = DataSection(
            source="npz",
            path="train.npz",
            validation_path="validation.npz",
            test_path="test.npz",
            classes=catalogue.entry_of("fashion-mnist").classes,
            train_size=self.sizes.train_size,
        )
        return load_dataset(section, seed=0, base=source, folder=self.folder / "data")

    # -- what is there -----------------------------------------------------------------------------------------------

    def key(self, cell: Cell) -> str:
        """Hash of all that decides a cell."""
        forms = (FORM, TRAINING_FORM, STRATEGY_FORM)
        return artifact.content_key(KIND, forms, asdict(cell), asdict(self.sizes), TEACHER, self.dataset.key)

    def is_done(self, cell: Cell) -> bool:
        """Whether it is finished, made as it would be now."""
        return artifact.current(self.folder / cell.place / "measured", KIND, self.key(cell)) is not None

    def read(self, cell: Cell) -> Measured:
        """What a finished cell says."""
        place = self.folder / cell.place / "measured"
        manifest = artifact.read_manifest(place, KIND)
        logits: Array = np.load(place / "test_logits.npy")
        info = manifest.info
        return Measured(
            info["test"],
            info["validation"],
            info["seconds"],
            info["best_epoch"],
            manifest.created,
            manifest.versions,
            logits,
        )

    def probabilities(self, cell: TeacherCell) -> dict[str, float]:
        """Architecture -> probability at the end of a conditioned teacher's training."""
        path = self.folder / cell.place / "trained" / POOL_FILE
        found = json.loads(path.read_text(encoding="utf-8"))
        return {entry["arch"]: entry["probability"] for entry in found["archs"]}

    def taus(self, done: frozenset[Cell]) -> dict[str, float]:
        """Arm -> temperature, of the arms whose tuning is finished."""
        found = {}
        for arm in ARMS:
            tau = choose_tau(self.scores(arm, done), arm)
            if tau is not None:
                found[arm] = tau
        return found

    def scores(self, arm: str, done: frozenset[Cell]) -> dict[StudentCell, float]:
        """Validation accuracies of the finished cells that choose an arm's temperature."""
        return {cell: self.read(cell).validation for cell in tuning_cells(arm) if cell in done}

    def done(self) -> frozenset[Cell]:
        """All finished cells, those of chosen temperatures included."""
        first = frozenset(cell for cell in plan({}) if self.is_done(cell))
        return frozenset(cell for cell in plan(self.taus(first)) if self.is_done(cell))

    # -- making one --------------------------------------------------------------------------------------------------

    def make(self, cell: Cell) -> None:
        """Trains it, goes on with it, or finds it finished.

        Raises:
            EdgestillError: anything that went wrong in it; Interrupted after SIGINT.
        """
        if isinstance(cell, TeacherCell):
            self._make_teacher(cell)
        else:
            self._make_student(cell)

    def _make_teacher(self, cell: TeacherCell) -> None:
        strategy = conditioning(cell.teacher, self.dataset, cell.seed)
        network, _ = self._train(cell, TEACHER, SupervisedSection(), None, self.sizes.teacher_epochs, strategy)
        logits = self._cache(cell, network).test_logits
        assert logits is not None
        self._keep(cell, np.array(logits))

    def _make_student(self, cell: StudentCell) -> None:
        cache = None
        if cell.teacher is not None:
            teacher = TeacherCell(cell.teacher, cell.seed)
            network = self._build(TEACHER, len(self.dataset.classes), cell.seed)
            load_student(network, self.folder / teacher.place / "trained" / "student.safetensors")
            cache = self._cache(teacher, network)
        section: AnyObjective
        if cell.objective == "kd":
            assert cell.tau is not None
            section = KDSection(tau=cell.tau)
        else:
            section = LELPSection() if cell.objective == "lelp" else SupervisedSection()
        student, objective = self._train(cell, cell.arch, section, cache, self.sizes.student_epochs, None)
        self._keep(cell, evaluate_logits(student, objective, self.dataset.test, device="cpu"))

    def _cache(self, cell: TeacherCell, network: Student) -> TeacherCache:
        folder = self.folder / cell.place / "cache"
        return build_cache(ModuleTeacher(network), self.dataset, ONE_VIEW, folder, seed=cell.seed, dtype="float32")

    def _build(self, arch: str, outputs: int, seed: int) -> Student:
        return build_student(StudentSection(), self.dataset.input, outputs, arch=arch, seed=seed, base=Path())

    def _train(
        self,
        cell: Cell,
        arch: str,
        section: AnyObjective,
        cache: TeacherCache | None,
        epochs: int,
        strategy: Generic | None,
    ) -> tuple[Student, Composition]:
        dataset = self.dataset
        student = self._build(arch, head_size((section,), len(dataset.classes)), cell.seed)
        objective = build_objective((section,), dataset, cache, student_dim=student.embedding_dim, seed=cell.seed)
        settings = train_section(epochs, self.sizes.learning_rate)
        train(
            student,
            objective,
            dataset,
            cache,
            settings,
            ONE_VIEW,
            self.folder / cell.place / "trained",
            seed=cell.seed,
            device="cpu",
            strategy=strategy,
        )
        return student, objective

    def _keep(self, cell: Cell, logits: Array) -> None:
        """Writes what a trained cell says; with this it is finished."""
        place = self.folder / cell.place
        found = read_result(place / "trained")
        info = {
            "label": cell.label,
            "test": float((logits.argmax(1) == self.dataset.test.labels).mean()),
            "validation": found.metric.value,
            "seconds": found.seconds,
            "best_epoch": found.best_epoch,
        }
        with artifact.create(place / "measured", KIND, self.key(cell), info) as temporary:
            np.save(temporary / "test_logits.npy", logits)


def conditioning(teacher: Teacher, dataset: Dataset, seed: int) -> Generic | None:
    """The strategy that a teacher is trained with; None: the plain one."""
    if not teacher.pool:
        return None
    section = GenericSection.model_validate({"archs": teacher.pool, **dict(teacher.settings)})
    return Generic(section, [parse_arch(word) for word in teacher.pool], parse_arch(TEACHER), dataset, seed=seed)


def train_section(epochs: int, learning_rate: float) -> TrainSection:
    """How every teacher and student is trained."""
    return TrainSection(epochs=epochs, learning_rate=learning_rate, batch_size=128)


# -- many of them, in processes ---------------------------------------------------------------------------------------


def _start_worker() -> None:
    # the terminal's Ctrl-C reaches every process; only a training in progress listens, and keeps a checkpoint
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _make(folder: Path, sizes: Sizes, cell: Cell) -> None:
    Cells(folder, sizes).make(cell)


def run(cells: Cells, jobs: int, seconds: float, say: Callable[[str], None]) -> dict[str, str]:
    """Makes what is missing, in the plan's order, until all is there or the time is up.

    No cell starts after the time is up; those in progress end. Ctrl-C stops these as well; they go on from there.

    Args:
        cells: where and how much.
        jobs: processes at once, of one thread each.
        seconds: after which no cell starts.
        say: told what ends.

    Returns:
        label -> message of the cells that failed.

    Raises:
        EdgestillError: the data cannot be fetched.
    """
    end = time.monotonic() + seconds
    done = set(cells.done())
    failed: dict[Cell, str] = {}
    running: dict[Future[None], tuple[Cell, float]] = {}
    context = multiprocessing.get_context("spawn")
    stopped = False
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        try:
            while True:
                order = plan(cells.taus(frozenset(done)))
                while len(running) < jobs and not stopped and time.monotonic() < end:
                    busy = frozenset(cell for cell, _ in running.values()) | frozenset(failed)
                    cell = next_cell(order, frozenset(done), busy)
                    if cell is None:
                        break
                    running[pool.submit(_make, cells.folder, cells.sizes, cell)] = (cell, time.monotonic())
                if not running:
                    break
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    cell, started = running.pop(future)
                    try:
                        future.result()
                    except Interrupted:
                        stopped = True
                    except EdgestillError as error:
                        failed[cell] = str(error)
                        say(f"{cell.label}: {error}")
                    except BrokenProcessPool:
                        stopped = True
                        failed[cell] = "its process died, or one beside it"
                        say(f"{cell.label}: {failed[cell]}; the same command goes on")
                    else:
                        done.add(cell)
                        say(f"{cell.label}: {time.monotonic() - started:.0f} s; {len(done)} of {len(order)}")
        except KeyboardInterrupt:
            say("stopping; the same command goes on")
    return {cell.label: message for cell, message in failed.items()}
