"""The plan and the tables of the evidence on exploration, and one tiny cell of every arm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distill.data import catalogue
from distill.data.arrays import read_npz
from distill.exploration.section import GeneratorSection
from profiles import artifact
from tests.benchmarks.exploration import cells as grid
from tests.benchmarks.exploration import images, report, timing
from tests.benchmarks.exploration.task import GRADIENT, KD, LABELS, RANDOM, Choice, Task

CHOICE = Choice(2.0, 0.1, 1.0, {"random": 0.5, "gradient": 0.25})
LABELS_OF_TEST = np.arange(400) % 10


def _tasks(root: Path) -> list[Task]:
    return [make(root) for make in images.TASKS.values()]


def _planned(root: Path, seeds: int = 3) -> list[grid.Cell]:
    return grid.grid(_tasks(root), {images.TUNED_ON: CHOICE}, seeds)


def _students(planned: Sequence[grid.Cell]) -> list[grid.StudentCell]:
    return [cell for cell in planned if isinstance(cell, grid.StudentCell)]


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_an_early_end_leaves_whole_comparisons(tmp_path: Path) -> None:
    students = _students(_planned(tmp_path))
    main = [cell for cell in students if cell.arm.main]
    assert students[: len(main)] == main
    knows_all = [cell for cell in main if cell.knowledge != "few"]
    assert main[: len(knows_all)] == knows_all
    groups = {task.name: task.group for task in _tasks(tmp_path)}
    assert [groups[cell.task] for cell in knows_all] == sorted(groups[cell.task] for cell in knows_all)
    assert knows_all[-1].task == "fashion-200"
    first = [cell.seed for cell in knows_all if groups[cell.task] == 0]
    assert first == sorted(first)
    arms = [cell.arm for cell in knows_all if cell.task == "fashion-10" and cell.seed == 1]
    assert arms == [arm for arm in images.FashionTask.arms if arm.main]


def test_labels_alone_are_trained_once_and_every_arm_once_per_teacher(tmp_path: Path) -> None:
    students = _students(_planned(tmp_path, seeds=5))
    alone = [cell for cell in students if cell.arm == LABELS]
    assert len(alone) == 5 * len(images.TASKS)
    assert all(cell.knowledge is None for cell in alone)
    kd = [(cell.task, cell.knowledge, cell.seed) for cell in students if cell.arm == KD]
    assert len(kd) == len(set(kd)) == 2 * 5 * len(images.TASKS)


def test_no_two_cells_share_a_folder_or_a_label(tmp_path: Path) -> None:
    task = images.TASKS[images.TUNED_ON](tmp_path)
    planned = [*_planned(tmp_path), *grid.tuning_cells(task), *grid.sigma_cells(task, CHOICE)]
    assert len({cell.place for cell in planned}) == len({cell.label for cell in planned}) == len(planned)


def test_a_student_waits_for_its_teacher_and_lets_others_pass(tmp_path: Path) -> None:
    planned = _planned(tmp_path)
    teacher = next(cell for cell in planned if isinstance(cell, grid.TeacherCell))
    students = [cell for cell in _students(planned) if cell.after == teacher]
    other = grid.StudentCell("fashion-10", None, LABELS, 0, CHOICE)
    assert grid.ready([*students, other], frozenset([teacher, *students, other])) == other
    assert grid.ready(students, frozenset([teacher, *students])) is None
    assert grid.ready(students, frozenset(students)) == students[0]


def test_all_arms_with_a_teacher_ask_it_as_often_and_weigh_it_alike(tmp_path: Path) -> None:
    task = images.TASKS["fashion-10"](tmp_path)
    sections = [section for arm in task.arms if (section := task.section(arm, CHOICE)) is not None]
    assert len(sections) == len(task.arms) - 1
    assert {(each.batch_size, each.weight, each.tau, each.match) for each in sections} == {(32, 1.0, 2.0, "kd")}
    assert {each.kind: each.sigma for each in sections if each.kind in ("random", "gradient")} == CHOICE.sigmas


def test_validation_chooses_the_shared_settings_first_and_then_each_radius(tmp_path: Path) -> None:
    task = images.TASKS[images.TUNED_ON](tmp_path)
    choice, asked = grid.choose(task, {})
    assert choice is None
    assert asked == grid.tuning_cells(task)
    assert {cell.arm for cell in asked} == {KD}
    scores = dict.fromkeys(asked, 0.5)
    winner = asked[3]
    scores[winner] = 0.6
    choice, asked = grid.choose(task, scores)
    assert choice is None
    radii = [cell for cell in asked if cell.arm != KD]
    assert len(radii) == 2 * len(task.sigmas)
    assert {cell.choice.tau for cell in radii} == {winner.choice.tau}
    scores |= {cell: 0.5 + 0.01 * cell.choice.sigmas.get("gradient", 0.0) for cell in radii}
    choice, _ = grid.choose(task, scores)
    assert choice is not None
    assert (choice.tau, choice.hard_weight, choice.weight) == (
        winner.choice.tau,
        winner.choice.hard_weight,
        winner.choice.weight,
    )
    # the first of equals, and the largest where larger was better
    assert choice.sigmas == {"random": task.sigmas[0], "gradient": max(task.sigmas)}


def test_few_labels_are_among_more_of_the_same_seed() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
    few, more = (images.draw(labels, np.full(10, count), seed=3) for count in (5, 40))
    assert np.bincount(labels[few]).tolist() == [5] * 10
    assert set(few) < set(more)
    assert set(few) != set(images.draw(labels, np.full(10, 5), seed=4))
    with pytest.raises(ValueError, match="class 0 has 60 samples, not 61"):
        images.draw(labels, np.full(10, 61), seed=0)


# -- the tables -------------------------------------------------------------------------------------------------------


class _Stored(grid.Store):
    """Written cells of a task that needs no data."""

    def key(self, cell: grid.Cell) -> str:
        return cell.label


def _finish(store: _Stored, cell: grid.Cell, right: int) -> None:
    """Writes a finished cell that gets so many of the test samples right."""
    told = np.where(np.arange(len(LABELS_OF_TEST)) < right, LABELS_OF_TEST, (LABELS_OF_TEST + 1) % 10)
    logits = np.zeros((len(LABELS_OF_TEST), 10), np.float32)
    logits[np.arange(len(LABELS_OF_TEST)), told] = 1
    found = {"test": right / len(LABELS_OF_TEST), "validation": 0.5, "seconds": 2.0, "seconds_before": 0.1}
    found["explored"] = {"explore/divergence": 0.25}  # type: ignore[assignment]
    with artifact.create(store.root / cell.place, grid.KIND, store.key(cell), {}) as folder:
        artifact.write_text(folder / "cell.json", json.dumps(found))
        np.save(folder / "test_logits.npy", logits)


def test_the_tables_say_what_the_cells_say(tmp_path: Path) -> None:
    store = _Stored(tmp_path)
    real = images.TASKS["fashion-long-tail"](tmp_path)
    counts = real.counts
    dataset = SimpleNamespace(
        test=SimpleNamespace(labels=LABELS_OF_TEST),
        train=SimpleNamespace(labels=np.repeat(np.arange(10), counts)),
        classes=tuple("abcdefghij"),
    )
    task: Any = SimpleNamespace(
        name=real.name,
        title=real.title,
        arms=real.arms,
        student_arch="conv",
        train=real.train,
        explore_batch=32,
        tuned_on=images.TUNED_ON,
        dataset=lambda seed: dataset,
    )
    right = {LABELS.name: (200, 210, 205), KD.name: (210, 208, 222), RANDOM.name: (300, 311, 319)}
    planned = [
        cell for cell in _planned(tmp_path) if cell.task == real.name and getattr(cell, "knowledge", "") != "few"
    ]
    done = [cell for cell in planned if isinstance(cell, grid.TeacherCell) or cell.arm.name in right]
    for cell in done:
        _finish(store, cell, 380 if isinstance(cell, grid.TeacherCell) else right[cell.arm.name][cell.seed])
    facts = {
        "samples": {"train": 9, "unlabelled": 9, "validation": 9, "test": 400},
        **{"counts": counts.tolist(), "classes": list("abcdefghij"), "teacher": "conv", "generator": "VAE"},
        **{"teacher_parameters": 1, "student_parameters": 1},
    }
    steps = {timing.PLAIN: [0.01, 0.02, 0.01], RANDOM.name: [0.02, 0.04, 0.03]}
    found = report.results(store, task, done, CHOICE, {}, facts, steps)
    rows = {row["arm"]: row for row in found["teachers"]["all"]["rows"]}
    assert rows[RANDOM.name]["minus"][KD.name]["outcome"] == "higher"
    assert rows[RANDOM.name]["minus"][KD.name]["difference"] == pytest.approx(290 / 1200)
    assert rows[KD.name]["minus"][LABELS.name]["outcome"] == "cannot tell"
    assert KD.name not in rows[KD.name]["minus"]
    assert [group["name"] for group in found["teachers"]["all"]["groups"]] == ["many", "medium", "few"]
    assert not found["teachers"]["few"]["rows"]
    words = report.markdown(
        {
            **{"command": "c", "date": "d", "machine": "m", "versions": "v", "failures": {"x": "broken"}},
            "tasks": {real.name: found},
            "picture": None,
            "not_run": ["fashion-10, teacher all, KD, seed 1", "fashion-10, teacher all, KD, seed 2"],
        }
    )
    assert f"| {RANDOM.name} | 3 | 77.50 ± 2.38 | +24.17 |" in words
    assert "Test accuracy of the teacher: 95.00 ± 0.00 %." in words
    assert "fashion-10, teacher all, KD: seeds 1, 2" in words
    assert "sigma 0.5 (random)" in words
    assert f"| {RANDOM.name} | 30.0 | 2.00 | 2.00 | 3.00 |" in words
    assert "Failed: x: broken" in words
    tables = [block.splitlines() for block in words.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 4
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)


# -- one tiny cell of every arm ---------------------------------------------------------------------------------------


class _Packaged(images.Pool):
    """A few images of the subset that ships with edgestill, in place of the whole."""

    def _write(self, folder: Path) -> None:
        small = read_npz(catalogue.fetch("fashion-mnist-small"))
        for split, size in (("train", 400), ("validation", 100), ("test", 100)):
            images_of, labels = small[f"{split}_images"][:size], small[f"{split}_labels"][:size]
            np.savez(folder / f"{split}.npz", images=images_of, labels=labels)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    sizes = images.Sizes(
        student="conv-w4-d1-k3",
        teacher="conv-w4-d1-k3",
        steps=4,
        teacher_epochs=1,
        few_teacher_steps=4,
        batch_size=8,
        generator=GeneratorSection(kind="vae", latent=4, width=4, epochs=1),
        generator_images=256,
    )
    monkeypatch.setattr(images, "Pool", _Packaged)
    task = images.FashionTask(tmp_path, name="tiny", title="Tiny", counts=np.full(10, 3), sizes=sizes, extras=True)
    # a teacher of two dozen steps is sure of nothing
    task.arms = tuple(arm for arm in task.arms if "threshold" not in arm.settings)
    monkeypatch.setattr(grid, "open_task", lambda name, root: task)
    return task


def test_every_arm_ends_in_a_cell_that_is_not_made_twice(tiny: Task, tmp_path: Path) -> None:
    store = grid.Store(tmp_path)
    facts = tiny.prepare(1)
    assert facts["samples"] == {"train": 30, "unlabelled": 370, "validation": 100, "test": 100}
    planned = grid.grid([tiny], {images.TUNED_ON: CHOICE}, seeds=1)
    chosen = [cell for cell in planned if isinstance(cell, grid.TeacherCell) or cell.knowledge != "few"]
    chosen += [cell for cell in _students(planned) if cell.knowledge == "few" and cell.arm == RANDOM]
    for cell in sorted(chosen, key=lambda cell: isinstance(cell, grid.StudentCell)):
        assert not store.is_done(cell)
        grid.make(cell, tmp_path)
        assert store.is_done(cell)
        assert store.logits(cell).shape == (100, 10)
        assert not (tmp_path / f"{cell.place}.training").exists()
    explored = next(cell for cell in _students(chosen) if cell.arm == GRADIENT)
    assert store.picture(explored).is_file()
    assert set(store.read(explored)["explored"]) == {"explore/divergence", "explore/gain"}
    found = report.results(store, tiny, chosen, CHOICE, {}, facts, timing.measure(tiny, CHOICE, rounds=1, steps=2))
    assert len(found["teachers"]["all"]["rows"]) == len(tiny.arms)
    assert set(found["steps"]) == {timing.PLAIN, *(arm.name for arm in tiny.arms if arm.main)}
