"""What the tests of exploration share: a small real generator, a teacher, and one call to `train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.data.dataset import Dataset, InputSpec, Split
from distill.data.text import encode, train_tokenizer
from distill.data.unlabelled import Unlabelled
from distill.exploration.explore import Exploration
from distill.exploration.generated import GeneratedSet
from distill.exploration.generator import ImageGenerator, TextGenerator
from distill.exploration.section import ExploreSection
from distill.networks import fingerprint
from distill.objectives.compose import Composition
from distill.strategy import Step, Strategy
from distill.students import Student
from distill.teachers.teacher import ModuleTeacher, Teacher
from distill.training import TrainResult, train
from profiles.errors import Interrupted
from tests.distill.training_cases import Case, StopAfter, cache, student


class _Linear(nn.Module):
    """Mean (P,) and principal axes (d, P) of flattened images."""

    mean: Tensor
    axes: Tensor

    def __init__(self, mean: Tensor, axes: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("axes", axes)


class PCA(ImageGenerator):
    """The principal components of the images as an autoencoder, in float32 or float64."""

    network: _Linear

    def __init__(self, inputs: np.ndarray[Any, Any], dimensions: int = 5, dtype: torch.dtype = torch.float32) -> None:
        self.shape = inputs.shape[1:]
        flat = torch.from_numpy(np.asarray(inputs)).flatten(1).double()
        mean = flat.mean(0)
        _, values, axes = torch.linalg.svd(flat - mean, full_matrices=False)
        self.latent_std = (values[:dimensions] / len(flat) ** 0.5).to(dtype)
        self.network = _Linear(mean.to(dtype), axes[:dimensions].to(dtype))
        self.network.eval()
        self.key = fingerprint(self.network)
        self.calls_until_nan: int | None = None
        """Calls of `decode` that are still sound; None: all."""

    def encode(self, images: Tensor) -> Tensor:
        return (images.flatten(1).to(self.network.mean) - self.network.mean) @ self.network.axes.T

    def decode(self, latents: Tensor) -> Tensor:
        pixels = latents @ self.network.axes + self.network.mean
        if self.calls_until_nan is not None:
            self.calls_until_nan -= 1
            if self.calls_until_nan < 0:
                pixels = pixels * torch.nan
        return pixels.view(-1, *self.shape).clamp(0, 255)

    def to(self, device: Any) -> PCA:
        self.network.to(device)
        self.latent_std = self.latent_std.to(device)
        return self


class Swapping(TextGenerator):
    """Swaps one word of each text for one of its own, by the seed."""

    def __init__(self, words: Sequence[str]) -> None:
        self.network, self.key, self.words = nn.Identity(), "-".join(words), list(words)

    def refill(self, texts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        found = []
        for text, seed in zip(texts, seeds, strict=True):
            parts = text.split()
            rng = np.random.default_rng(seed)
            parts[rng.integers(len(parts))] = self.words[rng.integers(len(self.words))]
            found.append(" ".join(parts))
        return found

    def to(self, device: object) -> Swapping:
        return self


def texts_dataset(folder: Path) -> Dataset:
    """Four classes of texts of five words, tokenised; the tokenizer lies in `folder`."""
    rng = np.random.default_rng(3)
    words = np.array([["a", "ab"], ["b", "ba"], ["c", "cd"], ["d", "dc"]])  # few letters: the students have few tokens
    labels = np.arange(64) % 4
    texts = tuple(" ".join(words[label][rng.integers(0, 2, 5)]) for label in labels)
    tokenizer = train_tokenizer(texts, 16)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = encode(tokenizer, texts, 6)

    def split(rows: slice) -> Split:
        return Split(tokens[rows], labels[rows], texts=texts[rows])

    return Dataset(
        "texts",
        "multiclass",
        ("a", "b", "c", "d"),
        InputSpec("tokens", (6,), vocabulary=16),
        *(split(slice(0, 40)), split(slice(40, 56)), split(slice(56, 64))),
        key="texts",
        tokenizer=folder / "tokenizer.json",
    )


class Looking(Exploration):
    """Keeps what every step learned from, and calls `watch` before and after each exploration."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.seen: list[Any] = []
        self.watch: Callable[[Looking, Step, bool], None] = nothing

    def before_step(self, step: Step) -> None:
        self.watch(self, step, False)
        super().before_step(step)
        self.watch(self, step, True)
        self.seen.append(self._ready)


def nothing(exploration: Looking, step: Step, done: bool) -> None:
    """Watches nothing."""


@dataclass(frozen=True)
class Exploring:
    """One training with an exploration; `run` makes fresh modules each time, as a new process would."""

    section: ExploreSection = field(default_factory=lambda: ExploreSection(kind="random"))
    case: Case = field(default_factory=lambda: Case("kd"))
    unlabelled: Unlabelled | None = None
    generated: GeneratedSet | None = None
    texts: TextGenerator | None = None

    def with_(self, **keys: Any) -> Exploring:
        """The same with other keys of `[explore]`."""
        return replace(self, section=ExploreSection.model_validate({**self.section.model_dump(), **keys}))

    @property
    def data(self) -> Dataset:
        """What is learned on."""
        return self.case.data

    def teacher(self) -> Teacher:
        """A frozen network of its own weights, with BatchNorm and dropout."""
        return ModuleTeacher(decisive(self.data.input.kind == "tokens"))

    def generator(self) -> Any:
        """Fresh, where the kind needs one."""
        if not self.section.generates:
            return None
        return self.texts if self.texts is not None else PCA(self.data.train.inputs)

    def build(self, **options: Any) -> Looking:
        """The strategy with fresh teacher and generator, where `options` have no others."""
        keys: dict[str, Any] = {"generator": self.generator(), "unlabelled": self.unlabelled}
        keys |= {"generated": self.generated} | options
        return Looking(self.section, keys.pop("teacher", None) or self.teacher(), self.data, **keys)

    def student(self) -> tuple[Student, Composition]:
        """Fresh student and objective."""
        net, objective, _ = self.case.build()
        return net, objective

    def run(
        self, folder: Path, progress: Any = None, device: str = "cpu", exploration: Looking | None = None
    ) -> tuple[TrainResult, Student, Looking]:
        """Trains with `exploration`, or a fresh one."""
        exploration = exploration or self.build()
        net, objective = self.student()
        result = self.train(net, objective, folder, exploration, progress=progress, device=device)
        return result, net, exploration

    def plain(self, folder: Path) -> Student:
        """The student of the same training without exploration."""
        net, objective = self.student()
        self.train(net, objective, folder, None)
        return net

    def train(
        self,
        net: Student,
        objective: Composition,
        folder: Path,
        strategy: Strategy | None,
        *,
        coached: bool = False,
        **options: Any,
    ) -> TrainResult:
        """One call to `train`; `coached`: without cached outputs of a teacher."""
        return train(
            net,
            objective,
            self.data,
            None if coached else cache(self.data, self.case.views),
            self.case.section,
            self.case.augmentation,
            folder,
            seed=self.case.seed,
            strategy=strategy,
            **{"device": "cpu", **options},
        )


def decisive(tokens: bool = False, head: int = 4) -> Student:
    """A network with opinions: larger logits than a fresh one's."""
    net = student(7, True, tokens, head)
    with torch.no_grad():
        net.head.weight.mul_(20)
        net.head.bias.zero_()
    return net


def stopped(exploring: Exploring, folder: Path, steps: int) -> None:
    """A training that is interrupted after so many steps."""
    with pytest.raises(Interrupted):
        exploring.run(folder, progress=StopAfter(steps))
