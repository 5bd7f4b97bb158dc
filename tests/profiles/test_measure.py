from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles import agent
from profiles import measure as m
from profiles.conditions import ClockWatch, environment_of, movement, warnings_of
from profiles.device import TargetSection
from profiles.errors import EdgestillError, InputError
from profiles.measure_section import MeasureSection
from profiles.runtimes import Clock, TensorSpec, Timed
from profiles.statistics import samples_needed
from profiles.sweep import sweep, sweep_threads

MS = 1_000_000
COPY_NS = 50_000
Latency = Callable[[int, int], float]
"""Compute nanoseconds of the i-th query, which starts at that moment."""


class SyntheticClock:
    def __init__(self) -> None:
        self.ns = 0

    def now(self) -> int:
        return self.ns

    def sleep(self, seconds: float) -> None:
        self.ns += int(seconds * 1e9)


class SyntheticSession:
    inputs = (TensorSpec("image", "uint8", ("batch", 2)),)
    outputs = (TensorSpec("logits", "float32", ("batch", 2)),)

    def __init__(self, name: str, latency: Latency, log: list[str], value: float) -> None:
        self.name, self.latency, self.log, self.value = name, latency, log, value
        self.options = {"threads": 1}
        self.emitted: list[int] = []
        self.closed = False

    def query(self, inputs: Mapping[str, Any], clock: Clock) -> Timed:
        compute = int(self.latency(len(self.emitted), clock.now()))
        self.emitted.append(compute)
        self.log.append(self.name)
        clock.sleep((compute + COPY_NS) / 1e9)
        return Timed(compute, compute + COPY_NS, {"logits": np.full((1, 2), self.value, np.float32)})

    def close(self) -> None:
        self.closed = True


class SyntheticRuntime:
    name = "synthetic"
    version = "1"

    def __init__(self, latencies: Mapping[str, Latency], value: float = 0.5) -> None:
        self.log: list[str] = []
        self.sessions = {name: SyntheticSession(name, latency, self.log, value) for name, latency in latencies.items()}

    def load(self, model: Path, *, threads: int | None) -> SyntheticSession:
        return self.sessions[model.stem]


def run(
    tmp_path: Path,
    latencies: Mapping[str, Latency],
    *,
    limit: float | None = None,
    percentile: float = 99,
    scope: str = "compute",
    value: float = 0.5,
    **section: Any,
) -> tuple[dict[str, m.Measured], SyntheticRuntime]:
    runtime = SyntheticRuntime(latencies, value)
    candidates = {name: tmp_path / f"{name}.bin" for name in latencies}
    for path in candidates.values():
        path.write_bytes(b"synthetic")
    target = TargetSection.model_validate(
        {"name": "t", "latency_ms": limit, "percentile": percentile, "latency_scope": scope}
    )
    measured = m.measure(
        candidates,
        {"image": np.zeros((8, 2), np.uint8)},
        target,
        MeasureSection(**section),
        runtime=runtime,
        clock=SyntheticClock(),
        fresh_process=False,
    )
    return measured, runtime


def constant(milliseconds: float) -> Latency:
    return lambda index, now: milliseconds * MS


def heavy_tail(seed: int = 0) -> Latency:
    draws = (1 + np.random.default_rng(seed).pareto(2.5, 60_000)) * MS
    return lambda index, now: float(draws[index % len(draws)])


def bimodal(share: float = 0.05) -> Latency:
    slow = np.random.default_rng(1).random(60_000) < share
    return lambda index, now: 5.0 * MS if slow[index % len(slow)] else 1.0 * MS


def test_constant_latency_settles_and_passes(tmp_path: Path) -> None:
    measured, runtime = run(tmp_path, {"a": constant(1)}, limit=2)
    found = measured["a"].measurement
    assert found.stable
    assert found.warnings == () or not any("unstable" in line for line in found.warnings)
    assert (found.verdict, found.stopped_by) == ("pass", "decided")
    assert found.compute.p99 == pytest.approx(1.0)
    assert found.compute.upper_bound == pytest.approx(1.0)
    assert found.compute.lag1 is None
    assert runtime.sessions["a"].closed


