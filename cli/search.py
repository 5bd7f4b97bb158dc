"""What tuning tries: the searched recipe keys of a combination, and the settings that Optuna proposes next."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.overrides import set_key, split_override
from cli.recipe import check
from cli.study_grid import OBJECTIVE, Combination
from cli.study_section import VariantSection
from distill.objectives.section import LEARNING_RATE_SEARCH, AnyObjective, Search, resolve_hard_weight
from profiles.artifact import content_key
from profiles.errors import InputError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LEARNING_RATE = "train.learning_rate"
HARD_WEIGHT = "train.hard_weight"
_DIGITS = 4
"""Significant digits of a proposed value, so that the report shows exactly what was trained."""


class Dimension(Search):
    """One searched key. default: its value without tuning."""

    default: int | float | str


Space = dict[str, Dimension]
"""Dotted recipe key -> what is tried for it."""


def check_trials(trials: int) -> None:
    """Refuses a tuning that cannot be, before anything is loaded.

    Raises:
        InputError: fewer than one trial, or no Optuna.
    """
    if trials < 1:
        raise InputError(f"{trials} trials", where="--tune", fix="--tune 20; leave it out to tune nothing")
    if importlib.util.find_spec("optuna") is None:
        raise InputError(
            "tuning needs Optuna, which is not installed", where="--tune", fix="pip install 'edgestill[tune]'"
        )


def search_space(combination: Combination, variants: Sequence[VariantSection] = ()) -> Space:
    """What tuning tries for a combination: the learning rate, and what its objectives declare.

    What is compared stays as it is: factors, what a variant sets, and settings of an objective that are not at their
    defaults ("kd tau=1" remains that). A `train.hard_weight` of the recipe stays, too, and so does all of `[explore]`.

    Args:
        combination: of a study's grid.
        variants: the recipe's `[[study.variant]]`.
    """
    recipe, sections = combination.recipe, combination.recipe.objective
    peak = recipe.train.peak_learning_rate
    space = {
        LEARNING_RATE: Dimension(
            low=peak / LEARNING_RATE_SEARCH, high=peak * LEARNING_RATE_SEARCH, log=True, default=peak
        )
    }
    for position, section in enumerate(sections):
        for name, search in type(section).search.items():
            if name == HARD_WEIGHT:
                if combination.hard_weight is None:
                    default = resolve_hard_weight(sections, None)
                    space[HARD_WEIGHT] = Dimension(default=default, **search.model_dump())
                continue
            value = getattr(section, name)
            if value == type(section).model_fields[name].default:
                key = f"{OBJECTIVE}.{_place(sections, position)}.{name}"
                space[key] = Dimension(default=value, **search.model_dump())
    compared = [*combination.factors]
    for variant in variants:
        if variant.name == combination.method:
            compared += [split_override(override, "study.variant.set")[0] for override in variant.set]
    return {key: dimension for key, dimension in space.items() if not any(_same(key, other) for other in compared)}


def defaults(space: Space) -> dict[str, Any]:
    """The settings without tuning."""
    return {key: dimension.default for key, dimension in space.items()}


def changed(combination: Combination, settings: Mapping[str, Any]) -> Combination:
    """The combination with other values of recipe keys.

    Raises:
        InputError: a wrong key or value.
    """
    values = combination.recipe.model_dump(mode="json", exclude_none=True)
    for key, value in settings.items():
        set_key(values, key, value, key)
    recipe = check(values, f"tuning of {combination.label}")
    return Combination(combination.method, combination.factors, recipe)


def propose(space: Space, results: Sequence[tuple[Mapping[str, Any], float | None]], number: int) -> dict[str, Any]:
    """The settings of the next trial: Optuna's TPE, which draws at random until there are ten results.

    The same arguments give the same settings, so that a tuning that was stopped goes on as if it had not been. The
    learning rate is drawn first and by the trial's number alone: at random, every method tries the same ones.

    Args:
        space: not empty.
        results: settings and validation metric (higher is better) of the trials so far; None: it failed.
        number: of this trial.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(dimension) for key, dimension in space.items()}
    seed = int(content_key("tuning", number)[:8], 16)  # neighbouring seeds draw alike
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for settings, value in results:
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        study.add_trial(create_trial(state=state, params=dict(settings), distributions=distributions, value=value))
    drawn = study.ask(distributions).params
    return {key: _rounded(drawn[key], dimension) for key, dimension in space.items()}


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if dimension.choices:
        return CategoricalDistribution(dimension.choices)
    assert dimension.low is not None
    assert dimension.high is not None
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _rounded(value: Any, dimension: Dimension) -> Any:
    if dimension.low is None or dimension.high is None:
        return value
    return min(max(float(f"{value:.{_DIGITS}g}"), dimension.low), dimension.high)


def _place(sections: Sequence[AnyObjective], position: int) -> str:
    """How a key names an objective: by its kind, or by its position where a kind stands twice."""
    kind = sections[position].kind
    return kind if [section.kind for section in sections].count(kind) == 1 else str(position)


def _same(key: str, other: str) -> bool:
    """Whether two dotted keys may mean one value; an objective goes by its kind or by its position."""
    if key.startswith(f"{OBJECTIVE}.") and other.startswith(f"{OBJECTIVE}."):
        return key.rpartition(".")[2] == other.rpartition(".")[2]
    return other != OBJECTIVE and (key == other or key.startswith(f"{other}."))
