"""The `[[objective]]` tables of a recipe, and what `edgestill methods` prints about them. Imports only pydantic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from profiles.errors import InputError, nearest
from profiles.section import Section

Need = Literal["logits", "embedding", "labels", "classes"]
"""What an objective needs: the teacher's logits, its embedding, labels, more than two classes."""
Task = Literal["multiclass", "multilabel"]
WeightSchedule = Literal["constant", "warm-up", "decay"]
_SCHEDULED = ("warm-up", "decay")
Distance = Literal["distance_correlation", "cosine_difference", "cosine"]
LEARNING_RATE_SEARCH = 4.0
"""Tuning tries `train.learning_rate` from the recipe's by this to the recipe's times this, for every method alike."""


class Search(Section):
    """What tuning tries for one key: anything from low to high (log: evenly in the logarithm), or one of `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[int | str, ...] = ()

    @property
    def words(self) -> str:
        """`1 to 8, log` or `2, 4, 8, 16`."""
        if self.choices:
            return ", ".join(str(choice) for choice in self.choices)
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


def _around(default: float) -> Search:
    """Two decades around a factor's default."""
    return Search(low=default / 10, high=default * 10, log=True)


_TAU = Search(low=1, high=8, log=True)
_HARD_WEIGHT = Search(low=0, high=0.9)


class ObjectiveBase(Section):
    """What every objective's table has, and the facts about a method that do not depend on its parameters.

    The ground-truth term belongs to no objective: the loop adds it once, with `train.hard_weight`.
    """

    title: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    """What the teacher ("logits", "embedding") and the data ("labels", "classes") must supply."""
    tasks: ClassVar[frozenset[Task]] = frozenset({"multiclass", "multilabel"})
    """The tasks for which the formula is defined."""
    mixup: ClassVar[bool] = False
    """Whether training on mixed inputs with the mixed cached outputs of both originals is sound."""
    training_cost: ClassVar[str]
    inference_cost: ClassVar[str] = "none: nothing of it is in the exported student"
    source: ClassVar[str]
    control: ClassVar[bool] = False
    """True for what is there to be compared with, not to be shipped."""
    search: ClassVar[dict[str, Search]] = {}
    """What `edgestill study --tune` tries: of this table's keys, and dotted ones of the recipe."""

    only_with: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {}
    """Setting -> (another one, the values of that one with which it means anything)."""

    weight: float = Field(1.0, ge=0, description="factor on this objective's terms")
    weight_schedule: WeightSchedule = Field(
        "constant", description="warm-up: the weight rises from 0; decay: it falls to 0; each linearly"
    )
    weight_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the training that the rise takes from its start (default 0.1), the fall to its end (1)",
    )

    @model_validator(mode="after")
    def _every_setting_means_something(self) -> Self:
        for name, (other, values) in {"weight_share": ("weight_schedule", _SCHEDULED), **self.only_with}.items():
            changed = getattr(self, name) != type(self).model_fields[name].default
            if changed and getattr(self, other) not in values:
                wanted = " or ".join(_toml(value) for value in values)
                raise ValueError(
                    f'"{name}" changes nothing with {other} = {_toml(getattr(self, other))}; it belongs to {wanted}'
                )
        return self

    def factor(self, progress: float) -> float:
        """What the weight is multiplied with at a point of the training.

        Args:
            progress: share of the training that is done, 0..1.

        Returns:
            0..1. "warm-up": min(1, progress / share). "decay": min(1, (1 - progress) / share).
        """
        if self.weight_schedule == "warm-up":
            return min(1.0, progress / (self.weight_share or 0.1))
        if self.weight_schedule == "decay":
            return min(1.0, (1.0 - progress) / (self.weight_share or 1.0))
        return 1.0

    @property
    def default_hard_weight(self) -> float:
        """The weight of the ground-truth term when this is the only objective and the recipe names none."""
        return 1.0

    @property
    def still_teacher(self) -> bool:
        """Whether it fits something on the teacher's outputs once, before training: a teacher that moves leaves it."""
        return False


