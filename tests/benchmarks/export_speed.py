"""How long an export takes: FP32, INT8 and the parity ladder of a student with 300,000 parameters, and once more.

    python -m tests.benchmarks.export_speed [--rounds 7] [--threads 2] [--quick]

Trains the student for one epoch on random images, so that there is a run. Its labels are random, too, so its decisions
are near-ties that INT8 need not keep: with a metric floor and an agreement of 0 plain INT8 is usable, and neither the
search nor a training follows. Then, in every round and each in a process of its own: `plan()` of the export layer and
`edgestill export RUN`, with nothing there and with everything there. The clock of `plan()` starts behind the imports;
that of the command before the interpreter does.

Writes results/export_speed.json and .md beside this file; exit status 1 when the median misses a bound. Wants a quiet
machine with two cores. --quick: one round, written to a temporary folder and printed: shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from profiles.artifact import write_text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
ARCH = "conv-w32-d1-k3"
BOUND_FIRST = 12.0
BOUND_AGAIN = 1.5
ROWS = 1024
RECIPE = """
name = "speed"
objective = "supervised"
[data]
source = "npz"
path = "data.npz"
[student]
family = "conv"
arch = "{arch}"
[train]
epochs = 1
[export]
int8_agreement = 0.0
qat = "never"
[[target]]
name = "here"
device = "this-machine"
metric_floor = 0.0
"""
WORKER = """
import json, sys, time
from pathlib import Path
import numpy as np
import torch
from distill.data.dataset import InputSpec
from distill.students import build_student
from distill.students.section import StudentSection
from export.planning import plan
from export.section import ExportSection
from profiles.device import load_device

arch, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)

class Logits(torch.nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, image):
        return self.student(image).head

spec = InputSpec("image", (3, 32, 32), (0.5,) * 3, (0.25,) * 3)
student = build_student(StudentSection(), spec, 10, arch=arch, seed=0, base=Path())
images = np.random.default_rng(0).integers(0, 256, (768, 3, 32, 32), dtype=np.uint8)
device = load_device("this-machine")
started = time.perf_counter()
found = plan(
    Logits(student).eval(), held_out=images[:512], calibration=images[512:], stack=device.stacks[0], device=device,
    folder=folder, model_key="speed", precisions=("fp32", "int8"),
    section=ExportSection(int8_agreement=0, qat="never"),
)
seconds = time.perf_counter() - started
assert [entry.name for entry in found.usable] == ["fp32", "int8"], found.candidates
print(json.dumps({"seconds": seconds, "reused": list(found.reused),
                  "parameters": sum(parameter.numel() for parameter in student.parameters())}))
"""
START = "import torch, in a process of its own"
CLOCKS = {
    "plan, nothing there": BOUND_FIRST,
    "plan, unchanged": BOUND_AGAIN,
    "edgestill export RUN, nothing there": BOUND_FIRST,
    "edgestill export RUN, unchanged": BOUND_AGAIN,
    START: None,
}
"""Seconds that each may take at most; None: for comparison."""


def environment(threads: int) -> dict[str, str]:
    """Of the processes that are timed. Modules are compiled once, as they are where edgestill is installed."""
    given = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return given | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "1000"}


def started(threads: int) -> float:
    """Seconds in which a new process imports PyTorch and ends: what the command cannot do without."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, env=environment(threads))
    return time.perf_counter() - begun


def planned(folder: Path, threads: int) -> dict[str, Any]:
    """One `plan()` in a new process: its seconds, and what was there already."""
    command = [sys.executable, "-c", WORKER, ARCH, str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(threads), cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def exported(run: Path, threads: int) -> float:
    """Seconds of `edgestill export RUN` in a new process, from its start to its end."""
    command = [sys.executable, "-m", "cli.app", "export", str(run), "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment(threads), cwd=run.parent)
    seconds = time.perf_counter() - started
    candidates = json.loads(done.stdout)["here"]["candidates"]
    assert [entry["name"] for entry in candidates if entry["refused"] is None] == ["fp32", "int8"], candidates
    return seconds


def make_run(folder: Path, threads: int) -> Path:
    """A run whose student is trained."""
    rng = np.random.default_rng(0)
    np.savez(
        folder / "data.npz", images=rng.integers(0, 256, (ROWS, 32, 32, 3), dtype=np.uint8), labels=np.arange(ROWS) % 10
    )
    (folder / "recipe.toml").write_text(RECIPE.format(arch=ARCH))
    command = [sys.executable, "-m", "cli.app", "distill", str(folder / "recipe.toml"), "--out", str(folder / "run")]
    subprocess.run(command, check=True, env=environment(threads), cwd=folder, stdout=subprocess.DEVNULL)
    return folder / "run"


def graphs(run: Path) -> list[Path]:
    """The folders that hold what the export made, whatever they are called."""
    return sorted({path.parent.parent for path in run.rglob("model.onnx")})


def measure(rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """Seconds of every clock in every round; the first round, which fills the disk's cache, is left out."""
    run = make_run(folder, threads)
    seconds: dict[str, list[float]] = {name: [] for name in CLOCKS}
    parameters = 0
    for number in range(rounds + (rounds > 1)):
        shutil.rmtree(folder / "plan", ignore_errors=True)
        for place in graphs(run):
            shutil.rmtree(place)
        first = planned(folder / "plan", threads)
        again = planned(folder / "plan", threads)
        assert first["reused"] == [], first
        assert "fp32" in again["reused"], again
        parameters = first["parameters"]
        found = dict(
            zip(
                CLOCKS,
                (first["seconds"], again["seconds"], exported(run, threads), exported(run, threads), started(threads)),
                strict=True,
            )
        )
        if number or rounds == 1:
            for name, value in found.items():
                seconds[name].append(value)
        print(f"round {number}: {', '.join(f'{name} {value:.2f} s' for name, value in found.items())}", file=sys.stderr)
    return {"arch": ARCH, "parameters": parameters, "seconds": seconds}


def markdown(report: dict[str, Any]) -> str:
    """The report as a short table."""
    lines = [
        "# Speed of the export",
        "",
        f"{report['date']}, {report['machine']}, {report['threads']} threads, torch {report['torch']}, onnxruntime "
        f"{report['onnxruntime']}. Student {report['arch']}, {report['parameters']:,} parameters, FP32 and INT8 with "
        f"the parity ladder. {report['rounds']} rounds, every figure in a process of its own; `plan()` without the "
        "imports, the command with everything.",
        "",
        "| | median | smallest | largest | bound | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, values in report["seconds"].items():
        figures = [f"{value:.2f} s" for value in (median(values), min(values), max(values))]
        bound = CLOCKS[name]
        held = "" if bound is None else "holds" if median(values) <= bound else "missed"
        lines.append(f"| {' | '.join([name, *figures, '' if bound is None else f'{bound:g} s', held])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round; nothing is written to results")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as temporary:
        report: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": options.threads,
            "rounds": rounds,
            "torch": version("torch"),
            "onnxruntime": version("onnxruntime"),
            **measure(rounds, options.threads, Path(temporary)),
        }
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        write_text(RESULTS / "export_speed.json", json.dumps(report, indent=2) + "\n")
        write_text(RESULTS / "export_speed.md", markdown(report))
    print(markdown(report))
    bounds = {name: bound for name, bound in CLOCKS.items() if bound is not None}
    return 0 if all(median(report["seconds"][name]) <= bound for name, bound in bounds.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
