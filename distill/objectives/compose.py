"""Several objectives as one: what the loop trains against."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from distill.data.dataset import Dataset
from distill.objectives.base import CachedTeacher, FitData, Objective, Shapes, SubclassedTeacher
from distill.objectives.cosine_difference import CosineDifference
from distill.objectives.crd import CRD
from distill.objectives.dist import DIST
from distill.objectives.distance_correlation import DistanceCorrelation
from distill.objectives.dkd import DKD
from distill.objectives.embedding import Embedding
from distill.objectives.embedding_compression import EmbeddingCompression
from distill.objectives.fitnet import FitNet
from distill.objectives.kd import KD
from distill.objectives.lelp import LELP
from distill.objectives.mse import MSE
from distill.objectives.rkd import RKD
from distill.objectives.section import (
    AnyObjective,
    Need,
    SubclassSection,
    check_data,
    check_mixup,
    check_needs,
    resolve_hard_weight,
)
from distill.objectives.split_head import class_logits_of
from distill.objectives.subclass import Subclass, SubclassTeacher, teacher_section
from distill.objectives.supervised import Supervised
from distill.objectives.vid import VID
from distill.outputs import Batch, StudentOutput, TeacherOutput
from profiles.errors import InputError

_MODULES: dict[str, type[Objective]] = {
    "supervised": Supervised,
    "kd": KD,
    "dkd": DKD,
    "dist": DIST,
    "mse": MSE,
    "embedding": Embedding,
    "fitnet": FitNet,
    "vid": VID,
    "rkd": RKD,
    "crd": CRD,
    "embedding_compression": EmbeddingCompression,
    "distance_correlation": DistanceCorrelation,
    "cosine_difference": CosineDifference,
    "lelp": LELP,
    "subclass": Subclass,
}


class Composition(nn.Module):
    """A mix of objectives, and the weight of the ground truth that the loop adds once.

    At most one objective sets the size of the student's head; it sees the raw head, the others its class logits.
    Build it with `build_objective`.
    """

    def __init__(self, sections: tuple[AnyObjective, ...], objectives: list[Objective], hard_weight: float) -> None:
        super().__init__()
        self.sections = sections
        self.hard_weight = hard_weight
        self.objectives = nn.ModuleList(objectives)
        kinds = [section.kind for section in sections]
        # two of a kind are allowed (KD at two temperatures); their terms need different names
        self._prefixes = [
            "" if kinds.count(kind) == 1 else f"objective[{position}]/" for position, kind in enumerate(kinds)
        ]
        self._leader = _leader(sections, objectives[0].shapes.classes)
        self._subclasses = objectives[0].shapes.subclasses
        for objective in objectives:
            objective.attach(objectives)

    def class_logits(self, head: Tensor) -> Tensor:
        """Head output (N, H) -> class logits (N, C); part of the exported graph."""
        return head if self._leader is None else self._at(self._leader).class_logits(head)

    def prepare(self, data: FitData, *, fitted: bool = False) -> None:
        """Fits every objective on the training split. `fitted`: parameters came from a checkpoint."""
        for position in sorted(range(len(self.objectives)), key=lambda position: self._at(position).builds_on_others):
            self._at(position).prepare(self._fit_data(position, data), fitted=fitted)

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        """All distillation terms by name; the total of the method is their sum plus the ground-truth term."""
        plain = StudentOutput(student.embedding, self.class_logits(student.head))
        taught = teacher
        if self._subclasses is not None and teacher.logits is not None:
            taught = TeacherOutput(teacher.embedding, class_logits_of(teacher.logits, self._subclasses))
        terms: dict[str, Tensor] = {}
        for position, prefix in enumerate(self._prefixes):
            view = student if position == self._leader else plain
            factor = self.sections[position].factor(batch.progress)
            told = teacher if isinstance(self._at(position), Subclass) else taught
            for name, term in self._at(position)(view, told, batch).items():
                terms[prefix + name] = factor * term
        return terms

    def logs(self) -> dict[str, float]:
        """Every objective's figures; call once per epoch."""
        return {
            prefix + name: value
            for position, prefix in enumerate(self._prefixes)
            for name, value in self._at(position).logs().items()
        }

    def check_mixup(self, mixup: float) -> None:
        """As `distill.objectives.section.check_mixup`, for these objectives."""
        check_mixup(self.sections, mixup)

    def _fit_data(self, position: int, data: FitData) -> FitData:
        """What the objective at `position` fits on: class logits, unless subclasses are its business."""
        if self._subclasses is None or data.logits is None or isinstance(self._at(position), Subclass):
            return data
        logits = class_logits_of(data.logits.float(), self._subclasses)
        return replace(data, logits=logits, head_weight=None, head_bias=None)  # no linear map gives the class logits

    def _at(self, position: int) -> Objective:
        return cast(Objective, self.objectives[position])


