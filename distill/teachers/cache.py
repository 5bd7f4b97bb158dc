"""The TeacherCache: what a frozen teacher says about every sample and view, computed once, mapped from disk."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from distill.data.dataset import Dataset, SplitName
from distill.data.section import AugmentSection
from distill.data.views import augment as augment_images
from distill.teachers.teacher import Teacher, TeacherBatch
from profiles.artifact import content_key, create, current, explain_os_errors, open_array, read_manifest
from profiles.errors import EdgestillError, InputError
from profiles.progress import Progress, Silent
from profiles.section import Section

Array = np.ndarray[Any, Any]
Quantity = Literal["embedding", "logits"]
CacheDtype = Literal["float16", "float32"]

KIND = "teacher cache"
_QUANTITIES: tuple[Quantity, ...] = ("embedding", "logits")
_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_FLOAT16_MAX = 65504.0


class CacheParts(Section):
    """Everything that a cache depends on; each part by itself, so that a refusal can say which one differs.

    `teacher`: hash of weights and preprocessing. `data`: the data set's key. `augment` and `seed` are None for one
    (clean) view, which does not depend on them. `dtype`: the one asked for.
    """

    teacher: str
    data: str
    augment: dict[str, Any] | None
    views: int
    dtype: CacheDtype
    seed: int | None

    @property
    def key(self) -> str:
        """One hash over all parts."""
        return content_key(self)


class ReconstructionError(Section):
    """What storing changed. `max_abs`: largest |x - stored|. `relative`: Frobenius norm of x - stored over x's."""

    max_abs: float = 0.0
    relative: float = 0.0


class CachedOutputs(NamedTuple):
    """Resident tensors: embedding (V, N, D) and logits (V, N, C), in the stored type, each None where there is none."""

    embedding: Tensor | None
    logits: Tensor | None


@dataclass(frozen=True)
class TeacherCache:
    """An opened cache; the arrays are mapped from disk, read-only.

    `train_*`: (V, N, D) and (V, N, C), view 0 of the clean images. `validation_*`, `test_*`: (N, D) and (N, C), clean.
    None where the teacher has none. `head_weight` (C, D) and `head_bias` (C,): the teacher's linear head in float32,
    when known. `dtype`: the stored type, which is float32 where float16 would have overflowed. `reconstruction_error`:
    of each quantity.
    """

    folder: Path
    key: str
    parts: CacheParts
    views: int
    dtype: CacheDtype
    embedding_dim: int | None
    num_logits: int | None
    reconstruction_error: dict[str, ReconstructionError]
    train_embedding: Array | None
    train_logits: Array | None
    validation_embedding: Array | None
    validation_logits: Array | None
    test_embedding: Array | None
    test_logits: Array | None
    head_weight: Array | None
    head_bias: Array | None

    def tensors(self, split: SplitName, device: torch.device | str = "cpu") -> CachedOutputs:
        """The split's outputs as resident tensors (V, N, D) and (V, N, C); V is 1 for validation and test."""

        def resident(array: Array | None) -> Tensor | None:
            if array is None:
                return None
            tensor = torch.from_numpy(np.array(array)).to(device)
            return tensor if split == "train" else tensor.unsqueeze(0)

        arrays: dict[SplitName, tuple[Array | None, Array | None]] = {
            "train": (self.train_embedding, self.train_logits),
            "validation": (self.validation_embedding, self.validation_logits),
            "test": (self.test_embedding, self.test_logits),
        }
        embedding, logits = arrays[split]
        return CachedOutputs(resident(embedding), resident(logits))


@dataclass(frozen=True)
class SubclassCache(TeacherCache):
    """The cache of a teacher that was trained with subclasses: all its logits have classes x `subclasses` columns."""

    subclasses: int

    @classmethod
    def of(cls, cache: TeacherCache, subclasses: int) -> Self:
        """The same arrays, known to be subclass logits."""
        return cls(**{field.name: getattr(cache, field.name) for field in fields(cache)}, subclasses=subclasses)


