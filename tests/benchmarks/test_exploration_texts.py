"""The evidence on exploration around texts: a tiny encoder as teacher and generator, one cell of every arm."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.data.section import DataSection
from distill.exploration.generated import open_generated
from distill.exploration.section import GeneratorSection
from profiles import artifact
from tests.benchmarks.coached_teacher.tasks import FineTuning
from tests.benchmarks.exploration import cells as grid
from tests.benchmarks.exploration import report, texts
from tests.benchmarks.exploration.task import AUGMENTED, KD, RANDOM, UNLABELLED, Choice

CHOICE = Choice(2.0, 0.1, 1.0)
GOOD = ("very good", "quite funny", "simply brilliant", "a joy")
BAD = ("rather bad", "too long", "a bore", "badly made")
SENTENCES = [
    (f"{subject} {verb} {opinion}, {more}.", label)
    for label, opinions in ((0, BAD), (1, GOOD))
    for subject, verb, opinion, more in itertools.product(
        ("the film", "this movie", "a plot"), ("is", "was"), opinions, ("i think", "sadly or not")
    )
]
TUNING = FineTuning(epochs=1, batch_size=16, length=12)
SIZES = texts.Sizes(
    data=DataSection(
        source="csv",
        path="sentences.csv",
        text_column="text",
        label_column="label",
        split_seed=0,
        test_fraction=0.2,
        length=12,
        vocabulary=100,
    ),
    model="encoder",
    labels=4,
    versions=2,
    student="textc-w16-d1-k3",
    steps=4,
    batch_size=4,
    all_tuning=TUNING,
    few_tuning=TUNING,
    generator_epochs=1,
)
UNLABELLED_TEXTS = "TGT random around unlabelled"


def _encoder(folder: Path) -> None:
    """A random BERT without a head, as MiniLM has none."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import BertWordPieceTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw = BertWordPieceTokenizer(lowercase=True)
    raw.train_from_iterator(
        [text for text, _ in SENTENCES], vocab_size=120, min_frequency=1, show_progress=False, special_tokens=special
    )
    tokenizer = transformers.BertTokenizerFast(tokenizer_object=raw._tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        pad_token_id=0,
    )
    transformers.BertModel(config).save_pretrained(folder)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> texts.SnippetsTask:
    _encoder(tmp_path / "encoder")
    lines = ["text,label", *(f'"{text}",{label}' for text, label in SENTENCES)]
    artifact.write_text(tmp_path / "sentences.csv", "\n".join(lines) + "\n")
    task = texts.SnippetsTask(tmp_path, SIZES)
    monkeypatch.setattr(grid, "open_task", lambda name, root: task)
    return task


def test_every_arm_ends_in_a_cell_that_is_not_made_twice(tiny: texts.SnippetsTask, tmp_path: Path) -> None:
    store = grid.Store(tmp_path)
    facts = tiny.prepare(1)
    assert facts["samples"]["train"] == 8
    assert facts["samples"]["unlabelled"] == 16
    assert facts["counts"] == [4, 4]
    planned = grid.grid([tiny], {tiny.name: CHOICE}, seeds=1)
    students = [cell for cell in planned if isinstance(cell, grid.StudentCell)]
    chosen: list[grid.Cell] = [cell for cell in planned if isinstance(cell, grid.TeacherCell)]
    chosen += [cell for cell in students if cell.knowledge != "few" or cell.arm.name in (KD.name, RANDOM.name)]
    for cell in sorted(chosen, key=lambda cell: isinstance(cell, grid.StudentCell)):
        assert not store.is_done(cell)
        grid.make(cell, tmp_path)
        assert store.is_done(cell)
        assert store.logits(cell).shape == (len(tiny.dataset(0).test), 2)
    found = report.results(store, tiny, chosen, CHOICE, {}, facts, None)
    rows = {row["arm"]: row for row in found["teachers"]["all"]["rows"]}
    assert set(rows) == {arm.name for arm in tiny.arms}
    assert {KD.name, AUGMENTED.name, UNLABELLED.name} <= set(rows[UNLABELLED_TEXTS]["minus"])
    # another process opens what this one made
    again = texts.SnippetsTask(tmp_path, SIZES)
    assert {knows: again.key(knows, 0) for knows in ("all", "few", None)} == {
        knows: tiny.key(knows, 0) for knows in ("all", "few", None)
    }


