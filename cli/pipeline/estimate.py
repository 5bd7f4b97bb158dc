"""`--dry-run`: what a run would do, and about how long and how much disk it would take.

The times come from a few timed steps of every network on this machine, in this moment. Nothing is written to the run
folder.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from cli.pipeline.advice import few_steps, unit_of
from cli.pipeline.budget import Budgets, ordinary_precisions
from cli.pipeline.exploration import (
    check_explored,
    explores,
    in_words,
    make_generator,
    open_exploration,
    subclasses_of,
    together,
    whole_generator,
)
from cli.pipeline.local import local_runtime
from cli.pipeline.pool_cost import precisions_of
from cli.pipeline.run import (
    PLAIN,
    SUPERVISED,
    Run,
    needs_teacher,
    weights_mib,
)
from cli.pipeline.teachers import RECALIBRATED, Variant, check_held_out, check_strategy, coach, start_of
from cli.recipe import Recipe, load_recipe, to_toml
from cli.report.words import duration, wrap
from distill.data import Dataset, load_dataset
from distill.data.dataset import subset
from distill.data.load import open_dataset
from distill.data.unlabelled import Unlabelled, load_unlabelled
from distill.distribution import default_device
from distill.exploration.explore import Exploration
from distill.exploration.generated import build_generated
from distill.exploration.generator import ImageGenerator, TextGenerator
from distill.exploration.section import ExploreSection
from distill.objectives.base import CachedTeacher
from distill.objectives.compose import build_objective, head_size
from distill.objectives.section import AnyObjective
from distill.strategy import Strategy
from distill.students import Student, build_student, teacher_arch
from distill.students.halving import planned
from distill.teachers import ModuleTeacher, Teacher
from distill.teachers.section import TeacherSection
from distill.training import train
from profiles import artifact
from profiles.device import Target
from profiles.errors import InputError
from profiles.progress import Silent, Task
from profiles.section import Section
from profiles.shots import long_tailed

_WARM_STEPS = 2
_TIMED_SECONDS = 1.0
_MIB = 2**20
_WIDTH = 100
_EXPORT_SECONDS = 12.0
"""Graphs, quantisation and parity of one small student; measured on two cores."""
_PRICE_SECONDS = 4.0
"""Export, quantisation and a short measurement of one graph with fresh weights; measured on two cores."""
_MEASURE_SECONDS = 5.0
"""Warm-up, samples and the separate process of one file, when the verdict is clear."""


class PlannedStage(Section):
    """`seconds`: None where nothing is known beforehand. `finished`: an earlier run with the same recipe sections left
    an artefact, which is used unless the files that it was made from have changed."""

    name: str
    seconds: float | None
    disk_mib: float
    finished: bool


class Estimate(Section):
    """What `run --dry-run` tells. `recipe`: the resolved recipe as TOML. explores: what students learn on besides.

    class_sizes: training samples by class, where `data.imbalance` decides them or they differ tenfold; else empty.
    few_steps: that the students' training is short, where it is.
    """

    recipe: str
    folder: str
    explores: str | None = None
    class_sizes: dict[str, int] = Field(default_factory=dict)
    few_steps: str | None = None
    stages: tuple[PlannedStage, ...]
    seconds: float
    disk_mib: float


class _Earlier:
    """What an earlier run of this folder left, and with which recipe."""

    def __init__(self, run: Run) -> None:
        self._run = run
        stored = run.folder / "recipe.toml"
        self._recipe: Recipe | None = None
        if stored.is_file():
            with contextlib.suppress(InputError):  # a recipe that this version cannot read vouches for nothing
                self._recipe = load_recipe(str(stored)).recipe

    def finished(self, place: str, *sections: str) -> bool:
        """Whether the artefact at `place` is there and was made with the same values of these recipe sections."""
        if self._recipe is None or not (self._run.folder / place / artifact.MANIFEST).is_file():
            return False
        return all(self._values(self._recipe, name) == self._values(self._run.recipe, name) for name in sections)

    def _values(self, recipe: Recipe, name: str) -> object:
        """A section; `START` is that of the teacher as a coached one starts, which a frozen one is, too; `GENERATOR`
        that of a generator, where there is one."""
        if name == GENERATOR:
            section = recipe.explore.generator
            return whole_generator(section, self._run.dataset.input.kind) if recipe.explore.generates else None
        return start_of(recipe.teacher) if name == START else getattr(recipe, name)


START = "start"
GENERATOR = "generator"
_START = ("seed", "data", START, "student", "train")
_TEACHER = ("seed", "data", "teacher", "student", "train")
_STUDENT = (*_TEACHER, "objective")
_EXPLORED = (*_STUDENT, "explore")
_TARGET = (*_EXPLORED, "export", "measure", "target")
_GENERATOR_STEPS = _WARM_STEPS + 4
_GENERATED_SAMPLES = 256
"""Of which a part of a fixed set is made to time it."""


def estimate(run: Run) -> Estimate:
    """Times a few steps of every network that the recipe would train."""
    earlier = _Earlier(run)
    with tempfile.TemporaryDirectory(prefix="edgestill-") as temporary:
        started = time.perf_counter()
        stored = _stored_data(run) if earlier.finished("data", "seed", "data") else None
        if stored is not None:
            run.dataset = dataset = stored
        else:
            run.dataset = dataset = load_dataset(
                run.recipe.data,
                seed=run.recipe.seed,
                base=run.loaded.base,
                folder=Path(temporary) / "data",
                progress=run.progress,
            )
        if run.recipe.teacher.kind in ("train", "none"):
            run.check()
        else:  # the rest is only known when the teacher is loaded
            check_strategy(run.recipe)
            run.check_budgets()
            check_explored(run.recipe, dataset)
            check_held_out(run.recipe.teacher, dataset, run.recipe.seed)
        stages = [_stage("data", time.perf_counter() - started, _data_mib(dataset), stored is not None)]
        stages += _teacher_stages(run, dataset, earlier)
        further = _Further(run, dataset, earlier, Path(temporary)) if explores(run.recipe) else None
        stages += further.stages if further is not None else []
        if run.budgets is not None:
            stages += _choice_stages(run, run.budgets, dataset, earlier, further)
        for arch in run.archs if run.budgets is None else run.budgets.named:
            roles: list[tuple[str, str, tuple[str, ...]]] = [("student", "", _EXPLORED)]
            if run.has_plain_students:
                roles.append(("plain student", PLAIN, _STUDENT))
            for role, suffix, decisive in roles:
                done = earlier.finished(f"students/{arch}{suffix}", *decisive)
                stages.append(_student_stage(run, dataset, arch, role, done, further))
        for target in run.targets:
            done = earlier.finished(f"bundles/{target.name}", *_TARGET)
            chooses = run.budgets is not None and run.budgets.chooses(target)
            times = run.recipe.student.choice.finalists if chooses else 1
            about = f" (about {times} students)" if times > 1 else ""
            size = _files_mib(run, target, dataset)
            # the bundle has one of the files
            name = f"export {target.name}{about}"
            longest = times * len(size) * (run.recipe.measure.warmup_seconds + run.recipe.measure.max_seconds)
            stages.append(_stage(name, times * _EXPORT_SECONDS, times * sum(size) + max(size), done))
            if local_runtime(target).runtime is not None:
                done = done if chooses else earlier.finished(f"measurements/{target.name}", *_TARGET)
                seconds = times * len(size) * _measured_seconds(run)
                if chooses:
                    about = f" (about {times} student{'s' * (times > 1)}, up to {duration(longest)})"
                stages.append(_stage(f"measure {target.name}{about}", seconds, 0.0, done))
    left = [stage for stage in stages if not stage.finished]
    return Estimate(
        recipe=to_toml(run.recipe),
        folder=str(run.folder),
        explores=in_words(run.recipe.explore) if explores(run.recipe) else None,
        class_sizes=_class_sizes(run.recipe, dataset),
        few_steps=few_steps(run.recipe.train, len(dataset.train), unit_of(dataset)),
        stages=tuple(stages),
        seconds=sum(stage.seconds or 0.0 for stage in left),
        disk_mib=sum(stage.disk_mib for stage in left),
    )


def _files_mib(run: Run, target: Target, dataset: Dataset) -> list[float]:
    """The size of every file that is made of a target's student in the ordinary case; of the largest that may be it."""
    budgets, made = run.budgets, []
    if budgets is not None and budgets.chooses(target):
        archs = budgets.likely().get(target.name, budgets.pool)
        mib = max(weights_mib(_student(run, dataset, str(arch), len(dataset.classes))) for arch in archs[-1:])
    else:
        mib = weights_mib(_student(run, dataset, run.arch_of(target), len(dataset.classes)))
    for precision in set(precisions_of(target)) & set(ordinary_precisions(target)):
        made.append(mib * {"fp32": 1.0, "fp16": 0.5, "int8": 0.25}.get(precision, 0.5))
    # a runtime that compiles keeps an engine beside every graph
    return [each * (1 if target.stack.runtime == "onnxruntime" else 2) for each in made]


