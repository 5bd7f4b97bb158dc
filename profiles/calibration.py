"""What a device takes for the work that `profiles.timing_model` counts: fitted on measurements of models, and stored.

The fit has two steps. The runtime's profiler gives the time of every node of every model, from which the times per
quantity of each class of nodes follow. But a profiled run is slower than a plain one, so the measured medians of whole
models then set five factors: what a query costs before any node, what a node costs, how much of its profiled constant a
plain run takes, and how much of the profiled work, for convolutions and matrix products and for the rest. All times are
non-negative, so that more work never makes a prediction shorter.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from profiles import statistics
from profiles.artifact import explain_os_errors, tool_versions, write_text
from profiles.device import THIS_MACHINE, Device, Stack, detect, load_device
from profiles.errors import InputError
from profiles.measure import Plan, Query, Sampled, query_batches, querying, sample
from profiles.measurement import Scope
from profiles.progress import Progress, Silent
from profiles.runtimes import Clock, Runtime, Timed, WallClock, get_runtime
from profiles.section import Section
from profiles.timing_model import FORM, OTHER, PricedNode, priced_graph
from profiles.user_folder import config_folder

Array = NDArray[Any]
Floats = NDArray[np.float64]
Precision = Literal["fp32", "int8"]

SCHEMA_VERSION = 2
ROUNDS = 11
"""Times that every model has its turn; the spread is that of the turns' medians."""
MAX_SPREAD = 0.10
"""Interquartile range of a model's medians over the rounds, relative to their median, that half of the models may
have at most. A quiet machine shows 1 to 3 %; see `Calibration.spread`."""
PERCENTILES = (50, 90, 95, 99)
"""Of all queries: their ratios to the undisturbed median are stored."""
FOLDS = 6
FIX = "edgestill devices calibrate"

PRIOR_EFFICIENCY = 0.1
"""Share of a device's peak rate that a student reaches at batch 1, where no calibration tells (K). On two cores of an
AMD EPYC (Zen 3, about 220 GFLOP/s in FP32 and 900 in INT8 by its clock) students of 0.1 to 2 ms on one thread reached
46 and 55 in the middle: 0.2 and 0.06."""
_LEAST_MS = {"cpu": 0.002, "gpu": 0.01}
"""Launch overheads (K): a call into ONNX Runtime takes some microseconds, a CUDA kernel's launch and the wait for its
end about ten. Lower ends, since a limit below them is refused."""
_WARM_QUERIES = 10
_PULSE, _LAPS = range(400), 2
"""What the pulse adds up: some microseconds of a core. The quicker lap counts: the first one finds cold caches."""
_PULSE_QUANTILE = 0.05
_OWN_SPEED = 1.15
"""Times the quickest pulses that the pulses around a query may take while the machine is taken to be undisturbed."""
LEAST_UNDISTURBED = 0.15
"""Share of its queries that half of the models must have had undisturbed."""
_LEAST_QUERIES, _PASSES = 48, 4
"""Undisturbed queries that a model's medians need, and times that it is measured at most to find them; with fewer, all
of its queries count."""
_LEAST_SECONDS = 0.1
"""Of sampling one model, however late it is."""
_ROBUST = 0.15
"""Relative error from which on a node's or a model's weight falls (Huber): a query that was interrupted is no fact."""
_ITERATIONS = 6
_TOLERANCE = 1e-12


