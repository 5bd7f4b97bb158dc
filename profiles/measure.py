"""The measuring loop: warm-up, interleaved candidates, two clocks, looks at growing samples, the machine's state."""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import numpy as np

from profiles import agent, statistics
from profiles.artifact import explain_os_errors, file_hash, write_text
from profiles.conditions import ClockWatch, environment_of, gpu_warnings, pinned, warnings_of
from profiles.device import TargetSection
from profiles.energy import PowerSource, energy_per_query, find_power, no_energy, runs_on_gpu
from profiles.errors import EdgestillError, InputError
from profiles.fresh_process import LOAD_SECONDS, HangError, Started, probe
from profiles.measure_section import MeasureSection
from profiles.measurement import (
    Energy,
    Latency,
    LatencyDifference,
    Measurement,
    Outcome,
    Scope,
)
from profiles.opening import open_arrays
from profiles.progress import Progress, Silent, Task
from profiles.runtimes import Clock, Runtime, RuntimeOptions, Session, Timed, WallClock, get_runtime, on_gpu
from profiles.watchdog import Beat, Hung, watched

Array = np.ndarray[Any, Any]
T = TypeVar("T")

WINDOW_NS = 200_000_000
"""Shortest window of the warm-up, in nanoseconds."""
WINDOWS = 3
AGREEMENT = 1.10
"""The windows agree when the largest figure is at most this times the smallest."""
LEAST_RUNS = 10
FIRST_LOOK = 64
"""A look at fewer samples than this says little, whichever percentile is asked."""
LEAST_SECONDS = 0.5
"""No look earlier than this: 662 queries of 0.05 ms take a thirtieth of a second, and a machine has slower moods."""
RESETTLE = 2
"""Queries after a switch to another candidate, run for its caches and not counted: a rule, not a choice by latency."""
_BLOCK_SECONDS = 0.25
_BLOCK_QUERIES = 64
_KEPT_INPUTS = 64
_CHECK_SECONDS = 1.0

_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")

GraphPrecision = Literal["fp32", "fp16", "bf16", "int8"]
Query = Callable[[int], Timed]
"""Runs the i-th query."""
Ahead = Callable[[str, int], None]
"""Told before a candidate's round of queries how many it will have: a device at the end of a link runs them at once."""


class Samples(NamedTuple):
    """Every latency of one candidate in the order of measurement: int64 nanoseconds (N,) on each clock."""

    compute_ns: Array
    end_to_end_ns: Array


class Measured(NamedTuple):
    """A measurement and the samples behind it."""

    measurement: Measurement
    samples: Samples


class WarmUp(NamedTuple):
    """How a candidate settled. `typical_ns`: median end-to-end latency of the last window."""

    stable: bool
    runs: int
    seconds: float
    typical_ns: float


@dataclass
class Sampled:
    """What sampling one candidate gave."""

    compute_ns: list[int] = field(default_factory=list)
    end_to_end_ns: list[int] = field(default_factory=list)
    issued: list[int] = field(default_factory=list)
    """Which of all the candidate's queries each sample is; the others came after a change of candidates."""
    spent_ns: int = 0
    looks: int = 0
    verdict: Outcome | None = None
    stopped_by: Literal["decided", "samples", "time"] | None = None

    def in_scope(self, scope: Scope) -> list[int]:
        """The samples of one clock."""
        return self.compute_ns if scope == "compute" else self.end_to_end_ns


@dataclass(frozen=True)
class Plan:
    """When to look at the samples, and how sure each look must be."""

    looks: tuple[int, ...]
    look_confidence: float
    limit_ms: float | None
    percentile: float
    scope: Scope
    max_seconds: float

    @property
    def planned(self) -> int:
        """At how many looks sampling may end with a verdict, or with a number where there is no limit."""
        return len(self.looks) if self.limit_ms is not None else 1


