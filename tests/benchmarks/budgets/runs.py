"""The runs: students that edgestill chooses for six targets, and what two simpler rules choose, on one teacher."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cli.pipeline import Run
from cli.recipe import LoadedRecipe, check
from cli.report.schema import Report, TargetRow, load_report, to_json
from distill.data import catalogue
from distill.students.arch import Arch
from profiles import artifact
from profiles.errors import EdgestillError
from profiles.progress import Progress, Silent, Task
from tests.benchmarks.budgets.report import Priced, by_flops, by_hand
from tests.benchmarks.evidence import images

IMAGES_KIND = "images"
SHARED, COMPARED, STAGES = "shared.json", "compared.json", "stages.json"
_STEPS_DOWN = 4
"""Widths that scaling by hand may step down when a student turns out to be over its limit."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained, and for which limits. latency_ms: this machine's. test: samples; None: all.

    other: (name, device, latency_ms) of the targets that are not attached.
    """

    latency_ms: tuple[float, ...] = (0.25, 0.5, 1.5)
    other: tuple[tuple[str, str, float], ...] = (
        ("pi5", "raspberry-pi-5", 3.0),
        ("orin", "jetson-orin-nano", 1.0),
        ("rtx", "rtx-4060-laptop", 0.5),
    )
    train_size: int | None = None
    test: int | None = None
    epochs: int = 12
    teacher_epochs: int = 12
    teacher: str = "conv-w32-d1-k3"
    choice: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "auto"
    max_samples: int = 20_000
    percentile: float = 99.0

    @property
    def chosen_by(self) -> dict[str, Any]:
        """The recipe's `[student.choice]`."""
        return {"finalists": 2, "trials": 6, **self.choice}


QUICK = Sizes(
    latency_ms=(5000.0,),
    other=(("pi5", "raspberry-pi-5", 3.0),),
    train_size=200,
    test=100,
    epochs=1,
    teacher_epochs=1,
    teacher="conv-w12-d1-k3",
    choice={"widths": [4, 8], "depths": [1], "kernels": [3], "finalists": 1, "trials": 2},
    precision="fp32",
    max_samples=500,
    percentile=50.0,
)


class Deadline:
    """Progress that shows nothing and interrupts the work, as Ctrl-C does, once the time is over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._silent = Silent()

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "samples") -> Iterator[Task]:
        self.advance()
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Goes on, or interrupts."""
        if time.monotonic() > self._end:
            raise KeyboardInterrupt

    def note(self, message: str) -> None:
        """Nothing to show."""


