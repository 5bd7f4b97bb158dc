"""The plan and the tables of the evidence on coached teachers: what can be checked without data or a training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill.strategies import influence
from distill.teachers.strategy_section import HELD_OUT
from profiles import artifact
from tests.benchmarks.coached_teacher import cells as grid
from tests.benchmarks.coached_teacher import errors, report
from tests.benchmarks.coached_teacher.tasks import SETTINGS

LABELS = np.arange(400) % 2


def test_an_early_end_leaves_whole_comparisons(tmp_path: Path) -> None:
    planned = grid.cells(tmp_path, seeds=3, extra_seeds=2)
    extra = {method.name for method in grid.EXTRAS}
    first = [cell for cell in planned if cell.method.name not in extra]
    assert planned[: len(first)] == first
    for name in SETTINGS:
        seeds = [cell.seed for cell in first if cell.task == name]
        assert seeds == sorted(seeds)
    assert len(first) == 3 * len(SETTINGS) * len(grid.METHODS)


def test_no_two_cells_share_a_folder_or_a_label(tmp_path: Path) -> None:
    planned = grid.cells(tmp_path, seeds=2, extra_seeds=2)
    assert len({cell.folder for cell in planned}) == len({cell.label for cell in planned}) == len(planned)


def test_only_strategies_that_judge_hold_samples_out(tmp_path: Path) -> None:
    shares = {cell.method.name: cell.held_out for cell in grid.cells(tmp_path, seeds=1, extra_seeds=1)}
    assert shares["online"] is None
    assert shares["kd"] is None
    assert shares["lgtm"] == shares["meta"] == shares[report.CONTROL] == HELD_OUT
    assert shares["lgtm held_out=0.1"] == 0.1


@pytest.fixture
def task() -> Any:
    dataset = SimpleNamespace(test=SimpleNamespace(labels=LABELS))
    return SimpleNamespace(dataset=dataset, settings=SETTINGS["images"], name="images")


def _finish(cell: grid.Cell, right: int) -> None:
    """Writes a finished cell whose student gets so many of the test samples right."""
    logits = np.zeros((len(LABELS), 2), np.float32)
    told = np.where(np.arange(len(LABELS)) < right, LABELS, 1 - LABELS)
    logits[np.arange(len(LABELS)), told] = 1
    found = {
        "test": right / len(LABELS),
        "validation": right / 500,
        "seconds": 2.0,
        "best_epoch": 1,
        "hard_weight": 0.1,
    }
    if cell.method.strategy is not None:
        found |= {"teacher_test": 0.75, "teacher_validation": 0.75}
    with artifact.create(cell.folder, grid.KIND, "key", {}) as folder:
        artifact.write_text(folder / "cell.json", json.dumps({**found, "means": {report.RATIO: 0.25}}))
        np.save(folder / "test_logits.npy", logits)


def test_the_tables_say_what_the_cells_say(tmp_path: Path, task: Any) -> None:
    right = {"kd": (200, 210, 220), "kd tau=4": (210, 208, 222), "lgtm": (300, 311, 319), "online": (199, 211, 221)}
    done = [
        cell
        for cell in grid.cells(tmp_path, seeds=3, extra_seeds=0)
        if cell.task == "images" and cell.method.name in right
    ]
    for cell in done:
        _finish(cell, right[cell.method.name][cell.seed])
    facts = {
        "samples": {"train": 9, "validation": 9, "test": 400},
        "accuracy": {"test": 0.5},
        **{"classes": 2, "student_parameters": 1, "teacher": "conv", "parameters": 1, "seconds": 1.0},
    }
    found = report.results(task, done, facts)
    rows = {row["method"]: row for row in found["rows"]}
    assert found["kd"] == "kd tau=4"
    assert rows["lgtm"]["to"]["kd"]["outcome"] == "higher"
    assert rows["lgtm"]["to"]["kd"]["difference"] == pytest.approx(0.25)
    assert rows["online"]["to"]["kd"]["outcome"] == "cannot tell"
    assert "to" in rows["kd"]
    assert report.ONLINE not in rows["kd"]["to"]
    words = report.markdown(
        {
            **{"command": "c", "date": "d", "machine": "m", "versions": "v", "errors": {}, "failures": {}},
            "tasks": {"images": found},
            "not_run": ["images, meta, seed 1", "images, meta, seed 2"],
        }
    )
    assert "| lgtm | 3 | 77.50 ± 2.38 | +25.00 |" in words
    assert "images, meta: seeds 1, 2" in words
    widths = [line.count("|") for line in words.splitlines() if line.startswith("|")]
    assert len(set(widths[:6])) == 1


def test_another_step_is_put_back() -> None:
    before = influence.STEP
    with errors._step(0.5):
        during = influence.STEP
    after = influence.STEP
    assert (during, after) == (0.5, before)


def test_a_relative_error_is_that_of_norms() -> None:
    assert errors._relative(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
