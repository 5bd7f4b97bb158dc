"""What a study found, as one versioned document: the only source of its table, plot and CSV. Fractions are 0..1."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from cli.report.schema import DataFacts, Machine, Part
from distill.study import Outcome
from profiles.errors import InputError

SCHEMA_VERSION: Final = 1


class CellResult(Part):
    """One training. validation, test: the task's metric of the kept epoch. terms: that epoch's losses and logs."""

    method: str
    factors: dict[str, Any]
    seed: int
    validation: float
    test: float
    best_epoch: int
    epochs: int
    seconds: float
    samples_per_second: float
    train_samples: int
    arch: str
    parameters: int
    hard_weight: float
    device: str
    threads: int
    terms: dict[str, float]


class TrialResult(Part):
    """One training of a tuning, which never sees the test split. settings: values of the searched recipe keys.

    validation: the task's metric of the kept epoch; None: the training failed, and `error` says why.
    """

    number: int
    settings: dict[str, Any]
    validation: float | None
    seconds: float = 0.0
    best_epoch: int | None = None
    epochs: int | None = None
    train_samples: int | None = None
    error: str | None = None


class TuningRow(Part):
    """The tuning of one method with one value of every factor.

    search: what was tried for every key, in words. trials: all of one seed; the first has the method's defaults.
    best: number of the trial whose settings the cells have; None: no trial has a result.
    """

    method: str
    factors: dict[str, Any]
    search: dict[str, str]
    seed: int
    trials: tuple[TrialResult, ...]
    best: int | None
    seconds: float

    @property
    def defaults(self) -> TrialResult:
        """The trial with the method's defaults."""
        return self.trials[0]

    @property
    def chosen(self) -> TrialResult | None:
        """The best trial."""
        return None if self.best is None else self.trials[self.best]


class ComparisonRow(Part):
    """A method minus the control, paired by seed.

    difference: mean over seeds. bootstrap: percentile bootstrap over seeds. seeds_interval: Student's t over seeds,
    None for one seed. samples_interval: bootstrap over test samples. wins, ties: of `n` seeds. outcome: "higher" or
    "lower" only where the last two intervals both leave out zero. seeds_needed: rough guide, None when more than 100 or
    unknown.
    """

    difference: float
    by_seed: dict[int, float]
    bootstrap: tuple[float, float]
    seeds_interval: tuple[float, float] | None
    samples_interval: tuple[float, float]
    confidence: float
    wins: int
    ties: int
    n: int
    outcome: Outcome
    seeds_needed: int | None
    reasons: tuple[str, ...]


class MethodRow(Part):
    """One method with one value of every factor. sd: over seeds, None for one. seconds: mean of one training."""

    method: str
    test: dict[int, float]
    mean: float
    sd: float | None
    validation_mean: float
    seconds: float
    hard_weight: float
    arch: str
    parameters: int
    to_control: ComparisonRow | None = None


class Block(Part):
    """All methods with one value of every factor. control: whether its cells are there to compare with."""

    factors: dict[str, Any]
    train_samples: int
    rows: tuple[MethodRow, ...]


class TeacherFacts(Part):
    """A teacher that cells learned from. train_samples: it saw so many, whatever a cell's own number is.

    methods: those whose cells learned from it. subclasses: per class, of a teacher that was trained again with them.
    conditioned_on: the students that a teacher of strategy "generic" or "sftn" was trained for, in words.
    test: the task's metric, None without class logits. seconds: of its training, None when it was not trained here.
    """

    kind: str
    arch: str | None = None
    train_samples: int
    methods: tuple[str, ...] = ()
    subclasses: int | None = None
    conditioned_on: str | None = None
    test: float | None = None
    seconds: float | None = None
    factors: dict[str, Any] = Field(default_factory=dict)


class FailedCell(Part):
    """A cell without a result."""

    label: str
    error: str


class StudyReport(Part):
    """A study's result."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    created: str
    seconds: float
    """Wall-clock time of the command that wrote this; finished cells cost it nothing."""
    versions: dict[str, str]
    machine: Machine
    recipe: str
    folder: str
    task: str
    metric: str
    n_test: int
    unit: Literal["image", "text", "sample"] = "sample"
    data: DataFacts
    teachers: tuple[TeacherFacts, ...] = ()
    control: str
    seeds: int
    jobs: int
    methods: tuple[str, ...]
    factors: dict[str, tuple[Any, ...]]
    blocks: tuple[Block, ...]
    cells: tuple[CellResult, ...]
    tune: int | None = None
    """Trials of every tuning; None: the methods were not tuned."""
    tuning: tuple[TuningRow, ...] = ()
    planned: int
    """Cells of the grid."""
    failed: tuple[FailedCell, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exit_status(self) -> int:
        """1 when a cell failed, else 0."""
        return 1 if self.failed else 0


def load_study(path: Path) -> StudyReport:
    """Reads a `study.json`.

    Raises:
        InputError: damaged, or of another version.
    """
    try:
        return StudyReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            "this study's report is damaged or of another version of edgestill",
            where=str(path),
            evidence=f"{'.'.join(map(str, first['loc'])) or 'document'}: {first['msg']}",
            fix="the study's own command writes it again; finished trainings are used",
        ) from error
