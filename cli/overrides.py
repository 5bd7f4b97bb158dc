"""`KEY=VALUE` on the command line and in `[[study.variant]]`: how the text is read, and how it changes a recipe."""

from __future__ import annotations

import tomllib
from typing import Any

from profiles.errors import InputError, nearest

_CLOSING = {"[": "]", "{": "}"}


def parse_value(text: str) -> Any:
    """A TOML value, else the text itself, so that words need no quotes.

    >>> parse_value("3"), parse_value("kd")
    (3, 'kd')
    """
    try:
        values = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return values["value"] if len(values) == 1 else text


def parse_values(text: str, where: str) -> tuple[Any, ...]:
    """`supervised,{kind="kd",tau=1.0}` -> the values between the commas that stand outside brackets and quotes.

    Raises:
        InputError: nothing between two commas, a bracket or quote that is not closed, or what starts like a TOML table,
            list or text and is none.
    """
    values = []
    for part in _split(text, where):
        word = part.strip()
        if not word:
            raise InputError("there is nothing between two commas", where=where, fix="KEY=VALUE,VALUE")
        value = parse_value(word)
        if value is word and word[0] in "[{\"'":
            raise InputError(
                f"{word} is not a TOML value",
                where=where,
                fix="texts inside of lists and tables need quotes, and the shell needs quotes around all: "
                "--vary 'objective=supervised,{kind=\"kd\",tau=1.0}'",
            )
        values.append(value)
    return tuple(values)


def _split(text: str, where: str) -> list[str]:
    parts, start, open_brackets, quote = [], 0, [], ""
    escaped = False
    for position, character in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif character == "\\" and quote == '"':
                escaped = True
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in _CLOSING:
            open_brackets.append(_CLOSING[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
        elif character == "," and not open_brackets:
            parts.append(text[start:position])
            start = position + 1
    if quote or open_brackets:
        raise InputError(
            f"{quote or open_brackets[-1]} is missing", where=where, evidence=text, fix="close what was opened"
        )
    return [*parts, text[start:]]


def set_key(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets a dotted key of parsed TOML; an entry of a list of tables goes by its position, name or kind.

    Args:
        values: changed in place.
        key: such as `train.epochs` or `target.0.batch`.
        value: what it becomes.
        where: of the override, for messages.

    Raises:
        InputError: the key leads through a value, or to no entry of a list.
    """
    *parents, last = key.split(".")
    here: Any = values
    for index, part in enumerate(parents):
        if isinstance(here, list):
            here = _entry(here, part, where)
        elif part == "target" and "target" not in here:
            raise InputError("the recipe names no targets to change", where=where, fix="add [[target]]")
        else:
            here = here.setdefault(part, {})
        if not isinstance(here, dict | list):
            done = ".".join(parents[: index + 1])
            raise InputError(f'"{done}" is a value, not a table', where=where)
    if isinstance(here, list):
        raise InputError(f'"{".".join(parents)}" is a list of tables', where=where, fix="name the entry and its key")
    here[last] = value


def split_override(override: str, where: str) -> tuple[str, str]:
    """`train.epochs=3` -> ("train.epochs", "3").

    Raises:
        InputError: not KEY=VALUE.
    """
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f'"{override}" is not KEY=VALUE', where=where, fix=f"for example {where} train.epochs=3")
    return key.strip(), text


def _entry(entries: list[Any], part: str, where: str) -> Any:
    if part.isdigit() and int(part) < len(entries):
        return entries[int(part)]
    named = {str(entry.get("name", entry.get("kind"))): entry for entry in entries if isinstance(entry, dict)}
    if part not in named:
        raise InputError(f'no entry "{part}"', where=where, fix=nearest(part, list(named)))
    return named[part]
