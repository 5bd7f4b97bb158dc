"""What is refused before anything is trained when students are to be chosen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.pipeline import Run
from cli.recipe import load_recipe
from cli.study_grid import build_grid
from profiles.errors import InputError
from tests.cli.budget_cases import FITS_ALL, SMALL, calibrate, make_data, target, write_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("budget-checks")
    make_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESTILL_CONFIG", str(folder / "config"))
        yield folder


def refusal(place: Path, targets: str, **changes: str) -> InputError:
    """What a run of this recipe refuses."""
    run = Run(load_recipe(str(write_recipe(place, targets, **changes))), place / "refused")  # type: ignore[arg-type]
    with pytest.raises(InputError) as caught:
        run.report()
    assert not (place / "refused" / "teacher").exists()
    return caught.value


def test_a_limit_below_the_launch_overhead(place: Path) -> None:
    error = refusal(place, target("rtx", 0.0001, device="rtx-4060-laptop"))
    assert "target[0] (rtx).latency_ms" in (error.where or "")
    assert "empty graph" in (error.evidence or "")
    assert (error.fix or "").startswith("latency_ms = ")


def test_less_memory_than_the_smallest_weights(place: Path) -> None:
    error = refusal(place, target("here", FITS_ALL, more="memory_mib = 0.0001"))
    assert "target[0] (here).memory_mib" in (error.where or "")
    assert SMALL in (error.evidence or "")


def test_a_target_without_a_limit_to_choose_by(place: Path) -> None:
    error = refusal(place, '[[target]]\nname = "here"\nmetric_floor = 0.5\n')
    assert "no limit that a student could be chosen by" in error.message


def test_precisions_that_only_follow_a_missed_metric_are_not_priced(place: Path) -> None:
    targets = target("rtx", 50.0, device="rtx-4060-laptop", precision="auto")
    targets += target("eight", 50.0, device="rtx-4060-laptop", precision="fp8")
    run = Run(load_recipe(str(write_recipe(place, targets))), place / "priced")
    assert run.budgets is not None
    fits, rejected = run.budgets.priced()
    assert {option.precision for option in fits["rtx"]} == {"fp32", "fp16", "int8"}
    assert {option.precision for option in fits["eight"]} == {"fp8"}
    assert not rejected["rtx"]


def test_a_pool_of_one(place: Path) -> None:
    error = refusal(place, target("here", FITS_ALL), pool=f'["{SMALL}"]')
    assert error.where == "student.pool"
    assert SMALL in (error.fix or "")


def test_targets_that_all_name_their_student(place: Path) -> None:
    error = refusal(place, target("here", FITS_ALL, more=f'arch = "{SMALL}"'))
    assert error.where == "student.pool"


def test_two_targets_of_one_name(place: Path) -> None:
    with pytest.raises(InputError, match='two targets are called "here"'):
        load_recipe(str(write_recipe(place, target("here", 1.0) + target("here", 2.0))))


def test_shared_weights_that_no_teacher_trains(place: Path) -> None:
    error = refusal(place, target("here", FITS_ALL), choice='rank = "supernet"')
    assert error.where == "student.choice.rank"
    generic = refusal(place, target("here", FITS_ALL), choice='rank = "supernet"', teacher='strategy = "generic"')
    assert "inherit" in (generic.fix or "")


def test_a_pool_named_twice(place: Path) -> None:
    error = refusal(place, target("here", FITS_ALL), teacher='strategy = "generic"\n[teacher.generic]\nwidths = [8]')
    assert error.where == "teacher.generic.widths"


def test_a_teacher_for_every_student_that_is_tried(place: Path) -> None:
    error = refusal(place, target("here", FITS_ALL), teacher='strategy = "sftn"')
    assert error.where == "teacher.strategy"


def test_several_processes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refusal(place, target("here", FITS_ALL)).message


def test_a_study_of_a_pool(place: Path) -> None:
    loaded = load_recipe(str(write_recipe(place, target("here", FITS_ALL))))
    with pytest.raises(InputError, match="a study compares methods on one student"):
        build_grid(loaded, vary=["objective=kd,supervised"])


def test_a_calibration_of_another_runtime_version(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path))
    calibrate("1.0.0")
    error = refusal(place, target("here", FITS_ALL))
    assert "1.0.0" in (error.evidence or "")
    assert (error.fix or "").startswith("edgestill devices calibrate")
