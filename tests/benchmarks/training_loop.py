"""How fast the training loop is: against a bare loop, and against torchdistill 1.1.5.

    python -m tests.benchmarks.training_loop [--rounds 7] [--threads 2] [--without-torchdistill]

Writes results/training_loop.json and .md beside this file; exit status 1 when a bound is missed. Rounds are interleaved
and the medians of the rounds' *ratios* are compared, so that a busy machine disturbs both sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import nn

from distill.data.dataset import Dataset, InputSpec, Split
from distill.data.section import AugmentSection
from distill.data.views import augment
from distill.distribution import Processes
from distill.networks import Normalize
from distill.objectives.compose import build_objective
from distill.objectives.section import ObjectiveSections
from distill.students import Student, build_student
from distill.students.section import StudentSection
from distill.train_section import TrainSection
from distill.training import Run
from profiles.progress import Silent
from tests.benchmarks.resnet import Body, resnet

HERE = Path(__file__).parent
RESULTS = HERE / "results"
AUGMENTATION = AugmentSection(crop=4, flip=True, views=4)
CLASSES = 100
ROWS_BARE = 1024
ROWS_TORCHDISTILL = 256
BATCH = 64
BOUND_BARE = 0.9
BOUND_TORCHDISTILL = 2.5


@dataclass(frozen=True)
class Cache:
    """Teacher outputs in memory."""

    train_embedding: np.ndarray[Any, Any] | None
    train_logits: np.ndarray[Any, Any] | None
    key: str = "benchmark"
    views: int = AUGMENTATION.views


def dataset(rows: int, side: int, classes: int) -> Dataset:
    """Random colour images; speed does not depend on what they show."""
    rng = np.random.default_rng(0)

    def split(n: int) -> Split:
        return Split(rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8), rng.integers(0, classes, n))

    spec = InputSpec("image", (3, side, side), (0.5,) * 3, (0.25,) * 3)
    names = tuple(str(name) for name in range(classes))
    return Dataset("random", "multiclass", names, spec, split(rows), split(8), split(8), "random")


def our_round(
    student: Student,
    objective: str,
    data: Dataset,
    cache: Cache,
    batch: int,
    folder: Path,
    device: str = "cpu",
    **keys: Any,
) -> Callable[[], float]:
    """One epoch of our loop per call; samples per second of its steps."""
    sections = TypeAdapter(ObjectiveSections).validate_python(objective)
    composed = build_objective(sections, data, cache, student_dim=student.embedding_dim)
    section = TrainSection(epochs=10_000, batch_size=batch, learning_rate=1e-3, **keys)
    run = Run(
        student, composed, data, cache, section, AUGMENTATION, folder, "benchmark", 0, Processes(torch.device(device))
    )
    run.resume(Silent())

    def epoch() -> float:
        run.train_epoch()
        return float(run.history[-1]["samples_per_second"])

    return epoch


def bare_round(
    student: Student, data: Dataset, batch: int, device: str = "cpu", bf16: bool = False
) -> Callable[[], float]:
    """Forward, cross-entropy, backward, optimiser step on resident data; same student, batch and augmentation."""
    place = torch.device(device)
    student.to(place).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images, labels = (torch.from_numpy(array).to(place) for array in (data.train.inputs, data.train.labels))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    epochs = iter(range(1, 1_000_000))

    def epoch() -> float:
        view = next(epochs) % AUGMENTATION.views
        order = torch.randperm(len(labels)).to(place)
        synchronise(place)
        started = time.perf_counter()
        for rows in torch.split(order[: len(order) // batch * batch], batch):
            inputs = images.index_select(0, rows).contiguous(memory_format=torch.channels_last)
            inputs = augment(inputs, rows, view, 0, AUGMENTATION)
            with torch.autocast(place.type, torch.bfloat16, enabled=bf16):
                head = student(inputs).head
            F.cross_entropy(head.float(), labels.index_select(0, rows)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        synchronise(place)
        return len(order) // batch * batch / (time.perf_counter() - started)

    return epoch


def synchronise(device: torch.device) -> None:
    """Waits for a GPU; a CPU has always finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples per second of every side in every round, the order turned each round; the warm-up round is left out."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(-1, rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            rate = sides[name]()
            if number >= 0:
                found[name].append(rate)
            print(f"round {number + 1}/{rounds} {name}: {rate:,.0f} samples/s", file=sys.stderr)
    return found


def ratios(rates: dict[str, list[float]], over: str) -> dict[str, float]:
    """Median over the rounds of each side's rate divided by the rate of `over`."""
    return {
        name: median(a / b for a, b in zip(values, rates[over], strict=True))
        for name, values in rates.items()
        if name != over
    }


def against_bare(rounds: int, folder: Path) -> dict[str, Any]:
    """Share of the bare loop's throughput for cached KD and EC, for the default student of 32x32 images."""
    data = dataset(ROWS_BARE, 32, 10)
    rng = np.random.default_rng(1)
    cache = Cache(
        rng.normal(size=(AUGMENTATION.views, ROWS_BARE, 256)).astype(np.float16),
        rng.normal(size=(AUGMENTATION.views, ROWS_BARE, 10)).astype(np.float16),
    )

    def student() -> Student:
        return build_student(StudentSection(), data.input, 10, seed=0, base=Path())

    rates = interleave(
        {
            "bare": bare_round(student(), data, 128),
            "kd": our_round(student(), "kd", data, cache, 128, folder / "kd"),
            "ec": our_round(student(), "ec", data, cache, 128, folder / "ec"),
        },
        rounds,
    )
    return {
        "student": student().arch,
        "batch_size": 128,
        "samples_per_second": {name: median(values) for name, values in rates.items()},
        "share_of_bare": ratios(rates, "bare"),
        "bound": BOUND_BARE,
    }


