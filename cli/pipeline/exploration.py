"""What a run's students explore with: unlabelled inputs, a generator, fixed sets; each made once and shared by all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cli.recipe import Recipe
from distill.data import Dataset
from distill.data.dataset import Split, subset
from distill.data.section import DataSection
from distill.data.unlabelled import Unlabelled, load_unlabelled, open_unlabelled
from distill.distribution import default_device
from distill.exploration.explore import Exploration, check_exploration, check_match, labels_classes
from distill.exploration.generated import LEARNED, GeneratedSet, build_generated
from distill.exploration.generator import ImageGenerator, TextGenerator
from distill.exploration.make import make_image_generator
from distill.exploration.masked_lm import make_text_generator
from distill.exploration.pictures import one_per_class
from distill.exploration.section import KEYS_OF_GENERATOR, ExploreSection, GeneratorKind, GeneratorSection, given
from distill.objectives.section import AnyObjective, KDSection
from distill.strategy import Strategy, Together
from distill.teachers import Teacher
from profiles import artifact
from profiles.errors import InputError
from profiles.progress import Progress

if TYPE_CHECKING:
    from cli.pipeline.run import Run, Trained
    from cli.pipeline.teachers import Variant
    from distill.strategies.coached import Coached

Array = np.ndarray[Any, Any]
Generator = ImageGenerator | TextGenerator
PICTURED = frozenset({"random", "gradient"})
"""Kinds with a radius, of which there is a picture at three of them."""
PICTURE_KIND = "explored"
_PICTURE = "explored.png"
_FORM = 2
"""Raise when the picture changes, so that older ones are drawn anew."""


def explores(recipe: Recipe) -> bool:
    """Whether the recipe's students learn on further inputs."""
    return recipe.explore.kind != "none"


# -- what is refused before anything is made --------------------------------------------------------------------------


def check_explored(recipe: Recipe, dataset: Dataset | None = None) -> None:
    """Refuses an exploration that this data, teacher or these objectives cannot have.

    Args:
        recipe: whose `[explore]` is judged.
        dataset: the data; None: the recipe alone tells, as far as it tells what the samples are.

    Raises:
        InputError: names the recipe key.
    """
    section = recipe.explore
    if section.kind == "none":
        return
    if section.versions is not None and recipe.teacher.moves:
        raise InputError(
            "the teacher learns along with the student, so what it says of an input cannot be asked once",
            where="explore.versions",
            evidence=f'teacher.strategy = "{recipe.teacher.strategy}"',
            fix='leave versions out: new inputs in every step, or teacher.strategy = "frozen"',
        )
    known = recipe.data.known_kind
    if dataset is None and known is None:
        return
    kind: Literal["image", "tokens"] = "tokens" if known == "text" else "image"
    if dataset is not None:
        kind = dataset.input.kind
    check_exploration(
        section,
        kind=kind,
        task=recipe.data.task,
        objectives=recipe.objective,
        teacher_kind=recipe.teacher.kind,
        has_unlabelled=recipe.data.unlabelled is not None,
    )
    if section.generates:
        whole_generator(section.generator, kind)


def check_explored_by(teacher: Teacher, recipe: Recipe, dataset: Dataset) -> None:
    """Refuses what a loaded teacher tells about an exploration.

    Raises:
        InputError: it cannot be asked about new inputs, or gives no class logits where they are needed.
    """
    if recipe.teacher.moves:
        return  # a live network that gets a head for the classes
    # a fixed set is made later
    section = recipe.explore.model_copy(update={"versions": None})
    if Exploration(section, teacher, dataset).match == "objective":
        check_match(recipe.objective, labels_classes(teacher, dataset, None))


# -- what is made -----------------------------------------------------------------------------------------------------


def whole_generator(section: GeneratorSection, kind: Literal["image", "tokens"]) -> GeneratorSection:
    """The section with its kind, which the data decides where the recipe leaves it out. kind: of the inputs.

    Raises:
        InputError: a key that this kind of generator does not read.
    """
    if section.kind is not None:
        return section
    chosen: GeneratorKind = "vae" if kind == "image" else "masked-lm"
    foreign = [name for name in given(section) if name not in KEYS_OF_GENERATOR[chosen]]
    if foreign:
        owners = [f'"{owner}"' for owner, keys in KEYS_OF_GENERATOR.items() if foreign[0] in keys]
        raise InputError(
            f'"{foreign[0]}" does not belong to a generator of kind "{chosen}", which is what this data gets',
            where=f"explore.generator.{foreign[0]}",
            evidence=f"no kind is named, and the data holds {'images' if kind == 'image' else 'texts'}",
            fix=f"explore.generator.kind = {' or '.join(owners)}, or leave {foreign[0]} out",
        )
    return section.model_copy(update={"kind": chosen})


