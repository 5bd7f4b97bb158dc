"""A small recipe whose students are chosen from a pool, on real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.data.make_fashion_mnist_small import PACKAGED
from profiles.calibration import Calibration, HeldOut, Times, processor, save_calibration
from profiles.device import detect
from profiles.measurement import Scope

RECIPE = """
name = "small"
plain_students = false

[data]
source = "npz"
path = "three.npz"

[data.augment]
crop = 1
views = 2

[teacher]
arch = "conv-w12-d1-k3"
epochs = 1
{teacher}

[student]
pool = {pool}

[student.choice]
{choice}

[train]
epochs = {epochs}
batch_size = 48

[export]
calibration_samples = 32
parity_samples = 32

[measure]
max_samples = 1500
warmup_seconds = 0.7
max_seconds = 2.0

{targets}
"""
SMALL, WIDE = "conv-w4-d1-k3", "conv-w8-d2-k3"
"""So different that a busy machine, too, tells which of them is cheaper, which decides between equal trials."""
RATIOS: dict[Scope, dict[str, float]] = {
    "end_to_end": {"50": 1.1, "90": 1.2, "95": 1.3, "99": 1.5},
    "compute": {"50": 1.2, "90": 1.3, "95": 1.4, "99": 1.6},
}
"""Of the calibration below."""
FITS_ALL, FITS_NONE = 5000.0, 0.01
"""Limits in milliseconds that do not depend on how fast or busy the machine is."""


def make_data(folder: Path) -> None:
    """Images of three classes."""
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:300], stored["train_labels"][:300] % 3
    np.savez_compressed(folder / "three.npz", images=images, labels=labels)


def target(
    name: str, latency_ms: float, *, device: str = "this-machine", precision: str = "fp32", more: str = ""
) -> str:
    """One target; only FP32 unless said otherwise, which is exported fastest."""
    return (
        f'[[target]]\nname = "{name}"\ndevice = "{device}"\nprecision = "{precision}"\nlatency_ms = {latency_ms}\n'
        f"percentile = 50\n{more}\n"
    )


def write_recipe(
    folder: Path,
    targets: str,
    *,
    pool: str = f'["{SMALL}", "{WIDE}"]',
    choice: str = "finalists = 1\ntrials = 2",
    teacher: str = "",
    epochs: int = 2,
    more: str = "",
) -> Path:
    """The recipe in a file beside the data."""
    path = folder / "small.toml"
    text = RECIPE.format(pool=pool, choice=choice, teacher=teacher, epochs=epochs, targets=targets)
    path.write_text(text + more)
    return path


def calibrate(runtime_version: str, *, efficiency: dict[str, float] | None = None) -> None:
    """Stores a calibration of this machine for one version of its runtime: a microsecond a node, a query five."""
    device = detect()
    times = Times(query=5.0, kinds={}, other={"nodes": 1.0, "bytes": 0.001})
    held = HeldOut(models=30, median_error=0.05, p90_error=0.1, rank_correlation=0.99)
    save_calibration(
        Calibration(
            device=device.name,
            processor=processor(device),
            runtime="onnxruntime",
            runtime_version=runtime_version,
            threads=1,
            batch=(1,),
            date="2026-11-01T00:00:00+00:00",
            versions={},
            times={"fp32": times, "int8": times},
            ratios=RATIOS,
            copying_ms=0.01,
            memory={"process": 60.0},
            held_out={"fp32": held},
            spread=0.02,
            models=60,
            seconds=200.0,
            efficiency=efficiency or {},
        )
    )
