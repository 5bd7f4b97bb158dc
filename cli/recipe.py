"""The recipe: what a user asks for, in TOML; composes the section models that the lower layers own."""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator

from cli.overrides import parse_value, set_key, split_override
from cli.study_section import StudySection
from distill.data.section import DataSection
from distill.exploration.section import ExploreSection
from distill.objectives.section import KDSection, ObjectiveSections
from distill.students.section import StudentSection
from distill.teachers.section import TeacherSection
from distill.train_section import TrainSection
from export.section import ExportSection
from profiles.device import TargetSection
from profiles.errors import InputError, nearest
from profiles.measure_section import MeasureSection
from profiles.section import Section

SUFFIX = ".toml"
Checked = TypeVar("Checked", bound=Section)


class Recipe(Section):
    """One whole run: data, teacher, student, objectives, exploration, training, export, measurement and targets."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
    """Names the run and its default folder, runs/<name>."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Everything random in the run follows from it."""
    data: DataSection = DataSection()
    teacher: TeacherSection = TeacherSection()
    student: StudentSection = StudentSection()
    objective: ObjectiveSections = (KDSection(),)
    """What the student matches: a list of tables, or the name of one method for its published mix."""
    explore: ExploreSection = ExploreSection()
    """Inputs beside the data that the teacher labels."""
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()
    measure: MeasureSection = MeasureSection()
    target: Annotated[tuple[TargetSection, ...], Field(min_length=1)] = (TargetSection(name="this-machine"),)
    """One table per device budget."""
    study: StudySection = StudySection()
    """What `edgestill study` compares; no other command reads it."""
    plain_students: bool = True
    """Also train every student without a teacher: the reference row that shows what distilling bought."""

    @field_validator("target")
    @classmethod
    def _names_differ(cls, targets: tuple[TargetSection, ...]) -> tuple[TargetSection, ...]:
        names = [target.name for target in targets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'two targets are called "{name}"; several targets may share a device, not a name')
        return targets


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with where it came from. `base`: the folder that its relative paths start from."""

    recipe: Recipe
    base: Path
    origin: str


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with edgestill."""
    folder = resources.files("cli") / "recipes"
    return sorted(entry.name.removesuffix(SUFFIX) for entry in folder.iterdir() if entry.name.endswith(SUFFIX))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads, overrides and checks a recipe.

    Args:
        name_or_path: a file, or the name of a built-in recipe.
        overrides: `KEY=VALUE` with a dotted key (`train.epochs=3`, `target.NAME.latency_ms=5`, `target.0.batch=4`); the
            value is TOML, or else a plain string.

    Raises:
        InputError: no such recipe, not TOML, an unknown key (the nearest one is suggested), a wrong type or value.
    """
    path = Path(name_or_path)
    if (path.suffix == SUFFIX and not path.is_dir()) or path.is_file():
        if not path.is_file():
            raise InputError(
                f"no recipe {path}", where=str(path), fix=f"built-in recipes: {', '.join(builtin_recipes())}"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path}", where=str(path), evidence=str(error)) from error
        base, origin = path.resolve().parent, str(path)
    elif path.is_dir():
        raise InputError(
            f"{path} is a folder, not a recipe",
            where=str(path),
            fix=f"edgestill init --data {path} writes a recipe for the data in it",
        )
    elif name_or_path in builtin_recipes():
        text = (resources.files("cli") / "recipes" / (name_or_path + SUFFIX)).read_text(encoding="utf-8")
        base, origin = Path.cwd(), f"built-in recipe {name_or_path}"
    else:
        raise InputError(
            f'no recipe "{name_or_path}"',
            where="RECIPE",
            evidence="neither a file nor a built-in recipe",
            fix=nearest(name_or_path, builtin_recipes()),
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{origin} is not valid TOML", where=origin, evidence=str(error)) from error
    for override in overrides:
        _override(values, override)
    if path.suffix == SUFFIX:
        values.setdefault("name", path.stem if path.stem[0].isalnum() else "run")
    return LoadedRecipe(check(values, origin), base, origin)


def check(values: dict[str, Any], origin: str) -> Recipe:
    """The typed recipe of parsed TOML.

    Raises:
        InputError: naming every wrong key with its place and, where one is near, the key that was meant.
    """
    return _checked(Recipe, values, origin)


def export_section(overrides: Sequence[str], *, without: Collection[str] = ()) -> ExportSection:
    """The `[export]` table that `--set export.KEY=VALUE` asks for where there is no recipe.

    Args:
        overrides: as for `load_recipe`.
        without: keys that mean nothing to the caller.

    Raises:
        InputError: as `load_recipe`, a key of another table, or one of `without`.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        table, _, key = split_override(override, "--set")[0].partition(".")
        if table != "export" or not key:
            raise InputError(
                "without a recipe only [export] has keys to change",
                where=f"--set {override}",
                fix="--set export.KEY=VALUE; --kwargs for the model itself",
            )
        if key in without:
            raise InputError(
                "a model from elsewhere is not trained here", where=f"--set {override}", fix="leave it out"
            )
        _override(values, override)
    return _checked(_ExportAlone, values, "--set").export