def make_generator(
    section: GeneratorSection,
    dataset: Dataset,
    unlabelled: Unlabelled | None,
    folder: Path,
    *,
    seed: int,
    base: Path,
    allow_code: bool,
    progress: Progress | None = None,
) -> Generator:
    """The generator of `folder`, made where it is missing: from all inputs of `dataset`'s training split and all
    unlabelled ones.

    Raises:
        InputError, EdgestillError: see `make_image_generator` and `make_text_generator`.
    """
    section, device = whole_generator(section, dataset.input.kind), default_device()
    if dataset.input.kind == "image":
        return make_image_generator(
            section,
            all_inputs(dataset.train, unlabelled),
            dataset.input,
            folder,
            seed=seed,
            base=base,
            allow_code=allow_code,
            device=device,
            progress=progress,
            shown=one_per_class(dataset.train.labels, dataset.classes) if dataset.task == "multiclass" else None,
        )
    texts = (*(dataset.train.texts or ()), *((unlabelled.texts or ()) if unlabelled is not None else ()))
    return make_text_generator(section, texts, folder, seed=seed, base=base, device=device, progress=progress)


def all_inputs(split: Split, unlabelled: Unlabelled | None) -> Array:
    """(N + M, *shape): the inputs of a split, then the unlabelled ones. Copied into memory where there are both."""
    if unlabelled is None or not len(unlabelled):
        return split.inputs
    return np.concatenate([np.asarray(split.inputs), np.asarray(unlabelled.inputs)])


def open_exploration(
    section: ExploreSection,
    teacher: Teacher,
    dataset: Dataset,
    objectives: Sequence[AnyObjective],
    *,
    generator: Generator | None,
    unlabelled: Unlabelled | None,
    subclasses: int | None,
    generated: GeneratedSet | None = None,
    say: Callable[[str], None] | None = None,
) -> Exploration:
    """What one student explores; see `Exploration`.

    Args:
        section: the recipe's `[explore]`, which is on.
        teacher: who labels the inputs.
        dataset: what the student learns on.
        objectives: the student's, whose temperature holds for further inputs, too.
        generator, unlabelled: None where the section needs none.
        subclasses: per class, of a teacher whose logits are those of subclasses.
        generated: the fixed set; None: new inputs in every step.
        say: is told what a filter keeps, once.
    """
    return Exploration(
        section,
        teacher,
        dataset,
        generator=generator,
        unlabelled=unlabelled,
        tau=tau_of(objectives),
        subclasses=subclasses,
        generated=generated,
        say=say,
    )


def subclasses_of(variant: Variant) -> int | None:
    """Subclasses per class in the logits of a teacher; None: its logits are those of the classes."""
    return None if variant.subclasses is None else variant.subclasses.subclasses_per_class


def _is_left(dataset: Dataset) -> bool:
    """Whether the splits left training samples over."""
    return dataset.left_out is not None and len(dataset.left_out) > 0


def left_over(data: DataSection, whole: Dataset, unlabelled: Unlabelled | None, rows: Array | None) -> Unlabelled:
    """The unlabelled inputs of a student that learns on a part of the training split.

    With `data.unlabelled.rest` the other training samples are among them, as if the recipe's train_size were that of
    the part; those that are also in the validation or the test split are left out. A `size` is drawn from what the
    whole training split left over.

    Args:
        data: the section that the unlabelled inputs come from.
        whole: the data, with the whole training split.
        unlabelled: what goes with it; None: it left nothing over.
        rows: sorted int64, the part; None: the student learns on all of it.

    Raises:
        InputError: nothing is left over.
    """
    if not _takes_rest(data) or rows is None or len(rows) == len(whole.train):
        if unlabelled is None:
            raise nothing_left(data, whole, rows)
        return unlabelled
    judged = {np.asarray(each).tobytes() for split in (whole.validation, whole.test) for each in split.inputs}
    others = np.setdiff1d(np.arange(len(whole.train)), rows)
    split = whole.train
    others = np.array([row for row in others.tolist() if split.inputs[row].tobytes() not in judged], dtype=np.int64)
    inputs, texts = np.asarray(split.inputs[others]), None
    if split.texts is not None:
        texts = tuple(split.texts[row] for row in others.tolist())
    keys = [whole.key, others]
    if unlabelled is not None:
        inputs = np.concatenate([np.asarray(unlabelled.inputs), inputs])
        texts = None if texts is None else (*(unlabelled.texts or ()), *texts)
        keys.append(unlabelled.key)
    return Unlabelled(inputs, texts, artifact.content_key("left over", *keys), f"rest of {whole.name}")


