"""What is trained, in which order, and what each training waits for: plain values, nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Objective = Literal["supervised", "kd", "lelp"]

TEACHER = "conv-w32-d1-k3"
"""Two and a half times the FLOPs of the largest student; two CPU cores train it in about a minute."""
POOL = (
    "conv-w4-d1-k3",
    "conv-w4-d2-k3",
    "conv-w8-d1-k3",
    "conv-w12-d1-k3",
    "conv-w8-d1-k5",
    "conv-w12-d1-k5",
)
"""What the generic teacher is conditioned on, by FLOPs: 21 times from the first to the last."""
NEVER_SAMPLED = ("conv-w4-d1-k5", "conv-w8-d2-k3", "conv-w16-d1-k3")
"""Students that no teacher saw: two recombine values of the pool, the width of the third is not in it."""
STUDENTS = (*POOL, *NEVER_SAMPLED)
OWN_TEACHER = ("conv-w4-d1-k3", "conv-w8-d1-k3", "conv-w8-d1-k5", "conv-w12-d1-k5")
"""Students that get an SFTN teacher each, over the range of the pool."""
MIDDLE = "conv-w8-d1-k3"
"""Whose SFTN teacher also teaches all the others."""
TUNED_ON = ("conv-w8-d1-k3",)
"""Temperatures are chosen by its validation accuracy, seed 0: for every arm alike."""
TAUS = (1.0, 2.0, 4.0, 8.0)
SEEDS = (0, 1, 2)
ABLATED_ON = ("conv-w4-d1-k3", "conv-w8-d1-k3", "conv-w12-d1-k5")

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Teacher:
    """A teacher network. pool: what it is conditioned on, none for the plain one. settings: of `GenericSection`."""

    name: str
    pool: tuple[str, ...] = ()
    settings: Settings = ()


@dataclass(frozen=True)
class Arm:
    """A row of the tables: which teacher each student gets. base: the arm whose temperature is taken over."""

    name: str
    title: str
    teachers: Mapping[str, Teacher]
    base: str | None = None

    @property
    def students(self) -> tuple[str, ...]:
        """Those that the arm is defined for."""
        return tuple(self.teachers)


VANILLA = Teacher("vanilla")
SFTN = {arch: Teacher(f"sftn-{arch}", (arch,)) for arch in OWN_TEACHER}
UNIFORM = Teacher("gtn-uniform", POOL)
EASY = Teacher("gtn-easy", POOL, (("distribution", "easy"), ("entropy", 0.5)))
ARMS = {
    arm.name: arm
    for arm in (
        Arm("vanilla", "plain teacher", dict.fromkeys(STUDENTS, VANILLA)),
        Arm("gtn-uniform", "GTN, uniform", dict.fromkeys(STUDENTS, UNIFORM)),
        Arm("sftn-one", f"SFTN of {MIDDLE}, for all", dict.fromkeys(STUDENTS, SFTN[MIDDLE])),
        Arm("sftn-each", "SFTN, one per student", SFTN),
        Arm("gtn-easy", "GTN, learned (easy)", dict.fromkeys(STUDENTS, EASY)),
    )
}
"""In the order in which they are trained."""


def _ablation(name: str, title: str, base: str, **settings: Any) -> Arm:
    teacher = Teacher(name, POOL, tuple(settings.items()))
    return Arm(name, title, dict.fromkeys(ABLATED_ON, teacher), base)


ABLATIONS = {
    arm.name: arm
    for arm in (
        _ablation("gtn-hard", "learned (hard)", "gtn-easy", distribution="hard", entropy=0.5),
        _ablation("gtn-kl1", "uniform, lambda_KL 1 instead of 3", "gtn-uniform", kl_weight=1.0),
        _ablation("gtn-k1", "uniform, K 1 instead of 2", "gtn-uniform", paths=1),
        _ablation("gtn-k4", "uniform, K 4 instead of 2", "gtn-uniform", paths=4),
        _ablation(
            "gtn-easy-entropy0", "learned (easy), beta 0 instead of 0.5", "gtn-easy", distribution="easy", entropy=0.0
        ),
        _ablation(
            "gtn-easy-entropy001",
            "learned (easy), beta 0.01 instead of 0.5",
            "gtn-easy",
            distribution="easy",
            entropy=0.01,
        ),
    )
}


@dataclass(frozen=True)
class TeacherCell:
    """The training of a teacher, and its cached outputs."""

    teacher: Teacher
    seed: int

    @property
    def place(self) -> str:
        """Its folder."""
        return f"teachers/{self.teacher.name}/seed{self.seed}"

    @property
    def label(self) -> str:
        """For people."""
        return f"teacher {self.teacher.name}, seed {self.seed}"


@dataclass(frozen=True)
class StudentCell:
    """The training of a student. teacher: None for the plain student. tau: of `kd`; None while it is not chosen."""

    objective: Objective
    arch: str
    seed: int
    teacher: Teacher | None = None
    tau: float | None = None

    @property
    def place(self) -> str:
        """Its folder."""
        how = self.objective if self.tau is None else f"{self.objective}-tau{self.tau:g}"
        teacher = "none" if self.teacher is None else self.teacher.name
        return f"students/{teacher}/{how}/{self.arch}/seed{self.seed}"

    @property
    def label(self) -> str:
        """For people."""
        how = self.objective if self.tau is None else f"{self.objective} tau {self.tau:g}"
        teacher = "" if self.teacher is None else f" from {self.teacher.name}"
        return f"{how}{teacher}, {self.arch}, seed {self.seed}"

    @property
    def known(self) -> bool:
        """Whether all that it needs besides its teacher is decided."""
        return self.objective != "kd" or self.tau is not None


Cell = TeacherCell | StudentCell


def tuning_cells(arm: str) -> list[StudentCell]:
    """The trainings that choose an arm's temperature."""
    teachers = ARMS[arm].teachers
    return [StudentCell("kd", arch, SEEDS[0], teachers[arch], tau) for tau in TAUS for arch in TUNED_ON]


