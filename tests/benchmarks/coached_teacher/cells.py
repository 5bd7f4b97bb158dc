"""The grid: methods, tasks and seeds; one training of it, and the processes that train what is missing."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import torch

from distill.data.section import AugmentSection
from distill.objectives.compose import build_objective
from distill.objectives.section import AnyObjective, DISTSection, KDSection, MSESection, SupervisedSection
from distill.strategies.coached import Coached
from distill.students import load_student
from distill.teachers.strategy_section import HELD_OUT, CoachedSection
from distill.training import FORM as TRAINING_FORM
from distill.training import evaluate_logits, train
from profiles import artifact
from profiles.errors import Interrupted
from tests.benchmarks.coached_teacher.tasks import SETTINGS, Array, Name, Settings, Task, accuracy, logits_of

KIND = "coached teacher cell"
FORM = 1
"""Raise when the way a cell is made changes, so that older cells are made anew."""
HARD_WEIGHT = 0.1
"""Weight of the labels in every distilled student's loss, coached or not; the rest is the teacher's."""
_CELL_FILE = "cell.json"
_LOGITS_FILE = "test_logits.npy"
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
_PAPERS = KDSection(tau=1.0)


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    objective: what the student matches. strategy: None for a frozen teacher. coached: keys of `teacher.coached` that
    are not the default's. faster: factor on the teacher's learning rate. untaught: start from the pretrained encoder
    and a classifier of zeros. tasks: those that it is defined for. about: for the report.
    """

    name: str
    objective: AnyObjective = _PAPERS
    strategy: Literal["online", "meta", "lgtm"] | None = None
    coached: Mapping[str, Any] = field(default_factory=dict)
    faster: float = 1.0
    untaught: bool = False
    tasks: tuple[Name, ...] = ("texts", "images")
    about: str = ""


METHODS = (
    Method("kd", about="frozen teacher, temperature 1"),
    Method("lgtm", strategy="lgtm", about='lambda_inf = "ratio:0.1"'),
    Method("online", strategy="online", about="no held-out samples"),
    Method("lgtm lambda_inf=0", strategy="lgtm", coached={"lambda_inf": 0.0}, about="online, samples held out as lgtm"),
    Method("meta", strategy="meta"),
    Method("supervised", SupervisedSection(), about="labels alone"),
    Method("kd tau=4", KDSection(tau=4.0), about="frozen teacher, temperature 4"),
    Method("lgtm preconditioned", strategy="lgtm", coached={"influence": "preconditioned"}),
)
"""In the order in which they run within a seed."""
EXTRAS = (
    Method("lgtm bilevel", strategy="lgtm", coached={"lambda_inf": "bilevel"}, about='lambda_inf = "bilevel"'),
    Method("lgtm official", strategy="lgtm", coached={"lambda_inf": "official"}, about='lambda_inf = "official"'),
    Method("lgtm ratio 0.3", strategy="lgtm", coached={"lambda_inf": "ratio:0.3"}),
    Method("lgtm ratio 0.03", strategy="lgtm", coached={"lambda_inf": "ratio:0.03"}),
    Method("lgtm jvp", strategy="lgtm", coached={"derivative": "jvp"}, about="exact instead of finite difference"),
    Method("lgtm faster teacher", strategy="lgtm", faster=3.0, about="teacher's learning rate x 3"),
    Method("lgtm slower teacher", strategy="lgtm", faster=1 / 3, about="teacher's learning rate / 3"),
    Method("lgtm held_out=0.1", strategy="lgtm", coached={"held_out": 0.1}),
    Method("mse", MSESection(), about="frozen teacher"),
    Method("lgtm mse", MSESection(), strategy="lgtm"),
    Method("dist", DISTSection(), tasks=("images",), about="frozen teacher; undefined for two classes"),
    Method("lgtm dist", DISTSection(), strategy="lgtm", tasks=("images",)),
    Method(
        "lgtm untaught",
        strategy="lgtm",
        untaught=True,
        tasks=("texts",),
        about="teacher starts as the pretrained encoder with a classifier of zeros",
    ),
)
"""Choices of ours, one at a time; run when all of METHODS are done."""


