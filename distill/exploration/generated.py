"""A fixed set of further inputs with the teacher's outputs: made once, mapped from disk, shared by all trainings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distill.data.dataset import Dataset
from distill.distribution import default_device
from distill.exploration.explore import check_keep_rates, kept, labels_classes
from distill.exploration.further import Made, Maker, Pool, Seeds
from distill.exploration.generator import ImageGenerator, TextGenerator
from distill.exploration.section import ExploreSection
from distill.exploration.space import Draws
from distill.objectives.split_head import class_logits_of
from distill.outputs import TeacherOutput
from distill.teachers.teacher import NetworkTeacher, Teacher, TeacherBatch
from profiles.artifact import content_key, create, current, explain_os_errors, open_array, read_manifest
from profiles.errors import InputError
from profiles.progress import Progress, Silent

if TYPE_CHECKING:
    from distill.data.unlabelled import Unlabelled

Array = np.ndarray[Any, Any]
KIND = "generated"
_FORM = 1
"""Raise when a fixed set is made in another way, so that older ones are made anew."""
LEARNED = {"weight", "match", "tau", "batch_size"}
"""Keys that decide what is learned from a fixed set, not what is in it."""


@dataclass(frozen=True)
class GeneratedSet:
    """An opened set of V versions of M real inputs; the arrays are mapped from disk, read-only.

    inputs: (V, M, *shape), uint8 images or int64 tokens. keep: bool (V, M), what the filter keeps. logits: float32
    (V, M, C), embedding: float32 (V, M, D), each None where the teacher has none. filtered: whether there is a filter.
    keep_rates: as the metrics name them; empty without a filter. The order of the M: rows of the training split, then
    unlabelled ones, as far as each is explored around.
    """

    folder: Path
    key: str
    inputs: Array
    keep: Array
    logits: Array | None
    embedding: Array | None
    filtered: bool
    keep_rates: dict[str, float]

    def texts(self) -> list[list[str]] | None:
        """V lists of M generated texts; None for images."""
        path = self.folder / "texts.json"
        if not path.is_file():
            return None
        found: list[list[str]] = json.loads(path.read_text(encoding="utf-8"))
        return found


def build_generated(
    section: ExploreSection,
    teacher: Teacher,
    dataset: Dataset,
    folder: Path,
    *,
    generator: ImageGenerator | TextGenerator | None = None,
    unlabelled: Unlabelled | None = None,
    seed: int,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    subclasses: int | None = None,
) -> GeneratedSet:
    """The fixed set in `folder`: opened when it is current, else made: `versions` further inputs of every real one.

    What is in it does not depend on `batch_size`, up to the rounding of batched forward passes.

    Args:
        section: the recipe's `[explore]`, with `versions`.
        teacher: frozen; asked about every input once, and for filter "agreement" about every real one.
        dataset: gives the training split.
        folder: of the artefact.
        generator: what makes the inputs; None where the kind needs none.
        unlabelled: what `around` asks for besides the training split.
        seed: of all draws.
        batch_size: inputs per pass.
        device: None: the first GPU where there is one, else the CPU.
        progress: shows inputs done.
        subclasses: per class, where the teacher's logits are those of subclasses.

    Raises:
        InputError: a teacher that cannot be asked, or has no class logits to filter by; a generator that decodes
            another shape or values that are not finite; teacher outputs that are not finite; a filter that keeps less
            than 5 %.
        EdgestillError: the disk is full or cannot be written.
    """
    if section.versions is None:
        raise ValueError("a fixed set has versions")
    if not teacher.runs_live:
        raise InputError(
            "this teacher cannot be asked about further inputs", where="teacher.kind", fix='explore.kind = "none"'
        )
    if section.filter != "none" and not labels_classes(teacher, dataset, subclasses):
        raise InputError(
            f"the teacher gives no logits for the {len(dataset.classes)} classes to filter by",
            where="explore.filter",
            fix='explore.filter = "none"',
        )
    teacher.assert_frozen()
    key = content_key(
        KIND,
        _FORM,
        section.model_dump(mode="json", exclude=LEARNED | {"generator"}),
        teacher.key,
        dataset.key,
        None if generator is None else generator.key,
        None if unlabelled is None else unlabelled.key,
        seed,
        subclasses,
    )
    if current(folder, KIND, key) is None:
        place = default_device() if device is None else torch.device(device)
        work = _Pass(section, teacher, dataset, generator, unlabelled, seed, batch_size, place, subclasses)
        info: dict[str, Any] = {}
        with create(folder, KIND, key, info) as temporary, explain_os_errors(folder):
            info |= work.run(temporary, progress or Silent())
    return open_generated(folder)


def open_generated(folder: Path) -> GeneratedSet:
    """The finished set in `folder`.

    Raises:
        InputError: none there, or a damaged one.
    """
    manifest = read_manifest(folder, KIND)

    def array(name: str) -> Array | None:
        return open_array(folder, manifest, name, title="set of generated inputs")

    inputs, keep = array("inputs"), array("keep")
    if inputs is None or keep is None:
        raise InputError("damaged set of generated inputs", where=str(folder), fix=f"delete {folder}")
    return GeneratedSet(
        folder=folder,
        key=manifest.key,
        inputs=inputs,
        keep=keep,
        logits=array("logits"),
        embedding=array("embedding"),
        filtered=bool(manifest.info["filtered"]),
        keep_rates=dict(manifest.info["keep_rates"]),
    )


class _Pass:
    """One pass over all versions and real inputs."""

    def __init__(
        self,
        section: ExploreSection,
        teacher: Teacher,
        dataset: Dataset,
        generator: ImageGenerator | TextGenerator | None,
        unlabelled: Unlabelled | None,
        seed: int,
        batch_size: int,
        device: torch.device,
        subclasses: int | None,
    ) -> None:
        self.section, self.teacher, self.dataset, self.seed = section, teacher, dataset, seed
        self.batch_size, self.subclasses = batch_size, subclasses
        if isinstance(teacher, NetworkTeacher):
            teacher.network.to(device)
            teacher.device = device
        self.pool = Pool(section.around, dataset, unlabelled, device=device)
        self.maker = Maker(section, dataset, generator, device, seed)

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Writes the arrays; returns what the manifest says of them."""
        versions, total = self.section.versions or 0, len(self.pool)
        shape = self.dataset.input.shape
        sizes = {"embedding": self.teacher.embedding_dim, "logits": self.teacher.num_logits}
        files: dict[str, Any] = {
            "inputs": _mapped(folder, "inputs", self.dataset.input.dtype, (versions, total, *shape)),
            "keep": _mapped(folder, "keep", "bool", (versions, total)),
            **{
                name: _mapped(folder, name, "float32", (versions, total, size))
                for name, size in sizes.items()
                if size is not None
            },
        }
        texts: list[list[str]] = []
        counts = np.zeros((2, len(self.dataset.classes)))
        with progress.task("generated inputs", versions * total) as task:
            for version in range(versions):
                draws = Draws(self.seed, version)
                texts.append([])
                for first in range(0, total, self.batch_size):
                    rows = np.arange(first, min(first + self.batch_size, total))
                    seeds = self.pool.take(rows)
                    made = self.maker.make(seeds, draws, step=version)
                    self._write(files, version, rows, seeds, made, counts)
                    texts[-1] += made.texts or ()
                    task.advance(len(rows))
        for file in files.values():
            file.flush()
        if any(texts):
            (folder / "texts.json").write_text(json.dumps(texts, ensure_ascii=False, indent=0), encoding="utf-8")
        filtered = self.section.filter != "none"
        rates = {}
        if filtered:
            asked, left = counts.tolist()
            rates = check_keep_rates(self.section, self.dataset.classes, asked, left, "of the fixed set")
        return {"filtered": filtered, "keep_rates": rates, "versions": versions, "real": total}

    def _write(self, files: dict[str, Any], version: int, rows: Array, seeds: Seeds, made: Made, counts: Array) -> None:
        if not bool(made.finite):
            raise InputError(
                "the generator decodes values that are not finite",
                where="explore.generator",
                evidence=f"version {version + 1}, real inputs {rows[0]} to {rows[-1]}",
                fix="a smaller explore.sigma; check its weights and how it scales images",
            )
        told = self._told(made)
        files["inputs"][version, rows] = made.inputs.cpu().numpy()
        for name in files.keys() & {"embedding", "logits"}:
            value = getattr(told, name).float().cpu().numpy()
            if not np.isfinite(value).all():
                raise InputError(
                    f"the teacher's {name} of generated inputs are not finite",
                    where="teacher",
                    evidence=f"version {version + 1}, real inputs {rows[0]} to {rows[-1]}",
                    fix="check the teacher's weights and its input scaling",
                )
            files[name][version, rows] = value
        if self.section.filter == "none":
            files["keep"][version, rows] = True
            return
        agreed = self._class_logits(self._told(seeds)) if self.section.filter == "agreement" else None
        keep, classes = (part.cpu().numpy() for part in kept(self.section, self._class_logits(told), agreed))
        files["keep"][version, rows] = keep
        np.add.at(counts[0], classes, 1)
        np.add.at(counts[1], classes, keep)

    def _told(self, shown: Made | Seeds) -> TeacherOutput:
        rows = np.zeros(len(shown.inputs), np.int64)
        return self.teacher.outputs(TeacherBatch(shown.inputs, "train", rows, shown.texts))

    def _class_logits(self, told: TeacherOutput) -> torch.Tensor:
        assert told.logits is not None
        return told.logits if self.subclasses is None else class_logits_of(told.logits, self.subclasses)


def _mapped(folder: Path, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape)