def _leader(sections: tuple[AnyObjective, ...], classes: int) -> int | None:
    """Position of the objective that changes the head's size, None when none does."""
    changing = [
        position
        for position, section in enumerate(sections)
        if _MODULES[section.kind].head_size(section, classes) != classes
    ]
    if len(changing) > 1:
        raise InputError(
            "two objectives want to set the size of the student's head",
            where=f"objective[{changing[1]}].kind",
            evidence=" and ".join(sections[position].kind for position in changing),
            fix="keep one of them",
        )
    return changing[0] if changing else None


def head_size(sections: tuple[AnyObjective, ...], classes: int) -> int:
    """Outputs that the student's head needs.

    Raises:
        InputError: two objectives want to set it.
    """
    leader = _leader(sections, classes)
    return classes if leader is None else _MODULES[sections[leader].kind].head_size(sections[leader], classes)


def available(dataset: Dataset, cache: CachedTeacher | None) -> frozenset[Need]:
    """What the data and the cached teacher can supply."""
    found: set[Need] = {"labels"} if len(dataset.train.labels) else set()
    if cache is not None and cache.train_embedding is not None:
        found.add("embedding")
    if cache is not None and cache.train_logits is not None:
        found.add("logits")
    return frozenset(found)


def build_objective(
    sections: tuple[AnyObjective, ...],
    dataset: Dataset,
    cache: CachedTeacher | None,
    *,
    student_dim: int,
    hard_weight: float | None = None,
    seed: int = 0,
) -> Composition:
    """The composed objective with fresh parameters, a pure function of `seed`; global generators stay as they are.

    Args:
        sections: the recipe's `[[objective]]` tables.
        dataset: gives task and classes.
        cache: the teacher's outputs, None without a teacher.
        student_dim: size of the student's embedding, D_s.
        hard_weight: `train.hard_weight`; None: the only objective's own.
        seed: of the parameters.

    Raises:
        InputError: an objective's needs are not met, hard_weight is missing, or the teacher has other classes.
    """
    check_needs(sections, available(dataset, cache))
    classes = len(dataset.classes)
    check_data(sections, dataset.task, classes, len(dataset.train))
    logits = _columns(cache.train_logits if cache is not None else None)
    subclasses = cache.subclasses if isinstance(cache, SubclassedTeacher) else None
    if logits is not None and subclasses is not None:
        logits //= subclasses
    check_classes(sections, classes, logits)
    shapes = Shapes(
        task=dataset.task,
        classes=classes,
        student_dim=student_dim,
        teacher_dim=_columns(cache.train_embedding if cache is not None else None),
        teacher_logits=logits,
        hard_weight=resolve_hard_weight(sections, hard_weight),
        train_samples=len(dataset.train),
        subclasses=subclasses,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        objectives = [
            _MODULES[section.kind](section, replace(shapes, position=position))
            for position, section in enumerate(sections)
        ]
    return Composition(sections, objectives, shapes.hard_weight)


def build_teacher_objective(section: SubclassSection, dataset: Dataset, *, student_dim: int) -> Composition:
    """What a teacher with subclasses is trained against; cross-entropy has weight 1.

    Args:
        section: of the student's objective; what concerns the student alone changes nothing here.
        dataset: gives task and classes.
        student_dim: size of the embedding of the network that becomes the teacher.
    """
    section = teacher_section(section)
    shapes = Shapes(
        task=dataset.task,
        classes=len(dataset.classes),
        student_dim=student_dim,
        teacher_dim=None,
        teacher_logits=None,
        hard_weight=1.0,
        train_samples=len(dataset.train),
    )
    return Composition((section,), [SubclassTeacher(section, shapes)], 1.0)


def check_classes(sections: tuple[AnyObjective, ...], classes: int, teacher_classes: int | None) -> None:
    """Refuses a teacher of other classes where an objective compares class by class.

    Args:
        sections: the recipe's objectives.
        classes: of the data.
        teacher_classes: class logits of the teacher; None without.

    Raises:
        InputError: names the objective's place in the recipe.
    """
    for position, section in enumerate(sections):
        if "logits" in section.needs and teacher_classes != classes:
            raise InputError(
                f"the teacher has {teacher_classes} classes, the data {classes}",
                where=f"objective[{position}].kind",
                evidence=f'objective "{section.kind}" compares class by class',
                fix='a teacher of this task, or objective = "ec", which works with a teacher of another task',
            )


def _columns(outputs: Any) -> int | None:
    return None if outputs is None else int(outputs.shape[-1])