@dataclass(frozen=True)
class Cell:
    """One training. root: the folder of the benchmark. settings: of the task."""

    task: Name
    method: Method
    seed: int
    root: Path
    settings: Settings

    @property
    def label(self) -> str:
        """`texts, lgtm, seed 3`."""
        return f"{self.task}, {self.method.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Of its artefact."""
        return self.root / self.task / "cells" / self.method.name.replace(" ", "-") / f"seed-{self.seed}"

    @property
    def section(self) -> CoachedSection | None:
        """The `teacher.coached` table; None for a frozen teacher."""
        if self.method.strategy is None:
            return None
        return CoachedSection(
            **self.method.coached,
            learning_rate=self.settings.teacher_learning_rate * self.method.faster,
            trainable_layers=self.settings.layers,
        )

    @property
    def held_out(self) -> float | None:
        """The share of the training split that nobody trains on."""
        section = self.section
        if section is None or self.method.strategy == "online":
            return None
        return HELD_OUT if section.held_out is None else section.held_out

    def key(self, task: Task) -> str:
        """Hash of everything that decides it."""
        return artifact.content_key(
            *(KIND, FORM, TRAINING_FORM, task.dataset.key, task.cache.key, self.settings.student, self.settings.train),
            *(self.method.objective, self.method.strategy, self.section, self.method.untaught, HARD_WEIGHT, self.seed),
        )

    def is_done(self, task: Task) -> bool:
        """Whether it is finished, as it is asked for now."""
        return artifact.current(self.folder, KIND, self.key(task)) is not None

    def read(self) -> dict[str, Any]:
        """What a finished one found: see `train_cell`."""
        found: dict[str, Any] = json.loads((self.folder / _CELL_FILE).read_text(encoding="utf-8"))
        return found

    def logits(self) -> Array:
        """(N_test, C) float32 class logits of a finished one."""
        stored: Array = np.load(self.folder / _LOGITS_FILE)
        return stored


def cells(root: Path, seeds: int, extra_seeds: int, settings: Mapping[Name, Settings] = SETTINGS) -> list[Cell]:
    """Every cell in the order in which they run: a task's seeds, each with all methods; then the extras alike.

    Images come first: their trainings take a fifth of the time.
    """
    return [
        Cell(name, method, seed, root, settings[name])
        for methods, count in ((METHODS, seeds), (EXTRAS, extra_seeds))
        for name in sorted(settings)
        for seed in range(count)
        for method in methods
        if name in method.tasks
    ]


