"""Sweeps: throughput over batch sizes and latency over threads, each with the point where more brings no more."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from profiles import agent, statistics
from profiles.conditions import pinned
from profiles.errors import EdgestillError
from profiles.measure import LEAST_RUNS, Query, query_batches, querying, runtime_options, warm_up
from profiles.measure_section import MeasureSection
from profiles.measurement import ThreadPoint, ThreadSweep, Throughput, ThroughputPoint
from profiles.progress import Progress, Silent
from profiles.runtimes import Clock, Runtime, WallClock, get_runtime

Array = np.ndarray[Any, Any]
_SECONDS = 1.0
_SATURATED = 0.95


def sweep(
    model: Path,
    inputs: Mapping[str, Array],
    section: MeasureSection,
    *,
    batches: Iterable[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    runtime: Runtime | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> Throughput:
    """Throughput over batch sizes, about one second each; ends when two doublings in a row gain less than 5 %.

    What a batch size gains is told by the median query: a pause of the machine is none of the model's.

    Args:
        model: model file with a dynamic batch; with a fixed one, give that batch alone.
        inputs: by input name, (N, ...).

    Raises:
        InputError: as `measure`; also when the graph refuses the first batch size.
        EdgestillError: the first batch size cannot be run.
    """
    runtime = runtime or get_runtime("onnxruntime", runtime_options(section))
    clock = clock or WallClock()
    points: list[ThroughputPoint] = []
    session = runtime.load(model, threads=section.threads)
    note = "largest batch size of the sweep"
    with (progress or Silent()).task("batch sweep", None, "batch sizes") as task:
        for batch in batches:
            query = querying(session, query_batches(inputs, batch), clock, 0.0)
            try:
                warm = warm_up(
                    query, clock, percentile=50, scope="end_to_end", max_seconds=min(section.warmup_seconds, 3.0)
                )
                latencies = _for_a_second(query)
            except EdgestillError as error:
                if not points:
                    raise
                note = f"batch {batch} failed: {error.evidence or error.message}"
                break
            points.append(
                ThroughputPoint(
                    batch=batch,
                    samples_per_second=batch * len(latencies) / (sum(latencies) / 1e9),
                    p50_ms=statistics.percentile(latencies, 50) / 1e6,
                    queries=len(latencies),
                    stable=warm.stable,
                )
            )
            task.advance(note=f"batch {batch}: {points[-1].samples_per_second:.0f} samples/s")
            best_before = max(map(_typical, points[:-2]), default=0.0)
            if len(points) > 2 and max(map(_typical, points[-2:])) < 1.05 * best_before:
                note = "the last two batch sizes gained less than 5 %"
                break
    session.close()
    best = max(map(_typical, points))
    saturation = min(point.batch for point in points if _typical(point) >= _SATURATED * best)
    if not all(point.stable for point in points):
        note += "; not all of them settled"
    return Throughput(points=tuple(points), saturation_batch=saturation, note=note)


def sweep_threads(
    model: Path,
    inputs: Mapping[str, Array],
    section: MeasureSection,
    *,
    batch: int = 1,
    threads: Iterable[int] | None = None,
    runtime: Runtime | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> ThreadSweep:
    """Median latency over thread counts, about one second each.

    Args:
        model: a model file.
        inputs: by input name, (N, ...).
        section: everything but the thread count.
        batch: samples per query.
        threads: counts to try; default 1, 2, 4, ... up to the cores that this process may use.

    Raises:
        InputError, EdgestillError: as `measure`.
    """
    runtime = runtime or get_runtime("onnxruntime", runtime_options(section))
    clock = clock or WallClock()
    cores = len(section.affinity or agent.affinity()) or os.cpu_count() or 1
    counts = list(threads or [*(2**i for i in range(cores.bit_length()) if 2**i < cores), cores])
    batches = query_batches(inputs, batch)
    points = []
    with pinned(section.affinity), (progress or Silent()).task("thread sweep", len(counts), "counts") as task:
        for count in counts:
            session = runtime.load(model, threads=count)
            try:
                query = querying(session, batches, clock, section.idle_gap_ms)
                warm = warm_up(
                    query, clock, percentile=50, scope="end_to_end", max_seconds=min(section.warmup_seconds, 3.0)
                )
                latencies = _for_a_second(query)
            finally:
                session.close()
            points.append(
                ThreadPoint(
                    threads=count,
                    p50_ms=statistics.percentile(latencies, 50) / 1e6,
                    queries=len(latencies),
                    stable=warm.stable,
                )
            )
            task.advance(note=f"{count} threads: {points[-1].p50_ms:.3g} ms")
    best = min(point.p50_ms for point in points)
    saturation = min(point.threads for point in points if point.p50_ms <= best / _SATURATED)
    return ThreadSweep(
        points=tuple(points), saturation_threads=saturation, note="all cores that may be used were tried"
    )


def _typical(point: ThroughputPoint) -> float:
    """Samples per millisecond of the median query."""
    return point.batch / point.p50_ms


def _for_a_second(query: Query) -> list[int]:
    latencies: list[int] = []
    while sum(latencies) < _SECONDS * 1e9 or len(latencies) < LEAST_RUNS:
        latencies.append(query(len(latencies)).end_to_end_ns)
    return latencies
