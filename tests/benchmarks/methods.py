"""Which objective teaches the quickstart's small student best: four of them, over several seeds, on the real data.

    python -m tests.benchmarks.methods [--seeds 3] [--threads 2] [--folder DIR]

Data, teacher, augmentation and `[train]` come from the built-in recipe quickstart, so they cannot drift away from it.
The teacher is trained once, with the recipe's seed. Seed s of a cell changes the student's initial weights, the order
of the samples and their augmented views. A teacher's cached outputs belong to the views that it saw, so each seed has
its own cache of the same teacher, which costs seconds and which the seed's objectives share. The epoch is chosen on
validation; the test split is only read for the accuracy of that epoch, from PyTorch logits.

Writes results/methods.json and .md beside this file. What is finished stays in the folder, and the same command goes on
from there; after a change of edgestill's code, delete the folder first. With --epochs (a quick check) the results stay
in the folder, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

# read by the OpenMP runtime when it is loaded, which importing torch does; the command line sets the same
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from pydantic import TypeAdapter

from cli.pipeline.run import Run
from cli.recipe import load_recipe
from distill.data import Dataset
from distill.objectives.compose import build_objective, head_size
from distill.objectives.section import ObjectiveSections
from distill.students import build_student
from distill.teachers import Teacher, TeacherCache, build_cache
from distill.training import TrainResult, evaluate_logits, train
from profiles.artifact import tool_versions
from profiles.device import detect
from profiles.metrics import evaluate
from profiles.statistics import paired_difference

RESULTS = Path(__file__).parent / "results"
RECIPE = "quickstart"
STUDENT = "conv-w16-d1-k3"
REFERENCE = "supervised"
METHODS = {
    "supervised": "supervised",
    "kd": "KD",
    "distance_correlation": "EAsT (distance correlation)",
    "embedding_compression": "EC (embedding compression)",
}
CONFIDENCE = 0.95
MANY_SEEDS = 100


@dataclass(frozen=True)
class Cell:
    """One training. correct: bool (N,), whether the kept epoch gets each test sample right."""

    result: TrainResult
    correct: np.ndarray[Any, Any]

    @property
    def accuracy(self) -> float:
        """On the test split, 0 to 1."""
        return float(self.correct.mean())


def train_cell(run: Run, method: str, seed: int, cache: TeacherCache, teacher: Teacher) -> Cell:
    """Trains (or loads) the student of one method and seed, and asks it for the test split."""
    dataset, recipe = run.dataset, run.recipe
    sections = TypeAdapter(ObjectiveSections).validate_python(method)
    needed = None if method == REFERENCE else cache
    student = build_student(
        recipe.student,
        dataset.input,
        head_size(sections, len(dataset.classes)),
        arch=STUDENT,
        seed=seed,
        base=run.loaded.base,
    )
    objective = build_objective(sections, dataset, needed, student_dim=student.embedding_dim, seed=seed)
    result = train(
        student,
        objective,
        dataset,
        needed,
        recipe.train.model_copy(update={"hard_weight": None}),  # each objective's own, published one
        recipe.data.augment,
        run.folder / f"{method}-seed-{seed}",
        seed=seed,
        teacher_fingerprint=teacher.fingerprint,
    )
    correct = evaluate_logits(student, objective, dataset.test).argmax(1) == dataset.test.labels
    return Cell(result, correct)


def train_cells(run: Run, seeds: int) -> dict[str, list[Cell]]:
    """Every cell by method and seed. The methods of a seed follow each other, so that a busy machine hits all alike."""
    teacher = run.teacher
    assert teacher is not None
    cells: dict[str, list[Cell]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        cache = build_cache(
            teacher,
            run.dataset,
            run.recipe.data.augment,
            run.folder / f"cache-seed-{seed}",
            seed=seed,
            dtype=run.recipe.teacher.cache_dtype,
            batch_size=run.recipe.teacher.batch_size,
        )
        for method, found in cells.items():
            cell = train_cell(run, method, seed, cache, teacher)
            found.append(cell)
            print(
                f"seed {seed}, {method}: test {cell.accuracy:.2%}, validation {cell.result.metric.value:.2%} "
                f"(epoch {cell.result.best_epoch}), {cell.result.seconds:.1f} s",
                file=sys.stderr,
            )
    return cells


def teacher_facts(run: Run) -> dict[str, Any]:
    """The teacher's architecture, test accuracy and training time."""
    trained = run.trained["teacher", "teacher"]
    test = run.dataset.test
    metric = evaluate(run.dataset.task, evaluate_logits(trained.student, trained.objective, test), test.labels)
    return {
        "arch": trained.student.arch,
        "parameters": trained.result.parameters,
        "epochs": trained.result.epochs,
        "test_accuracy": metric.value,
        "seconds": trained.result.seconds,
    }


