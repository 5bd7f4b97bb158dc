"""What a run says of itself: a training that is too short, and a teacher that has nothing to teach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli.pipeline.advice import few_steps, weak_teacher
from cli.pipeline.choose import Choice
from cli.pipeline.reporting import _explain
from cli.pipeline.run import Run, Shipped
from cli.recipe import load_recipe
from cli.report.schema import LimitVerdict, MetricValue, ReferenceRow
from distill.train_section import TrainSection
from tests.cli.test_limits import latency


def reference(role: Any, value: float | None, arch: str = "conv-w8-d1-k3") -> ReferenceRow:
    metric = None if value is None else MetricValue(value=value, low=value, high=value, n=100)
    return ReferenceRow(role=role, arch=arch, metric=metric)


def test_a_short_training_is_told_with_its_steps_and_what_helps() -> None:
    told = few_steps(TrainSection(epochs=10, batch_size=128), 280, "image")
    assert told is not None
    assert told.startswith("280 images: 10 epochs are 20 steps")
    assert "train.min_steps = 500" in told
    assert "batch_size" in told
    one = few_steps(TrainSection(epochs=1), 100, "text")
    assert one is not None
    assert "1 epoch is 1 step," in one


def test_a_training_that_is_long_enough_is_not_remarked_on() -> None:
    assert few_steps(TrainSection(epochs=10, batch_size=128, min_steps=500), 280, "image") is None
    assert few_steps(TrainSection(epochs=12), 10_000, "image") is None


@pytest.mark.parametrize(("teacher", "plain", "said"), [(0.8, 0.85, True), (0.8, 0.8, True), (0.9, 0.85, False)])
def test_a_teacher_that_is_no_better_than_the_plain_student_is_told(teacher: float, plain: float, said: bool) -> None:
    told = weak_teacher((reference("teacher", teacher, "conv-w48-d3"), reference("no teacher", plain)), "top1")
    assert bool(told) == said
    if said:
        assert "the teacher is no better than conv-w8-d1-k3 without one" in told[0]
        assert f"80.0 and {100 * plain:.1f} %" in told[0]
        assert "distilling cannot be expected to help" in told[0]


def test_without_a_teachers_figure_nothing_is_claimed() -> None:
    assert weak_teacher((reference("teacher", None), reference("no teacher", 0.9)), "top1") == ()
    assert weak_teacher((reference("no teacher", 0.9),), "top1") == ()


@pytest.mark.parametrize("busy", [True, False])
def test_a_latency_that_failed_on_a_busy_machine_is_to_be_measured_again(busy: bool, tmp_path: Path) -> None:
    run = Run(load_recipe("quickstart"), tmp_path)
    found = latency([5.5] * 1000, stable=True).model_copy(update={"warnings": ("the machine was busy",) * busy})
    choice = Choice(name="fp32", why=(), rejected={})
    outcome = Shipped(run.targets[1], "conv-w8-d1-k3", choice=choice, measurements={"fp32": found})
    why, fixes = _explain(run, outcome, [LimitVerdict(name="latency_ms", limit=5.0, value=5.5, verdict="fail")])
    assert (f"measure again on a quiet machine: edgestill bench {tmp_path}" in fixes) == busy
    assert "latency_ms = 5.5, or a smaller arch" in fixes
    assert ("the machine was busy" in why) == busy
