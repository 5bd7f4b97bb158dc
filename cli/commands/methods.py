"""`edgestill methods`: what a recipe can ask for, told from the sections that the recipe is made of."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cli import complete, console
from cli.commands.shared import JsonOption, examples, facts, plain_table

if TYPE_CHECKING:
    from distill.exploration.section import ExploreDescription
    from distill.objectives.section import Description, Parameter
    from distill.teachers.strategy_section import StrategyDescription

    AnyDescription = Description | StrategyDescription | ExploreDescription

app = typer.Typer(
    epilog=examples("edgestill methods", "edgestill methods lelp", "edgestill methods GTN", "edgestill methods --json")
)


@app.command()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Only this objective, teacher strategy or exploration, with its settings; published names do, too.",
            autocompletion=complete.methods,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The ways to distil, for a teacher to learn, and to explore: what each one needs and costs, and its source.

    Methods marked "control" are there to be compared with, not to be shipped.
    """
    from distill.exploration.section import ExploreDescription, describe_explorations
    from distill.objectives.section import describe_objectives
    from distill.teachers.strategy_section import StrategyDescription, describe_strategies

    described, strategies, explorations = describe_objectives(), describe_strategies(), describe_explorations()
    if name is not None:
        found = _find(name, (*described, *strategies, *explorations))
        if as_json:
            console.emit_json(found[0] if len(found) == 1 else found)
            return
        explored = [entry for entry in found if isinstance(entry, ExploreDescription)]
        others = [entry for entry in found if not isinstance(entry, ExploreDescription)]
        for position, entry in enumerate(others):
            if position:
                console.emit("")
            if isinstance(entry, StrategyDescription):
                _print_strategy(entry)
            else:
                _print_one(entry)
        if explored:
            if others:
                console.emit("")
            _print_explorations(explored)
        return
    teachers, students, architectures = _teachers(), _students(), _architectures()
    if as_json:
        console.emit_json(
            {
                "objectives": described,
                "strategies": strategies,
                "explorations": explorations,
                "teachers": teachers,
                "students": students,
                "architectures": architectures,
            }
        )
        return
    rows = [(_names(entry, *entry.aliases), _needs(entry, short=True), entry.summary) for entry in described]
    console.emit(plain_table(("Objective", "Needs", "What it does"), rows))
    console.emit("needs: logits and embedding are the teacher's; several objectives in one recipe add up")
    console.emit("")
    ways = [(_names(way), way.summary, way.needs, way.cost) for way in strategies]
    console.emit(plain_table(("Teacher strategy", "What it does", "Needs", "Costs"), ways))
    console.emit("")
    inputs = [(_names(entry), entry.summary, _needs_and_source(entry)) for entry in explorations]
    console.emit(plain_table(("Exploration", "What it does", "Needs, and where it is from"), inputs))
    for title, entries in (("Teacher", teachers), ("Student", students), ("Student arch", architectures)):
        console.emit("")
        console.emit(plain_table((title, "What it is"), list(entries.items())))
    console.emit(
        "\nsettings, costs and source of one objective, teacher strategy or exploration: edgestill methods NAME"
    )


def _names(entry: AnyDescription, *aliases: str) -> str:
    """What a recipe calls it, and below that its other names, and that it is a control."""
    known = [_folded(name) for name in (entry.kind, *aliases)]
    lines = [entry.kind, *(f"  or {alias}" for alias in aliases)]
    lines += [f"  ({name})" for name in complete.published(entry.title) if _folded(name) not in known]
    return "\n".join([*lines, *["  (control)"] * getattr(entry, "control", False)])


def _needs_and_source(entry: ExploreDescription) -> str:
    return entry.needs if entry.source == "-" else f"{entry.needs}\nsource: {entry.source}"


def _folded(name: str) -> str:
    """Names are told apart by letters and digits alone: "Distance-Correlation" is distance_correlation."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _find(name: str, described: Sequence[AnyDescription]) -> list[AnyDescription]:
    """Every method that goes by this name: its own in a recipe, else its published one, which several may share."""
    from profiles.errors import InputError, nearest

    own = [(entry.kind, *getattr(entry, "aliases", ())) for entry in described]
    published = [(*complete.published(entry.title), entry.title) for entry in described]
    for names in (own, published):
        found = [entry for entry, known in zip(described, names, strict=True) if _folded(name) in map(_folded, known)]
        if found:
            return found
    valid = {word.casefold() for names in (*own, *(titles[:-1] for titles in published)) for word in names}
    raise InputError(f'no method "{name}"', where="NAME", fix=nearest(name.casefold(), sorted(valid)))


_NEEDS = {
    "logits": ("logits", "teacher's logits"),
    "embedding": ("embedding", "teacher's embedding"),
    "labels": ("labels", "labels"),
    "classes": ("> 2 classes", "more than two classes"),
}
"""Short and long words for what an objective needs, the teacher's part first."""


def _needs(entry: Description, *, short: bool = False) -> str:
    """`teacher's logits, labels, more than two classes`."""
    return ", ".join(words[0 if short else 1] for need, words in _NEEDS.items() if need in entry.needs)