def t_interval(differences: list[float]) -> tuple[float, float] | None:
    """Student's t interval of the mean over seeds; None for one seed, which says nothing about others."""
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return None
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(differences) / math.sqrt(n)
    return mean(differences) - half, mean(differences) + half


def seeds_needed(differences: list[float]) -> int | None:
    """Seeds at which the t interval would just leave out zero if mean and deviation stayed as they are: a rough guide.

    None: more than MANY_SEEDS, or unknown from one seed.
    """
    from scipy.stats import t

    if len(differences) < 2:
        return None
    size, deviation = abs(mean(differences)), stdev(differences)
    for n in range(2, MANY_SEEDS + 1):
        if float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n) < size:
            return n
    return None


def compare(cells: list[Cell], reference: list[Cell]) -> dict[str, Any]:
    """One method minus the reference, paired by seed, with an interval over seeds and one over test images.

    The first asks whether other seeds would say the same, the second whether other test images would (each image's
    share of seeds that get it right, resampled over images). `outcome` is "higher" or "lower" only when both agree.
    """
    ours, theirs = [cell.accuracy for cell in cells], [cell.accuracy for cell in reference]
    over_seeds = paired_difference(ours, theirs, confidence=CONFIDENCE)
    over_images = paired_difference(
        np.mean([cell.correct for cell in cells], axis=0),
        np.mean([cell.correct for cell in reference], axis=0),
        confidence=CONFIDENCE,
    )
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    interval = t_interval(differences)
    outcome = "cannot tell"
    if interval is not None and interval[0] > 0 and over_images.low > 0:
        outcome = "higher"
    elif interval is not None and interval[1] < 0 and over_images.high < 0:
        outcome = "lower"
    return {
        "difference": over_seeds.value,
        "differences": differences,
        "t_interval_over_seeds": interval,
        "bootstrap_interval_over_seeds": (over_seeds.low, over_seeds.high),
        "bootstrap_interval_over_test_images": (over_images.low, over_images.high),
        "wins": over_seeds.wins,
        "outcome": outcome,
        "seeds_needed": seeds_needed(differences),
    }


def summary(cells: dict[str, list[Cell]]) -> dict[str, Any]:
    """Every method's row."""
    rows: dict[str, Any] = {}
    for method, found in cells.items():
        accuracies = [cell.accuracy for cell in found]
        rows[method] = {
            "test_accuracy": accuracies,
            "validation_accuracy": [cell.result.metric.value for cell in found],
            "best_epoch": [cell.result.best_epoch for cell in found],
            "seconds": [cell.result.seconds for cell in found],
            "mean": mean(accuracies),
            "standard_deviation": stdev(accuracies) if len(accuracies) > 1 else None,
            "hard_weight": found[0].result.hard_weight,
        }
        if method != REFERENCE:
            rows[method]["to_supervised"] = compare(found, cells[REFERENCE])
    return rows


def markdown(report: dict[str, Any]) -> str:
    """The report as a short page."""
    teacher, seeds, data = report["teacher"], report["seeds"], report["data"]
    lines = [
        "# Methods on the quickstart data",
        "",
        f"{report['date']}, {report['machine']}, {report['device']}, {_count(report['threads'], 'thread')}, "
        f"{', '.join(f'{name} {version}' for name, version in report['versions'].items())}. "
        f"`{report['command']}`",
        "",
        f"{data['name']}: {data['train']:,} training, {data['validation']:,} validation, {data['test']:,} test images. "
        f"Teacher {teacher['arch']} ({teacher['parameters']:,} parameters, {_count(teacher['epochs'], 'epoch')}, "
        f"{teacher['seconds']:.0f} s, test accuracy {teacher['test_accuracy']:.2%}), trained once. Student "
        f"{report['student']} ({report['student_parameters']:,} parameters), {_count(report['epochs'], 'epoch')}, "
        f"{_count(seeds, 'seed')}; augmentation and training settings of the built-in recipe {report['recipe']}, "
        "each method with its own defaults.",
        "",
        "| method | test accuracy, % | sd | minus supervised, points | 95 % t interval, seeds "
        "| 95 % interval, test images | wins | s per training | against supervised |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for method, row in report["methods"].items():
        deviation = row["standard_deviation"]
        cells = [METHODS[method], f"{100 * row['mean']:.2f}", "-" if deviation is None else f"{100 * deviation:.2f}"]
        seconds = f"{mean(row['seconds']):.1f}"
        against = row.get("to_supervised")
        if against is None:
            cells += ["", "", "", "", seconds, ""]
        else:
            cells += [
                f"{100 * against['difference']:+.2f}",
                _points(against["t_interval_over_seeds"]),
                _points(against["bootstrap_interval_over_test_images"]),
                f"{against['wins']}/{seeds}",
                seconds,
                against["outcome"],
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_reading(report)]) + "\n"


