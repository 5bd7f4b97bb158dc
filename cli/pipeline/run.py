"""A run: its stages in order, each an artefact that is used again while nothing that it was made from changes."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cli.pipeline.advice import few_steps, unit_of
from cli.pipeline.budget import Budgets
from cli.pipeline.choose import Choice, Option, choose, floor_of
from cli.pipeline.exploration import Explorer, check_explored, check_explored_by, explores, together
from cli.pipeline.local import file_of, local_runtime, outputs_of
from cli.pipeline.pool_cost import limits_of, pool_cost
from cli.pipeline.remote import Remote
from cli.pipeline.teachers import (
    Variant,
    check_boundaries,
    check_held_out,
    check_strategy,
    coach,
    inherit,
    pooled_start,
    told_shapes,
    variant_for,
)
from cli.recipe import LoadedRecipe, Recipe, to_toml
from cli.report.predictions import PREDICTIONS, Predictions, save_predictions
from cli.report.schema import Bought, MetricValue, ReferenceRow, Report, Selection, Stage
from cli.report.schema import Difference as ReportedDifference
from cli.report.words import metric_title
from distill.data import Dataset, Split, load_dataset
from distill.distribution import default_device, join_processes
from distill.exploration.explore import Exploration
from distill.objectives.compose import (
    Composition,
    build_objective,
    build_teacher_objective,
    check_classes,
    head_size,
)
from distill.objectives.compose import available as offered
from distill.objectives.section import (
    AnyObjective,
    Need,
    SupervisedSection,
    check_data,
    check_mixup,
    check_needs,
    check_subclasses,
    check_teacher,
    resolve_hard_weight,
)
from distill.objectives.split_head import class_logits_of
from distill.objectives.subclass import retrained_for
from distill.strategy import Strategy
from distill.students import Student, build_student, default_arch, parse_arch
from distill.students import teacher_arch as default_teacher
from distill.students.arch import Arch, check_family
from distill.students.choose import Miss
from distill.students.pool import family_pool, kind_of, parse_pool, restrict
from distill.students.section import StudentSection, torch_word
from distill.teachers import ModuleTeacher, SubclassCache, Teacher, TeacherCache, build_cache, load_teacher
from distill.teachers.strategy_section import CONDITIONED
from distill.training import TrainResult, evaluate_logits, train
from export import Candidate, Plan, available, plan, refusal_of, write_bundle
from profiles import artifact
from profiles.device import ENGINE_RUNTIMES, Target, resolve_target
from profiles.errors import EdgestillError, InputError, Interrupted
from profiles.measure import Measured, load_measurement, measure, runtime_options, save_measurement
from profiles.measurement import Measurement
from profiles.metrics import Difference, Metric, difference, evaluate
from profiles.predict import Roofline, roofline
from profiles.progress import Progress, Silent
from profiles.quantspec import QuantSpec
from profiles.runtimes import get_runtime
from profiles.runtimes.onnxruntime import run_model

if TYPE_CHECKING:
    from distill.strategies.coached import Coached

Array = np.ndarray[Any, Any]

SUPERVISED = SupervisedSection()
PLAIN = "--supervised"
FROZEN_NOTE = 'objective "subclass": the teacher is frozen, so only its head was retrained, on its cached embeddings'
MEASURED_SAMPLES = 64
"""Real validation samples that the latency queries cycle through."""


@dataclass(frozen=True)
class Trained:
    """A trained network: `key` is the hash of its weights, `objective_name` says what it learned from, kind by kind.

    strategy: of its teacher, for a student; its own, for a teacher. exploration: the kind of its further inputs.
    """

    student: Student
    objective: Composition
    result: TrainResult
    key: str
    objective_name: str
    strategy: str = "frozen"
    exploration: str = "none"


class Deployable(nn.Module):
    """What is exported: inputs -> class logits (N, C). The normalisation is the student's first layer."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.student = trained.student
        self.objective = trained.objective

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.objective.class_logits(self.student(x).head)
        return logits


@dataclass(frozen=True)
class Shipped:
    """One target's outcome: every candidate, the one that was chosen and what is known of it.

    measurements, rooflines: by candidate; nothing was measured where the target is another device. metric, drop: of the
    chosen file on the test split, `drop` against the FP32 file. error: why there is no bundle. selection: how the
    student was chosen, where the recipe has a pool. miss: of that pool, the nearest to limits that nothing meets.
    metric_on_device: whether what was scored was computed on the device, where anything ran there. device_note: what
    else is to be said of its outputs.
    """

    target: Target
    arch: str
    plan: Plan | None = None
    choice: Choice | None = None
    measurements: dict[str, Measurement] | None = None
    rooflines: dict[str, Roofline] | None = None
    metric: Metric | None = None
    drop: Difference | None = None
    bundle: Path | None = None
    error: str | None = None
    selection: Selection | None = None
    miss: Miss | None = None
    metric_on_device: bool = True
    device_note: str = ""

    @property
    def candidate(self) -> Candidate | None:
        """The chosen candidate."""
        return self.plan[self.choice.name] if self.plan is not None and self.choice is not None else None

    @property
    def measurement(self) -> Measurement | None:
        """Of the chosen candidate; None where nothing ran on the device."""
        return (self.measurements or {}).get(self.choice.name) if self.choice is not None else None