class SupervisedSection(ObjectiveBase):
    """Ground truth alone; it has no term of its own to be weighted."""

    title = "Supervised"
    summary = "the plain student: learns from the labels, sees no teacher"
    needs = frozenset({"labels"})
    mixup = True
    training_cost = "none"
    source = "the reference that every distilled student is compared with"
    control = True

    kind: Literal["supervised"] = "supervised"

    @model_validator(mode="after")
    def _no_weight(self) -> Self:
        for name in ("weight", "weight_schedule"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'"{name}" changes nothing here: the labels have the weight train.hard_weight')
        return self


class KDSection(ObjectiveBase):
    """Soft targets: (1 - hard_weight) tau^2 KL(teacher || student)."""

    title = "Knowledge distillation"
    summary = (
        "matches the teacher's softened class probabilities; per-label probabilities when there are several labels"
    )
    needs = frozenset({"logits"})
    mixup = True
    training_cost = "one softmax of the cached logits"
    source = "Hinton, Vinyals & Dean 2015, arXiv 1503.02531"
    search: ClassVar[dict[str, Search]] = {"tau": _TAU, "train.hard_weight": _HARD_WEIGHT}

    kind: Literal["kd"] = "kd"
    tau: float = Field(4.0, gt=0, description="temperature that softens teacher and student")

    @property
    def default_hard_weight(self) -> float:
        return 0.1


class DistanceCorrelationSection(ObjectiveBase):
    """EAsT: 1 - distance correlation of student and teacher embeddings."""

    title = "Distance correlation (EAsT)"
    summary = "the student's embedding keeps the pairwise geometry of the teacher's; dimensions may differ"
    needs = frozenset({"embedding"})
    training_cost = "two (batch, batch) distance matrices"
    source = "Ding & Lerch 2023, arXiv 2306.17424; U-centring: Szekely & Rizzo 2014"
    search: ClassVar[dict[str, Search]] = {"weight": _around(2.33)}

    kind: Literal["distance_correlation"] = "distance_correlation"
    weight: float = Field(
        2.33, ge=0, description="factor on the term; lam / (1 - lam) of the paper's mix, here at lam = 0.7"
    )
    biased: bool = Field(
        False,
        description="double-centred distances, as published; they saturate near 1 for small batches",
    )


class CosineDifferenceSection(ObjectiveBase):
    """EAsT: mean absolute difference of the cosine-similarity matrices."""

    title = "Cosine difference (EAsT)"
    summary = "the samples' cosine similarities in the student's embedding equal those in the teacher's"
    needs = frozenset({"embedding"})
    training_cost = "two (batch, batch) similarity matrices"
    source = "Ding & Lerch 2023, arXiv 2306.17424"
    search: ClassVar[dict[str, Search]] = {"weight": _around(2.33)}

    kind: Literal["cosine_difference"] = "cosine_difference"
    weight: float = Field(
        2.33, ge=0, description="factor on the term; lam / (1 - lam) of the paper's mix, here at lam = 0.7"
    )