def student_cell(arm: Arm, objective: Objective, arch: str, seed: int, taus: Mapping[str, float]) -> StudentCell:
    """A student of an arm; taus: arm -> chosen temperature, as far as chosen."""
    tau = taus.get(arm.base or arm.name) if objective == "kd" else None
    return StudentCell(objective, arch, seed, arm.teachers[arch], tau)


def plan(taus: Mapping[str, float], seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """Everything, without duplicates, in the order in which partial results say most.

    KD one seed after the other: teachers, temperatures (first seed), plain students, students. Then LELP, then the
    ablations.
    Students whose temperature is not chosen yet are not `known`.
    """
    cells: list[Cell] = []
    for seed in seeds:
        cells += [TeacherCell(teacher, seed) for arm in ARMS.values() for teacher in arm.teachers.values()]
        if seed == SEEDS[0]:
            cells += [cell for arm in ARMS for cell in tuning_cells(arm)]
        cells += [StudentCell("supervised", arch, seed) for arch in STUDENTS]
        for arm in ARMS.values():
            cells += [student_cell(arm, "kd", arch, seed, taus) for arch in arm.students]
    for seed in seeds:
        for arm in ARMS.values():
            cells += [student_cell(arm, "lelp", arch, seed, taus) for arch in arm.students]
    for seed in seeds:
        for arm in ABLATIONS.values():
            cells += [TeacherCell(teacher, seed) for teacher in arm.teachers.values()]
            cells += [student_cell(arm, "kd", arch, seed, taus) for arch in arm.students]
    return list(dict.fromkeys(cells))


def next_cell(cells: Sequence[Cell], done: frozenset[Cell], busy: frozenset[Cell]) -> Cell | None:
    """The first cell that is neither done nor busy and whose teacher is done; None: nothing can start now."""
    for cell in cells:
        if cell in done or cell in busy:
            continue
        if isinstance(cell, TeacherCell):
            return cell
        if cell.known and (cell.teacher is None or TeacherCell(cell.teacher, cell.seed) in done):
            return cell
    return None


def choose_tau(scores: Mapping[StudentCell, float], arm: str) -> float | None:
    """The temperature with the highest mean validation accuracy, the smaller of equals; None: some are missing."""
    cells = tuning_cells(arm)
    if any(cell not in scores for cell in cells):
        return None
    means = {tau: sum(scores[cell] for cell in cells if cell.tau == tau) / len(TUNED_ON) for tau in TAUS}
    return max(TAUS, key=lambda tau: (round(means[tau], 9), -tau))