class Run:
    """One recipe in one run folder.

    Args:
        loaded: the recipe and the folder that its paths are relative to.
        folder: the run folder; made when missing.
        progress: shows the work.
        allow_code: the user allowed the recipe to import code by dotted path.
        strict: a measurement on a machine that was busy, throttled or never settled is an error instead of a note.
        pool_like: the student whose kind the pool of a generic teacher has; None: that of the first target.

    Raises:
        InputError: a target names an unknown device, stack or power mode, or a precision that its device lacks.
    """

    def __init__(
        self,
        loaded: LoadedRecipe,
        folder: Path,
        *,
        progress: Progress | None = None,
        allow_code: bool = False,
        strict: bool = False,
        pool_like: str | None = None,
    ) -> None:
        self.loaded = loaded
        self.recipe: Recipe = loaded.recipe
        self.folder = folder
        self.progress: Progress = (progress if self.is_main else None) or Silent()
        self.allow_code = allow_code
        self.strict = strict
        self.pool_like = pool_like
        self.stages: list[Stage] = []
        self._inside: list[float] = []
        self.started = time.time()
        self.targets = tuple(
            resolve_target(section, base=loaded.base, where=f"{loaded.origin}, target[{index}]")
            for index, section in enumerate(self.recipe.target)
        )
        self.notes: list[str] = []
        self._trained: dict[tuple[str, str], Trained] = {}
        self._teachers: dict[str, Teacher | None] = {}
        self._caches: dict[str, TeacherCache] = {}
        self.explorer = Explorer(self)
        self.budgets = Budgets(self) if self.recipe.student.pool is not None else None
        self.remote = Remote(self)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports; the others of a torchrun only help training."""
        return int(os.environ.get("RANK", "0")) == 0

    @contextmanager
    def _main_first(self) -> Iterator[None]:
        """Under torchrun the main process makes the artefact and the others then find it finished."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield
            return
        with join_processes().main_process_first():
            yield

    # -- stages ------------------------------------------------------------------------------------------------------

    @contextmanager
    def timed(self, name: str) -> Iterator[dict[str, bool]]:
        """Times a stage without the stages inside it; the block sets `cached` when nothing had to be done."""
        facts = {"cached": False}
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield facts
        except BaseException:
            self._inside.pop()  # what it took stays with the stage around it
            raise
        took = time.perf_counter() - start
        own = took - self._inside.pop()
        if self._inside:
            self._inside[-1] += took
        self.stages.append(Stage(name=name, seconds=round(own, 2), cached=facts["cached"]))

    @contextmanager
    def made(self, name: str, folder: Path) -> Iterator[None]:
        """A stage that makes one artefact where it is missing, the main process first."""
        with self.timed(name) as stage, self._main_first():
            before = _manifest_time(folder)
            yield
            stage["cached"] = before is not None and before == _manifest_time(folder)

    def prepare_folder(self) -> None:
        """Makes the run folder and stores the resolved recipe and where its relative paths start.

        Raises:
            EdgestillError: the folder cannot be written.
        """
        if not self.is_main:
            return
        with artifact.explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            artifact.write_text(self.folder / "recipe.toml", to_toml(self.recipe))
            origin = {"recipe": self.loaded.origin, "base": str(self.loaded.base)}
            artifact.write_text(self.folder / "origin.json", json.dumps(origin, indent=2) + "\n")

    @cached_property
    def dataset(self) -> Dataset:
        """The data, read once and memory-mapped from then on."""
        with self.made("data", folder := self.folder / "data"):
            return load_dataset(
                self.recipe.data, seed=self.recipe.seed, base=self.loaded.base, folder=folder, progress=self.progress
            )

    @cached_property
    def test_key(self) -> str:
        """Hash of the test split's inputs and labels."""
        dataset = self.dataset
        files = artifact.read_manifest(self.folder / "data", "data").files
        # the rows say where the samples were in the source, not what they are
        held_out = {name: key for name, key in files.items() if name.startswith("test_") and "rows" not in name}
        return artifact.content_key(held_out, dataset.task, dataset.classes)

    @property
    def teacher(self) -> Teacher | None:
        """The teacher that learned from the labels alone, or was given; None for kind "none"."""
        return self._teacher_of(Variant())

    @property
    def cache(self) -> TeacherCache | None:
        """That teacher's outputs on every training sample and view; None without a teacher."""
        return self.cache_of(Variant())

    def variant(self, sections: tuple[AnyObjective, ...], arch: str | None = None) -> Variant:
        """Which teacher a student of these objectives learns from, or starts to. arch: its own; None: the first's."""
        return variant_for(self.recipe.teacher, sections, arch or self.possible[0])

    def teacher_for(self, sections: tuple[AnyObjective, ...], arch: str | None = None) -> Teacher | None:
        """Who teaches a student of these objectives; None when none of them needs a teacher.

        Objective "subclass" has a teacher of its own, trained again with subclasses, if the recipe trains its teacher;
        the objectives beside it then learn from that one, too. With strategy "sftn" every architecture has its own. A
        coached teacher is here as it starts.

        Args:
            sections: the objectives.
            arch: the student's; None: that of the first target.

        Raises:
            InputError: see `check_objectives`.
        """
        self.check_objectives(sections)
        return self._teacher_of(self.variant(sections, arch)) if needs_teacher(sections) else None

    def cache_for(
        self, sections: tuple[AnyObjective, ...], arch: str | None = None, moves: bool | None = None
    ) -> TeacherCache | None:
        """The outputs of `teacher_for` on every sample and view; None when no objective needs a teacher.

        Args:
            sections: the objectives.
            arch: the student's; None: that of the first target.
            moves: whether the teacher learns along with the student; None: as the recipe says.

        Raises:
            InputError: see `check_objectives`.
        """
        self.check_objectives(sections, moves=moves)
        if not needs_teacher(sections):
            return None
        cache = self.cache_of(self.variant(sections, arch))
        if retrained_for(sections) is not None and not isinstance(cache, SubclassCache):
            self.say_once(FROZEN_NOTE)
        return cache

    def teacher_fingerprint_for(
        self, sections: tuple[AnyObjective, ...], arch: str | None = None
    ) -> Callable[[], str] | None:
        """Computes the hash of what is fixed in `teacher_for`, anew at every call; None without a teacher."""
        teacher = self.teacher_for(sections, arch)
        return None if teacher is None else teacher.fingerprint

    def start_for(self, sections: tuple[AnyObjective, ...], arch: str) -> Teacher:
        """The teacher that a coached one starts from, or that labels further inputs; the objectives are not checked.

        A student of the labels alone explores with a teacher, too.
        """
        teacher = self._teacher_of(self.variant(sections, arch))
        assert teacher is not None  # `check_strategy` and `check_explored` refuse kind "none"
        return teacher

    @cached_property
    def pool(self) -> tuple[Arch, ...]:
        """The architectures that a teacher of strategy "generic" is conditioned on: those that some target can carry.

        Raises:
            InputError: an architecture that does not exist or reads other inputs, or none that a target can carry.
        """
        section, spec = self.recipe.teacher.generic, self.dataset.input
        if self.budgets is not None:
            found = self.budgets.carried if section.within_limits else self.budgets.pool
            self._say_pool(found)
            return found
        if section.archs is not None:
            found = parse_pool(section.archs, spec)
        else:
            like = parse_arch(self.pool_like or next(iter(self.archs)), where="student.arch")
            found = family_pool(
                parse_arch(self.teacher_arch, where="teacher.arch"),
                spec,
                like=like,
                widths=section.widths,
                depths=section.depths,
                kernels=section.kernels,
                heads=section.heads,
            )
            if self.pool_like is None and not any((section.widths, section.depths, section.kernels, section.heads)):
                # a pool of our own choice is for the students that the recipe has
                own = (parse_arch(arch, where="student.arch") for arch in self.archs)
                found += tuple(arch for arch in own if kind_of(arch) == kind_of(like) and arch not in found)
        limits = limits_of(self.targets) if section.within_limits else {}
        if not limits:
            self._say_pool(found)
            return found

        kept, exclusions = restrict(found, pool_cost(self.targets, spec, lambda arch: self.fresh(str(arch))), limits)
        if len(kept) < len(found):
            reasons = "; ".join(map(str, exclusions))
            self.say_once(f"the teacher's pool has {len(kept)} of {len(found)} students: {reasons}")
        self._say_pool(kept)
        return kept

    def _say_pool(self, pool: Sequence[Arch]) -> None:
        """Notes who is in the teacher's pool, and which of the recipe's students are not."""
        self.say_once(f"the teacher's pool: {', '.join(map(str, pool))}")
        named = self.archs if self.budgets is None else self.budgets.named
        outside = [arch for arch in named if arch not in map(str, pool)]
        if outside and self.pool_like is None:
            self.say_once(
                f"not in the teacher's pool: {', '.join(outside)}; it teaches them all the same, and "
                "teacher.generic.archs can name them"
            )

    def check_objectives(
        self, sections: tuple[AnyObjective, ...], student_dim: int | None = None, moves: bool | None = None
    ) -> None:
        """Refuses objectives that data or teacher cannot serve, or that do not go together; trains nothing.

        A teacher that is not to be trained is loaded for it.

        Args:
            sections: the objectives.
            student_dim: size of the smallest student's embedding; None: what depends on it is not checked.
            moves: whether the teacher learns along with the student; None: as the recipe says.

        Raises:
            InputError: names the objective's place in the recipe.
        """
        dataset, kind = self.dataset, self.recipe.teacher.kind
        classes = len(dataset.classes)
        check_data(sections, dataset.task, classes, len(dataset.train))
        head_size(sections, classes)
        retrained_for(sections)
        moves = self.recipe.teacher.moves if moves is None else moves
        found: set[Need] = set(offered(dataset, None))
        teacher = self.teacher if kind not in ("none", "train") and needs_teacher(sections) else None
        if kind == "train" or (teacher is not None and teacher.embedding_dim is not None):
            found.add("embedding")
        # a coached teacher without class logits gets a head for them
        if kind == "train" or (teacher is not None and (moves or teacher.num_logits is not None)):
            found.add("logits")
        check_needs(sections, frozenset(found))
        if teacher is not None and not moves:
            check_classes(sections, classes, teacher.num_logits)
        check_teacher(sections, moves)
        check_subclasses(sections, classes, lambda: self._teacher_dim, student_dim)

    @cached_property
    def _teacher_dim(self) -> int:
        """D_t of a teacher with embeddings; one that is to be trained is built for it."""
        if self.recipe.teacher.kind == "train":
            return self.fresh(self.teacher_arch).embedding_dim
        assert self.teacher is not None
        assert self.teacher.embedding_dim is not None
        return self.teacher.embedding_dim

    @property
    def teacher_arch(self) -> str:
        """The architecture of a teacher that is to be trained."""
        return self.recipe.teacher.arch or default_teacher(self.recipe.student.family, self.dataset.input)

    def _teacher_network(self, arch: str) -> StudentSection:
        """What `build_student` makes a teacher from."""
        return self.recipe.student.model_copy(update={"kind": "family", "arch": arch})

    def say_few_steps(self) -> None:
        """Notes that the students' training is short, where it is."""
        note = few_steps(self.recipe.train, len(self.dataset.train), unit_of(self.dataset))
        if note is not None:
            self.say_once(note)

    def fresh(self, arch: str) -> Student:
        """A network of the shipped families as it starts, with a head for the classes."""
        return self._build(self._teacher_network(arch), arch, (SUPERVISED,))

    def say_once(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            self.progress.note(note)

    def _teacher_of(self, variant: Variant) -> Teacher | None:
        """The teacher, made once; kind "train" is trained first, through the one training loop."""
        name = variant.folder
        if name not in self._teachers:
            self._teachers[name] = self._make_teacher(variant)
        return self._teachers[name]

    def _make_teacher(self, variant: Variant) -> Teacher | None:
        section = self.recipe.teacher
        if section.kind == "none":
            return None
        if section.kind != "train":
            with self.timed("teacher"):
                return load_teacher(
                    section,
                    self.dataset,
                    base=self.loaded.base,
                    seed=self.recipe.seed,
                    device=default_device(),
                    allow_code=self.allow_code,
                    progress=self.progress,
                )
        changes: dict[str, Any] = {"epochs": section.epochs} if section.epochs is not None else {}
        if section.learning_rate is not None:
            changes["learning_rate"] = section.learning_rate
        objectives: tuple[AnyObjective, ...] = (SUPERVISED,) if variant.subclasses is None else (variant.subclasses,)
        trained = self._train(
            "teacher",
            variant.folder,
            self.teacher_arch,
            objectives,
            None,
            {**changes, "hard_weight": None},
            title=variant.title(len(self.students_of(variant))),
            strategy=self.conditioning(variant),
            strategy_name=variant.strategy,
        )
        return ModuleTeacher(trained.student, default_device())

    def students_of(self, variant: Variant) -> tuple[Arch, ...]:
        """The students that a teacher is conditioned on; none for one that is not."""
        if variant.strategy == "generic":
            return self.pool
        if variant.arch is None:
            return ()
        return parse_pool((variant.arch,), self.dataset.input)

    def conditioning(self, variant: Variant) -> Strategy | None:
        """What conditions a teacher on students while it is trained; None for one that only learns its labels."""
        students = self.students_of(variant)
        if not students:
            return None
        from distill.strategies.generic import Generic

        teacher = parse_arch(self.teacher_arch, where="teacher.arch")
        return Generic(self.recipe.teacher.generic, students, teacher, self.dataset, seed=self.recipe.seed)

    def shared_weights(self, sections: tuple[AnyObjective, ...], arch: str) -> Path | None:
        """The artefact with what a student has of the teacher's pool, for `inherit`; None: it starts afresh."""
        if not self.recipe.teacher.generic.inherit or not needs_teacher(sections):
            return None
        variant = self.variant(sections, arch)
        if arch not in map(str, self.students_of(variant)):
            self.say_once(f"{arch} is not in the teacher's pool, so it starts from fresh weights")
            return None
        folder, metric = self.pooled(sections, arch)
        self.say_once(
            f"{arch} starts from the pool: {metric_title(metric.name)} {metric.value:.1%} on validation before its own "
            "training"
        )
        return folder

    def pooled(self, sections: tuple[AnyObjective, ...], arch: str) -> tuple[Path, Metric]:
        """What a member of the teacher's pool has of its shared weights, and their metric on the validation split."""
        variant = self.variant(sections, arch)
        self._teacher_of(variant)
        folder = self.folder / variant.start_folder(arch)
        with self._main_first():
            metric = pooled_start(self.folder / variant.folder, arch, self.dataset, folder, seed=self.recipe.seed)
        return folder, metric

    def cache_of(self, variant: Variant) -> TeacherCache | None:
        """The outputs of a teacher on every sample and view, made once; None where there is no teacher."""
        name = variant.folder
        if name in self._caches:
            return self._caches[name]
        teacher = self._teacher_of(variant)
        if teacher is None:
            return None
        with self.made("teacher cache", folder := self.folder / variant.cache_folder):
            cache = build_cache(
                teacher,
                self.dataset,
                self.recipe.data.augment,
                folder,
                seed=self.recipe.seed,
                dtype=self.recipe.teacher.cache_dtype,
                batch_size=self.recipe.teacher.batch_size,
                progress=self.progress,
            )
        if variant.subclasses is not None:
            cache = SubclassCache.of(cache, variant.subclasses.subclasses_per_class)
        self._caches[name] = cache
        return cache

    def arch_of(self, target: Target) -> str:
        """The student architecture of a target: its own, the recipe's, or the family's default for its size class.

        Where the recipe has a pool, the one that was chosen, or was nearest to limits that nothing meets.
        """
        section = self.recipe.student
        if section.kind == "torch":
            return torch_word(section)
        if self.budgets is not None and self.budgets.chooses(target):
            return self.budgets.arch_of(target)
        return (
            target.section.arch or section.arch or default_arch(section.family, target.size_class, self.dataset.input)
        )

    @cached_property
    def archs(self) -> dict[str, list[Target]]:
        """Every distinct student with the targets that it serves, in the order of the recipe."""
        found: dict[str, list[Target]] = {}
        for target in self.targets:
            if self.budgets is None or self.budgets.has_student(target):
                found.setdefault(self.arch_of(target), []).append(target)
        return found

    @property
    def possible(self) -> tuple[str, ...]:
        """The students that may come of the recipe: those that it has, or names, and the members of its pool."""
        return tuple(self.archs) if self.budgets is None else self.budgets.possible

    def check(self) -> None:
        """Refuses what cannot work before the teacher is trained; builds every student once.

        Raises:
            InputError: objectives that do not go together with each other, with the data, with the teacher or with
                mixup, a precision that a target cannot get, an architecture that does not exist or reads another kind
                of input, or a student of the user's that cannot be built; names the recipe key.
        """
        # what the recipe alone tells comes before reading the data
        resolve_hard_weight(self.recipe.objective, self.recipe.train.hard_weight)
        check_mixup(self.recipe.objective, self.recipe.train.mixup)
        check_strategy(self.recipe)
        check_explored(self.recipe)
        if self.budgets is not None:
            self.budgets.check_recipe()
        check_explored(self.recipe, self.dataset)
        self.check_budgets()
        self.check_teacher_strategy()
        self.check_objectives(self.recipe.objective)
        self.check_explored_teacher(self.recipe)
        for index, target in enumerate(self.targets):
            refused = refusal_of(target.section.precision, target.device, target.stack)
            if refused is not None:
                raise InputError(
                    f"{target.name} cannot get {target.section.precision.upper()}",
                    where=f"{self.loaded.origin}, target[{index}] ({target.name}).precision",
                    evidence=refused,
                    fix="precision = "
                    + ", ".join(f'"{name}"' for name in ("auto", *available(target.device, target.stack))),
                )
        student = self.recipe.student
        for index, target in enumerate(self.targets):
            if target.section.arch is None:
                continue
            where = f"{self.loaded.origin}, target[{index}] ({target.name}).arch"
            if student.kind == "torch":
                raise InputError(
                    "this student is a torch module of your own, which has no arch to choose",
                    where=where,
                    fix='leave arch out, or student.kind = "family"',
                )
            check_family(parse_arch(target.section.arch, where=where).family, self.dataset.input, where=where)
        students = [self._build(student, arch, self.recipe.objective) for arch in self.possible]
        self.check_objectives(self.recipe.objective, min((each.embedding_dim for each in students), default=None))

    def check_budgets(self) -> None:
        """Refuses pools and limits that nothing could be chosen from or by; trains nothing.

        Raises:
            InputError: names the recipe key.
        """
        if self.budgets is not None:
            self.budgets.check_recipe()
            self.budgets.check()

    def check_explored_teacher(self, recipe: Recipe) -> None:
        """Refuses what only a given teacher itself tells about an exploration; trains nothing.

        Raises:
            InputError: it cannot be asked about new inputs, or gives no logits where they are matched.
        """
        if explores(recipe) and self.recipe.teacher.kind != "train":
            assert self.teacher is not None  # `check_explored` refuses kind "none"
            check_explored_by(self.teacher, recipe, self.dataset)

    def check_teacher_strategy(self, arch: str | None = None) -> None:
        """Refuses what data, architectures and a given teacher tell about its strategy; trains nothing.

        Args:
            arch: the student; None: every one of the recipe.

        Raises:
            InputError: a held-out share that leaves a class empty, a pool without an architecture, a teacher without
                stage boundaries, or one that cannot learn.
        """
        section = self.recipe.teacher
        check_held_out(section, self.dataset, self.recipe.seed)
        if section.strategy in CONDITIONED:
            check_boundaries(parse_arch(self.teacher_arch, where="teacher.arch"), self.dataset.input, section.strategy)
            for word in (arch,) if arch is not None else self.possible:
                self.students_of(self.variant(self.recipe.objective, word))
        if section.moves and section.kind != "train":
            coach(section, self.start_for(self.recipe.objective, self.possible[0]), self.dataset)

    def student(self, arch: str) -> Trained:
        """The distilled student of that architecture."""
        trained, exploration, coached = self._distilled("student", arch, arch, {}, "student")
        pictured = self.budgets is None or self.budgets.is_done
        if exploration is not None and pictured and arch == next(iter(self.archs)):
            place = self.folder / "students" / arch
            self.explorer.picture(exploration, trained, None if coached is None else (coached, place))
        return trained

    def trial(self, arch: str, epochs: int) -> Trained:
        """The student of that architecture after a short training of its own, judged at its end."""
        changes = {"epochs": epochs, "min_steps": None, "validations": 1}
        name = f"{arch}--{epochs}"
        title = f"trial ({epochs} epoch{'' if epochs == 1 else 's'})"
        return self._distilled("trial", name, arch, changes, title)[0]

    def _distilled(
        self, role: str, name: str, arch: str, changes: dict[str, Any], title: str
    ) -> tuple[Trained, Exploration | None, Coached | None]:
        """A student of the recipe's objectives, what it explored, and how its teacher learned along.

        changes: to the recipe's `[train]`.
        """
        cache, strategy, exploration, coached = self._lesson(arch)
        trained = self._train(
            role,
            name,
            arch,
            self.recipe.objective,
            cache,
            changes,
            title=title,
            strategy=strategy,
            strategy_name=self.recipe.teacher.strategy,
            exploration_name=self.recipe.explore.kind,
        )
        return trained, exploration, coached

    def _lesson(self, arch: str) -> tuple[TeacherCache | None, Strategy | None, Exploration | None, Coached | None]:
        """What a student of that architecture learns from: the teacher's outputs, or their shapes alone where a
        strategy gives them; the strategy; what of it is exploration; and the teacher that learns along."""
        objectives, section = self.recipe.objective, self.recipe.teacher
        cache = self.cache_for(objectives, arch)
        coached, learner = None, None
        if section.moves:
            assert cache is not None
            cache = told_shapes(cache, self.dataset)
            coached = coach(section, self.start_for(objectives, arch), self.dataset)
            learner = coached.learner
        exploration = self.exploration_for(arch, learner)
        return cache, together(coached, exploration), exploration, coached

    def retrained(self, arch: str, spec: QuantSpec) -> tuple[nn.Module, str]:
        """The distilled student after a quantisation-aware training, as it is exported, and the hash of its weights."""
        from distill.quantized import train_quantized

        trained, section, seed = self.student(arch), self.recipe.train, self.recipe.seed
        cache, strategy, *_ = self._lesson(arch)
        told = None if self.recipe.teacher.moves else cache
        folder = self.folder / f"students/{arch}--qat-{artifact.content_key(spec)[:8]}"
        title = f"quantisation-aware training {arch}"
        with self.timed(title) as stage:
            before = _manifest_time(folder)
            objective = copy.deepcopy(trained.objective)
            student, result = train_quantized(
                trained.student,
                objective,
                self.dataset,
                told,
                section,
                self.recipe.data.augment,
                folder,
                spec=spec,
                epochs=self.recipe.export.qat_epochs,
                seed=seed,
                progress=self.progress,
                title=title,
                strategy=strategy,
            )
            stage["cached"] = before is not None and before == _manifest_time(folder)
        files = artifact.read_manifest(folder, "student").files
        key = artifact.content_key(files["student.safetensors"], files["objective.safetensors"])
        retrained = replace(trained, student=student, objective=objective, result=result, key=key)
        self._trained["qat", folder.name] = retrained
        return Deployable(retrained).eval(), key

    def exploration_for(self, arch: str, learner: Teacher | None = None) -> Exploration | None:
        """What a student explores; None where it learns on its data alone.

        Args:
            arch: the student's.
            learner: its teacher where that learns along with it; None: the frozen one of its objectives.
        """
        if not explores(self.recipe):
            return None
        objectives = self.recipe.objective
        teacher = learner or self.start_for(objectives, arch)
        return self.explorer.exploration(self.recipe.explore, teacher, self.variant(objectives, arch), objectives)

    @property
    def has_plain_students(self) -> bool:
        """Whether every student has a twin that neither has a teacher nor explores."""
        is_plain = self.recipe.objective == (SUPERVISED,) and not explores(self.recipe)
        return self.recipe.plain_students and not is_plain

    def plain_student(self, arch: str) -> Trained | None:
        """The same network without a teacher; None when the recipe turns it off or trains without a teacher anyway."""
        if not self.has_plain_students:
            return None
        return self._train(
            "no teacher", arch + PLAIN, arch, (SUPERVISED,), None, {"hard_weight": None}, title="plain student"
        )

    def distill(self) -> dict[str, Trained]:
        """Trains every distinct student, and its plain twin; where the recipe has a pool, chooses them first."""
        self.prepare_folder()
        self.check()
        self.say_few_steps()
        self.explorer.prepare(self.recipe.explore)
        if self.budgets is not None:
            self.budgets.choose()
        trained = {arch: self.student(arch) for arch in self.archs}
        for arch in self.archs:
            self.plain_student(arch)
        return trained

    def _train(
        self,
        role: str,
        name: str,
        arch: str,
        objectives: tuple[AnyObjective, ...],
        cache: TeacherCache | None,
        changes: dict[str, Any],
        *,
        title: str,
        strategy: Strategy | None = None,
        strategy_name: str = "frozen",
        exploration_name: str = "none",
    ) -> Trained:
        """Trains one network, or loads it when its artefact is current.

        Args:
            cache: what the objective is built for, and what it learns from unless the teacher learns along.
            changes: to the recipe's `[train]`.
            title: of the stage and the progress bar, before the arch.
            strategy: how the teacher learns, and on which further inputs the network does.
            strategy_name, exploration_name: the recipe's words for both.
        """
        if (role, name) in self._trained:
            return self._trained[role, name]
        dataset = self.dataset
        section = self.recipe.train.model_copy(update=changes)
        student_section = self._teacher_network(arch) if role == "teacher" else self.recipe.student
        folder = self.folder / {"teacher": name, "trial": f"choice/trials/{name}"}.get(role, f"students/{name}")

        student = self._build(student_section, arch, objectives)
        retrained = retrained_for(objectives) if role == "teacher" else None
        if retrained is not None:
            objective = build_teacher_objective(retrained, dataset, student_dim=student.embedding_dim)
        else:
            objective = build_objective(
                objectives,
                dataset,
                cache,
                student_dim=student.embedding_dim,
                hard_weight=section.hard_weight,
                seed=self.recipe.seed,
            )
        is_student = role in ("student", "trial")
        moves = is_student and self.recipe.teacher.moves
        words = [strategy_name] * moves + [exploration_name] * (exploration_name != "none")
        title = f"{title} {arch}" + (f" ({', '.join(words)})" if words else "")
        told = None if moves else cache
        fingerprint = self.teacher_fingerprint_for(objectives, arch) if told is not None else None
        if told is None and exploration_name != "none" and not moves:
            fingerprint = self.start_for(objectives, arch).fingerprint
        with self.timed(title) as stage:
            shared = self.shared_weights(objectives, arch) if is_student else None
            if shared is not None:
                inherit(student, shared)
            before = _manifest_time(folder)
            result = train(
                student,
                objective,
                dataset,
                told,
                section,
                self.recipe.data.augment,
                folder,
                seed=self.recipe.seed,
                title=title,
                progress=self.progress,
                teacher_fingerprint=fingerprint,
                strategy=strategy,
            )
            stage["cached"] = before is not None and before == _manifest_time(folder)
        files = artifact.read_manifest(folder, "student").files
        # the weights themselves: the same settings give others on another device or version
        key = artifact.content_key(files["student.safetensors"], files["objective.safetensors"])
        name_of = objective_name(objectives)
        trained = Trained(student, objective, result, key, name_of, strategy_name, exploration_name)
        self._trained[role, name] = trained
        return trained

    def _build(self, section: StudentSection, arch: str, objectives: tuple[AnyObjective, ...]) -> Student:
        return build_student(
            section,
            self.dataset.input,
            head_size(objectives, len(self.dataset.classes)),
            arch=None if section.kind == "torch" else arch,
            seed=self.recipe.seed,
            base=self.loaded.base,
            allow_code=self.allow_code,
        )

    def plan(self, target: Target, arch: str | None = None, *, rescue: bool = True) -> Plan:
        """Every candidate file of a target, verified; targets with the same student and dialect share them.

        Args:
            target: one of the recipe's.
            arch: the student; None: the target's. Another one is tried for it.
            rescue: whether search and quantisation-aware training follow where INT8 does not keep the metric.
        """
        title = f"export {target.name}" + ("" if arch is None else f" {arch}")
        title += " (INT8 that keeps the metric)" if arch is not None and rescue else ""
        arch = arch or self.arch_of(target)
        trained = self.student(arch)
        dataset, seed = self.dataset, self.recipe.seed
        validation = dataset.validation
        rows = _spread(len(dataset.train), self.recipe.export.calibration_samples, seed)

        def score(file: Path) -> Metric:
            return self._metric(self.outputs(file, validation), validation)

        def compare(a: Array, b: Array, held: Array) -> Difference:
            mask = validation.mask[held] if validation.mask is not None else None
            return difference(dataset.task, a, b, validation.labels[held], mask, seed=seed)

        def retrain(spec: QuantSpec) -> tuple[nn.Module, str]:
            model, key = self.retrained(arch, spec)
            return model, artifact.content_key(key, dataset.key)

        with self.timed(title) as stage:
            found = plan(
                Deployable(trained).eval(),
                held_out=np.asarray(validation.inputs),
                calibration=np.asarray(dataset.train.inputs[rows]),
                stack=target.stack,
                device=target.device,
                folder=self.folder / "exports" / f"{arch}--{target.stack.runtime}-{target.stack.dialect}",
                model_key=artifact.content_key(trained.key, dataset.key),
                input_name=dataset.input.name,
                batch=target.section.batch,
                precisions=(target.section.precision,),
                section=self.recipe.export,
                score=score,
                difference=compare,
                exclusive=dataset.task == "multiclass",
                metadata={"labels": list(dataset.classes), "preprocessing": dataset.preprocessing},
                progress=self.progress,
                # the other processes of a torchrun do not export, and could not help training
                retrain=retrain if int(os.environ.get("WORLD_SIZE", "1")) == 1 else None,
                floor=floor_of(target.section),
                rescue=rescue,
            )
            stage["cached"] = found.all_reused
        return found

    def outputs(self, file: Path, split: Split) -> Array:
        """(N, C) class logits of an ONNX file on a split, computed by ONNX Runtime here."""
        return run_model(file, {self.dataset.input.name: np.asarray(split.inputs)})["logits"]

    def _metric(self, logits: Array, split: Split) -> Metric:
        return evaluate(self.dataset.task, logits, split.labels, split.mask, seed=self.recipe.seed)

    def export(self) -> dict[str, Plan]:
        """Every target's candidates; empty in the processes of a torchrun that only help training."""
        self.distill()
        if not self.is_main:
            return {}
        found = {}
        for target in self.targets:
            if self.budgets is None or not self.budgets.chooses(target):
                found[target.name] = self.plan(target)
            elif self.budgets.has_student(target):
                found[target.name], _ = self.budgets.exported(target, self.arch_of(target))
        return found

    def measurements(
        self, target: Target, found: Plan, *, arch: str | None = None, rescued: bool = False, fresh: bool = False
    ) -> dict[str, Measurement]:
        """Latency of every usable candidate, interleaved, on this machine or the target's host; empty without either.

        Args:
            target: one of the recipe's.
            found: its plan.
            arch: the student where several are tried for the target, each with measurements of its own.
            rescued: the plan of such a student is the full one, whose files are measured beside each other anew.
            fresh: measure although an earlier measurement of the same files under the same section is stored.
        """
        if self.remote.has(target):
            return self.remote.measurements(target, found, arch=arch, rescued=rescued, fresh=fresh)
        local, batch = local_runtime(target).runtime, target.section.batch
        if local is None:
            return {}
        of_candidates = {candidate.name: file_of(candidate, local, batch) for candidate in found.usable}
        files = {name: file for name, file in of_candidates.items() if file is not None}
        if not files:
            return {}
        runtime = get_runtime(local, runtime_options(self.recipe.measure))
        key = artifact.content_key(
            target.section,
            self.recipe.measure,
            {name: artifact.file_hash(file) for name, file in files.items()},
            target.device,
            target.stack,
            (runtime.name, runtime.version),
        )
        name = target.name if arch is None else f"{target.name}--{arch}" + "--rescued" * rescued
        folder = self.folder / "measurements" / name
        with self.timed(f"measure {target.name}" + ("" if arch is None else f" {arch}")) as stage:
            if not fresh and artifact.current(folder, "measurements", key) is not None:
                # a candidate that failed has none
                stored = {
                    name: load_measurement(folder / f"{name}.json").measurement
                    for name in files
                    if (folder / f"{name}.json").is_file()
                }
                # what --strict would refuse is measured anew: the machine may be quiet by now
                if not (self.strict and any(measurement.warnings for measurement in stored.values())):
                    stage["cached"] = True
                    return stored
            failures: dict[str, EdgestillError] = {}
            results = measure(
                files,
                self.measured_inputs(target),
                target.section,
                self.recipe.measure,
                input_source="real samples (validation split)",
                runtime=runtime,
                progress=self.progress,
                failures=failures,
            )
            if files and not results:
                raise next(iter(failures.values()))
            if local in ENGINE_RUNTIMES:
                # an engine's file does not tell what graph it was built from
                results = {name: _as_built(result, found[name]) for name, result in results.items()}
            for name, error in failures.items():
                self.say_once(f"{target.name}: {name} could not be measured: {error.message} ({error.evidence})")
            with artifact.create(folder, "measurements", key) as temporary:
                for result in results.values():
                    save_measurement(temporary, result.measurement, result.samples)
        if self.strict:
            refuse_unquiet(result.measurement for result in results.values())
        return {name: result.measurement for name, result in results.items()}

    def measured_inputs(self, target: Target) -> dict[str, Array]:
        """The real validation samples that the target's latency is measured on."""
        dataset = self.dataset
        rows = _spread(len(dataset.validation), max(MEASURED_SAMPLES, target.section.batch), self.recipe.seed)
        return {dataset.input.name: np.asarray(dataset.validation.inputs[rows])}

    def measure_on(self, hosts: Sequence[str], *, lock_clocks: bool = False) -> None:
        """Measures targets on other machines from now on.

        Args:
            hosts: texts like TARGET=HOST, or TARGET alone for the host that is known to be its device.
            lock_clocks: lock the devices' clocks meanwhile.

        Raises:
            InputError: no such target or host.
        """
        self.remote.assign(hosts, lock_clocks=lock_clocks)
        for target in self.targets:
            if self.remote.has(target) and target.section.runtime not in (None, target.stack.runtime):
                raise InputError(
                    "a runtime is chosen on this machine only; a device is measured with its stack's",
                    where=f"target.{target.name}.runtime",
                    fix=f"leave runtime out, or {target.name} out of --on",
                )

    def bench(self) -> dict[str, dict[str, Measurement]]:
        """Measures every candidate of every target that is this machine anew; empty for other devices."""
        plans, budgets = self.export(), self.budgets
        # a chosen student is measured by the budgets, which keep what they found
        settled = {target.name for target in self.targets if budgets is None or not budgets.chooses(target)}
        self.remote.start({name: found for name, found in plans.items() if name in settled}, fresh=True)
        try:
            return {
                target.name: budgets.measure_again(target)
                if budgets is not None and budgets.chooses(target)
                else self.measurements(target, plans[target.name], fresh=True)
                for target in self.targets
                if target.name in plans
            }
        finally:
            self.remote.close()

    def ship(self, target: Target) -> Shipped:
        """Exports, measures where the device is attached, chooses on validation, and bundles one target's student."""
        if self.budgets is not None and self.budgets.chooses(target):
            return self._ship_chosen(self.budgets, target)
        arch = self.arch_of(target)
        found = self.plan(target)
        section = target.section
        wanted = [
            candidate
            for candidate in found.usable
            if candidate.validation is not None and section.precision in ("auto", candidate.precision)
        ]
        if not wanted:
            reasons = [f"{candidate.name}: {candidate.refused}" for candidate in found.candidates if candidate.refused]
            return Shipped(target, arch, found, error="no precision is usable: " + "; ".join(reasons))
        measured = self.measurements(target, found)
        rooflines = {
            candidate.name: roofline(
                candidate.file, target.device, candidate.precision, section.batch, target.power_mode
            )
            for candidate in wanted
            if candidate.file is not None
        }
        fp32 = found["fp32"]
        assert fp32.validation is not None
        choice = choose(
            [
                Option(
                    name=candidate.name,
                    validation=candidate.validation,
                    size_bytes=candidate.size_bytes or 0,
                    # with a missing fact the bound holds, but two such bounds say nothing about which is faster
                    expected_ms=None if rooflines[candidate.name].missing else rooflines[candidate.name].bound_ms,
                    measured_ms=measured[candidate.name].asked.p50 if candidate.name in measured else None,
                )
                for candidate in wanted
                if candidate.validation is not None
            ],
            section,
            fp32.validation,
            {
                (name, other.against): other
                for name, measurement in measured.items()
                for other in measurement.differences
                if other.scope == section.latency_scope
            },
        )
        return self._shipped(target, arch, found, choice, measured, rooflines)

    def _ship_chosen(self, budgets: Budgets, target: Target) -> Shipped:
        """What was chosen from the pool; exported and measured already."""
        settled = budgets.settled(target)
        selection, miss = settled.selection, settled.miss
        arch = budgets.arch_of(target)
        if settled.error is not None or miss is not None:
            return Shipped(target, arch, error=settled.error, selection=selection, miss=miss)
        found, measured = budgets.exported(target, arch)
        choice = budgets.choice(target)
        rooflines = {
            candidate.name: roofline(
                candidate.file, target.device, candidate.precision, target.section.batch, target.power_mode
            )
            for candidate in found.usable
            if candidate.file is not None
        }
        return replace(
            self._shipped(target, arch, found, choice, measured, rooflines), selection=budgets.selection(target)
        )

    def _shipped(
        self,
        target: Target,
        arch: str,
        found: Plan,
        choice: Choice,
        measured: dict[str, Measurement],
        rooflines: dict[str, Roofline],
    ) -> Shipped:
        """Scores the chosen candidate on the test split, and bundles it."""
        section = target.section
        candidate, fp32 = found[choice.name], found["fp32"]
        assert candidate.file is not None
        assert fp32.file is not None
        test = self.dataset.test
        scored = candidate.to_score or candidate.file
        logits = self.outputs(scored, test)
        on_device, note = True, ""
        if measured and self.remote.has(target):
            found = self.remote.with_engines(target, found)
            candidate = found[choice.name]
            logits, on_device, note = self.remote.outputs(target, found, candidate, test, logits)
        elif measured and (local := local_runtime(target).runtime) not in (None, "onnxruntime"):
            inputs = {self.dataset.input.name: np.asarray(test.inputs)}
            logits = outputs_of(candidate, str(local), inputs, section.batch, self.recipe.measure)["logits"]
        reference = logits if candidate is fp32 else self.outputs(fp32.to_score or fp32.file, test)
        metric = self._metric(logits, test)
        drop = difference(self.dataset.task, logits, reference, test.labels, test.mask, seed=self.recipe.seed)
        bundle = self._bundle(target, found, candidate, metric)
        save_predictions(
            self.folder / PREDICTIONS / target.name,
            Predictions.of(self.dataset.task, logits, test.labels, test.mask),
            test_key=self.test_key,
            model_key=artifact.file_hash(scored),
        )
        return Shipped(target, arch, found, choice, measured, rooflines, metric, drop, bundle,
                       metric_on_device=on_device, device_note=note)  # fmt: skip

    def report(self, *, require_measured: bool = False) -> Report:
        """The whole way. Writes report.json and returns what it says.

        Raises:
            EdgestillError, InputError: see the stages; what was finished is kept and used by the next call.
        """
        from cli.pipeline.reporting import build_report
        from cli.report.schema import to_json

        self.distill()
        try:
            self.remote.start_measuring()
            shipped = [self._try_to_ship(target) for target in self.targets]
        finally:
            self.remote.close()
        report = build_report(self, shipped, require_measured=require_measured)
        with artifact.explain_os_errors(self.folder):
            artifact.write_text(self.folder / "report.json", to_json(report))
        return report

    def _try_to_ship(self, target: Target) -> Shipped:
        """A target that fails must not take the others' results with it; its row says what went wrong."""
        try:
            return self.ship(target)
        except (InputError, Interrupted):
            raise
        except EdgestillError as error:
            details = "; ".join(part for part in (error.evidence, error.fix) if part)
            text = f"{error.message} ({details})" if details else error.message
            return Shipped(target, self.arch_of(target), error=" ".join(text.split()))

    # -- what the report refers to -----------------------------------------------------------------------------------

    @property
    def trained(self) -> dict[tuple[str, str], Trained]:
        """Every network of this run, by role and name."""
        return self._trained

    def test_logits(self, trained: Trained) -> Array:
        """(N, C) class logits of the PyTorch network on the test split."""
        return evaluate_logits(trained.student, trained.objective, self.dataset.test)

    def references(self) -> tuple[ReferenceRow, ...]:
        """The teacher and every plain-trained student."""
        rows: list[ReferenceRow] = []
        test = self.dataset.test
        told: dict[str, ReferenceRow] = {}
        for arch in self.archs:
            variant = self.variant(self.recipe.objective, arch)
            cache = self.cache_for(self.recipe.objective, arch)
            if explores(self.recipe):
                cache = self.cache_of(variant)  # whoever labels further inputs is in the report, too
            if cache is not None and variant.folder not in told:
                told[variant.folder] = self._teacher_row(cache, variant)
        rows += told.values()
        for arch in self.archs:
            plain = self.plain_student(arch)
            if plain is not None:
                metric = MetricValue.of(self._metric(self.test_logits(plain), test), "PyTorch")
                rows.append(
                    ReferenceRow(role="no teacher", arch=arch, size_mib=weights_mib(plain.student), metric=metric)
                )
        return tuple(rows)

    def _teacher_row(self, cache: TeacherCache, variant: Variant) -> ReferenceRow:
        kind = self.recipe.teacher.kind
        trained = self._trained.get(("teacher", variant.folder))
        logits, columns = cache.test_logits, cache.num_logits
        notes = []
        if retrained_for(self.recipe.objective) is not None:
            notes.append(FROZEN_NOTE)
        if isinstance(cache, SubclassCache) and logits is not None and columns is not None:
            notes = [f"trained again, with {cache.subclasses} subclasses per class"]
            logits = class_logits_of(torch.from_numpy(np.array(logits, np.float32)), cache.subclasses).numpy()
            columns //= cache.subclasses
        if variant.strategy == "generic":
            notes.append(f"trained once for a pool of {len(self.pool)} students")
        if variant.strategy == "sftn":
            notes.append(f"trained for student {variant.arch}")
        if self.recipe.teacher.moves:
            notes.append(f"as it started; a copy of it learned beside every student ({self._coached_figures(cache)})")
        metric = None
        if logits is None or columns != len(self.dataset.classes):
            notes.append("gives no class logits")
        else:
            found = self._metric(np.asarray(logits, dtype=np.float32), self.dataset.test)
            metric = MetricValue.of(found, "PyTorch")
        return ReferenceRow(
            role="teacher",
            strategy=self.recipe.teacher.strategy,
            arch=trained.student.arch if trained is not None else kind,
            size_mib=weights_mib(trained.student) if trained is not None else None,
            metric=metric,
            note="; ".join(notes),
        )

    def _coached_figures(self, cache: TeacherCache) -> str:
        """The metric on the validation split of the teacher in `cache`, and of its copies that learned on."""
        parts = []
        logits, validation = cache.validation_logits, self.dataset.validation
        if logits is not None and cache.num_logits == len(self.dataset.classes):
            started = self._metric(np.asarray(logits, dtype=np.float32), validation)
            parts.append(f"{started.value:.1%} at the start")
        for arch in self.archs:
            result = self.student(arch).result
            value = result.history[result.best_epoch - 1].get(f"validation/teacher_{result.metric.name}")
            if value is not None:
                parts.append(f"{arch}'s {value:.1%}")
        return f"on validation: {', '.join(parts)}" if parts else "not judged by itself"

    def bought(self) -> tuple[Bought, ...]:
        """What distilling bought: distilled minus plain, per architecture, paired over the test samples."""
        found = []
        test = self.dataset.test
        for arch in self.archs:
            plain = self.plain_student(arch)
            if plain is None:
                continue
            student = self.student(arch)
            gain = difference(
                self.dataset.task,
                self.test_logits(student),
                self.test_logits(plain),
                test.labels,
                test.mask,
                seed=self.recipe.seed,
            )
            reported = ReportedDifference(value=gain.value, low=gain.low, high=gain.high, confidence=gain.confidence)
            found.append(Bought(arch=arch, difference=reported, objective=objective_name(self.recipe.objective)))
        return tuple(found)

    def _bundle(self, target: Target, found: Plan, candidate: Candidate, metric: Metric) -> Path:
        dataset = self.dataset
        with self.timed(f"bundle {target.name}"):
            return write_bundle(
                self.folder / "bundles" / target.name,
                found,
                candidate,
                name=target.name,
                device=target.device,
                stack=target.stack,
                golden=np.asarray(dataset.test.inputs[:1]),
                labels=dataset.classes,
                exclusive=dataset.task == "multiclass",
                preprocessing=dataset.preprocessing,
                metric=metric,
                tokenizer=dataset.tokenizer,
                licence=dataset.licence,
                section=self.recipe.export,
            )


def _as_built(result: Measured, candidate: Candidate) -> Measured:
    """The measurement of an engine, with what is known of it from the graph and the builder."""
    known = {"int8": "int8", "fp16": "fp16", "bf16": "bf16"}.get(candidate.precision, "fp32")
    update = {"graph_precision": known, "compute_precision": candidate.compute_precision or candidate.precision}
    return result._replace(measurement=result.measurement.model_copy(update=update))


def refuse_unquiet(measurements: Iterable[Measurement]) -> None:
    """What `--strict` asks for.

    Raises:
        EdgestillError: a measurement has a warning: the machine was busy or throttled, or the latency never settled.
    """
    warnings = dict.fromkeys(warning for measurement in measurements for warning in measurement.warnings)
    if warnings:
        raise EdgestillError(
            "--strict refuses this measurement",
            evidence="; ".join(warnings),
            fix="close other programs and run again, or leave --strict out",
        )


def needs_teacher(sections: tuple[AnyObjective, ...]) -> bool:
    """Whether an objective needs outputs of a teacher."""
    return any(section.needs & {"logits", "embedding"} for section in sections)


def objective_name(sections: tuple[AnyObjective, ...]) -> str:
    """Objectives as one word: kd+distance_correlation."""
    return "+".join(section.kind for section in sections)


def _spread(count: int, wanted: int, seed: int) -> Array:
    """Sorted rows of a random sample without repetition; all of them when fewer exist than are wanted."""
    if count <= wanted:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))


def weights_mib(module: nn.Module) -> float:
    """Size of a module's weights and buffers in MiB."""
    return sum(int(tensor.nbytes) for tensor in module.state_dict().values()) / 2**20


def _manifest_time(folder: Path) -> int | None:
    """When an artefact was finished: unchanged by a stage that found it up to date."""
    manifest = folder / artifact.MANIFEST
    return manifest.stat().st_mtime_ns if manifest.is_file() else None