def _print_one(entry: Description) -> None:
    names = ", ".join(f'"{word}"' for word in (entry.kind, *entry.aliases))
    console.emit(f"{entry.title}{' (control: there to be compared with)' if entry.control else ''}")
    console.emit(
        facts(
            [
                ("in a recipe", f"objective = {names.replace(', ', ' or ')}"),
                ("what it does", entry.summary),
                ("needs", _needs(entry)),
                ("tasks", " and ".join(entry.tasks)),
                ("while training", entry.training_cost),
                ("on the device", entry.inference_cost),
                ("ground truth", f"weight {entry.default_hard_weight:g}, unless train.hard_weight says otherwise"),
                ("mixup", "allowed" if entry.mixup else "not allowed: its teacher outputs cannot be mixed"),
                ("study --tune", _tuned(entry)),
                ("source", entry.source),
            ]
        )
    )
    rows = [(parameter.name, _toml(parameter.default), _meaning(parameter, entry)) for parameter in entry.parameters]
    console.emit("")
    console.emit(plain_table(("Setting", "Default", "Meaning"), rows))


def _print_strategy(entry: StrategyDescription) -> None:
    console.emit(entry.title)
    console.emit(
        facts(
            [
                ("in a recipe", f'teacher.strategy = "{entry.kind}"'),
                ("what it does", entry.summary),
                ("needs", entry.needs),
                ("students", entry.students),
                ("while training", entry.cost),
                ("on the device", "none: nothing of it is in the exported student"),
                ("source", entry.source),
            ]
        )
    )
    if entry.parameters:
        console.emit("")
        rows = [(f"teacher.{each.name}", _toml(each.default), each.meaning) for each in entry.parameters]
        console.emit(plain_table(("Setting", "Default", "Meaning"), rows))


def _print_explorations(entries: Sequence[ExploreDescription]) -> None:
    """Each one, and below them their settings: those that all of them have once, the others by kind."""
    for position, entry in enumerate(entries):
        if position:
            console.emit("")
        console.emit(f"{entry.title}{' (control: there to be compared with)' if entry.control else ''}")
        console.emit(
            facts(
                [
                    ("in a recipe", f'explore.kind = "{entry.kind}"'),
                    ("what it does", entry.summary),
                    ("needs", entry.needs),
                    ("while training", entry.cost),
                    ("on the device", "none: nothing of it is in the exported student"),
                    ("source", entry.source),
                ]
            )
        )
    shared = [each for each in entries[0].parameters if all(each in entry.parameters for entry in entries)]
    several = len(entries) > 1
    tables = [("Setting", shared)]
    if several:
        tables[0] = (f"Setting ({', '.join(entry.kind for entry in entries)})", shared)
        own = [(entry.kind, [each for each in entry.parameters if each not in shared]) for entry in entries]
        tables += [(f"Setting ({kind} alone)", settings) for kind, settings in own]
    for heading, settings in tables:
        if settings:
            console.emit("")
            rows = [(f"explore.{each.name}", _toml(each.default), each.meaning) for each in settings]
            console.emit(plain_table((heading, "Default", "Meaning"), rows))


def _meaning(parameter: Parameter, entry: Description) -> str:
    search = entry.search.get(parameter.name)
    return parameter.meaning + (f"; tuned: {search.words}" if search else "")


def _tuned(entry: Description) -> str:
    """What `edgestill study --tune` searches: keys of the recipe with their ranges, own settings by name."""
    from distill.objectives.section import LEARNING_RATE_SEARCH

    parts = [f"train.learning_rate x 1/{LEARNING_RATE_SEARCH:g} to {LEARNING_RATE_SEARCH:g}"]
    parts += [f"{key} {search.words}" if "." in key else key for key, search in entry.search.items()]
    return "searches " + "; ".join(parts)


def _toml(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _teachers() -> dict[str, str]:
    from distill.teachers.section import TeacherSection

    return _kinds(TeacherSection)


def _students() -> dict[str, str]:
    from distill.students.section import StudentSection

    return _kinds(StudentSection)


def _kinds(section: type) -> dict[str, str]:
    """Kind -> meaning, from the paragraphs `kind "NAME": meaning.` of a section's docstring."""
    text = inspect.getdoc(section) or ""
    found = re.findall(r'^kind "([\w-]+)": (.+?)(?=^\S|\Z)', text, flags=re.MULTILINE | re.DOTALL)
    return {kind: " ".join(meaning.replace("`", "").split()) for kind, meaning in found}


def _architectures() -> dict[str, str]:
    """Architecture word -> meaning, from the table in the docstring of the module that parses them.

    The file is read, not imported, because importing it takes PyTorch's start-up time.
    """
    import ast
    from importlib.resources import files

    source = (files("distill") / "students" / "arch.py").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (.+?) \|$", ast.get_docstring(ast.parse(source)) or "", re.MULTILINE)
    return {word: f"{meaning} (family {family})" for word, family, meaning in rows}