def _measured_seconds(run: Run) -> float:
    """Of one file: what it takes when the verdict is clear, or less where the recipe allows less."""
    section = run.recipe.measure
    return min(_MEASURE_SECONDS, section.warmup_seconds + section.max_seconds)


def render(found: Estimate, run: Run) -> str:
    """The estimate as text."""
    lines = [found.recipe.rstrip(), "", f"run folder {found.folder}"]
    lines += [f"explores: {found.explores}"] if found.explores is not None else []
    if found.class_sizes:
        sizes = ", ".join(f"{name} {count:,}" for name, count in found.class_sizes.items())
        lines += wrap(f"training samples of each class: {sizes}", _WIDTH, indent="  ")
    lines += wrap(f"note: {found.few_steps}", _WIDTH, indent="  ") if found.few_steps is not None else []
    lines.append("")
    width = max(len(stage.name) for stage in found.stages)
    for stage in found.stages:
        seconds = "      ?" if stage.seconds is None else f"{stage.seconds:5.0f} s"
        done = "  done by an earlier run" if stage.finished else ""
        lines.append(f"  {stage.name:<{width}}  about {seconds}  {stage.disk_mib:7.1f} MiB{done}")
    minutes = found.seconds / 60
    lines += ["", f"about {minutes:.1f} min and {found.disk_mib:.0f} MiB; from a few timed steps on this machine, now"]
    if any(stage.seconds is None for stage in found.stages):
        lines.append("? is not in the sum: a network of this kind is only known when it is loaded")
    return "\n".join(lines)


