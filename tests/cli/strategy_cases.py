"""A small recipe with a teacher strategy, on real images, for the tests of runs, studies and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distill.data.make_fashion_mnist_small import PACKAGED

_RECIPE = """
name = "small"
objective = {objective}

[data]
source = "npz"
path = "{data}.npz"

[data.augment]
crop = 1
views = {views}

[teacher]
{teacher}

[student]
{student}

[train]
epochs = {epochs}
batch_size = 48
{train}

[export]
calibration_samples = 32
parity_samples = 32

{targets}
"""
SMALL, WIDE = "conv-w4-d1-k3", "conv-w8-d1-k3"
TRAINED = 'arch = "conv-w12-d1-k3"\nepochs = 1\n'
FACTORY = """
from torch import nn


def make(outputs=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.Tanh(), nn.Linear(12, outputs))


def still(outputs=3):
    network = make(outputs)
    for parameter in network.parameters():
        parameter.data.zero_()
    return Detached(network)


class Detached(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x.detach()).detach()
"""


def make_data(folder: Path) -> None:
    """Images of three classes, of which one has a single training sample in `lonely`; outputs of a teacher; code."""
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:240], stored["train_labels"][:240] % 3
    np.savez_compressed(folder / "three.npz", images=images, labels=labels)
    random = np.random.default_rng(0)
    np.save(folder / "logits.npy", random.normal(size=(240, 3)).astype(np.float32))
    (folder / "strategy_teacher.py").write_text(FACTORY)


def target(name: str, arch: str | None = None, more: str = "") -> str:
    """One target; only FP32, which is exported fastest."""
    chosen = "" if arch is None else f'arch = "{arch}"\n'
    return f'[[target]]\nname = "{name}"\ndevice = "rtx-4060-laptop"\nprecision = "fp32"\n{chosen}{more}\n'


def write(
    folder: Path,
    teacher: str,
    objective: str = '"kd"',
    *,
    kind: str = TRAINED,
    train: str = "",
    student: str = "",
    epochs: int = 1,
    targets: str = "",
    views: int = 2,
    name: str = "small",
) -> str:
    """A recipe in `folder`. teacher: keys of `[teacher]` after those of its kind."""
    path = folder / f"{name}.toml"
    path.write_text(
        _RECIPE.format(
            objective=objective,
            data="three",
            teacher=kind + teacher,
            train=train,
            student=student,
            epochs=epochs,
            targets=targets or target("rtx", SMALL),
            views=views,
        )
    )
    return str(path)
