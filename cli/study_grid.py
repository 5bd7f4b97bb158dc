"""The grid of a study: every combination of method and factors as a checked recipe, before anything is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cli.overrides import parse_value, parse_values, set_key, split_override
from cli.recipe import LoadedRecipe, Recipe, check
from distill.exploration.section import KINDS_OF_KEY as KINDS_OF_EXPLORE_KEY
from distill.objectives.section import AnyObjective, ObjectiveSections, check_mixup, resolve_hard_weight
from distill.teachers.strategy_section import keys as strategy_keys
from profiles.errors import InputError, nearest

OBJECTIVE = "objective"
STRATEGY = "teacher.strategy"
EXPLORE = "explore.kind"
_METHOD_KEYS = (OBJECTIVE, STRATEGY, EXPLORE)
"""Keys whose values are methods; every other one is a factor."""
TRAIN_SIZE = "data.train_size"
PLAIN = "supervised"
_NOT_TRAINING = ("name", "export", "measure", "target", "plain_students", "study")
"""Parts of a recipe that decide nothing of what a study trains."""
_SECTIONS: TypeAdapter[tuple[AnyObjective, ...]] = TypeAdapter(ObjectiveSections)

Change = tuple[str, Any]


@dataclass(frozen=True)
class Combination:
    """One method with one value of every factor; its cells differ in the seed alone.

    `recipe` has both set, but for the factors of explorations that its own does not read.
    """

    method: str
    factors: dict[str, Any]
    recipe: Recipe

    @property
    def label(self) -> str:
        """Both as people read them: `kd, train_size=500`."""
        return ", ".join([self.method, *(f"{short_key(key)}={shown(value)}" for key, value in self.factors.items())])

    @property
    def is_plain(self) -> bool:
        """Whether it learns from the labels alone."""
        return [section.kind for section in self.recipe.objective] == [PLAIN] and not self.explores

    @property
    def explores(self) -> bool:
        """Whether it learns on further inputs, too."""
        return self.recipe.explore.kind != "none"

    @property
    def is_coached(self) -> bool:
        """Whether its teacher learns along with the student; a plain student has none."""
        return self.recipe.teacher.moves and not self.is_plain

    @property
    def hard_weight(self) -> float | None:
        """`train.hard_weight` as it holds here: the recipe's, which the plain student has no use for."""
        return None if self.is_plain else self.recipe.train.hard_weight


@dataclass(frozen=True)
class Grid:
    """methods: their names in the order of the table. factors: the values of every other varied key. control: the
    method that the others are compared with. combinations: factors outermost, methods innermost."""

    methods: tuple[str, ...]
    factors: dict[str, tuple[Any, ...]]
    control: str
    seeds: int
    combinations: tuple[Combination, ...]