class Observation(Section):
    """One model that was measured, with the work in it.

    model: its name; the precisions of one architecture share it, so that none is held out while the other is seen.
    family: the kind of architecture, or "layers" for a model that shows layers only and is never held out. p50_ms,
    compute_p50_ms: medians of the undisturbed queries, see `observe`; undisturbed: their share of all. whole_ms: of all
    queries, by clock and percentile ("50" and so on, without those that need more queries). spread: interquartile range
    of the undisturbed medians of the rounds, relative to their median. peak_mib: of a fresh process; None where it was
    not measured.
    """

    model: str
    family: str
    precision: Precision
    batch: int = 1
    nodes: tuple[PricedNode, ...]
    weight_mib: float = 0.0
    activation_mib: float = 0.0
    file_mib: float = 0.0
    p50_ms: float = Field(gt=0)
    compute_p50_ms: float = Field(gt=0)
    whole_ms: dict[Scope, dict[str, float]] = Field(default_factory=dict)
    undisturbed: float = 1.0
    samples: int = 0
    spread: float = 0.0
    peak_mib: float | None = None

    @property
    def is_architecture(self) -> bool:
        """Whether it counts for the errors that are reported."""
        return self.family != LAYERS

    def ratio(self, scope: Scope, percentile: int) -> float | None:
        """A percentile of all queries over the median of the undisturbed ones; None with too few queries."""
        known = self.whole_ms.get(scope, {}).get(str(percentile))
        return None if known is None else known / (self.compute_p50_ms if scope == "compute" else self.p50_ms)


LAYERS = "layers"


class HeldOut(Section):
    """Errors of predicted medians on architectures that the fit did not see. Errors are fractions of the measured."""

    models: int
    median_error: float
    p90_error: float
    rank_correlation: float | None
    """Spearman's; None for fewer than three models."""


class Times(Section):
    """Microseconds of one precision.

    query: of a query without any node. kinds: by class of nodes, per quantity. other: of a class that was never seen,
    per node ("nodes") and byte ("bytes").
    """

    query: float
    kinds: dict[str, dict[str, float]]
    other: dict[str, float]


class Calibration(Section):
    """What one device takes with one version of its runtime and one number of threads."""

    schema_version: int = SCHEMA_VERSION
    form: int = FORM
    """That of the rules by which work was counted."""
    device: str
    processor: str
    """Model, cores and instruction sets."""
    runtime: str
    runtime_version: str
    threads: int
    batch: tuple[int, ...]
    """Samples per query of the measured models."""
    date: str
    versions: dict[str, str]
    times: dict[str, Times]
    """By precision."""
    ratios: dict[Scope, dict[str, float]]
    """By clock and percentile: that of all queries over the median of the undisturbed ones, middle of the models. A
    percentile that needs more queries than there were is missing."""
    copying_ms: float
    """End to end without compute: the copies of inputs and outputs, median over the models."""
    memory: dict[str, float]
    """MiB of a fresh process ("process"), and per MiB of weights, activations and file; empty: not measured."""
    held_out: dict[str, HeldOut]
    """By precision."""
    spread: float
    """Median over the models of `Observation.spread`."""
    undisturbed: float = 1.0
    """Median over the models of `Observation.undisturbed`."""
    other_cores: float | None = None
    """Cores that other processes kept busy while models were measured; None where the system does not tell."""
    models: int
    seconds: float
    efficiency: dict[str, float] = Field(default_factory=dict)
    """By precision: roofline bound over measured median, middle of the architectures; empty where the device's facts
    give no bound."""


def processor(device: Device) -> str:
    """How a calibration names the processor that it was made on."""
    return ", ".join([device.title, *device.isa])