def _class_sizes(recipe: Recipe, dataset: Dataset) -> dict[str, int]:
    """Training samples by class, where they are worth a line."""
    if dataset.task != "multiclass":
        return {}
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.classes))
    if recipe.data.imbalance is None and not long_tailed(counts):
        return {}
    return dict(zip(dataset.classes, counts.tolist(), strict=True))


def _stage(name: str, seconds: float | None, disk_mib: float, finished: bool) -> PlannedStage:
    rounded = None if seconds is None else round(seconds, 1)
    return PlannedStage(name=name, seconds=rounded, disk_mib=round(disk_mib, 1), finished=finished)


def _stored_data(run: Run) -> Dataset | None:
    """The run's data as an earlier run left it; None when another version wrote it in another form."""
    try:
        return open_dataset(run.folder / "data")
    except InputError:
        return None


def _data_mib(dataset: Dataset) -> float:
    splits = (dataset.train, dataset.validation, dataset.test)
    return sum(split.inputs.nbytes + split.labels.nbytes for split in splits) / _MIB


def _teacher_stages(run: Run, dataset: Dataset, earlier: _Earlier) -> list[PlannedStage]:
    section: TeacherSection = run.recipe.teacher
    objectives = run.recipe.objective
    if section.kind == "none" or not (needs_teacher(objectives) or explores(run.recipe)):
        return []
    views = run.recipe.data.augment.teacher_views if dataset.input.kind == "image" else 1
    rows = views * len(dataset.train) + len(dataset.validation) + len(dataset.test)
    if section.kind != "train":
        return [_stage("teacher cache", None, 0.0, earlier.finished("cache", "seed", "data", START))]
    train = (
        run.recipe.train if section.epochs is None else run.recipe.train.model_copy(update={"epochs": section.epochs})
    )
    epochs = train.resolved(len(dataset.train)).epochs
    # a pool also depends on which targets can carry what
    decisive = (*_TEACHER, "target") if section.strategy == "generic" else _START
    stages = []
    for variant in dict.fromkeys(run.variant(objectives, arch) for arch in run.possible):
        outputs = (
            len(dataset.classes)
            if variant.subclasses is None
            else head_size((variant.subclasses,), 1) * len(dataset.classes)
        )
        teacher = _teacher(run, dataset, outputs)
        step, forward = _timed(teacher, dataset, run.recipe.train.batch_size)
        students = run.students_of(variant)
        if students:
            step = _timed_with(run, _teacher(run, dataset, outputs), dataset, (SUPERVISED,), run.conditioning(variant))
        stored = rows * (teacher.embedding_dim + outputs) * (2 if section.cache_dtype == "float16" else 4)
        stages += [
            _stage(
                f"{variant.title(len(students))} {teacher.arch}",
                step * len(dataset.train) * epochs,
                weights_mib(teacher),
                earlier.finished(variant.folder, *decisive),
            ),
            _stage("teacher cache", forward * rows, stored / _MIB, earlier.finished(variant.cache_folder, *decisive)),
        ]
    return stages