def _points(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _reading(report: dict[str, Any]) -> list[str]:
    """What the table does and does not show."""
    seeds, test = report["seeds"], report["data"]["test"]
    rows = {name: row["to_supervised"] for name, row in report["methods"].items() if "to_supervised" in row}
    lines = [
        '"Higher" and "lower" need both intervals on one side of zero: over seeds (initial weights, order, views) and '
        f"over the {test:,} test images. Each interval holds at {CONFIDENCE:.0%} by itself, not for "
        f"all {len(rows)} comparisons together. Seconds are wall-clock, teacher and cache not "
        "in them; where another program shared the cores they say little. One teacher, one data set, one student: none "
        "of this says which method is best elsewhere.",
        "",
    ]
    undecided = {name: row for name, row in rows.items() if row["outcome"] == "cannot tell"}
    if seeds == 1:
        lines.append("One seed shows no spread between seeds: nothing can be told from this table.")
    elif undecided:
        lines.append(f"{seeds} seeds are too few, or the difference is too small, to tell:")
        lines.append("")
        for name, row in undecided.items():
            lines.append(f"- {METHODS[name]}: {_why(row, seeds)}")
    else:
        lines.append(f"{seeds} seeds were enough to tell every method from the reference here.")
    if 1 < seeds < 6:
        # the sign test, two-sided; 6 is the first number at which winning every seed is below 5 %
        chance = 2 * 0.5**seeds
        lines += ["", f"Winning all of {seeds} seeds, or none, happens in {chance:.0%} of cases by chance alone."]
    return lines


def _why(row: dict[str, Any], seeds: int) -> str:
    """Which of the two intervals holds zero, and what would help."""
    low, high = row["bootstrap_interval_over_test_images"]
    reasons = []
    t_low, t_high = row["t_interval_over_seeds"]
    if t_low <= 0 <= t_high:
        needed = row["seeds_needed"]
        many = f"more than {MANY_SEEDS}" if needed is None else f"about {needed}"
        reasons.append(f"the seeds' interval holds zero; at this mean and spread it would take {many} seeds")
    if low <= 0 <= high:
        reasons.append("the test images' interval holds zero, which more seeds hardly change: it takes more images")
    return "; ".join(reasons) or "the two intervals lie on opposite sides of zero"


def describe(run: Run, cells: dict[str, list[Cell]], threads: int, command: str) -> dict[str, Any]:
    """The whole report, ready for JSON."""
    dataset: Dataset = run.dataset
    first = cells[REFERENCE][0].result
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{detect().title} ({platform.machine()})",
        "device": first.device,
        "threads": threads,
        "versions": {"python": platform.python_version(), **tool_versions()},
        "command": command,
        "recipe": RECIPE,
        "data": {"name": dataset.name, **{name: len(dataset.split(name)) for name in ("train", "validation", "test")}},
        "augment": run.recipe.data.augment.model_dump(mode="json"),
        "train": run.recipe.train.model_dump(mode="json", exclude={"hard_weight"}),
        "epochs": run.recipe.train.epochs,
        "teacher": teacher_facts(run),
        "student": first.arch,
        "student_parameters": first.parameters,
        "seeds": len(cells[REFERENCE]),
        "confidence": CONFIDENCE,
        "methods": summary(cells),
    }


def main() -> int:
    """Trains what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keeps what is finished; default: in the temporary folder")
    parser.add_argument("--epochs", type=int, help="of teacher and students: a quick check, not a result")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    torch.set_num_threads(options.threads)
    name = "edgestill-methods" if options.epochs is None else f"edgestill-methods-{options.epochs}-epochs"
    folder: Path = options.folder or Path(tempfile.gettempdir()) / name
    command = f"python -m tests.benchmarks.methods --seeds {options.seeds} --threads {options.threads}"
    overrides, results = [], RESULTS
    if options.epochs is not None:
        overrides = [f"train.epochs={options.epochs}", f"teacher.epochs={options.epochs}"]
        results = folder
        command += f" --epochs {options.epochs}"
    run = Run(load_recipe(RECIPE, overrides), folder)
    report = describe(run, train_cells(run, options.seeds), options.threads, command)
    results.mkdir(parents=True, exist_ok=True)
    (results / "methods.json").write_text(json.dumps(report, indent=2) + "\n")
    (results / "methods.md").write_text(markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
