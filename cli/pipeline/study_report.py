"""From a study's finished cells to its report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from statistics import mean, stdev

import numpy as np
import torch

from cli.pipeline.exploration import in_words
from cli.pipeline.reporting import machine_facts
from cli.pipeline.run import Run, needs_teacher
from cli.pipeline.study import Cell, Study, part_size
from cli.report.schema import DataFacts
from cli.report.study_schema import (
    Block,
    CellResult,
    ComparisonRow,
    FailedCell,
    MethodRow,
    StudyReport,
    TeacherFacts,
)
from distill.data import Dataset
from distill.objectives.split_head import class_logits_of
from distill.study import chance_of_all_wins, compare, over_samples
from distill.teachers import SubclassCache, TeacherCache
from profiles import artifact
from profiles.metrics import evaluate, primary_metric
from profiles.statistics import wilson

_FEW_SEEDS = 6
"""The first number of seeds at which winning all of them is below 5 % by chance."""


def build_study_report(study: Study) -> StudyReport:
    """The document that every renderer reads; cells without a result are left out of it (see `Study.finished`)."""
    run = study.base(study.grid.combinations[0])
    dataset = run.dataset
    finished = study.finished()
    blocks, teachers = _blocks(study, finished), _teachers(study, finished)
    return StudyReport(
        name=study.loaded.recipe.name,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=round(time.time() - study.started, 1),
        versions=artifact.tool_versions(),
        machine=machine_facts(),
        recipe=study.loaded.origin,
        folder=str(study.folder),
        task=dataset.task,
        metric=primary_metric(dataset.task),
        n_test=len(dataset.test),
        unit="image" if dataset.input.kind == "image" else "text",
        data=DataFacts(
            source=run.recipe.data.source,
            title=dataset.name,
            licence=dataset.licence,
            citation=dataset.citation,
            splits={name: len(dataset.split(name)) for name in ("train", "validation", "test")},
            labels=dataset.classes,
        ),
        teachers=teachers,
        control=study.grid.control,
        seeds=study.grid.seeds,
        jobs=study.jobs,
        methods=study.grid.methods,
        factors=study.grid.factors,
        blocks=blocks,
        cells=tuple(finished.values()),
        tune=study.trials,
        tuning=study.tuning,
        planned=len(study.cells),
        failed=tuple(FailedCell(label=failure.label, error=failure.error) for failure in study.failures),
        notes=_notes(study, blocks, teachers),
    )


def _blocks(study: Study, finished: Mapping[Cell, CellResult]) -> tuple[Block, ...]:
    groups: dict[str, dict[str, list[Cell]]] = {}
    factors = {}
    for combination in study.grid.combinations:
        name = artifact.content_key(combination.factors)
        factors[name] = combination.factors
        cells = [cell for cell in finished if cell.combination.label == combination.label]
        groups.setdefault(name, {})[combination.method] = sorted(cells, key=lambda cell: cell.seed)
    blocks = []
    for name, methods in groups.items():
        control = methods[study.grid.control]
        dataset = study.base(next(c for c in study.grid.combinations if c.factors == factors[name])).dataset
        rows = tuple(
            _row(dataset, cells, [] if method == study.grid.control else control, finished)
            for method, cells in methods.items()
            if cells
        )
        if rows:
            first = finished[next(cell for cells in methods.values() for cell in cells)]
            blocks.append(Block(factors=factors[name], train_samples=first.train_samples, rows=rows))
    return tuple(blocks)


def _row(
    dataset: Dataset, cells: Sequence[Cell], control: Sequence[Cell], finished: Mapping[Cell, CellResult]
) -> MethodRow:
    """One method's cells; `control`: the reference's with the same factors, empty for the reference itself."""
    found = [finished[cell] for cell in cells]
    scores = [each.test for each in found]
    return MethodRow(
        method=found[0].method,
        test={each.seed: each.test for each in found},
        mean=mean(scores),
        sd=stdev(scores) if len(scores) > 1 else None,
        validation_mean=mean(each.validation for each in found),
        seconds=mean(each.seconds for each in found),
        hard_weight=found[0].hard_weight,
        arch=found[0].arch,
        parameters=found[0].parameters,
        to_control=_comparison(dataset, cells, control, finished),
    )


def _comparison(
    dataset: Dataset, cells: Sequence[Cell], control: Sequence[Cell], finished: Mapping[Cell, CellResult]
) -> ComparisonRow | None:
    """None without a seed that both have."""
    theirs = {cell.seed: cell for cell in control}
    pairs = [(cell, theirs[cell.seed]) for cell in cells if cell.seed in theirs]
    if not pairs:
        return None
    samples = over_samples(
        dataset.task,
        [ours.logits() for ours, _ in pairs],
        [other.logits() for _, other in pairs],
        dataset.test.labels,
        dataset.test.mask,
    )
    found = compare([finished[ours].test for ours, _ in pairs], [finished[other].test for _, other in pairs], samples)
    return ComparisonRow(
        difference=found.bootstrap.value,
        by_seed={ours.seed: value for (ours, _), value in zip(pairs, found.differences, strict=True)},
        bootstrap=(found.bootstrap.low, found.bootstrap.high),
        seeds_interval=found.seeds,
        samples_interval=(samples.low, samples.high),
        confidence=found.bootstrap.confidence,
        wins=found.bootstrap.wins,
        ties=found.ties,
        n=found.bootstrap.n,
        outcome=found.outcome,
        seeds_needed=found.seeds_needed,
        reasons=found.reasons,
    )


def _teachers(study: Study, finished: Iterable[Cell]) -> tuple[TeacherFacts, ...]:
    """Every teacher that a finished cell learned from, in the order of the table."""
    labels = {cell.combination.label for cell in finished}
    several = len({id(study.base(combination)) for combination in study.grid.combinations}) > 1
    found: dict[tuple[int, str], TeacherFacts] = {}
    for combination in study.grid.combinations:
        run, sections = study.base(combination), combination.recipe.objective
        if combination.label not in labels or not (needs_teacher(sections) or combination.explores):
            continue
        kind = run.recipe.teacher.kind
        student = study.student_word(combination)
        variant = run.variant(sections, student)
        name = variant.folder
        before = found.get((id(run), name))
        if before is not None:
            methods = tuple(dict.fromkeys((*before.methods, combination.method)))
            found[id(run), name] = before.model_copy(update={"methods": methods})
            continue
        if needs_teacher(sections):
            cache = run.cache_for(sections, student, moves=combination.is_coached)
        else:  # it labels further inputs alone
            cache = run.cache_of(variant)
        if cache is None:
            continue
        trained = run.trained.get(("teacher", name))
        factors = {key: value for key, value in combination.factors.items() if key.startswith(("data.", "teacher."))}
        found[id(run), name] = TeacherFacts(
            kind=kind,
            arch=None if trained is None else trained.student.arch,
            train_samples=len(run.dataset.train),
            methods=(combination.method,),
            subclasses=cache.subclasses if isinstance(cache, SubclassCache) else None,
            conditioned_on=(f"a pool of {len(run.pool)} students" if variant.strategy == "generic" else variant.arch),
            test=_teacher_metric(run, cache),
            seconds=None if trained is None else trained.result.seconds,
            factors=factors if several else {},
        )
    return tuple(found.values())


def _teacher_metric(run: Run, cache: TeacherCache) -> float | None:
    """The task's metric of a teacher on the test split; None without class logits."""
    dataset, stored = run.dataset, cache.test_logits
    if stored is None:
        return None
    logits = np.array(stored, np.float32)
    if isinstance(cache, SubclassCache):
        logits = class_logits_of(torch.from_numpy(logits), cache.subclasses).numpy()
    if logits.shape[-1] != len(dataset.classes):
        return None
    return evaluate(dataset.task, logits, dataset.test.labels, dataset.test.mask).value