def _teacher(run: Run, dataset: Dataset, outputs: int) -> Student:
    """A teacher of kind "train" as it starts."""
    return build_student(
        run.recipe.student.model_copy(update={"kind": "family"}),
        dataset.input,
        outputs,
        arch=run.recipe.teacher.arch or teacher_arch(run.recipe.student.family, dataset.input),
        seed=run.recipe.seed,
        base=run.loaded.base,
    )


class _Further:
    """What students explore with, as far as it can be had before anything is trained, and its stages.

    A generator that edgestill trains is one of a few steps here. One of the user's own is loaded and checked.
    """

    def __init__(self, run: Run, dataset: Dataset, earlier: _Earlier, folder: Path) -> None:
        self.run, self.dataset, self.folder = run, dataset, folder
        self.section = run.recipe.explore
        self.unlabelled: Unlabelled | None = None
        self.generator: ImageGenerator | TextGenerator | None = None
        self.stages: list[PlannedStage] = []
        if run.recipe.data.unlabelled is not None and (self.section.generates or self.section.around != "train"):
            self.stages.append(self._load_unlabelled(earlier.finished("unlabelled", "seed", "data")))
        if self.section.generates:
            self.stages.append(self._make_generator(earlier.finished("generator", "seed", "data", GENERATOR)))
        if self.section.versions is not None:
            for variant in dict.fromkeys(run.variant(run.recipe.objective, arch) for arch in run.possible):
                name = "generated" + variant.folder.removeprefix("teacher")
                self.stages.append(self._make_fixed(variant, earlier.finished(name, *_EXPLORED)))

    def _load_unlabelled(self, finished: bool) -> PlannedStage:
        run, started = self.run, time.perf_counter()
        self.unlabelled = load_unlabelled(
            run.recipe.data,
            self.dataset,
            seed=run.recipe.seed,
            base=run.loaded.base,
            folder=self.folder / "unlabelled",
            progress=run.progress,
        )
        size = 0 if self.unlabelled is None else self.unlabelled.inputs.nbytes
        return _stage("unlabelled", time.perf_counter() - started, size / _MIB, finished)

    def _make_generator(self, finished: bool) -> PlannedStage:
        run, dataset = self.run, self.dataset
        section = whole_generator(self.section.generator, dataset.input.kind)
        name = f"generator ({section.kind})"
        if section.kind == "masked-lm" and not (run.loaded.base / str(section.model)).is_dir():
            return _stage(name, None, 0.0, finished)  # not fetched for a dry run
        # the unlabelled inputs only make its training longer
        few = subset(dataset, np.arange(min(len(dataset.train), _GENERATOR_STEPS * section.batch)))
        watch, started = _Stopwatch(unlimited=True), time.perf_counter()
        self.generator = make_generator(
            section.model_copy(update={"epochs": 1, "min_steps": None}),
            dataset if section.kind == "torch" else few,
            self.unlabelled if section.kind == "torch" else None,
            self.folder / "generator",
            seed=run.recipe.seed,
            base=run.loaded.base,
            allow_code=run.allow_code,
            progress=watch,
        )
        seconds = time.perf_counter() - started
        if len(watch.times) > 1:  # it was trained
            count = len(dataset.train) + (0 if self.unlabelled is None else len(self.unlabelled))
            seconds = watch.per_sample() * count * section.passes(count)
        return _stage(name, seconds, weights_mib(self.generator.network), finished)

    def _make_fixed(self, variant: Variant, finished: bool) -> PlannedStage:
        run, dataset, versions = self.run, self.dataset, self.section.versions or 0
        count = 0 if self.section.around == "unlabelled" else len(dataset.train)
        count += 0 if self.around is None else len(self.around)
        name = "generated"
        sample = int(np.prod(dataset.input.shape)) * np.dtype(dataset.input.dtype).itemsize
        teacher = self.teacher(variant)
        if teacher is None or (self.section.generates and self.generator is None):
            return _stage(name, None, count * versions * sample / _MIB, finished)
        outputs = (teacher.num_logits or 0) + (teacher.embedding_dim or 0)
        few = subset(dataset, np.arange(min(len(dataset.train), _GENERATED_SAMPLES)))
        section = self.timed_section.model_copy(update={"versions": 1, "around": "train"})
        started = time.perf_counter()
        build_generated(
            section,
            teacher,
            few,
            self.folder / variant.folder,
            generator=self.generator,
            unlabelled=None,
            seed=run.recipe.seed,
            batch_size=run.recipe.teacher.batch_size,
            device=default_device(),
            subclasses=subclasses_of(variant),
        )
        each = (time.perf_counter() - started) / len(few.train)
        return _stage(name, each * count * versions, count * versions * (sample + 1 + 4 * outputs) / _MIB, finished)

    @property
    def around(self) -> Unlabelled | None:
        """The unlabelled inputs that are explored around."""
        return None if self.section.around == "train" else self.unlabelled

    @property
    def timed_section(self) -> ExploreSection:
        """As the recipe has it; what networks that know nothing yet cannot pass, and a fixed set, are left out."""
        return self.section.model_copy(update={"filter": "none", "match": "kd", "versions": None})

    def teacher(self, variant: Variant) -> Teacher | None:
        """A teacher of kind "train" as it starts; None: it is not known before it is loaded."""
        if self.run.recipe.teacher.kind != "train":
            return None
        outputs = len(self.dataset.classes) * (subclasses_of(variant) or 1)
        return ModuleTeacher(_teacher(self.run, self.dataset, outputs), default_device())

    def exploration(self, teacher: Teacher | None, arch: str) -> Exploration | None:
        """What a student explores, for timing; None where not all of it is known."""
        variant = self.run.variant(self.run.recipe.objective, arch)
        teacher = teacher or self.teacher(variant)
        if teacher is None or (self.section.generates and self.generator is None):
            return None
        return open_exploration(
            self.timed_section,
            teacher,
            self.dataset,
            self.run.recipe.objective,
            generator=self.generator,
            unlabelled=self.around,
            subclasses=subclasses_of(variant),
        )


