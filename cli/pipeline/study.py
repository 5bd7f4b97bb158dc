"""A study: the cells of a grid trained resumably, in this process or several, and what they say together.

    methods = {"objective": ["supervised", "kd"]}
    report = Study(load_recipe("quickstart"), Path("runs/quickstart-study"), vary=methods).run()

Data split, teacher and cache are made once, with the recipe's seed, for the recipe's own training split or a larger one
that is asked for; smaller sizes are nested, class-stratified subsets of it. Every size of a long tail has data and
teacher of its own. The seed of a cell changes the student's initial weights, the order of the samples and the
objectives' parameters, nothing else.

A finished cell is used again while its key is the same: a hash of the data, of the teacher's outputs, of the untrained
student and of everything in the recipe that decides a training.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cli.pipeline.exploration import (
    Explored,
    check_explored,
    open_explored,
    subclasses_of,
    together,
)
from cli.pipeline.run import SUPERVISED, Run
from cli.pipeline.teachers import (
    START_KIND,
    check_held_out,
    check_strategy,
    coach,
    inherit,
    plain_student,
    plain_values,
    pool_kind,
    pool_like,
    start_of,
    told_shapes,
)
from cli.recipe import LoadedRecipe, Recipe
from cli.report.study_schema import CellResult, TuningRow
from cli.search import check_trials
from cli.study_grid import Combination, build_grid, short_key, shown
from distill.data import Dataset, InputSpec
from distill.data.dataset import subset
from distill.data.labels import Labels
from distill.data.load import KIND as DATA_KIND
from distill.data.load import open_dataset
from distill.data.splits import nested_order
from distill.distribution import default_device
from distill.networks import fingerprint
from distill.objectives.compose import Composition, build_objective, head_size
from distill.objectives.section import AnyObjective, check_data
from distill.objectives.subclass import retrained_for
from distill.resident import Resident
from distill.strategy import Strategy
from distill.students import Student, build_student, default_arch, load_student
from distill.students.section import StudentSection, torch_word
from distill.teachers import ModuleTeacher, SubclassCache, Teacher, TeacherCache, load_teacher, open_cache
from distill.teachers.cache import CacheParts
from distill.teachers.subset import cache_rows
from distill.train_section import TrainSection
from distill.training import FORM as TRAINING_FORM
from distill.training import TrainResult, evaluate_logits, train
from profiles import artifact
from profiles.errors import EdgestillError, InputError, Interrupted
from profiles.metrics import evaluate
from profiles.progress import Progress, Silent, Task

if TYPE_CHECKING:
    from cli.pipeline.tune import Tuning
    from distill.strategies.coached import Coached

KIND = "study cell"
_FORM = 1
"""Raise when the way a cell is made changes, so that older cells are made anew."""
_CELL_FILE = "cell.json"
_LOGITS_FILE = "test_logits.npy"
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
"""How long workers get to write their checkpoints after Ctrl-C."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One training of the grid: a method, a value of every factor, a seed. folder: of its artefact."""

    combination: Combination
    seed: int
    folder: Path

    @property
    def label(self) -> str:
        """`kd, train_size=500, seed 3`."""
        return f"{self.combination.label}, seed {self.seed}"

    def read(self) -> CellResult:
        """The stored result.

        Raises:
            InputError: the cell is not finished.
        """
        artifact.read_manifest(self.folder, KIND)
        return CellResult.model_validate_json((self.folder / _CELL_FILE).read_text(encoding="utf-8"))

    def logits(self) -> np.ndarray[Any, Any]:
        """(N_test, C) float32 class logits on the test split, mapped from disk."""
        stored: np.ndarray[Any, Any] = np.load(self.folder / _LOGITS_FILE, mmap_mode="r", allow_pickle=False)
        return stored


class _Untrained(NamedTuple):
    """A student before its training.

    key: hash of its weights; of a network of the user's own, the code of its classes counts, too, since the weights do
    not tell what is done with them.
    """

    key: str
    embedding_dim: int


@dataclass(frozen=True)
class Failure:
    """A cell that could not be trained, and why."""

    label: str
    error: str