class Budgets:
    """All runs, in one run folder, so that they share teacher, cache and students.

    Args:
        folder: of everything that is made.
        sizes: how much is trained.
        progress: told what is done; may interrupt.
    """

    def __init__(self, folder: Path, sizes: Sizes, progress: Progress | None = None) -> None:
        self.folder, self.sizes, self.progress = folder, sizes, progress or Silent()

    @cached_property
    def images(self) -> Path:
        """Fashion-MNIST: the packaged 10,000 training and 2,000 validation images, the official test split.

        Raises:
            EdgestillError: the data cannot be fetched.
        """
        place = self.folder / "images"
        key = artifact.content_key(IMAGES_KIND, catalogue.FASHION_FILES, self.sizes.train_size, self.sizes.test)
        if artifact.current(place, IMAGES_KIND, key) is None:
            rows = {"train": self.sizes.train_size, "validation": self.sizes.test, "test": self.sizes.test}
            with artifact.create(place, IMAGES_KIND, key) as temporary:
                for split, part in self._splits().items():
                    few = slice(rows[split])
                    np.savez_compressed(temporary / f"{split}.npz", images=part.images[few], labels=part.classes[few])
        return place

    def _splits(self) -> Mapping[Any, images.Images]:
        if self.sizes.test is None:
            return images.fashion()
        small = images.read_npz(catalogue.fetch("fashion-mnist-small"))
        return {
            name: images.Images(small[f"{name}_images"], small[f"{name}_labels"])
            for name in ("train", "validation", "test")
        }

    @property
    def attached(self) -> dict[str, float]:
        """The limits of this machine's targets, by name."""
        return {f"here-{limit:g}": limit for limit in self.sizes.latency_ms}

    def run(self, student: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> Run:
        """A run of these targets in the one folder."""
        sizes = self.sizes
        values = {
            "name": "budgets",
            "objective": "kd",
            "plain_students": False,
            "data": {
                "source": "npz",
                "path": "train.npz",
                "validation_path": "validation.npz",
                "test_path": "test.npz",
                "classes": list(catalogue.entry_of("fashion-mnist").classes),
                "augment": {"flip": True, "views": 4},
            },
            "teacher": {"kind": "train", "arch": sizes.teacher, "epochs": sizes.teacher_epochs},
            "student": dict(student),
            "train": {"epochs": sizes.epochs, "learning_rate": 0.004},
            "measure": {"max_samples": sizes.max_samples},
            "target": [{"precision": sizes.precision, "percentile": sizes.percentile, **target} for target in targets],
        }
        loaded = LoadedRecipe(check(values, "tests.benchmarks.budgets"), self.images, "tests.benchmarks.budgets")
        return Run(loaded, self.folder / "run", progress=self.progress)

    def shared_run(self) -> Run:
        """The run whose students edgestill chooses."""
        targets = [{"name": name, "latency_ms": limit} for name, limit in self.attached.items()]
        targets += [{"name": name, "device": device, "latency_ms": limit} for name, device, limit in self.sizes.other]
        return self.run({"pool": "conv", "choice": self.sizes.chosen_by}, targets)

    def choose(self) -> Report:
        """Runs it, or goes on with it. The time of its stages is summed up over interruptions."""
        run = self.shared_run()
        try:
            report = run.report()
        finally:
            self._remember(run)
        artifact.write_text(self.folder / SHARED, to_json(report))
        return report

    def _remember(self, run: Run) -> None:
        seconds = self.stages()
        for stage in run.stages:
            if not stage.cached:
                seconds[stage.name] = seconds.get(stage.name, 0.0) + stage.seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        artifact.write_text(self.folder / STAGES, json.dumps(seconds, indent=1) + "\n")

    def stages(self) -> dict[str, float]:
        """Seconds of everything that the shared run did, by stage."""
        path = self.folder / STAGES
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def prices(self) -> dict[Arch, Priced]:
        """What every member of the pool was found to cost on this machine, in milliseconds by precision.

        Raises:
            EdgestillError: this machine was not priced yet.
        """
        run = self.shared_run()
        assert run.budgets is not None
        if run.budgets.pricing.missing(run.budgets.pool):
            raise EdgestillError("the pool has not been priced yet")
        costs = run.budgets.pricing.costs(run.budgets.pool)[next(iter(self.attached))]
        return {
            arch: Priced(
                run.budgets.pricing.work(arch),
                {name: cost.latency_ms for name, cost in found.items() if cost.latency_ms is not None},
            )
            for arch, found in costs.items()
        }

    def compare(self) -> dict[str, dict[str, TargetRow]]:
        """By rule and target: what two simpler rules get on this machine. The students are trained as the others are.

        By hand: the widest of one shape that is within the limit when it is measured. By FLOPs: see `by_flops`; nobody
        looks at the result, which is the point of such a rule.
        """
        prices = self.prices()
        steps = dict.fromkeys(self.attached, 0)
        while True:
            wanted: list[dict[str, Any]] = []
            for name, limit in self.attached.items():
                hand = by_hand(prices, limit)
                place = min(steps[name], len(hand) - 1)
                wanted.append({"name": f"{name}--hand", "arch": str(hand[place]), "latency_ms": limit})
                wanted.append({"name": f"{name}--flops", "arch": str(by_flops(prices, limit)), "latency_ms": limit})
                wanted[-1]["precision"] = "fp32"  # the count says nothing about others
            report = self.run({}, wanted).report()
            rows = {row.name: row for row in report.targets}
            over = [
                name
                for name, limit in self.attached.items()
                if rows[f"{name}--hand"].verdict != "pass"
                and steps[name] < min(_STEPS_DOWN, len(by_hand(prices, limit)) - 1)
            ]
            if not over:
                artifact.write_text(self.folder / COMPARED, to_json(report))
                return {rule: {name: rows[f"{name}--{rule}"] for name in self.attached} for rule in ("hand", "flops")}
            for name in over:
                steps[name] += 1

    def stored(self) -> Report | None:
        """What `choose` found last; None before it was finished."""
        path = self.folder / SHARED
        return load_report(path) if path.is_file() else None