class EmbeddingCompressionSection(ObjectiveBase):
    """EC: a trainable transform keeps of the teacher's embedding what the task needs; the student matches that."""

    title = "Embedding compression (EC)"
    summary = "compresses a teacher of another task to what this task needs, and matches the compressed embedding"
    needs = frozenset({"embedding", "labels"})
    training_cost = "transform and head on cached embeddings, two (batch, batch) matrices; dropped after training"
    source = "Ding & Lerch 2024, arXiv 2402.06761; exact normalisation and defaults are our reading"
    search: ClassVar[dict[str, Search]] = {
        "lam": Search(low=0.3, high=0.95),
        "transform": Search(choices=("linear", "mlp")),
        "distance": Search(choices=get_args(Distance)),
    }

    only_with: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {
        "biased": ("distance", ("distance_correlation",)),
        "hidden": ("transform", ("mlp",)),
        "warmup_epochs": ("schedule", ("warmup",)),
        "fit_epochs": ("schedule", ("frozen",)),
    }

    kind: Literal["embedding_compression"] = "embedding_compression"
    lam: float = Field(0.7, ge=0, le=1, description="weight of the distance term; the ground truth gets 1 - lam")
    mu: float = Field(1.0, ge=0, description="weight of the task loss that trains the transform")
    distance: Distance = Field("distance_correlation", description="how student and compressed embedding are compared")
    biased: bool = Field(False, description="double-centred instead of U-centred distance correlation")
    transform: Literal["linear", "mlp"] = Field(
        "linear", description="mlp (Linear-BN-ReLU-Linear) keeps more directions when there are few classes"
    )
    dimension: int | None = Field(None, ge=1, description="size of the compressed embedding; default: the student's")
    hidden: int | None = Field(None, ge=1, description="hidden size of the mlp; default: the teacher's embedding size")
    schedule: Literal["joint", "warmup", "frozen"] = Field(
        "warmup",
        description="joint: transform and student from the start; warmup: transform alone first; frozen: fitted, fixed",
    )
    warmup_epochs: int = Field(2, ge=1, description='epochs of the transform alone, schedule "warmup"')
    fit_epochs: int = Field(20, ge=1, description='epochs in which the transform is fitted, schedule "frozen"')
    detach: bool = Field(True, description="the distance trains the student only; false lets it move the transform too")

    @property
    def default_hard_weight(self) -> float:
        return round(1.0 - self.lam, 9)

    @property
    def still_teacher(self) -> bool:
        return self.schedule == "frozen"


class DKDSection(ObjectiveBase):
    """DKD: the divergence of KD taken apart into target against rest, and the classes of the rest."""

    title = "Decoupled knowledge distillation (DKD)"
    summary = "KD in two parts, so that what the teacher says about the wrong classes counts by itself"
    needs = frozenset({"logits", "labels", "classes"})
    tasks = frozenset({"multiclass"})
    training_cost = "two softmaxes of the cached logits"
    source = "Zhao et al. 2022, arXiv 2203.08679"
    search: ClassVar[dict[str, Search]] = {"alpha": _around(1.0), "beta": Search(low=1, high=16, log=True), "tau": _TAU}

    kind: Literal["dkd"] = "dkd"
    weight_schedule: WeightSchedule = Field(
        "warm-up", description="warm-up: the weight rises from 0, as published; decay: it falls to 0; each linearly"
    )
    alpha: float = Field(1.0, ge=0, description="weight of the target-class part")
    beta: float = Field(8.0, ge=0, description="weight of the non-target-class part")
    tau: float = Field(4.0, gt=0, description="temperature that softens teacher and student")


class DISTSection(ObjectiveBase):
    """DIST: correlates predictions over classes and over samples instead of equating them."""

    title = "Relational matching (DIST)"
    summary = "the student's probabilities correlate with the teacher's, within each sample and within each class"
    needs = frozenset({"logits", "classes"})
    training_cost = "two softmaxes and their correlations"
    source = "Huang et al. 2022, arXiv 2205.10536"
    search: ClassVar[dict[str, Search]] = {"weight": _around(2.0), "tau": _TAU}

    kind: Literal["dist"] = "dist"
    weight: float = Field(2.0, ge=0, description="factor on this objective's terms")
    tau: float = Field(1.0, gt=0, description="temperature that softens teacher and student")


class MSESection(ObjectiveBase):
    """Logit matching: the mean squared difference of student and teacher logits.

    Beside the labels, times (1 - hard_weight) with hard_weight 0.1 by default: our reading; Ba & Caruana use no labels.
    """

    title = "Logit matching (MSE)"
    summary = "the student's logits equal the teacher's, as numbers rather than as probabilities"
    needs = frozenset({"logits"})
    training_cost = "one difference of logits"
    source = (
        "Ba & Caruana 2014, arXiv 1312.6184; mean over the classes: Kim et al. 2021, arXiv 2105.08919; weight beside "
        "the labels is our reading"
    )
    search: ClassVar[dict[str, Search]] = {"weight": _around(1.0), "train.hard_weight": _HARD_WEIGHT}

    kind: Literal["mse"] = "mse"
    weight: float = Field(1.0, ge=0, description="factor on this objective's terms")

    @property
    def default_hard_weight(self) -> float:
        return 0.1


