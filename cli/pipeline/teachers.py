"""Which teacher a student learns from, and what a teacher's strategy needs, told before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cli.recipe import Recipe
from distill.data import Dataset, InputSpec
from distill.data.labels import Labels
from distill.distribution import default_device
from distill.networks import load_state, read_state
from distill.objectives.compose import build_objective
from distill.objectives.section import AnyObjective, SubclassSection, SupervisedSection, check_teacher
from distill.objectives.subclass import retrained_for, teacher_section
from distill.students import Student, save_student
from distill.students.arch import Arch, parse_arch
from distill.students.pool import kind_of, stage_boundaries
from distill.students.section import StudentSection
from distill.teachers import Teacher, TeacherCache
from distill.teachers.live import live_teacher
from distill.teachers.section import TeacherSection
from distill.teachers.strategy_section import COACHED, CONDITIONED, CoachedSection, Strategy
from distill.training import evaluate_logits
from profiles import artifact
from profiles.errors import InputError
from profiles.metrics import Metric, evaluate

if TYPE_CHECKING:
    from distill.strategies.coached import Coached

_LEARNING = ("train", "transformers", "torch")
"""Kinds of teachers that have weights to learn with."""
_RATES = {"transformers": 3e-5}
_RATE = 1e-4
"""Learning rates of a coached teacher where the recipe says "auto", by kind and otherwise."""
START_KIND = "start"
_START_FORM = 1
"""Raise when the way a start is made changes, so that older ones are made anew."""
_START_FILE = "student.safetensors"
_BATCHES = 20
_BATCH_SIZE = 128
RECALIBRATED = _BATCHES * _BATCH_SIZE
"""Training samples from which the BatchNorm statistics of a student are taken that starts from a pool."""
_MODEST = {
    "conv": "conv-w8-d1-k3",
    "convi": "convi-w8-d1-k3",
    "text": "text-w32-d1-h2",
    "textc": "textc-w32-d1-k3",
}
"""A student of every kind that its family's own choices hold."""


@dataclass(frozen=True)
class Variant:
    """One of the teachers that a recipe may have, as far as it trains them itself.

    subclasses: the objective that it is trained again for. strategy: "generic" or "sftn" where it is conditioned on
    students, else "frozen". arch: of the student that "sftn" conditions it on.
    """

    subclasses: SubclassSection | None = None
    strategy: Strategy = "frozen"
    arch: str | None = None

    @property
    def folder(self) -> str:
        """Its folder in the run folder, so that a run of several trains each once: "teacher", "teacher--generic",
        "teacher--sftn-conv-w8-d1-k3", "teacher--subclass-8" with what else is not default."""
        if self.strategy != "frozen":
            return "--".join(["teacher", "-".join(word for word in (self.strategy, self.arch) if word)])
        if self.subclasses is None:
            return "teacher"
        settings, defaults = teacher_section(self.subclasses), SubclassSection()
        name = f"teacher--subclass-{settings.subclasses_per_class}"
        if settings.aux_weight != defaults.aux_weight:
            name += f"-w{settings.aux_weight}"
        if settings.aux_temperature != defaults.aux_temperature:
            name += f"-t{settings.aux_temperature}"
        return name

    @property
    def cache_folder(self) -> str:
        """Folder of its cache in the run folder."""
        return "cache" + self.folder.removeprefix("teacher")

    def start_folder(self, arch: str) -> str:
        """Folder of what a student of its pool starts from, in the run folder: "start--generic--conv-w8-d1-k3"."""
        return f"start{self.folder.removeprefix('teacher')}--{arch}"

    def title(self, students: int = 1) -> str:
        """What its stage and progress bar call it, before its arch. students: in the pool of a generic one."""
        if self.strategy == "generic":
            return f"teacher (generic, {students} student{'' if students == 1 else 's'})"
        if self.strategy == "sftn":
            return f"teacher (sftn, {self.arch})"
        if self.subclasses is not None:
            return f"teacher ({self.subclasses.subclasses_per_class} subclasses per class)"
        return "teacher"


def variant_for(section: TeacherSection, sections: Sequence[AnyObjective], arch: str) -> Variant:
    """The teacher of a student of architecture `arch` with these objectives.

    A coached teacher starts from the one that strategy "frozen" has, so both share it.
    """
    if section.kind != "train":
        return Variant()
    if section.strategy == "generic":
        return Variant(strategy="generic")
    if section.strategy == "sftn":
        named = section.generic.archs
        word = arch if named is None else str(parse_arch(named[0], where="teacher.generic.archs[0]"))
        return Variant(strategy="sftn", arch=word)
    return Variant(subclasses=retrained_for(sections))


def start_of(section: TeacherSection) -> TeacherSection:
    """The section of the teacher that a coached one starts from; others are as they are."""
    if not section.moves:
        return section
    return section.model_copy(update={"strategy": "frozen", "coached": CoachedSection()})