@dataclass(frozen=True)
class Start:
    """A teacher that a process loads: from which a coached one starts, or which labels further inputs.

    key: its own. seed: the recipe's. trained: folder, arch and outputs per class of one that was trained here; None: it
    is loaded as the recipe says.
    """

    key: str
    seed: int
    trained: tuple[Path, str, int] | None = None


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to train one cell; small enough to be sent to another one.

    rows: training samples, None for all. cache: folder, parts and subclasses per class (None: a plain cache) of the
    teacher's outputs, None where no objective needs a teacher. settings: hash of the recipe's keys alone, by which a
    dry run knows a finished cell without loading anything. tuning: the cell is not trained but tuned. row_seed: of the
    choice of `rows`; view_seed: of the augmented views. base_run: folder and `base_key` of the run that owns data,
    teacher and cache. coached: from what the teacher starts that learns along with the student; None: it stands still.
    shared: folder of what the student starts from that the teacher's pool has of it; None: it starts afresh. labeller:
    the frozen teacher that labels further inputs. explored: what there is to explore with; None: nothing.
    """

    cell: Cell
    key: str
    settings: str
    data: Path
    rows: int | None
    cache: tuple[Path, CacheParts, int | None] | None
    arch: str | None
    view_seed: int
    base: Path
    allow_code: bool
    keep_student: bool
    tuning: Tuning | None = None
    row_seed: int = 0
    base_run: tuple[str, str] = ("", "")
    coached: Start | None = None
    shared: Path | None = None
    labeller: Start | None = None
    explored: Explored | None = None

    @property
    def label(self) -> str:
        """`kd, train_size=500, seed 3`, or `kd, train_size=500, tuning`."""
        return self.cell.label if self.tuning is None else f"{self.cell.combination.label}, tuning"

    @property
    def samples(self) -> int:
        """Samples that the training passes through, or all trainings of the tuning that are left."""
        rows = self.rows or len(_whole(self.data, _written(self.data)).train)
        trainings = 1 if self.tuning is None else self.tuning.left
        return rows * self.cell.combination.recipe.train.resolved(rows).epochs * trainings


class Study:
    """A grid of trainings in one folder.

    Args:
        loaded: the recipe; its `[study]` says what to compare.
        folder: of the study: `base/` (data, teacher, cache), `cells/`, `study.json`.
        seeds: replaces the recipe's number of seeds.
        vary: replaces the values of these keys; texts `KEY=V1,V2`, or keys with their values.
        control: replaces the recipe's control.
        jobs: processes that train at the same time.
        progress: shows the work.
        allow_code: the user allowed the recipe to import code by dotted path.
        keep_students: keep every cell's trained student.
        replace_others: make anew what the folder holds with other settings; without it, that is refused.
        tune: trials of the tuning of every combination, which come before the cells; None: as the recipe says.

    Raises:
        InputError: see `build_grid` and `check_strategy`; tuning without Optuna.
    """

    def __init__(
        self,
        loaded: LoadedRecipe,
        folder: Path,
        *,
        seeds: int | None = None,
        vary: Sequence[str] | Mapping[str, Sequence[Any]] = (),
        control: str | None = None,
        jobs: int = 1,
        progress: Progress | None = None,
        allow_code: bool = False,
        keep_students: bool = False,
        replace_others: bool = False,
        tune: int | None = None,
    ) -> None:
        if jobs < 1:
            raise InputError(f"{jobs} jobs", where="--jobs", fix="--jobs 1")
        self.trials = loaded.recipe.study.tune if tune is None else tune
        if self.trials is not None:
            check_trials(self.trials)
        self.loaded, self.folder = loaded, folder
        self.grid = build_grid(loaded, vary=vary, seeds=seeds, control=control)
        for combination in self.grid.combinations:
            if not combination.is_plain:
                with _named(combination.label):
                    check_strategy(combination.recipe)
                    check_explored(combination.recipe)
        self.jobs = jobs
        self.progress: Progress = progress or Silent()
        self.allow_code, self.keep_students, self.replace_others = allow_code, keep_students, replace_others
        self.failures: list[Failure] = []
        self.notes: list[str] = []
        self.started = time.time()
        self.tuning: tuple[TuningRow, ...] = ()
        self.cells = self._cells()
        self._bases: dict[str, Run] = {}
        self._keys: dict[Path, str] | None = None
        self._tuned: frozenset[str] | None = None
        self._students: dict[tuple[str, InputSpec, int], _Untrained] = {}

    def run(self) -> Any:
        """Trains what is missing, writes study.json and returns what it says (a `StudyReport`).

        Raises:
            InputError: what the data or the teacher cannot serve; told before anything is trained.
            Interrupted: Ctrl-C; the same call goes on.
        """
        from cli.pipeline.study_report import build_study_report

        self.train()
        report = build_study_report(self)
        with artifact.explain_os_errors(self.folder):
            artifact.write_text(self.folder / "study.json", report.model_dump_json(indent=2) + "\n")
        return report

    def train(self) -> None:
        """Tunes where that is asked for, then trains every cell that is not finished; `failures` names what failed."""
        jobs = self.prepare()
        if self.trials is not None:
            from cli.pipeline.tune import tune_study

            self._try_to_build(jobs)
            tuned = tune_study(self)
            jobs = self._jobs([cell for cell in self.cells if cell.combination in tuned])
        left = [job for job in jobs if artifact.current(job.cell.folder, KIND, job.key) is None]
        self._try_to_build(left)
        if len(left) < len(jobs):
            self.progress.note(f"{len(jobs) - len(left)} of {len(jobs)} cells are done already")
        if not left:
            return
        done = len(jobs) - len(left)
        self.work(left, done, len(jobs), "cells")

    def work(self, left: Sequence[Job], done: int, count: int, things: str) -> None:
        """Does the jobs here, or in several processes; `done` of `count` things need nothing. See `failures`."""
        with _Bar(self.progress, sum(job.samples for job in left), done, count, things) as bar:
            if min(self.jobs, len(left)) == 1:
                self._train_here(left, bar)
            else:
                self._train_in_processes(left, bar)

    def use(self, combinations: Sequence[Combination], tuned: Sequence[TuningRow]) -> None:
        """Replaces the combinations by the same ones with tuned settings; `tuned`: the tunings that are finished."""
        self.tuning = tuple(tuned)
        names = [(row.method, row.factors) for row in tuned]
        self._tuned = frozenset(one.label for one in combinations if (one.method, one.factors) in names)
        self.grid = replace(self.grid, combinations=tuple(combinations))
        self.cells = self._cells()

    def finished(self) -> dict[Cell, CellResult]:
        """The cells that are done, whatever else is in their folders.

        A cell counts when it has the key of its job. Before `prepare`, when neither data nor teacher may be loaded, it
        counts when it was made with the same settings; whether the data itself has changed is not looked at then.
        """
        if self.trials is not None and self._tuned is None:
            from cli.pipeline.tune import look

            look(self)
        return {cell: cell.read() for cell in self.cells if self._is_done(cell)}

    def _is_done(self, cell: Cell) -> bool:
        if self.trials is not None and cell.combination.label not in (self._tuned or ()):
            return False  # its settings are not known yet
        if self._keys is not None:
            key = self._keys.get(cell.folder)
            return key is not None and artifact.current(cell.folder, KIND, key) is not None
        try:
            manifest = artifact.read_manifest(cell.folder, KIND)
        except InputError:
            return False
        same = manifest.info.get("settings") == self.settings_key(cell.combination, cell.seed)
        return same and artifact.current(cell.folder, KIND, manifest.key) is not None

    def prepare(self) -> list[Job]:
        """Checks everything that can be checked, then makes data, teachers and caches; one job per cell, done or not.

        Raises:
            InputError: objectives, students or sizes that do not fit data or teacher.
        """
        self._refuse_other_settings()
        with artifact.explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        runs = {id(run): run for run in map(self.base, self.grid.combinations)}
        sizes = {each: _train_samples(run) for each, run in runs.items()}
        for run in runs.values():
            run.prepare_folder()
        for combination in self.grid.combinations:
            with _named(combination.label):
                self._check(combination)
        for each, run in runs.items():
            self._tell_what_is_lost(run, sizes[each])
        return self._jobs(self.cells)

    def _refuse_other_settings(self) -> None:
        """Keeps finished trainings of other settings, and their teacher, from being replaced by a quick look.

        Raises:
            InputError: the folder holds such, and `replace_others` is not set.
        """
        if self.replace_others:
            return
        bases = {run.folder.name: self.base_key(run) for run in map(self.base, self.grid.combinations)}
        asked = {} if self.trials is not None else {cell.folder: cell for cell in self.cells}
        others = []
        for path in sorted(self.folder.glob(f"cells*/*/seed-*/{artifact.MANIFEST}")):
            with contextlib.suppress(InputError):  # a broken one is made anew
                info = artifact.read_manifest(path.parent, KIND).info
                cell = asked.get(path.parent)
                place, base = info.get("base", ("", ""))
                same = cell is None or info.get("settings") == self.settings_key(cell.combination, cell.seed)
                if not same or bases.get(place, base) != base:
                    others.append(f"{path.parent.parent.name}/{path.parent.name}")
        if others:
            raise InputError(
                f"{self.folder} holds finished trainings with other settings, which this study would replace",
                where="--out",
                evidence=f"{len(others)} of them, the first is {others[0]}",
                fix="--out ANOTHER_FOLDER, or --replace to make them anew",
            )

    @staticmethod
    def base_key(run: Run) -> str:
        """Hash of everything in the recipe that decides data, teacher and cache of a base run."""
        recipe = run.recipe
        return artifact.content_key(
            recipe.data, plain_values(recipe.teacher), recipe.train, plain_student(recipe.student), recipe.seed
        )

    def _jobs(self, cells: Sequence[Cell]) -> list[Job]:
        """One job per cell; what `finished` knows from then on."""
        jobs = [self.job(cell.combination, cell.seed, cell.folder) for cell in cells]
        self._keys = {job.cell.folder: job.key for job in jobs}
        return jobs

    def _tell_what_is_lost(self, run: Run, before: int | None) -> None:
        """Notes how much is made anew because a training split of another size than before has another teacher."""
        now = len(run.dataset.train)
        if before is None or before == now:
            return
        cells = [cell for cell in self.cells if self.base(cell.combination) is run]
        done = sum((cell.folder / artifact.MANIFEST).is_file() for cell in cells)
        trials = sum(
            len([*(self.folder / "tuning" / slug).glob(f"trial-*/{artifact.MANIFEST}")])
            for combination, slug in zip(self.grid.combinations, self.slugs(), strict=True)
            if self.trials is not None and self.base(combination) is run
        )
        found = [f"{count} finished {thing}" for count, thing in ((done, "cells"), (trials, "tuning trials")) if count]
        if found:
            size = f"a {'smaller' if before < now else 'larger'} training split ({before:,} samples, now {now:,})"
            self.progress.note(f"{' and '.join(found)} belong to {size} and are made anew")

    # -- data and teachers -------------------------------------------------------------------------------------------

    def base(self, combination: Combination) -> Run:
        """The run that owns data, teacher and cache of a combination.

        They are made for the recipe's own training split, or a larger one that a combination asks for: the student of
        few samples learns from the teacher that there is. A long tail is thinned out of what train_size leaves and is
        no part of a larger one, so there every size has a run of its own. A generic teacher is made once for every kind
        of students, since a pool holds one kind.
        """
        recipe, own = combination.recipe, self.loaded.recipe
        name = _base_key(recipe)
        if name not in self._bases:
            fitting = [other.recipe for other in self.grid.combinations if _base_key(other.recipe) == name]
            sizes = [each.data.train_size for each in (*fitting, recipe, own)]
            largest = None if None in sizes else max(size for size in sizes if size is not None)
            if recipe.data.imbalance is not None:
                largest = recipe.data.train_size
            changes: dict[str, Any] = {
                "data": recipe.data.model_copy(update={"train_size": largest}),
                "teacher": start_of(recipe.teacher),
                "seed": recipe.seed,
                "objective": (SUPERVISED,),
            }
            place = "base" if name == _base_key(own) else f"base-{name[:8]}"
            run = Run(
                replace(self.loaded, recipe=own.model_copy(update=changes)),
                self.folder / place,
                progress=self.progress,
                allow_code=self.allow_code,
                pool_like=pool_like(recipe, own),
            )
            run.explorer.shares = True
            self._bases[name] = run
        return self._bases[name]

    def _check(self, combination: Combination) -> None:
        """Refuses what cannot work before any teacher is trained."""
        recipe, run = combination.recipe, self.base(combination)
        dataset, rows = run.dataset, part_size(recipe)
        if rows is not None and rows > len(dataset.train):
            raise InputError(
                f"train_size = {rows} is more than there is",
                where="data.train_size",
                evidence=f"{len(dataset.train)} training samples",
                fix=f"data.train_size = {len(dataset.train)} or less",
            )
        if rows is not None and rows < len(dataset.classes) and dataset.task == "multiclass":
            raise InputError(
                f"{rows} training samples for {len(dataset.classes)} classes",
                where="data.train_size",
                fix=f"data.train_size of {len(dataset.classes)} or more",
            )
        moves = combination.is_coached
        if not combination.is_plain:
            word = self.student_word(combination)
            run.check_teacher_strategy(word)
            if recipe.teacher.strategy == "generic" and word not in map(str, run.pool):
                self._say_once(f"{word} is not in the pool of its generic teacher, which was not conditioned on it")
        check_explored(recipe, dataset)
        run.check_objectives(recipe.objective, moves=moves)
        run.check_explored_teacher(recipe)
        run.explorer.prepare(recipe.explore, self._chosen(combination))
        check_data(recipe.objective, dataset.task, len(dataset.classes), rows or len(dataset.train))
        run.check_objectives(recipe.objective, self._untrained(combination, 0).embedding_dim, moves=moves)
        if moves:
            chosen = self._chosen(combination)
            part = dataset if chosen is None else subset(dataset, chosen)
            for seed in range(self.grid.seeds):
                check_held_out(recipe.teacher, part, seed)
            if recipe.teacher.kind != "train":
                coach(recipe.teacher, run.start_for(recipe.objective, self.student_word(combination)), dataset)

    def _say_once(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            self.progress.note(note)

    def _chosen(self, combination: Combination) -> np.ndarray[Any, Any] | None:
        """Rows of the training split that a combination learns on, sorted; None: all."""
        run, recipe = self.base(combination), combination.recipe
        rows = part_size(recipe)
        if rows is None or rows == len(run.dataset.train):
            return None
        return _rows(run.folder / "data", rows, _row_seed(recipe))

    def _arch(self, combination: Combination) -> str | None:
        """The recipe's student, else that of its first target; None for a student of the user's own."""
        recipe, run = combination.recipe, self.base(combination)
        section = recipe.student
        if section.kind == "torch":
            return None
        own = section.arch or recipe.target[0].arch
        return own or default_arch(section.family, run.targets[0].size_class, run.dataset.input)

    def student_word(self, combination: Combination) -> str:
        """What the student of a combination is called."""
        return self._arch(combination) or torch_word(combination.recipe.student)

    def _untrained(self, combination: Combination, seed: int) -> _Untrained:
        """The student that a cell starts from, built once for all cells of one student and seed."""
        recipe, dataset, arch = combination.recipe, self.base(combination).dataset, self._arch(combination)
        size = head_size(recipe.objective, len(dataset.classes))
        name = (artifact.content_key(recipe.student, arch, size), dataset.input, seed)
        if name not in self._students:
            student = _build(recipe, dataset, arch, seed, self.loaded.base, self.allow_code)
            code = _code_of(student.get_submodule("body.network")) if recipe.student.kind == "torch" else None
            key = artifact.content_key(student.arch, fingerprint(student), code)
            self._students[name] = _Untrained(key, student.embedding_dim)
        return self._students[name]

    def job(self, combination: Combination, seed: int, folder: Path) -> Job:
        """What a process needs to train this cell; makes teacher and cache where they are missing."""
        recipe, run = combination.recipe, self.base(combination)
        arch, moves, name = self._arch(combination), combination.is_coached, self.student_word(combination)
        cache = run.cache_for(recipe.objective, name, moves=moves)
        chosen, row_seed = self._chosen(combination), _row_seed(recipe)
        rows = None if chosen is None else len(chosen)
        place = None
        if cache is not None:
            place = (cache.folder, cache.parts, cache.subclasses if isinstance(cache, SubclassCache) else None)
        data = run.folder / "data"
        start = self._start(combination, name) if moves or combination.explores else None
        explored = None
        if combination.explores and start is not None:
            explored = self._explored(combination, name, chosen)
        shared = run.shared_weights(recipe.objective, name)
        # only where there is one, so that all other cells keep their key
        learning: list[Any] = []
        if start is not None and moves:
            learning += [recipe.teacher.strategy, recipe.teacher.coached, recipe.teacher.held_out, start.key]
        if shared is not None:
            learning += ["inherit", artifact.read_manifest(shared, START_KIND).key]
        if start is not None and explored is not None:
            learning += ["explore", recipe.explore.hashed, start.key, explored.key]
        section = _train_section(combination).resolved(rows or len(run.dataset.train))
        key = artifact.content_key(
            KIND,
            _FORM,
            TRAINING_FORM,
            run.dataset.key,
            None if cache is None else cache.key,
            chosen,
            list(recipe.objective),
            section.model_dump(mode="json", exclude={"checkpoint_every", "tensorboard"}),
            recipe.data.augment,
            plain_student(recipe.student),
            self._untrained(combination, seed).key,
            seed,
            recipe.seed,
            *learning,
        )
        return Job(
            cell=Cell(combination, seed, folder),
            key=key,
            settings=self.settings_key(combination, seed),
            data=data,
            rows=rows,
            cache=place,
            arch=arch,
            view_seed=recipe.seed,
            base=self.loaded.base,
            allow_code=self.allow_code,
            keep_student=self.keep_students,
            row_seed=row_seed,
            base_run=(run.folder.name, self.base_key(run)),
            coached=start if moves else None,
            shared=shared,
            labeller=None if moves else start,
            explored=explored,
        )

    def _start(self, combination: Combination, arch: str) -> Start:
        """From what a coached teacher starts, or who labels further inputs; trained where it is missing."""
        run, recipe = self.base(combination), combination.recipe
        teacher, variant = run.start_for(recipe.objective, arch), run.variant(recipe.objective, arch)
        trained = run.trained.get(("teacher", variant.folder))
        place = None
        if trained is not None:
            place = (run.folder / variant.folder, trained.student.arch, subclasses_of(variant) or 1)
        return Start(teacher.key, recipe.seed, place)

    def _explored(self, combination: Combination, arch: str, rows: np.ndarray[Any, Any] | None) -> Explored:
        """What a combination explores with; made where it is missing. rows: of the training split; None: all."""
        run, recipe = self.base(combination), combination.recipe
        teacher, variant = run.start_for(recipe.objective, arch), run.variant(recipe.objective, arch)
        return run.explorer.explored(recipe.explore, teacher, variant, rows)

    def settings_key(self, combination: Combination, seed: int) -> str:
        """Hash of everything in the recipe that decides a cell."""
        recipe, run = combination.recipe, self.base(combination)
        base = run.recipe
        # the arch that these stand for depends on the kind of data besides, which follows from the section
        student = (plain_student(recipe.student), recipe.target[0].arch, run.targets[0].size_class)
        return artifact.content_key(
            *(_FORM, TRAINING_FORM, recipe.data, base.data, plain_values(recipe.teacher), *student),
            list(recipe.objective),
            *(_train_section(combination), base.train, plain_student(base.student), recipe.seed, seed),
            # only where there is one, so that all other cells keep theirs
            *([recipe.explore.hashed] if combination.explores else []),
        )

    def _try_to_build(self, jobs: Sequence[Job]) -> None:
        """Builds every objective once, so that what only shows beside the teacher's outputs is told before training.

        Objectives that split the classes along the teacher's embedding are fitted, too, on the fewest samples that they
        get: too few vary in too few directions.
        """
        first: dict[str, Job] = {}
        for job in jobs:
            first.setdefault(job.cell.combination.label, job)
        fewest: dict[str, str] = {}
        for label, job in sorted(first.items(), key=lambda item: item[1].rows or math.inf):
            sections = job.cell.combination.recipe.objective
            if _splits_classes(sections):
                fewest.setdefault(artifact.content_key(str(job.data), list(sections)), label)
        for label, job in first.items():
            with _named(label):
                dataset, cache, _, objective = _modules(job)
                if label in fewest.values():
                    device, augment = torch.device("cpu"), job.cell.combination.recipe.data.augment
                    data = Resident(dataset, cache, augment, job.cell.seed, job.view_seed, device)
                    objective.prepare(data.fit_data(device))

    def _cells(self) -> tuple[Cell, ...]:
        """Tuned cells have a folder of their own, so that a study keeps those with the defaults beside them."""
        folder = self.folder / ("cells" if self.trials is None else "cells-tuned")
        return tuple(
            Cell(combination, seed, folder / slug / f"seed-{seed}")
            for seed in range(self.grid.seeds)
            for combination, slug in zip(self.grid.combinations, self.slugs(), strict=True)
        )

    def slugs(self) -> list[str]:
        """One folder name per combination."""
        slugs = [
            "--".join(
                [_slug(one.method), *(_slug(f"{short_key(key)}={shown(value)}") for key, value in one.factors.items())]
            )
            for one in self.grid.combinations
        ]
        for one, slug in zip(self.grid.combinations, slugs, strict=True):
            if slugs.count(slug) > 1:
                raise InputError(
                    f"{one.label} would share the folder {slug} with another", where="study", fix="another name"
                )
        return slugs

    # -- training ----------------------------------------------------------------------------------------------------

    def _train_here(self, jobs: Sequence[Job], bar: _Bar) -> None:
        for job in jobs:
            bar.start()
            try:
                _do(job, bar)
            except Interrupted as error:
                raise self._interrupted() from error
            except KeyboardInterrupt as error:
                raise self._interrupted() from error
            except Exception as error:  # one cell that fails must not take the others with it
                self._failed(job.label, _words(error))
            bar.finish(job)

    def _train_in_processes(self, jobs: Sequence[Job], bar: _Bar) -> None:
        """As many jobs in flight as processes, so that none starts after Ctrl-C."""
        context = multiprocessing.get_context("spawn")
        count = min(self.jobs, len(jobs))
        stop, passed = context.Event(), context.Value("q", 0)
        threads = max(1, min(torch.get_num_threads(), _cores() // count))
        pool = ProcessPoolExecutor(
            count, mp_context=context, initializer=_start_worker, initargs=(threads, stop, passed, list(sys.path))
        )
        waiting, running = list(jobs), dict[Future[str | None], Job]()
        seen = 0
        with _handled(signal.SIGTERM, _interrupt):
            try:
                while waiting or running:
                    while waiting and len(running) < count:
                        job = waiting.pop(0)
                        # the processes inherit it, and hear of Ctrl-C from here alone
                        with _handled(signal.SIGINT, signal.SIG_IGN):
                            running[pool.submit(_work, job)] = job
                    done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                    bar.advance(passed.value - seen)
                    seen = passed.value
                    for future in done:
                        job = running.pop(future)
                        error = future.result()
                        if error is not None:
                            self._failed(job.label, error)
                        bar.count()
            except KeyboardInterrupt as interruption:
                stop.set()
                self._stop(pool, running)
                raise self._interrupted() from interruption
            except BrokenProcessPool as broken:
                raise EdgestillError(
                    "a worker process ended without a word, as it does when memory runs out",
                    where=", ".join(job.label for job in running.values()),
                    fix=f"--jobs {max(1, count - 1)}; the finished cells are kept",
                ) from broken
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _stop(self, pool: ProcessPoolExecutor, running: Mapping[Future[str | None], Job]) -> None:
        """Passes Ctrl-C on and waits for the checkpoints; who does not end in time is ended."""
        children = multiprocessing.active_children()
        try:
            for child in children:
                if child.pid is not None:
                    with contextlib.suppress(ProcessLookupError):  # it has ended by itself meanwhile
                        os.kill(child.pid, signal.SIGINT)
            wait(running, timeout=_PATIENCE_SECONDS)
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.join(_POLL_SECONDS)
        finally:
            for child in children:
                child.terminate()

    def _failed(self, label: str, error: str) -> None:
        self.failures.append(Failure(label, error))
        self.progress.note(f"failed: {label}: {error}")

    def _interrupted(self) -> Interrupted:
        done = sum(map(self._is_done, self.cells))
        return Interrupted(
            f"stopped; {done} of {len(self.cells)} cells are done",
            where=str(self.folder),
            fix="the same command goes on",
        )


class _Bar:
    """One bar for all cells, in samples, so that its time left is right for cells of different size.

    It is the progress of each training, too, whose steps it counts.
    """

    def __init__(self, progress: Progress, samples: int, done: int, count: int, things: str) -> None:
        self._progress, self._samples, self._done, self._all = progress, samples, done, f"{count} {things}"
        self._stack = contextlib.ExitStack()
        self._task: Task | None = None
        self._of_cell = 0

    def __enter__(self) -> _Bar:
        self._task = self._stack.enter_context(self._progress.task("study", self._samples))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "samples") -> Iterator[Task]:
        """A training's own task: the same bar."""
        yield self

    def note(self, message: str) -> None:
        """One line."""
        self._progress.note(message)

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Counts samples."""
        self._of_cell += amount
        if self._task is not None:
            self._task.advance(amount)

    def start(self) -> None:
        """Counts from the start of a cell; its label would leave no room for the time in 80 columns."""
        self._of_cell = 0
        if self._task is not None:
            self._task.advance(0, f"{self._done}/{self._all}")

    def finish(self, job: Job) -> None:
        """A cell is done; what a resumed one did not have to do is counted, too."""
        self.advance(job.samples - self._of_cell)
        self.count()

    def count(self) -> None:
        """One more cell is done."""
        self._done += 1
        if self._task is not None:
            self._task.advance(0, f"{self._done}/{self._all}")


# -- one cell ---------------------------------------------------------------------------------------------------------


def _do(job: Job, progress: Progress) -> None:
    if job.tuning is None:
        _train_cell(job, progress)
    else:
        from cli.pipeline.tune import run_trials

        run_trials(job, job.tuning, progress)


@dataclass(frozen=True)
class Trained:
    """A cell's training, which never sees the test split. folder: of its artefact and its checkpoint."""

    dataset: Dataset
    student: Student
    objective: Composition
    result: TrainResult
    folder: Path

    def remove(self) -> None:
        """Removes what the training wrote."""
        shutil.rmtree(self.folder, ignore_errors=True)