class EmbeddingSection(ObjectiveBase):
    """EmbKD: soft targets, and the squared distance of a linear map of the student's embedding to the teacher's."""

    title = "Embedding matching (EmbKD)"
    summary = "knowledge distillation, and beside it the student's embedding is mapped onto the teacher's"
    needs = frozenset({"logits", "embedding"})
    training_cost = "one linear map of the student's embedding, dropped after training"
    source = "the embedding baseline of Loo et al. 2024, arXiv 2409.20449; scale and weight are our reading"
    search: ClassVar[dict[str, Search]] = {
        # up to the plain squared norm of embeddings of unit length
        "lam": Search(low=0.1, high=1000, log=True),
        "tau": _TAU,
        "train.hard_weight": _HARD_WEIGHT,
    }

    kind: Literal["embedding"] = "embedding"
    lam: float = Field(
        1.0, ge=0, description="weight of the squared distance, per dimension of the teacher's embedding"
    )
    tau: float = Field(4.0, gt=0, description="temperature of the soft targets")

    @property
    def default_hard_weight(self) -> float:
        return 0.1


class FitNetSection(ObjectiveBase):
    """FitNet: a learned map of the student's embedding hits the teacher's."""

    title = "Hints (FitNet)"
    summary = "a learned linear map of the student's embedding equals the teacher's (mean squared error)"
    needs = frozenset({"embedding"})
    training_cost = "one linear map of the student's embedding, dropped after training"
    source = "Romero et al. 2015, arXiv 1412.6550; weight as in Tian et al. 2020, arXiv 1910.10699"
    search: ClassVar[dict[str, Search]] = {"weight": _around(100.0)}

    kind: Literal["fitnet"] = "fitnet"
    weight: float = Field(100.0, ge=0, description="factor on the mean squared error")


class VIDSection(ObjectiveBase):
    """VID: a lower bound of the mutual information between teacher and student embeddings."""

    title = "Variational information distillation (VID)"
    summary = "like hints, with a learned variance per dimension: what cannot be predicted counts less"
    needs = frozenset({"embedding"})
    training_cost = "one linear map of the student's embedding and a variance per dimension, dropped after training"
    source = "Ahn et al. 2019, arXiv 1904.05835"
    search: ClassVar[dict[str, Search]] = {"weight": _around(1.0)}

    kind: Literal["vid"] = "vid"


class RKDSection(ObjectiveBase):
    """RKD: distances and angles between samples are those in the teacher's embedding."""

    title = "Relational knowledge distillation (RKD)"
    summary = "distances between pairs and angles between triples of samples equal those in the teacher's embedding"
    needs = frozenset({"embedding"})
    training_cost = "(batch, batch) distances and (batch, batch, batch) angles: batches of at most a few hundred"
    source = "Park et al. 2019, arXiv 1904.05068"
    search: ClassVar[dict[str, Search]] = {"distance_weight": _around(25.0), "angle_weight": _around(50.0)}

    kind: Literal["rkd"] = "rkd"
    distance_weight: float = Field(25.0, ge=0, description="weight of the pairwise distances")
    angle_weight: float = Field(50.0, ge=0, description="weight of the angles")


