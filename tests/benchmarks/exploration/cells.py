"""The grid: tasks, teachers, arms and seeds; one training of it, and the processes that train what is missing."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.objectives.compose import build_objective
from distill.objectives.section import AnyObjective, KDSection, SupervisedSection
from distill.training import FORM as TRAINING_FORM
from distill.training import evaluate_logits, train
from profiles import artifact
from profiles.errors import Interrupted
from tests.benchmarks.exploration import images, texts
from tests.benchmarks.exploration.task import KD, ONE_VIEW, Arm, Choice, Knowledge, Task

KIND = "exploration cell"
FORM = 1
"""Raise when the way a cell is made changes, so that older cells are made anew."""
TUNING_SEED = 0
_CELL_FILE = "cell.json"
_LOGITS_FILE = "test_logits.npy"
_PICTURE_FILE = "explored.png"
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
Array = np.ndarray[Any, Any]
TASKS: Mapping[str, Callable[[Path], Task]] = {**images.TASKS, **texts.TASKS}
"""Name -> what opens the task below a folder."""


@cache
def open_task(name: str, root: Path) -> Task:
    """One per process."""
    return TASKS[name](root)


@dataclass(frozen=True)
class TeacherCell:
    """What a seed's distilled students wait for: its teacher, and what it says of the labelled samples."""

    task: str
    knowledge: Knowledge
    seed: int

    @property
    def label(self) -> str:
        """`fashion-10, teacher few, itself, seed 3`."""
        return f"{self.task}, teacher {self.knowledge}, itself, seed {self.seed}"

    @property
    def place(self) -> str:
        """Folder below the root."""
        return f"{self.task}/cells/teacher-{self.knowledge}/itself/seed-{self.seed}"

    @property
    def parts(self) -> list[object]:
        """What decides it besides task and seed."""
        return ["teacher"]


@dataclass(frozen=True)
class StudentCell:
    """The training of a student. knowledge: None without a teacher. tuning: it only chooses hyper-parameters."""

    task: str
    knowledge: Knowledge | None
    arm: Arm
    seed: int
    choice: Choice
    tuning: bool = False

    @property
    def label(self) -> str:
        """`fashion-10, teacher few, TGT random, seed 3`."""
        teacher = "no teacher" if self.knowledge is None else f"teacher {self.knowledge}"
        how = f", tuning {_words(self.choice)}" if self.tuning else ""
        return f"{self.task}, {teacher}, {self.arm.name}{how}, seed {self.seed}"

    @property
    def place(self) -> str:
        """Folder below the root."""
        teacher = "no-teacher" if self.knowledge is None else f"teacher-{self.knowledge}"
        arm = self.arm.name.replace(",", "").replace(" ", "-")
        if self.tuning:
            return f"{self.task}/tuning/{arm}/{_words(self.choice).replace(' ', '-')}"
        return f"{self.task}/cells/{teacher}/{arm}/seed-{self.seed}"

    @property
    def parts(self) -> list[object]:
        """What decides it besides task and seed."""
        if self.arm.kind is None:
            return ["student", None]
        choice = asdict(self.choice)
        choice["sigmas"] = {kind: sigma for kind, sigma in self.choice.sigmas.items() if kind == self.arm.kind}
        return ["student", self.arm.kind, self.arm.around, dict(self.arm.settings), choice]

    @property
    def after(self) -> TeacherCell | None:
        """What must be finished before it."""
        return None if self.knowledge is None else TeacherCell(self.task, self.knowledge, self.seed)


Cell = TeacherCell | StudentCell


def _words(choice: Choice) -> str:
    radius = "".join(f" sigma {sigma:g}" for sigma in choice.sigmas.values())
    return f"tau {choice.tau:g} hard {choice.hard_weight:g} weight {choice.weight:g}{radius}"


