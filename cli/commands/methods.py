"""`edgestill methods`: what a recipe can ask for, told from the sections that the recipe is made of."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Annotated

import typer

from cli import complete, console
from cli.commands.shared import JsonOption, examples, facts, plain_table

if TYPE_CHECKING:
    from distill.objectives.section import Description, Parameter
    from distill.teachers.strategy_section import StrategyDescription

app = typer.Typer(
    epilog=examples("edgestill methods", "edgestill methods lelp", "edgestill methods lgtm", "edgestill methods --json")
)


@app.command()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Only this objective or teacher strategy, with its settings.", autocompletion=complete.methods
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The ways to distil, and for a teacher to learn: what each one needs, costs and is good for, and its source.

    Methods marked "control" are there to be compared with, not to be shipped.
    """
    from distill.objectives.section import describe_objectives
    from distill.teachers.strategy_section import StrategyDescription, describe_strategies

    described, strategies = describe_objectives(), describe_strategies()
    if name is not None:
        found = _find(name, described, strategies)
        if as_json:
            console.emit_json(found)
        elif isinstance(found, StrategyDescription):
            _print_strategy(found)
        else:
            _print_one(found)
        return
    teachers, students, architectures = _teachers(), _students(), _architectures()
    if as_json:
        console.emit_json(
            {
                "objectives": described,
                "strategies": strategies,
                "teachers": teachers,
                "students": students,
                "architectures": architectures,
            }
        )
        return
    rows = [
        (
            "\n".join([entry.kind, *(f"  or {alias}" for alias in entry.aliases), *["  (control)"] * entry.control]),
            _needs(entry, short=True),
            entry.summary,
        )
        for entry in described
    ]
    console.emit(plain_table(("Objective", "Needs", "What it does"), rows))
    console.emit("needs: logits and embedding are the teacher's; several objectives in one recipe add up")
    console.emit("")
    ways = [(entry.kind, entry.summary, entry.needs, entry.cost) for entry in strategies]
    console.emit(plain_table(("Teacher strategy", "What it does", "Needs", "Costs"), ways))
    for title, entries in (("Teacher", teachers), ("Student", students), ("Student arch", architectures)):
        console.emit("")
        console.emit(plain_table((title, "What it is"), list(entries.items())))
    console.emit("\nsettings, costs and source of one objective or teacher strategy: edgestill methods NAME")


def _find(
    name: str, described: tuple[Description, ...], strategies: tuple[StrategyDescription, ...]
) -> Description | StrategyDescription:
    from profiles.errors import InputError, nearest

    for entry in described:
        if name in (entry.kind, *entry.aliases):
            return entry
    for strategy in strategies:
        if name == strategy.kind:
            return strategy
    names = [word for entry in described for word in (entry.kind, *entry.aliases)]
    names += [strategy.kind for strategy in strategies]
    raise InputError(f'no method "{name}"', where="NAME", fix=nearest(name, names))


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
