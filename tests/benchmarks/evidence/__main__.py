"""Which method wins where: the studies of few classes, of texts and of embeddings of another task, and what they say.

    python -m tests.benchmarks.evidence [--folder runs/evidence] [--jobs 2] [--minutes 120] [NAME ...]

Prepares what is missing (see `prepare`), runs the studies one after the other, each by the recipe of its name in
recipes/, and writes results/evidence.json and .md beside this folder. Each NAME is a study (default: all). Finished
trainings stay in the folder, so the same command goes on; what time was too short for is listed in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

# read by the OpenMP runtime when it is loaded, which importing torch does; the command line sets the same
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np

from cli.console import make_progress
from cli.pipeline.study import Study
from cli.pipeline.study_report import build_study_report
from cli.recipe import load_recipe
from cli.report.study_schema import ComparisonRow, StudyReport
from distill.study import compare, over_samples
from profiles.errors import EdgestillError, Interrupted
from tests.benchmarks.evidence.images import label_sets
from tests.benchmarks.evidence.prepare import prepare

RESULTS = Path(__file__).parents[1] / "results"
STUDIES = {
    "few-class-parity": "Few classes: parity of the class number",
    "few-class-parity-lelp": "Few classes: LELP's settings, one at a time, on parity",
    "few-class-upper-body": "Few classes: upper-body garment or not",
    "text-binary": "Texts: positive or negative movie snippets, fine-tuned teacher",
    "embeddings-text": "Embeddings of another task: frozen MiniLM, movie snippets",
    "embeddings-image": "Embeddings of another task: frozen EfficientNet-Lite0 (ImageNet), Fashion-MNIST",
}
"""In the order in which they run. Each has the recipe of its name, but for those of VARIED."""
VARIED: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "few-class-parity-lelp": (
        "few-class-parity",
        {
            "data.train_size": [10000],
            "objective": [
                "supervised",
                "kd",
                "lelp",
                *({"kind": "lelp", "tau": tau} for tau in (2.0, 4.0)),
                *({"kind": "lelp", "subclasses_per_class": size} for size in (4, 16)),
                {"kind": "lelp", "beta": 2.0},
                {"kind": "lelp", "null_space": False},
                {"kind": "lelp", "rotation": False},
            ],
        },
    )
}
"""Studies in the folder of another one, whose teacher and trainings they share, and what they vary instead."""
ORACLES = {"few-class-parity": "parity", "few-class-upper-body": "upper-body"}
ORACLE = "few-class-ten"
ORACLE_ROW = "oracle: the ten true classes"
Array = np.ndarray[Any, Any]


class Evidence:
    """One folder with what the studies read and what they found."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder, self.jobs = folder, jobs

    def study(self, name: str) -> Study:
        """The study of a recipe, in its folder."""
        recipe, vary = VARIED.get(name, (name, {}))
        loaded = load_recipe(str(self.folder / f"{recipe}.toml"))
        return Study(loaded, self.folder / "studies" / recipe, vary=vary, jobs=self.jobs, progress=make_progress())

    def run(self, name: str) -> None:
        """Trains what is missing; the few-class studies want the oracle's trainings, too."""
        self.study(name).run()
        if name in ORACLES:
            self.study(ORACLE).run()

    def report(self, name: str) -> dict[str, Any] | None:
        """What the finished cells of a study, made by the recipe as it is now, say; None when none is finished."""
        study = self.study(name)
        finished = study.finished()
        if not finished:
            return None
        found = build_study_report(study)
        blocks = [_block(found, block) for block in found.blocks]
        if name in ORACLES:
            for block in blocks:
                row = self._oracle(study, ORACLES[name], block)
                if row is not None:
                    block["rows"].append(row)
        return {
            "title": STUDIES[name],
            "created": found.created,
            "machine": found.machine.title,
            "versions": found.versions,
            "classes": len(found.data.labels),
            "test": found.n_test,
            "teachers": [teacher.model_dump(mode="json") for teacher in found.teachers],
            "control": found.control,
            "seeds": found.seeds,
            "student": found.cells[0].arch,
            "student_parameters": found.cells[0].parameters,
            "train": study.loaded.recipe.train.model_dump(mode="json", exclude_none=True),
            "blocks": blocks,
            "not_run": [cell.label for cell in study.cells if cell not in finished],
            "notes": list(found.notes),
        }

    def _oracle(self, study: Study, label_set: str, block: Mapping[str, Any]) -> dict[str, Any] | None:
        """The student that learned the ten true classes from the labels, its probabilities summed to the two.

        Its images are others of the same 30,000: each label set stratifies its own subset.
        """
        fine = self.study(ORACLE)
        factors = block["factors"]
        test = study.base(study.grid.combinations[0]).dataset.test
        control = {
            cell.seed: cell.logits()
            for cell in study.finished()
            if cell.combination.method == study.grid.control and cell.combination.factors == factors
        }
        ten = [cell for cell in fine.finished() if cell.combination.factors == factors]
        coarse = label_sets(np.arange(10, dtype=np.uint8))[label_set].astype(int)
        if not np.array_equal(coarse[fine.base(fine.grid.combinations[0]).dataset.test.labels], test.labels):
            raise AssertionError("the two data sets have different test rows")
        pairs = [(_summed(cell.logits(), coarse), control[cell.seed]) for cell in ten if cell.seed in control]
        if not pairs:
            return None
        ours = [float((a.argmax(1) == test.labels).mean()) for a, _ in pairs]
        theirs = [float((b.argmax(1) == test.labels).mean()) for _, b in pairs]
        samples = over_samples("multiclass", [a for a, _ in pairs], [b for _, b in pairs], test.labels)
        found = compare(ours, theirs, samples)
        return {
            "method": ORACLE_ROW,
            "mean": mean(ours),
            "sd": stdev(ours) if len(ours) > 1 else None,
            "seconds": mean(cell.read().seconds for cell in ten),
            "difference": found.bootstrap.value,
            "bootstrap": (found.bootstrap.low, found.bootstrap.high),
            "seeds_interval": found.seeds,
            "samples_interval": (samples.low, samples.high),
            "wins": found.bootstrap.wins,
            "ties": found.ties,
            "n": found.bootstrap.n,
            "outcome": found.outcome,
        }


