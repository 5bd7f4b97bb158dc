"""What a training step of every teacher costs beside the plain one's: interleaved, so that a busy machine hits all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from distill.data import Dataset
from distill.data.dataset import subset
from distill.distribution import Processes
from distill.objectives.compose import build_objective
from distill.objectives.section import SupervisedSection
from distill.students import build_student
from distill.students.section import StudentSection
from distill.training import Run
from profiles import artifact
from profiles.progress import Silent
from tests.benchmarks.generic_teacher.cells import ONE_VIEW, Cells, conditioning, train_section
from tests.benchmarks.generic_teacher.plan import ARMS, TEACHER, Teacher

KIND = "generic teacher steps"
FORM = 1
ROUNDS = 9
STEPS = 10
_BATCH = 128


def measure(cells: Cells) -> dict[str, list[float]]:
    """Teacher -> seconds of a training step in each round, every teacher once a round; kept in the folder.

    The first round, in which memory is taken and kernels are chosen, does not count.
    """
    sample = _sample(cells.dataset)
    teachers = list(dict.fromkeys(teacher for arm in ARMS.values() for teacher in arm.teachers.values()))
    key = artifact.content_key(KIND, FORM, ROUNDS, STEPS, TEACHER, [teacher.name for teacher in teachers], sample.key)
    folder = cells.folder / "steps"
    rounds = {teacher.name: _round(teacher, sample, folder) for teacher in teachers}
    found: dict[str, list[float]] = {name: [] for name in rounds}
    for number in range(ROUNDS + 1):
        for name, step in rounds.items():
            seconds = step()
            if number:
                found[name].append(seconds)
    with artifact.create(folder, KIND, key, {"seconds": found}):
        pass
    return found


def read(cells: Cells) -> dict[str, list[float]] | None:
    """What was measured last; None: nothing."""
    folder = cells.folder / "steps"
    if not (folder / artifact.MANIFEST).is_file():
        return None
    found: dict[str, list[float]] = artifact.read_manifest(folder, KIND).info["seconds"]
    return found


def _sample(dataset: Dataset) -> Dataset:
    rows = np.arange(min(len(dataset.train), STEPS * _BATCH))
    few = dataset.validation
    validation = replace(few, inputs=few.inputs[:16], labels=few.labels[:16], rows=None)
    return replace(subset(dataset, rows), validation=validation)


def _round(teacher: Teacher, dataset: Dataset, folder: Path) -> Callable[[], float]:
    """One epoch of the loop's own steps per call; seconds per step."""
    student = build_student(StudentSection(), dataset.input, len(dataset.classes), arch=TEACHER, seed=0, base=Path())
    objective = build_objective((SupervisedSection(),), dataset, None, student_dim=student.embedding_dim)
    strategy = conditioning(teacher, dataset, 0)
    section = train_section(10_000, 0.001)
    processes = Processes(torch.device("cpu"))
    run = Run(student, objective, dataset, None, section, ONE_VIEW, folder, "steps", 0, 0, processes, strategy, None)
    run.resume(Silent())

    def epoch() -> float:
        run.train_epoch()
        return run.batch_size / float(run.history[-1]["samples_per_second"])

    return epoch
