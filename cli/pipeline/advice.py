"""What a run says of itself that a reader should know before taking its figures for the method's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cli.report.schema import ReferenceRow
from cli.report.words import metric_title, percent
from distill.data import Dataset
from distill.train_section import TrainSection

FEWEST_STEPS = 500
"""Below so many optimiser steps a student has hardly begun to learn, whatever it is taught."""


def unit_of(dataset: Dataset) -> Literal["image", "text"]:
    """What one sample is."""
    return "image" if dataset.input.kind == "image" else "text"


def few_steps(section: TrainSection, samples: int, unit: str) -> str | None:
    """Says that a student's whole training is short; None where it is not.

    Args:
        section: the recipe's `[train]`.
        samples: of the training split.
        unit: what one of them is, "image".
    """
    epochs = section.resolved(samples).epochs
    steps = epochs * max(1, samples // section.batch_size)
    if steps >= FEWEST_STEPS:
        return None
    spent = f"{epochs} epoch{'s are' if epochs > 1 else ' is'} {steps:,} step{'s' * (steps > 1)}"
    return (
        f"{samples:,} {unit}s: {spent}, which "
        f"hardly trains a student; more epochs, train.min_steps = {FEWEST_STEPS}, or a smaller train.batch_size"
    )


def weak_teacher(references: Sequence[ReferenceRow], metric: str) -> tuple[str, ...]:
    """Says that no teacher is better than a student without one, by student; nothing where one is, or none is known.

    Args:
        references: the report's.
        metric: name of their metric.
    """
    teachers = [row.metric.value for row in references if row.role == "teacher" and row.metric is not None]
    if not teachers:
        return ()
    best = max(teachers)
    return tuple(
        f"the teacher is no better than {row.arch} without one ({metric_title(metric)} {percent(best)} and "
        f"{percent(row.metric.value)} % on the test split), so distilling cannot be expected to help"
        for row in references
        if row.role == "no teacher" and row.metric is not None and row.metric.value >= best
    )
