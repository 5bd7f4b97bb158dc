"""What the training tests share: a small learnable data set, a student, a teacher, and one call to `train`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from distill.data.dataset import Dataset, InputSpec, Split, Task
from distill.data.section import AugmentSection
from distill.objectives.compose import Composition, build_objective, head_size
from distill.objectives.section import ObjectiveSections, describe_objectives
from distill.students import Student, build_student
from distill.students.section import StudentSection
from distill.train_section import TrainSection
from distill.training import TrainResult, train
from profiles.progress import Silent

SIDE = 8
# the toy teacher's embedding has 10 dimensions, of which its head reads 3
OBJECTIVES = [
    pytest.param({"kind": entry.kind, **({"subclasses_per_class": 4} if entry.kind == "lelp" else {})}, id=entry.kind)
    for entry in describe_objectives()
]


@dataclass(frozen=True)
class Cache:
    """Teacher outputs in memory, as the loop reads them."""

    train_embedding: np.ndarray[Any, Any] | None
    train_logits: np.ndarray[Any, Any] | None
    key: str = "cache"
    views: int = 1
    head_weight: np.ndarray[Any, Any] | None = None
    head_bias: np.ndarray[Any, Any] | None = None


def dataset(rows: int = 96, task: Task = "multiclass", tokens: bool = False) -> Dataset:
    """Four classes, each a noisy pattern; 48 validation samples."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (4, 3, SIDE, SIDE))

    def split(n: int) -> Split:
        classes = rng.integers(0, 4, n)
        if tokens:
            inputs = rng.integers(0, 4, (n, 6)) + 4 * classes[:, None]
        else:
            inputs = (patterns[classes] + rng.integers(0, 56, (n, 3, SIDE, SIDE))).astype(np.uint8)
        if task == "multiclass":
            return Split(inputs, classes.astype(np.int64))
        labels = np.eye(4, dtype=np.uint8)[classes]
        labels[:, 3] |= labels[:, 0]
        return Split(inputs, labels, rng.random((n, 4)) > 0.1)

    spec = (
        InputSpec("tokens", (6,), vocabulary=16)
        if tokens
        else InputSpec("image", (3, SIDE, SIDE), (0.4,) * 3, (0.2,) * 3)
    )
    return Dataset(
        "toy", task, ("a", "b", "c", "d"), spec, split(rows), split(48), split(8), f"toy-{rows}-{task}-{tokens}"
    )


def cache(data: Dataset, views: int = 1) -> Cache:
    """A teacher that knows the classes well: embeddings of 10 dimensions, logits of 4."""
    rng = np.random.default_rng(1)
    labels = data.train.labels if data.task == "multilabel" else np.eye(4)[data.train.labels]
    signed = labels.astype(np.float32) * 2 - 1
    logits = signed[None] * 3 + rng.normal(size=(views, *signed.shape))
    embedding = signed[None] @ rng.normal(size=(4, 10)) + 0.3 * rng.normal(size=(views, len(signed), 10))
    return Cache(embedding.astype(np.float16), logits.astype(np.float16), views=views)


class _Conv(nn.Module):
    """Two convolutions, optionally with BatchNorm and dropout; embedding of 12."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        extra: list[nn.Module] = [nn.BatchNorm2d(8), nn.Dropout(0.1)] if norm else []
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            *extra,
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x.float() - 100) / 50).flatten(1)


class _Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x).mean(1)


def student(seed: int = 0, norm: bool = True, tokens: bool = False, head: int = 4) -> Student:
    """A student whose initial weights are a function of the seed; `head` outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Student("toy", _Text() if tokens else _Conv(norm), 12, head)


@dataclass(frozen=True)
class Case:
    """One call to `train`; `run` makes fresh modules each time, as a new process would."""

    objective: Any = "kd"
    section: TrainSection = field(default_factory=lambda: TrainSection(epochs=2, batch_size=16))
    augmentation: AugmentSection = field(default_factory=lambda: AugmentSection(crop=1, flip=True, views=2))
    data: Dataset = field(default_factory=dataset)
    seed: int = 0
    norm: bool = True
    views: int = 2
    arch: str | None = None
    """A student of the shipped families instead of the toy."""

    def with_(self, **train_keys: Any) -> Case:
        """The same with other keys of `[train]`."""
        return replace(self, section=self.section.model_copy(update=train_keys))

    def build(self) -> tuple[Student, Composition, Cache]:
        """Fresh student and objective, and the teacher's outputs."""
        sections = TypeAdapter(ObjectiveSections).validate_python(self.objective)
        head = head_size(sections, 4)
        if self.arch is None:
            net = student(self.seed, self.norm, self.data.input.kind == "tokens", head)
        else:
            net = build_student(StudentSection(arch=self.arch), self.data.input, head, seed=self.seed, base=Path())
        teacher = cache(self.data, self.views)
        objective = build_objective(
            sections,
            self.data,
            teacher,
            student_dim=net.embedding_dim,
            hard_weight=self.section.hard_weight,
            seed=self.seed,
        )
        return net, objective, teacher

    def run(self, folder: Path, progress: Any = None, **options: Any) -> tuple[TrainResult, Student, Composition]:
        """Trains and returns what `train` returned and changed."""
        net, objective, teacher = self.build()
        result = train(
            net,
            objective,
            self.data,
            options.pop("teacher", teacher),
            self.section,
            self.augmentation,
            folder,
            seed=self.seed,
            progress=progress,
            device=options.pop("device", "cpu"),
            **options,
        )
        return result, net, objective


class StopAfter(Silent):
    """Progress that presses Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.notes: list[str] = []

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "samples") -> Iterator[Any]:
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    def note(self, message: str) -> None:
        self.notes.append(message)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether all parameters and buffers agree bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
