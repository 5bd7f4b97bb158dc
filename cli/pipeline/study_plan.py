"""`study --dry-run`: the trainings of a study, which of them are done, and about how long the rest takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from cli.pipeline.study import Study, part_size
from cli.report.words import duration
from cli.study_grid import Combination
from profiles.section import Section


class PlannedCells(Section):
    """The cells of one method with one value of every factor, or the trials of its tuning.

    `seconds`: for those left, None where nothing is known.
    """

    label: str
    cells: int
    done: int
    seconds: float | None


class StudyPlan(Section):
    """What a study would train. seconds: of what is left, teacher and cache not in it; None: unknown.

    tuning: trials come before the cells. cells, done: of the cells alone; trials, trials_done: of the tunings.
    """

    folder: str
    control: str
    seeds: int
    jobs: int
    tuning: tuple[PlannedCells, ...] = ()
    trials: int = 0
    trials_done: int = 0
    combinations: tuple[PlannedCells, ...]
    cells: int
    done: int
    seconds: float | None


def plan_study(study: Study) -> StudyPlan:
    """Looks at the folder; loads neither data nor teacher.

    A cell counts as done when it was made with the same keys of the recipe; whether the data itself has changed shows
    when the study runs.
    """
    times: list[_Time] = []
    trials, rows = [], []
    if study.trials is not None:
        from cli.pipeline.tune import look

        trials = look(study)
        for combination, _, results in trials:
            for result in results:
                if result.epochs is not None and result.train_samples is not None:
                    times.append(_Time(combination, result.seconds, result.train_samples, result.epochs))
    done = study.finished()
    times += [_Time(cell.combination, one.seconds, one.train_samples, one.epochs) for cell, one in done.items()]
    tuning = [
        _planned(f"{combination.label}, tuning", number, len(results), _seconds(combination, times))
        for combination, number, results in trials
    ]
    for combination in study.grid.combinations:
        cells = [cell for cell in study.cells if cell.combination is combination]
        finished = sum(cell in done for cell in cells)
        rows.append(_planned(combination.label, len(cells), finished, _seconds(combination, times)))
    known = [row.seconds for row in (*tuning, *rows) if row.seconds is not None]
    return StudyPlan(
        folder=str(study.folder),
        control=study.grid.control,
        seeds=study.grid.seeds,
        jobs=study.jobs,
        tuning=tuple(tuning),
        trials=sum(row.cells for row in tuning),
        trials_done=sum(row.done for row in tuning),
        combinations=tuple(rows),
        cells=len(study.cells),
        done=len(done),
        seconds=round(sum(known) / study.jobs, 1) if len(known) == len(tuning) + len(rows) else None,
    )


def render_plan(plan: StudyPlan) -> str:
    """The plan as text."""
    rows = (*plan.tuning, *plan.combinations)
    width = max(len(row.label) for row in rows)
    lines = [f"study folder {plan.folder}, control {plan.control}, {plan.seeds} seeds", ""]
    for row in rows:
        left = "" if row.done == row.cells else "  ?" if row.seconds is None else f"  about {duration(row.seconds)}"
        lines.append(f"  {row.label:<{width}}  {row.done:>3} of {row.cells} done{left}")
    tuning = f"{plan.trials_done} of {plan.trials} tuning trials and " if plan.tuning else ""
    lines += ["", f"{tuning}{plan.done} of {plan.cells} cells are done"]
    if plan.done < plan.cells or plan.trials_done < plan.trials:
        if plan.seconds is None:
            lines.append("the time for the rest is known when the first cells are finished")
        else:
            lines.append(
                f"about {duration(plan.seconds)} for the rest, judged by the finished ones; teacher and cache not in it"
            )
    return "\n".join(lines)


@dataclass(frozen=True)
class _Time:
    """What one finished training took."""

    combination: Combination
    seconds: float
    train_samples: int
    epochs: int


def _planned(label: str, cells: int, done: int, one: float | None) -> PlannedCells:
    """`one`: seconds of one training."""
    seconds = 0.0 if done == cells else None if one is None else round(one * (cells - done), 1)
    return PlannedCells(label=label, cells=cells, done=done, seconds=seconds)


def _seconds(combination: Combination, times: Sequence[_Time]) -> float | None:
    """Of one training: the mean of those of its combination, else from the time per sample of its method, or of all."""
    same = [found.seconds for found in times if found.combination.label == combination.label]
    if same:
        return mean(same)
    alike = [found for found in times if found.combination.method == combination.method] or times
    rows = part_size(combination.recipe) or max((found.train_samples for found in times), default=0)
    if not alike or not rows:
        return None
    per_sample = mean(found.seconds / (found.train_samples * found.epochs) for found in alike)
    return per_sample * rows * combination.recipe.train.resolved(rows).epochs