def observe(
    models: Mapping[str, Path],
    inputs: Mapping[str, Mapping[str, Array]],
    *,
    threads: int,
    seconds: float = 2.0,
    queries: int = 704,
    most_seconds: float | None = None,
    runtime: Runtime | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures models against each other, each in turn a little, as `profiles.measure` does.

    A core that is shared (with the other thread of the same core, whoever it works for) falls to half of its speed for
    milliseconds at a time, without a word from the system. So a fixed computation of some microseconds, the pulse, runs
    before and after every query, and medians are taken over the queries around which it was as quick as it can be. The
    tail is that of all queries, since it is what the device's user sees.

    The pulse does not see what begins and ends within one query. The median of a model whose queries last longer than
    such a phase (some milliseconds) is therefore between that of an undisturbed core and that of all its queries. No
    quantile of what was measured mends that: which share of the long queries was left alone is not known.

    Args:
        models: model files by name.
        inputs: by model name, its inputs (N, ...) by their names; every query takes one row.
        threads: threads inside an operator.
        seconds: sampling time per model and pass at most.
        queries: of every model and pass, at most.
        most_seconds: of everything together, within a block of queries; the models share what is left of it evenly.
        runtime: default ONNX Runtime.
        clock: default the machine's.
        progress: told how many queries there are.

    Returns:
        By model name, the fields of an `Observation` that come from queries.

    Raises:
        InputError: a missing or damaged file, or inputs that the model does not take.
        EdgestillError: a model that cannot be loaded or run.
    """
    runtime, clock, progress = runtime or get_runtime("onnxruntime"), clock or WallClock(), progress or Silent()
    began = clock.now()
    sessions = {}
    pulses: dict[str, list[int]] = {name: [] for name in models}
    try:
        asked, typical = {}, {}
        for name, model in models.items():
            sessions[name] = runtime.load(model, threads=threads)
            query = querying(sessions[name], query_batches(inputs[name], 1), clock, 0.0)
            warm = [query(index).end_to_end_ns for index in range(_WARM_QUERIES)]
            typical[name] = statistics.percentile(warm, 50)
            asked[name] = _felt(query, clock, pulses[name])
        taken = {name: _Queries() for name in models}
        with progress.task("measuring models", None, "queries") as task:
            for _ in range(_PASSES):
                few = {
                    name: asked[name] for name in models if taken[name].undisturbed.sum() < min(_LEAST_QUERIES, queries)
                }
                left = math.inf if most_seconds is None else most_seconds - (clock.now() - began) / 1e9
                share = left / max(len(few), 1)
                # a pass that would be cut short adds little; the first one has to be
                if not few or (any(len(each.whole) for each in taken.values()) and share < seconds / 2):
                    break
                plan = Plan((queries,), 0.99, None, 99.0, "end_to_end", max(min(seconds, share), _LEAST_SECONDS))
                felt = {name: len(pulses[name]) for name in few}
                for name, found in sample(few, typical, plan, clock, task).items():
                    taken[name].add(found, np.asarray(pulses[name][felt[name] :]))
                quick = _OWN_SPEED * float(np.quantile(np.concatenate(list(pulses.values())), _PULSE_QUANTILE))
                for each in taken.values():
                    each.undisturbed = each.pulses <= quick
    finally:
        for session in sessions.values():
            session.close()
    return {name: each.figures() for name, each in taken.items()}


class _Queries:
    """The queries of one model: milliseconds on both clocks, pulses in nanoseconds, and which were undisturbed."""

    def __init__(self) -> None:
        self.whole, self.compute, self.pulses = (np.empty(0) for _ in range(3))
        self.undisturbed = np.empty(0, dtype=bool)

    def add(self, found: Sampled, pulses: Array) -> None:
        """pulses: of every query that was issued, also of those that do not count."""
        self.whole = np.append(self.whole, np.asarray(found.end_to_end_ns) / 1e6)
        self.compute = np.append(self.compute, np.asarray(found.compute_ns) / 1e6)
        self.pulses = np.append(self.pulses, pulses[found.issued])

    def figures(self) -> dict[str, Any]:
        """The fields of an `Observation` that come from queries."""
        own = self.undisturbed if self.undisturbed.sum() >= _LEAST_QUERIES else np.ones_like(self.undisturbed)
        known = [each for each in PERCENTILES if len(self.whole) >= statistics.samples_needed(each)]
        clocks = {"end_to_end": self.whole, "compute": self.compute}
        return {
            "p50_ms": statistics.percentile(self.whole[own], 50),
            "compute_p50_ms": statistics.percentile(self.compute[own], 50),
            "whole_ms": {
                name: {str(each): statistics.percentile(values, each) for each in known}
                for name, values in clocks.items()
            },
            "undisturbed": float(self.undisturbed.mean()),
            "samples": len(self.whole),
            "spread": _spread(self.whole[own]),
        }


def _felt(query: Query, clock: Clock, pulses: list[int]) -> Query:
    """The query between two pulses; `pulses` gets the longer of the two, in nanoseconds, one entry for each query."""

    def felt(index: int) -> Timed:
        before = _pulse(clock)
        timed = query(index)
        pulses.append(max(before, _pulse(clock)))
        return timed

    return felt


def _pulse(clock: Clock) -> int:
    laps = []
    for _ in range(_LAPS):
        start = clock.now()
        sum(_PULSE)
        laps.append(clock.now() - start)
    return min(laps)


def _spread(values: Floats) -> float:
    """Interquartile range of the medians of equal parts in the order of measurement, relative to their median."""
    parts = np.array_split(values, min(ROUNDS, len(values)))
    low, middle, high = np.quantile([np.median(part) for part in parts], [0.25, 0.5, 0.75])
    return float((high - low) / middle)


def busy(observations: Sequence[Observation]) -> str | None:
    """Why a calibration from these would not be trusted: the machine was not quiet. None: it was."""
    spreads = [observation.spread for observation in observations]
    middle, share = float(np.median(spreads)), float(np.median([one.undisturbed for one in observations]))
    if share < LEAST_UNDISTURBED:
        return (
            f"in {1 - share:.0%} of the queries something slowed the core down (half of {len(spreads)} models; at most "
            f"{1 - LEAST_UNDISTURBED:.0%} is accepted)"
        )
    if middle <= MAX_SPREAD:
        return None
    return (
        f"medians of the same model spread by {middle:.0%} over the rounds (half of {len(spreads)} models; "
        f"at most {MAX_SPREAD:.0%} is accepted), the worst by {max(spreads):.0%}"
    )


def fit_times(observations: Sequence[Observation]) -> Times:
    """The times of one precision, by two steps of non-negative least squares on relative errors.

    Raises:
        ValueError: no observations, or nodes without their times.
    """
    nodes = [node for observation in observations for node in observation.nodes]
    if not nodes or any(node.microseconds is None for node in nodes):
        raise ValueError("a fit needs models whose nodes were timed")
    by_kind: dict[str, list[PricedNode]] = defaultdict(list)
    for node in nodes:
        by_kind[node.kind].append(node)
    kinds = {
        kind: _fit([node.work for node in found], [node.microseconds or 0.0 for node in found])
        for kind, found in by_kind.items()
        if kind != OTHER
    }
    other = _fit([_any_work(node) for node in nodes], [node.microseconds or 0.0 for node in nodes])
    profiled = Times(query=0.0, kinds=kinds, other=other)
    whole = [{"query": 1.0, **_parts(observation.nodes, profiled)} for observation in observations]
    factors = _fit(whole, [1e3 * observation.p50_ms for observation in observations])

    def plain(times: Mapping[str, float], factor: float) -> dict[str, float]:
        scaled = {name: factor * value for name, value in times.items() if name != "nodes"}
        return {"nodes": factors["constant"] * times.get("nodes", 0.0) + factors["nodes"], **scaled}

    return Times(
        query=factors["query"],
        kinds={kind: plain(times, factors[_share(kind)]) for kind, times in kinds.items()},
        other=plain(other, max(factors["matrix"], factors["work"])),
    )


def _parts(nodes: Iterable[PricedNode], times: Times) -> dict[str, float]:
    """What the nodes of a model take: constants and work apart, in microseconds, and how many nodes there are."""
    parts = {"nodes": 0.0, "constant": 0.0, "matrix": 0.0, "work": 0.0}
    for node in nodes:
        fitted, quantities = _of(node, times)
        parts["nodes"] += 1
        parts["constant"] += fitted.get("nodes", 0.0)
        parts[_share(node.kind)] += sum(
            fitted.get(name, 0.0) * value for name, value in quantities.items() if name != "nodes"
        )
    return parts


def _share(kind: str) -> str:
    """The factor that turns the profiled work of a class into that of a plain run."""
    return "matrix" if kind.removeprefix("q").startswith(("conv", "gemm")) else "work"


def _of(node: PricedNode, times: Times) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """The times of a node's class, and its quantities in their terms."""
    if node.kind in times.kinds:
        return times.kinds[node.kind], node.work
    return times.other, _any_work(node)


def _any_work(node: PricedNode) -> dict[str, float]:
    return {"nodes": 1.0, "bytes": node.moved}


def node_microseconds(node: PricedNode, times: Times) -> float:
    """The predicted time of one node."""
    fitted, quantities = _of(node, times)
    return sum(fitted.get(name, 0.0) * value for name, value in quantities.items())


def graph_milliseconds(nodes: Iterable[PricedNode], times: Times) -> float:
    """The predicted median of one query, end to end."""
    return (times.query + sum(node_microseconds(node, times) for node in nodes)) / 1e3


def _fit(rows: Sequence[Mapping[str, float]], targets: Sequence[float]) -> dict[str, float]:
    """Non-negative factors x of the quantities such that rows @ x is near the targets, by relative errors.

    Weights fall for errors beyond `_ROBUST` (Huber's loss by reweighting), since times have outliers on one side.
    """
    from scipy.optimize import nnls

    names = sorted({name for row in rows for name in row})
    matrix = np.array([[row.get(name, 0.0) for name in names] for row in rows]) / np.asarray(targets)[:, None]
    size = np.linalg.norm(matrix, axis=0)
    size[size < _TOLERANCE] = 1.0
    weights = np.ones(len(rows))
    solution = np.zeros(len(names))
    for _ in range(_ITERATIONS):
        solution, _ = nnls((matrix / size) * weights[:, None], weights)
        errors = np.abs(matrix @ (solution / size) - 1.0)
        weights = np.sqrt(np.minimum(1.0, _ROBUST / np.maximum(errors, _TOLERANCE)))
    return dict(zip(names, (solution / size).tolist(), strict=True))


def errors(predicted: Sequence[float], measured: Sequence[float]) -> HeldOut:
    """Relative errors and rank correlation of predictions."""
    from scipy.stats import spearmanr

    given, true = np.asarray(predicted), np.asarray(measured)
    relative = np.abs(given - true) / true
    varied = len(true) > 2 and len(set(predicted)) > 1 and len(set(measured)) > 1
    return HeldOut(
        models=len(true),
        median_error=float(np.median(relative)),
        p90_error=float(np.quantile(relative, 0.9)),
        rank_correlation=float(spearmanr(given, true).statistic) if varied else None,
    )


def held_out(observations: Sequence[Observation], folds: int = FOLDS) -> tuple[Floats, Floats]:
    """Predicted and measured medians of every architecture, each by a fit that saw nothing of it.

    Args:
        observations: of one precision. Models that show layers only are in every fit.
        folds: parts that the architectures are divided in; no more than there are architectures.

    Raises:
        ValueError: fewer than two architectures.
    """
    names = sorted({observation.model for observation in observations if observation.is_architecture})
    if len(names) < 2:
        raise ValueError("two architectures at least are needed to hold one out")
    fold = {name: position % min(folds, len(names)) for position, name in enumerate(names)}
    predicted, measured = [], []
    for part in sorted(set(fold.values())):
        seen = [observation for observation in observations if fold.get(observation.model) != part]
        times = fit_times(seen)
        for observation in observations:
            if fold.get(observation.model) == part:
                predicted.append(graph_milliseconds(observation.nodes, times))
                measured.append(observation.p50_ms)
    return np.asarray(predicted), np.asarray(measured)


def fit(
    observations: Sequence[Observation],
    *,
    device: Device,
    stack: Stack,
    threads: int,
    seconds: float = 0.0,
    efficiency: Mapping[str, float] | None = None,
    other_cores: float | None = None,
) -> Calibration:
    """The calibration that these measurements give.

    Args:
        observations: two architectures at least in every precision.
        device, stack, threads: what they were measured on.
        seconds: how long it took.
        efficiency, other_cores: see `Calibration`.

    Raises:
        ValueError: too few architectures, or nodes without their times.
    """
    by_precision: dict[str, list[Observation]] = defaultdict(list)
    for observation in observations:
        by_precision[observation.precision].append(observation)
    copying = [observation.p50_ms - observation.compute_p50_ms for observation in observations]
    return Calibration(
        device=device.name,
        processor=processor(device),
        runtime=stack.runtime,
        runtime_version=stack.runtime_version,
        threads=threads,
        batch=tuple(sorted({observation.batch for observation in observations})),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=tool_versions(),
        times={precision: fit_times(found) for precision, found in by_precision.items()},
        ratios={scope: _ratios(observations, scope) for scope in get_args(Scope)},
        copying_ms=max(float(np.median(copying)), 0.0),
        memory=_fit_memory(observations),
        held_out={precision: errors(*map(list, held_out(found))) for precision, found in by_precision.items()},
        spread=float(np.median([observation.spread for observation in observations])),
        undisturbed=float(np.median([observation.undisturbed for observation in observations])),
        other_cores=other_cores,
        models=len(observations),
        seconds=seconds,
        efficiency=dict(efficiency or {}),
    )


def _ratios(observations: Sequence[Observation], scope: Scope) -> dict[str, float]:
    """See `Calibration.ratios`, of one clock."""
    found = {}
    for percentile in PERCENTILES:
        known = [ratio for one in observations if (ratio := one.ratio(scope, percentile)) is not None]
        if known:
            found[str(percentile)] = float(np.median(known))
    return found


def _fit_memory(observations: Sequence[Observation]) -> dict[str, float]:
    seen = [observation for observation in observations if observation.peak_mib is not None]
    if not seen:
        return {}
    return _fit([_held(observation) for observation in seen], [observation.peak_mib or 0.0 for observation in seen])


def _held(one: Observation) -> dict[str, float]:
    return _memory_parts(one.weight_mib, one.activation_mib, one.file_mib)


def _memory_parts(weight_mib: float, activation_mib: float, file_mib: float) -> dict[str, float]:
    return {"process": 1.0, "weights": weight_mib, "activations": activation_mib, "file": file_mib}


def calibrations_folder() -> Path:
    """Where calibrations are stored, beside the user's own device files."""
    return config_folder() / "calibrations"


def calibration_file(calibration: Calibration) -> Path:
    """Where that of its device and number of threads is stored."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", calibration.device)
    return calibrations_folder() / f"{name}.{calibration.threads}t.json"


def save_calibration(calibration: Calibration) -> Path:
    """Stores it, in the place of one of the same device and number of threads; returns the file.

    Raises:
        EdgestillError: the disk is full or the folder cannot be written; the one before stays as it was.
    """
    path = calibration_file(calibration)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, calibration.model_dump_json(indent=1) + "\n")
    return path


def stored_calibrations() -> tuple[Calibration, ...]:
    """All that can be read, by file name; one that another version of edgestill wrote is as if it were not there."""
    found = []
    for path in sorted(calibrations_folder().glob("*.json")):
        try:
            calibration = Calibration.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, ValidationError):
            continue
        if calibration.schema_version == SCHEMA_VERSION:
            found.append(calibration)
    return tuple(found)


def find_calibration(device: Device, stack: Stack, *, threads: int) -> Calibration | None:
    """The calibration of that device; None where there is none.

    One that fits in everything is preferred. What is returned may be stale, see `stale`: it is told rather than hidden.
    """
    found = [calibration for calibration in stored_calibrations() if calibration.device == device.name]
    return min(found, key=lambda one: (one.threads != threads, stale(one, device, stack, threads) or ""), default=None)


def stale(calibration: Calibration, device: Device, stack: Stack, threads: int) -> str | None:
    """Why a calibration says nothing about this device with this software; None when it does."""
    for what, made, asked in (
        ("processor", calibration.processor, processor(device)),
        ("runtime", calibration.runtime, stack.runtime),
        (f"{stack.runtime} version", calibration.runtime_version, stack.runtime_version),
        ("number of threads", str(calibration.threads), str(threads)),
        ("rules by which work is counted", f"form {calibration.form}", f"form {FORM}"),
    ):
        if made != asked:
            return f"{what}: calibrated with {made}, now {asked}"
    return None


def usable(calibration: Calibration, device: Device, stack: Stack, threads: int) -> Calibration:
    """The calibration itself.

    Raises:
        InputError: it is stale.
    """
    reason = stale(calibration, device, stack, threads)
    if reason is not None:
        raise InputError(
            f"the calibration of {device.name} is out of date",
            where=str(calibration_file(calibration)),
            evidence=f"{reason}; made {calibration.date}",
            fix=f"{command(threads)}, which replaces it",
        )
    return calibration


def command(threads: int) -> str:
    """What makes the calibration for a number of threads."""
    return FIX if threads == 1 else f"{FIX} --threads {threads}"


class Predicted(NamedTuple):
    """What a graph is expected to take, as far as a calibration tells.

    p50_ms: the median on an undisturbed core. p99_ms: of all queries, as `Calibration.ratios` tells it; None where that
    has none. memory_mib: peak of a fresh process; None where the calibration has not measured memory. overhead_ms: the
    part that a graph without nodes would take. compute_ms: the median without the copies of inputs and outputs.
    guessed: operators of classes that the calibration never saw, priced by their bytes alone.
    """

    p50_ms: float
    p99_ms: float | None
    memory_mib: float | None
    overhead_ms: float
    compute_ms: float
    guessed: tuple[str, ...]


def predict(model: Path, calibration: Calibration, *, precision: Precision, batch: int = 1) -> Predicted:
    """Time and memory of one query of `batch` samples, end to end.

    Args:
        model: an ONNX file.
        calibration: of the device with its software.
        precision: what the graph computes in.
        batch: samples of the query. Beyond `calibration.batch` it is an extrapolation.

    Raises:
        InputError: missing or damaged file, or a precision that was not calibrated.
        EdgestillError: the runtime cannot load or run it.
    """
    if precision not in calibration.times:
        raise InputError(
            f"the calibration of {calibration.device} has no {precision.upper()}",
            evidence="calibrated: " + ", ".join(calibration.times),
            fix=FIX,
        )
    times = calibration.times[precision]
    graph = priced_graph(model, batch, threads=calibration.threads)
    middle = graph_milliseconds(graph.nodes, times)
    held = _memory_parts(graph.weight_mib, graph.activation_mib, model.stat().st_size / 2**20)
    memory, ratio = calibration.memory, calibration.ratios.get("end_to_end", {}).get("99")
    return Predicted(
        p50_ms=middle,
        p99_ms=None if ratio is None else middle * ratio,
        memory_mib=sum(memory.get(name, 0.0) * value for name, value in held.items()) if memory else None,
        overhead_ms=times.query / 1e3,
        compute_ms=max(middle - calibration.copying_ms, 0.0),
        guessed=tuple(sorted({node.operator for node in graph.nodes if node.kind not in times.kinds})),
    )


def launch_overhead_ms(device: Device, calibration: Calibration | None) -> float:
    """What any graph takes on the device at least: calibrated, or a lower end that is known in general (K).

    On a GPU one kernel's launch and the wait for its end; on a CPU one call into the runtime.
    """
    if calibration is not None:
        return min(times.query for times in calibration.times.values()) / 1e3
    return _LEAST_MS[device.kind]


def assumed_efficiency(precision: Precision) -> float | None:
    """The share of its roofline bound's rate that calibrated processors reach in a precision, the middle of them.

    None where none that is up to date knows its own; see `PRIOR_EFFICIENCY`.
    """
    known = [
        calibration.efficiency[precision]
        for calibration in stored_calibrations()
        if precision in calibration.efficiency and not _is_old(calibration)
    ]
    return float(np.median(known)) if known else None


def _is_old(calibration: Calibration) -> bool:
    """Whether it says nothing any more about its own device with its newest stack."""
    try:
        device = detect() if calibration.device == THIS_MACHINE else load_device(calibration.device)
    except InputError:  # the user's own device file is gone
        return True
    return stale(calibration, device, device.stacks[0], calibration.threads) is not None