def cache_parts(
    teacher: Teacher, dataset: Dataset, augment: AugmentSection, *, seed: int, dtype: CacheDtype
) -> CacheParts:
    """The parts of the key that a cache of this teacher on this data has.

    Raises:
        InputError: several views are asked of a teacher that only knows the clean samples.
    """
    views = augment.teacher_views if dataset.input.kind == "image" else 1
    if views > 1 and not teacher.sees_views:
        raise InputError(
            f"the teacher only knows the clean samples, the augmentation makes {views} views",
            where="data.augment.views",
            evidence="its outputs were stored beforehand, so it cannot look at an augmented image",
            fix="data.augment.reuse_clean_teacher = true (clean outputs for every view), or data.augment.views = 1",
        )
    changes = augment.model_dump(mode="json", exclude={"views", "reuse_clean_teacher"})
    return CacheParts(
        teacher=teacher.key,
        data=dataset.key,
        augment=changes if views > 1 else None,
        views=views,
        dtype=dtype,
        seed=seed if views > 1 else None,
    )


def build_cache(
    teacher: Teacher,
    dataset: Dataset,
    augment: AugmentSection,
    folder: Path,
    *,
    seed: int,
    dtype: CacheDtype = "float16",
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    progress: Progress | None = None,
) -> TeacherCache:
    """The cache in `folder`: opened when it is current, else made in one pass over training views, validation, test.

    Args:
        teacher: frozen; asserted before and (its hash) after.
        dataset: the samples.
        augment: what the training views are; view 0 is clean.
        folder: the artefact; written whole or not at all.
        seed: of the augmentation.
        dtype: of the stored outputs. When a value would overflow float16, all is stored as float32 and a note says so.
        device: where batches are augmented; they reach the teacher from there.
        batch_size: samples per forward pass of the teacher.
        progress: shows samples done.

    Raises:
        InputError: see `cache_parts`; the teacher gives NaN or infinity (the message names split, view and row).
        EdgestillError: the disk is full or cannot be written; the teacher changed while it was asked.
    """
    progress = progress or Silent()
    teacher.assert_frozen()
    parts = cache_parts(teacher, dataset, augment, seed=seed, dtype=dtype)
    if current(folder, KIND, parts.key) is not None:
        return open_cache(folder, parts)
    stored: CacheDtype = dtype
    work = _Pass(teacher, dataset, augment, parts, seed, torch.device(device), batch_size, progress)
    info: dict[str, Any] = {"parts": parts.model_dump(mode="json")}
    with create(folder, KIND, parts.key, info) as temporary, explain_os_errors(folder):
        try:
            errors = work.run(temporary, stored)
        except _Float16OverflowError as overflow:
            progress.note(f"teacher cache: {overflow} does not fit float16, storing float32 (twice the size)")
            stored = "float32"
            errors = work.run(temporary, stored)
        if teacher.head_weight is not None and teacher.head_bias is not None:
            np.save(temporary / "head_weight.npy", teacher.head_weight.numpy())
            np.save(temporary / "head_bias.npy", teacher.head_bias.numpy())
        teacher.assert_frozen()
        if teacher.key != parts.teacher:
            raise EdgestillError("the teacher changed while its outputs were cached", where="teacher")
        info |= {"dtype": stored, "reconstruction_error": {name: e.model_dump() for name, e in errors.items()}}
    for name, error in errors.items():
        if stored == "float16":
            progress.note(
                f"teacher cache: float16 {name} off by at most {error.max_abs:.2g} ({error.relative:.1e} relative)"
            )
    return open_cache(folder, parts)


def open_cache(folder: Path, parts: CacheParts) -> TeacherCache:
    """The finished cache in `folder`, if it was made from exactly `parts`.

    Raises:
        InputError: no cache there, a damaged one, or one of another teacher, data set, augmentation, type or seed: the
            message says which.
    """
    manifest = read_manifest(folder, KIND)
    found = CacheParts.model_validate(manifest.info["parts"])
    if manifest.key != parts.key:
        names = {"teacher": "another teacher", "data": "another data set", "augment": "another augmentation"}
        names |= {"views": "another number of views", "dtype": "another type", "seed": "another seed"}
        different = [name for name in names if getattr(found, name) != getattr(parts, name)]
        raise InputError(
            f"the teacher cache belongs to {' and '.join(names[name] for name in different)}",
            where=str(folder),
            evidence="; ".join(
                f"{name}: cache {getattr(found, name)}, run {getattr(parts, name)}" for name in different
            ),
            fix=f"delete {folder} and run the same command again, or name another run folder with --out",
        )

    def array(name: str) -> Array | None:
        return open_array(folder, manifest, name, title="teacher cache")

    arrays = {f"{split}_{quantity}": array(f"{split}_{quantity}") for split in _SPLITS for quantity in _QUANTITIES}
    embedding, logits = arrays["train_embedding"], arrays["train_logits"]
    return TeacherCache(
        folder=folder,
        key=manifest.key,
        parts=found,
        views=found.views,
        dtype=manifest.info["dtype"],
        embedding_dim=None if embedding is None else int(embedding.shape[2]),
        num_logits=None if logits is None else int(logits.shape[2]),
        reconstruction_error={
            name: ReconstructionError.model_validate(error)
            for name, error in manifest.info["reconstruction_error"].items()
        },
        head_weight=array("head_weight"),
        head_bias=array("head_bias"),
        **arrays,
    )