def test_every_arm_asks_the_teacher_about_as_many_texts(tmp_path: Path) -> None:
    task = texts.SnippetsTask(tmp_path)
    labelled = 2 * task.sizes.labels
    asked = {}
    for arm in task.arms:
        section = task.section(arm, CHOICE)
        if section is not None:
            assert section.batch_size == task.explore_batch
            assert section.versions is not None
            real = labelled if section.around == "train" else labelled * task.sizes.versions
            asked[arm.name] = section.versions * real
    # of the labelled ones as they are, further versions would be the same again
    assert asked.pop(KD.name) == labelled
    assert set(asked.values()) == {labelled * task.sizes.versions}
    assert asked.keys() == {arm.name for arm in task.arms if arm.kind is not None} - {KD.name}


def test_the_unlabelled_texts_are_of_the_rest_of_the_pool(tiny: texts.SnippetsTask) -> None:
    for seed in (0, 1):
        dataset, unlabelled = tiny.dataset(seed), tiny.unlabelled(seed)
        assert dataset.train.texts is not None
        assert unlabelled.texts is not None
        assert not set(dataset.train.texts) & set(unlabelled.texts)
        assert set(unlabelled.texts) < set(tiny.pool.train.texts or ())
        assert len(unlabelled) == len(unlabelled.texts) == 16
    assert set(tiny.unlabelled(0).texts or ()) != set(tiny.unlabelled(1).texts or ())
    assert (tiny.dataset(0).test.labels == tiny.dataset(1).test.labels).all()


def test_dropped_words_are_as_many_as_masked_tokens_and_nothing_else_changes() -> None:
    words = [f"word{number}" for number in range(40)]
    text, dropping = " ".join(words), texts.WordDropping()
    found = dropping.refill([text] * 200, list(range(200)))
    left = [one.split() for one in found]
    assert all(kept == [word for word in words if word in set(kept)] for kept in left)
    shares = [1 - len(kept) / len(words) for kept in left]
    low, high = GeneratorSection(kind="masked-lm", model="any").mask
    assert low - 0.5 / 40 <= min(shares) < low + 0.02
    assert high - 0.02 < max(shares) <= high + 0.5 / 40
    assert np.mean(shares) == pytest.approx((low + high) / 2, abs=0.01)
    assert dropping.refill([text], [7]) == [found[7]]


@pytest.mark.parametrize(("text", "words"), [("one", 1), ("one two", 1), ("", 0), ("a b c", 2)])
def test_a_text_keeps_a_word(text: str, words: int) -> None:
    (found,) = texts.WordDropping().refill([text], [3])
    assert len(found.split()) == words


def _texts_of(task: Any, arm_name: str, folder: Path) -> list[list[str]]:
    arm = next(arm for arm in task.arms if arm.name == arm_name)
    section = task.section(arm, CHOICE)
    task.exploration(section, "all", 0, folder)
    found = open_generated(folder).texts()
    assert found is not None
    return found


def test_every_arm_has_further_texts_of_its_own_generator(tiny: texts.SnippetsTask, tmp_path: Path) -> None:
    tiny.prepare(1)
    real = tiny.dataset(0).train.texts or ()
    refilled, dropped = (
        _texts_of(tiny, name, tmp_path / str(at)) for at, name in enumerate((RANDOM.name, AUGMENTED.name))
    )
    assert len(refilled) == len(dropped) == SIZES.versions
    assert refilled[0] != refilled[1]
    for version in dropped:
        assert all(Counter(short.split()) < Counter(text.split()) for short, text in zip(version, real, strict=True))
    unlabelled = _texts_of(tiny, UNLABELLED_TEXTS, tmp_path / "unlabelled")
    assert [len(version) for version in unlabelled] == [len(tiny.unlabelled(0))]