def _summed(logits: Array, coarse: Array) -> Array:
    """(N, 10) logits -> (N, 2) log-probabilities of the coarse classes."""
    shifted = logits - logits.max(1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    return np.log(np.stack([probabilities[:, coarse == each].sum(1) for each in (0, 1)], 1) + 1e-30)


def _block(report: StudyReport, block: Any) -> dict[str, Any]:
    rows = []
    for row in block.rows:
        entry = {"method": row.method, "mean": row.mean, "sd": row.sd, "seconds": row.seconds, "n": len(row.test)}
        against: ComparisonRow | None = row.to_control
        if against is not None:
            entry |= {
                "difference": against.difference,
                "bootstrap": against.bootstrap if against.n > 1 else None,
                "seeds_interval": against.seeds_interval,
                "samples_interval": against.samples_interval,
                "wins": against.wins,
                "ties": against.ties,
                "n": against.n,
                "outcome": against.outcome,
            }
        rows.append(entry)
    return {"factors": block.factors, "train_samples": block.train_samples, "rows": rows}


def markdown(found: Mapping[str, Any]) -> str:
    """The results as tables."""
    lines = [
        "# Which method wins where",
        "",
        "`python -m tests.benchmarks.evidence` trains what is missing and writes this file. This one: "
        f"`{found['command']}`, {found['date']}; {found['machine']}; {found['versions']}.",
        "",
        "Accuracy on the test split of the epoch that validation chose, mean ± standard deviation over seeds, in "
        "percent. Differences to the plain student (`supervised`) in points, paired by seed: 95 % percentile bootstrap "
        "over seeds (too narrow for five seeds), Student's t over seeds, bootstrap over test samples. *higher* and "
        "*lower* need both of the last two on one side of zero. Each interval holds by itself, not for all comparisons "
        "together. The seeds share the training samples, the teacher and the augmented views, so no interval covers "
        "another draw of them. Seconds are of one student's training, wall-clock, on cores that other programs may "
        "have shared.",
        "",
    ]
    for name, study in found["studies"].items():
        lines += ["", f"## {study['title']}", "", _facts(name, study, found["facts"]), ""]
        for block in study["blocks"]:
            lines += [*_table(block), ""]
        if study["not_run"]:
            lines += [f"Not run ({len(study['not_run'])} trainings): {_grouped(study['not_run'])}.", ""]
    missing = [name for name in STUDIES if name not in found["studies"]]
    if missing:
        lines += ["", f"Studies without a finished training: {', '.join(missing)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _grouped(labels: Sequence[str]) -> str:
    """`kd, train_size=500: seeds 3, 4; ...` of cells' labels."""
    seeds: dict[str, list[str]] = {}
    for label in labels:
        combination, _, seed = label.rpartition(", seed ")
        seeds.setdefault(combination, []).append(seed)
    return "; ".join(f"{name}: seeds {', '.join(found)}" for name, found in seeds.items())


def _facts(name: str, study: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    sentences = [
        f"Student {study['student']} ({study['student_parameters']:,} parameters), {study['classes']} classes, "
        f"{study['test']:,} test samples, {study['seeds']} seeds."
    ]
    for teacher in study["teachers"]:
        arch = f" {teacher['arch']}" if teacher["arch"] else ""
        accuracy = f", test accuracy {100 * teacher['test']:.2f} %" if teacher["test"] is not None else ""
        split = f", {teacher['subclasses']} subclasses per class" if teacher["subclasses"] else ""
        time = f", trained in {teacher['seconds']:.0f} s" if teacher["seconds"] is not None else ""
        whose = f" of {', '.join(teacher['methods'])}" if len(study["teachers"]) > 1 else ""
        sentences.append(
            f"Teacher{whose}: {teacher['kind']}{arch}{split}, "
            f"{teacher['train_samples']:,} training samples{time}{accuracy}."
        )
    references = facts.get("references", {})
    if name == "text-binary" and "tf_idf" in references:
        sentences.append(f"TF-IDF with logistic regression: {_sizes(references['tf_idf'])}.")
    probe = references.get(f"linear_probe/{name}")
    if probe:
        sentences.append(f"Linear probe of the teacher's embeddings: {_sizes(probe)}.")
    return " ".join(sentences)


def _sizes(entries: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{100 * entry['test']:.1f} % with {int(entry['train_size']):,}" for entry in entries.values())


def _table(block: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{block['train_samples']:,} training samples:",
        "",
        "| method | accuracy | - supervised | bootstrap, seeds | t, seeds | bootstrap, test | wins | s | outcome |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in block["rows"]:
        spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.2f}"
        cells = [row["method"], f"{100 * row['mean']:.2f}{spread}"]
        if "difference" in row:
            wins = f"{row['wins']}/{row['n']}" + (f", {row['ties']} tied" if row["ties"] else "")
            cells += [f"{100 * row['difference']:+.2f}"]
            cells += [_points(row[name]) for name in ("bootstrap", "seeds_interval", "samples_interval")]
            cells += [wins, f"{row['seconds']:.0f}", row["outcome"]]
        else:
            cells += ["", "", "", "", "", f"{row['seconds']:.0f}", "control"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _points(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


def _run_for(evidence: Evidence, names: Sequence[str], seconds: float) -> None:
    """Runs the studies until the time is up, as if Ctrl-C were pressed then."""
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        for name in names:
            evidence.run(name)
    except (Interrupted, KeyboardInterrupt):
        print("the time is up; what is finished is reported, and the same command goes on", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    """Prepares and trains what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=120.0, help="0: only report what is finished")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in STUDIES]
    if unknown:
        parser.error(f'"{unknown[0]}" is none of {", ".join(STUDIES)}')
    evidence = Evidence(options.folder, options.jobs)
    try:
        prepare(options.folder)
        if options.minutes:
            _run_for(evidence, options.names or list(STUDIES), 60 * options.minutes)
        studies = {name: found for name in STUDIES if (found := evidence.report(name)) is not None}
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return 1
    if not studies:
        print("no training is finished", file=sys.stderr)
        return 1
    last = max(studies.values(), key=lambda study: str(study["created"]))
    found = {
        "command": " ".join(["python -m tests.benchmarks.evidence", *sys.argv[1:]]),
        "date": last["created"],
        "machine": last["machine"],
        "versions": ", ".join(f"{name} {version}" for name, version in last["versions"].items()),
        "facts": json.loads((options.folder / "facts.json").read_text(encoding="utf-8")),
        "studies": studies,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "evidence.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "evidence.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