class _Float16OverflowError(Exception):
    """A value beyond the largest float16."""


@dataclass(frozen=True)
class _Pass:
    """One pass over all views and splits."""

    teacher: Teacher
    dataset: Dataset
    augment: AugmentSection
    parts: CacheParts
    seed: int
    device: torch.device
    batch_size: int
    progress: Progress

    def run(self, folder: Path, dtype: CacheDtype) -> dict[str, ReconstructionError]:
        """Writes `<split>_<quantity>.npy`; returns the reconstruction error of each quantity."""
        sizes = {"embedding": self.teacher.embedding_dim, "logits": self.teacher.num_logits}
        error_sums = {name: _ErrorSum() for name, size in sizes.items() if size is not None}
        total = sum(len(self.dataset.split(s)) * (self.parts.views if s == "train" else 1) for s in self.teacher.splits)
        with self.progress.task("teacher outputs", total) as task:
            for split in self.teacher.splits:
                rows = len(self.dataset.split(split))
                views = (self.parts.views,) if split == "train" else ()
                files: dict[str, Any] = {
                    name: np.lib.format.open_memmap(
                        folder / f"{split}_{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=(*views, rows, size)
                    )
                    for name, size in sizes.items()
                    if size is not None
                }
                for view in range(self.parts.views if split == "train" else 1):
                    for start in range(0, rows, self.batch_size):
                        chosen = np.arange(start, min(start + self.batch_size, rows))
                        self._write(files, split, view, chosen, error_sums)
                        task.advance(len(chosen))
                for file in files.values():
                    file.flush()
        return {name: error_sum.result() for name, error_sum in error_sums.items()}

    def _write(
        self,
        files: dict[str, Any],
        split: SplitName,
        view: int,
        rows: np.ndarray[tuple[int], np.dtype[np.int64]],
        error_sums: dict[str, _ErrorSum],
    ) -> None:
        inputs = torch.from_numpy(np.array(self.dataset.split(split).inputs[rows])).to(self.device)
        if view > 0:
            indices = torch.from_numpy(rows).to(self.device)
            inputs = augment_images(inputs, indices, view, self.seed, self.augment)
        outputs = self.teacher.outputs(TeacherBatch(inputs, split, rows))
        for name, file in files.items():
            value: Tensor | None = getattr(outputs, name)
            if value is None:
                raise EdgestillError(f"the teacher gave no {name} for the {split} split", where="teacher")
            exact = value.float().cpu().numpy()
            finite = np.isfinite(exact).all(1)
            if not finite.all():
                raise InputError(
                    f"the teacher's {name} of the {split} split are not finite",
                    where="teacher",
                    evidence=f"first at row {rows[int((~finite).argmax())]}, view {view}",
                    fix="check the teacher's weights and its input scaling",
                )
            if file.dtype == np.float16 and (largest := float(np.abs(exact).max())) > _FLOAT16_MAX:
                raise _Float16OverflowError(f"a value of {largest:.3g} in the {name}")
            stored = exact.astype(file.dtype)
            error_sums[name].add(exact, stored)
            (file[view] if split == "train" else file)[rows] = stored


class _ErrorSum:
    """Sums the reconstruction error over batches."""

    def __init__(self) -> None:
        self._max_abs, self._squared_error, self._squared = 0.0, 0.0, 0.0

    def add(self, exact: Array, stored: Array) -> None:
        difference = exact.astype(np.float64) - stored.astype(np.float64)
        self._max_abs = max(self._max_abs, float(np.abs(difference).max(initial=0.0)))
        self._squared_error += float(np.square(difference).sum())
        self._squared += float(np.square(exact.astype(np.float64)).sum())

    def result(self) -> ReconstructionError:
        relative = (self._squared_error / self._squared) ** 0.5 if self._squared > 0 else 0.0
        return ReconstructionError(max_abs=self._max_abs, relative=relative)