class Store:
    """The finished cells of a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def task(self, name: str) -> Task:
        """The task of that name, opened once."""
        return open_task(name, self.root)

    def key(self, cell: Cell) -> str:
        """Hash of everything that decides a cell."""
        task = self.task(cell.task)
        further: list[object] = []
        if isinstance(cell, StudentCell) and cell.arm.kind is not None:
            section = task.section(cell.arm, cell.choice)
            further = [section]
        shared = task.key(cell.knowledge, cell.seed)
        return artifact.content_key(KIND, FORM, TRAINING_FORM, shared, cell.parts, further)

    def is_done(self, cell: Cell) -> bool:
        """Whether it is finished, as it is asked for now."""
        return artifact.current(self.root / cell.place, KIND, self.key(cell)) is not None

    def read(self, cell: Cell) -> dict[str, Any]:
        """What a finished one found: see `make`."""
        found: dict[str, Any] = json.loads((self.root / cell.place / _CELL_FILE).read_text(encoding="utf-8"))
        return found

    def logits(self, cell: Cell) -> Array:
        """(N_test, C) float32 class logits of a finished one."""
        stored: Array = np.load(self.root / cell.place / _LOGITS_FILE)
        return stored

    def picture(self, cell: Cell) -> Path:
        """Explored samples at three radii, of a finished cell of seed 0 that explores."""
        return self.root / cell.place / _PICTURE_FILE


# -- the plan ---------------------------------------------------------------------------------------------------------


def tuning_cells(task: Task) -> list[StudentCell]:
    """KD with every combination of the shared hyper-parameters, teacher "all", seed 0."""
    combinations = itertools.product(task.taus, task.hard_weights, task.weights)
    return [StudentCell(task.name, "all", KD, TUNING_SEED, Choice(*values), tuning=True) for values in combinations]


def sigma_cells(task: Task, choice: Choice) -> list[StudentCell]:
    """Every kind that explores with every radius, the rest as chosen."""
    arms = [arm for arm in task.arms if arm.explores and arm.main and task.sigmas]
    return [
        StudentCell(
            task.name,
            "all",
            arm,
            TUNING_SEED,
            Choice(choice.tau, choice.hard_weight, choice.weight, {str(arm.kind): sigma}),
            tuning=True,
        )
        for arm in arms
        for sigma in task.sigmas
    ]


def best(scores: Mapping[StudentCell, float], cells: Sequence[StudentCell]) -> StudentCell | None:
    """The cell with the highest validation accuracy, the first of equals; None: some are missing."""
    if not cells or any(cell not in scores for cell in cells):
        return None
    return max(cells, key=lambda cell: (scores[cell], -cells.index(cell)))


def choose(task: Task, scores: Mapping[StudentCell, float]) -> tuple[Choice | None, list[StudentCell]]:
    """The choice, None while cells are missing, and all cells that it takes as far as they are known."""
    shared = tuning_cells(task)
    found = best(scores, shared)
    if found is None:
        return None, shared
    radii = sigma_cells(task, found.choice)
    sigmas: dict[str, float] = {}
    for kind in dict.fromkeys(str(cell.arm.kind) for cell in radii):
        chosen = best(scores, [cell for cell in radii if cell.arm.kind == kind])
        if chosen is None:
            return None, [*shared, *radii]
        sigmas |= chosen.choice.sigmas
    choice = Choice(found.choice.tau, found.choice.hard_weight, found.choice.weight, sigmas)
    return choice, [*shared, *radii]


def grid(tasks: Sequence[Task], choices: Mapping[str, Choice | None], seeds: int) -> list[Cell]:
    """All cells in the order in which they run, so that an early end leaves whole comparisons.

    Teacher "all" before teacher "few", tasks of group 0 before those of group 1, then seed by seed, each with all main
    arms of all tasks of the group; single choices last. A task whose hyper-parameters are not chosen yet has no
    distilled students here, see `unchosen`.
    """
    found: list[Cell] = []
    groups = sorted({task.group for task in tasks})
    knowledges: tuple[Knowledge, ...] = ("all", "few")
    for main in (True, False):
        for knowledge in knowledges if main else knowledges[:1]:
            for group, seed in itertools.product(groups, range(seeds)):
                for task in (each for each in tasks if each.group == group):
                    found += _of_seed(task, choices.get(task.tuned_on), knowledge, seed, main)
    return list(dict.fromkeys(found))


def _of_seed(task: Task, choice: Choice | None, knowledge: Knowledge, seed: int, main: bool) -> list[Cell]:
    arms = [arm for arm in task.arms if arm.main == main]
    found: list[Cell] = []
    for arm in arms:
        if arm.kind is None:
            found.append(StudentCell(task.name, None, arm, seed, _NOTHING))
        else:
            found.append(TeacherCell(task.name, knowledge, seed))
            found.append(StudentCell(task.name, knowledge, arm, seed, choice or _NOTHING))
    return found


_NOTHING = Choice(1.0, 1.0, 1.0, {"random": 1.0, "gradient": 1.0})
"""Stands where validation has not chosen yet, or there is nothing to choose."""


# -- one cell ---------------------------------------------------------------------------------------------------------


def make(cell: Cell, root: Path) -> None:
    """Trains a cell, going on from its checkpoint, judges it on the test split and keeps that.

    Raises:
        EdgestillError: anything that went wrong in it; Interrupted after SIGINT.
    """
    store = Store(root)
    task = store.task(cell.task)
    if isinstance(cell, TeacherCell):
        started = time.perf_counter()
        if cell.knowledge == "few":
            task.make_teacher(cell.seed)
        logits = task.cache(cell.knowledge, cell.seed).test_logits
        assert logits is not None
        seconds = time.perf_counter() - started
        _keep(store, cell, np.array(logits, dtype=np.float32), {"seconds": seconds})
    else:
        _make_student(store, cell, task)


def _make_student(store: Store, cell: StudentCell, task: Task) -> None:
    dataset, arm, choice = task.dataset(cell.seed), cell.arm, cell.choice
    student = task.student(cell.seed)
    section = task.section(arm, choice)
    objective_section: AnyObjective = SupervisedSection()
    cached, strategy, hard_weight = None, None, None
    folder = store.root / (cell.place + ".training")
    started = time.perf_counter()
    if section is not None:
        assert cell.knowledge is not None
        objective_section, hard_weight = KDSection(tau=choice.tau), choice.hard_weight
        cached = task.cache(cell.knowledge, cell.seed)
        strategy = task.exploration(section, cell.knowledge, cell.seed, store.root / (cell.place + ".generated"))
    before = time.perf_counter() - started
    objective = build_objective(
        (objective_section,),
        dataset,
        cached,
        student_dim=student.embedding_dim,
        hard_weight=hard_weight,
        seed=cell.seed,
    )
    result = train(
        student,
        objective,
        dataset,
        cached,
        task.train,
        ONE_VIEW,
        folder,
        seed=cell.seed,
        device="cpu",
        strategy=strategy,
    )
    logits = evaluate_logits(student, objective, dataset.test, device="cpu").astype(np.float32)
    found = {
        "validation": result.metric.value,
        "seconds": result.seconds,
        "seconds_before": before,
        "steps": result.epochs * (len(dataset.train) // min(task.train.batch_size, len(dataset.train))),
        "epochs": result.epochs,
        "hard_weight": result.hard_weight,
        "threads": torch.get_num_threads(),
        "explored": _explored(result.history),
    }
    picture = None
    if strategy is not None and arm.explores and cell.seed == TUNING_SEED and not cell.tuning and task.sigmas:

        def picture(path: Path) -> None:
            strategy.picture(path, student, objective)

    _keep(store, cell, logits, found, picture)
    shutil.rmtree(folder, ignore_errors=True)


def _explored(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each figure of the exploration, its mean over the epochs."""
    names = sorted({name for record in history for name in record if name.startswith("explore/")})
    values = {name: [record[name] for record in history if name in record] for name in names}
    return {name: float(np.mean(each)) for name, each in values.items()}


