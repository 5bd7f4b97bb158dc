"""A run on a long tail that explores: what its report says of the classes with few samples, and of the exploration."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.pipeline import Run
from cli.pipeline.shots import class_logits_on_test, exploration_facts, shots
from cli.recipe import load_recipe
from cli.report.schema import Report, ShotRow, load_report
from distill.teachers import SubclassCache
from profiles.shots import FEW, MANY
from tests.cli.cli_runner import edgestill

ARCH = "conv-w4-d1-k3"
RECIPE = f"""
name = "tail"
objective = "kd"

[data]
source = "fashion-mnist-small"
imbalance = "exp:100"
unlabelled.rest = true
unlabelled.size = 300

[data.augment]
views = 1

[teacher]
kind = "train"
arch = "conv-w8-d1-k3"
epochs = 1

[explore]
kind = "random"
sigma = 0.5
filter = "confidence"
threshold = 0.11
batch_size = 16
generator = {{latent = 4, width = 4, epochs = 1}}

[train]
epochs = 1
batch_size = 128

[export]
calibration_samples = 32
parity_samples = 32

[[target]]
name = "rtx"
device = "rtx-4060-laptop"
precision = "fp32"
arch = "{ARCH}"

[[target]]
name = "rtx-too"
device = "rtx-4060-laptop"
precision = "fp32"
arch = "{ARCH}"
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Report]:
    folder = tmp_path_factory.mktemp("tail")
    (folder / "tail.toml").write_text(RECIPE)
    run = Run(load_recipe(str(folder / "tail.toml")), folder / "out")
    return run, run.report()


def test_a_dry_run_tells_the_size_of_every_class_and_that_steps_are_few(tmp_path: Path) -> None:
    (tmp_path / "tail.toml").write_text(RECIPE)
    arguments = ("-q", "run", str(tmp_path / "tail.toml"), "--out", str(tmp_path / "out"), "--dry-run")
    found = json.loads(edgestill(*arguments, "--json").out)
    sizes = list(found["class_sizes"].values())
    assert len(sizes) == 10
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(100 * sizes[-1], rel=0.1)
    assert "train.min_steps" in found["few_steps"]
    text = " ".join(edgestill(*arguments).out.split())
    assert f"training samples of each class: T-shirt/top {sizes[0]:,}, Trouser {sizes[1]:,}" in text
    assert "hardly trains a student" in text


def row_of(report: Report, role: str) -> ShotRow:
    assert report.shots is not None
    (row,) = [row for row in report.shots.rows if row.role == role]
    return row


def mean_recall(predicted: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], classes: list[int]) -> float:
    return float(np.mean([np.mean(predicted[labels == label] == label) for label in classes]))


def test_groups_hold_the_classes_by_their_training_samples(finished: tuple[Run, Report]) -> None:
    run, report = finished
    assert report.shots is not None
    counts = dict.fromkeys(run.dataset.classes, 0)
    for label in run.dataset.train.labels:
        counts[run.dataset.classes[label]] += 1
    assert max(counts.values()) >= 50 * min(counts.values())
    expected = {
        "many": [name for name, count in counts.items() if count > MANY],
        "medium": [name for name, count in counts.items() if FEW <= count <= MANY],
        "few": [name for name, count in counts.items() if count < FEW],
    }
    assert {group.name: list(group.classes) for group in report.shots.groups} == expected
    for group in report.shots.groups:
        assert (group.fewest, group.most) == (
            min(counts[name] for name in group.classes),
            max(counts[name] for name in group.classes),
        )
    assert sum(group.n_test for group in report.shots.groups) == report.n_test


