"""What every step of the precision planner buys, on the quickstart's students and on ones whose plain INT8 fails.

    python -m tests.benchmarks.planner [--folder runs/planner] [--quick]

Trains, exports, retrains where the planner does, and measures, by the same `Run` as `edgestill run`: the students of
the built-in recipe `quickstart`, with its own floors and once with none of the metric to lose; and a depthwise network
on the same images whose plain INT8 fails. The gains of its normalisations start spread over orders of magnitude: the
next normalisation takes them back, so it can compute what a network with equal gains does, but one INT8 scale for
all channels of a tensor suits few of them. With ReLU in between the channels can be scaled back, with GELU they cannot.
Writes results/planner.json and .md beside this file. What is finished stays in the folder,
so the same command goes on. Latencies want a quiet machine.

--quick: a few images and one epoch, in a folder of its own and written there only: shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

# read by the OpenMP runtime when it is loaded, which importing torch does; the command line sets the same
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor, nn

from cli.pipeline import Run
from cli.pipeline.run import Shipped
from cli.recipe import LoadedRecipe, check, load_recipe
from export.candidate import Candidate, PlanStep
from profiles import artifact
from profiles.device import detect
from profiles.metrics import Metric
from profiles.progress import Silent

HERE = Path(__file__).parent
RESULTS = HERE / "results"


class Depthwise(nn.Module):
    """Three inverted residuals without sums: images (N, 1, H, W) to logits (N, 10).

    Args:
        act: of the blocks.
        orders: of magnitude between the gains that the blocks' first normalisations start with.
        width: channels of the first block.
    """

    def __init__(self, act: Literal["relu", "gelu"], orders: float, width: int = 12) -> None:
        super().__init__()
        activation = {"relu": nn.ReLU, "gelu": nn.GELU}[act]
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks, channels = [], width
        for out, stride in ((width, 1), (2 * width, 2), (2 * width, 2)):
            hidden = 4 * channels
            blocks += [nn.Conv2d(channels, hidden, 1, bias=False), gained(hidden, orders), activation()]
            blocks += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)]
            blocks += [activation(), nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(image)).mean((2, 3)))
        return logits


def gained(channels: int, orders: float) -> nn.BatchNorm2d:
    """A normalisation whose gains start between 1 and 10^orders, in an order of their own."""
    norm = nn.BatchNorm2d(channels)
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(channels))
    norm.weight.data = 10 ** (orders * order / (channels - 1))
    return norm


@dataclass(frozen=True)
class Case:
    """One run. recipe: a built-in one; else its values. targets: whose plans are told. folder: shared by like runs."""

    title: str
    folder: str
    targets: tuple[str, ...]
    recipe: str | None = None
    changes: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)


def cases(quick: bool) -> tuple[Case, ...]:
    """All runs."""
    few = ("data.train_size=200", "teacher.epochs=1", "train.epochs=1") if quick else ()
    common: dict[str, Any] = {
        "objective": "supervised",
        "data": {"source": "fashion-mnist-small", "train_size": 200 if quick else 3000},
        "train": {"epochs": 1 if quick else 6, "learning_rate": 0.004},
        "measure": {"max_seconds": 2.0 if quick else 10.0, "max_samples": 300 if quick else 5000},
        "export": {"qat_epochs": 1 if quick else 3},
    }

    def depthwise(act: str, orders: float) -> Case:
        student = {
            "kind": "torch",
            "factory": "tests.benchmarks.planner:Depthwise",
            "kwargs": {"act": act, "orders": orders},
        }
        target = {"name": "here", "max_metric_drop": 0.01}
        values = {**common, "name": act, "student": {**student, "input_channels": 1}, "target": [target]}
        title = f"depthwise, {act}, gains from 1 to {10**orders:,.0f}"
        return Case(title, f"depthwise-{act}-{orders:g}", ("here",), values=values)

    changes = ("plain_students=false", f"measure.max_seconds={common['measure']['max_seconds']}", *few)
    strict = ("target.kiosk.max_metric_drop=0",)
    return (
        Case("quickstart", "quickstart", ("this-computer", "kiosk", "door-pi5"), "quickstart", changes),
        Case("quickstart, nothing to lose", "quickstart", ("kiosk",), "quickstart", (*changes, *strict)),
        depthwise("relu", 3),
        depthwise("gelu", 1.5),
        depthwise("gelu", 3),
    )


def run_of(case: Case, folder: Path) -> Run:
    """The case's run, in its folder."""
    if case.recipe is not None:
        return Run(load_recipe(case.recipe, list(case.changes)), folder, progress=Silent())
    loaded = LoadedRecipe(check(case.values, "tests.benchmarks.planner"), HERE.parents[1], "tests.benchmarks.planner")
    return Run(loaded, folder, progress=Silent(), allow_code=True)


def figures(shipped: Shipped) -> dict[str, Any]:
    """What the planner did for one target, and what was chosen."""
    assert shipped.plan is not None
    assert shipped.choice is not None
    measured = {name: found.asked.p50 for name, found in (shipped.measurements or {}).items()}
    steps = [step_figures(step) for step in shipped.plan.steps]
    return {
        "target": shipped.target.name,
        "device": shipped.target.device.title,
        "student": shipped.arch,
        "to_keep": shipped.plan.lowest_metric,
        "steps": [{**step, "bought": bought} for step, bought in zip(steps, gains(steps), strict=True)],
        "files": [candidate_figures(entry, measured, shipped) for entry in shipped.plan.candidates],
        "chosen": shipped.choice.name,
        "why": list(shipped.choice.why),
        "warnings": sorted({line for found in (shipped.measurements or {}).values() for line in found.warnings}),
    }