def train_cell(cell: Cell, task: Task) -> None:
    """Trains one cell, going on from its checkpoint, judges student and teacher on the test split and keeps that.

    The student is of the epoch that validation chose, its teacher of the last step.
    """
    dataset, method = task.dataset, cell.method
    plain = isinstance(method.objective, SupervisedSection)
    student = task.student(cell.seed)
    hard_weight = None if plain or isinstance(method.objective, DISTSection) else HARD_WEIGHT
    objective = build_objective(
        (method.objective,),
        dataset,
        None if plain else task.cache,
        student_dim=student.embedding_dim,
        hard_weight=hard_weight,
        seed=cell.seed,
    )
    section, strategy, teacher = cell.section, None, None
    if section is not None and method.strategy is not None:
        teacher = task.live(untaught=method.untaught)
        assert section.learning_rate != "auto"
        strategy = Coached(
            method.strategy,
            section,
            teacher,
            dataset,
            held_out=cell.held_out,
            learning_rate=section.learning_rate,
            start_key=task.untaught.key if method.untaught else task.teacher.key,
        )
    training = cell.folder.with_name(cell.folder.name + ".training")
    result = train(
        student,
        objective,
        dataset,
        task.cache if strategy is None and not plain else None,
        cell.settings.train,
        AugmentSection(),
        training,
        seed=cell.seed,
        strategy=strategy,
    )
    logits = evaluate_logits(student, objective, dataset.test).astype(np.float32)
    found: dict[str, Any] = {
        "validation": result.metric.value,
        "test": accuracy(logits, dataset.test.labels),
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "seconds": result.seconds,
        "samples_per_second": result.samples_per_second,
        "arch": result.arch,
        "hard_weight": result.hard_weight,
        "threads": torch.get_num_threads(),
        "history": list(result.history),
        "means": _means(result.history),
    }
    if teacher is not None:
        # a training that had ended before was loaded, and left the teacher as it started
        load_student(teacher.network, training / "teacher.safetensors")
        found["live_seconds"] = task.live_seconds
        found["teacher_test"] = accuracy(logits_of(teacher, dataset, "test"), dataset.test.labels)
        found["teacher_validation"] = accuracy(logits_of(teacher, dataset, "validation"), dataset.validation.labels)
    with artifact.create(cell.folder, KIND, cell.key(task), {}) as temporary:
        artifact.write_text(temporary / _CELL_FILE, json.dumps(found, indent=1) + "\n")
        np.save(temporary / _LOGITS_FILE, logits)
    # a coached teacher's weights are large, and nothing asks for them again
    shutil.rmtree(training, ignore_errors=True)


def _means(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each figure's mean over the epochs that have it."""
    names = sorted({name for record in history for name in record})
    return {name: mean(record[name] for record in history if name in record) for name in names}


# -- processes --------------------------------------------------------------------------------------------------------


@cache
def _task(name: Name, root: Path, settings: Settings) -> Task:
    """One per process: teacher and cache are opened once."""
    return Task(name, root, settings)


def _start() -> None:
    """In a worker: Ctrl-C comes from the parent alone, once, and only a training listens to it."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _work(cell: Cell) -> tuple[str, float]:
    """In a worker: trains the cell. Returns what went wrong ("" for nothing, "stopped"), and the seconds it took."""
    started = time.perf_counter()
    try:
        train_cell(cell, _task(cell.task, cell.root, cell.settings))
    except Interrupted:
        return "stopped", time.perf_counter() - started
    except Exception as error:  # one cell that fails must not take the others with it
        return f"{type(error).__name__}: {error}", time.perf_counter() - started
    return "", time.perf_counter() - started


def run(left: Sequence[Cell], jobs: int, seconds: float) -> dict[str, str]:
    """Trains cells in so many processes until all are done or the time is up.

    At the end of the time, and at Ctrl-C, what is being trained writes its checkpoint; the same call goes on from it.

    Returns:
        The labels of the cells that failed, and why.
    """
    deadline = time.monotonic() + seconds
    failures: dict[str, str] = {}
    waiting, running = list(left), dict[Future[tuple[str, float]], Cell]()
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running[pool.submit(_work, cell)] = cell
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                error, spent = future.result()
                print(f"{cell.label}: {error or 'done'}, {spent:.0f} s", file=sys.stderr, flush=True)
                if error and error != "stopped":
                    failures[cell.label] = error
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        _stop(pool, running)
        signal.signal(signal.SIGTERM, before)
    if waiting or running:
        print(f"{len(waiting) + len(running)} cells are left; the same command goes on", file=sys.stderr)
    return failures


def _stop(pool: ProcessPoolExecutor, running: Mapping[Future[tuple[str, float]], Cell]) -> None:
    """Ends the workers; those that train get Ctrl-C and the time to write a checkpoint."""
    children = multiprocessing.active_children()
    if running:
        for child in children:
            if child.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has ended by itself meanwhile
                    os.kill(child.pid, signal.SIGINT)
        wait(running, timeout=_PATIENCE_SECONDS)
    pool.shutdown(wait=not running, cancel_futures=True)
    for child in children:
        child.join(_POLL_SECONDS)
        child.terminate()
