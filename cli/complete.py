"""Tab completion of names: it only lists files, because a shell waits for it at every key press."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from profiles.user_folder import user_devices

_SUFFIX = ".toml"


def _stems(package: str, folder: str) -> list[str]:
    place = files(package) / folder
    if not place.is_dir():
        return []
    return sorted(entry.name.removesuffix(_SUFFIX) for entry in place.iterdir() if entry.name.endswith(_SUFFIX))


def _matching(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _files(incomplete: str, suffix: str = "") -> list[str]:
    """Folders and files with `suffix` whose path starts with what is typed."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") or not incomplete else typed.parent
    if not folder.is_dir():
        return []
    found = sorted(folder.iterdir())
    return [
        str(path) + ("/" if path.is_dir() else "")
        for path in found
        if str(path).startswith(incomplete.rstrip("/"))
        and not path.name.startswith(".")
        and (path.is_dir() or path.name.endswith(suffix))
    ]


def devices(incomplete: str) -> list[str]:
    """Device names, the user's own included, and device files."""
    own = [path.stem for path in sorted(user_devices().glob("*" + _SUFFIX))]
    return _matching(["this-machine", *_stems("profiles", "devices"), *own], incomplete) + _files(incomplete, _SUFFIX)


def recipes(incomplete: str) -> list[str]:
    """Built-in recipes and recipe files."""
    return _matching(_stems("cli", "recipes"), incomplete) + _files(incomplete, _SUFFIX)


def runs(incomplete: str) -> list[str]:
    """Run folders: those below `runs/`, and any folder that is being typed."""
    known = [str(path) for path in sorted(Path("runs").glob("*")) if path.is_dir()]
    return _matching(known, incomplete) or _files(incomplete)


def data_sets(incomplete: str) -> list[str]:
    """Names of the catalogue."""
    from distill.data.catalogue import list_catalogue

    return _matching([entry.name for entry in list_catalogue()], incomplete)


def published(title: str) -> list[str]:
    """The names that a method's paper gave it, which stand in brackets in its title: "A generic teacher (GTN)"."""
    return re.findall(r"\(([\w-]+)\)", title)


def methods(incomplete: str) -> list[str]:
    """Objectives, teacher strategies and explorations, by the names that a recipe or their papers give them."""
    from distill.exploration.section import describe_explorations
    from distill.objectives.section import describe_objectives
    from distill.teachers.strategy_section import describe_strategies

    names = [(entry.kind, entry.title) for entry in describe_objectives()]
    names += [(strategy.kind, strategy.title) for strategy in describe_strategies()]
    names += [(exploration.kind, exploration.title) for exploration in describe_explorations()]
    # any case is understood, and a shell wants back what was typed
    write = str.upper if incomplete.isupper() else str.lower
    words = [kind for kind, _ in names] + [name for _, title in names for name in published(title)]
    return _matching(list(dict.fromkeys(map(write, words))), incomplete)
