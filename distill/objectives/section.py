"""The `[[objective]]` tables of a recipe, and what `edgestill methods` prints about them. Imports only pydantic."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from profiles.errors import InputError, nearest
from profiles.section import Section

Need = Literal["logits", "embedding", "labels"]
Distance = Literal["distance_correlation", "cosine_difference", "cosine"]


class ObjectiveBase(Section):
    """What every objective's table has, and the facts about a method that do not depend on its parameters.

    The ground-truth term belongs to no objective: the loop adds it once, with `train.hard_weight`.
    """

    title: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    """What the teacher ("logits", "embedding") and the data ("labels") must supply."""
    mixup: ClassVar[bool] = False
    """Whether training on mixed inputs with the mixed cached outputs of both originals is sound."""
    training_cost: ClassVar[str]
    inference_cost: ClassVar[str] = "none: nothing of it is in the exported student"
    source: ClassVar[str]
    control: ClassVar[bool] = False
    """True for what is there to be compared with, not to be shipped."""

    weight: float = Field(1.0, ge=0, description="factor on this objective's terms")

    @property
    def default_hard_weight(self) -> float:
        """The weight of the ground-truth term when this is the only objective and the recipe names none."""
        return 1.0


class SupervisedSection(ObjectiveBase):
    """Ground truth alone."""

    title = "Supervised"
    summary = "the plain student: learns from the labels, sees no teacher"
    needs = frozenset({"labels"})
    mixup = True
    training_cost = "none"
    source = "the reference that every distilled student is compared with"
    control = True

    kind: Literal["supervised"] = "supervised"


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


AnyObjective = (
    SupervisedSection | KDSection | EmbeddingCompressionSection | DistanceCorrelationSection | CosineDifferenceSection
)
_BY_KIND: dict[str, type[ObjectiveBase]] = {cls.model_fields["kind"].default: cls for cls in get_args(AnyObjective)}
_ALIASES = {"ec": "embedding_compression"}


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
    value = [value] if isinstance(value, str | dict | ObjectiveBase) else value
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

    Raises:
        InputError: names the objective's place in the recipe, what is missing and what would do.
    """
    for position, section in enumerate(sections):
        missing = section.needs - available
        if not missing:
            continue
        possible = [kind for kind, cls in _BY_KIND.items() if cls.needs <= available]
        raise InputError(
            f'objective "{section.kind}" needs {" and ".join(sorted(section.needs))}, '
            f"and there are no {' and no '.join(_plural(need) for need in sorted(missing))}",
            where=f"objective[{position}].kind",
            evidence=f"available: {', '.join(sorted(available)) or 'nothing'}",
            fix=f"another teacher, or one of: {', '.join(possible)}" if possible else "another teacher",
        )


def check_mixup(sections: tuple[AnyObjective, ...], mixup: float) -> None:
    """Refuses mixup where mixing cached outputs is not sound, before anything is trained.

    Args:
        sections: the recipe's objectives.
        mixup: `train.mixup`; 0 is off, and fits everything.

    Raises:
        InputError: an objective matches embeddings; the embedding of a mixed image is not the mixed embedding.
    """
    for section in sections:
        if mixup and not section.mixup:
            raise InputError(
                f'mixup cannot be used with objective "{section.kind}"',
                where="train.mixup",
                evidence="the teacher's embedding of a mixed image is not the mixture of the cached embeddings",
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
    mixup: bool
    default_hard_weight: float
    parameters: tuple[Parameter, ...]
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
            mixup=cls.mixup,
            default_hard_weight=cls().default_hard_weight,
            parameters=tuple(
                Parameter(name=name, default=field.default, meaning=field.description or "")
                for name, field in cls.model_fields.items()
                if name != "kind"
            ),
            training_cost=cls.training_cost,
            inference_cost=cls.inference_cost,
            source=cls.source,
            control=cls.control,
        )
        for kind, cls in _BY_KIND.items()
    )
