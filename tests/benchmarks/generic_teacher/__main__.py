"""Does one teacher for a pool of students (GTN) teach better than a plain one, and what does it cost beside SFTN?

    python -m tests.benchmarks.generic_teacher [--folder runs/generic_teacher] [--jobs 2] [--minutes 60] [--steps]

Trains what is missing, in processes of one thread each, and writes results/generic_teacher.json and .md beside this
folder. Finished trainings stay in the folder, so the same command goes on; what time was too short for is listed in the
results. Needs the Debian package dataset-fashion-mnist, or the Hugging Face hub.

--steps: first times training steps of all teachers in turn, which a busy machine distorts less than whole trainings.
--quick: 300 images and one epoch, in a folder of its own and written there only: shows that everything runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

# read by the OpenMP runtime when it is loaded, which importing torch does; the command line sets the same
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.data import Dataset
from distill.students import build_student
from distill.students.section import StudentSection
from profiles import artifact
from profiles.device import detect
from profiles.errors import EdgestillError
from tests.benchmarks.generic_teacher import timing
from tests.benchmarks.generic_teacher.cells import QUICK, Cells, Sizes, run
from tests.benchmarks.generic_teacher.plan import (
    ABLATIONS,
    ARMS,
    POOL,
    SEEDS,
    STUDENTS,
    TEACHER,
    TeacherCell,
    plan,
)
from tests.benchmarks.generic_teacher.report import Results, markdown, tables

RESULTS = Path(__file__).parents[1] / "results"


def size_of(arch: str, dataset: Dataset) -> dict[str, Any]:
    """FLOPs of one image (a multiplication and an addition count as two) and parameters."""
    network = build_student(
        StudentSection(), dataset.input, len(dataset.classes), arch=arch, seed=0, base=Path()
    ).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *dataset.input.shape, dtype=torch.uint8))
    return {
        "arch": arch,
        "mflop": counter.get_total_flops() / 1e6,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "sampled": arch in POOL,
    }


def collect(cells: Cells, failed: dict[str, str], command: str) -> dict[str, Any] | None:
    """All that the results tell; None when nothing is finished."""
    done = cells.done()
    if not done:
        return None
    taus = cells.taus(done)
    found = {cell: cells.read(cell) for cell in plan(taus) if cell in done}
    dataset = cells.dataset
    last = max(found.values(), key=lambda one: one.created)
    teacher = size_of(TEACHER, dataset)
    learned = [
        teacher
        for arm in (*ARMS.values(), *ABLATIONS.values())
        for teacher in dict.fromkeys(arm.teachers.values())
        if dict(teacher.settings).get("distribution", "uniform") != "uniform"
    ]
    pools = {
        teacher.name: {
            seed: cells.probabilities(cell) for seed in SEEDS if (cell := TeacherCell(teacher, seed)) in done
        }
        for teacher in learned
    }
    return {
        "command": command,
        "date": last.created,
        "machine": f"{detect().title} ({platform.machine()})",
        "versions": ", ".join(f"{name} {version}" for name, version in last.versions.items()),
        "sizes": asdict(cells.sizes),
        "train": len(dataset.train),
        "validation": len(dataset.validation),
        "test": len(dataset.test),
        "teacher": TEACHER,
        "teacher_mflop": teacher["mflop"],
        "teacher_parameters": teacher["parameters"],
        "students": sorted((size_of(arch, dataset) for arch in STUDENTS), key=lambda entry: float(entry["mflop"])),
        **tables(Results(found, taus, dataset.test.labels, timing.read(cells))),
        "pools": {name: seeds for name, seeds in pools.items() if seeds},
        "finished": len(found),
        "hours": sum(one.seconds for one in found.values()) / 3600,
        "failed": failed,
        "not_run": [cell.label for cell in plan(taus) if cell not in done],
        "cells": {
            cell.label: {
                "test": one.test,
                "validation": one.validation,
                "seconds": round(one.seconds, 2),
                "best_epoch": one.best_epoch,
            }
            for cell, one in found.items()
        },
    }


def main() -> int:
    """Trains what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="default: runs/generic_teacher[-quick]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=60.0, help="0: only report what is finished")
    parser.add_argument("--steps", action="store_true", help="time the teachers' training steps in turn, first")
    parser.add_argument("--quick", action="store_true", help="300 images, one epoch; writes into the folder only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path("runs/generic_teacher-quick" if options.quick else "runs/generic_teacher")
    cells = Cells(folder, QUICK if options.quick else Sizes())
    failed: dict[str, str] = {}
    try:
        if options.steps:
            timing.measure(cells)
        if options.minutes:
            failed = run(cells, options.jobs, 60 * options.minutes, lambda text: print(text, file=sys.stderr))
        found = collect(cells, failed, " ".join(["python -m tests.benchmarks.generic_teacher", *sys.argv[1:]]))
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return 1
    if found is None:
        print("no training is finished", file=sys.stderr)
        return 1
    place = folder if options.quick else RESULTS
    place.mkdir(parents=True, exist_ok=True)
    artifact.write_text(place / "generic_teacher.json", json.dumps(found, indent=1) + "\n")
    artifact.write_text(place / "generic_teacher.md", markdown(found))
    print(markdown(found))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
