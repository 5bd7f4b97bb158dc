"""The evidence of the generic teacher: what is trained in which order, and what its tables say, without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill.students import parse_arch
from distill.teachers.strategy_section import GenericSection
from tests.benchmarks.generic_teacher.cells import QUICK, Array, Cells, Measured, Sizes
from tests.benchmarks.generic_teacher.plan import (
    ABLATIONS,
    ARMS,
    NEVER_SAMPLED,
    OWN_TEACHER,
    POOL,
    SEEDS,
    STUDENTS,
    TAUS,
    TUNED_ON,
    VANILLA,
    Cell,
    StudentCell,
    Teacher,
    TeacherCell,
    choose_tau,
    next_cell,
    plan,
    student_cell,
    tuning_cells,
)
from tests.benchmarks.generic_teacher.report import Results, divergence, markdown, students_from, tables

CHOSEN = dict.fromkeys(ARMS, 4.0)
LABELS = np.arange(40) % 10


def measured(right: int, seconds: float = 10.0, sharpness: float = 1.0) -> Measured:
    """A network that gets the first `right` of the samples right."""
    predicted = np.where(np.arange(len(LABELS)) < right, LABELS, (LABELS + 1) % 10)
    logits: Array = sharpness * np.eye(10, dtype=np.float32)[predicted]
    return Measured(right / len(LABELS), right / len(LABELS), seconds, 1, "2026-01-01", {"torch": "2"}, logits)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.study._RESAMPLES", 50)


def finished(taus: dict[str, float]) -> dict[Cell, Measured]:
    """Everything finished: GTN's students get two samples more right than those of all others."""
    found: dict[Cell, Measured] = {}
    for cell in plan(taus):
        gtn = cell.teacher is not None and cell.teacher.name.startswith("gtn")
        if isinstance(cell, TeacherCell):
            found[cell] = measured(30, {"vanilla": 50.0, "gtn-uniform": 80.0}.get(cell.teacher.name, 60.0), 3.0)
        else:
            found[cell] = measured(22 + cell.seed if gtn else 20 + cell.seed)
    return found


def test_a_third_of_the_students_is_never_sampled_and_every_arm_is_of_valid_settings() -> None:
    assert len(STUDENTS) == 9
    assert not set(POOL) & set(NEVER_SAMPLED)
    assert set(OWN_TEACHER) | set(TUNED_ON) <= set(POOL)
    for arm in (*ARMS.values(), *ABLATIONS.values()):
        for arch, teacher in arm.teachers.items():
            parse_arch(arch)
            if teacher.pool:
                GenericSection.model_validate({"archs": teacher.pool, **dict(teacher.settings)})


def test_kd_of_all_seeds_comes_first_then_lelp_and_ablations_come_last() -> None:
    order = plan(CHOSEN)
    assert len(order) == len(set(order))
    main = [cell for cell in order if cell.teacher is None or cell.teacher.name not in ABLATIONS]
    assert order[: len(main)] == main
    lelp = [isinstance(cell, StudentCell) and cell.objective == "lelp" for cell in main]
    assert lelp == sorted(lelp)
    for part in (False, True):
        seeds = [cell.seed for cell, late in zip(main, lelp, strict=True) if late == part]
        assert seeds == sorted(seeds)


def test_every_training_starts_after_its_teacher_and_its_temperature() -> None:
    taus: dict[str, float] = {}
    done: set[Cell] = set()
    while (cell := next_cell(plan(taus, SEEDS[:1]), frozenset(done), frozenset())) is not None:
        if isinstance(cell, StudentCell):
            assert cell.known
            assert cell.teacher is None or TeacherCell(cell.teacher, cell.seed) in done
        done.add(cell)
        for arm in ARMS:
            if arm not in taus and done.issuperset(tuning_cells(arm)):
                taus[arm] = 2.0
    assert done >= set(plan(dict.fromkeys(ARMS, 2.0), SEEDS[:1]))


def test_nothing_starts_twice_or_after_a_failed_teacher() -> None:
    order = plan({})
    assert next_cell(order, frozenset(), frozenset(order[:1])) == order[1]
    teachers = frozenset(cell for cell in order if isinstance(cell, TeacherCell))
    left = next_cell(order, frozenset(), teachers)
    assert isinstance(left, StudentCell)
    assert left.teacher is None


def test_the_temperature_is_the_best_on_validation_and_the_smaller_of_equals() -> None:
    cells = tuning_cells("gtn-uniform")
    scores = {cell: {1.0: 0.7, 2.0: 0.9, 4.0: 0.9, 8.0: 0.8}[cell.tau or 0.0] for cell in cells}
    assert choose_tau(scores, "gtn-uniform") == 2.0
    assert choose_tau(dict(list(scores.items())[1:]), "gtn-uniform") is None
    assert {cell.tau for cell in cells} == set(TAUS)


def test_an_ablation_takes_over_the_temperature_of_what_it_varies() -> None:
    cell = student_cell(ABLATIONS["gtn-hard"], "kd", POOL[0], 0, {"gtn-easy": 8.0})
    assert cell.tau == 8.0
    assert not student_cell(ABLATIONS["gtn-k1"], "kd", POOL[0], 0, {"gtn-easy": 8.0}).known