def _choice_stages(
    run: Run, budgets: Budgets, dataset: Dataset, earlier: _Earlier, further: _Further | None
) -> list[PlannedStage]:
    """What choosing takes: the pool's costs, telling its members apart, the full trainings, and those that follow where
    measuring rejects all of them."""
    section, missing = budgets.section, budgets.pricing.missing(budgets.pool)
    done = all(earlier.finished(f"choice/{target.name}", *_TARGET) for target in budgets.targets)
    stages = []
    if budgets.pricing.attached:
        name = f"price the pool ({len(budgets.pool)} students)"
        stages.append(_stage(name, missing * _PRICE_SECONDS, 0.0, missing == 0))
    archs = budgets.likely()
    if not archs:
        return stages
    tried = budgets.candidates(archs) if budgets.rank == "trials" else budgets.largest(archs)
    words = list(dict.fromkeys(arch for given in tried.values() for arch in given))
    full = {arch: _student_stage(run, dataset, str(arch), "student", False, further) for arch in words}
    seconds = [stage.seconds for stage in full.values()]
    known = [each for each in seconds if each is not None]
    if budgets.rank == "trials":
        rungs = planned(tried, finalists=section.finalists, share=section.trial_share)
        # who is in the later ones is not known yet, so the mean of all stands for them
        mean = sum(known) / len(known) if known else None
        epochs = run.recipe.train.resolved(len(dataset.train)).epochs
        cost = (
            None
            if mean is None
            else sum(each.trainings * mean * budgets.trial_epochs(each.share) / epochs for each in rungs)
        )
        if rungs:
            disk = sum(rung.trainings for rung in rungs) * max(stage.disk_mib for stage in full.values())
            stages.append(_stage(f"trials ({sum(rung.trainings for rung in rungs)} at most)", cost, disk, done))
    elif budgets.rank == "supernet":
        student = _student(run, dataset, str(words[-1]), len(dataset.classes))
        _, forward = _timed(student, dataset, run.recipe.train.batch_size)
        samples = RECALIBRATED + len(dataset.validation)
        members = {arch for given in archs.values() for arch in given}
        stages.append(_stage("rank by shared weights", forward * samples * len(members), 0.0, done))
    count = min(len(words), sum(min(section.finalists, len(given)) for given in tried.values()))
    most = sorted(full.values(), key=lambda stage: -(stage.seconds or 0.0))[:count]
    for role in ["students"] + ["plain students"] * run.has_plain_students:
        # every target keeps one student, and only those have a plain twin
        kept = most if role == "students" else most[: len(archs)]
        word = "about" if role == "students" else "at most"
        total = sum(known) if len(known) == len(seconds) else None
        if total is not None:
            total = sum(stage.seconds or 0.0 for stage in kept)
        name = f"{role} ({word} {len(kept)} in full)"
        stages.append(_stage(name, total, sum(stage.disk_mib for stage in kept), done))
    more = sum(budgets.fallbacks(archs).values())
    if more:
        # cheaper than the finalists, so no longer than the mean of these
        mean = sum(known) / len(known) if known else None
        disk = more * max(stage.disk_mib for stage in full.values())
        name = f"fallbacks (at most {more}, where measuring rejects all of these)"
        stages.append(_stage(name, None if mean is None else more * mean, disk, done))
    return stages


