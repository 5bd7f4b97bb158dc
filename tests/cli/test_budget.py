"""Students that are chosen from a pool under the limits of their targets: real trainings, exports and measurements."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from cli.app import main
from cli.pipeline import Run
from cli.pipeline.budget import Settled, Tried, best_of, nearest_of
from cli.pipeline.estimate import estimate, render
from cli.recipe import load_recipe
from cli.report.html import to_html
from cli.report.schema import LimitVerdict, Report, Selection, load_report
from cli.report.terminal import render_text
from distill.students.arch import Arch, parse_arch
from distill.students.choose import Option
from distill.students.pool import Cost
from export import Candidate, Plan
from export.precision import quantization_for
from profiles.device import detect
from profiles.metrics import Metric
from tests.cli.budget_cases import FITS_ALL, FITS_NONE, SMALL, WIDE, calibrate, make_data, target, write_recipe

TARGETS = (
    target("here", FITS_ALL, precision="auto")
    + target("tight", FITS_NONE)
    + target("pi", FITS_ALL, device="raspberry-pi-5")
)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, and no calibration but those that a test makes."""
    folder = tmp_path_factory.mktemp("budget")
    make_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESTILL_CONFIG", str(folder / "config"))
        yield folder


def be_quiet(patch: pytest.MonkeyPatch) -> None:
    """What a noisy machine measured of the pool is not stored; here the runs are to find it again."""
    patch.setattr("profiles.measure.warnings_of", lambda *_: ())


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    be_quiet(monkeypatch)


