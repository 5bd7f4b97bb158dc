"""Are students that follow from the device better than those that a simpler rule chooses, and what does choosing cost?

    python -m tests.benchmarks.budgets [--folder runs/budgets] [--minutes 60] [--limits 0.25,0.5,1.5]

Chooses students for six targets (this machine at three latency limits; a Raspberry Pi 5, a Jetson Orin Nano and an RTX
4060 Laptop that are not attached) in one run, then trains and measures what scaling by hand and counting FLOPs would
have chosen, and writes results/budgets.json and .md beside this folder. Everything that is finished stays in the
folder, so the same command goes on; the time of a stage counts once, in the call that finished it. Wants a quiet
machine. Needs the Debian package dataset-fashion-mnist, or the Hugging Face hub.

--quick: 200 images, two students and two targets, in a folder of its own and written there only: shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

# read by the OpenMP runtime when it is loaded, which importing torch does; the command line sets the same
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from cli.report.schema import TargetRow
from distill.students.arch import Arch
from profiles import artifact
from profiles.errors import EdgestillError, Interrupted
from tests.benchmarks.budgets.report import Priced, figures, markdown
from tests.benchmarks.budgets.runs import QUICK, Budgets, Deadline, Sizes

RESULTS = Path(__file__).parents[1] / "results"


def collect(budgets: Budgets, command: str) -> dict[str, Any] | None:
    """Chooses and compares as far as there is time; None when the choice itself is not finished."""
    not_run = []
    compared: dict[str, dict[str, TargetRow]] = {}
    prices: dict[Arch, Priced] = {}
    try:
        report = budgets.choose()
        prices = budgets.prices()
        compared = budgets.compare()
    except (KeyboardInterrupt, Interrupted):
        stored = budgets.stored()
        if stored is None:
            return None
        report = stored
        not_run.append("scaling by hand, and by FLOPs: the time was over")
    return {"command": command, "not_run": not_run, **figures(report, compared, prices, budgets.stages())}


def main(arguments: list[str] | None = None) -> int:
    """Does what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="default: runs/budgets[-quick]")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--limits", default=None, help="latency limits of this machine's targets, in milliseconds")
    parser.add_argument("--finalists", type=int, default=None, help="students trained in full for a target at most")
    parser.add_argument("--quick", action="store_true", help="two students, one epoch; writes into the folder only")
    options = parser.parse_args(arguments)
    folder = options.folder or Path("runs/budgets-quick" if options.quick else "runs/budgets")
    sizes = QUICK if options.quick else Sizes()
    if options.limits is not None:
        sizes = replace(sizes, latency_ms=tuple(float(limit) for limit in options.limits.split(",")))
    if options.finalists is not None:
        sizes = replace(sizes, choice={**sizes.choice, "finalists": options.finalists})
    budgets = Budgets(folder, sizes, Deadline(60 * options.minutes))
    given = sys.argv[1:] if arguments is None else arguments
    try:
        found = collect(budgets, " ".join(["python -m tests.benchmarks.budgets", *given]))
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return 1
    if found is None:
        print("the time was over before the students were chosen; the same command goes on", file=sys.stderr)
        return 130
    place = folder if options.quick else RESULTS
    place.mkdir(parents=True, exist_ok=True)
    artifact.write_text(place / "budgets.json", json.dumps(found, indent=1) + "\n")
    artifact.write_text(place / "budgets.md", markdown(found))
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
