"""What the report says of classes with few samples: accuracy by shot groups, and what the students explored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli.pipeline.exploration import PICTURED, explores, in_words, whole_generator
from cli.pipeline.run import Run, Shipped, Trained, needs_teacher
from cli.report.schema import (
    Exploration,
    ExploredStudent,
    MetricPlace,
    MetricValue,
    Picture,
    ShotName,
    ShotRow,
    Shots,
)
from cli.report.schema import ShotGroup as ReportedGroup
from distill.exploration.section import CONTROLS, KEPT, GeneratorSection
from distill.objectives.split_head import class_logits_of
from distill.teachers import SubclassCache, TeacherCache
from profiles.shots import ShotGroup, group_accuracy, long_tailed, shot_groups

Array = np.ndarray[Any, Any]

_PICTURES = (
    ("explored/explored.png", "explored samples at three radii"),
    ("generator/reconstructions.png", "real samples, and what the generator makes of them"),
    ("generator/samples.png", "samples of the generator alone"),
    ("generator/examples.txt", "texts, and what the generator makes of them"),
)
"""What the run folder may hold for a person to look at, by importance."""


def shots(run: Run, shipped: Sequence[Shipped], not_the_device: MetricPlace) -> Shots | None:
    """The accuracy on classes with many, medium and few training samples: chosen files, teachers, plain students.

    Args:
        run: whose models they are.
        shipped: the targets' outcomes.
        not_the_device: what the report calls the place of a figure that the device itself did not compute.

    Returns:
        None where the training split has no long tail (`profiles.shots.long_tailed`) or samples have several labels.
    """
    dataset = run.dataset
    if dataset.task != "multiclass":
        return None
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.classes))
    if not long_tailed(counts):
        return None
    groups = shot_groups(counts)
    tested = np.bincount(dataset.test.labels, minlength=len(dataset.classes))

    def figures(logits: Array, on: MetricPlace) -> dict[ShotName, MetricValue]:
        labels = np.asarray(dataset.test.labels)
        return {
            group.name: MetricValue.of(group_accuracy(logits, labels, group.classes), on)
            for group in groups
            if tested[list(group.classes)].any()
        }

    files: dict[tuple[Path, MetricPlace], list[Shipped]] = {}
    for outcome in shipped:
        candidate = outcome.candidate
        file = (candidate.to_score or candidate.file) if candidate is not None else None
        if file is not None:
            place: MetricPlace = not_the_device if outcome.measurement is None else "artifact in its runtime"
            files.setdefault((file, place), []).append(outcome)
    rows = []
    for (file, place), outcomes in files.items():
        chosen = outcomes[0].candidate
        assert chosen is not None  # the file is the chosen candidate's
        rows.append(
            ShotRow(
                role="student",
                targets=tuple(outcome.target.name for outcome in outcomes),
                arch=outcomes[0].arch,
                precision=chosen.precision,
                metrics=figures(run.outputs(file, dataset.test), place),
            )
        )
    rows += [
        ShotRow(role="teacher", arch=arch, strategy=run.recipe.teacher.strategy, metrics=figures(logits, "PyTorch"))
        for arch, logits in _teachers(run)
    ]
    for arch in run.archs:
        plain = run.plain_student(arch)
        if plain is not None:
            rows.append(ShotRow(role="no teacher", arch=arch, metrics=figures(run.test_logits(plain), "PyTorch")))
    return Shots(groups=tuple(_told(group, dataset.classes, tested) for group in groups), rows=tuple(rows))


def _told(group: ShotGroup, classes: Sequence[str], tested: Array) -> ReportedGroup:
    fewest, most = group.samples
    return ReportedGroup(
        name=group.name,
        classes=tuple(classes[index] for index in group.classes),
        fewest=fewest,
        most=most,
        n_test=int(tested[list(group.classes)].sum()),
    )


def _teachers(run: Run) -> list[tuple[str, Array]]:
    """Architecture (or kind) and class logits on the test split of the report's teachers, in its order."""
    objectives, found = run.recipe.objective, dict[str, tuple[str, Array] | None]()
    for arch in run.archs:
        variant = run.variant(objectives, arch)
        if variant.folder in found or not (needs_teacher(objectives) or explores(run.recipe)):
            continue
        cache = run.cache_of(variant)
        logits = None if cache is None else class_logits_on_test(cache, len(run.dataset.classes))
        trained = run.trained.get(("teacher", variant.folder))
        name = trained.student.arch if trained is not None else run.recipe.teacher.kind
        found[variant.folder] = None if logits is None else (name, logits)
    return [entry for entry in found.values() if entry is not None]


def class_logits_on_test(cache: TeacherCache, classes: int) -> Array | None:
    """float32 (N, C): the logits of a teacher for the classes on the test split; None where it gives none."""
    logits, columns = cache.test_logits, cache.num_logits
    if logits is None or columns is None:
        return None
    values = np.array(logits, dtype=np.float32)
    if isinstance(cache, SubclassCache):
        return class_logits_of(torch.from_numpy(values), cache.subclasses).numpy()
    return values if columns == classes else None


def exploration_facts(run: Run) -> Exploration | None:
    """What the students explored and what came of it; None where they learned on their data alone."""
    section = run.recipe.explore
    if section.kind == "none":
        return None
    files = [(run.folder / file, file, title) for file, title in _PICTURES if section.generates or "explored" in file]
    return Exploration(
        kind=section.kind,
        control=section.kind in CONTROLS,
        weight=section.weight,
        sigma=section.sigma if section.kind in PICTURED else None,
        generator=_generator(whole_generator(section.generator, run.dataset.input.kind)) if section.generates else "",
        filter=section.filter,
        summary=in_words(section),
        students=tuple(_explored(trained) for (role, _), trained in run.trained.items() if role == "student"),
        pictures=tuple(Picture(file=file, title=title) for path, file, title in files if path.is_file()),
    )


def _explored(trained: Trained) -> ExploredStudent:
    """What the epoch that was kept logged."""
    result = trained.result
    logged = result.history[result.best_epoch - 1]
    below = KEPT + "/"
    by_class = {name.removeprefix(below): share for name, share in logged.items() if name.startswith(below)}
    return ExploredStudent(
        arch=trained.student.arch,
        kept=logged.get(KEPT),
        kept_by_class=by_class,
        divergence=logged.get("explore/divergence"),
    )


def _generator(section: GeneratorSection) -> str:
    """What makes the inputs: "vae, 32 latents"."""
    return {
        "vae": f"vae, {section.latent} latents",
        "torch": f"torch, {section.factory}",
        "masked-lm": f"masked-lm, {section.model}",
    }[section.kind or "vae"]