def fit(job: Job, progress: Progress) -> Trained:
    """Trains one cell, going on from its checkpoint where there is one."""
    cell, recipe = job.cell, job.cell.combination.recipe
    dataset, cache, student, objective = _modules(job)
    strategy = _strategy(job, dataset)
    training = cell.folder.with_name(cell.folder.name + ".training")
    result = train(
        student,
        objective,
        dataset,
        cache if job.coached is None else None,
        _train_section(cell.combination),
        recipe.data.augment,
        training,
        seed=cell.seed,
        view_seed=job.view_seed,
        progress=progress,
        title=cell.label,
        strategy=strategy,
    )
    return Trained(dataset, student, objective, result, training)


def _train_cell(job: Job, progress: Progress) -> None:
    """Trains one cell, judges it on the test split and writes its artefact."""
    cell, trained = job.cell, fit(job, progress)
    dataset, result, test = trained.dataset, trained.result, trained.dataset.test
    logits = evaluate_logits(trained.student, trained.objective, test).astype(np.float32)
    kept = result.history[result.best_epoch - 1]
    found = CellResult(
        method=cell.combination.method,
        factors=cell.combination.factors,
        seed=cell.seed,
        validation=result.metric.value,
        test=evaluate(dataset.task, logits, test.labels, test.mask).value,
        best_epoch=result.best_epoch,
        epochs=result.epochs,
        seconds=result.seconds,
        samples_per_second=result.samples_per_second,
        train_samples=len(dataset.train),
        arch=result.arch,
        parameters=result.parameters,
        hard_weight=result.hard_weight,
        device=result.device,
        threads=torch.get_num_threads(),
        terms={
            name: value
            for name, value in kept.items()
            if name not in ("epoch", "samples_per_second") and math.isfinite(value)  # a figure that is not defined
        },
    )
    info = {"settings": job.settings, "base": job.base_run}
    with artifact.create(cell.folder, KIND, job.key, info) as temporary:
        (temporary / _CELL_FILE).write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        np.save(temporary / _LOGITS_FILE, logits)
        if job.keep_student:
            shutil.copytree(trained.folder, temporary / "student")
    trained.remove()