def edgestill(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def interrupted(_run: Run, _arch: str) -> None:
    raise KeyboardInterrupt


def made(folder: Path) -> dict[Path, int]:
    """When every finished artefact was made."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


@pytest.fixture(scope="session")
def resumed(place: Path) -> tuple[Path, dict[Path, int], dict[Path, int]]:
    """A run that was interrupted before its first full training and then finished; what was there before and after."""
    recipe, folder = write_recipe(place, TARGETS), place / "run"
    with pytest.MonkeyPatch.context() as patch:
        be_quiet(patch)
        with pytest.MonkeyPatch.context() as interruption:
            interruption.setattr(Run, "student", interrupted)
            assert edgestill("-q", "run", str(recipe), "--out", str(folder)) == 130
        before = made(folder)
        assert edgestill("-q", "run", str(recipe), "--out", str(folder)) == 3
    return folder, before, made(folder)


@pytest.fixture(scope="session")
def report(resumed: tuple[Path, dict[Path, int], dict[Path, int]]) -> Report:
    return load_report(resumed[0] / "report.json")


def test_an_interrupted_choice_goes_on_where_it_stopped(
    resumed: tuple[Path, dict[Path, int], dict[Path, int]],
) -> None:
    folder, before, after = resumed
    kept = {path.relative_to(folder).parts[:2] for path in before}
    assert {("choice", "costs"), ("choice", "trials"), ("teacher", "manifest.json")} <= kept
    assert all(after[path] == time for path, time in before.items())


def test_the_student_of_an_attached_target_is_one_that_was_measured_within_its_limits(report: Report) -> None:
    row = next(row for row in report.targets if row.name == "here")
    assert row.verdict == "pass"
    assert row.latency is not None
    assert row.selection is not None
    chosen = row.selection.chosen
    assert chosen is not None
    assert (row.arch, chosen.source, chosen.passes) == (chosen.arch, "measured", True)
    passing = [attempt for attempt in row.selection.attempts if attempt.passes]
    assert chosen.metric == max(attempt.metric for attempt in passing)
    assert {attempt.name for attempt in row.selection.attempts} == {"fp32", "int8"}


def test_targets_share_trials_and_students(
    resumed: tuple[Path, dict[Path, int], dict[Path, int]], report: Report
) -> None:
    rows = {row.name: row for row in report.targets}
    assert rows["here"].arch == rows["pi"].arch
    assert rows["here"].selection is not None
    assert rows["here"].selection.shared_with == ("pi",)
    assert [path.name for path in (resumed[0] / "students").iterdir()] == [rows["here"].arch]
    assert report.sharing is not None
    shared = {training.role: training for training in report.sharing.trainings}
    assert shared["student"].targets == ("here", "pi")
    assert report.sharing.separate_seconds >= 1.9 * report.sharing.seconds
    assert shared["student"].kept
    assert "teacher" not in {training.role for training in report.sharing.own}


def test_what_only_a_missed_metric_asks_for_is_not_made_where_fp32_passes(
    resumed: tuple[Path, dict[Path, int], dict[Path, int]],
) -> None:
    folder = resumed[0]
    assert not [*folder.glob("students/*--qat-*"), *folder.glob("exports/*/int8-search*")]


def test_measuring_a_chosen_student_again_is_what_the_next_report_reads(
    resumed: tuple[Path, dict[Path, int], dict[Path, int]], place: Path, report: Report
) -> None:
    folder = place / "again"
    shutil.copytree(resumed[0], folder)
    recipe = load_recipe(str(write_recipe(place, TARGETS)))
    arch = next(row.arch for row in report.targets if row.name == "here")
    stored = made(folder)[folder / "measurements" / f"here--{arch}" / "manifest.json"]
    measured = Run(recipe, folder).bench()
    assert set(measured["here"]) == {"fp32", "int8"}
    assert measured["pi"] == {}
    after = made(folder)
    assert after[folder / "measurements" / f"here--{arch}" / "manifest.json"] > stored
    assert not (folder / "measurements" / "here").exists()
    told = next(row.latency for row in Run(recipe, folder).report().targets if row.name == "here")
    assert told is not None
    assert told.samples in {found.asked.samples for found in measured["here"].values()}


def test_a_training_for_int8_is_told_and_counted(
    resumed: tuple[Path, dict[Path, int], dict[Path, int]], place: Path, report: Report
) -> None:
    shutil.copytree(resumed[0], place / "int8")
    run = Run(load_recipe(str(write_recipe(place, TARGETS)), ["export.qat_epochs=1"]), place / "int8")
    run.distill()
    here = run.targets[0]
    run.retrained(run.arch_of(here), quantization_for(here.device, here.stack).spec)
    assert run.budgets is not None
    sharing = run.budgets.sharing()
    seconds = run.trained["qat", next((place / "int8" / "students").glob("*--qat-*")).name].result.seconds
    assert 0 < seconds == sharing.seconds_of("qat", kept=True)
    assert report.sharing is not None
    assert sharing.seconds == pytest.approx(report.sharing.seconds + seconds)


def test_a_target_that_nothing_meets_names_the_nearest_and_what_would_pass(report: Report) -> None:
    row = next(row for row in report.targets if row.name == "tight")
    assert (row.verdict, row.bundle, report.exit_status) == ("fail", None, 3)
    assert row.selection is not None
    assert row.selection.fitting == 0
    passing = row.selection.passing["latency_ms"]
    assert passing >= (row.selection.rejected[0].needs or 0) > FITS_NONE
    assert row.fixes[0].startswith(f"latency_ms = {passing:g}")
    assert {entry.arch for entry in row.selection.rejected} == {SMALL, WIDE}


def test_a_run_whose_budgets_nothing_meets_trains_nothing(
    resumed: tuple[Path, dict[Path, int], dict[Path, int]], place: Path
) -> None:
    for name in ("data", "choice/costs"):
        shutil.copytree(resumed[0] / name, place / "none" / name)
    recipe = write_recipe(place, target("tight", FITS_NONE, precision="auto"))
    found = Run(load_recipe(str(recipe)), place / "none").report()
    assert (found.exit_status, found.training, found.references) == (3, (), ())
    assert found.targets[0].fixes
    assert "tight" in render_text(found)


def test_a_device_that_is_not_attached_is_chosen_for_by_a_stated_efficiency(report: Report) -> None:
    row = next(row for row in report.targets if row.name == "pi")
    assert (row.verdict, row.latency) == ("not measured", None)
    assert row.selection is not None
    assert row.selection.source == "assumed"
    assert row.selection.efficiency is not None
    assert all(attempt.source == "assumed" for attempt in row.selection.attempts)
    assert f"{row.selection.efficiency * 100:.0f} % of its peaks" in " ".join(row.why)


def test_the_choice_is_explained_in_every_form_of_the_report(
    resumed: tuple[Path, dict[Path, int], dict[Path, int]], report: Report
) -> None:
    short, everything = render_text(report), render_text(report, show_all=True)
    assert "none of the 2 students of the pool is within the limits" in " ".join(short.split())
    assert "in a run for each target" in " ".join(short.split())
    assert "Students for here" in everything
    assert "Students for here" in to_html(report)
    stored = json.loads((resumed[0] / "choice" / "here" / "choice.json").read_text())
    assert stored["student"] == report.targets[0].arch


def test_a_finished_choice_trains_and_measures_nothing_again(
    resumed: tuple[Path, dict[Path, int], dict[Path, int]], place: Path
) -> None:
    folder, _, before = resumed
    again = Run(load_recipe(str(write_recipe(place, TARGETS))), folder).report()
    assert not {stage.name for stage in again.stages if not stage.cached and not stage.name.startswith("bundle")}
    after = made(folder)
    assert all(after[path] == time for path, time in before.items() if "bundles" not in path.parts)


def test_a_dry_run_of_a_finished_choice_has_nothing_left_to_train(
    resumed: tuple[Path, dict[Path, int], dict[Path, int]], place: Path
) -> None:
    found = estimate(Run(load_recipe(str(write_recipe(place, TARGETS))), resumed[0]))
    done = {stage.name: stage.finished for stage in found.stages}
    assert done["price the pool (2 students)"]
    assert done["trials (2 at most)"]
    assert done["students (about 2 in full)"]


def test_a_dry_run_prices_trials_and_full_trainings_and_writes_nothing(place: Path) -> None:
    run = Run(load_recipe(str(write_recipe(place, TARGETS))), place / "dry")
    found = estimate(run)
    assert not (place / "dry").exists()
    seconds = {stage.name: stage.seconds for stage in found.stages}
    assert seconds["price the pool (2 students)"]
    trials, full = seconds["trials (2 at most)"], seconds["students (about 2 in full)"]
    assert any(name.startswith("fallbacks (at most") for name in seconds)
    assert all(stage.disk_mib > 0 for stage in found.stages if stage.name.startswith("export"))
    assert trials is not None
    assert full is not None
    assert found.seconds > full > 0
    assert "trials" in render(found, run)


def test_a_conditioned_teacher_ranks_its_pool_by_shared_weights(place: Path) -> None:
    recipe = write_recipe(
        place,
        target("pi", FITS_ALL, device="raspberry-pi-5"),
        choice="finalists = 1",
        teacher='strategy = "generic"\n[teacher.generic]\ninherit = true',
        epochs=1,
    )
    found = Run(load_recipe(str(recipe)), place / "generic").report()
    selection = found.targets[0].selection
    assert selection is not None
    assert {(row.arch, row.by) for row in selection.ranked} == {(SMALL, "supernet"), (WIDE, "supernet")}
    assert found.targets[0].arch == selection.ranked[0].arch
    assert not (place / "generic" / "choice" / "trials").exists()


def test_a_calibrated_device_is_priced_by_its_calibration(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path))
    calibrate(detect().stacks[0].runtime_version)
    run = Run(
        load_recipe(str(write_recipe(place, target("here", FITS_ALL, more='latency_scope = "compute"')))), tmp_path
    )
    assert run.budgets is not None
    fits, _ = run.budgets.priced()
    costs = {str(option.arch): option.cost for option in fits["here"]}
    assert {cost.source for cost in costs.values()} == {"calibrated"}
    assert (costs[SMALL].latency_ms or 0) < (costs[WIDE].latency_ms or 0)
    assert costs[SMALL].memory_mib == pytest.approx(60.0)
    assert run.budgets.pricing.missing(run.budgets.pool) == 0


def test_a_stage_is_timed_without_the_stages_inside_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(load_recipe(str(write_recipe(place, TARGETS))), place / "timed")
    clock = iter((0.0, 1.0, 5.0, 7.0))
    monkeypatch.setattr("cli.pipeline.run.time.perf_counter", lambda: next(clock))
    with run.timed("outer"), run.timed("inner"):
        pass
    assert [(stage.name, stage.seconds) for stage in run.stages] == [("inner", 4.0), ("outer", 3.0)]


# -- the way down the ladder, with files that are said to be made ------------------------------------------------------

LADDER = [parse_arch(f"conv-w{width}-d1-k3") for width in range(4, 44, 4)]


def descended(place: Path, monkeypatch: pytest.MonkeyPatch, largest: int) -> tuple[list[int], int]:
    """The widths that are tried, in order, where files up to this width are within the limit; and how many are not."""
    run = Run(load_recipe(str(write_recipe(place, TARGETS, choice="finalists = 2\ntrials = 2"))), place / "down")
    assert run.budgets is not None
    widths: list[int] = []

    def attempt(_target: object, arch: Arch, settled: Settled, _problems: list[str]) -> None:
        widths.append(arch.width)
        settled.tried.append(tried(str(arch), "fp32", 0.9, 0.3 if arch.width <= largest else 0.5))

    monkeypatch.setattr(run.budgets, "_try", attempt)
    selection = Selection(pool=10, fitting=10, source="measured")
    untried = run.budgets._descend(run.targets[0], LADDER[::-1], Settled(selection), [])
    return widths, untried


def test_the_next_smaller_is_tried_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert descended(place, monkeypatch, 36) == ([40, 36], 8)


def test_further_down_goes_by_halves_to_the_largest_that_passes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert descended(place, monkeypatch, 20) == ([40, 36, 16, 24, 20], 5)


def test_the_cheapest_is_tried_before_a_target_fails(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths, untried = descended(place, monkeypatch, 0)
    assert widths[-1] == 4
    assert untried == len(LADDER) - len(widths)


def planned(fp32: float, int8: float) -> Plan:
    """What the planner makes of a student whose INT8 must keep 99 % of its FP32."""

    def candidate(name: Literal["fp32", "int8"], value: float) -> Candidate:
        metric = Metric(name="top1", value=value, low=value, high=value, n=100, method="Wilson")
        return Candidate(name=name, precision=name, file=Path(f"{name}.onnx"), validation=metric)

    return Plan.model_construct(
        candidates=(candidate("fp32", fp32), candidate("int8", int8)), lowest_metric=0.99 * fp32
    )


def rescued(
    place: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, tuple[float, float, float, float]]
) -> list[str]:
    """The students that get search and retraining; files: student -> metric and latency of its FP32, then its INT8."""
    run = Run(load_recipe(str(write_recipe(place, target("here", FITS_ALL, precision="auto")))), place / "rescued")
    assert run.budgets is not None
    found: list[str] = []
    monkeypatch.setattr(run.budgets, "_try", lambda _target, arch, _settled, _problems: found.append(str(arch)))
    settled = Settled(Selection(pool=2, fitting=2, source="measured"))
    for arch, (fp32, fp32_ms, int8, int8_ms) in files.items():
        run.budgets._exported["here", arch] = planned(fp32, int8), {}
        settled.tried += [tried(arch, "fp32", fp32, fp32_ms), tried(arch, "int8", int8, int8_ms)]
    assert run.budgets._rescue(run.targets[0], settled, []) == bool(found)
    return found


def test_retraining_is_for_the_best_student_whose_int8_is_fast_enough_and_misses_the_metric(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = (0.88, 0.3, 0.87, 0.2)
    assert rescued(place, monkeypatch, {WIDE: (0.91, 0.5, 0.80, 0.3), SMALL: narrow}) == [WIDE]
    # its INT8 keeps the metric, is too slow as well, or cannot be better than what passes
    assert rescued(place, monkeypatch, {WIDE: (0.91, 0.5, 0.905, 0.3), SMALL: narrow}) == []
    assert rescued(place, monkeypatch, {WIDE: (0.91, 0.9, 0.80, 0.5), SMALL: narrow}) == []
    assert rescued(place, monkeypatch, {WIDE: (0.91, 0.3, 0.80, 0.2), SMALL: narrow}) == []
    # nothing passes, but for its metric one could
    assert rescued(place, monkeypatch, {WIDE: (0.91, 0.9, 0.80, 0.5), SMALL: (0.88, 0.5, 0.70, 0.3)}) == [SMALL]


# -- the choice between files, by itself ------------------------------------------------------------------------------


def tried(arch: str, name: str, metric: float, latency: float, limit: float = 0.4) -> Tried:
    verdict = LimitVerdict(
        name="latency_ms", limit=limit, value=latency, high=latency, verdict="pass" if latency <= limit else "fail"
    )
    cost = Cost(latency_ms=latency, source="measured")
    return Tried(Option(parse_arch(arch), name, cost), name, metric, latency, (verdict,))


def test_a_wider_student_in_int8_competes_with_a_narrower_one_in_fp32() -> None:
    wide = [tried("conv-w24-d1-k3", "fp32", 0.910, 0.46), tried("conv-w24-d1-k3", "int8", 0.905, 0.31)]
    narrow = [tried("conv-w16-d1-k3", "fp32", 0.895, 0.35), tried("conv-w16-d1-k3", "int8", 0.893, 0.22)]
    assert best_of(wide + narrow) == wide[1]
    assert best_of([tried("conv-w24-d1-k3", "int8", 0.890, 0.31), *narrow]) == narrow[0]


def test_of_equally_accurate_files_the_faster_is_kept() -> None:
    slow, fast = tried("conv-w16-d1-k3", "fp32", 0.9, 0.35), tried("conv-w16-d1-k3", "int8", 0.9, 0.22)
    assert best_of([slow, fast]) == fast


def test_where_none_passes_the_nearest_to_the_limit_is_shown() -> None:
    far, near = tried("conv-w24-d1-k3", "fp32", 0.91, 0.80), tried("conv-w16-d1-k3", "fp32", 0.89, 0.44)
    assert best_of([far, near]) is None
    assert nearest_of([far, near]) == near
    assert "0.44" in near.problem


def test_a_latency_that_nothing_bounds_counts_as_over_the_limit() -> None:
    verdict = LimitVerdict(name="latency_ms", limit=0.4, verdict="inconclusive", reason="too few runs")
    found = tried("conv-w8-d1-k3", "fp32", 0.9, 0.3)
    assert found.overshoot == 1
    assert replace(found, verdicts=(verdict,)).overshoot > 1