def against_torchdistill(rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """KD from resnet32x4 to resnet8x4; torchdistill runs its teacher in every step, we read the cache."""
    data = dataset(ROWS_TORCHDISTILL, 32, CLASSES)
    torch.manual_seed(0)
    teacher = nn.Sequential(Normalize(data.input.mean, data.input.std), resnet(32, CLASSES)).eval()
    started = time.perf_counter()
    rows, parts = torch.arange(ROWS_TORCHDISTILL), []
    with torch.inference_mode():
        for view in range(AUGMENTATION.views):
            views = augment(torch.from_numpy(data.train.inputs), rows, view, 0, AUGMENTATION)
            parts.append(torch.cat([teacher(batch) for batch in views.split(BATCH)]))  # type: ignore[no-untyped-call]
    cache_seconds = time.perf_counter() - started
    cache = Cache(None, torch.stack(parts).half().numpy())
    body = nn.Sequential(Normalize(data.input.mean, data.input.std), Body(8))
    ours = our_round(Student("resnet8x4", body, 256, CLASSES), "kd", data, cache, BATCH, folder / "resnet")

    np.savez(folder / "images.npz", images=data.train.inputs, labels=data.train.labels)
    command = [str(_torchdistill_python(folder)), str(HERE / "torchdistill_worker.py"), str(folder / "images.npz")]
    command += [str(CLASSES), str(BATCH), str(threads)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None
    assert worker.stdout is not None
    if worker.stdout.readline().strip() != "ready":
        raise SystemExit("torchdistill did not start; its message is above")

    def theirs() -> float:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("round\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    rates = interleave({"torchdistill": theirs, "edgestill": ours}, rounds)
    worker.stdin.close()
    worker.wait()
    speed = {name: median(values) for name, values in rates.items()}
    return {
        "pair": "resnet32x4 to resnet8x4, 32x32, 100 classes, KD tau 4",
        "batch_size": BATCH,
        "samples_per_second": speed,
        "speedup": ratios(rates, "torchdistill")["edgestill"],
        "bound": BOUND_TORCHDISTILL,
        "cache_seconds": cache_seconds,
        "cache_views_per_second": ROWS_TORCHDISTILL * AUGMENTATION.views / cache_seconds,
    }


def _torchdistill_python(folder: Path) -> Path:
    """An environment with torchdistill: EDGESTILL_TORCHDISTILL_PYTHON, or one that is made here with pip."""
    given = os.environ.get("EDGESTILL_TORCHDISTILL_PYTHON")
    if given:
        return Path(given)
    venv.create(folder / "torchdistill", with_pip=True)
    python = folder / "torchdistill" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0", "numpy", "pyyaml>=6.0", "scipy", "cython", "pillow"], check=True)
    subprocess.run([*pip, "--no-deps", "torchdistill==1.1.5", "torchvision==0.28.0"], check=True)
    return python


def markdown(report: dict[str, Any]) -> str:
    """The report as a short table."""
    bare = report["against_bare"]
    lines = [
        "# Training loop",
        "",
        f"{report['date']}, {report['machine']}, {report['threads']} threads, torch {report['torch']}. "
        f"Medians of {report['rounds']} interleaved rounds; ratios are medians of the rounds' ratios.",
        "",
        "| comparison | samples/s | ratio | bound |",
        "|---|---:|---:|---:|",
        f"| bare loop, {bare['student']} | {bare['samples_per_second']['bare']:,.0f} | 1 | |",
    ]
    for name in ("kd", "ec"):
        rate, share = bare["samples_per_second"][name], bare["share_of_bare"][name]
        lines.append(f"| cached {name.upper()}, same student | {rate:,.0f} | {share:.3f} | >= {bare['bound']} |")
    other = report.get("against_torchdistill")
    if other:
        speed = other["samples_per_second"]
        lines += [
            f"| torchdistill 1.1.5, {other['pair']} | {speed['torchdistill']:,.0f} | 1 | |",
            f"| edgestill, same | {speed['edgestill']:,.0f} | {other['speedup']:.2f} | >= {other['bound']} |",
            "",
            f"Building the cache took {other['cache_seconds']:.1f} s once ({other['cache_views_per_second']:,.0f} "
            "views/s), and serves every student and epoch; it is not part of the ratio.",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs both comparisons and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-torchdistill", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        report: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": options.threads,
            "rounds": options.rounds,
            "torch": torch.__version__,
            "against_bare": against_bare(options.rounds, Path(temporary)),
        }
        if not options.without_torchdistill:
            report["against_torchdistill"] = against_torchdistill(options.rounds, options.threads, Path(temporary))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "training_loop.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "training_loop.md").write_text(markdown(report))
    print(markdown(report))
    held = all(share >= BOUND_BARE for share in report["against_bare"]["share_of_bare"].values())
    other = report.get("against_torchdistill")
    return 0 if held and (other is None or other["speedup"] >= BOUND_TORCHDISTILL) else 1


if __name__ == "__main__":
    sys.exit(main())