def _modules(job: Job) -> tuple[Dataset, TeacherCache | None, Student, Composition]:
    """Data, teacher's outputs, and the untrained student and objective of a cell."""
    combination, seed = job.cell.combination, job.cell.seed
    recipe = combination.recipe
    dataset = _data(job.data, job.rows, job.row_seed)
    cache = None if job.cache is None else _cache(job.cache, job.data, job.rows, job.row_seed)
    if job.coached is not None:
        assert cache is not None
        cache = told_shapes(cache, dataset)
    student = _build(recipe, dataset, job.arch, seed, job.base, job.allow_code)
    if job.shared is not None:
        inherit(student, job.shared)
    objective = build_objective(
        recipe.objective,
        dataset,
        cache,
        student_dim=student.embedding_dim,
        hard_weight=combination.hard_weight,
        seed=seed,
    )
    return dataset, cache, student, objective


def _strategy(job: Job, dataset: Dataset) -> Strategy | None:
    """How the teacher of a cell learns, and what the student explores; None: it stands still, and nothing."""
    recipe = job.cell.combination.recipe
    coached: Coached | None = None
    teacher: Teacher | None = None
    if job.coached is not None:
        coached = coach(recipe.teacher, _load_start(job, job.coached, dataset), dataset)
        teacher = coached.learner
    elif job.labeller is not None:
        teacher = _load_start(job, job.labeller, dataset)
    if job.explored is None or teacher is None:
        return coached
    exploration = open_explored(
        job.explored,
        recipe,
        teacher,
        _whole(job.data, _written(job.data)),
        dataset,
        base=job.base,
        allow_code=job.allow_code,
    )
    return together(coached, exploration)