def _student_stage(
    run: Run, dataset: Dataset, arch: str, role: str, finished: bool, further: _Further | None
) -> PlannedStage:
    section, objectives = run.recipe.teacher, run.recipe.objective
    if role == "plain student":
        further = None
    classes = len(dataset.classes)
    student = _student(run, dataset, arch, classes if role == "plain student" else head_size(objectives, classes))
    disk, name = weights_mib(student), f"{role} {arch}"
    step: float | None
    moves = section.moves and role == "student"
    words = [section.strategy] * moves + ([run.recipe.explore.kind] if further is not None else [])
    if words:
        name += f" ({', '.join(words)})"
    if moves:
        step = None
        if section.kind == "train":
            teacher = ModuleTeacher(_teacher(run, dataset, len(dataset.classes)), default_device())
            disk += weights_mib(teacher.network)
            coached = coach(section, teacher, dataset)
            exploration = None if further is None else further.exploration(coached.learner, arch)
            if further is None or exploration is not None:
                step = _timed_with(run, student, dataset, objectives, together(coached, exploration))
    elif further is not None:
        step = None
        exploration = further.exploration(None, arch)
        if exploration is not None:
            # objectives that are fitted to the teacher's outputs have none yet, and cost next to nothing here
            plain = _student(run, dataset, arch, len(dataset.classes))
            step = _timed_with(run, plain, dataset, (SUPERVISED,), exploration)
    else:
        step, _ = _timed(student, dataset, run.recipe.train.batch_size)
    samples = len(dataset.train) * run.recipe.train.resolved(len(dataset.train)).epochs
    return _stage(name, None if step is None else step * samples, disk, finished)