def seen_by_generator(data: DataSection, rows: Array | None) -> Array | None:
    """Rows of the training split that the generator of a part of it learns from; None: all of them.

    Those of the part. Where everything that the part leaves over is unlabelled data, its generator learns from that,
    too, which together is the whole split for every part.
    """
    return None if _takes_rest(data) else rows


def _takes_rest(data: DataSection) -> bool:
    """Whether all that a part of the training split leaves over goes to its student."""
    return data.unlabelled is not None and data.unlabelled.rest and data.unlabelled.size is None


def nothing_left(data: DataSection, whole: Dataset, rows: Array | None) -> InputError:
    """The training split left nothing over. rows: the part that is learned on; None: all of it."""
    assert data.unlabelled is not None
    evidence = f"all {len(whole.train):,} training samples are used with their labels"
    if rows is not None and len(rows) < len(whole.train):
        return InputError(
            "a study draws data.unlabelled.size from what its largest training split leaves over, and that is nothing",
            where="data.unlabelled.size",
            evidence=evidence,
            fix="leave size out, so that a smaller training split is followed by all that it leaves over",
        )
    return InputError(
        "nothing of the training samples is left over to explore around",
        where="data.unlabelled.rest",
        evidence=evidence,
        fix="a smaller data.train_size, or unlabelled inputs with source and path",
    )


def tau_of(objectives: Sequence[AnyObjective]) -> float | None:
    """The temperature of the recipe's own kd; None without one."""
    return next((section.tau for section in objectives if isinstance(section, KDSection)), None)


def together(*strategies: Strategy | None) -> Strategy | None:
    """Those that there are, as one; None without any."""
    found = [strategy for strategy in strategies if strategy is not None]
    if len(found) < 2:
        return found[0] if found else None
    return Together(*found)


def in_words(section: ExploreSection) -> str:
    """What is explored, in a few words: `random, sigma 1, around the training samples`."""
    parts: list[str] = [section.kind]
    if section.kind in PICTURED:
        parts.append(f"sigma {section.sigma:g}")
    if section.kind == "gradient":
        parts.append(f"{section.steps} step{'' if section.steps == 1 else 's'}")
    around = {"train": "training", "unlabelled": "unlabelled", "both": "training and unlabelled"}[section.around]
    parts.append(f"around the {around} samples")
    if section.filter != "none":
        parts.append(f"filtered by {section.filter}")
    if section.versions is not None:
        parts.append(f"{section.versions} version{'' if section.versions == 1 else 's'} of each, made once")
    if section.weight != 1:
        parts.append(f"weight {section.weight:g}")
    return ", ".join(parts)


@dataclass(frozen=True)
class Explored:
    """Where a process finds what a student explores with: artefacts that are finished.

    unlabelled, generator, generated: folders, None where nothing of them is needed. data: the section that the
    unlabelled inputs came from. seed: of the recipe. rows: sorted int64, the part of the training split that is learned
    on; None: all. subclasses: per class, in the teacher's logits. key: hash of the content of all three.
    """

    unlabelled: Path | None
    generator: Path | None
    generated: Path | None
    data: DataSection
    seed: int
    rows: Array | None
    subclasses: int | None
    key: str


def open_explored(
    explored: Explored,
    recipe: Recipe,
    teacher: Teacher,
    whole: Dataset,
    dataset: Dataset,
    *,
    base: Path,
    allow_code: bool,
) -> Exploration:
    """What the student of one cell explores, from finished artefacts.

    Args:
        explored: what there is.
        recipe: the cell's.
        teacher: who labels the inputs.
        whole: the data that the artefacts were made for.
        dataset: `whole`, or the part of its training split that the student learns on.
        base: folder that the recipe's paths are relative to.
        allow_code: the user allowed the recipe to import code by dotted path.
    """
    section = recipe.explore
    unlabelled = None if explored.unlabelled is None else open_unlabelled(explored.unlabelled)
    generator = None
    if explored.generator is not None:
        generator = make_generator(
            section.generator,
            whole if seen_by_generator(explored.data, explored.rows) is None else dataset,
            unlabelled,
            explored.generator,
            seed=explored.seed,
            base=base,
            allow_code=allow_code,
        )
    around = None
    if section.around != "train":
        around = left_over(explored.data, whole, unlabelled, explored.rows)
    generated = None
    if explored.generated is not None:
        generated = build_generated(
            section,
            teacher,
            dataset,
            explored.generated,
            generator=generator,
            unlabelled=around,
            seed=explored.seed,
            batch_size=recipe.teacher.batch_size,
            device=default_device(),
            subclasses=explored.subclasses,
        )
    return open_exploration(
        section,
        teacher,
        dataset,
        recipe.objective,
        generator=generator,
        unlabelled=around,
        subclasses=explored.subclasses,
        generated=generated,
    )


