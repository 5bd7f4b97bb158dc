"""How near do predicted latencies come to measured ones, on architectures and families that the fit never saw?

    python -m tests.benchmarks.prediction [--per-family 9] [--threads 1]

Calibrates this machine as `edgestill devices calibrate` does (nothing is stored), then exports and measures other
architectures of every family, and writes results/prediction.json, .md and .png beside this folder. About seven minutes
on two quiet cores; a busy machine is refused.

--quick: two architectures of two families, in a folder of its own and written there only, also on a busy machine: shows
that everything runs.

--page: writes the page anew from the JSON that is there, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cli import console
from cli.pipeline.calibrate import Calibrated, Effort, calibrate, export_all, measure_all, this_machine
from cli.pipeline.calibration_models import Sampled, sample_architectures
from profiles import artifact
from profiles.calibration import Observation, predict
from profiles.device import THIS_MACHINE
from profiles.errors import EdgestillError
from profiles.progress import Progress
from tests.benchmarks.prediction.report import Compared, left_out, markdown, scatter, tables

RESULTS = Path(__file__).parents[1] / "results"
QUICK = Effort(
    families=("conv", "textc"), per_family=1, layers=2, runs=8, profiles=1, queries=64, seconds=0.3, probes=1
)
_SEED = 1


def unseen_architectures(effort: Effort, per_family: int) -> tuple[Sampled, ...]:
    """Architectures that the calibration does not measure, whatever their input."""
    seen = [one.arch or "" for one in sample_architectures(effort.per_family, families=effort.families)]
    return sample_architectures(per_family, _SEED, families=effort.families, without=seen)


def compare(calibrated: Calibrated, unseen: tuple[Sampled, ...], effort: Effort, progress: Progress) -> list[Compared]:
    """Measures the architectures and predicts every one of them.

    Raises:
        EdgestillError: the machine was busy, where that is refused.
    """
    calibration = calibrated.calibration
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        models = export_all(unseen, this_machine(THIS_MACHINE), Path(folder), progress)
        observations, busy, _ = measure_all(unseen, models, progress, threads=calibration.threads, effort=effort)
        if busy is not None and calibrated.busy is None:
            raise EdgestillError("the machine was not quiet enough to measure", evidence=busy)
        without = left_out(calibrated.observations, observations)
        return [_compared(one, models[one.model][one.precision], calibrated, without) for one in observations]


def _compared(one: Observation, file: Path, calibrated: Calibrated, without: dict[tuple[str, str], float]) -> Compared:
    found = predict(file, calibrated.calibration, precision=one.precision)
    whole = one.whole_ms["end_to_end"]
    return Compared(
        model=one.model,
        family=one.family,
        precision=one.precision,
        predicted_ms=found.p50_ms,
        measured_ms=one.p50_ms,
        predicted_p99_ms=found.p99_ms,
        measured_p99_ms=whole.get("99"),
        predicted_mib=found.memory_mib,
        measured_mib=one.peak_mib,
        spread=one.spread,
        undisturbed=one.undisturbed,
        whole_ms=whole.get("50", one.p50_ms),
        left_out_ms=without[one.model, one.precision],
    )


def write(calibrated: Calibrated, compared: list[Compared], command: str, place: Path) -> str:
    """Writes JSON, Markdown and picture; returns the Markdown."""
    calibration = calibrated.calibration
    document: dict[str, Any] = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{calibration.processor} ({platform.machine()})",
        "versions": ", ".join(f"{name} {version}" for name, version in calibration.versions.items()),
        "busy": calibrated.busy,
        "calibration": calibration.model_dump(mode="json"),
        "tables": tables(compared),
        "models": [one.model_dump(mode="json") for one in compared],
    }
    page = markdown(document)
    place.mkdir(parents=True, exist_ok=True)
    scatter(compared, place / "prediction.png")
    artifact.write_text(place / "prediction.json", json.dumps(document, indent=1) + "\n")
    artifact.write_text(place / "prediction.md", page)
    return page


def main() -> int:
    """Calibrates, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-family", type=int, default=9, help="unseen architectures of each family")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few models; writes into the folder only")
    parser.add_argument("--page", action="store_true", help="the page again, from the JSON in the folder")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: results, or a run folder")
    options = parser.parse_args()
    if options.page:
        folder = options.folder or RESULTS
        document = json.loads((folder / "prediction.json").read_text(encoding="utf-8"))
        artifact.write_text(folder / "prediction.md", markdown(document))
        return 0
    effort = QUICK if options.quick else Effort()
    progress = console.make_progress()
    try:
        calibrated = calibrate(
            THIS_MACHINE, progress, threads=options.threads, effort=effort, refuse_busy=not options.quick
        )
        unseen = unseen_architectures(effort, 1 if options.quick else options.per_family)
        compared = compare(calibrated, unseen, effort, progress)
    except EdgestillError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    command = " ".join(["python -m tests.benchmarks.prediction", *sys.argv[1:]])
    print(
        write(
            calibrated,
            compared,
            command,
            options.folder or (Path("runs/prediction-quick") if options.quick else RESULTS),
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
