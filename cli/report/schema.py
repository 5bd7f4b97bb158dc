"""The report as one versioned document, `report.json`: the only source of terminal table, page, CSV and Markdown.

Units: metrics and their differences are fractions (0..1), times milliseconds unless the name says seconds, sizes MiB.
The JSON Schema beside this file is made from these models:
`python -m cli.report.schema > cli/report/report.schema.json`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol, Self

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, ValidationError, model_validator

from cli.report.verdict import Judged, RowVerdict, Verdict, exit_status, overall_verdict
from profiles.errors import InputError
from profiles.measurement import Measurement
from profiles.section import Section

SCHEMA_VERSION: Final = 1
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")

Scope = Literal["end_to_end", "compute"]
LimitName = Literal["latency_ms", "memory_mib", "file_size_mib", "energy_mj", "metric_floor", "max_metric_drop"]
"""A limit goes by its key in the recipe, so that a reader knows what to change."""
MetricPlace = Literal["artifact in its runtime", "ONNX Runtime here, not the device", "PyTorch"]


class Part(Section):
    """A part of the report: NaN and infinity are refused, since JSON cannot hold them; what is not known is None."""

    model_config = ConfigDict(allow_inf_nan=False)


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Charted = Annotated[float | None, BeforeValidator(_finite)]
"""A value of a curve: a diverged training has NaN here, which becomes None."""


class MetricLike(Protocol):
    """What `MetricValue.of` reads; `profiles.metrics.Metric` is one."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def n(self) -> int: ...
    @property
    def confidence(self) -> float: ...
    @property
    def method(self) -> str: ...