class Explorer:
    """What the students of one run explore with; nothing is made before it is asked for.

    Args:
        run: whose data, teachers and folder they are.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.shares = False
        """In a study: what is left over is left over by the parts of the training split that its cells take."""
        self._generators: dict[Path, Generator] = {}
        self._generated: dict[Path, GeneratedSet] = {}

    @cached_property
    def unlabelled(self) -> Unlabelled | None:
        """The recipe's unlabelled inputs; None without `[data.unlabelled]`."""
        run = self.run
        wanted = run.recipe.data.unlabelled
        if wanted is None or (self.shares and wanted.rest and not _is_left(run.dataset)):
            return None
        with run.made("unlabelled", folder := run.folder / "unlabelled"):
            return load_unlabelled(
                run.recipe.data,
                run.dataset,
                seed=run.recipe.seed,
                base=run.loaded.base,
                folder=folder,
                progress=run.progress,
            )

    def prepare(self, section: ExploreSection, rows: Array | None = None) -> None:
        """Reads what is the user's own, so that what is wrong with it shows before anything is trained.

        Args:
            section: the recipe's `[explore]`.
            rows: sorted int64, the part of the training split that is learned on; None: all.

        Raises:
            InputError: unlabelled inputs that cannot be read or of which there are none, a generator of the user's that
                does not work.
        """
        if section.kind == "none":
            return
        if section.generates or section.around != "train":
            data, whole, found = self.run.recipe.data, self.run.dataset, self.unlabelled
            part = rows is not None and len(rows) < len(whole.train)
            # a generator does without what a whole split leaves over; a drawn number of inputs is never without
            asked = section.around != "train" or (part and data.unlabelled is not None)
            if asked and found is None and not (part and _takes_rest(data)):
                raise nothing_left(data, whole, rows)
        if section.generates and section.generator.kind == "torch":
            self.generator(section, rows)

    def generator_folder(self, section: ExploreSection, rows: Array | None = None) -> Path:
        """Where the generator of an exploration lies: "generator"; in a study those of others beside it, and those of
        parts of the training split, by their size. rows: as for `generator`."""
        dataset = self.run.dataset
        own = whole_generator(self.run.recipe.explore.generator, dataset.input.kind)
        asked = whole_generator(section.generator, dataset.input.kind)
        seen = seen_by_generator(self.run.recipe.data, rows)
        words = ["generator"] if seen is None else ["generator", "of", str(len(seen))]
        return self.run.folder / "-".join(words if asked == own else [*words, artifact.content_key(asked.hashed)[:8]])

    def generator(self, section: ExploreSection, rows: Array | None = None) -> Generator | None:
        """Makes the inputs of an exploration; None where no generator does.

        Args:
            section: the recipe's `[explore]`.
            rows: sorted int64, the part of the training split that is learned on, by generator and student alike; None:
                all of it. Parts of one size are one part.
        """
        if not section.generates:
            return None
        run, folder = self.run, self.generator_folder(section, rows)
        if folder not in self._generators:
            unlabelled = self.unlabelled
            kind = whole_generator(section.generator, run.dataset.input.kind).kind
            seen = seen_by_generator(run.recipe.data, rows)
            with run.made(f"generator ({kind})", folder):
                self._generators[folder] = make_generator(
                    section.generator,
                    run.dataset if seen is None else subset(run.dataset, seen),
                    unlabelled,
                    folder,
                    seed=run.recipe.seed,
                    base=run.loaded.base,
                    allow_code=run.allow_code,
                    progress=run.progress,
                )
            self._tell_pictures(folder)
        return self._generators[folder]

    def _tell_pictures(self, folder: Path) -> None:
        """Notes where a person can look at what the generator makes."""
        for name in ("reconstructions.png", "examples.txt"):
            if (folder / name).is_file():
                self.run.say_once(f"what the generator makes: {folder / name}")

    def around(self, section: ExploreSection) -> Unlabelled | None:
        """The unlabelled inputs that are explored around; None where only training samples are."""
        return None if section.around == "train" else self.unlabelled

    def generated_folder(self, section: ExploreSection, variant: Variant, dataset: Dataset) -> Path:
        """Where the fixed set of an exploration lies: "generated", and in a study those of others beside it."""
        run = self.run
        name = "generated" + variant.folder.removeprefix("teacher")
        mine = section.model_dump(mode="json", exclude=LEARNED)
        own = run.recipe.explore.model_dump(mode="json", exclude=LEARNED)
        if mine == own and dataset.key == run.dataset.key:
            return run.folder / name
        return run.folder / f"{name}-{artifact.content_key(mine, dataset.key)[:8]}"

    def generated(
        self,
        section: ExploreSection,
        teacher: Teacher,
        variant: Variant,
        dataset: Dataset,
        generator: Generator | None,
        around: Unlabelled | None,
    ) -> GeneratedSet | None:
        """The fixed set with the teacher's outputs; None where new inputs are made in every step."""
        if section.versions is None:
            return None
        run = self.run
        folder = self.generated_folder(section, variant, dataset)
        if folder in self._generated:
            return self._generated[folder]
        with run.made("generated", folder):
            self._generated[folder] = build_generated(
                section,
                teacher,
                dataset,
                folder,
                generator=generator,
                unlabelled=around,
                seed=run.recipe.seed,
                batch_size=run.recipe.teacher.batch_size,
                device=default_device(),
                progress=run.progress,
                subclasses=subclasses_of(variant),
            )
        return self._generated[folder]

    def exploration(
        self, section: ExploreSection, teacher: Teacher, variant: Variant, objectives: Sequence[AnyObjective]
    ) -> Exploration | None:
        """What one student explores; None where it learns on its data alone.

        Args:
            section: the recipe's `[explore]`.
            teacher: who labels the inputs; a live one where it learns along with the student.
            variant: which of the recipe's teachers that is.
            objectives: the student's.
        """
        if section.kind == "none":
            return None
        run, generator, around = self.run, self.generator(section), self.around(section)
        run.say_once(f"explores: {in_words(section)}")
        return open_exploration(
            section,
            teacher,
            run.dataset,
            objectives,
            generator=generator,
            unlabelled=around,
            subclasses=subclasses_of(variant),
            generated=self.generated(section, teacher, variant, run.dataset, generator, around),
            say=run.say_once,
        )

    def explored(self, section: ExploreSection, teacher: Teacher, variant: Variant, rows: Array | None) -> Explored:
        """What another process needs to explore as this run's students do; made where it is missing.

        Args:
            section, teacher, variant: as for `exploration`.
            rows: sorted int64, the part of the training split that is learned on; None: all of it.
        """
        run = self.run
        generator = self.generator(section, rows)
        dataset = run.dataset if rows is None else subset(run.dataset, rows)
        around = None
        if section.around != "train":
            around = left_over(run.recipe.data, run.dataset, self.unlabelled, rows)
        found = self.generated(section, teacher, variant, dataset, generator, around)
        read = self.unlabelled if section.generates or around is not None else None
        keys = [None if each is None else each.key for each in (around, generator, found)]
        return Explored(
            unlabelled=None if read is None else run.folder / "unlabelled",
            generator=None if generator is None else self.generator_folder(section, rows),
            generated=None if found is None else self.generated_folder(section, variant, dataset),
            data=run.recipe.data,
            seed=run.recipe.seed,
            rows=rows,
            subclasses=subclasses_of(variant),
            key=artifact.content_key(*keys),
        )

    def picture(
        self, exploration: Exploration, trained: Trained, coached: tuple[Coached, Path] | None = None
    ) -> Path | None:
        """Draws explored samples at three radii around the same real ones, once; None where there is nothing to draw.

        Args:
            exploration: of the student, after its training.
            trained: the student.
            coached: how its teacher learned along, and the student's artefact, which has that teacher: where the
                artefact was only loaded, the teacher of `coached` is as it started.
        """
        run, section = self.run, exploration.section
        if section.kind not in PICTURED or run.dataset.input.kind != "image" or not run.is_main:
            return None
        folder = run.folder / "explored"
        key = artifact.content_key(PICTURE_KIND, _FORM, trained.key, exploration.key)
        if artifact.current(folder, PICTURE_KIND, key) is None:
            if coached is not None:
                strategy, student = coached
                strategy.load(student)
            with artifact.create(folder, PICTURE_KIND, key, {"student": trained.student.arch}) as temporary:
                exploration.picture(temporary / _PICTURE, trained.student, trained.objective)
        run.say_once(f"explored samples at three radii: {folder / _PICTURE}")
        return folder / _PICTURE