def test_folders_and_labels_tell_cells_apart() -> None:
    order = plan(CHOSEN)
    assert len({cell.place for cell in order}) == len({cell.label for cell in order}) == len(order)


def test_a_cell_of_other_settings_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Data:
        key = "data"

    monkeypatch.setattr(Cells, "dataset", Data())
    cell = TeacherCell(VANILLA, 0)
    assert Cells(tmp_path, Sizes()).key(cell) != Cells(tmp_path, QUICK).key(cell)
    conditioned = TeacherCell(Teacher("vanilla", POOL, (("paths", 4),)), 0)
    assert Cells(tmp_path, Sizes()).key(cell) != Cells(tmp_path, Sizes()).key(conditioned)


def test_the_tables_say_what_the_cells_say() -> None:
    found = tables(Results(finished(CHOSEN), CHOSEN, LABELS))
    row = found["objectives"]["kd"]["groups"]["all"]["gtn-uniform"]
    assert row["mean"] == row["worst"] == pytest.approx(23 / 40)
    assert row["minus_vanilla"]["difference"] == pytest.approx(0.05)
    assert (row["minus_vanilla"]["wins"], row["minus_vanilla"]["n"]) == (27, 27)
    assert row["teacher_seconds"] == 80.0
    each = found["objectives"]["kd"]["groups"]["own teacher"]["sftn-each"]
    assert each["teacher_seconds"] == 4 * 60.0
    assert each["minus_vanilla"]["outcome"] == "cannot tell"
    assert "sftn-each" not in found["objectives"]["kd"]["groups"]["all"]
    # 80 s are more than one teacher of 60 s and less than two
    assert found["costs"]["trainings"]["gtn-uniform"]["cheaper_from"] == 2
    assert found["costs"]["trainings"]["gtn-uniform"]["gtn_over_vanilla"] == [1.6] * 3
    assert found["costs"]["interleaved"] == {}


def test_interleaved_steps_are_compared_round_by_round() -> None:
    # the second round ran on a machine three times as slow
    names = {teacher.name for arm in ARMS.values() for teacher in arm.teachers.values()}
    steps = {name: [0.2, 0.6] for name in names} | {"vanilla": [0.1, 0.3], "gtn-easy": [0.3, 0.9]}
    costs = Results(finished({}), {}, LABELS, steps).costs()["interleaved"]
    assert costs["gtn-uniform"]["gtn_over_one_sftn"] == pytest.approx([1.0, 1.0])
    assert costs["gtn-easy"]["gtn_over_vanilla"] == pytest.approx([3.0, 3.0])
    assert costs["gtn-easy"]["cheaper_from"] == 2


def test_a_seed_counts_only_when_all_its_students_are_finished() -> None:
    cells = finished(CHOSEN)
    del cells[student_cell(ARMS["gtn-uniform"], "kd", STUDENTS[-1], 2, CHOSEN)]
    groups = tables(Results(cells, CHOSEN, LABELS))["objectives"]["kd"]["groups"]
    assert groups["all"]["gtn-uniform"]["seeds"] == [0, 1]
    assert groups["all"]["gtn-uniform"]["minus_vanilla"]["n"] == 18
    assert groups["sampled"]["gtn-uniform"]["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("taus", [CHOSEN, {}])
def test_the_report_is_written_from_all_and_from_little(taus: dict[str, float]) -> None:
    cells: dict[Cell, Measured] = finished(taus) if taus else {TeacherCell(VANILLA, 0): measured(30)}
    found = {
        **dict.fromkeys(("command", "date", "machine", "versions"), "x"),
        "sizes": {"teacher_epochs": 1, "student_epochs": 1, "learning_rate": 0.1},
        **dict.fromkeys(("train", "validation", "test", "teacher_mflop", "teacher_parameters", "finished", "hours"), 1),
        "students": [{"arch": arch, "mflop": 1.0, "parameters": 2, "sampled": True} for arch in STUDENTS],
        **tables(Results(cells, taus, LABELS)),
        "pools": {"gtn-easy": {0: dict.fromkeys(POOL, 1 / 6)}},
        "failed": {"a cell": "what happened"},
        "not_run": [cell.label for cell in plan(taus) if cell not in cells],
    }
    text = markdown(found)
    assert "cannot tell" in text
    assert "- a cell: what happened" in text
    assert ("Everything is finished." in text) == bool(taus)
    for block in text.split("\n\n"):
        columns = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(columns) <= 1, block


def test_the_divergence_is_zero_of_equals_and_follows_the_teacher() -> None:
    random = np.random.default_rng(0)
    teacher, student = random.normal(size=(2, 50, 4))
    assert divergence(teacher, teacher + 3.0) == pytest.approx(0.0, abs=1e-12)
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (teacher, student))
    assert divergence(teacher, student) == pytest.approx(float((p * np.log(p / q)).sum() / 50))


@pytest.mark.parametrize(("ratio", "students"), [(0.4, 1), (1.0, 2), (1.2, 2), (2.0, 3)])
def test_break_even_is_where_one_more_teacher_costs_more(ratio: float, students: int) -> None:
    assert students_from(ratio) == students
    assert students > ratio