def plan_looks(target: TargetSection, section: MeasureSection) -> Plan:
    """Doubling looks until the verdict is decided; without a limit one look, at twice the needed samples or later.

    With several looks, the error probability 1 - confidence is split evenly over them; the first one is at as many
    samples as a bound of the confidence that is left to each needs.
    """

    def sizes(confidence: float, least: int) -> tuple[int, ...]:
        found = statistics.look_sizes(target.percentile, confidence, section.max_samples)
        return tuple(size for size in found if size >= least) or found[-1:]

    if target.latency_ms is None:
        needed = statistics.samples_needed(target.percentile, section.confidence)
        looks, each = sizes(section.confidence, max(FIRST_LOOK, 2 * needed)), section.confidence
    else:
        # more samples at the first look never make for more looks, so what is left to each is at least this
        most = len(sizes(section.confidence, FIRST_LOOK))
        looks = sizes(statistics.look_confidence(section.confidence, most), FIRST_LOOK)
        each = statistics.look_confidence(section.confidence, len(looks))
    return Plan(
        looks=looks,
        look_confidence=each,
        limit_ms=target.latency_ms,
        percentile=target.percentile,
        scope=target.latency_scope,
        max_seconds=section.max_seconds,
    )


def warm_up(query: Query, clock: Clock, *, percentile: float, scope: Scope, max_seconds: float) -> WarmUp:
    """Runs until three successive windows of at least 200 ms agree within 10 %, and at least 10 times.

    They must agree in throughput and in `percentile` of the clock in question; in p50 where one of the windows holds
    fewer samples than that percentile needs. After `max_seconds` it gives up: not stable, unless the later half of the
    queries came in random order (`statistics.stability`), since windows of a heavy tail never agree.
    """
    needed = statistics.samples_needed(percentile)
    began = clock.now()
    windows: list[list[Timed]] = []
    taken: list[int] = []
    runs = 0
    while True:
        window: list[Timed] = []
        start = clock.now()
        while not window or clock.now() - start < WINDOW_NS:
            timed = query(runs)
            window.append(Timed(timed.compute_ns, timed.end_to_end_ns, {}))
            runs += 1
        windows = [*windows, window][-WINDOWS:]
        taken += [timed.compute_ns if scope == "compute" else timed.end_to_end_ns for timed in window]
        stable = runs >= LEAST_RUNS and len(windows) == WINDOWS and _agree(windows, needed, percentile, scope)
        seconds = (clock.now() - began) / 1e9
        if stable or (seconds >= max_seconds and runs >= LEAST_RUNS):
            typical = statistics.percentile([timed.end_to_end_ns for timed in window], 50)
            return WarmUp(stable or _in_random_order(taken[len(taken) // 2 :], percentile), runs, seconds, typical)


def _in_random_order(latencies: list[int], percentile: float) -> bool:
    return len(latencies) >= FIRST_LOOK and all(statistics.stability(latencies, p).stable for p in (50, percentile))


def _agree(windows: list[list[Timed]], needed: int, percentile: float, scope: Scope) -> bool:
    p = percentile if min(len(window) for window in windows) >= needed else 50.0
    # queries per busy second, so that a duty cycle's pauses do not hide a change of speed
    rates = [len(window) / sum(timed.end_to_end_ns for timed in window) for window in windows]
    latencies = [
        statistics.percentile([timed.compute_ns if scope == "compute" else timed.end_to_end_ns for timed in window], p)
        for window in windows
    ]
    return max(rates) <= AGREEMENT * min(rates) and max(latencies) <= AGREEMENT * min(latencies)


def sample(
    queries: Mapping[str, Query],
    typical_ns: Mapping[str, float],
    plan: Plan,
    clock: Clock,
    task: Task,
    ahead: Ahead | None = None,
) -> dict[str, Sampled]:
    """Samples all candidates interleaved (A B B A ...), each until its verdict is decided or its samples or time end.

    A block is up to 64 queries of one candidate, or about a quarter of a second. Garbage collection waits meanwhile: a
    pause of this process is no property of the model.
    """
    results = {name: Sampled() for name in queries}
    looks = {name: _late_enough(plan.looks, typical_ns[name]) for name in queries}
    issued = dict.fromkeys(queries, 0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        forward, previous = True, None
        while active := [name for name, result in results.items() if result.stopped_by is None]:
            for name in active if forward else reversed(active):
                result = results[name]
                block = int(min(_BLOCK_QUERIES, max(1.0, _BLOCK_SECONDS * 1e9 / max(typical_ns[name], 1.0))))
                block = min(block, looks[name][result.looks] - len(result.compute_ns))
                settling = RESETTLE if previous != name and len(queries) > 1 else 0
                if ahead is not None:
                    ahead(name, settling + block)
                for _ in range(settling):
                    queries[name](issued[name])
                    issued[name] += 1
                previous = name
                query, compute, whole = queries[name], result.compute_ns, result.end_to_end_ns
                start = clock.now()
                for index in range(issued[name], issued[name] + block):
                    timed = query(index)
                    compute.append(timed.compute_ns)
                    whole.append(timed.end_to_end_ns)
                result.issued.extend(range(issued[name], issued[name] + block))
                issued[name] += block
                result.spent_ns += clock.now() - start
                _judge(result, plan, looks[name])
                task.advance(block, note=f"{name}: {len(result.compute_ns)} samples")
            forward = not forward
    finally:
        if collecting:
            gc.enable()
    return results


def _late_enough(looks: tuple[int, ...], typical_ns: float) -> tuple[int, ...]:
    """The looks without those that would come in the first half second; the last one stays."""
    return tuple(size for size in looks[:-1] if size * typical_ns >= LEAST_SECONDS * 1e9) + looks[-1:]


def _judge(result: Sampled, plan: Plan, looks: tuple[int, ...]) -> None:
    """Takes a look when one is due, or the last one when the time is over."""
    due = len(result.compute_ns) >= looks[result.looks]
    late = result.spent_ns >= plan.max_seconds * 1e9
    if not due and not late:
        return
    result.looks += 1
    if plan.limit_ms is not None:
        milliseconds = np.asarray(result.in_scope(plan.scope), dtype=np.float64) / 1e6
        result.verdict = statistics.judge(milliseconds, plan.limit_ms, plan.percentile, plan.look_confidence)
    if result.verdict in ("pass", "fail"):
        result.stopped_by = "decided"
    elif due and (plan.limit_ms is None or result.looks == len(looks)):
        result.stopped_by = "samples"
    elif late:
        result.stopped_by = "time"


def describe(samples_ns: Array | Sequence[int], scope: Scope, percentile: float, bound_confidence: float) -> Latency:
    """The latency figures of one clock's samples (N,) in nanoseconds. A percentile without its samples is None."""
    milliseconds = np.asarray(samples_ns, dtype=np.float64) / 1e6
    n = int(milliseconds.size)

    def value(p: float) -> float | None:
        return statistics.percentile(milliseconds, p) if n >= statistics.samples_needed(p) else None

    first, third = np.quantile(milliseconds, [0.25, 0.75])
    found = statistics.stability(milliseconds, percentile, bound_confidence)
    stable = found.stable and statistics.stability(milliseconds, 50, bound_confidence).stable
    return Latency(
        scope=scope,
        samples=n,
        mean=float(milliseconds.mean()),
        minimum=float(milliseconds.min()),
        maximum=float(milliseconds.max()),
        p50=value(50),
        p90=value(90),
        p95=value(95),
        p99=value(99),
        p99_9=value(99.9),
        percentile=percentile,
        value=value(percentile) if stable else None,
        upper_bound=found.upper if stable else None,
        lower_bound=found.lower if stable else None,
        bound_confidence=bound_confidence,
        outliers=int((milliseconds > third + 1.5 * (third - first)).sum()),
        lag1=statistics.lag1_autocorrelation(milliseconds),
        stable=stable,
        inflation=found.inflation,
    )


def measure(
    candidates: Mapping[str, Path],
    inputs: Mapping[str, Array],
    target: TargetSection,
    section: MeasureSection,
    *,
    input_source: str = "real samples",
    runtime: Runtime | None = None,
    options: RuntimeOptions | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
    fresh_process: bool = True,
    failures: dict[str, EdgestillError] | None = None,
    power: PowerSource | None = None,
    place: Place | None = None,
) -> dict[str, Measured]:
    """Measures model files against each other.

    Args:
        candidates: model files by name.
        inputs: by input name, (N, ...) samples as they come; queries of the target's batch cycle through them.
        target: percentile, scope, batch and limit.
        section: threads, time, confidence.
        input_source: where the inputs are from, as the report says it.
        runtime: default ONNX Runtime.
        options: that `runtime` was made with; default what the section asks for.
        clock: default the machine's.
        progress: told how many samples there are.
        fresh_process: measure load time, first inference and peak memory in a process of its own as well. A model that
            hangs or crashes there is not loaded here.
        failures: given, it takes the errors of the candidates that could not be measured, and the others are measured;
            left out, the first such error is raised.
        power: where energy is read; default the sensors of what the session runs on, with the machine's own clock.
        place: the machine that `runtime` works on; default this one.

    Returns:
        By name; without the candidates in `failures`.

    Raises:
        InputError: no candidates, a missing or damaged file, inputs that the model does not take.
        EdgestillError: a model that cannot be loaded or run, whose output is not finite, or that hangs.
    """
    if not candidates:
        raise InputError("there is no model to measure", fix="name at least one model file")
    runtime = runtime or get_runtime("onnxruntime", runtime_options(section))
    progress = progress or Silent()
    place = place or Here()
    sensors, clock = clock is None, clock or WallClock()
    batches = query_batches(inputs, target.batch)
    plan = plan_looks(target, section)
    failed: dict[str, EdgestillError] = {}
    sessions: dict[str, Session] = {}
    started: dict[str, Started] = {}
    energies: dict[str, Energy] = {}
    with pinned(section.affinity):
        try:
            for name, model in candidates.items():
                with _collected(failed, name, failures):
                    started[name] = Started.not_probed()
                    if fresh_process:
                        started[name] = place.probe(
                            runtime.name,
                            model,
                            batches[0],
                            section.threads,
                            options=options or runtime_options(section),
                            timeout_seconds=section.timeout_seconds,
                        )
                    sessions[name] = _ready(runtime, model, batches, section, clock, place)
            before = place.facts()
            place.others()
            watch = ClockWatch(place.clocks)
            warm, sampled = _sampled(
                sessions,
                batches,
                target,
                section,
                plan,
                clock,
                progress,
                failed,
                failures,
                watch,
                candidates,
                runtime,
                place,
            )
            use, after = place.others(), place.facts()
            for name in sampled:
                source = power
                if sensors and power is None:
                    source = find_power(on_gpu=runs_on_gpu(runtime.name, sessions[name].options))
                energies[name] = _energy(name, sessions[name], batches, clock, section, source, watch)
        finally:
            for name, session in sessions.items():
                # a session that hangs cannot be closed; it goes with the process
                if not isinstance(failed.get(name), HangError):
                    session.close()
    if failures is not None:
        failures.update(failed)
    differences = _differences(sampled, target.latency_scope)
    environment = {**environment_of(before, after, use), **watch.found()}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    both = place.tells_end_to_end
    results = {}
    for name, found in sampled.items():
        model, probed = candidates[name], started[name]
        precision = graph_precision(model)
        clocks = {
            scope: describe(found.in_scope(scope), scope, target.percentile, plan.look_confidence)
            for scope in get_args(Scope)
        }
        stable = warm[name].stable and clocks[plan.scope].stable
        measurement = Measurement(
            name=name,
            file=model.name,
            sha256=model_hash(model),
            file_size_mib=sum(path.stat().st_size for path in model_files(model)) / 2**20,
            runtime=runtime.name,
            runtime_version=runtime.version,
            options={
                **sessions[name].options,
                "affinity": list(section.affinity) or "all",
                "idle_gap_ms": section.idle_gap_ms,
            },
            graph_precision=precision,
            compute_precision=_compute_precision(precision, runtime.name, model),
            batch=target.batch,
            input_shapes={key: array.shape for key, array in batches[0].items()},
            input_source=input_source,
            compute=clocks["compute"],
            end_to_end=clocks["end_to_end"] if both else None,
            scope=target.latency_scope,
            limit_ms=target.latency_ms,
            verdict=_verdict(found, plan, stable=stable),
            looks=found.looks,
            planned_looks=plan.planned,
            stopped_by=found.stopped_by or "samples",
            stable=stable,
            warnings=warnings_of(
                warm[name].stable, section, environment, clocks[target.latency_scope], found.in_scope(plan.scope)
            )
            + (gpu_warnings(environment) if on_gpu(runtime.name, sessions[name].options) else ()),
            warmup_runs=warm[name].runs,
            warmup_seconds=warm[name].seconds,
            seconds=found.spent_ns / 1e9,
            load_ms=probed.load_ms,
            first_inference_ms=probed.first_inference_ms,
            memory=probed.memory,
            energy=energies[name],
            differences=differences[name],
            environment=environment,
            created=created,
        )
        whole = found.end_to_end_ns if both else []
        results[name] = Measured(
            measurement, Samples(np.asarray(found.compute_ns, np.int64), np.asarray(whole, np.int64))
        )
    return results


def runtime_options(section: MeasureSection) -> RuntimeOptions:
    """What the section asks of a runtime."""
    return RuntimeOptions(graph_optimization=section.graph_optimization, cuda_graph=section.cuda_graph)


@contextmanager
def _collected(
    failed: dict[str, EdgestillError], name: str, failures: dict[str, EdgestillError] | None
) -> Iterator[None]:
    """One candidate's error ends only its own measurement, where the caller wants it so."""
    try:
        yield
    except EdgestillError as error:
        failed[name] = error
        if failures is None:
            raise


def _ready(
    runtime: Runtime, model: Path, batches: list[dict[str, Array]], section: MeasureSection, clock: Clock, place: Place
) -> Session:
    """A loaded session whose outputs are finite."""

    def load(beat: Beat) -> Session:
        session = runtime.load(model, threads=section.threads)
        try:
            for inputs in _worth_checking(batches, session, beat, clock, model):
                _check_outputs(session, inputs, clock, model)
        except EdgestillError:
            session.close()
            raise
        return session

    try:
        return place.guarded(load, max(section.timeout_seconds, LOAD_SECONDS))
    except Hung as hung:
        raise _hang(model, runtime.name, section, "while it was loaded and first run") from hung


def _worth_checking(
    batches: list[dict[str, Array]], session: Session, beat: Beat, clock: Clock, model: Path
) -> Iterator[dict[str, Array]]:
    """The first queries, and more of the different ones while that takes little time."""
    began = clock.now()
    for index, inputs in enumerate(batches):
        if index >= LEAST_RUNS and clock.now() - began > _CHECK_SECONDS * 1e9:
            return
        beat("checking outputs")
        yield inputs


def _hang(model: Path, runtime: str, section: MeasureSection, when: str) -> HangError:
    return HangError(
        f"{runtime} hangs on the model {when}",
        where=str(model),
        evidence=f"no answer within {section.timeout_seconds:g} s",
        fix="raise measure.timeout_seconds if one query may take that long, else report it to the runtime's makers",
    )


class _CandidateError(Exception):
    """A query of one candidate failed."""

    def __init__(self, name: str, error: EdgestillError) -> None:
        super().__init__(name)
        self.name, self.error = name, error


def _sampled(
    sessions: Mapping[str, Session],
    batches: list[dict[str, Array]],
    target: TargetSection,
    section: MeasureSection,
    plan: Plan,
    clock: Clock,
    progress: Progress,
    failed: dict[str, EdgestillError],
    failures: dict[str, EdgestillError] | None,
    watch: ClockWatch,
    candidates: Mapping[str, Path],
    runtime: Runtime,
    place: Place,
) -> tuple[dict[str, WarmUp], dict[str, Sampled]]:
    """Warm-up and samples of all candidates; where one fails or hangs, the others are sampled anew without it."""
    while names := [name for name in sessions if name not in failed]:

        def work(beat: Beat, names: list[str] = names) -> tuple[dict[str, WarmUp], dict[str, Sampled]]:
            queries = {name: _alive(name, sessions[name], batches, clock, section, beat, watch) for name in names}
            warm: dict[str, WarmUp] = {}
            with progress.task("warming up", len(queries), "models") as task:
                for name, query in queries.items():
                    warm[name] = warm_up(
                        query,
                        clock,
                        percentile=target.percentile,
                        scope=target.latency_scope,
                        max_seconds=section.warmup_seconds,
                    )
                    task.advance(note=name)
            watch.start()
            with progress.task("measuring latency", None, "queries") as task:
                typical = {name: entry.typical_ns for name, entry in warm.items()}
                return warm, sample(queries, typical, plan, clock, task, place.ahead)

        collecting = gc.isenabled()
        try:
            return place.guarded(work, section.timeout_seconds + section.idle_gap_ms / 1e3)
        except Hung as hung:
            if collecting:  # the thread that was left behind had switched it off
                gc.enable()
            name = hung.label or names[0]
            with _collected(failed, name, failures):
                raise _hang(candidates[name], runtime.name, section, "after it had answered before") from hung
        except _CandidateError as error:
            with _collected(failed, error.name, failures):
                raise error.error from error
    return {}, {}


def _energy(
    name: str,
    session: Session,
    batches: list[dict[str, Array]],
    clock: Clock,
    section: MeasureSection,
    power: PowerSource | None,
    watch: ClockWatch,
) -> Energy:
    """The energy of one candidate that runs alone; a failure here leaves its latency as it is."""
    if power is None or not power.readable or not section.energy_seconds:
        return no_energy("not asked for" if power is None or not section.energy_seconds else power.how)
    try:
        return watched(
            lambda beat: energy_per_query(
                _alive(name, session, batches, clock, section, beat, watch), power, clock, section.energy_seconds
            ),
            section.timeout_seconds + section.energy_seconds,
        )
    except (Hung, _CandidateError) as error:
        return no_energy(f"the queries failed: {error}")


def _alive(
    name: str,
    session: Session,
    batches: list[dict[str, Array]],
    clock: Clock,
    section: MeasureSection,
    beat: Beat,
    watch: ClockWatch,
) -> Query:
    """The session's queries with a sign of life before each, outside of what is timed."""
    ask = querying(session, batches, clock, section.idle_gap_ms)

    def query(index: int) -> Timed:
        beat(name)
        watch.look()
        try:
            return ask(index)
        except EdgestillError as error:
            raise _CandidateError(name, error) from error

    return query


def save_measurement(folder: Path, measurement: Measurement, samples: Samples) -> Path:
    """Writes NAME.json and, beside it, NAME.npz with every sample of both clocks; returns the JSON file.

    Raises:
        EdgestillError: the disk is full or the folder cannot be written.
    """
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", measurement.name)
    path = folder / f"{stem}.json"
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # the samples first: a JSON file without them would claim what cannot be checked
        np.savez_compressed(folder / f"{stem}.npz", **samples._asdict())
        write_text(path, measurement.model_dump_json(indent=2) + "\n")
    return path


def load_measurement(path: Path) -> Measured:
    """What `save_measurement` wrote, by its JSON file.

    Raises:
        InputError: a missing or damaged file, or samples that are not those of the measurement.
    """
    try:
        measurement = Measurement.model_validate_json(path.read_text(encoding="utf-8"))
        stored = open_arrays(path.with_suffix(".npz"))
        samples = Samples(stored["compute_ns"], stored["end_to_end_ns"])
    except (OSError, ValueError, KeyError, InputError) as error:
        raise InputError(
            "missing or damaged measurement",
            where=str(path),
            evidence=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="delete it and measure again",
        ) from error
    whole = measurement.end_to_end
    counts = {measurement.compute.samples, len(samples[0])}
    if len(counts) != 1 or len(samples[1]) != (whole.samples if whole is not None else 0):
        raise InputError(
            "the samples are not those of the measurement",
            where=str(path),
            evidence=f"sample counts: {sorted(counts | {len(samples[1])})}",
            fix="delete it and measure again",
        )
    return Measured(measurement, samples)


def query_batches(inputs: Mapping[str, Array], batch: int) -> list[dict[str, Array]]:
    """Up to 64 different queries of `batch` rows, contiguous, so that no query pays for slicing.

    Raises:
        InputError: no inputs, no rows, or different numbers of rows.
    """
    rows = {array.shape[0] if array.ndim else 0 for array in inputs.values()}
    if len(rows) != 1 or rows == {0}:
        raise InputError("inputs must have the same number of rows, at least one", evidence=f"{sorted(rows)}")
    total = rows.pop()
    count = min(_KEPT_INPUTS, max(1, total // batch))
    return [
        {
            name: np.ascontiguousarray(array[np.arange(i * batch, (i + 1) * batch) % total])
            for name, array in inputs.items()
        }
        for i in range(count)
    ]


def model_files(model: Path) -> list[Path]:
    """The model file and the external data files that it names."""
    if model.suffix != ".onnx":
        return [model]
    import onnx

    loaded = onnx.load(str(model), load_external_data=False)
    names = {
        entry.value for tensor in loaded.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return [model, *(model.parent / name for name in sorted(names))]


def graph_precision(model: Path) -> GraphPrecision:
    """The precision that an ONNX graph is written in: "int8" with quantised nodes, else the narrowest weights' type."""
    if model.suffix != ".onnx":
        return "fp32"
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    if any(node.op_type in _QUANTISED for node in graph.node):
        return "int8"
    types = {tensor.data_type for tensor in graph.initializer}
    if onnx.TensorProto.FLOAT16 in types:
        return "fp16"
    return "bf16" if onnx.TensorProto.BFLOAT16 in types else "fp32"


def _compute_precision(graph: GraphPrecision, runtime: str, model: Path) -> str:
    if model.suffix != ".onnx":
        return f"as the {model.suffix} file was built"
    if runtime in ("onnxruntime", "openvino") and graph in ("fp16", "bf16"):
        # the CPU provider has kernels in half precision for few operators, on some Arm cores; it casts around the rest
        return f"fp32 ({graph} graph on a CPU)"
    return graph


def model_hash(model: Path) -> str:
    """SHA-256 of the model file; with external data, of the hashes of all its files."""
    files = model_files(model)
    if len(files) == 1:
        return file_hash(model)
    return hashlib.sha256("".join(file_hash(path) for path in files).encode()).hexdigest()


class Place(Protocol):
    """The machine that is measured: this one, or one that an agent speaks for."""

    @property
    def tells_end_to_end(self) -> bool:
        """Whether its runtime's samples have an end-to-end time; without, they are compute times on both clocks."""
        ...

    def ahead(self, name: str, count: int) -> None:
        """See `Ahead`."""
        ...

    def facts(self) -> dict[str, Any]:
        """What `agent.read` tells there, now."""
        ...

    def clocks(self) -> Mapping[str, float]:
        """What `agent.clocks` tells there, now; empty where asking would disturb the queries."""
        ...

    def guarded(self, work: Callable[[Beat], T], seconds: float) -> T:
        """The result of work that may hang; it beats at least every `seconds`.

        Raises:
            Hung: no beat, where that can be told (`profiles.watchdog`).
        """
        ...

    def others(self) -> dict[str, Any]:
        """What others did there since the last call; see `agent.CpuUse.since`."""
        ...

    def probe(
        self,
        runtime_name: str,
        model: Path,
        inputs: Mapping[str, Array],
        threads: int,
        *,
        options: RuntimeOptions | None = None,
        timeout_seconds: float = 60.0,
    ) -> Started:
        """See `profiles.fresh_process.probe`."""
        ...


class Here:
    """This machine."""

    tells_end_to_end = True

    def __init__(self) -> None:
        self._use = agent.CpuUse()

    def ahead(self, name: str, count: int) -> None:
        """Nothing has to be told to a machine that answers at once."""

    def facts(self) -> dict[str, Any]:
        """See `Place.facts`."""
        return agent.read()

    def clocks(self) -> Mapping[str, float]:
        """See `Place.clocks`."""
        return agent.clocks()

    def guarded(self, work: Callable[[Beat], T], seconds: float) -> T:
        """See `Place.guarded`."""
        return watched(work, seconds)

    def others(self) -> dict[str, Any]:
        """See `Place.others`."""
        before, self._use = self._use, agent.CpuUse()
        return self._use.since(before)

    def probe(
        self,
        runtime_name: str,
        model: Path,
        inputs: Mapping[str, Array],
        threads: int,
        *,
        options: RuntimeOptions | None = None,
        timeout_seconds: float = 60.0,
    ) -> Started:
        """See `Place.probe`."""
        return probe(runtime_name, model, inputs, threads, options=options, timeout_seconds=timeout_seconds)


def querying(session: Session, batches: list[dict[str, Array]], clock: Clock, idle_gap_ms: float) -> Query:
    """Queries of a session that take the batches in turn, each after a pause."""

    def query(index: int) -> Timed:
        if idle_gap_ms:
            clock.sleep(idle_gap_ms / 1e3)
        return session.query(batches[index % len(batches)], clock)

    return query


def _check_outputs(session: Session, inputs: dict[str, Array], clock: Clock, model: Path) -> None:
    for name, output in session.query(inputs, clock).outputs.items():
        if np.issubdtype(output.dtype, np.floating) and not np.isfinite(output).all():
            bad = output.size - int(np.isfinite(output).sum())
            raise EdgestillError(
                f'the model\'s output "{name}" is not finite',
                where=str(model),
                evidence=f"{bad} of {output.size} values are NaN or infinite",
                fix="a model that overflows in FP16 may run in FP32; check the exported weights",
            )


def _differences(sampled: Mapping[str, Sampled], scope: Scope) -> dict[str, tuple[LatencyDifference, ...]]:
    """Median differences of every pair, over the samples that were taken while both were measured."""
    found: dict[str, list[LatencyDifference]] = {name: [] for name in sampled}
    names = list(sampled)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            a, b = (np.asarray(sampled[each].in_scope(scope)) / 1e6 for each in (one, other))
            # at least one whole A B B A, since what the machine did meanwhile hit both
            block = max(2 * _BLOCK_QUERIES, statistics.block_length(a), statistics.block_length(b))
            block = max(1, min(block, len(a) // 4, len(b) // 4))
            interval = statistics.block_bootstrap_difference(a, b, block=block)
            for name, against, sign in ((one, other, 1), (other, one, -1)):
                ends = sorted((sign * interval.low, sign * interval.high))
                found[name].append(
                    LatencyDifference(
                        against=against,
                        scope=scope,
                        value=sign * interval.value,
                        low=ends[0],
                        high=ends[1],
                        confidence=interval.confidence,
                        method=interval.method,
                    )
                )
    return {name: tuple(entries) for name, entries in found.items()}


def _verdict(found: Sampled, plan: Plan, *, stable: bool) -> Outcome | None:
    """Of a latency that moved, only what holds for every single sample decides; to pass, the look must have said so."""
    if stable or found.verdict is None or plan.limit_ms is None:
        return found.verdict
    samples = found.in_scope(plan.scope)
    if min(samples) > plan.limit_ms * 1e6:
        return "fail"
    return "pass" if found.verdict == "pass" and max(samples) <= plan.limit_ms * 1e6 else "inconclusive"