def plain_values(section: TeacherSection) -> dict[str, Any]:
    """The section's values; what a frozen teacher has no use for is left out, so that keys of older versions hold."""
    unused = {"strategy", "generic", "coached"} if section.strategy == "frozen" else set[str]()
    return section.model_dump(mode="json", exclude=unused)


def plain_student(section: StudentSection) -> dict[str, Any]:
    """The section's values without those of a pool, which no study has, so that keys of older versions hold."""
    return section.model_dump(mode="json", exclude={"pool", "choice"})


def pool_kind(recipe: Recipe) -> str | None:
    """The kind of students that a study's pool is made of for this recipe: conv, convi, text or textc.

    None: there is no pool, `teacher.generic.archs` names it, or the student is the default one for the data.
    """
    section = recipe.teacher
    if section.strategy != "generic" or section.generic.archs is not None:
        return None
    return _kind_of_student(recipe)


def pool_like(recipe: Recipe, own: Recipe) -> str | None:
    """Like which student the pool is that `pool_kind` tells the kind of; None: like the recipe's own.

    The student of `own`, the recipe without the study's changes, where it is of this kind: the pool must not depend on
    which other students a study has.
    """
    kind = pool_kind(recipe)
    if kind is None:
        return None
    return _given_arch(own) if kind == _kind_of_student(own) else _MODEST[kind]


def _kind_of_student(recipe: Recipe) -> str | None:
    word = _given_arch(recipe)
    return None if word is None else kind_of(parse_arch(word, where="student.arch"))


def _given_arch(recipe: Recipe) -> str | None:
    """The arch of a study's student, where the recipe names one."""
    return None if recipe.student.kind == "torch" else recipe.student.arch or recipe.target[0].arch


# -- what is refused before anything is trained -----------------------------------------------------------------------


def check_strategy(recipe: Recipe) -> None:
    """Refuses a strategy that this teacher, these students or these objectives cannot have; reads the recipe alone.

    Raises:
        InputError: names the recipe key.
    """
    section = recipe.teacher
    if section.strategy in CONDITIONED:
        _check_conditioned(recipe)
    if section.strategy in COACHED:
        _check_coached(recipe)


def _check_conditioned(recipe: Recipe) -> None:
    section, strategy = recipe.teacher, recipe.teacher.strategy
    if section.kind != "train":
        raise InputError(
            f'strategy "{strategy}" trains the teacher together with students that branch off at its stage boundaries',
            where="teacher.strategy",
            evidence=f'a teacher of kind "{section.kind}" has no stage boundaries that edgestill knows',
            fix='teacher.kind = "train", or teacher.strategy = "frozen"',
        )
    for position, objective in enumerate(recipe.objective):
        if isinstance(objective, SubclassSection):
            raise InputError(
                f'objective "{objective.kind}" trains the teacher again in its own way, and so does strategy '
                f'"{strategy}"',
                where=f"objective[{position}].kind",
                evidence="one teacher cannot have two heads",
                fix='another objective, such as "kd" or "lelp", or teacher.strategy = "frozen"',
            )
    if recipe.student.kind == "torch":
        if section.generic.archs is None:
            raise InputError(
                "the student is a torch module of your own, which belongs to no family that a pool could be made of",
                where="teacher.strategy",
                fix='name the pool by teacher.generic.archs, student.kind = "family", or teacher.strategy = "frozen"',
            )
        if section.generic.inherit:
            raise InputError(
                "a torch module of your own cannot start from the weights of a pool",
                where="teacher.generic.inherit",
                fix="teacher.generic.inherit = false",
            )


def check_boundaries(arch: Arch, spec: InputSpec, strategy: str) -> None:
    """Refuses a teacher to be trained that has no place where a student could branch off.

    Raises:
        InputError: it is a text network of one block.
    """
    if not stage_boundaries(arch, spec):
        raise InputError(
            f'a teacher of one block has no stage boundary, which strategy "{strategy}" needs',
            where="teacher.arch",
            evidence=str(arch),
            fix=f'teacher.arch = "{str(arch).replace("-d1-", "-d2-")}", or teacher.strategy = "frozen"',
        )


def _check_coached(recipe: Recipe) -> None:
    section, strategy = recipe.teacher, recipe.teacher.strategy
    if section.kind not in _LEARNING:
        what = {
            "array": "stored outputs do not learn",
            "onnx": "a graph in a file does not learn",
            "none": "there is no teacher",
        }
        raise InputError(
            f'strategy "{strategy}" needs a teacher that learns along with the student',
            where="teacher.strategy",
            evidence=f'teacher.kind = "{section.kind}": {what[section.kind]}',
            fix="teacher.kind = " + " or ".join(f'"{kind}"' for kind in _LEARNING) + ', or teacher.strategy = "frozen"',
        )
    if section.coached.trainable_layers is not None and section.kind != "transformers":
        raise InputError(
            "only a teacher of the transformers library has layers that can be counted",
            where="teacher.coached.trainable_layers",
            evidence=f'teacher.kind = "{section.kind}"',
            fix="leave it out: all of the teacher learns",
        )
    check_teacher(recipe.objective, moves=True)
    if recipe.train.mixup:
        raise InputError(
            "mixup cannot be used while the teacher learns beside the student",
            where="train.mixup",
            evidence="the influence of a sample is not defined for a mixture of two",
            fix='train.mixup = 0, or teacher.strategy = "frozen"',
        )