class CRDSection(ObjectiveBase):
    """CRD: contrasts each sample's pair of embeddings with those of other samples from a memory bank."""

    title = "Contrastive representation distillation (CRD)"
    summary = "student and teacher embeddings of one sample agree, those of different samples do not"
    needs = frozenset({"embedding"})
    training_cost = "two projections and a memory bank of 2 x samples x dimension floats, dropped after training"
    source = "Tian et al. 2020, arXiv 1910.10699"
    search: ClassVar[dict[str, Search]] = {"weight": _around(0.8), "tau": Search(low=0.02, high=0.3, log=True)}

    kind: Literal["crd"] = "crd"
    weight: float = Field(0.8, ge=0, description="factor on this objective's terms")
    dimension: int = Field(128, ge=2, description="size of the projections that are compared")
    negatives: int | None = Field(
        None,
        ge=1,
        description="memory bank entries that each sample is contrasted with; default: 16384, or all there are",
    )
    tau: float = Field(0.07, gt=0, description="temperature of the similarities")
    momentum: float = Field(0.5, ge=0, lt=1, description="how much of the old entry the memory bank keeps")


class LELPSection(ObjectiveBase):
    """LELP: classes are split along directions of the teacher's embedding; the student predicts the parts."""

    title = "Learning embedding linear projections (LELP)"
    summary = "for few classes: splits every class along the teacher's embedding, the student predicts the subclasses"
    needs = frozenset({"embedding", "labels"})
    tasks = frozenset({"multiclass"})
    training_cost = "an offline fit on the cached embeddings, one projection of them per batch"
    inference_cost = "a head of classes x subclasses outputs and one log-sum-exp, both in the exported graph"
    source = "Loo et al. 2024, arXiv 2409.20449; normalisation, grids and defaults are our reading"
    search: ClassVar[dict[str, Search]] = {
        "subclasses_per_class": Search(choices=(2, 4, 8, 16)),
        "beta": _around(1.0),
        "tau": _TAU,
    }

    only_with: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = dict.fromkeys(
        ("projection", "null_space", "rotation"), ("subclasses", ("projection",))
    )

    kind: Literal["lelp"] = "lelp"
    subclasses_per_class: int = Field(8, ge=1, description="parts of every class, S; worth searching in 2, 4, 8, 16")
    beta: float = Field(1.0, ge=0, description="sharpness of the subclass probabilities; 0: all equal")
    tau: float = Field(1.0, gt=0, description="temperature of teacher and student")
    on: Literal["embedding", "compressed"] = Field(
        "embedding",
        description='compressed: on the embedding of an objective "ec" with schedule "frozen" in the same recipe',
    )
    projection: Literal["pca", "random"] = Field("pca", description="random: random directions instead (control)")
    subclasses: Literal["projection", "random"] = Field(
        "projection", description="random: random subclass targets of the same sharpness (control)"
    )
    null_space: bool = Field(
        True, description="false: keep the directions that the teacher's head reads, too (control)"
    )
    rotation: bool = Field(True, description="false: do not even out the directions' variances (control)")

    @property
    def default_hard_weight(self) -> float:
        return 0.0

    @property
    def still_teacher(self) -> bool:
        return True


class SubclassSection(ObjectiveBase):
    """Subclass distillation: the teacher is trained again with subclasses of its own making; the student matches."""

    title = "Subclass distillation"
    summary = "retrains the teacher to invent subclasses; the student matches all their probabilities"
    needs = frozenset({"embedding", "labels"})
    tasks = frozenset({"multiclass"})
    training_cost = 'a second teacher (kind "train"), or a new head on the embeddings of a frozen one'
    inference_cost = "a head of classes x subclasses outputs and one log-sum-exp, both in the exported graph"
    source = "Mueller, Kornblith & Hinton 2020, arXiv 2002.03936; the student's weights are our reading"
    search: ClassVar[dict[str, Search]] = {
        "weight": _around(1.0),
        "tau": _TAU,
    }  # the rest would train another teacher for every trial

    kind: Literal["subclass"] = "subclass"
    subclasses_per_class: int = Field(8, ge=1, description="subclasses of every class")
    tau: float = Field(1.0, gt=0, description="temperature of teacher and student")
    aux_weight: float = Field(1.0, ge=0, description="weight of the term that makes the teacher use its subclasses")
    aux_temperature: float = Field(1.0, gt=0, description="temperature of that term")

    @property
    def still_teacher(self) -> bool:
        return True


