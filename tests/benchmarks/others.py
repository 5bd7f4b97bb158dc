"""Our latencies against MLPerf LoadGen's and OpenVINO's benchmark_app's, in one interleaved run.

    python -m tests.benchmarks.others [--repetitions 5] [--queries 400] [--quick]

One model (resnet8x4), one thread, one core: on shared machines the cores differ, and the parties' threads would stay on
one each. LoadGen (SingleStream) drives ONNX Runtime, benchmark_app's own loop (synchronous)
drives OpenVINO, and our measuring loop drives both. The three hand each other the turn every few queries, so that a
slow spell of the machine hits all alike; none of them counts the time in which it waits. Whoever begins a turn, or
changes the runtime, first asks a few times off every clock, since the caches are full of the other's weights. Compared
are p50 and p90:
LoadGen's with our end to end, benchmark_app's, which times the inference call inside OpenVINO, with our compute. The
medians of the repetitions' ratios must lie within 3 %. Writes results/others.json and .md. About two minutes on a quiet
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from profiles import agent
from profiles.conditions import pinned
from profiles.measure import Plan, describe, query_batches, querying, sample
from profiles.progress import Silent
from profiles.runtimes import Session, WallClock, get_runtime

RESULTS = Path(__file__).parent / "results"
ALLOWED = 0.03
TURN = 8
"""Queries in a turn of each of the others; ours takes twice as many, since it drives two runtimes."""
WARM = 3
"""Queries off the clock when the turn or the runtime changes."""
_SHAPE = (1, 3, 32, 32)


@dataclass(frozen=True)
class Ratio:
    """Ours divided by another's, one entry per repetition."""

    other: str
    runtime: str
    percentile: int
    ours_ms: tuple[float, ...]
    others_ms: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [ours / other for ours, other in zip(self.ours_ms, self.others_ms, strict=True)]

    @property
    def middle(self) -> float:
        return median(self.ratios)

    @property
    def holds(self) -> bool:
        return abs(self.middle - 1) <= ALLOWED


class Baton:
    """Whose turn it is. A party takes part from its first query to `leave`."""

    def __init__(self, turns: dict[str, int]) -> None:
        self._turns, self._order = turns, list(turns)
        self._left = dict(turns)
        self._condition = threading.Condition()
        self._present = set(turns)
        self._now = self._order[0]

    def take(self, party: str) -> bool:
        """Waits for the turn of `party`; passes it on when that is used up. Returns whether a turn begins."""
        with self._condition:
            if self._now == party and self._left[party] == 0:
                self._pass_on()
            self._condition.wait_for(lambda: self._now == party)
            begins = self._left[party] == self._turns[party]
            self._left[party] -= 1
            return begins

    def leave(self, party: str) -> None:
        """The party has no more queries."""
        with self._condition:
            self._present.discard(party)
            if self._now == party and self._present:
                self._pass_on()

    def _pass_on(self) -> None:
        position = self._order.index(self._now)
        following = [*self._order[position + 1 :], *self._order[: position + 1]]
        self._now = next(party for party in following if party in self._present)
        self._left[self._now] = self._turns[self._now]
        self._condition.notify_all()


