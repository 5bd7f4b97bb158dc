"""The TeacherCache: what the teacher said, for which views, and for nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.data import Dataset, InputSpec, Split
from distill.data.section import AugmentSection
from distill.data.views import augment as augment_images
from distill.students import build_student
from distill.students.section import StudentSection
from distill.teachers import (
    ModuleTeacher,
    TeacherBatch,
    TeacherCache,
    build_cache,
    cache_parts,
    load_teacher,
    open_cache,
)
from distill.teachers.section import TeacherSection
from profiles.errors import EdgestillError, InputError
from profiles.progress import Silent

AUGMENT = AugmentSection(crop=2, flip=True, views=3)
SIZES = {"train": 21, "validation": 6, "test": 5}


def dataset(key: str = "data-1", seed: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)

    def split(count: int) -> Split:
        return Split(generator.integers(0, 256, (count, 1, 12, 12), dtype=np.uint8), generator.integers(0, 4, count))

    return Dataset(
        name="random",
        task="multiclass",
        classes=("a", "b", "c", "d"),
        input=InputSpec("image", (1, 12, 12), (0.5,), (0.3,)),
        train=split(SIZES["train"]),
        validation=split(SIZES["validation"]),
        test=split(SIZES["test"]),
        key=key,
    )


def teacher(seed: int = 0) -> ModuleTeacher:
    spec = dataset().input
    return ModuleTeacher(build_student(StudentSection(), spec, 4, arch="conv-w8-d1-k3", seed=seed, base=Path()))


def build(folder: Path, **changes: Any) -> TeacherCache:
    arguments: dict[str, Any] = {"seed": 7, "batch_size": 8, "dtype": "float32"} | changes
    who = arguments.pop("teacher", None) or teacher()
    data = arguments.pop("dataset", None) or dataset()
    return build_cache(who, data, arguments.pop("augment", AUGMENT), folder, **arguments)


def array_teacher(folder: Path, scale: float = 1.0, **changes: Any) -> Any:
    generator = np.random.default_rng(1)
    np.save(folder / "embeddings.npy", (scale * generator.normal(size=(SIZES["train"], 6))).astype(np.float32))
    section = TeacherSection(kind="array", embeddings="embeddings.npy", **changes)
    return load_teacher(section, dataset(), base=folder)


class Counter(Silent):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.done, self.total, self.notes = 0, 0, list[str]()

    def task(self, title: str, total: int | None, unit: str = "samples") -> Any:
        from contextlib import nullcontext

        self.total = total or 0
        return nullcontext(self)

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_every_view_and_split_holds_what_the_teacher_says_about_those_pixels(tmp_path: Path) -> None:
    who, data = teacher(), dataset()
    cache = build(tmp_path / "cache", teacher=who)
    assert (cache.views, cache.embedding_dim, cache.num_logits, cache.dtype) == (3, 16, 4, "float32")
    assert cache.train_embedding is not None
    assert cache.train_embedding.shape == (3, 21, 16)
    embedding, logits = cache.tensors("train")
    assert embedding is not None
    assert logits is not None
    rows = torch.tensor([4, 17, 2])
    for view in range(3):
        pixels = augment_images(torch.from_numpy(data.train.inputs)[rows], rows, view, 7, AUGMENT)
        expected = who.outputs(TeacherBatch(pixels, "train", rows.numpy()))
        torch.testing.assert_close(embedding[view, rows], expected.embedding, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[view, rows], expected.logits, atol=1e-5, rtol=1e-5)
    assert not torch.equal(embedding[0], embedding[1])
    for split in ("validation", "test"):
        inputs = torch.from_numpy(data.split(split).inputs)
        expected = who.outputs(TeacherBatch(inputs, split, np.arange(len(inputs))))
        found = cache.tensors(split)
        assert found.embedding is not None
        assert found.embedding.shape == (1, SIZES[split], 16)
        torch.testing.assert_close(found.embedding[0], expected.embedding, atol=1e-5, rtol=1e-5)
    # the teacher's head maps its embedding to its logits
    assert cache.head_weight is not None
    assert cache.head_bias is not None
    np.testing.assert_allclose(
        cache.train_embedding @ cache.head_weight.T + cache.head_bias, cache.train_logits, atol=1e-5
    )


def test_the_content_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    one, other = build(tmp_path / "a", batch_size=5), build(tmp_path / "b", batch_size=64)
    np.testing.assert_allclose(one.train_logits, other.train_logits, atol=1e-5)
    assert one.key == other.key


def test_float16_reports_what_it_lost(tmp_path: Path) -> None:
    exact, half = build(tmp_path / "a"), build(tmp_path / "b", dtype="float16")
    assert exact.train_embedding is not None
    assert half.train_embedding is not None
    assert half.train_embedding.dtype == np.float16
    assert half.tensors("train").embedding.dtype == torch.float16  # type: ignore[union-attr]
    difference = np.abs(exact.train_embedding - half.train_embedding.astype(np.float32))
    error = half.reconstruction_error["embedding"]
    assert 0 < error.max_abs < 0.01
    assert error.max_abs >= difference.max() * 0.99  # it covers validation and test as well
    assert 0 < error.relative < 2**-10
    assert exact.reconstruction_error["embedding"].max_abs == 0


def test_values_beyond_float16_are_stored_as_float32_with_a_note(tmp_path: Path) -> None:
    progress = Counter()
    who = array_teacher(tmp_path, scale=1e6)
    clean = AugmentSection(views=1)
    cache = build(tmp_path / "cache", teacher=who, augment=clean, dtype="float16", progress=progress)
    assert cache.dtype == "float32"
    assert cache.train_embedding is not None
    np.testing.assert_array_equal(cache.train_embedding[0], np.load(tmp_path / "embeddings.npy"))
    assert any("does not fit float16" in note for note in progress.notes)


def test_a_finished_cache_is_not_built_again(tmp_path: Path) -> None:
    progress = Counter()
    build(tmp_path / "cache", progress=progress)
    assert progress.done == progress.total == 3 * 21 + 6 + 5
    stamp = (tmp_path / "cache" / "train_logits.npy").stat().st_mtime_ns
    progress = Counter()
    build(tmp_path / "cache", progress=progress)
    assert progress.done == 0
    assert (tmp_path / "cache" / "train_logits.npy").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset": dataset(key="data-2")}, "another data set"),
        ({"teacher": teacher(seed=1)}, "another teacher"),
        ({"augment": AUGMENT.model_copy(update={"crop": 1})}, "another augmentation"),
        ({"augment": AUGMENT.model_copy(update={"views": 2})}, "another number of views"),
        ({"seed": 8}, "another seed"),
        ({"dtype": "float16"}, "another type"),
    ],
)
def test_a_stale_cache_is_refused_and_the_reason_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    build(tmp_path / "cache")
    arguments: dict[str, Any] = {"teacher": teacher(), "dataset": dataset(), "augment": AUGMENT, "seed": 7}
    arguments |= {"dtype": "float32"} | changes
    parts = cache_parts(
        arguments["teacher"],
        arguments["dataset"],
        arguments["augment"],
        seed=arguments["seed"],
        dtype=arguments["dtype"],
    )
    with pytest.raises(InputError, match=f"belongs to {says}\n") as caught:
        open_cache(tmp_path / "cache", parts)
    assert str(tmp_path / "cache") in str(caught.value)


def test_a_clean_cache_serves_any_seed(tmp_path: Path) -> None:
    build(tmp_path / "cache", augment=AugmentSection(views=1), seed=1)
    progress = Counter()
    cache = build(tmp_path / "cache", augment=AugmentSection(views=1), seed=2, progress=progress)
    assert (progress.done, cache.views) == (0, 1)


def test_an_interrupted_build_leaves_nothing_half_written(tmp_path: Path) -> None:
    class Interrupting(Counter):
        def advance(self, amount: int = 1, note: str = "") -> None:
            super().advance(amount)
            if self.done > 30:
                raise KeyboardInterrupt

    build(tmp_path / "cache", seed=1)
    before = (tmp_path / "cache" / "train_logits.npy").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", progress=Interrupting())
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]
    assert (tmp_path / "cache" / "train_logits.npy").read_bytes() == before
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "fresh", progress=Interrupting())
    assert not (tmp_path / "fresh").exists()
    assert build(tmp_path / "fresh").views == 3


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(EdgestillError, match="the disk is full"):
        build(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_cache_file_is_named(tmp_path: Path) -> None:
    build(tmp_path / "cache")
    file = tmp_path / "cache" / "train_logits.npy"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"train_logits\.npy changed after it was written"):
        build(tmp_path / "cache")


def test_the_teacher_is_unchanged_and_a_changing_one_is_caught(tmp_path: Path) -> None:
    who = teacher()
    before = who.fingerprint()
    build(tmp_path / "cache", teacher=who)
    assert who.fingerprint() == before
    next(who.network.buffers()).add_(1)
    assert who.fingerprint() != before
    who.network.train()
    with pytest.raises(EdgestillError, match="train mode"):
        build(tmp_path / "other", teacher=who)

    class Learning(Counter):
        def advance(self, amount: int = 1, note: str = "") -> None:
            with torch.no_grad():
                next(changing.network.parameters()).add_(0.1)

    changing = teacher()
    with pytest.raises(EdgestillError, match="the teacher changed"):
        build(tmp_path / "other", teacher=changing, progress=Learning())
    assert not (tmp_path / "other").exists()


def test_a_teacher_that_gives_nan_is_refused_with_the_row(tmp_path: Path) -> None:
    who = teacher()
    who.network.head.bias.data[2] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(InputError, match=r"logits of the train split are not finite") as caught:
        build(tmp_path / "cache", teacher=who)
    assert "row 0, view 0" in str(caught.value)


def test_stored_outputs_serve_one_view_or_all_when_told_to(tmp_path: Path) -> None:
    who = array_teacher(tmp_path)
    with pytest.raises(InputError, match="only knows the clean samples") as caught:
        build(tmp_path / "cache", teacher=who)
    assert "reuse_clean_teacher" in str(caught.value)
    reuse = AUGMENT.model_copy(update={"reuse_clean_teacher": True})
    cache = build(tmp_path / "cache", teacher=who, augment=reuse)
    assert (cache.views, cache.num_logits, cache.validation_embedding) == (1, None, None)
    assert cache.tensors("validation") == (None, None)
    assert cache.head_weight is None


def test_a_single_logit_is_stored_as_two_with_the_head_that_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"one_logit_{tmp_path.name}"
    code = "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(144, 1))\n"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = dataset()
    two = {split: replace(data.split(split), labels=data.split(split).labels % 2) for split in SIZES}
    data = replace(data, classes=("no", "yes"), **two)
    section = TeacherSection(kind="torch", factory=f"{name}:net", input_channels=1)
    who = load_teacher(section, data, base=tmp_path, allow_code=True)
    cache = build(tmp_path / "cache", teacher=who, dataset=data)
    assert (cache.num_logits, cache.embedding_dim) == (2, 144)
    for logits, embedding in (
        (cache.train_logits, cache.train_embedding),
        (cache.test_logits, cache.test_embedding),
    ):
        assert logits is not None
        assert embedding is not None
        assert cache.head_weight is not None
        assert not logits[..., 0].any()
        assert logits[..., 1].any()
        np.testing.assert_allclose(embedding @ cache.head_weight.T + cache.head_bias, logits, atol=1e-5)
    # what the same network says without its logit is another cache
    without = load_teacher(
        TeacherSection(**section.model_dump() | {"classification": False}), data, base=tmp_path, allow_code=True
    )
    with pytest.raises(InputError, match="another teacher"):
        open_cache(tmp_path / "cache", cache_parts(without, data, AUGMENT, seed=7, dtype="float32"))


def test_the_manifest_says_what_the_cache_was_made_from(tmp_path: Path) -> None:
    cache = build(tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["kind"] == "teacher cache"
    assert manifest["key"] == cache.key
    assert manifest["info"]["parts"]["data"] == "data-1"
    assert set(manifest["info"]["reconstruction_error"]) == {"embedding", "logits"}


def test_other_pixels_under_the_same_key_would_be_other_outputs(tmp_path: Path) -> None:
    # the key is the data set's own business; the arrays really come from the pixels
    data = dataset()
    changed = replace(data, train=Split(255 - data.train.inputs, data.train.labels), key="data-2")
    one, other = build(tmp_path / "a"), build(tmp_path / "b", dataset=changed)
    assert one.key != other.key
    assert not np.array_equal(one.train_logits, other.train_logits)  # type: ignore[arg-type]
