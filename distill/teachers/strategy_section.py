"""How a teacher itself learns: the `[teacher.generic]` and `[teacher.coached]` tables. Imports only pydantic.

| strategy | the teacher |
|---|---|
| `frozen` | stays as it is |
| `generic` | is trained once so that it teaches any student of a pool (GTN, Binici et al. 2024, arXiv 2407.16040) |
| `sftn` | is trained once for one student architecture (SFTN, Park et al. 2021, arXiv 2102.07650) |
| `online` | learns beside the student, from the labels and from the student (ProKT, Shi et al. 2021) |
| `meta` | learns beside the student, from the student's loss on held-out data alone (MetaDistil, Zhou et al. 2022) |
| `lgtm` | as online, and told by distillation influence which samples help (LGTM, Ren et al. 2023, arXiv 2305.09651) |
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from profiles.section import Section

Strategy = Literal["frozen", "generic", "sftn", "online", "meta", "lgtm"]
CONDITIONED: frozenset[str] = frozenset({"generic", "sftn"})
"""Strategies that change how a teacher of kind "train" is trained; afterwards it stands still."""
COACHED: frozenset[str] = frozenset({"online", "meta", "lgtm"})
"""Strategies with which the teacher learns beside the student."""
HELD_OUT = 0.05
"""Share of the training split that `meta` and `lgtm` hold out unless the recipe says otherwise."""
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class GenericSection(Section):
    """What a teacher of strategy "generic" or "sftn" is conditioned on.

    The pool holds every combination of `widths`, `depths`, and `kernels` (conv, and convolutional texts) or `heads`
    (transformers); None: the family's own choices up to the teacher's size. `archs` names its members one by one
    instead. Strategy "sftn" is a pool of one: the student's own architecture, or the one that `archs` names.
    """

    archs: tuple[str, ...] | None = Field(None, min_length=1, description="the pool, architecture by architecture")
    widths: tuple[int, ...] | None = Field(None, min_length=1, description="widths in the pool")
    depths: tuple[int, ...] | None = Field(None, min_length=1, description="depths in the pool")
    kernels: tuple[int, ...] | None = Field(None, min_length=1, description="kernel sizes in the pool")
    heads: tuple[int, ...] | None = Field(None, min_length=1, description="attention heads in the pool (transformers)")
    within_limits: bool = Field(
        True, description="leave out what no target can carry: file size, memory, roofline bound of the latency"
    )
    paths: int = Field(2, ge=1, le=16, description="architectures sampled in every step, K")
    distribution: Literal["uniform", "easy", "hard"] = Field(
        "uniform",
        description="of the sampled architectures; easy, hard: learned, towards low or high conditioning loss",
    )
    entropy: _Weight = Field(
        0.5, description="beta, of the entropy that keeps a learned distribution wide: it tends to exp(-loss / beta)"
    )
    sampler_learning_rate: _Positive = Field(0.05, description="Adam's, of a learned distribution")
    ce_weight: _Weight = Field(1.0, description="lambda_CE: the branches' cross-entropy")
    kl_weight: _Weight = Field(3.0, description="lambda_KL: the branches' divergence from the teacher")
    tau: _Positive = Field(1.0, description="temperature of that divergence")
    inherit: bool = Field(
        False,
        description="students start from the pool's shared weights; also trains a branch that starts at the input",
    )


def parse_lambda(value: float | str) -> tuple[Literal["number", "bilevel", "official", "ratio"], float]:
    """What `lambda_inf` says: its form and its number (0 where the form has none).

    Raises:
        ValueError: none of the forms.
    """
    if isinstance(value, int | float):
        if not 0 <= value < float("inf"):
            raise ValueError(f"lambda_inf = {value:g}: a number from 0 on")
        return "number", float(value)
    if value in ("bilevel", "official"):
        return value, 0.0  # type: ignore[return-value]
    form, _, number = value.partition(":")
    try:
        ratio = float(number)
    except ValueError:
        ratio = -1.0
    if form != "ratio" or not 0 < ratio < float("inf"):
        raise ValueError(f'"{value}" is no lambda_inf: a number, "bilevel", "official", or "ratio:0.1"')
    return "ratio", ratio


def _checked(value: float | str) -> float | str:
    parse_lambda(value)
    return value


class CoachedSection(Section):
    """How a teacher learns beside the student. `held_out` None: 0.05 for meta and lgtm, nothing for online.

    What is held out judges the student. Neither the student nor the coached teacher trains on it from then on, but a
    teacher of kind "train" has seen it before, as it learns from the whole training split until it is coached, and
    class weights "balanced" count it, too.

    The teacher's batch normalisation keeps its statistics, and its dropout is off (our reading).
    """

    learning_rate: _Positive | Literal["auto"] = Field(
        "auto", description="the teacher's, AdamW, peak of the student's schedule; auto: 3e-5 (transformers), 1e-4"
    )
    weight_decay: _Weight = Field(0.01, description="the teacher's, on matrices and kernels")
    hard_weight: float = Field(
        0.6, ge=0, le=1, description="a_t: share of the labels in the teacher's loss; the rest is the student's say"
    )
    held_out: float | None = Field(
        None,
        gt=0,
        le=0.5,
        description="share of the training split that judges the student; neither student nor coached teacher trains "
        "on it (a teacher of kind train has seen it before); default: 0.05 for meta and lgtm, nothing for online",
    )
    held_out_batch_size: int | None = Field(
        None, ge=1, description="held-out samples per step; default: the batch size, or all of them"
    )
    influence: Literal["plain", "preconditioned"] = Field(
        "plain", description="plain: as published; preconditioned: exact for the student's own optimiser"
    )
    derivative: Literal["finite_difference", "jvp"] = Field(
        "finite_difference", description="how the change of the student's logits along the held-out gradient is found"
    )
    lambda_inf: Annotated[float | str, AfterValidator(_checked)] = Field(
        "ratio:0.1",
        description='weight of the influence: a number, "bilevel", "official", or "ratio:R" of the gradient norms',
    )
    trainable_layers: int | None = Field(
        None, ge=1, description="so many of a transformer's last layers learn, the others are cached; default: all"
    )


_INFLUENCED: frozenset[str] = frozenset({"meta", "lgtm"})
ONLY_WITH: dict[tuple[str, str], frozenset[str]] = {
    **{
        ("generic", name): frozenset({"generic"})
        for name in ("widths", "depths", "kernels", "heads", "within_limits", "paths", "distribution", "entropy")
    },
    ("generic", "sampler_learning_rate"): frozenset({"generic"}),
    ("coached", "hard_weight"): frozenset({"online", "lgtm"}),
    ("coached", "held_out_batch_size"): _INFLUENCED,
    ("coached", "influence"): _INFLUENCED,
    ("coached", "derivative"): _INFLUENCED,
    ("coached", "lambda_inf"): frozenset({"lgtm"}),
}
"""Keys of the strategies' tables that only some of them read."""


