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
    entropy: float = Field(0.01, ge=0, description="weight of the entropy that keeps a learned distribution wide, beta")
    sampler_learning_rate: float = Field(0.05, gt=0, description="Adam's, of a learned distribution")
    ce_weight: float = Field(1.0, ge=0, description="lambda_CE: the branches' cross-entropy")
    kl_weight: float = Field(3.0, ge=0, description="lambda_KL: the branches' divergence from the teacher")
    tau: float = Field(1.0, gt=0, description="temperature of that divergence")
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

    The teacher's batch normalisation keeps its statistics, and its dropout is off (our reading).
    """

    learning_rate: float | Literal["auto"] = Field(
        "auto", description="the teacher's, AdamW, peak of the student's schedule; auto: 3e-5 (transformers), 1e-4"
    )
    weight_decay: float = Field(0.01, ge=0, description="the teacher's, on matrices and kernels")
    hard_weight: float = Field(
        0.6, ge=0, le=1, description="a_t: share of the labels in the teacher's loss; the rest is the student's say"
    )
    held_out: float | None = Field(
        None, gt=0, le=0.5, description="share of the training split whose loss judges the student; nobody trains on it"
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