def interval(metric: Metric | None) -> list[float] | None:
    """Value, and the ends of its 95 % interval."""
    return None if metric is None else [metric.value, metric.low, metric.high]


def step_figures(step: PlanStep) -> dict[str, Any]:
    """One step as plain values."""
    return {
        "name": step.name,
        "metric": interval(step.metric),
        "agreement": step.agreement,
        "seconds": step.seconds,
        "keeps": step.keeps,
        "note": step.note,
    }


def gains(steps: list[dict[str, Any]]) -> list[float | None]:
    """What each step bought over the best INT8 before it, in points; None where it made no INT8 graph, or the first."""
    best: float | None = None
    found: list[float | None] = []
    for step in steps:
        integer = step["name"].startswith("int8") and step["metric"] is not None
        value = step["metric"][0] if integer else None
        found.append(None if value is None or best is None else (value - best) * 100)
        best = value if best is None else max(best, value if value is not None else best)
    return found


def candidate_figures(candidate: Candidate, measured: dict[str, float], shipped: Shipped) -> dict[str, Any]:
    """One file as plain values. ratio: of its median latency to that of FP32, both measured interleaved."""
    assert shipped.choice is not None
    ratio = None
    if candidate.name in measured and "fp32" in measured:
        ratio = measured[candidate.name] / measured["fp32"]
    return {
        "name": candidate.name,
        "metric": interval(candidate.validation),
        "agreement": candidate.parity[-1].agreement if candidate.parity else None,
        "ratio": ratio,
        "computes": candidate.compute_precision,
        "chosen": candidate.name == shipped.choice.name,
        "not_because": candidate.refused or shipped.choice.rejected.get(candidate.name),
    }


def percent(value: float | None) -> str:
    """With one digit."""
    return "-" if value is None else f"{value * 100:.1f}"


def ranged(metric: list[float] | None) -> str:
    """Value and interval, in percent."""
    return "-" if metric is None else f"{percent(metric[0])} [{percent(metric[1])}, {percent(metric[2])}]"


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [
        "# What each step of the precision planner buys",
        "",
        f"{report['date']}, {report['processor']}, torch {report['torch']}, onnxruntime {report['onnxruntime']}; made "
        f"by `{report['command']}`. Top-1 on the 2,000 validation images of the packaged Fashion-MNIST subset, where "
        "candidates are chosen, in percent with the 95 % interval. Agreement: share of 256 held-out samples with the "
        "decision of PyTorch in FP32. Bought: points over the best INT8 before. Latency: median against FP32, measured "
        "interleaved, batch 1; the steps inside the search leave INT8's arithmetic as it is, so only files have one.",
    ]
    for case in report["cases"]:
        lines += ["", f"## {case['title']}"]
        for target in case["targets"]:
            lines += ["", f"**{target['target']}** ({target['device']}), {target['student']}; to keep: "
                      f"{percent(target['to_keep'])} %", ""]  # fmt: skip
            lines += ["| step | top-1 % | agreement % | bought | s | keeps it | |", "|---|---|---:|---:|---:|---|---|"]
            for step in target["steps"]:
                bought = "-" if step["bought"] is None else f"{step['bought']:+.1f}"
                seconds = "-" if step["seconds"] is None else f"{step['seconds']:.1f}"
                keeps = {True: "yes", False: "no", None: "-"}[step["keeps"]]
                cells = [step["name"], ranged(step["metric"]), percent(step["agreement"]), bought, seconds, keeps]
                lines.append(f"| {' | '.join([*cells, step['note'].replace('|', '/')])} |")
            lines += ["", "| file | top-1 % | agreement % | latency to FP32 | |", "|---|---|---:|---:|---|"]
            for entry in target["files"]:
                ratio = "-" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
                said = "**chosen**" if entry["chosen"] else f"not: {entry['not_because']}"
                cells = [entry["name"], ranged(entry["metric"]), percent(entry["agreement"]), ratio, said]
                lines.append(f"| {' | '.join(cells)} |")
            lines += [""] + [f"- {line}" for line in (*target["why"], *target["warnings"])]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs every case and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="default: runs/planner[-quick]")
    parser.add_argument("--quick", action="store_true", help="nothing is written to results")
    options = parser.parse_args(arguments)
    folder = options.folder or Path("runs") / ("planner-quick" if options.quick else "planner")
    found = []
    for case in cases(options.quick):
        run = run_of(case, folder / case.folder)
        run.distill()
        targets = {target.name: target for target in run.targets}
        found.append({"title": case.title, "targets": [figures(run.ship(targets[name])) for name in case.targets]})
        print(f"{case.title}: {', '.join(target['chosen'] for target in found[-1]['targets'])}", file=sys.stderr)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "processor": detect().title,
        "command": "python -m tests.benchmarks.planner" + " --quick" * options.quick,
        "torch": version("torch"),
        "onnxruntime": version("onnxruntime"),
        "cases": found,
    }
    place = folder if options.quick else RESULTS
    place.mkdir(parents=True, exist_ok=True)
    artifact.write_text(place / "planner.json", json.dumps(report, indent=2) + "\n")
    artifact.write_text(place / "planner.md", markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