def by_loadgen(session: Session, inputs: Any, queries: int, baton: Baton, folder: Path) -> dict[int, float]:
    """p50 and p90 in ms, as LoadGen writes them into its summary."""
    import mlperf_loadgen as loadgen

    clock = WallClock()

    def take() -> None:
        if baton.take("loadgen"):
            for _ in range(WARM):
                session.query(inputs, clock)

    def issue(samples: Sequence[Any]) -> None:
        for each in samples:
            session.query(inputs, clock)
            loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(each.id, 0, 0)])
        # LoadGen starts its clock when it issues the next query, which it does after this call
        take()

    settings = loadgen.TestSettings()
    settings.scenario = loadgen.TestScenario.SingleStream
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.single_stream_expected_latency_ns = 5_000_000
    settings.min_query_count = settings.max_query_count = queries
    settings.min_duration_ms = 0
    output = loadgen.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    log = loadgen.LogSettings()
    log.log_output = output
    sut = loadgen.ConstructSUT(issue, lambda: None)
    qsl = loadgen.ConstructQSL(1, 1, lambda samples: None, lambda samples: None)
    take()
    try:
        loadgen.StartTestWithLogSettings(sut, qsl, settings, log)
    finally:
        baton.leave("loadgen")
        loadgen.DestroyQSL(qsl)
        loadgen.DestroySUT(sut)
    summary = (folder / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(\d+)\.00 percentile latency \(ns\)\s*:\s*(\d+)", summary, re.MULTILINE))
    return {percentile: int(found[str(percentile)]) / 1e6 for percentile in (50, 90)}


class _Data:
    """What benchmark_app's loop asks before each query."""

    def __init__(self, baton: Baton, infer: Callable[[], Any]) -> None:
        self._baton, self._infer = baton, infer

    def get_next_batch_size(self) -> int:
        if self._baton.take("benchmark_app"):
            for _ in range(WARM):
                self._infer()
        return 1


def by_benchmark_app(model: Path, array: Any, queries: int, baton: Baton) -> dict[int, float]:
    """p50 and p90 in ms, from the loop and the percentile function of benchmark_app."""
    import openvino
    from openvino.tools.benchmark.benchmark import Benchmark, percentile

    app = Benchmark("CPU", 1, queries, None, "sync", inference_only=True)
    # as `benchmark_app -m MODEL -hint latency -nthreads 1 -nstreams 1 -infer_precision f32 -api sync -inference_only`
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = app.core.compile_model(app.read_model(str(model)), "CPU", settings)
    requests = app.create_infer_requests(compiled)
    requests[0].set_input_tensor(openvino.Tensor(array))
    for _ in range(10):
        app.first_infer(requests)
    try:
        times, _, _ = app.sync_inference(requests[0], _Data(baton, requests[0].infer))
    finally:
        baton.leave("benchmark_app")
    return {each: float(percentile(times, each)) for each in (50, 90)}


def by_us(sessions: dict[str, Session], inputs: Any, queries: int, baton: Baton) -> dict[str, dict[int, float]]:
    """p50 and p90 in ms by runtime, from our measuring loop."""
    clock = WallClock()
    batches = query_batches(inputs, 1)
    last: list[Session] = []

    def waiting(session: Session) -> Callable[[int], Any]:
        ask = querying(session, batches, clock, 0.0)

        def query(index: int) -> Any:
            begins = baton.take("ours")
            if begins or last != [session]:
                for _ in range(WARM):
                    ask(index)
            last[:] = [session]
            return ask(index)

        return query

    plan = Plan((queries,), 0.99, None, 90.0, "end_to_end", 1e9)
    try:
        with Silent().task("", None) as task:
            # "typical" decides how many queries on end a candidate gets: a turn's half
            typical = dict.fromkeys(sessions, 0.25e9 / TURN)
            found = sample({name: waiting(each) for name, each in sessions.items()}, typical, plan, clock, task)
    finally:
        baton.leave("ours")
    said = {}
    for name, scope in (("onnxruntime", "end_to_end"), ("openvino", "compute")):
        latency = describe(found[name].in_scope(scope), scope, 90.0, 0.99)  # type: ignore[arg-type]
        assert latency.p50 is not None
        assert latency.p90 is not None
        said[name] = {50: latency.p50, 90: latency.p90}
    return said


def repetition(model: Path, sessions: dict[str, Session], queries: int) -> dict[str, dict[int, float]]:
    """One interleaved run of the three."""
    array = np.random.default_rng(0).normal(size=_SHAPE).astype(np.float32)
    name = sessions["onnxruntime"].inputs[0].name
    clock = WallClock()
    for session in sessions.values():
        for _ in range(10):
            session.query({name: array}, clock)
    baton = Baton({"loadgen": TURN, "benchmark_app": TURN, "ours": 2 * TURN})
    found: dict[str, Any] = {}
    errors: list[BaseException] = []

    def party(label: str, work: Callable[[], Any]) -> None:
        try:
            found[label] = work()
        except BaseException as error:  # raised again below
            errors.append(error)
            baton.leave(label)

    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        parties = {
            "loadgen": lambda: by_loadgen(sessions["onnxruntime"], {name: array}, queries, baton, Path(folder)),
            "benchmark_app": lambda: by_benchmark_app(model, array, queries, baton),
            "ours": lambda: by_us(sessions, {name: array}, queries, baton),
        }
        threads = [threading.Thread(target=party, args=each) for each in parties.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return {"loadgen": found["loadgen"], "benchmark_app": found["benchmark_app"], **found["ours"]}


def compare(repetitions: int, queries: int) -> list[Ratio]:
    """All repetitions."""
    import torch

    from tests.benchmarks.resnet import resnet

    core = max(os.sched_getaffinity(0))
    with pinned((core,)), tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        model = Path(folder) / "resnet8x4.onnx"
        torch.manual_seed(0)
        torch.onnx.export(resnet(8, 100).eval(), (torch.zeros(_SHAPE),), str(model), dynamo=True, verbose=False)
        sessions = {name: get_runtime(name).load(model, threads=1) for name in ("onnxruntime", "openvino")}
        rounds = []
        for _ in range(repetitions):
            rounds.append(repetition(model, sessions, queries))
            print(rounds[-1], flush=True)
        for session in sessions.values():
            session.close()
    return [
        Ratio(
            other=other,
            runtime=runtime,
            percentile=percentile,
            ours_ms=tuple(each[runtime][percentile] for each in rounds),
            others_ms=tuple(each[other][percentile] for each in rounds),
        )
        for other, runtime in (("loadgen", "onnxruntime"), ("benchmark_app", "openvino"))
        for percentile in (50, 90)
    ]


_TITLES = {"loadgen": "MLPerf LoadGen, SingleStream", "benchmark_app": "OpenVINO benchmark_app, sync"}


def page(rows: list[Ratio], facts: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# Our latencies against others",
        "",
        f"Made by `python -m tests.benchmarks.others` on {facts['created']}: {facts['cpu']}, one thread on one core, "
        f"resnet8x4 at 32x32, {facts['repetitions']} repetitions of {facts['queries']} queries each, interleaved every "
        f"{TURN} queries. LoadGen {facts['loadgen']}, OpenVINO {facts['openvino']}, ONNX Runtime "
        f"{facts['onnxruntime']}.",
        "",
        "| against | runtime | percentile | ours, ms | theirs, ms | ratio, median | all ratios | within 3 % |",
        "|---|---|---|---:|---:|---:|---|---|",
    ]
    lines += [
        f"| {_TITLES[row.other]} | {row.runtime} | p{row.percentile} | {median(row.ours_ms):.3f} | "
        f"{median(row.others_ms):.3f} | {row.middle:.4f} | {', '.join(f'{ratio:.3f}' for ratio in row.ratios)} | "
        f"{'yes' if row.holds else 'NO'} |"
        for row in rows
    ]
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="one repetition of 70 queries, nothing written")
    chosen = parser.parse_args(arguments)
    repetitions, queries = (1, 70) if chosen.quick else (chosen.repetitions, chosen.queries)
    before = agent.CpuUse()
    rows = compare(repetitions, queries)
    facts = {
        "created": datetime.now(UTC).date().isoformat(),
        "cpu": agent.cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "repetitions": repetitions,
        "queries": queries,
        "loadgen": version("mlcommons-loadgen"),
        "openvino": version("openvino"),
        "onnxruntime": version("onnxruntime"),
        "cpu_use": agent.CpuUse().since(before),
    }
    text = page(rows, facts)
    print(text)
    if chosen.quick:
        return 0
    RESULTS.mkdir(exist_ok=True)
    document = {**facts, "allowed": ALLOWED, "rows": [{**asdict(row), "ratios": row.ratios} for row in rows]}
    (RESULTS / "others.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "others.md").write_text(text, encoding="utf-8")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
