"""Tuning for a study (`--tune`): the same number of trials for every combination, judged on validation alone.

All trials have one seed that no cell of the study has, so that what the study reports is fresh. The first one has the
method's defaults, and a later one replaces it only by a higher metric. The trials of one combination follow each other,
since each is proposed from those before it; combinations are tuned at the same time where there are several jobs.

`tuning/<combination>/trial-000/` keeps what every trial found: a tuning that was stopped reads those and goes on.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from cli.pipeline.study import Job, Study, fit
from cli.report.study_schema import TrialResult, TuningRow
from cli.search import Space, changed, defaults, propose, search_space
from cli.study_grid import Combination
from profiles import artifact
from profiles.errors import EdgestillError, InputError, Interrupted
from profiles.progress import Progress

KIND = "tuning trial"
SEED = 1_000_000
"""Of every trial, far from a study's own seeds, which count up from 0."""
_FORM = 1
"""Raise when the way a trial is made changes, so that older ones are made anew."""
_TRIAL_FILE = "trial.json"


@dataclass(frozen=True)
class Tuning:
    """What a process needs to tune one combination. left: trials that are not finished yet."""

    space: Space
    trials: int
    folder: Path
    left: int = 0

    def place(self, number: int) -> Path:
        """The folder of a trial's artefact."""
        return self.folder / f"trial-{number:03d}"


def tune_study(study: Study) -> tuple[Combination, ...]:
    """Tunes every combination as far as it is not done, and gives the study the best settings and the trials.

    Returns:
        The combinations that are tuned, with their new settings; `study.failures` names the others.

    Raises:
        Interrupted: Ctrl-C; the same call goes on.
    """
    jobs = []
    for combination, tuning in _tunings(study):
        job = study.job(combination, SEED, tuning.folder)
        found = _finished(job, tuning)
        jobs.append(replace(job, tuning=replace(tuning, left=tuning.trials - len(found))))
    left = [job for job in jobs if job.tuning is not None and job.tuning.left]
    if left:
        study.work(left, len(jobs) - len(left), len(jobs), "tunings")
    rows, combinations, tuned = [], [], []
    for job in jobs:
        assert job.tuning is not None
        combination, found = job.cell.combination, _finished(job, job.tuning)
        if len(found) == job.tuning.trials:
            row = _row(combination, job.tuning, found)
            rows.append(row)
            combination = _chosen(combination, row)
            tuned.append(combination)
        combinations.append(combination)
    study.use(combinations, rows)
    return tuple(tuned)


def look(study: Study) -> list[tuple[Combination, int, list[TrialResult]]]:
    """Every combination with the number of its trials and those that are done, judged by the recipe's keys alone.

    Loads neither data nor teacher. Combinations whose tuning is finished get its settings in `study`.
    """
    found, rows, combinations = [], [], []
    for combination, tuning in _tunings(study):
        done = []
        for number in range(tuning.trials):
            result = _read(tuning.place(number))
            if result is None:
                break
            manifest = artifact.read_manifest(tuning.place(number), KIND)
            if manifest.info.get("settings") != _key(study.settings_key(combination, SEED), tuning, result):
                break
            done.append(result)
        found.append((combination, tuning.trials, done))
        if len(done) == tuning.trials:
            row = _row(combination, tuning, done)
            rows.append(row)
            combination = _chosen(combination, row)  # noqa: PLW2901
        combinations.append(combination)
    study.use(combinations, rows)
    return found


def run_trials(job: Job, tuning: Tuning, progress: Progress) -> None:
    """Makes the trials of one combination that are not finished, one after the other.

    A trial whose training fails, as with a learning rate that is too high, counts as one and is not made again.

    Raises:
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    done: list[TrialResult] = []
    for number in range(tuning.trials):
        result = _stored(job, tuning, number)
        if result is None:
            past = [(each.settings, each.validation) for each in done]
            settings = defaults(tuning.space) if number == 0 else propose(tuning.space, past, number)
            asked = TrialResult(number=number, settings=settings, validation=None)
            result = _train(job, tuning.place(number), asked, progress)
            with artifact.create(
                tuning.place(number),
                KIND,
                _key(job.key, tuning, result),
                {"settings": _key(job.settings, tuning, result)},
            ) as temporary:
                (temporary / _TRIAL_FILE).write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
        done.append(result)


def _train(job: Job, folder: Path, asked: TrialResult, progress: Progress) -> TrialResult:
    """One trial's training; the first is the combination as it stands."""
    combination = job.cell.combination
    try:
        if asked.number:
            combination = changed(combination, asked.settings)
        trained = fit(replace(job, cell=replace(job.cell, combination=combination, folder=folder)), progress)
    except Interrupted:
        raise
    except EdgestillError as error:
        shutil.rmtree(folder.with_name(folder.name + ".training.partial"), ignore_errors=True)
        return asked.model_copy(update={"error": " ".join(str(error).split())})
    result = trained.result
    trained.remove()
    defined = math.isfinite(result.metric.value)
    return asked.model_copy(
        update={
            "validation": result.metric.value if defined else None,
            "error": None if defined else "the metric is not defined on the validation split",
            "seconds": result.seconds,
            "best_epoch": result.best_epoch,
            "epochs": result.epochs,
            "train_samples": len(trained.dataset.train),
        }
    )


def _tunings(study: Study) -> list[tuple[Combination, Tuning]]:
    """Every combination of the grid with its tuning; with nothing to search the defaults are the only trial."""
    assert study.trials is not None
    found = []
    for combination, slug in zip(study.grid.combinations, study.slugs(), strict=True):
        space = search_space(combination, study.loaded.recipe.study.variant)
        found.append((combination, Tuning(space, study.trials if space else 1, study.folder / "tuning" / slug)))
    return found


def _key(base: str, tuning: Tuning, trial: TrialResult) -> str:
    """Hash of what decides a trial: the combination (`base`), what is searched, and the trial's settings."""
    return artifact.content_key(KIND, _FORM, base, tuning.space, trial.number == 0, trial.settings)


def _read(folder: Path) -> TrialResult | None:
    try:
        artifact.read_manifest(folder, KIND)
        return TrialResult.model_validate_json((folder / _TRIAL_FILE).read_text(encoding="utf-8"))
    except (InputError, OSError, ValidationError):
        return None


def _stored(job: Job, tuning: Tuning, number: int) -> TrialResult | None:
    """A finished trial of just this combination and search."""
    result = _read(tuning.place(number))
    if result is None or result.number != number or set(result.settings) != set(tuning.space):
        return None
    return result if artifact.current(tuning.place(number), KIND, _key(job.key, tuning, result)) else None


def _finished(job: Job, tuning: Tuning) -> list[TrialResult]:
    found = (_stored(job, tuning, number) for number in range(tuning.trials))
    return [result for result in found if result is not None]


def _row(combination: Combination, tuning: Tuning, trials: Sequence[TrialResult]) -> TuningRow:
    scores = {each.number: each.validation for each in trials if each.validation is not None}
    return TuningRow(
        method=combination.method,
        factors=combination.factors,
        search={key: dimension.words for key, dimension in tuning.space.items()},
        seed=SEED,
        trials=tuple(trials),
        best=max(scores, key=lambda number: (scores[number], -number)) if scores else None,
        seconds=sum(each.seconds for each in trials),
    )


def _chosen(combination: Combination, row: TuningRow) -> Combination:
    """The combination with the best trial's settings; the first trial's are what it has."""
    return changed(combination, row.trials[row.best].settings) if row.best else combination