def _keep(
    store: Store,
    cell: Cell,
    logits: Array,
    found: Mapping[str, Any],
    picture: Callable[[Path], None] | None = None,
) -> None:
    """Writes what a cell says; with this it is finished."""
    labels = store.task(cell.task).dataset(cell.seed).test.labels
    told = {**found, "test": float((logits.argmax(1) == labels).mean())}
    with artifact.create(store.root / cell.place, KIND, store.key(cell), {}) as temporary:
        artifact.write_text(temporary / _CELL_FILE, json.dumps(told, indent=1) + "\n")
        np.save(temporary / _LOGITS_FILE, logits)
        if picture is not None:
            picture(temporary / _PICTURE_FILE)


# -- processes --------------------------------------------------------------------------------------------------------


def _start() -> None:
    """In a worker: Ctrl-C comes from the parent alone, once, and only a training listens to it."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _work(cell: Cell, root: Path) -> tuple[str, float]:
    """In a worker: what went wrong ("" for nothing, "stopped"), and the seconds it took."""
    started = time.perf_counter()
    try:
        make(cell, root)
    except Interrupted:
        return "stopped", time.perf_counter() - started
    except Exception as error:  # one cell that fails must not take the others with it
        return f"{type(error).__name__}: {error}", time.perf_counter() - started
    return "", time.perf_counter() - started


def ready(waiting: Sequence[Cell], missing: frozenset[Cell]) -> Cell | None:
    """The first cell whose teacher is not among the missing."""
    return next((cell for cell in waiting if isinstance(cell, TeacherCell) or cell.after not in missing), None)


def run(left: Sequence[Cell], root: Path, jobs: int, deadline: float) -> dict[str, str]:
    """Trains cells in so many processes until all are done or `time.monotonic()` reaches the deadline.

    At the deadline, and at Ctrl-C, what is being trained writes its checkpoint; the same call goes on from it.

    Returns:
        The labels of the cells that failed, and why.

    Raises:
        KeyboardInterrupt: after the workers have ended.
    """
    failures: dict[str, str] = {}
    if not left or time.monotonic() >= deadline:
        return failures
    waiting, running = list(left), dict[Future[tuple[str, float]], Cell]()
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while len(running) < jobs:
                cell = ready(waiting, frozenset([*waiting, *running.values()]))
                if cell is None:
                    break
                waiting.remove(cell)
                running[pool.submit(_work, cell, root)] = cell
            if not running:
                break
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                cell = running.pop(future)
                error, spent = future.result()
                print(f"{cell.label}: {error or 'done'}, {spent:.0f} s", file=sys.stderr, flush=True)
                if error and error != "stopped":
                    failures[cell.label] = error
                    # its students would fail for the same reason
                    waiting = [each for each in waiting if isinstance(each, TeacherCell) or each.after != cell]
    except BrokenProcessPool as error:
        failures |= dict.fromkeys((cell.label for cell in running.values()), f"a worker ended: {error}")
        running.clear()
    finally:
        _stop(pool, running)
        signal.signal(signal.SIGTERM, before)
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