def test_figures_are_mean_recalls_of_the_chosen_file_the_teacher_and_the_plain_student(
    finished: tuple[Run, Report],
) -> None:
    run, report = finished
    dataset = run.dataset
    labels = np.asarray(dataset.test.labels)
    exported = run.plan(run.targets[0])["fp32"].file
    plain = run.plain_student(ARCH)
    assert run.cache is not None
    assert run.cache.test_logits is not None
    assert plain is not None
    assert exported is not None
    answers = {
        "student": run.outputs(exported, dataset.test),
        "teacher": np.asarray(run.cache.test_logits, dtype=np.float64),
        "no teacher": run.test_logits(plain),
    }
    assert report.shots is not None
    for role, logits in answers.items():
        row = row_of(report, role)
        for group in report.shots.groups:
            classes = [dataset.classes.index(name) for name in group.classes]
            figure = row.metrics[group.name]
            assert figure.value == pytest.approx(mean_recall(logits.argmax(axis=1), labels, classes), abs=1e-12)
            assert figure.low <= figure.value <= figure.high
            assert figure.n == group.n_test
    assert row_of(report, "student").targets == ("rtx", "rtx-too")
    assert {figure.on for figure in row_of(report, "student").metrics.values()} == {"ONNX Runtime here, not the device"}


def test_on_a_balanced_test_split_the_groups_average_to_the_accuracy(finished: tuple[Run, Report]) -> None:
    report = finished[1]
    assert report.shots is not None
    found = row_of(report, "no teacher")
    whole = sum(found.metrics[group.name].value * len(group.classes) for group in report.shots.groups)
    reference = next(row for row in report.references if row.role == "no teacher")
    assert reference.metric is not None
    assert whole / report.classes == pytest.approx(reference.metric.value, abs=1e-12)


def test_the_exploration_is_told_with_what_was_kept_and_its_pictures(finished: tuple[Run, Report]) -> None:
    run, report = finished
    found = report.exploration
    assert found is not None
    assert (found.kind, found.sigma, found.filter, found.control) == ("random", 0.5, "confidence", False)
    assert found.generator == "vae, 4 latents"
    (student,) = found.students
    assert student.arch == ARCH
    assert student.kept is not None
    assert 0.05 <= student.kept <= 1
    assert set(student.kept_by_class) <= set(run.dataset.classes)
    assert student.divergence is not None
    assert student.divergence >= 0
    files = [picture.file for picture in found.pictures]
    assert files[:2] == ["explored/explored.png", "generator/reconstructions.png"]
    assert all((run.folder / file).is_file() for file in files)
    titles = [training.title for training in report.training]
    assert sorted(titles) == ["no teacher", "student (random)", "teacher"]


def test_every_form_of_the_report_shows_it(finished: tuple[Run, Report]) -> None:
    run = finished[0]
    folder = str(run.folder)
    assert load_report(run.folder / "report.json") == finished[1]
    words = " ".join(edgestill("report", folder).out.split())
    assert "Mean recall % of classes with many and few training samples" in words
    assert "students explored: random, sigma 0.5" in words
    assert words.count("explored/explored.png") == 1
    assert edgestill("report", folder, "--html", "-").out.count("data:image/png;base64,") == len(
        finished[1].exploration.pictures if finished[1].exploration else ()
    )
    rows = {
        row["name"] or row["row"]: row
        for row in csv.DictReader(io.StringIO(edgestill("report", folder, "--csv", "-").out))
    }
    assert rows["rtx"]["few_shot_value"] == rows["rtx-too"]["few_shot_value"] != ""
    assert rows["teacher"]["many_shot_value"] != ""
    assert "Mean recall" in edgestill("report", folder, "--markdown", "-").out


def test_a_run_without_tail_and_exploration_says_nothing_of_them(tmp_path: Path) -> None:
    (tmp_path / "plain.toml").write_text('name = "plain"\n[data]\ntrain_size = 200\n')
    run = Run(load_recipe(str(tmp_path / "plain.toml")), tmp_path / "out")
    assert shots(run, [], "ONNX Runtime here, not the device") is None
    assert exploration_facts(run) is None


def test_the_logits_of_a_teacher_with_subclasses_become_those_of_the_classes(finished: tuple[Run, Report]) -> None:
    run = finished[0]
    cache = run.cache
    assert cache is not None
    two = SubclassCache.of(cache, 2)  # ten logits: five classes of two subclasses each
    whole = np.asarray(cache.test_logits, dtype=np.float64)
    expected = np.logaddexp(whole[:, 0::2], whole[:, 1::2])
    found = class_logits_on_test(two, 5)
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert class_logits_on_test(cache, 7) is None  # of another task