AnyObjective = (
    SupervisedSection
    | KDSection
    | DKDSection
    | DISTSection
    | MSESection
    | EmbeddingSection
    | FitNetSection
    | VIDSection
    | RKDSection
    | CRDSection
    | EmbeddingCompressionSection
    | DistanceCorrelationSection
    | CosineDifferenceSection
    | LELPSection
    | SubclassSection
)
_BY_KIND: dict[str, type[ObjectiveBase]] = {cls.model_fields["kind"].default: cls for cls in get_args(AnyObjective)}
_ALIASES = {"ec": "embedding_compression"}


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def _one(value: Any) -> Any:
    """Reads `"ec"` as `{"kind": "ec"}` and an alias as the full name; an unknown kind is an error."""
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, dict):
        return value
    if "kind" not in value:
        raise ValueError("an objective needs a kind; valid: " + ", ".join(_BY_KIND))
    kind = _ALIASES.get(value["kind"], value["kind"])
    if kind not in _BY_KIND:
        raise ValueError(f'no objective "{kind}"; {nearest(str(kind), [*_BY_KIND, *_ALIASES])}')
    return {**value, "kind": kind}


def _several(value: Any) -> Any:
    value = [part.strip() for part in value.split("+")] if isinstance(value, str) else value
    value = [value] if isinstance(value, dict | ObjectiveBase) else value
    if value in ([], ()):
        raise ValueError('at least one objective; the plain student is "supervised"')
    return value


ObjectiveSection = Annotated[AnyObjective, Field(discriminator="kind"), BeforeValidator(_one)]
ObjectiveSections = Annotated[tuple[ObjectiveSection, ...], BeforeValidator(_several)]
"""Of a recipe: `objective = "ec"` (a method by name, as published) or a list of `[[objective]]` tables."""


def resolve_hard_weight(sections: tuple[AnyObjective, ...], hard_weight: float | None) -> float:
    """The weight of the ground-truth term: what the recipe says, else the only objective's published one.

    Raises:
        InputError: several objectives and no `train.hard_weight`.
    """
    if hard_weight is not None:
        return hard_weight
    if len(sections) != 1:
        raise InputError(
            "several objectives, and no weight for the ground truth",
            where="train.hard_weight",
            evidence=" + ".join(section.kind for section in sections),
            fix="hard_weight = 0.3",
        )
    return sections[0].default_hard_weight


def check_needs(sections: tuple[AnyObjective, ...], available: frozenset[Need]) -> None:
    """Refuses an objective whose teacher or data lack what it needs, before anything is trained.

    Args:
        sections: the recipe's objectives.
        available: what there is; "classes" is judged by `check_data`.

    Raises:
        InputError: names the objective's place in the recipe, what is missing and what would do.
    """
    for position, section in enumerate(sections):
        missing = section.needs - available - {"classes"}
        if not missing:
            continue
        possible = [kind for kind, cls in _BY_KIND.items() if cls.needs - {"classes"} <= available]
        raise InputError(
            f'objective "{section.kind}" needs {" and ".join(sorted(section.needs - {"classes"}))}, '
            f"and there are no {' and no '.join(_plural(need) for need in sorted(missing))}",
            where=f"objective[{position}].kind",
            evidence=f"available: {', '.join(sorted(available)) or 'nothing'}",
            fix=f"another teacher, or one of: {', '.join(possible)}" if possible else "another teacher",
        )