def test_both_clocks_are_recorded_and_the_limit_is_judged_on_the_asked_one(tmp_path: Path) -> None:
    limit = 1.0 + COPY_NS / MS / 2
    compute = run(tmp_path, {"a": constant(1)}, limit=limit, scope="compute")[0]["a"].measurement
    end_to_end = run(tmp_path, {"a": constant(1)}, limit=limit, scope="end_to_end")[0]["a"].measurement
    assert compute.compute.p50 == pytest.approx(1.0)
    assert compute.end_to_end.p50 == pytest.approx(1.0 + COPY_NS / MS)
    assert (compute.verdict, end_to_end.verdict) == ("pass", "fail")
    assert compute.asked.scope == "compute"
    assert end_to_end.asked.scope == "end_to_end"


def test_a_clear_failure_is_decided_at_the_first_look(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": constant(3)}, limit=2)[0]["a"].measurement
    # the first of six looks, each of which may be wrong with a sixth of 1 %
    assert (found.verdict, found.looks, found.planned_looks) == ("fail", 1, 6)
    assert found.compute.samples == samples_needed(99, 1 - 0.01 / 6)


def test_a_bimodal_percentile_is_a_value_that_was_seen(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": bimodal()}, limit=4)[0]["a"].measurement
    assert found.compute.p50 == pytest.approx(1.0)
    assert found.compute.p99 == pytest.approx(5.0)
    assert found.verdict == "fail"


def test_a_heavy_tail_is_counted_and_nothing_is_clipped(tmp_path: Path) -> None:
    measured, runtime = run(tmp_path, {"a": heavy_tail()}, limit=1000)
    found, samples = measured["a"]
    emitted = runtime.sessions["a"].emitted
    assert samples.compute_ns.tolist() == emitted[-found.compute.samples :]
    assert found.compute.maximum == max(samples.compute_ns) / MS
    assert found.compute.outliers > 10
    assert found.stable, "a tail is no drift"


def test_drift_during_warm_up_ends_unstable(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": lambda index, now: MS * (1 + now / 1e9)}, warmup_seconds=3, max_seconds=1)[0]
    assert not found["a"].measurement.stable
    assert any("unstable" in line for line in found["a"].measurement.warnings)
    assert found["a"].measurement.warmup_seconds >= 3


def test_bursts_during_warm_up_end_unstable(tmp_path: Path) -> None:
    # slow and fast spells of 0.3 s: no three windows of 0.2 s are alike
    found = run(tmp_path, {"a": lambda index, now: MS * (3 if now // 300_000_000 % 2 else 1)}, max_seconds=1)[0]
    assert not found["a"].measurement.stable


def test_warm_up_outlasts_a_drift_that_ends(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": lambda index, now: MS * max(1.0, 3 - now / 1e9)})[0]["a"].measurement
    assert found.stable
    assert 1.8 < found.warmup_seconds < 3.5
    assert found.compute.maximum < 1.1


def test_warm_up_runs_at_least_ten_times_however_slow_the_model(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": constant(2000)}, percentile=50, warmup_seconds=5, max_seconds=5)[0]["a"].measurement
    assert found.warmup_runs >= 10


def test_samples_that_the_time_does_not_allow_leave_the_percentile_unsaid(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": constant(10)}, limit=20, max_seconds=2)[0]["a"].measurement
    assert found.stopped_by == "time"
    assert found.verdict == "inconclusive"
    assert 150 < found.compute.samples < 300
    assert found.compute.p99 is None
    assert found.compute.value is None
    assert found.compute.upper_bound is None
    assert found.compute.p95 == pytest.approx(10)


def test_a_limit_at_the_percentile_itself_stays_inconclusive(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    draws = random.exponential(1.0, 60_000) * MS
    limit = float(-np.log(0.01))
    found = run(tmp_path, {"a": lambda index, now: float(draws[index])}, limit=limit, max_samples=4000)[0]["a"]
    assert found.measurement.verdict == "inconclusive"
    assert found.measurement.stopped_by == "samples"
    assert found.measurement.compute.samples == 4000
    low, high = found.measurement.compute.lower_bound, found.measurement.compute.upper_bound
    assert low is not None
    assert high is not None
    assert low < limit < high


def test_the_error_probability_holds_over_all_looks_together() -> None:
    random = np.random.default_rng(0)
    target = TargetSection(name="t", latency_ms=1.0, percentile=90, latency_scope="compute")
    plan = m.plan_looks(target, MeasureSection(max_samples=1024, confidence=0.9))
    assert len(plan.looks) >= 5
    wrong = 0
    trials = 100
    for _ in range(trials):
        # the true p90 is a hair above the limit, so "pass" is wrong, and as hard to avoid as can be
        draws = random.exponential(1.0001 / -np.log(0.1), 1024) * MS
        result = m.Sampled()
        while result.stopped_by is None:
            size = plan.looks[result.looks]
            result.compute_ns = draws[:size].astype(int).tolist()
            m._judge(result, plan, plan.looks)
        wrong += result.verdict == "pass"
    assert wrong / trials <= 0.1


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([50, 90, 95, 99, 99.9]), st.floats(0.6, 0.999), st.integers(64, 40_000))
def test_the_first_look_has_the_samples_that_its_own_confidence_needs(
    percentile: float, confidence: float, most: int
) -> None:
    target = TargetSection(name="t", latency_ms=1.0, percentile=percentile)
    plan = m.plan_looks(target, MeasureSection(max_samples=most, confidence=confidence))
    needed = samples_needed(percentile, plan.look_confidence)
    assert plan.looks[0] >= needed or plan.looks == (most,)
    assert plan.looks[-1] == most
    assert (1 - plan.look_confidence) * plan.planned == pytest.approx(1 - confidence)


def test_samples_that_stay_far_below_the_limit_pass_at_the_first_look(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": constant(1)}, limit=5, max_samples=3000)[0]["a"].measurement
    assert (found.verdict, found.looks) == ("pass", 1)
    assert found.compute.upper_bound == pytest.approx(1)


def test_without_a_limit_there_is_no_verdict_and_twice_the_samples(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": constant(1)})[0]["a"].measurement
    assert found.verdict is None
    assert found.compute.samples == 2 * 662
    assert found.compute.bound_confidence == pytest.approx(0.99)


def test_a_fast_model_is_watched_for_half_a_second(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": constant(0.05)}, limit=1)[0]["a"].measurement
    assert found.seconds >= 0.5
    assert found.compute.samples > 662


def test_candidates_are_interleaved_a_b_b_a(tmp_path: Path) -> None:
    _, runtime = run(tmp_path, {"a": constant(1), "b": constant(1.5)}, limit=2)
    sampling = "".join(runtime.log).rpartition("a" * 200)[2].lstrip("a")  # after the warm-up of a, which comes first
    sampling = sampling[sampling.index("a") :]  # after the warm-up of b
    spells = [len(spell) for spell in sampling.replace("ab", "a b").replace("ba", "b a").split()]
    assert sampling[0] == "a"
    # one block of a, then twice b, twice a, ... with the uncounted queries at each switch
    assert spells[:4] == [m.RESETTLE + 64, m.RESETTLE + 128, m.RESETTLE + 128, m.RESETTLE + 128]


def test_a_difference_survives_a_slow_spell_that_hits_both(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, 60_000)

    def drifting(base: float) -> Latency:
        return lambda index, now: MS * (base + noise[index] + 0.3 * np.sin(now / 4e8))

    measured, _ = run(tmp_path, {"a": drifting(1.0), "b": drifting(1.1)}, warmup_seconds=1)
    (difference,) = measured["b"].measurement.differences
    assert difference.against == "a"
    assert 0 < difference.low < 0.1 < difference.high
    (mirrored,) = measured["a"].measurement.differences
    assert (mirrored.value, mirrored.low, mirrored.high) == (-difference.value, -difference.high, -difference.low)


def test_equal_candidates_do_not_differ(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    draws = {name: random.normal(1, 0.05, 60_000) for name in "ab"}
    measured, _ = run(
        tmp_path,
        {name: (lambda index, now, name=name: MS * draws[name][index]) for name in draws},  # type: ignore[misc]
    )
    (difference,) = measured["a"].measurement.differences
    assert difference.low < 0 < difference.high


def test_neighbouring_queries_that_depend_on_each_other_show_in_lag1(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": lambda index, now: MS * (1 + 0.5 * (index // 50 % 2))}, warmup_seconds=1)[0]["a"]
    assert found.measurement.compute.lag1 is not None
    assert found.measurement.compute.lag1 > 0.9


def test_an_idle_gap_is_on_neither_clock(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": constant(1)}, idle_gap_ms=20, limit=2, max_seconds=100)[0]["a"].measurement
    assert found.end_to_end.maximum < 1.1
    assert found.options["idle_gap_ms"] == 20
    assert found.seconds > 662 * 0.02


def test_an_output_that_is_not_a_number_is_refused_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(EdgestillError, match="not finite") as caught:
        run(tmp_path, {"a": constant(1)}, value=float("nan"))
    assert caught.value.where == str(tmp_path / "a.bin")
    assert "2 of 2" in str(caught.value.evidence)


def test_no_candidates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model"):
        run(tmp_path, {})


def test_garbage_collection_is_back_on_after_a_failure(tmp_path: Path) -> None:
    def failing(index: int, now: int) -> float:
        if index > 2000:
            raise EdgestillError("the device is gone")
        return MS

    with pytest.raises(EdgestillError, match="gone"):
        run(tmp_path, {"a": failing}, limit=1.0000001, percentile=99.9)
    assert gc.isenabled()


def test_what_was_saved_is_loaded_with_every_sample(tmp_path: Path) -> None:
    measured = run(tmp_path, {"a": heavy_tail()}, limit=1000)[0]["a"]
    path = m.save_measurement(tmp_path / "measurements", *measured)
    loaded = m.load_measurement(path)
    assert loaded.measurement == measured.measurement
    np.testing.assert_array_equal(loaded.samples.compute_ns, measured.samples.compute_ns)
    np.testing.assert_array_equal(loaded.samples.end_to_end_ns, measured.samples.end_to_end_ns)
    assert json.loads(path.read_text())["compute"]["samples"] == len(measured.samples.compute_ns)


@pytest.mark.parametrize("damage", ["truncated samples", "no samples", "not JSON", "other samples"])
def test_a_damaged_measurement_is_refused(tmp_path: Path, damage: str) -> None:
    path = m.save_measurement(tmp_path, *run(tmp_path, {"a": constant(1)})[0]["a"])
    samples = path.with_suffix(".npz")
    if damage == "truncated samples":
        samples.write_bytes(samples.read_bytes()[:100])
    elif damage == "no samples":
        samples.unlink()
    elif damage == "not JSON":
        path.write_text("{")
    else:
        np.savez(samples, compute_ns=np.ones(3, np.int64), end_to_end_ns=np.ones(3, np.int64))
    with pytest.raises(InputError) as caught:
        m.load_measurement(path)
    assert caught.value.where == str(path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    measured = run(tmp_path, {"a": constant(1)})[0]["a"]
    with pytest.raises(EdgestillError, match="cannot write"):
        m.save_measurement(tmp_path / "file" / "measurements", *measured)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=900), st.sampled_from([50, 90, 95, 99, 99.9]))
def test_figures_are_of_the_samples_and_in_order(samples: list[int], percentile: float) -> None:
    found = m.describe(samples, "compute", percentile, 0.99)
    said = [value for value in (found.p50, found.p90, found.p95, found.p99, found.p99_9) if value is not None]
    assert said == sorted(said)
    assert all(value in {sample / 1e6 for sample in samples} for value in said)
    assert (found.minimum, found.maximum) == (min(samples) / 1e6, max(samples) / 1e6)
    assert found.samples == len(samples)
    assert (found.p99 is None) == (len(samples) < 662)
    if found.value is not None and found.upper_bound is not None and found.lower_bound is not None:
        assert found.lower_bound <= found.value <= found.upper_bound


def test_queries_cycle_through_the_samples_in_batches() -> None:
    rows = np.arange(10, dtype=np.uint8)[:, None]
    assert [batch["x"][:, 0].tolist() for batch in m.query_batches({"x": rows}, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert m.query_batches({"x": rows[:3]}, 4)[0]["x"][:, 0].tolist() == [0, 1, 2, 0]
    with pytest.raises(InputError):
        m.query_batches({"x": rows[:0]}, 4)


def test_a_batch_sweep_finds_where_throughput_saturates(tmp_path: Path) -> None:
    clock = SyntheticClock()

    class Growing(SyntheticSession):
        def query(self, inputs: Mapping[str, Any], clock: Clock) -> Timed:
            self.latency = lambda index, now: MS * (1 + max(0, len(inputs["image"]) - 8) / 8)
            return super().query(inputs, clock)

    runtime = SyntheticRuntime({})
    runtime.sessions["a"] = Growing("a", constant(1), [], 0.5)
    found = sweep(
        tmp_path / "a.bin", {"image": np.zeros((8, 2), np.uint8)}, MeasureSection(), runtime=runtime, clock=clock
    )
    assert [point.batch for point in found.points[:4]] == [1, 2, 4, 8]
    assert found.saturation_batch == 8
    assert found.points[0].samples_per_second == pytest.approx(1e9 / (MS + COPY_NS), rel=1e-3)
    assert "less than 5 %" in found.note


def test_what_disturbed_the_machine_is_said() -> None:
    before = {"cores": 4, "throttle_events": 3, "governor": ["schedutil"], "temperatures_c": {"cpu": 50.0}}
    after = {"cores": 4, "throttle_events": 5, "governor": ["performance"], "temperatures_c": {"cpu": 90.0}}
    use = {"other_cores": 1.3, "stolen_cores": 0.4, "busiest": [{"name": "ffmpeg", "cores": 1.2}], "seconds": 2.0}
    environment = environment_of(before, after, use)
    assert environment["before"]["temperatures_c"] != environment["after"]["temperatures_c"]
    environment["clock_mhz"] = {"lowest": 1200.0, "highest": 2400.0}
    latency = m.describe([1_000_000] * 662, "compute", 99, 0.99)
    said = warnings_of(True, MeasureSection(), environment, latency, [])
    assert said == (
        "the machine was busy: other processes used 1.3 of 4 cores (ffmpeg 1.2)",
        "the hypervisor took 0.4 cores away",
        "the CPU was throttled: 3 events before, 5 after",
        'the clock changed while sampling, between 1200 and 2400 MHz; the governor "performance" or fixed clocks avoid '
        "that",
        "the governor changed from ['schedutil'] to ['performance']",
    )
    quiet = environment_of(before, before, {**use, "other_cores": 0.05, "stolen_cores": 0.0})
    quiet["clock_mhz"] = {"lowest": 2350.0, "highest": 2400.0}
    assert warnings_of(True, MeasureSection(), quiet, latency, []) == ()


def test_clocks_are_read_while_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for core, khz in enumerate((1_200_000, 2_400_000)):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{khz}\n")
    monkeypatch.setattr(agent, "CPU", str(tmp_path))
    watch = ClockWatch()
    watch.look()
    assert watch.found() == {}, "what comes before sampling does not count"
    watch.start()
    watch.look()
    (tmp_path / "cpu1" / "cpufreq" / "scaling_cur_freq").write_text("1800000\n")
    watch.look()
    assert watch.found() == {"clock_mhz": {"lowest": 2400.0, "highest": 2400.0}}, "every other second is enough"
    watch._due = 0.0
    watch.look()
    assert watch.found() == {"clock_mhz": {"lowest": 1800.0, "highest": 2400.0}}


def test_a_drift_while_sampling_ends_unstable_and_not_as_a_number(tmp_path: Path) -> None:
    # settles in the warm-up, then slows down by half
    found = run(tmp_path, {"a": lambda index, now: MS * (1 + max(0, index - 700) / 3000)}, limit=1.4)[0][
        "a"
    ].measurement
    assert found.warmup_seconds < 2
    assert not found.stable
    assert found.compute.value is None
    assert found.compute.upper_bound is None
    assert found.verdict == "inconclusive"
    assert any("unstable: it drifted" in line for line in found.warnings)


def test_slow_spells_while_sampling_end_unstable_and_not_as_a_number(tmp_path: Path) -> None:
    # one query in twenty is slow, and all of these come in two spells
    found = run(tmp_path, {"a": lambda index, now: MS * (3 if 900 <= index < 930 or 1500 <= index < 1530 else 1)})[0][
        "a"
    ]
    assert not found.measurement.stable
    assert found.measurement.compute.value is None
    assert found.measurement.compute.p50 == pytest.approx(1.0), "what the samples were is told all the same"
    assert any("unstable: slow queries came in spells" in line for line in found.measurement.warnings)


def test_what_is_far_from_the_limit_is_decided_although_it_moved(tmp_path: Path) -> None:
    drift: Latency = lambda index, now: MS * (1 + max(0, index - 700) / 3000)  # noqa: E731
    assert run(tmp_path, {"a": drift}, limit=50)[0]["a"].measurement.verdict == "pass"
    assert run(tmp_path, {"a": drift}, limit=0.5)[0]["a"].measurement.verdict == "fail"


def test_too_few_samples_for_the_percentile_are_said_with_the_number(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": constant(10)}, percentile=99.9, max_seconds=1)[0]["a"].measurement
    assert found.compute.value is None
    assert any("p99.9 needs 6,636" in line and "max_seconds" in line for line in found.warnings)
    found = run(tmp_path, {"a": constant(1)}, percentile=99.9, max_samples=5000)[0]["a"].measurement
    assert any("5,000 were taken, the most" in line and "max_samples" in line for line in found.warnings)


def test_samples_too_few_for_the_confidence_of_a_look_are_said_with_its_number(tmp_path: Path) -> None:
    # enough for the p99 itself, not for a bound that leaves a share of the error to each of six looks
    found = run(tmp_path, {"a": constant(1)}, limit=5, max_seconds=0.8)[0]["a"].measurement
    assert 662 < found.compute.samples < 863
    assert found.verdict == "inconclusive"
    assert any("p99 needs 863" in line and "raise measure.max_seconds" in line for line in found.warnings)


def hanging(released: threading.Event) -> Latency:
    """Answers the first queries, then never again."""

    def latency(index: int, now: int) -> float:
        if index >= 1000:
            released.wait()
        return MS

    return latency


def test_a_runtime_that_hangs_is_named_and_the_others_are_measured(tmp_path: Path) -> None:
    released = threading.Event()
    runtime = SyntheticRuntime({"a": constant(1), "b": hanging(released), "c": constant(2)})
    failures: dict[str, EdgestillError] = {}
    found = measure_with(tmp_path, runtime, failures, timeout_seconds=0.4)
    released.set()
    assert sorted(found) == ["a", "c"]
    assert found["c"].measurement.compute.p99 == pytest.approx(2.0)
    assert "hangs on the model after it had answered before" in failures["b"].message
    assert failures["b"].where == str(tmp_path / "b.bin")
    assert "0.4 s" in str(failures["b"].evidence)
    assert gc.isenabled()
    assert [difference.against for difference in found["a"].measurement.differences] == ["c"]


def test_one_model_that_fails_does_not_end_the_measurement_of_the_others(tmp_path: Path) -> None:
    def failing(index: int, now: int) -> float:
        if index > 900:
            raise EdgestillError("the device has not enough memory for the model")
        return MS

    runtime = SyntheticRuntime({"a": failing, "b": constant(1)})
    failures: dict[str, EdgestillError] = {}
    assert list(measure_with(tmp_path, runtime, failures)) == ["b"]
    assert "not enough memory" in failures["a"].message


def test_when_every_model_fails_nothing_is_measured_and_each_error_is_told(tmp_path: Path) -> None:
    runtime = SyntheticRuntime({"a": constant(1), "b": constant(1)}, value=float("nan"))
    failures: dict[str, EdgestillError] = {}
    assert measure_with(tmp_path, runtime, failures) == {}
    assert ["not finite" in failures[name].message for name in "ab"] == [True, True]


def measure_with(
    tmp_path: Path, runtime: SyntheticRuntime, failures: dict[str, EdgestillError], **section: Any
) -> dict[str, m.Measured]:
    candidates = {name: tmp_path / f"{name}.bin" for name in runtime.sessions}
    for path in candidates.values():
        path.write_bytes(b"synthetic")
    return m.measure(
        candidates,
        {"image": np.zeros((8, 2), np.uint8)},
        TargetSection(name="t"),
        MeasureSection(**section),
        runtime=runtime,
        clock=SyntheticClock(),
        fresh_process=False,
        failures=failures,
    )


def test_a_core_that_may_not_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="may not be used") as caught:
        run(tmp_path, {"a": constant(1)}, affinity=(10_000,))
    assert caught.value.where == "affinity"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinities")
def test_cores_are_pinned_recorded_and_given_back(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    seen = []

    def latency(index: int, now: int) -> float:
        seen.append(os.sched_getaffinity(0))
        return MS

    core = min(before)
    found = run(tmp_path, {"a": latency}, affinity=(core,))[0]["a"].measurement
    assert set(map(frozenset, seen)) == {frozenset({core})}
    assert found.options["affinity"] == [core]
    assert os.sched_getaffinity(0) == before


def test_single_slow_queries_are_not_called_spells() -> None:
    samples = np.full(1600, MS)
    samples[np.r_[0:800:100, 800:1600:8]] = 5 * MS
    assert "came more often at times: between 1.0% and 12.5%" in movement(samples, 99)
    samples[:] = MS
    samples[100:160] = samples[900:960] = 5 * MS
    assert "in spells: 120 over" in movement(samples, 99)
    assert "in 2 spells" in movement(samples, 99)


def test_a_thread_sweep_finds_where_more_threads_bring_nothing(tmp_path: Path) -> None:
    class Threaded(SyntheticRuntime):
        def load(self, model: Path, *, threads: int | None) -> SyntheticSession:
            return SyntheticSession("a", constant(8 / min(threads or 1, 4)), self.log, 0.5)

    found = sweep_threads(
        tmp_path / "a.bin",
        {"image": np.zeros((8, 2), np.uint8)},
        MeasureSection(),
        threads=(1, 2, 4, 8),
        runtime=Threaded({}),
        clock=SyntheticClock(),
    )
    assert [point.threads for point in found.points] == [1, 2, 4, 8]
    assert found.saturation_threads == 4