def check_held_out(section: TeacherSection, dataset: Dataset, seed: int) -> None:
    """Refuses a share of held-out samples that leaves a class empty.

    Raises:
        InputError: with the smallest share that works.
    """
    if section.moves and section.held_out is not None:
        from distill.strategies.held_out import held_out_rows

        labels = Labels(dataset.train.labels, dataset.train.mask)
        held_out_rows(labels, dataset.classes, section.held_out, seed)


# -- what a strategy does ---------------------------------------------------------------------------------------------


def coach(section: TeacherSection, teacher: Teacher, dataset: Dataset) -> Coached:
    """A strategy "online", "meta" or "lgtm" for one student, whose teacher starts as a copy of `teacher`.

    Raises:
        InputError: see `live_teacher`.
    """
    from distill.strategies.coached import Coached

    assert section.strategy in ("online", "meta", "lgtm")
    return Coached(
        section.strategy,
        section.coached,
        live_teacher(teacher, section.coached.trainable_layers, dataset),
        dataset,
        held_out=section.held_out,
        learning_rate=coached_rate(section),
        start_key=teacher.key,
    )


def coached_rate(section: TeacherSection) -> float:
    """The learning rate of a coached teacher."""
    asked = section.coached.learning_rate
    return _RATES.get(section.kind, _RATE) if asked == "auto" else asked


def told_shapes(cache: TeacherCache, dataset: Dataset) -> TeacherCache:
    """What an objective is built for that listens to a coached teacher: one with a logit for every class."""
    classes = len(dataset.classes)
    if cache.num_logits == classes:
        return cache
    # only the shape is read; a view of one number takes no memory
    none = np.broadcast_to(np.float32(0), (cache.views, len(dataset.train), classes))
    return replace(cache, train_logits=none, num_logits=classes)


# -- students that start from a pool ----------------------------------------------------------------------------------


def pooled_start(pool: Path, arch: str, dataset: Dataset, folder: Path, *, seed: int) -> Metric:
    """Writes the weights that a student has in a pool as an artefact, BatchNorm statistics of its own; once.

    While a pool trains, every member moves the statistics that it shares with others, so they are recomputed on clean
    training inputs: up to 20 batches of 128, chosen by the seed. Stored, because the last bits of such sums depend on
    the number of threads, and a student that starts elsewhere would be trained anew.

    Args:
        pool: the finished artefact of a teacher that was conditioned on it.
        arch: a member.
        dataset: what the teacher was trained on.
        folder: of the artefact.
        seed: of the choice of inputs.

    Returns:
        The task's primary metric of these weights on the validation split.

    Raises:
        InputError: files of the pool missing or damaged.
    """
    from distill.strategies.generic import SUPERNET_FILE, load_supernet

    weights = artifact.read_manifest(pool, "student").files[SUPERNET_FILE]
    key = artifact.content_key(START_KIND, _START_FORM, weights, dataset.key, arch, seed)
    found = artifact.current(folder, START_KIND, key)
    if found is not None:
        return Metric.model_validate(found.info["validation"])
    supernet = load_supernet(pool, dataset.input, len(dataset.classes)).to(default_device())
    supernet.recalibrate(parse_arch(arch), _recalibration(dataset, seed))
    student = supernet.standalone(parse_arch(arch))
    objective = build_objective((SupervisedSection(),), dataset, None, student_dim=student.embedding_dim)
    validation = dataset.validation
    logits = evaluate_logits(student, objective, validation)
    metric = evaluate(dataset.task, logits, validation.labels, validation.mask, seed=seed)
    with artifact.create(folder, START_KIND, key, {"validation": metric.model_dump(mode="json")}) as temporary:
        save_student(student, temporary / _START_FILE)
    return metric


def _recalibration(dataset: Dataset, seed: int) -> Iterator[Tensor]:
    """Clean training inputs, in random order; batches of nearly one size, since each has the same say."""
    inputs = dataset.train.inputs
    rows = np.random.default_rng(seed).permutation(len(inputs))[: _BATCHES * _BATCH_SIZE]
    for chosen in np.array_split(rows, -(-len(rows) // _BATCH_SIZE)):
        yield torch.from_numpy(np.asarray(inputs[chosen])).to(default_device())


def inherit(student: Student, folder: Path) -> None:
    """Starts a student from what `pooled_start` wrote; its head, too, if of one size.

    Raises:
        InputError: files missing or damaged.
    """
    file = folder / _START_FILE
    load_state(student, read_state(file, where=str(file)), file=file, where=str(file), skip=("head",))
