"""Does a teacher that learns beside the student teach better than one that stands still?

    python -m tests.benchmarks.coached_teacher [--folder runs/coached_teacher] [--jobs 2] [--minutes 40] [--errors]

Trains students of two tasks (movie snippets with a fine-tuned MiniLM, Fashion-MNIST with 1,000 labels) with a frozen
teacher and with teachers coached in each way, over five seeds, and writes results/coached_teacher.json and .md beside
this folder. Seed by seed, so that an early end leaves whole comparisons; what is finished stays in the folder, and the
same command goes on. What time was too short for is listed.

Needs `edgestill[transformers]`, a Python package index for MiniLM and the movie snippets, and the Debian package
dataset-fashion-mnist (or the Hugging Face hub) for the official test images.

--errors: only the table of the finite difference's error, which takes seconds; `--minutes 0` only reports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# read by the OpenMP runtime when it is loaded, which importing torch does; the command line sets the same
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from profiles import artifact
from profiles.device import detect
from profiles.errors import EdgestillError
from tests.benchmarks.coached_teacher import cells as grid
from tests.benchmarks.coached_teacher.errors import error_table
from tests.benchmarks.coached_teacher.report import markdown, results
from tests.benchmarks.coached_teacher.tasks import SETTINGS, Name, Task

RESULTS = Path(__file__).parents[1] / "results"
_FACTS, _FAILURES, _ERRORS = "facts.json", "failures.json", "errors.json"


def _stored(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _store(path: Path, found: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_text(path, json.dumps(found, indent=1) + "\n")


def _report(options: argparse.Namespace, tasks: dict[Name, Task], planned: list[grid.Cell]) -> dict[str, Any]:
    done = [cell for cell in planned if cell.is_done(tasks[cell.task])]
    facts = _stored(options.folder / _FACTS)
    return {
        "command": " ".join(["python -m tests.benchmarks.coached_teacher", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{detect().title} ({platform.machine()})",
        "versions": ", ".join(f"{name} {version}" for name, version in artifact.tool_versions().items()),
        "tasks": {
            name: results(task, [cell for cell in done if cell.task == name], facts[name])
            for name, task in tasks.items()
            if any(cell.task == name for cell in done)
        },
        "errors": _stored(options.folder / _ERRORS),
        "not_run": [cell.label for cell in planned if cell not in done],
        "failures": _stored(options.folder / _FAILURES),
    }


def main() -> int:
    """Trains what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/coached_teacher"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the two files that are written")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=40.0, help="of training; 0: only report what is finished")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--extra-seeds", type=int, default=3, help="of the single choices, which come last")
    parser.add_argument("--errors", action="store_true", help="only the table of the finite difference's error")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    try:
        torch.set_num_threads(options.jobs)
        tasks = {name: Task(name, options.folder) for name in SETTINGS}
        facts = {name: task.prepare() for name, task in tasks.items()}
        _store(options.folder / _FACTS, facts)
        torch.set_num_threads(1)
        if options.errors or not (options.folder / _ERRORS).is_file():
            _store(options.folder / _ERRORS, error_table(tasks))
        planned = grid.cells(options.folder, options.seeds, options.extra_seeds)
        if options.minutes and not options.errors:
            left = [cell for cell in planned if not cell.is_done(tasks[cell.task])]
            _store(options.folder / _FAILURES, grid.run(left, options.jobs, 60 * options.minutes))
        found = _report(options, tasks, planned)
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return 1
    _store(options.results / "coached_teacher.json", found)
    artifact.write_text(options.results / "coached_teacher.md", markdown(found))
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