def _load_start(job: Job, start: Start, dataset: Dataset) -> Teacher:
    """The frozen teacher that a cell's own starts from, or asks.

    Raises:
        EdgestillError: it is not the one that the study's data and caches were made with.
    """
    recipe = job.cell.combination.recipe
    teacher: Teacher
    if start.trained is None:
        teacher = load_teacher(
            recipe.teacher,
            dataset,
            base=job.base,
            seed=start.seed,
            device=default_device(),
            allow_code=job.allow_code,
        )
    else:
        folder, arch, each = start.trained
        section, outputs = StudentSection(family=recipe.student.family), each * len(dataset.classes)
        network = build_student(section, dataset.input, outputs, arch=arch, seed=start.seed, base=job.base)
        load_student(network, folder / "student.safetensors")
        teacher = ModuleTeacher(network, default_device())
    if teacher.key != start.key:
        raise EdgestillError("the teacher changed while the study ran", where="teacher", fix="the same command again")
    return teacher


def _build(recipe: Recipe, dataset: Dataset, arch: str | None, seed: int, base: Path, allow_code: bool) -> Student:
    return build_student(
        recipe.student,
        dataset.input,
        head_size(recipe.objective, len(dataset.classes)),
        arch=arch,
        seed=seed,
        base=base,
        allow_code=allow_code,
    )


