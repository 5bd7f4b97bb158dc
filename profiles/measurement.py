"""What a measurement says: the stored documents, without the machinery that makes them."""

from __future__ import annotations

from typing import Any, Literal

from profiles.section import Section

Scope = Literal["compute", "end_to_end"]
Outcome = Literal["pass", "fail", "inconclusive"]


class Latency(Section):
    """The distribution of one clock's samples, all in milliseconds; nothing is clipped.

    mean to p99_9 describe these samples; a percentile is None when there are fewer than it needs (p90 64, p95 130, p99
    662, p99.9 6636). `value` and its bounds are what is claimed of the model; they are None as well when the latency
    moved while it was sampled (`stable`), since then there is no such number.
    """

    scope: Scope
    """"compute": the runtime's run call on inputs that are in place. "end_to_end": host input to host output, one
    query in flight."""
    samples: int
    mean: float
    minimum: float
    maximum: float
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    p99_9: float | None
    percentile: float
    """The percentile that was asked for: 50, 90, 95, 99 or 99.9."""
    value: float | None
    """The point estimate of that percentile."""
    upper_bound: float | None
    """That percentile is at most this, with `bound_confidence`; None when the samples are too few to say."""
    lower_bound: float | None
    """That percentile is at least this, with `bound_confidence`."""
    bound_confidence: float
    """Confidence of each bound; higher than the asked one when the error probability was split over several looks."""
    outliers: int
    """Samples above the third quartile by more than 1.5 interquartile ranges (Tukey); counted, never removed."""
    lag1: float | None
    """Lag-1 autocorrelation, -1 to 1; far from 0 means that neighbouring queries are not independent."""
    stable: bool = True
    """False when the median or the asked percentile drifted or came in slow spells (`statistics.stability`)."""
    inflation: float = 1.0
    """How many samples tell as much about the asked percentile as one independent sample; the bounds count it."""


class LatencyDifference(Section):
    """This candidate's median latency minus another's, from interleaved samples, in milliseconds."""

    against: str
    scope: Scope
    value: float
    low: float
    high: float
    confidence: float
    method: str
    """How the interval was made."""


class Memory(Section):
    """Peak memory of a fresh process that does nothing but load the model and run it."""

    peak_mib: float | None
    """Of a model on a CPU, the highest resident size of the whole process; of one on a GPU, the GPU memory that the
    process held, or what the whole system lost where CPU and GPU share one memory. None when it could not be read."""
    before_load_mib: float | None
    """Resident size with interpreter and runtime imported, before the model was loaded."""
    how: str
    """What was read, and where; the reason when there is no figure."""


class Energy(Section):
    """Energy of one query above what the idle machine takes, from the sensors that it has; never 0 for "not known"."""

    millijoules: float | None
    """Mean over the queries of several spells; None when no sensor was readable, or idling took as much."""
    low: float | None = None
    high: float | None = None
    """Ends of the interval of the mean, by Student's t over the spells' means, with idle uncertain as well."""
    confidence: float = 0.95
    idle_watts: float | None = None
    busy_watts: float | None = None
    queries: int = 0
    how: str
    """Which sensor, and what it covers; the reason when there is no figure."""


class Measurement(Section):
    """How fast one model file runs, how sure that is, and under which circumstances it was seen."""

    name: str
    file: str
    sha256: str
    file_size_mib: float
    """The model file and its external data files."""
    runtime: str
    runtime_version: str
    options: dict[str, Any]
    """Everything that was set in the runtime: providers, threads, optimisation level."""
    graph_precision: Literal["fp32", "fp16", "bf16", "int8"]
    """What the graph says. ONNX Runtime computes an FP16 graph in FP32 on most CPUs, see `compute_precision`."""
    compute_precision: str
    """What the runtime computes in here, as far as it is known."""
    batch: int
    input_shapes: dict[str, tuple[int, ...]]
    input_source: str
    """Such as "real samples (validation split)" or "random"."""
    compute: Latency
    end_to_end: Latency | None
    """None where the runtime's tool overlaps transfers with computing, so that no query has one (`trtexec`)."""
    scope: Scope
    """The clock that the limit is about; of a measurement without end-to-end times, always "compute"."""
    limit_ms: float | None
    verdict: Outcome | None
    """None when there is no limit."""
    mismatches: tuple[str, ...] = ()
    """Where the device was not as the target says, or what was measured is not what the limit is about: each makes the
    verdict inconclusive."""
    looks: int
    """How often the samples were judged."""
    planned_looks: int = 1
    """At how many looks sampling could have ended; the error probability of the bounds is split over so many."""
    stopped_by: Literal["decided", "samples", "time"]
    stable: bool
    """Whether the warm-up settled and the latency in `scope` stayed where it was."""
    warnings: tuple[str, ...]
    """What a reader of the figures must know: did not settle, the machine was busy, clocks were throttled."""
    warmup_runs: int
    warmup_seconds: float
    seconds: float
    """Wall-clock time of this candidate's sampling."""
    load_ms: float | None
    """Model file to ready session, in the fresh process of `memory`."""
    first_inference_ms: float | None
    memory: Memory
    energy: Energy | None = None
    """None in measurements of before energy was measured."""
    differences: tuple[LatencyDifference, ...]
    """Against every other candidate that was measured interleaved with this one."""
    environment: dict[str, Any]
    """Device, affinity, clocks, governor, temperatures, load; "before" and "after" where they may change."""
    created: str
    """UTC, ISO 8601."""

    @property
    def asked(self) -> Latency:
        """The latency in the scope that was asked for."""
        return self.compute if self.scope == "compute" or self.end_to_end is None else self.end_to_end


class ThroughputPoint(Section):
    """One batch size of a sweep."""

    batch: int
    samples_per_second: float
    p50_ms: float
    """End to end, per query of `batch` samples."""
    queries: int
    stable: bool


class ThreadPoint(Section):
    """One thread count of a sweep."""

    threads: int
    p50_ms: float
    """End to end."""
    queries: int
    stable: bool


class ThreadSweep(Section):
    """Median latency over thread counts, one query in flight."""

    points: tuple[ThreadPoint, ...]
    saturation_threads: int
    """The fewest threads whose median is within 5 % of the best."""
    note: str
    """Why the sweep ended."""


class Throughput(Section):
    """Samples per second over batch sizes, end to end, one query in flight."""

    points: tuple[ThroughputPoint, ...]
    saturation_batch: int
    """The smallest batch that reaches 95 % of the best throughput."""
    note: str
    """Why the sweep ended."""
