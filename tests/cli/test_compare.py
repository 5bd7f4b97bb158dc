"""`edgestill compare`: noise is not called a regression, a regression is, and what is not comparable is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.pipeline.bench import BenchResult
from cli.report.compare import CONFIDENCE, Comparison, compare, latency_interval, metric_interval
from cli.report.compare_text import render_comparison
from cli.report.gate import parse_gates
from cli.report.predictions import Predictions, Stored
from cli.report.schema import EnergyValue, LatencyValue, MetricValue, TargetRow, load_report, to_json
from cli.report.sides import Figures, load_side
from profiles import metrics, statistics
from profiles.device import TargetSection
from profiles.measure import measure, save_measurement
from profiles.measure_section import MeasureSection
from profiles.measurement import Measurement, Memory
from tests.cli.cli_runner import Result, edgestill
from tests.cli.compare_cases import tiny_model, with_samples, write_run
from tests.cli.report_example import example

N = 2648


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """A real measurement on this machine."""
    model = tiny_model(tmp_path_factory.mktemp("model") / "tiny.onnx")
    inputs = {"x": np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)}
    # short, since its figures do not matter; so it may never have settled
    section = MeasureSection(max_seconds=0.1, warmup_seconds=0.1)
    target = TargetSection(name="bench")
    found = measure({"tiny.onnx": model}, inputs, target, section, input_source="random", fresh_process=False)
    measurement = found["tiny.onnx"].measurement.model_copy(
        update={"memory": Memory(peak_mib=50.0, before_load_mib=40.0, how="VmHWM")}
    )
    return measurement


def latencies(seed: int, factor: float = 1.0, n: int = N) -> np.ndarray:
    return np.random.default_rng(seed).gamma(50.0, 0.02, n) * factor


def answers(seed: int, share: float = 0.9, n: int = 2000) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < share


@pytest.fixture
def write(tmp_path: Path, measured: Measurement) -> Callable[..., Path]:
    def make(name: str, milliseconds: np.ndarray, correct: np.ndarray, **changes: Any) -> Path:
        return write_run(tmp_path / name, measured, milliseconds, correct, **changes)

    return make


def run(a: Path, b: Path, *options: str) -> Result:
    return edgestill("compare", str(a), str(b), *options)


def document(a: Path, b: Path, *options: str) -> tuple[int, Comparison]:
    result = run(a, b, "--json", *options)
    assert result.out, result.err
    return result.status, Comparison.model_validate_json(result.out)


def change(found: Comparison, quantity: str) -> Any:
    return next(each for each in found.rows[0].changes if each.quantity == quantity)


def test_a_run_is_no_worse_than_itself_and_a_second_one_is_within_noise(write: Callable[..., Path]) -> None:
    before = write("before", latencies(0), answers(0))
    again = write("again", latencies(1), answers(0))
    status, found = document(before, again)
    assert status == 0
    assert {each.quantity: each.outcome for each in found.rows[0].changes} == {
        "latency": "noise",
        "metric": "same",
        "size": "same",
        "memory": "same",
    }
    assert change(found, "latency").how == "order statistics of 2,648 and 2,648 samples"
    assert change(found, "metric").how == "the same file and answers"


@pytest.mark.parametrize(("after", "outcome"), [(50.3, "noise"), (49.6, "noise"), (51.0, "worse"), (49.0, "better")])
def test_memory_is_one_reading_so_that_little_differences_are_noise(
    write: Callable[..., Path], after: float, outcome: str
) -> None:
    before = write("before", latencies(0), answers(0))
    memory = Memory(peak_mib=after, before_load_mib=40.0, how="VmHWM")
    found = document(before, write("after", latencies(0), answers(0), memory=memory))[1]
    assert change(found, "memory").outcome == outcome
    assert change(found, "memory").how == "one reading each; 0.5 MiB is what readings of one file differ by"


def test_a_regression_beyond_the_gate_fails_and_one_within_it_passes(write: Callable[..., Path]) -> None:
    before = write("before", latencies(0), answers(0))
    slower = write("slower", latencies(1, 1.3), answers(0))
    status, found = document(before, slower, "--gate", "latency=+5%,metric=-0.3pt")
    assert (status, change(found, "latency").outcome, change(found, "latency").verdict) == (3, "worse", "fail")
    assert change(found, "metric").verdict == "pass"
    assert change(found, "latency").relative_low < 0.3 < change(found, "latency").relative_high
    assert document(before, slower, "--gate", "latency=+50%")[0] == 0
    assert document(before, slower, "--gate", "latency=+0.5ms")[0] == 0
    assert document(before, slower, "--gate", "latency=+0.1ms")[0] == 3
    # the other way round it is faster, and a gate may ask for that
    status, found = document(slower, before, "--gate", "latency=-10%")
    assert (status, change(found, "latency").outcome) == (0, "better")


def test_a_gate_within_the_noise_is_not_decided(write: Callable[..., Path]) -> None:
    before, after = write("before", latencies(0), answers(0)), write("after", latencies(1), answers(0))
    status, found = document(before, after, "--gate", "latency=+1%")
    assert (status, change(found, "latency").verdict) == (4, "inconclusive")


def test_the_metric_is_compared_sample_by_sample_where_predictions_are_kept(write: Callable[..., Path]) -> None:
    right = answers(0)
    worse = right.copy()
    worse[np.flatnonzero(right)[:30]] = False
    before, after = write("before", latencies(0), right), write("after", latencies(1), worse)
    _, paired = document(before, after, "--gate", "metric=-0.3pt")
    assert change(paired, "metric").how == "paired on 2,000 samples: 30 right in A alone, 0 in B alone"
    assert (change(paired, "metric").outcome, change(paired, "metric").verdict) == ("worse", "fail")
    assert change(paired, "metric").difference == pytest.approx(-0.015)
    alone = write("alone", latencies(1), worse, predictions=False)
    _, independent = document(before, alone, "--gate", "metric=-0.3pt")
    assert (change(independent, "metric").outcome, change(independent, "metric").verdict) == ("noise", "inconclusive")
    assert change(independent, "metric").how == "both intervals"


def test_sizes_are_exact(write: Callable[..., Path]) -> None:
    before = write("before", latencies(0), answers(0))
    larger = write("larger", latencies(1), answers(0), size_mib=0.96)
    assert document(before, larger, "--gate", "size=+5%")[0] == 3
    assert document(before, larger, "--gate", "size=+0.1MiB")[0] == 0


def other(measurement: Measurement, what: str) -> dict[str, Any]:
    """A measurement that differs in one thing."""
    if what == "threads":
        return {"options": measurement.options | {"intra_op_threads": 7}}
    if what in ("cpu", "gpu driver"):
        return {}
    return {
        "runtime": {"runtime_version": "0.1"},
        "clock": {"scope": "compute"},
        "batch": {"batch": 4},
        "inputs": {"input_source": "golden sample"},
        "percentile": {},
    }[what]


def facts(run: Path, environment: dict[str, Any], runtime: str = "onnxruntime") -> None:
    """Rewrites a report as if its latency had been measured on another machine or in another runtime."""
    report = load_report(run / "report.json")
    row = report.targets[0]
    assert row.latency is not None
    latency = row.latency.model_copy(update={"runtime": runtime})
    row = row.model_copy(update={"environment": environment, "latency": latency})
    (run / "report.json").write_text(to_json(report.model_copy(update={"targets": (row,)})), encoding="utf-8")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("threads", "option intra_op_threads: 1 and 7"),
        ("runtime", "runtime: onnxruntime"),
        ("clock", "clock and batch: end to end, batch 1 and compute only, batch 1"),
        ("batch", "clock and batch: end to end, batch 1 and end to end, batch 4"),
        ("inputs", "inputs: random and golden sample"),
        ("cpu", "cpu model: "),
        ("gpu driver", "driver: 560.35.03 and 570.86.15"),
    ],
)
def test_latencies_under_other_circumstances_are_refused_with_the_reason(
    write: Callable[..., Path], measured: Measurement, what: str, words: str
) -> None:
    before = write("before", latencies(0), answers(0))
    after = write("after", latencies(1), answers(0), **other(measured, what))
    if what == "cpu":
        facts(after, measured.environment | {"cpu_model": "Z80"})
    if what == "gpu driver":
        for side, driver in ((before, "560.35.03"), (after, "570.86.15")):
            facts(side, measured.environment | {"driver": driver}, "onnxruntime-cuda")
    status, found = document(before, after, "--gate", "latency=+500%,metric=-5pt")
    latency = change(found, "latency")
    assert (status, latency.outcome, latency.verdict) == (4, "refused", "inconclusive")
    assert words in latency.reason
    assert latency.difference is None
    assert change(found, "metric").verdict == "pass"
    assert words in " ".join(run(before, after).out.split())


def test_metrics_on_other_test_data_are_refused(write: Callable[..., Path]) -> None:
    before, after = write("before", latencies(0), answers(0)), write("after", latencies(1), answers(0))
    report = load_report(after / "report.json")
    data = report.data.model_copy(update={"test_key": "other"})
    (after / "report.json").write_text(to_json(report.model_copy(update={"data": data})), encoding="utf-8")
    status, found = document(before, after, "--gate", "metric=-1pt")
    assert (status, change(found, "metric").outcome, change(found, "metric").reason) == (
        4,
        "refused",
        "other test data",
    )
    assert change(found, "latency").outcome == "noise"


def test_two_of_which_nothing_is_comparable_are_a_wrong_input(tmp_path: Path, measured: Measurement) -> None:
    files = []
    for name, changes in (("a", {}), ("b", {"batch": 16})):
        found, samples = with_samples(measured, latencies(0), **changes)
        files.append(save_measurement(tmp_path / name, found, samples))
    result = run(*files)
    assert (result.status, result.out) == (2, "")
    assert "not comparable" in result.err
    assert "batch 16" in result.err


def test_bench_documents_are_compared_by_their_bounds_and_stored_ones_by_their_samples(
    tmp_path: Path, measured: Measurement
) -> None:
    printed = tmp_path / "bench.json"
    bench = BenchResult(measurement=with_samples(measured, latencies(0))[0])
    printed.write_text(bench.model_dump_json(), encoding="utf-8")
    status, found = document(printed, printed)
    assert (status, change(found, "latency").how) == (0, "the bounds of both")
    assert change(found, "latency").outcome == "noise"
    first, samples = with_samples(measured, latencies(0), name="first")
    second, others = with_samples(measured, latencies(1, 1.5), name="second")
    files = save_measurement(tmp_path, first, samples), save_measurement(tmp_path, second, others)
    status, found = document(*files, "--gate", "latency=+5%")
    assert (status, found.rows[0].name) == (3, "first -> second")
    assert change(found, "latency").how.startswith("order statistics")
    # a run's bench names its targets
    of_run = tmp_path / "run.json"
    of_run.write_text(json.dumps({"desk": [first.model_dump(mode="json")], "far": []}), encoding="utf-8")
    assert document(of_run, of_run)[1].rows[0].name == "desk"


def test_an_unstable_latency_is_not_compared(write: Callable[..., Path]) -> None:
    before = write("before", latencies(0), answers(0))
    after = write("after", latencies(1, 2.0), answers(0), stable=False)
    status, found = document(before, after, "--gate", "latency=+5%")
    assert (status, change(found, "latency").outcome) == (4, "unknown")
    assert change(found, "latency").reason == "B never became stable"


def test_too_few_samples_decide_nothing(write: Callable[..., Path]) -> None:
    before = write("before", latencies(0), answers(0))
    after = write("after", latencies(1, 2.0, n=300), answers(0))
    status, found = document(before, after, "--gate", "latency=+5%")
    assert (status, change(found, "latency").outcome) == (4, "unknown")
    assert "too few samples" in change(found, "latency").reason


def test_samples_that_were_measured_anew_do_not_stand_for_the_report(
    write: Callable[..., Path], measured: Measurement
) -> None:
    before, after = write("before", latencies(0), answers(0)), write("after", latencies(1), answers(0))
    later, samples = with_samples(measured, latencies(2, 3.0), name="int8")
    save_measurement(after / "measurements" / "line3-orin", later, samples)
    assert change(document(before, after)[1], "latency").how == "the bounds of both"
    (before / "measurements" / "line3-orin" / "int8.npz").write_bytes(b"no samples")
    damaged = run(before, after)
    assert damaged.status == 2
    assert "damaged measurement" in damaged.err


def test_targets_of_one_run_only_are_named_and_leave_a_gate_undecided(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    here = write("before", latencies(0), answers(0))
    there = tmp_path / "report.json"
    report = load_report(here / "report.json")
    renamed = report.targets[0].model_copy(update={"name": "elsewhere"})
    both = (report.targets[0], renamed)
    there.write_text(to_json(example(both, data=report.data)), encoding="utf-8")
    status, found = document(there, here, "--gate", "latency=+50%")
    assert (status, found.only_a) == (4, ("elsewhere",))
    assert document(here, there, "--gate", "size=+50%")[0] == 0
    there.write_text(to_json(example((renamed,))), encoding="utf-8")
    assert "no target in common" in run(here, there).err


def test_what_was_not_measured_in_both_leaves_the_status_alone(write: Callable[..., Path]) -> None:
    folders = [write(name, latencies(0), answers(0)) for name in ("before", "after")]
    for folder in folders:
        report = load_report(folder / "report.json")
        row = report.targets[0]
        bare = TargetRow.model_validate(
            row.model_dump() | {"latency": None, "peak_memory_mib": None, "candidates": (), "verdict": "not measured"}
        )
        (folder / "report.json").write_text(to_json(example((bare,), data=report.data)), encoding="utf-8")
    status, found = document(*folders, "--gate", "latency=+5%,metric=-1pt")
    assert (status, change(found, "latency").verdict, change(found, "metric").verdict) == (0, "not measured", "pass")


def test_all_shows_what_was_tried_and_no_gate_decides_on_it(write: Callable[..., Path]) -> None:
    before, after = write("before", latencies(0), answers(0)), write("after", latencies(1, 1.5), answers(0))
    _, found = document(before, after, "--all", "--gate", "latency=+5%")
    assert [(row.precision_a, row.shipped) for row in found.rows] == [("int8", True), ("fp32", False), ("int8", False)]
    assert [row.changes[0].verdict for row in found.rows] == ["fail", None, None]


def test_energy_is_compared_by_its_intervals(tmp_path: Path) -> None:
    sides = []
    for name, value in (("a", 10.0), ("b", 13.0)):
        energy = EnergyValue(value=value, low=value - 0.5, high=value + 0.5, how="RAPL")
        row = example().targets[0].model_copy(update={"energy": energy})
        (tmp_path / f"{name}.json").write_text(to_json(example((row,))), encoding="utf-8")
        sides.append(load_side(tmp_path / f"{name}.json"))
    found = compare(sides[0], sides[1], parse_gates("energy=+5%"))
    assert (change(found, "energy").outcome, found.exit_status) == ("worse", 3)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_table_fits_and_is_told_without_colour(write: Callable[..., Path], width: int, ascii_only: bool) -> None:
    before, after = write("before", latencies(0), answers(0)), write("after", latencies(1, 1.5), answers(0))
    _, found = document(before, after, "--gate", "latency=+5%,metric=-0.3pt")
    text = render_comparison(found, width, ascii_only=ascii_only)
    assert all(len(line) <= width for line in text.splitlines())
    assert "FAIL" in text
    assert "\x1b" not in text
    assert not ascii_only or text.isascii()
    assert "\x1b" in render_comparison(found, width, color=True)


def test_markdown_has_the_same_cells_in_every_row_and_a_file_can_be_written(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    before, after = write("before", latencies(0), answers(0)), write("after", latencies(1, 1.5), answers(0))
    text = run(before, after, "--markdown", "-", "--gate", "latency=+5%").out
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "**FAIL**, worse" in text
    assert run(before, after, "--markdown", str(tmp_path / "comment.md")).status == 0
    assert (tmp_path / "comment.md").read_text(encoding="utf-8").startswith("### edgestill compare")
    assert run(before, after, "--markdown", "-", "--json").status == 2


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"a": 1}', '{"measurement": {}}', '"text"', "null"])
def test_what_is_no_report_is_explained(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    result = run(tmp_path / "x.json", tmp_path / "x.json")
    assert result.status == 2
    assert "error: " in result.err
    assert run(tmp_path / "none", tmp_path / "none").status == 2


# -- how often it is wrong ---------------------------------------------------------------------------------------------


def gamma(random: np.random.Generator, n: int) -> np.ndarray:
    return random.gamma(50.0, 0.02, n)


def bimodal(random: np.random.Generator, n: int) -> np.ndarray:
    return np.where(random.random(n) < 0.985, random.normal(1.0, 0.02, n), random.normal(5.0, 0.1, n))


def heavy_tail(random: np.random.Generator, n: int) -> np.ndarray:
    return 1 + random.pareto(1.5, n)


def drifting_back(random: np.random.Generator, n: int) -> np.ndarray:
    """Each query much like the one before: a first-order autoregression."""
    from scipy.signal import lfilter

    return np.exp(0.2 * lfilter([1], [1, -0.9], random.normal(size=n + 200))[200:])


def bursts(random: np.random.Generator, n: int) -> np.ndarray:
    """Slow spells of about 25 queries, twice in a thousand."""
    starts = random.random(n) < 1 / 500
    lengths = random.geometric(1 / 25, n)
    ends = np.zeros(n, dtype=bool)
    for start in np.flatnonzero(starts):
        ends[start : start + lengths[start]] = True
    return random.gamma(50.0, 0.02, n) * np.where(ends, 1.5, 1.0)


def figures(samples: np.ndarray, percentile: float) -> Figures:
    latency = LatencyValue(percentile=percentile, point=1.0)
    return Figures("x", "fp32", latency=latency, samples=lambda: samples)


@pytest.mark.parametrize("percentile", [50.0, 99.0])
@pytest.mark.parametrize("draw", [gamma, bimodal, heavy_tail, drifting_back, bursts])
def test_equal_runs_are_told_apart_at_most_as_often_as_claimed(draw: Any, percentile: float) -> None:
    random = np.random.default_rng(7)
    repetitions, wrong = 150, 0
    for _ in range(repetitions):
        a, b = figures(draw(random, 1324), percentile), figures(draw(random, 1324), percentile)
        found = latency_interval(a, b, CONFIDENCE)
        wrong += found.low is not None and found.high is not None and not found.low <= 0 <= found.high
    # what is observed must not show a rate above the claimed one
    assert statistics.wilson(wrong, repetitions, 0.999)[0] <= 1 - CONFIDENCE


def test_the_error_of_every_planned_look_counts_also_where_only_one_was_taken() -> None:
    samples = gamma(np.random.default_rng(5), 5296)
    one = figures(samples, 99.0)
    six = dataclasses.replace(one, looks=6)
    narrow, wide = latency_interval(one, one, CONFIDENCE), latency_interval(six, six, CONFIDENCE)
    assert wide.low is not None
    assert narrow.low is not None
    assert wide.low < narrow.low
    bounds = LatencyValue(
        percentile=99.0, point=1.0, lower_bound=0.9, upper_bound=1.1, confidence=1 - 0.01 / 6, planned_looks=6
    )
    stored = Figures("x", "fp32", latency=bounds)
    assert latency_interval(stored, stored, CONFIDENCE).confidence == pytest.approx(0.96)


def test_a_difference_that_is_there_is_found() -> None:
    random = np.random.default_rng(3)
    found = [
        latency_interval(figures(gamma(random, N), 50.0), figures(1.1 * gamma(random, N), 50.0), CONFIDENCE)
        for _ in range(50)
    ]
    assert all(each.relative_low is not None and 0 < each.relative_low < 0.1 for each in found)


@pytest.mark.parametrize("discordant", [0.002, 0.02, 0.2])
@pytest.mark.parametrize("n", [200, 2000])
def test_equal_models_are_told_apart_at_most_as_often_as_claimed(discordant: float, n: int) -> None:
    random = np.random.default_rng(11)
    repetitions, wrong = 2000, 0
    for _ in range(repetitions):
        draws = random.random(n)
        only_a, only_b = int((draws < discordant / 2).sum()), int((draws > 1 - discordant / 2).sum())
        low, high = statistics.paired_shares(only_a, only_b, n, CONFIDENCE)
        wrong += not low <= 0 <= high
    assert statistics.wilson(wrong, repetitions, 0.999)[0] <= 1 - CONFIDENCE


@given(st.integers(20, 400), st.integers(0, 1000), st.sampled_from(["multiclass", "multilabel"]))
@settings(max_examples=12, deadline=None)
def test_the_paired_interval_holds_the_difference_and_turns_with_the_order(n: int, seed: int, task: str) -> None:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, n) if task == "multiclass" else (random.random((n, 2)) < 0.5).astype(np.int64)
    if task == "multilabel":
        labels[:2] = [[0, 1], [1, 0]]
    kept, values = [], []
    for model in range(2):
        logits = random.normal(size=(n, 3 if task == "multiclass" else 2))
        kept.append(Stored(Predictions.of(task, logits, labels, None), "data", str(model)))
        values.append(MetricValue.of(metrics.evaluate(task, logits, labels)))
    there = metric_interval(*values, *kept, task, CONFIDENCE)
    back = metric_interval(values[1], values[0], kept[1], kept[0], task, CONFIDENCE)
    assert there.low is not None
    assert there.high is not None
    assert back.low is not None
    assert "paired" in there.how
    assert there.low <= values[1].value - values[0].value <= there.high
    assert back.low == pytest.approx(-there.high, abs=0.02 if task == "multilabel" else 1e-12)