def _train_section(combination: Combination) -> TrainSection:
    return combination.recipe.train.model_copy(update={"hard_weight": combination.hard_weight})


@lru_cache(maxsize=8)
def _whole(folder: Path, written: int) -> Dataset:
    """The data of a base run; `written`: when, so that data which was made anew is opened anew."""
    return open_dataset(folder)


@lru_cache(maxsize=8)
def _order(folder: Path, written: int, seed: int) -> np.ndarray[Any, Any]:
    split = _whole(folder, written).train
    return nested_order(Labels(split.labels, split.mask), seed=seed)


@lru_cache(maxsize=2)
def _subset(folder: Path, written: int, rows: int, seed: int) -> Dataset:
    return subset(_whole(folder, written), _rows(folder, rows, seed))


@lru_cache(maxsize=2)
def _cache_subset(cache_folder: Path, parts: str, folder: Path, written: int, rows: int, seed: int) -> TeacherCache:
    opened = open_cache(cache_folder, CacheParts.model_validate_json(parts))
    return cache_rows(opened, _rows(folder, rows, seed))


def _written(folder: Path) -> int:
    return (folder / artifact.MANIFEST).stat().st_mtime_ns


def _rows(folder: Path, rows: int, seed: int) -> np.ndarray[Any, Any]:
    """The first `rows` of a stratified order of the training split that depends on nothing but the seed, ascending."""
    return np.sort(_order(folder, _written(folder), seed)[:rows])