def check_data(sections: tuple[AnyObjective, ...], task: Task, classes: int, train_samples: int) -> None:
    """Refuses what the data cannot serve, before anything is trained.

    Args:
        sections: the recipe's objectives.
        task: of the data.
        classes: number of classes, or of labels.
        train_samples: size of the training split.

    Raises:
        InputError: names the objective's place in the recipe, what is missing and what would do.
    """
    for position, section in enumerate(sections):
        here = f"objective[{position}]"
        if task not in section.tasks:
            possible = [kind for kind, cls in _BY_KIND.items() if task in cls.tasks]
            raise InputError(
                f'objective "{section.kind}" is not defined for several labels per sample',
                where=f"{here}.kind",
                evidence='data.task = "multilabel"; its formula needs classes that exclude each other',
                fix=f"one of: {', '.join(possible)}",
            )
        if "classes" in section.needs and classes <= 2:
            raise InputError(
                f'objective "{section.kind}" needs more than two classes, and there are {classes}',
                where=f"{here}.kind",
                evidence="what it compares among the other classes is constant when there are only two",
                fix='"kd", or "lelp", which is made for few classes' if task == "multiclass" else '"kd"',
            )
        if isinstance(section, CRDSection) and section.negatives is not None and section.negatives >= train_samples:
            raise InputError(
                f"{section.negatives:,} negatives are more than the training samples give",
                where=f"{here}.negatives",
                evidence=f"{train_samples:,} training samples, of which one is the sample itself",
                fix=f"negatives = {train_samples - 1} or fewer, or leave it out",
            )
        if isinstance(section, LELPSection | SubclassSection) and section.subclasses_per_class >= train_samples:
            raise InputError(
                f"{section.subclasses_per_class} subclasses per class are more than the data allows",
                where=f"{here}.subclasses_per_class",
                evidence=f"{train_samples:,} training samples",
                fix=f"subclasses_per_class = {max(1, min(8, train_samples - 1))} or fewer",
            )
    _check_compressed(sections)


def _check_compressed(sections: tuple[AnyObjective, ...]) -> None:
    """LELP on a compressed embedding needs exactly one transform in the recipe, and one that stands still."""
    transforms = [section for section in sections if isinstance(section, EmbeddingCompressionSection)]
    for position, section in enumerate(sections):
        if not isinstance(section, LELPSection) or section.on == "embedding":
            continue
        where = f"objective[{position}].on"
        if len(transforms) != 1:
            raise InputError(
                'on = "compressed" needs one objective "ec" beside it, whose transform makes the embedding',
                where=where,
                evidence=f"objectives: {', '.join(each.kind for each in sections)}",
                fix='add [[objective]] kind = "ec", schedule = "frozen", or on = "embedding"',
            )
        if transforms[0].schedule != "frozen":
            raise InputError(
                "LELP needs an embedding that stands still, and this transform learns along with the student",
                where=f"objective[{sections.index(transforms[0])}].schedule",
                evidence=f'schedule = "{transforms[0].schedule}"; the subclasses are fitted once, before training',
                fix='schedule = "frozen"',
            )


def check_subclasses(
    sections: tuple[AnyObjective, ...], classes: int, teacher_dim: Callable[[], int], student_dim: int | None = None
) -> None:
    """Refuses more LELP subclasses than the embedding can have directions for, before anything is trained.

    The training samples may leave fewer still: `LELP.prepare` counts those.

    Args:
        sections: the recipe's objectives.
        classes: C of the data; the head takes C - 1 directions for itself.
        teacher_dim: D_t; asked only where it matters.
        student_dim: D_s, a compressed embedding's size where the recipe names none; None: not known yet, unchecked.

    Raises:
        InputError: names the objective's place in the recipe and the largest number that would do.
    """
    for position, section in enumerate(sections):
        if not isinstance(section, LELPSection) or section.subclasses == "random":
            continue
        if section.on == "compressed":
            transform = next(each for each in sections if isinstance(each, EmbeddingCompressionSection))
            name, size = "the compressed embedding", transform.dimension or student_dim
        else:
            name, size = "the teacher's embedding", teacher_dim()
        if size is None:
            continue
        taken = min(classes - 1, size) if section.null_space else 0
        limit = size - taken
        if section.subclasses_per_class > limit:
            raise InputError(
                f"{section.subclasses_per_class} subclasses per class are more than the embedding has directions for",
                where=f"objective[{position}].subclasses_per_class",
                evidence=f"{name} has {size} dimensions"
                + (f", of which the head of {classes} classes takes {taken}" if taken else ""),
                fix=f"subclasses_per_class = {limit} or fewer" if limit else 'null_space = false, or objective = "kd"',
            )


