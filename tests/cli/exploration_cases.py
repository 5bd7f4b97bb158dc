"""Small recipes whose students explore, on real images and short texts, for the tests of runs, studies and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.cli.strategy_cases import TRAINED, make_data, write

VAE = "generator = {latent = 4, width = 4, epochs = 1, batch_size = 32, learning_rate = 0.002}\n"
GENERATORS = """
import torch
from torch import nn


class Halves(nn.Module):
    def __init__(self, broken=False, side=28):
        super().__init__()
        self.factor, self.side = float("nan") if broken else 1.0, side

    def encode(self, images):
        return nn.functional.avg_pool2d(images, 2)

    def decode(self, latents):
        return nn.functional.interpolate(latents, self.side) * self.factor


def make(broken=False, side=28):
    return Halves(broken, side)
"""


def make_all(folder: Path) -> None:
    """What `make_data` makes, samples of several labels, texts, and generators of the user's."""
    make_data(folder)
    with np.load(folder / "three.npz") as stored:
        images = stored["images"]
    random = np.random.default_rng(0)
    np.savez_compressed(folder / "many.npz", images=images, labels=random.integers(0, 2, (len(images), 3)))
    np.savez_compressed(folder / "more.npz", images=255 - images[:60])
    (folder / "exploration_generator.py").write_text(GENERATORS)
    rows = [f"{text} number {number},{label}" for number in range(30) for text, label in (("good", 1), ("bad", 0))]
    (folder / "films.csv").write_text("\n".join(["text,label", *rows]) + "\n")


def explored(
    folder: Path,
    explore: str,
    objective: str = '"kd"',
    *,
    kind: str = TRAINED,
    teacher: str = "",
    data: str = "",
    train: str = "",
    name: str = "small",
    epochs: int = 1,
    targets: str = "",
    views: int = 1,
) -> str:
    """A recipe in `folder`. explore: keys of `[explore]`; data: further keys of `[data]` or tables below it."""
    path = Path(
        write(
            folder,
            teacher,
            objective,
            kind=kind,
            train=train,
            name=name,
            epochs=epochs,
            targets=targets,
            views=views,
        )
    )
    text = path.read_text().replace("[data.augment]", f"{data}\n[data.augment]", 1)
    path.write_text(text.replace("[student]", f"[explore]\n{explore}\n[student]", 1))
    return str(path)


def films(folder: Path, explore: str, *, name: str = "films") -> str:
    """A recipe on the texts."""
    path = folder / f"{name}.toml"
    path.write_text(
        '[data]\nsource = "csv"\npath = "films.csv"\ntext_column = "text"\nlabel_column = "label"\nlength = 8\n'
        f'[teacher]\narch = "text-w32-d1-h2"\nepochs = 1\n[explore]\n{explore}\n[train]\nepochs = 1\nbatch_size = 16\n'
        '[student]\narch = "text-w16-d1-h2"\n'
        '[[target]]\nname = "rtx"\ndevice = "rtx-4060-laptop"\nprecision = "fp32"\n'
    )
    return str(path)