def build_grid(
    loaded: LoadedRecipe,
    *,
    vary: Sequence[str] | Mapping[str, Sequence[Any]] = (),
    seeds: int | None = None,
    control: str | None = None,
) -> Grid:
    """Every combination of a study, checked.

    Args:
        loaded: the recipe, with its `[study]`.
        vary: `KEY=V1,V2` texts as on the command line, or keys with their values; each replaces the recipe's list.
        seeds: number of seeds; None: the recipe's.
        control: name of the reference, or its objective; None: the recipe's.

    Raises:
        InputError: nothing to vary, an unknown key or wrong value (named), two methods of one name, a control that is
            not among the methods.
    """
    section = loaded.recipe.study
    varied = dict(section.vary) | _asked(vary)
    origin = loaded.origin
    if not varied and not section.variant:
        raise InputError(
            "there is nothing to compare",
            where="--vary",
            fix="--vary objective=supervised,kd,ec, or [study.vary] in the recipe",
        )
    values = loaded.recipe.model_dump(mode="json", exclude_none=True)
    for key in varied:
        _refuse_key(key)
    for key, entries in varied.items():
        if key == "explore":
            raise InputError(
                "an exploration is a method of a study, not a factor",
                where=f"--vary {key}",
                fix='--vary explore.kind=none,random, or [[study.variant]] with set = ["explore.kind=random"]',
            )
        for entry in entries if _explored_key(key) is None else ():  # those depend on the kind
            _checked(values, [(key, entry)], origin, f"--vary {key}={shown(entry)}")
    methods = _methods(loaded, values, varied)
    factors = {key: tuple(entries) for key, entries in varied.items() if key not in _METHOD_KEYS}
    for key, entries in factors.items():
        words = [shown(entry) for entry in entries]
        twice = next((word for word in words if words.count(word) > 1), None)
        if twice is not None:
            raise InputError(f"{key} takes the value {twice} twice", where=f"--vary {key}")
        for name, changes in methods.items():
            if any(key == changed for changed, _ in changes):
                raise InputError(
                    f'"{key}" is varied, and method "{name}" sets it, too',
                    where=f"--vary {key}",
                    fix="keep one of them",
                )
    combinations = []
    for chosen in itertools.product(*([(key, entry) for entry in entries] for key, entries in factors.items())):
        for name, changes in methods.items():
            label = Combination(name, dict(chosen), loaded.recipe).label
            kind = dict(changes).get(EXPLORE, loaded.recipe.explore.kind)
            read = [(key, entry) for key, entry in chosen if _reads(kind, key)]
            recipe = _checked(values, [*changes, *read], origin, f"--vary ({label})")
            combination = Combination(name, dict(chosen), recipe)
            _check_training(combination)
            combinations.append(combination)
    for key in factors:
        if not any(_reads(one.recipe.explore.kind, key) for one in combinations):
            wanted = KINDS_OF_EXPLORE_KEY[_explored_key(key) or ""]
            raise InputError(
                f'no method of this study reads "{key}"',
                where=f"--vary {key}",
                evidence=f"it belongs to explore.kind {' or '.join(sorted(wanted))}",
                fix=f"--vary explore.kind=none,{min(wanted)} or --set explore.kind={min(wanted)}",
            )
    number = section.seeds if seeds is None else seeds
    if number < 1:
        raise InputError(f"{number} seeds", where="--seeds", fix="--seeds 5")
    return Grid(tuple(methods), factors, _control(control or section.control, methods), number, tuple(combinations))


def method_label(sections: Sequence[AnyObjective]) -> str:
    """Objectives in a few words: the kinds, each with the settings that are not its defaults.

    >>> method_label(_SECTIONS.validate_python({"kind": "kd", "tau": 1.0}))
    'kd tau=1'
    >>> method_label(_SECTIONS.validate_python("ec+kd"))
    'embedding_compression+kd'
    """
    return "+".join(
        " ".join(
            [
                section.kind,
                *(
                    f"{name}={shown(getattr(section, name))}"
                    for name, field in type(section).model_fields.items()
                    if name != "kind" and getattr(section, name) != field.default
                ),
            ]
        )
        for section in sections
    )