class EnergyLike(Protocol):
    """What `EnergyValue.of` reads: a measured energy of one inference."""

    @property
    def millijoules(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...
    @property
    def confidence(self) -> float: ...
    @property
    def how(self) -> str: ...


class MetricValue(Part):
    """A metric with its interval, and where the model ran that it belongs to."""

    value: float
    low: float
    high: float
    n: int
    """Samples that it was computed on."""
    confidence: float = 0.95
    method: str = ""
    """Of the interval: Wilson, bootstrap."""
    on: MetricPlace = "artifact in its runtime"

    @classmethod
    def of(cls, metric: MetricLike, on: MetricPlace = "artifact in its runtime") -> MetricValue:
        """The report's copy of a computed metric."""
        return cls(
            value=metric.value,
            low=metric.low,
            high=metric.high,
            n=metric.n,
            confidence=metric.confidence,
            method=metric.method,
            on=on,
        )

    @property
    def half_width(self) -> float:
        """Half of the interval: what stands after the ± sign."""
        return (self.high - self.low) / 2


class Difference(Part):
    """A paired difference of two metrics on the same samples, as a fraction."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


class LatencyValue(Part):
    """A latency in milliseconds: the point estimate of one percentile and the bounds that decide a limit."""

    percentile: float
    """50, 90, 95, 99 or 99.9."""
    point: float | None
    """None when there were too few samples for this percentile."""
    upper_bound: float | None = None
    lower_bound: float | None = None
    confidence: float = 0.99
    """Of each bound at one look."""
    planned_looks: int = 1
    """At how many looks sampling could have ended; over all, a bound may be wrong with 1 - confidence for each."""
    scope: Scope = "end_to_end"
    batch: int = 1
    samples: int = 0
    stable: bool = True
    """False when the warm-up gave up before successive windows agreed."""
    p50: float | None = None
    mean: float | None = None
    max: float | None = None
    outliers: int | None = None
    runtime: str = ""
    runtime_version: str = ""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Everything that was set in the runtime, and the pause between queries."""
    input_shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    input_source: str = ""
    """runtime to input_source: what must be the same for two latencies to be compared."""

    @classmethod
    def of(cls, measurement: Measurement) -> LatencyValue:
        """The report's copy of a measurement, in the scope that its target asked for."""
        asked = measurement.asked
        return cls(
            percentile=asked.percentile,
            point=asked.value,
            upper_bound=asked.upper_bound,
            lower_bound=asked.lower_bound,
            confidence=asked.bound_confidence,
            planned_looks=measurement.planned_looks,
            scope=asked.scope,
            batch=measurement.batch,
            samples=asked.samples,
            stable=measurement.stable,
            p50=asked.p50,
            mean=asked.mean,
            max=asked.maximum,
            outliers=asked.outliers,
            runtime=measurement.runtime,
            runtime_version=measurement.runtime_version,
            options=measurement.options,
            input_shapes=measurement.input_shapes,
            input_source=measurement.input_source,
        )


class EnergyValue(Part):
    """Energy of one inference in millijoules, idle power subtracted."""

    value: float | None = None
    """None where this machine offers no sensor; `how` then has the reason."""
    low: float | None = None
    high: float | None = None
    confidence: float = 0.95
    how: str = ""
    """Which sensor, over which parts of the device."""

    @classmethod
    def of(cls, energy: EnergyLike) -> EnergyValue:
        """The report's copy of a measured energy."""
        return cls(
            value=energy.millijoules, low=energy.low, high=energy.high, confidence=energy.confidence, how=energy.how
        )


class Roofline(Part):
    """The least time that the device's own peak figures allow: a bound, never an estimate."""

    bound_ms: float
    limiting: Literal["compute", "memory"]


class LimitVerdict(Part):
    """One limit of a target: what was asked, what was found and the interval that decided."""

    name: LimitName
    limit: float
    """In the unit of the recipe key: ms, MiB, or a fraction for metrics."""
    value: float | None = None
    """None when it was not measured."""
    low: float | None = None
    high: float | None = None
    """low and high: the interval that decided; None where the value is exact (a file's size)."""
    verdict: Verdict
    reason: str = ""
    """Why it is inconclusive or not measured, one sentence."""


class Engine(Part):
    """What was compiled from the ONNX file, and what could only be parsed."""

    file: str | None = None
    built_by: str | None = None
    """Builder and version: "TensorRT-RTX 1.7.1"."""
    parsed_by: str | None = None
    """What a parser said of the graph when nothing was built: "parsed by TensorRT-RTX 1.7.1", "not parsed by ..."."""
    not_built_because: str | None = None
    """A clause: "TensorRT 10.3.0 builds its engine on the device"."""


class CandidateRow(Part):
    """One precision that was tried for a target."""

    precision: str
    compute_precision: str = ""
    """What the runtime really computes in, when it differs from the file's precision."""
    size_mib: float | None = None
    metric: MetricValue | None = None
    """On the validation split: candidates are chosen there, the test split is used once."""
    latency: LatencyValue | None = None
    peak_memory_mib: float | None = None
    energy: EnergyValue | None = None
    chosen: bool = False
    rejected_because: str | None = None


class PlanStep(Part):
    """One thing that the precision planner tried for a target, and what it bought."""

    name: str
    """Such as "int8 entropy", "int8-mixed", "quantisation-aware training"."""
    metric: float | None = None
    """On the validation split; None: the step made no graph, or it was refused."""
    size_mib: float | None = None
    seconds: float | None = None
    """What it took when it was done, which may have been in an earlier run."""
    keeps: bool | None = None
    """Whether it keeps the metric that the target asks for; None: not its business."""
    note: str = ""


CostSource = Literal["measured", "calibrated", "assumed", "bound"]
"""How a cost is known: run on the device; predicted by its calibration; its roofline bound over an assumed efficiency;
a lower end."""


class RankedStudent(Part):
    """A member of the pool that fits the target, as far as it was told apart from the others."""

    arch: str
    by: Literal["supernet", "trial", "capacity"]
    score: Charted = None
    """The metric on the validation split with shared weights or after the longest trial; multiply-adds."""
    epochs: float | None = None
    """Of that trial."""
    validation: Charted = None
    """The metric after its full training, in PyTorch; None where it was not trained in full."""


class RejectedStudent(Part):
    """One architecture in one precision that was not chosen, and the limit or the figure that decided."""

    arch: str
    precision: str
    reason: str
    """With the numbers: "latency ~0.61 ms, limit 0.4"; a tilde marks a prediction."""
    limit: LimitName | None = None
    """None: it is within the limits, but less accurate."""
    needs: float | None = None
    allowed: float | None = None
    source: CostSource = "bound"


class Attempt(Part):
    """One exported file of a student that was trained in full."""

    arch: str
    name: str
    """Of the file: fp32, fp16, int8, int8-fp16."""
    precision: str
    metric: float
    """On the validation split."""
    latency_ms: float | None = None
    """The bound that decides where it was measured, else what is expected; see `source`."""
    source: CostSource
    passes: bool
    """Within every limit that is known about it."""
    problem: str = ""
    """What it is over, with the numbers."""
    chosen: bool = False


class Selection(Part):
    """How a target's student was chosen from the pool of `[student]`."""

    pool: int
    """Architectures in it."""
    fitting: int
    """Those that are within the limits in one precision at least, by what was known before any was trained."""
    source: CostSource
    """How their costs were known then."""
    efficiency: float | None = None
    """The share of its roofline that the device was taken to reach; None where that played no part."""
    efficiency_from: str = ""
    ranked: tuple[RankedStudent, ...] = ()
    """Best first."""
    attempts: tuple[Attempt, ...] = ()
    """In the order in which they were made."""
    rejected: tuple[RejectedStudent, ...] = ()
    """By their cost, before any training; nearest first."""
    passing: dict[LimitName, float] = Field(default_factory=dict)
    """The least limits with which the nearest of the pool would have passed, where nothing does."""
    shared_with: tuple[str, ...] = ()
    """Other targets that got the same student."""
    untried: int = 0
    """Cheaper members that were passed over when all that were to be trained turned out to be over a limit."""
    left_out: int = 0
    """Further members that were rejected by their cost and are not in `rejected`."""

    @property
    def chosen(self) -> Attempt | None:
        """The file that is shipped; None where no student could be made for the limits."""
        return next((attempt for attempt in self.attempts if attempt.chosen), None)


class SharedTraining(Part):
    """A network that was trained once, and the targets that it served.

    A student serves the targets that would have trained it in a run of their own: those whose finalist or fallback it
    is.
    """

    role: Literal["teacher", "supernet", "trial", "student", "qat"]
    """supernet: a teacher that was trained with the pool's shared weights; qat: a student trained on for INT8."""
    arch: str
    epochs: float
    seconds: float
    targets: tuple[str, ...]
    kept: bool = False
    """Whether some target got this student."""

    @property
    def title(self) -> str:
        """What it was: "student, kept"."""
        words = {"qat": "for INT8", "student": "student, kept" if self.kept else "student, not kept"}
        return words.get(self.role, self.role)


class Sharing(Part):
    """What choosing for several targets at once did not do twice."""

    trainings: tuple[SharedTraining, ...]

    @property
    def own(self) -> tuple[SharedTraining, ...]:
        """The trainings without the teacher's, which the students share whether they are chosen or not."""
        return tuple(training for training in self.trainings if training.role not in ("teacher", "supernet"))

    @property
    def teacher_seconds(self) -> float:
        """The teacher's training, with the pool's shared weights where it has any."""
        return sum(training.seconds for training in self.trainings) - self.seconds

    @property
    def seconds(self) -> float:
        """All trainings of `own`, once each."""
        return sum(training.seconds for training in self.own)

    @property
    def separate_seconds(self) -> float:
        """The same, had every target been a run of its own."""
        return sum(training.seconds * len(training.targets) for training in self.own)

    def seconds_of(self, role: str, *, kept: bool | None = None) -> float:
        """The trainings of one role; of those that some target kept, or of the others, where `kept` says so."""
        return sum(
            training.seconds
            for training in self.trainings
            if training.role == role and (kept is None or training.kept == kept)
        )

    def times(self, *, kept: bool = False) -> float | None:
        """How many times the own training of the students all of `own` took; None where none was trained.

        kept: of the students that some target kept; else of all that were trained in full, each once.
        """
        full = self.seconds_of("student", kept=True if kept else None)
        return self.seconds / full if full else None


class TargetRow(Part):
    """One target: its device, its artefact, what was measured and what follows."""

    name: str
    device: str
    """The device's name in the catalogue: "jetson-orin-nano"."""
    device_title: str
    """As people say it: "Jetson Orin Nano 8GB"."""
    host: str | None = None
    """Name of the machine that it was measured on."""
    stack: str
    """As people say it: "JetPack 6.2.1, TensorRT 10.3.0"."""
    power_mode: str | None = None
    conditions: tuple[str, ...] = ()
    """What else to know of the measurement, a few words each: "4 threads", "61 to 74 °C", "clocks not locked"."""
    arch: str
    precision: str
    compute_precision: str = ""
    """What the runtime really computes in, when it differs from the file's precision."""
    model_file: str | None = None
    bundle: str | None = None
    """Path of the bundle, relative to the run folder."""
    size_mib: float | None = None
    metric: MetricValue | None = None
    """On the test split."""
    latency: LatencyValue | None = None
    """None: not measured on the device."""
    roofline: Roofline | None = None
    load_ms: float | None = None
    first_inference_ms: float | None = None
    peak_memory_mib: float | None = None
    peak_memory_how: str = ""
    energy: EnergyValue | None = None
    limits: tuple[LimitVerdict, ...] = ()
    verdict: RowVerdict
    """`overall_verdict(limits, measured=latency is not None, error=error)`."""
    error: str | None = None
    """Why edgestill could not make or measure this target's artefact."""
    engine: Engine | None = None
    candidates: tuple[CandidateRow, ...] = ()
    steps: tuple[PlanStep, ...] = ()
    """What the precision planner tried, in order."""
    selection: Selection | None = None
    """None where the recipe names the student."""
    why: tuple[str, ...] = ()
    """Reasons of the choice and the verdict, one line each."""
    fixes: tuple[str, ...] = ()
    """What the user could change, one recipe line or command each."""
    environment: dict[str, JsonValue] = Field(default_factory=dict)
    """Everything that was recorded with the measurement."""

    @model_validator(mode="after")
    def _verdict_follows_from_limits(self) -> Self:
        expected = overall_verdict(self.limits, measured=self.latency is not None, error=self.error)
        if self.verdict != expected:
            raise ValueError(f'verdict of target {self.name} is "{self.verdict}", but its limits say "{expected}"')
        return self

    def limit(self, name: LimitName) -> LimitVerdict | None:
        """The limit of that name, None when the target does not set it."""
        return next((limit for limit in self.limits if limit.name == name), None)


class ReferenceRow(Part):
    """A model to compare with: the teacher, or a student trained without one."""

    role: Literal["teacher", "no teacher"]
    arch: str
    precision: str = "fp32"
    size_mib: float | None = None
    metric: MetricValue | None = None
    """None for a teacher that has no class logits."""
    note: str = ""
    strategy: str = "frozen"
    """How a teacher itself learned: `teacher.strategy` of the recipe."""

    @property
    def title(self) -> str:
        """The row's name: "teacher (lgtm)"."""
        return self.role if self.strategy == "frozen" else f"{self.role} ({self.strategy})"


class Bought(Part):
    """What distilling bought: the distilled student minus the plain-trained one of the same architecture, paired."""

    arch: str
    difference: Difference
    objective: str = ""


class Stage(Part):
    """One stage of the run."""

    name: str
    seconds: float
    """Without those of the stages inside it."""
    cached: bool = False
    """True when an earlier run's result was used; `seconds` then is the time of looking."""
    made_seconds: float | None = None
    """What a cached one took when it was made, where an earlier report of the run folder tells."""


class CurvePoint(Part):
    """One validation of a training run."""

    epoch: float
    train_loss: Charted = None
    validation: Charted = None
    """The task's metric, a fraction."""


class TrainingRun(Part):
    """What training one network cost and how it went."""

    role: Literal["teacher", "student", "trial", "no teacher", "qat"]
    """qat: a student that was trained on for INT8."""
    arch: str
    objective: str
    strategy: str = "frozen"
    """How a student's teacher, or this teacher, learned."""
    exploration: str = "none"
    """Kind of the further inputs that a student learned on."""
    epochs: float
    best_epoch: float | None = None
    seconds: float
    samples_per_second: float | None = None
    device: str = ""
    parameters: int | None = None
    curve: tuple[CurvePoint, ...] = ()

    @property
    def title(self) -> str:
        """The training's name: "student (lgtm, random)"."""
        words = [self.strategy] * (self.strategy != "frozen") + [self.exploration] * (self.exploration != "none")
        role = "student for INT8" if self.role == "qat" else self.role
        return f"{role} ({', '.join(words)})" if words else role


ShotName = Literal["many", "medium", "few"]
"""Classes by their training samples: more than 100, 20 to 100, fewer than 20 (`profiles.shots`)."""


class ShotGroup(Part):
    """Classes with a similar number of training samples."""

    name: ShotName
    classes: tuple[str, ...]
    """Their labels."""
    fewest: int
    most: int
    """fewest and most: training samples of one of these classes."""
    n_test: int
    """Test samples of all these classes."""


class ShotRow(Part):
    """One model's accuracy on every group: the mean of the recalls of the group's classes."""

    role: Literal["student", "no teacher", "teacher"]
    targets: tuple[str, ...] = ()
    """Whose chosen file it is, for a student."""
    arch: str
    precision: str = "fp32"
    strategy: str = "frozen"
    """How a teacher itself learned."""
    metrics: dict[ShotName, MetricValue]
    """A group without test samples has none."""

    @property
    def title(self) -> str:
        """The row's name: its targets, or "teacher (lgtm)"."""
        if self.targets:
            return ", ".join(self.targets)
        return self.role if self.strategy == "frozen" else f"{self.role} ({self.strategy})"


class Shots(Part):
    """How the classes with many, medium and few training samples fare, where the training split has a long tail."""

    groups: tuple[ShotGroup, ...]
    """Many first; a group without classes is left out."""
    rows: tuple[ShotRow, ...]

    @model_validator(mode="after")
    def _rows_have_these_groups(self) -> Self:
        names = {group.name for group in self.groups}
        for row in self.rows:
            if not set(row.metrics) <= names:
                raise ValueError(f"{row.title} has groups that are not listed: {sorted(set(row.metrics) - names)}")
        return self


class ExploredStudent(Part):
    """What came of one student's exploration, in the epoch that was kept."""

    arch: str
    kept: Charted = None
    """Share of the further inputs that the filter kept, 0..1; None without a filter."""
    kept_by_class: dict[str, Charted] = Field(default_factory=dict)
    """The same for every class that the teacher named, by label."""
    divergence: Charted = None
    """KL of teacher and student on the further inputs."""


class Picture(Part):
    """A picture, or a text, that the run made for a person to look at."""

    file: str
    """Path relative to the run folder."""
    title: str


class Exploration(Part):
    """Inputs beside the data that the students learned on: `[explore]` of the recipe."""

    kind: str
    control: bool = False
    """Whether this kind is there to be compared with."""
    weight: float
    sigma: float | None = None
    """Radius in standard deviations of the latents; None for kinds without one."""
    generator: str = ""
    """What made the inputs, in a few words; empty where nothing did."""
    filter: str = "none"
    summary: str
    """All that matters of the section, in one line: "random, sigma 1, around the training samples"."""
    students: tuple[ExploredStudent, ...] = ()
    pictures: tuple[Picture, ...] = ()


class DataFacts(Part):
    """Where the data is from."""

    source: str
    title: str = ""
    licence: str = ""
    citation: str = ""
    splits: dict[str, int] = Field(default_factory=dict)
    """Samples per split: train, validation, test."""
    labels: tuple[str, ...] = ()
    input: str = ""
    """What one sample is: "uint8 1x28x28"."""
    test_key: str = ""
    """Hash of the test split, inputs and labels; metrics on other data are not compared."""


class Machine(Part):
    """The machine that trained and reported."""

    title: str
    """CPU or GPU model, cores, memory, as people say it."""
    host: str = ""
    os: str = ""
    python: str = ""


class Counts(Part):
    """How many targets have which verdict."""

    passed: int = 0
    failed: int = 0
    inconclusive: int = 0
    not_measured: int = 0
    errors: int = 0

    @classmethod
    def of(cls, rows: Iterable[Judged]) -> Counts:
        """Counts the verdicts of these rows."""
        verdicts = [row.verdict for row in rows]
        return cls(
            passed=verdicts.count("pass"),
            failed=verdicts.count("fail"),
            inconclusive=verdicts.count("inconclusive"),
            not_measured=verdicts.count("not measured"),
            errors=verdicts.count("error"),
        )


class Report(Part):
    """A run's result."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    created: str
    """ISO 8601 with time zone."""
    seconds: float
    """Wall-clock time of the run that wrote this report, cached stages included at the time they took now."""
    versions: dict[str, str]
    """edgestill and the libraries that decide the result; `profiles.artifact.tool_versions()`."""
    machine: Machine
    recipe: str = ""
    """Recipe as the user named it; commands in the report use it."""
    folder: str
    """Run folder as the user named it."""
    seed: int = 0
    task: str
    metric: str
    """Name of the primary metric: top1, mAP."""
    classes: int
    n_test: int
    unit: Literal["image", "text", "sample"] = "sample"
    """What one sample is, for "2,000 test images"."""
    require_measured: bool = False
    exit_status: int
    """`exit_status(targets, require_measured)`."""
    counts: Counts
    targets: tuple[TargetRow, ...]
    references: tuple[ReferenceRow, ...] = ()
    bought: tuple[Bought, ...] = ()
    stages: tuple[Stage, ...] = ()
    training: tuple[TrainingRun, ...] = ()
    shots: Shots | None = None
    """None where the classes have similarly many training samples, or several labels per sample."""
    exploration: Exploration | None = None
    """None where the students learned on their data alone."""
    sharing: Sharing | None = None
    """None where no student was chosen from a pool."""
    data: DataFacts
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _summary_follows_from_targets(self) -> Self:
        names = [row.name for row in self.targets]
        if len(set(names)) < len(names):
            raise ValueError(f"two targets have the same name: {names}")
        if self.counts != Counts.of(self.targets):
            raise ValueError("counts do not agree with the targets' verdicts")
        expected = exit_status(self.targets, self.require_measured)
        if self.exit_status != expected:
            raise ValueError(f"exit_status is {self.exit_status}, but the targets' verdicts say {expected}")
        return self


def to_json(report: Report) -> str:
    """The report as `report.json` holds it."""
    return report.model_dump_json(indent=2) + "\n"


def load_report(path: Path) -> Report:
    """Reads a `report.json`.

    Raises:
        InputError: no such file, not JSON, of another schema version, or not a report.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError("there is no report here", where=str(path), fix="edgestill run RECIPE makes one") from error
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError("the report is not JSON", where=str(path), evidence=str(error), fix="run it again") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"the report has schema version {version}, this edgestill reads {SCHEMA_VERSION}",
            where=str(path),
            fix="run the recipe again with this version; cached stages are used",
        )
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "report"
        raise InputError(
            "the report does not match its schema",
            where=str(path),
            evidence=f"{key}: {first['msg']}",
            fix="run it again",
        ) from error


def schema_text() -> str:
    """The JSON Schema of a report, as the file beside this module holds it."""
    return json.dumps(Report.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
