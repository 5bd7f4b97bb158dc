"""What a training step of every arm costs beside plain KD's: interleaved, so that a busy machine hits all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill.distribution import Processes
from distill.objectives.compose import build_objective
from distill.objectives.section import KDSection, SupervisedSection
from distill.train_section import TrainSection
from distill.training import Run
from profiles import artifact
from profiles.progress import Silent
from tests.benchmarks.exploration.task import ONE_VIEW, Arm, Choice, Task

KIND = "exploration steps"
FORM = 1
PLAIN = "plain KD, no further inputs"
ROUNDS = 9
STEPS = 10
"""At least, in a round."""


def measure(task: Task, choice: Choice, *, rounds: int = ROUNDS, steps: int = STEPS) -> dict[str, list[float]]:
    """Arm -> seconds of a training step in each round, every arm once a round; kept in the task's folder.

    One thread, teacher "all", seed 0. The first round, in which memory is taken and kernels are chosen, does not count.
    """
    folder = task.folder / "steps"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made: dict[str, Callable[[], float]] = {PLAIN: _round(task, None, choice, folder, steps)}
        made |= {arm.name: _round(task, arm, choice, folder, steps) for arm in task.arms if arm.main}
        found: dict[str, list[float]] = {name: [] for name in made}
        for number in range(rounds + 1):
            for name, step in made.items():
                seconds = step()
                if number:
                    found[name].append(seconds)
    finally:
        torch.set_num_threads(threads)
    key = artifact.content_key(KIND, FORM, rounds, steps, task.key("all", 0))
    with artifact.create(folder, KIND, key, {"seconds": found}):
        pass
    return found


def read(task: Task) -> dict[str, list[float]] | None:
    """What was measured last; None: nothing."""
    folder = task.folder / "steps"
    if not (folder / artifact.MANIFEST).is_file():
        return None
    found: dict[str, list[float]] = artifact.read_manifest(folder, KIND).info["seconds"]
    return found


def _round(task: Task, arm: Arm | None, choice: Choice, folder: Path, steps: int) -> Callable[[], float]:
    """Whole epochs of the loop's own steps per call, at least `steps`; seconds per step. arm: None for plain KD."""
    dataset = task.dataset(0)
    few = dataset.validation
    mask = None if few.mask is None else few.mask[:16]
    texts = None if few.texts is None else few.texts[:16]
    small = replace(few, inputs=few.inputs[:16], labels=few.labels[:16], mask=mask, texts=texts, rows=None)
    dataset = replace(dataset, validation=small)
    student = task.student(0)
    section = None if arm is None else task.section(arm, choice)
    taught = arm is None or section is not None
    cached = task.cache("all", 0) if taught else None
    strategy = None
    if section is not None and arm is not None:
        stored = folder.with_name("steps.generated") / arm.name.replace(" ", "-")
        strategy = task.exploration(section, "all", 0, stored)
    objective = build_objective(
        (KDSection(tau=choice.tau) if taught else SupervisedSection(),),
        dataset,
        cached,
        student_dim=student.embedding_dim,
        hard_weight=choice.hard_weight if taught else None,
    )
    # a round is a whole number of epochs, and a looked-at validation split of 16 is in none of their seconds
    train = TrainSection(epochs=100_000, batch_size=task.train.batch_size, learning_rate=task.train.learning_rate)
    processes = Processes(torch.device("cpu"))
    run = Run(student, objective, dataset, cached, train, ONE_VIEW, folder, "steps", 0, 0, processes, strategy, None)
    run.resume(Silent())

    def epochs() -> float:
        seconds, done = 0.0, 0
        while done < steps:
            run.train_epoch()
            record: dict[str, Any] = run.history[-1]
            seconds += run.steps_per_epoch * run.batch_size / float(record["samples_per_second"])
            done += run.steps_per_epoch
        return seconds / done

    return epochs