def shown(value: Any) -> str:
    """A value in one short text: 0.5, true, kd, {kind=kd,tau=1}."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}={shown(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(shown(entry) for entry in value) + "]"
    return str(value)


def short_key(key: str) -> str:
    """`data.train_size` -> `train_size`."""
    return key.rpartition(".")[2]


def _asked(vary: Sequence[str] | Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    if isinstance(vary, Mapping):
        return {key: tuple(entries) for key, entries in vary.items()}
    found: dict[str, tuple[Any, ...]] = {}
    for text in vary:
        key, listed = split_override(text, "--vary")
        if key in found:
            raise InputError(f"{key} is varied twice", where=f"--vary {text}", fix="one list of values: KEY=V1,V2")
        found[key] = parse_values(listed, f"--vary {text}")
    return found


def _refuse_key(key: str) -> None:
    top = key.partition(".")[0]
    if top in _NOT_TRAINING:
        raise InputError(
            f'"{key}" changes nothing of what a study trains',
            where=f"--vary {key}",
            evidence="a study trains students and judges them on the test split, before any export",
            fix="vary objective, data, teacher, student, explore.kind or train",
        )


def _methods(
    loaded: LoadedRecipe, values: dict[str, Any], varied: Mapping[str, Sequence[Any]]
) -> dict[str, list[Change]]:
    """Name -> what it changes in the recipe: an objective, a teacher's strategy, what is explored, or several.

    "supervised" among several objectives is the plain student: no teacher, so neither strategy nor exploration.
    """
    found: dict[str, list[Change]] = {}

    def add(name: str, changes: list[Change], where: str) -> None:
        if name in found:
            raise InputError(
                f'two methods are called "{name}"',
                where=where,
                fix="leave one out, or give it another name as a variant",
            )
        found[name] = changes

    strategies, kinds = varied.get(STRATEGY, ()), varied.get(EXPLORE, ())
    objectives: list[tuple[str, list[Change]]] = [
        (_label_of(entry), [(OBJECTIVE, entry)]) for entry in varied.get(OBJECTIVE, ())
    ]
    if (strategies or kinds) and not objectives:
        objectives = [(method_label(loaded.recipe.objective), [])]
    for name, changes in objectives:
        where = " ".join(f"--vary {key}={shown(value)}" for key, value in changes)
        if name == PLAIN and OBJECTIVE in varied:
            add(name, [*changes, (EXPLORE, "none")] if loaded.recipe.explore.kind != "none" else changes, where)
            continue
        learning: list[tuple[str, list[Change]]] = [(shown(each), [(STRATEGY, each)]) for each in strategies]
        if name == PLAIN:  # labels on the data, and a teacher for what is explored
            learning = []
        for strategy, change in learning or [("", [])]:
            exploring: list[tuple[str, list[Change]]] = [
                ("" if each == "none" else shown(each), [(EXPLORE, each)]) for each in kinds
            ]
            for kind, further in exploring or [("", [])]:
                words = ", ".join(word for word in (strategy, kind) if word)
                label = f"{name} ({words})" if words else name
                add(label, [*changes, *change, *further], where or f"--vary {EXPLORE if kinds else STRATEGY}")
    for index, variant in enumerate(loaded.recipe.study.variant):
        where = f"{loaded.origin}, study.variant[{index}] ({variant.name})"
        changes = []
        for override in variant.set:
            key, text = split_override(override, f"{where}.set")
            _refuse_key(key)
            changes.append((key, parse_value(text)))
        _checked(values, changes, loaded.origin, where)
        add(variant.name, changes, where)
    if not found:
        found[method_label(loaded.recipe.objective)] = []
    return found


def _explored_key(key: str) -> str | None:
    """Which key of `[explore]` that only some kinds read a dotted key is, or is below; None: it is none."""
    top, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    return name if top == "explore" and name in KINDS_OF_EXPLORE_KEY else None


def _reads(kind: Any, key: str) -> bool:
    """Whether a method that explores in this way reads a dotted key; every key outside of `[explore]` it may."""
    name = _explored_key(key)
    return name is None or str(kind) in KINDS_OF_EXPLORE_KEY[name]


def _label_of(objective: Any) -> str:
    return method_label(_SECTIONS.validate_python(objective))


def _checked(values: dict[str, Any], changes: Sequence[Change], origin: str, where: str) -> Recipe:
    """The recipe with these changes.

    Raises:
        InputError: as `check`; `where` names the change.
    """
    changed = _copy(values)
    for key, value in changes:
        set_key(changed, key, value, where)
    set_keys = {key for key, _ in changes}
    if STRATEGY in set_keys:
        # the recipe's settings of one strategy are for the methods that have it
        for table, name, strategies in strategy_keys():
            if changed["teacher"]["strategy"] not in strategies and f"teacher.{table}.{name}" not in set_keys:
                changed["teacher"][table].pop(name, None)
    if EXPLORE in set_keys:
        # those of one kind of exploration, too
        for name in KINDS_OF_EXPLORE_KEY:
            if not _reads(changed["explore"]["kind"], f"explore.{name}") and f"explore.{name}" not in set_keys:
                changed["explore"].pop(name, None)
    try:
        return check(changed, origin)
    except InputError as error:
        raise InputError(error.message, where=where, evidence=error.evidence, fix=error.fix) from error


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list | tuple) else value


def _check_training(combination: Combination) -> None:
    """What is known without data: the weight of the ground truth, mixup, and that there is one student."""
    if combination.recipe.student.pool is not None:
        raise InputError(
            "a study compares methods on one student, and this recipe chooses its own",
            where="student.pool",
            fix='student.arch = "conv-w16-d1-k3" and no pool, in the recipe or by --set',
        )
    try:
        resolve_hard_weight(combination.recipe.objective, combination.hard_weight)
        check_mixup(combination.recipe.objective, combination.recipe.train.mixup)
    except InputError as error:
        raise InputError(
            f"{combination.label}: {error.message}", where=error.where, evidence=error.evidence, fix=error.fix
        ) from error


def _control(asked: str | None, methods: Mapping[str, Any]) -> str:
    if asked is None:
        return PLAIN if PLAIN in methods else next(iter(methods))
    if asked in methods:
        return asked
    try:
        label = _label_of(parse_value(asked))
    except ValidationError:
        label = ""
    if label in methods:
        return label
    raise InputError(
        f'the control "{asked}" is not among the methods', where="--control", fix=nearest(asked, [*methods])
    )
