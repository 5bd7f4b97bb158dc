"""Does exploring around few labels with a teacher help, beside every control at equal teacher calls?

    python -m tests.benchmarks.exploration [--folder runs/exploration] [--jobs 2] [--minutes 120] [--tasks NAME ...]

Trains students of Fashion-MNIST with 10, 40 and 200 labels per class, of a long-tailed one, and of movie snippets
with 500 labels, with a teacher that knows all labels and with one that knows the same few, over five seeds; writes
results/exploration.json and .md and results/exploration_radii.png beside this folder. Seed by seed, so that an early
end leaves whole comparisons; what is finished stays in the folder, and the same command goes on. What time was too
short for is listed.

Needs the Debian package dataset-fashion-mnist (or the Hugging Face hub); for the texts `edgestill[transformers]` and a
Python package index for MiniLM and the movie snippets.

--minutes 0 only reports; --steps only measures the time of a step of every arm, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# read by the OpenMP runtime when it is loaded, which importing torch does; the command line sets the same
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from profiles import artifact
from profiles.device import detect
from profiles.errors import EdgestillError
from tests.benchmarks.exploration import timing
from tests.benchmarks.exploration.cells import (
    TASKS,
    TUNING_SEED,
    Cell,
    Store,
    StudentCell,
    TeacherCell,
    choose,
    grid,
    run,
)
from tests.benchmarks.exploration.report import PICTURE, markdown, results
from tests.benchmarks.exploration.task import GRADIENT, RANDOM, Choice, Task

RESULTS = Path(__file__).parents[1] / "results"
_FACTS, _FAILURES = "facts.json", "failures.json"
_MOST_PICTURE_BYTES = 300_000


class Benchmark:
    """One folder, some tasks, and how far they are."""

    def __init__(self, folder: Path, names: Sequence[str], seeds: int, jobs: int) -> None:
        self.store, self.seeds, self.jobs = Store(folder), seeds, jobs
        self.tasks: list[Task] = [self.store.task(name) for name in names]
        self.failures: dict[str, str] = {}

    @property
    def tuned(self) -> list[Task]:
        """Tasks on which hyper-parameters are chosen."""
        return [self.store.task(name) for name in dict.fromkeys(task.tuned_on for task in self.tasks)]

    def prepare(self) -> None:
        """Makes what the workers open, with all threads, and keeps the facts."""
        torch.set_num_threads(self.jobs)
        every = list({task.name: task for task in [*self.tasks, *self.tuned]}.values())
        facts = _stored(self.store.root / _FACTS)
        facts |= {task.name: task.prepare(self.seeds) for task in every}
        _store(self.store.root / _FACTS, facts)
        torch.set_num_threads(1)

    def scores(self) -> dict[StudentCell, float]:
        """Validation accuracies of the finished cells that choose."""
        found: dict[StudentCell, float] = {}
        for task in self.tuned:
            known: list[StudentCell] = []
            while True:  # the radii to try are known when the rest is chosen
                _, cells = choose(task, found)
                if cells == known:
                    break
                known = cells
                found |= {cell: self.store.read(cell)["validation"] for cell in cells if self.store.is_done(cell)}
        return found

    def choices(self) -> dict[str, Choice | None]:
        """Task that is tuned -> its choice."""
        scores = self.scores()
        return {task.name: choose(task, scores)[0] for task in self.tuned}

    def planned(self) -> list[Cell]:
        """Cells that choose, then the grid."""
        scores = self.scores()
        found: list[Cell] = []
        for task in self.tuned:
            found += [TeacherCell(task.name, "all", TUNING_SEED), *choose(task, scores)[1]]
        return list(dict.fromkeys([*found, *grid(self.tasks, self.choices(), self.seeds)]))

    def train(self, deadline: float) -> None:
        """Trains what is missing until the deadline: first what chooses, then the grid."""
        while time.monotonic() < deadline:
            undecided = [name for name, choice in self.choices().items() if choice is None]
            planned = self.planned()
            if undecided:
                planned = [TeacherCell(name, "all", TUNING_SEED) for name in undecided]
                planned += [cell for cell in self.planned() if _is_tuning(cell)]
            left = [cell for cell in planned if cell.label not in self.failures and not self.store.is_done(cell)]
            self.failures |= run(left, self.store.root, self.jobs, deadline)
            _store(self.store.root / _FAILURES, self.failures)
            if not undecided or not left:
                return

    def report(self, folder: Path) -> dict[str, Any]:
        """Everything about what is finished; the picture goes into `folder`."""
        planned, choices, scores = self.planned(), self.choices(), self.scores()
        unchosen = {task.name for task in self.tasks if choices[task.tuned_on] is None}
        # a student whose settings are not chosen has a stand-in for them, and is not done
        known = [cell for cell in planned if _is_tuning(cell) or not _is_taught(cell) or cell.task not in unchosen]
        done = [cell for cell in known if self.store.is_done(cell)]
        facts = _stored(self.store.root / _FACTS)
        return {
            "command": " ".join(["python -m tests.benchmarks.exploration", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{detect().title} ({platform.machine()})",
            "versions": ", ".join(f"{name} {version}" for name, version in artifact.tool_versions().items()),
            "tasks": {
                task.name: results(
                    self.store,
                    task,
                    [cell for cell in done if not _is_tuning(cell)],
                    choices[task.tuned_on],
                    scores,
                    facts[task.name],
                    timing.read(task),
                )
                for task in self.tasks
            },
            "picture": self._picture(done, folder),
            "not_run": [cell.label for cell in planned if cell not in done],
            "failures": _stored(self.store.root / _FAILURES),
        }

    def _picture(self, done: Sequence[Cell], folder: Path) -> str | None:
        """Copies a finished picture; what it shows."""
        for arm in (GRADIENT, RANDOM):
            for cell in done:
                if isinstance(cell, StudentCell) and cell.arm == arm and not cell.tuning:
                    picture = self.store.picture(cell)
                    if picture.is_file() and picture.stat().st_size < _MOST_PICTURE_BYTES:
                        folder.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(picture, folder / PICTURE)
                        sigma = cell.choice.sigmas[str(arm.kind)]
                        return (
                            f"{cell.label}, after training: real images in the first row, below them what is explored "
                            f"around each at 0.5, 1 and 2 times the chosen radius (sigma {sigma:g}), each with the "
                            "teacher's word for it."
                        )
        return None

    def steps(self) -> None:
        """Measures the time of a step of every arm, for the tasks that hyper-parameters are chosen on."""
        choices = self.choices()
        for task in self.tuned:
            choice = choices[task.name]
            if choice is not None:
                timing.measure(task, choice)


def _is_taught(cell: Cell) -> bool:
    return isinstance(cell, StudentCell) and cell.arm.kind is not None


def _is_tuning(cell: Cell) -> bool:
    return isinstance(cell, StudentCell) and cell.tuning


def _stored(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _store(path: Path, found: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_text(path, json.dumps(found, indent=1) + "\n")


def main() -> int:
    """Trains what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/exploration"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files that are written")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=120.0, help="of training; 0: only report what is finished")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument("--steps", action="store_true", help="only measure the time of a step of every arm")
    options = parser.parse_args()
    try:
        benchmark = Benchmark(options.folder.resolve(), options.tasks, options.seeds, options.jobs)
        benchmark.prepare()
        if options.steps:
            benchmark.steps()
        elif options.minutes:
            benchmark.train(time.monotonic() + 60 * options.minutes)
            if not all(timing.read(task) for task in benchmark.tuned):
                benchmark.steps()
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
    found = benchmark.report(options.results)
    _store(options.results / "exploration.json", found)
    artifact.write_text(options.results / "exploration.md", markdown(found))
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