def _data(folder: Path, rows: int | None, seed: int) -> Dataset:
    """The data of a cell."""
    written = _written(folder)
    return _whole(folder, written) if rows is None else _subset(folder, written, rows, seed)


def _cache(place: tuple[Path, CacheParts, int | None], data: Path, rows: int | None, seed: int) -> TeacherCache:
    """The teacher's outputs for `_data` of the same arguments."""
    folder, parts, subclasses = place
    if rows is None:
        cache = open_cache(folder, parts)
    else:
        cache = _cache_subset(folder, parts.model_dump_json(), data, _written(data), rows, seed)
    return cache if subclasses is None else SubclassCache.of(cache, subclasses)


# -- a worker process -------------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}


class _Counted(Silent):
    """The progress of a training in a worker: counts samples where the main process reads them."""

    def __init__(self, passed: Any) -> None:
        self._passed = passed
        self.counted = 0

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "samples") -> Iterator[Task]:
        """The training's only task."""
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Counts samples."""
        self.counted += amount
        with self._passed.get_lock():
            self._passed.value += amount


def _start_worker(threads: int, stop: Any, passed: Any, path: list[str]) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C in the terminal reaches the main process alone, which passes it on once
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    sys.path[:] = path
    _worker.update(stop=stop, passed=passed)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A main process that was killed leaves no worker behind; its last checkpoints are there to go on from."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job) -> str | None:
    """Trains one cell in a worker; the error's text where it failed."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if _worker["stop"].is_set():
            return "stopped"
        progress = _Counted(_worker["passed"])
        _do(job, progress)
        progress.advance(job.samples - progress.counted)  # what a resumed cell did not have to do
    except (Interrupted, KeyboardInterrupt):
        return "stopped"
    except Exception as error:  # told by the main process, which goes on with the other cells
        return _words(error)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return None