class _ExportAlone(Section):
    export: ExportSection = ExportSection()


def _checked(model: type[Checked], values: dict[str, Any], origin: str) -> Checked:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        # A list whose entries are wrong is then also called too short, which tells nothing.
        problems = [
            _problem(values, detail) for detail in details if detail["type"] != "too_short" or len(details) == 1
        ]
        first = problems[0]
        if len(problems) == 1:
            message, evidence = first[0], None
        else:
            message = f"{len(problems)} mistakes in {'the recipe' if model is Recipe else 'what is set'}"
            lines = [f"{key}: {text}" + (f" ({fix})" if fix else "") for text, key, fix in problems]
            evidence = "\n".join(["", *lines])
        raise InputError(
            message, where=f"{origin}, {first[1]}", evidence=evidence, fix=first[2] if len(problems) == 1 else None
        ) from error


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe: every key with its value, those without a value left out."""
    import tomlkit

    return tomlkit.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _problem(values: dict[str, Any], detail: Any) -> tuple[str, str, str | None]:
    """(message, key, fix) of one pydantic error."""
    location = _strip_union_tags(values, detail["loc"])
    key = _dotted(values, location) or "(top level)"
    kind = detail["type"]
    if kind == "extra_forbidden":
        siblings = _keys_at(values, location[:-1])
        word = str(location[-1])
        return f'unknown key "{word}"', key, nearest(word, siblings) if siblings else None
    if kind == "missing":
        return f'"{location[-1]}" is missing', key, f"add {location[-1]} = ..."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        context = detail.get("ctx", {})
        valid = [word.strip("' ") for word in str(context.get("expected_tags", "")).split(",")]
        given = str(context.get("tag", ""))
        if kind == "union_tag_not_found":
            return '"kind" is missing', key, f"valid: {', '.join(valid)}" if valid != [""] else 'add kind = "kd"'
        return f'unknown kind "{given}"', key, nearest(given, valid)
    if kind == "value_error":
        return detail["msg"].removeprefix("Value error, "), key, getattr(detail["ctx"]["error"], "fix", None)
    given = detail["input"]
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if kind == "literal_error" and isinstance(given, str):
        valid = [word.strip("'") for word in detail["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return f'"{given}" is not a valid value', key, nearest(given, valid)
    shown = repr(given) if isinstance(given, str | int | float | bool) else type(given).__name__
    return f"{message}, not {shown}", key, None


def _strip_union_tags(values: Any, location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic puts a union's tag into the location, which is no key of the user's."""
    kept: list[int | str] = []
    for index, part in enumerate(location):
        last = index == len(location) - 1
        if isinstance(values, dict):
            if part in values or last:
                kept.append(part)
                values = values.get(part)
            elif "kind" in values:
                continue
            else:
                kept.append(part)
                values = None
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            kept.append(part)
            values = values[part]
        elif values is None or last:
            kept.append(part)
    return tuple(kept)


def _dotted(values: Any, location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        if isinstance(part, int):
            values = values[part] if isinstance(values, list) and part < len(values) else None
            name = values.get("name") if isinstance(values, dict) else None
            text += f"[{part}]{f' ({name})' if isinstance(name, str) else ''}"
        else:
            values = values.get(part) if isinstance(values, dict) else None
            text += f".{part}" if text else part
    return text


def _keys_at(values: dict[str, Any], location: tuple[int | str, ...]) -> list[str]:
    """The keys that are valid in the table at `location`."""
    models: list[type[BaseModel]] = [Recipe]
    here: Any = values
    for part in location:
        here = here.get(part) if isinstance(here, dict) else here[part] if isinstance(here, list) else None  # type: ignore[index]
        if isinstance(part, str):
            fields = [model.model_fields[part].annotation for model in models if part in model.model_fields]
            models = [model for field in fields for model in _models_in(field)]
    kind = here.get("kind") if isinstance(here, dict) else None
    tagged = [model for model in models if "kind" in model.model_fields and _tag_fits(model, kind)]
    return sorted({key for model in tagged or models for key in model.model_fields})


def _tag_fits(model: type[BaseModel], kind: object) -> bool:
    annotation = model.model_fields["kind"].annotation
    return typing.get_origin(annotation) is typing.Literal and kind in typing.get_args(annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_origin(annotation) is not None:
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def _override(values: dict[str, Any], override: str) -> None:
    key, text = split_override(override, "--set")
    set_key(values, key, parse_value(text), f"--set {override}")