_TABLES: tuple[tuple[str, type[Section], frozenset[str]], ...] = (
    ("generic", GenericSection, CONDITIONED),
    ("coached", CoachedSection, COACHED),
)


def keys() -> tuple[tuple[str, str, frozenset[str]], ...]:
    """Table, key, and the strategies that read it, of every setting of the strategies' tables."""
    return tuple(
        (table, name, ONLY_WITH.get((table, name), strategies))
        for table, section, strategies in _TABLES
        for name in section.model_fields
    )


class StrategyParameter(Section):
    """One key of a strategy's table, by its place below `[teacher]`."""

    name: str
    default: str | float | bool | tuple[str | int, ...] | None
    meaning: str


class StrategyDescription(Section):
    """What `edgestill methods` says about one strategy."""

    kind: Strategy
    title: str
    summary: str
    needs: str
    students: str
    cost: str
    source: str
    parameters: tuple[StrategyParameter, ...]


_LEARNS = 'a teacher of kind "train", "transformers" or "torch", and an objective on its logits (kd, dkd, dist, mse)'
_SPLITS = 'a teacher of kind "train"'
_ANY = "each from the finished teacher, with any objective but subclass"
_ITS_OWN = "each beside a copy of the teacher of its own, which is kept with it"
_FACTS: dict[Strategy, tuple[str, str, str, str, str, str]] = {
    "frozen": (
        "A teacher that stands still",
        "the teacher is trained on the labels, or given, and then never changes",
        "any teacher",
        "each from the same stored outputs, with any objective",
        "none",
        "Hinton, Vinyals & Dean 2015, arXiv 1503.02531",
    ),
    "generic": (
        "A generic teacher (GTN)",
        "trained once, with parts of students grafted on it, so that it teaches any student of a pool",
        _SPLITS,
        _ANY,
        "a longer training of the teacher, once for all students; none for a student",
        "Binici et al. 2024, arXiv 2407.16040; sampling and weights are our reading",
    ),
    "sftn": (
        "A student-friendly teacher (SFTN)",
        "as generic, for one student architecture",
        _SPLITS,
        _ANY,
        "a longer training of the teacher, for every student architecture anew; none for a student",
        "Park et al. 2021, arXiv 2102.07650",
    ),
    "online": (
        "Online distillation (ProKT)",
        "the teacher learns along with the student, from the labels and from what the student says",
        _LEARNS,
        _ITS_OWN,
        "a step of the teacher in every step of a student",
        "Shi et al. 2021",
    ),
    "meta": (
        "Meta distillation (MetaDistil)",
        "the teacher learns along with the student, from the student's loss on held-out data alone",
        _LEARNS,
        _ITS_OWN,
        "a step of the teacher and about three passes of the student in every step of a student",
        "Zhou et al. 2022",
    ),
    "lgtm": (
        "Learning good teacher matters (LGTM)",
        "as online, and distillation influence tells the teacher which samples help the student on held-out data",
        _LEARNS,
        _ITS_OWN,
        "a step of the teacher and about three passes of the student in every step of a student",
        "Ren et al. 2023, arXiv 2305.09651",
    ),
}
"""Title, summary, needs, how students learn, cost, source."""


def describe_strategies() -> tuple[StrategyDescription, ...]:
    """Every strategy with its parameters; defaults and meanings come from the recipe's own fields."""
    fields = {table: section.model_fields for table, section, _ in _TABLES}
    return tuple(
        StrategyDescription(
            kind=kind,
            title=title,
            summary=summary,
            needs=needs,
            students=students,
            cost=cost,
            source=source,
            parameters=tuple(
                StrategyParameter(
                    name=f"{table}.{name}",
                    default=fields[table][name].default,
                    meaning=fields[table][name].description or "",
                )
                for table, name, strategies in keys()
                if kind in strategies
            ),
        )
        for kind, (title, summary, needs, students, cost, source) in _FACTS.items()
    )