def _guessing(dataset: Dataset) -> tuple[str, float] | None:
    """The most frequent class of the test split, and the upper end of the 95 % interval of its share; None for several
    labels per sample, whose metric has no such simple floor."""
    if dataset.task != "multiclass":
        return None
    counts = np.bincount(dataset.test.labels, minlength=len(dataset.classes))
    return dataset.classes[int(counts.argmax())], wilson(int(counts.max()), int(counts.sum()))[1]


def _notes(study: Study, blocks: Sequence[Block], teachers: Sequence[TeacherFacts]) -> tuple[str, ...]:
    """What the table does not show by itself."""
    notes = list(study.notes)
    comparisons = [row.to_control for block in blocks for row in block.rows if row.to_control is not None]
    if len(study.grid.methods) == 1:
        notes.append("one method: nothing to compare it with; --vary objective=supervised,... names others")
    sizes = {one.recipe.data.train_size for one in study.grid.combinations if one.recipe.data.imbalance is not None}
    if len(sizes) > 1:
        notes.append(
            "every train_size of a long-tailed training split has data and teacher of its own, as in a run: its tail "
            "is thinned out of so many samples"
        )
    parts = [one for one in study.grid.combinations if part_size(one.recipe) is not None]
    whole = max((len(study.base(one).dataset.train) for one in parts), default=0)
    if any((part_size(one.recipe) or 0) < len(study.base(one).dataset.train) for one in parts):
        notes.append(
            f"smaller training sets are nested parts of the {whole:,} training samples, class shares kept; teacher, "
            "normalisation and tokenizer are those of all of them"
        )
        generating = [c.recipe for c in study.grid.combinations if c.recipe.explore.generates]
        if generating:
            extended = any(recipe.data.unlabelled is not None for recipe in generating)
            notes.append(
                "a generator learns from the same part of the training samples as its students"
                + (", and from the unlabelled inputs" if extended else "")
            )
    for block in blocks:
        answer = _guessing(study.base(study.grid.combinations[0]).dataset)
        if answer is not None and block.rows and max(row.mean for row in block.rows) <= answer[1]:
            notes.append(
                f"with {block.train_samples:,} training samples no method is better than always answering "
                f'"{answer[0]}": nothing was learned, and no difference here means anything'
            )
    coached = dict.fromkeys(c.method for c in study.grid.combinations if c.is_coached)
    if coached:
        notes.append(
            f"{', '.join(coached)}: a copy of the teacher learns along with every student; the teacher's figure is "
            "that of where it starts, and a training's time has both"
        )
    explored: dict[str, list[str]] = {}
    for one in study.grid.combinations:
        if one.explores:
            explored.setdefault(in_words(one.recipe.explore), []).append(one.label)
    notes += [f"{', '.join(labels)}: explores, {words}" for words, labels in explored.items()]
    seeds = study.grid.seeds
    if comparisons and 1 < seeds < _FEW_SEEDS:
        notes.append(
            f"all of {seeds} seeds are won, or none, by chance alone in {chance_of_all_wins(seeds):.0%} of cases"
        )
    if comparisons:
        shared = "training samples, teacher and augmented views" if teachers else "training samples"
        notes.append(
            f"the seeds share the {shared}: no interval covers another draw of the training samples, which matters "
            "most when they are few"
        )
    if len(comparisons) > 1:
        notes.append(
            f"each interval holds at {comparisons[0].confidence:.0%} by itself, not for all {len(comparisons)} "
            "comparisons together"
        )
    return tuple(notes)