def check_teacher(sections: tuple[AnyObjective, ...], moves: bool) -> None:
    """Refuses a teacher that learns beside the student where something is fitted on its outputs once, before training.

    Args:
        sections: the recipe's objectives.
        moves: whether the teacher learns on.

    Raises:
        InputError: names the objective's place in the recipe.
    """
    for position, section in enumerate(sections):
        if moves and section.still_teacher:
            raise InputError(
                f'objective "{section.kind}" needs a teacher that stands still, and this one learns along with the '
                "student",
                where=f"objective[{position}].kind",
                evidence="it is fitted once, before training, on what the teacher says then",
                fix='teacher.strategy = "frozen", or another objective',
            )
        if moves and "embedding" in section.needs:
            raise InputError(
                f'objective "{section.kind}" compares embeddings, and a teacher that learns along with the student is '
                "told by logits",
                where=f"objective[{position}].kind",
                fix='objective = "kd", "dkd", "dist" or "mse"; or teacher.strategy = "frozen"',
            )
    if moves and not any("logits" in section.needs for section in sections):
        raise InputError(
            "the teacher learns along with the student, but no objective listens to it",
            where="objective",
            evidence=", ".join(section.kind for section in sections),
            fix='objective = "kd", or teacher.strategy = "frozen"',
        )


def check_mixup(sections: tuple[AnyObjective, ...], mixup: float) -> None:
    """Refuses mixup where mixing cached outputs is not sound, before anything is trained.

    Args:
        sections: the recipe's objectives.
        mixup: `train.mixup`; 0 is off, and fits everything.

    Raises:
        InputError: an objective matches embeddings (that of a mixed image is not the mixed embedding), or its loss for
            mixed targets is not the mixture of two losses.
    """
    for section in sections:
        if mixup and not section.mixup:
            raise InputError(
                f'mixup cannot be used with objective "{section.kind}"',
                where="train.mixup",
                evidence="the teacher's embedding of a mixed image is not the mixture of the cached embeddings"
                if "embedding" in section.needs
                else "its loss for mixed targets is not the mixture of the two samples' losses",
                fix="mixup = 0",
            )


def _plural(need: str) -> str:
    return {"embedding": "embeddings"}.get(need, need)


class Parameter(Section):
    """One key of an objective's table."""

    name: str
    default: str | float | bool | None
    meaning: str


class Description(Section):
    """What `edgestill methods` says about one objective."""

    kind: str
    aliases: tuple[str, ...]
    title: str
    summary: str
    needs: tuple[str, ...]
    tasks: tuple[str, ...]
    mixup: bool
    default_hard_weight: float
    parameters: tuple[Parameter, ...]
    search: dict[str, Search]
    training_cost: str
    inference_cost: str
    source: str
    control: bool


def describe_objectives() -> tuple[Description, ...]:
    """Every objective with its parameters; defaults and meanings come from the recipe's own fields."""
    return tuple(
        Description(
            kind=kind,
            aliases=tuple(alias for alias, full in _ALIASES.items() if full == kind),
            title=cls.title,
            summary=cls.summary,
            needs=tuple(sorted(cls.needs)),
            tasks=tuple(sorted(cls.tasks)),
            mixup=cls.mixup,
            default_hard_weight=cls().default_hard_weight,
            parameters=tuple(
                Parameter(name=name, default=field.default, meaning=field.description or "")
                for name, field in cls.model_fields.items()
                if name != "kind"
            ),
            search=cls.search,
            training_cost=cls.training_cost,
            inference_cost=cls.inference_cost,
            source=cls.source,
            control=cls.control,
        )
        for kind, cls in _BY_KIND.items()
    )