@contextmanager
def _handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Another handler of a signal for a while; outside of the main thread signals are somebody else's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)


def _interrupt(number: int, frame: Any) -> None:
    """SIGTERM stops the workers as Ctrl-C does, instead of leaving them alone."""
    raise KeyboardInterrupt


# -- small things -----------------------------------------------------------------------------------------------------


def _base_key(recipe: Recipe) -> str:
    """Hash of what decides data, teacher and cache; the number of training samples aside, but for a long tail."""
    thinned = recipe.data.imbalance is not None and recipe.data.train_size is not None
    data = recipe.data.model_dump(mode="json", exclude=None if thinned else {"train_size"})
    kind = pool_kind(recipe)
    # only where there is one, so that all other bases keep their folder
    pool = [] if kind is None else [kind]
    return artifact.content_key(data, plain_values(start_of(recipe.teacher)), recipe.seed, *pool)


def part_size(recipe: Recipe) -> int | None:
    """Samples of the part of its base's training split that a combination learns on; None: all of it."""
    return None if recipe.data.imbalance is not None else recipe.data.train_size


def _row_seed(recipe: Recipe) -> int:
    """Of the choice of a smaller training set: as the splits of the data have it."""
    return recipe.seed if recipe.data.split_seed is None else recipe.data.split_seed


def _train_samples(run: Run) -> int | None:
    """Training samples of the data that lies in a base's folder; None without."""
    try:
        return int(artifact.read_manifest(run.folder / "data", DATA_KIND).info["samples"]["train"])
    except (InputError, LookupError, TypeError):
        return None


def _splits_classes(sections: tuple[AnyObjective, ...]) -> bool:
    """Whether the student's head has more outputs than classes without a teacher that was trained for it."""
    return head_size(sections, 1) > 1 and retrained_for(sections) is None


def _code_of(network: torch.nn.Module) -> tuple[str, dict[str, str]]:
    """What a network is made of, and the source of its classes as far as they are not PyTorch's own."""
    sources = {}
    for each in {type(module) for module in network.modules()}:
        if not each.__module__.startswith("torch."):
            with contextlib.suppress(OSError, TypeError):  # a class without a file
                sources[f"{each.__module__}.{each.__qualname__}"] = inspect.getsource(each)
    return re.sub(r" at 0x[0-9a-f]+", "", str(network)), sources


def _slug(text: str) -> str:
    """A folder name: the text itself as far as it can be one, else with a hash of it."""
    plain = text.replace(" ", "_")
    if re.fullmatch(r"[A-Za-z0-9.=+_-]{1,80}", plain):
        return plain
    return f"{re.sub(r'[^A-Za-z0-9.=+_-]+', '-', plain)[:60]}-{artifact.content_key(text)[:8]}"


def _words(error: Exception) -> str:
    """An error on one line."""
    if not isinstance(error, EdgestillError):
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return " ".join("; ".join(part for part in (error.message, error.where, error.evidence, error.fix) if part).split())


@contextmanager
def _named(label: str) -> Iterator[None]:
    """An InputError about one combination says which."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"{label}: {error.message}", where=error.where, evidence=error.evidence, fix=error.fix
        ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
