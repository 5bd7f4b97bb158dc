"""`study --dry-run`: the trainings of a study, which of them are done, and about how long the rest takes."""

from __future__ import annotations

from statistics import mean

from cli.pipeline.study import KIND, Cell, Study
from cli.report.study_schema import CellResult
from cli.report.words import duration
from profiles import artifact
from profiles.errors import InputError
from profiles.section import Section


class PlannedCells(Section):
    """One method with one value of every factor. `seconds`: for those left, None where nothing is known."""

    label: str
    cells: int
    done: int
    seconds: float | None


class StudyPlan(Section):
    """What a study would train. seconds: of the cells that are left, teacher and cache not in them; None: unknown."""

    folder: str
    control: str
    seeds: int
    jobs: int
    combinations: tuple[PlannedCells, ...]
    cells: int
    done: int
    seconds: float | None


def plan_study(study: Study) -> StudyPlan:
    """Looks at the folder; loads neither data nor teacher.

    A cell counts as done when it was made with the same keys of the recipe; whether the data itself has changed shows
    when the study runs.
    """
    done = {cell: cell.read() for cell in study.cells if _is_done(study, cell)}
    rows = []
    for combination in study.grid.combinations:
        cells = [cell for cell in study.cells if cell.combination is combination]
        finished = [done[cell] for cell in cells if cell in done]
        one = _seconds(study, cells[0], finished, list(done.values()))
        left = len(cells) - len(finished)
        seconds = 0.0 if left == 0 else None if one is None else round(one * left, 1)
        rows.append(PlannedCells(label=combination.label, cells=len(cells), done=len(finished), seconds=seconds))
    known = [row.seconds for row in rows if row.seconds is not None]
    return StudyPlan(
        folder=str(study.folder),
        control=study.grid.control,
        seeds=study.grid.seeds,
        jobs=study.jobs,
        combinations=tuple(rows),
        cells=len(study.cells),
        done=len(done),
        seconds=round(sum(known) / study.jobs, 1) if len(known) == len(rows) else None,
    )


def render_plan(plan: StudyPlan) -> str:
    """The plan as text."""
    width = max(len(row.label) for row in plan.combinations)
    lines = [f"study folder {plan.folder}, control {plan.control}, {plan.seeds} seeds", ""]
    for row in plan.combinations:
        left = "" if row.done == row.cells else "  ?" if row.seconds is None else f"  about {duration(row.seconds)}"
        lines.append(f"  {row.label:<{width}}  {row.done:>3} of {row.cells} done{left}")
    lines += ["", f"{plan.done} of {plan.cells} cells are done"]
    if plan.done < plan.cells:
        if plan.seconds is None:
            lines.append("the time for the rest is known when the first cells are finished")
        else:
            lines.append(
                f"about {duration(plan.seconds)} for the rest, judged by the finished ones; teacher and cache not in it"
            )
    return "\n".join(lines)


def _is_done(study: Study, cell: Cell) -> bool:
    try:
        manifest = artifact.read_manifest(cell.folder, KIND)
    except InputError:
        return False
    return bool(manifest.info.get("settings") == study.settings_key(cell.combination, cell.seed))


def _seconds(study: Study, cell: Cell, same: list[CellResult], finished: list[CellResult]) -> float | None:
    """Of one training: the mean of those of its combination, else from the time per sample of its method, or of all."""
    if same:
        return mean(found.seconds for found in same)
    alike = [found for found in finished if found.method == cell.combination.method] or finished
    rows = cell.combination.recipe.data.train_size or max((found.train_samples for found in finished), default=0)
    if not alike or not rows:
        return None
    per_sample = mean(found.seconds / (found.train_samples * found.epochs) for found in alike)
    return per_sample * rows * cell.combination.recipe.train.resolved(rows).epochs