def _student(run: Run, dataset: Dataset, arch: str, outputs: int) -> Student:
    return build_student(
        run.recipe.student,
        dataset.input,
        outputs,
        arch=None if run.recipe.student.kind == "torch" else arch,
        seed=run.recipe.seed,
        base=run.loaded.base,
        allow_code=run.allow_code,
    )


@dataclass(frozen=True)
class _Shapes:
    """A teacher of which only the number of classes is known."""

    train_logits: np.ndarray[Any, Any]
    key: str = ""
    views: int = 1
    train_embedding: np.ndarray[Any, Any] | None = None
    head_weight: np.ndarray[Any, Any] | None = None
    head_bias: np.ndarray[Any, Any] | None = None


class _Enough(Exception):
    """So many steps have been timed."""


class _Stopwatch(Silent):
    """The progress of a training that notes when each step ended, and ends the training when it knows enough.

    unlimited: it lets the training end by itself.
    """

    def __init__(self, *, unlimited: bool = False) -> None:
        self.times: list[float] = []
        self.unlimited = unlimited

    @contextlib.contextmanager
    def task(self, title: str, total: int | None, unit: str = "samples") -> Iterator[Task]:
        """The training's only task."""
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        """A step has ended."""
        if default_device().type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() / amount)
        steps = len(self.times) - 1 - _WARM_STEPS
        if (
            not self.unlimited
            and steps >= _WARM_STEPS
            and amount * (self.times[-1] - self.times[_WARM_STEPS]) > _TIMED_SECONDS
        ):
            raise _Enough

    def per_sample(self) -> float:
        """Seconds per sample (median), after at least two steps."""
        # a training that ended before it was stopped has few steps: the warm ones have to do
        times = self.times[_WARM_STEPS:] if len(self.times) > _WARM_STEPS + 1 else self.times
        steps = sorted(after - before for before, after in itertools.pairwise(times))
        return steps[len(steps) // 2]


def _timed_with(
    run: Run, network: Student, dataset: Dataset, objectives: tuple[AnyObjective, ...], strategy: Strategy | None
) -> float:
    """Seconds per sample of a real training step with a strategy, its teacher's share in it (median)."""
    classes = len(dataset.classes)
    shapes: CachedTeacher = _Shapes(np.broadcast_to(np.float32(0), (1, len(dataset.train), classes)))
    section = run.recipe.train.model_copy(update={"hard_weight": None} if objectives == (SUPERVISED,) else {})
    objective = build_objective(
        objectives, dataset, shapes, student_dim=network.embedding_dim, hard_weight=section.hard_weight
    )
    watch = _Stopwatch()
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder, contextlib.suppress(_Enough):
        train(
            network,
            objective,
            dataset,
            None,
            section,
            run.recipe.data.augment,
            Path(folder) / "timed",
            seed=run.recipe.seed,
            progress=watch,
            strategy=strategy,
        )
    return watch.per_sample()


def _timed(network: nn.Module, dataset: Dataset, batch_size: int) -> tuple[float, float]:
    """Seconds per sample of a training step, and of a forward pass alone (medians)."""
    device = default_device()
    batch = torch.from_numpy(dataset.train.inputs[:batch_size].copy()).to(device)
    if batch.dim() == 4:
        batch = batch.contiguous(memory_format=torch.channels_last)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def step() -> None:
        network(batch).head.logsumexp(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()

    def forward() -> None:
        with torch.inference_mode():
            network(batch)
        wait()

    return _median(step) / len(batch), _median(forward) / len(batch)


def _median(work: object) -> float:
    assert callable(work)
    for _ in range(_WARM_STEPS):
        work()
    times: list[float] = []
    while sum(times) < _TIMED_SECONDS or len(times) < _WARM_STEPS:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
