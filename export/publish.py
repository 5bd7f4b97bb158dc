"""Several artefacts into a folder that may hold other things: all of them or none, and none of an earlier time."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from profiles.artifact import MANIFEST, exchange, explain_os_errors, write_text
from profiles.errors import InputError

RECORD = "export.json"
"""Names what the last export made in the folder."""
_KINDS = ("bundle", "graph", "engine")
_BY_PRODUCTS = ("model.engine", "model-batch1.engine", "timing.cache", "times.log", "__pycache__")
"""How the names start of what a bundle's own scripts write into it, and of the builders' caches."""


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder; on a clean exit its subfolders take their places in `folder`.

    What an earlier time made there goes; files of others stay, also inside of the folders that go. A block that fails
    changes nothing. Every folder changes by one rename: killed between two of them, each is whole.

    Raises:
        InputError: a folder that would be replaced is not of edgestill's making.
        EdgestillError: the place cannot be written.
    """
    with explain_os_errors(folder):
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    new, old, leftover = staging / "new", staging / "old", staging
    try:
        new.mkdir()
        yield new
        names = sorted(path.name for path in new.iterdir() if path.is_dir())
        refuse_in_the_way(folder, names)
        with explain_os_errors(folder):
            _swap(folder, new, old, names, [name for name in made_before(folder) if name not in names])
        leftover = new
        with explain_os_errors(old):  # what could not be kept elsewhere stays there
            _keep_others(old, folder)
        leftover = staging
    finally:
        shutil.rmtree(leftover, ignore_errors=True)
        if created:
            with suppress(OSError):
                folder.rmdir()  # only when it is empty


def made_before(folder: Path) -> list[str]:
    """Names of what the last export made in the folder; empty where there was none."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))["made"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    names = (
        [name for name in found if isinstance(name, str) and Path(name).name == name] if isinstance(found, list) else []
    )
    return [name for name in names if (folder / name).is_dir() and not (folder / name).is_symlink()]


def refuse_in_the_way(folder: Path, names: Sequence[str]) -> None:
    """Refuses to replace what no earlier export made.

    Raises:
        InputError: names the first such entry.
    """
    before = made_before(folder)
    for name in names:
        place = folder / name
        if name not in before and (place.exists() or place.is_symlink()) and not _all_made(place):
            raise InputError(
                f"{place} is in the way, and edgestill did not make it",
                where="--out",
                fix="name another folder, or move it away",
            )


def _swap(folder: Path, new: Path, old: Path, names: Sequence[str], stale: Sequence[str]) -> None:
    """Puts the new folders in place, and the former ones and the stale ones into `old`; undone when a step fails."""
    old.mkdir()
    moved: list[str] = []
    try:
        for name in [*stale, *names]:
            moved.append(name)
            _put(new / name, folder / name, old / name)
        write_text(folder / RECORD, json.dumps({"made": list(names)}, indent=2) + "\n")
    except OSError:
        for name in reversed(moved):
            if name in names and not (new / name).exists():
                (folder / name).rename(new / name)
            if (old / name).exists():
                (old / name).rename(folder / name)
        raise


def _keep_others(old: Path, folder: Path) -> None:
    """Moves what others put into the former folders to the same places, beside what is there now."""
    for place in old.iterdir():
        for path in _of_others(place):
            kept = folder / place.name / path.relative_to(place)
            kept.parent.mkdir(parents=True, exist_ok=True)
            while kept.exists() or kept.is_symlink():
                kept = kept.with_name(f"{kept.name}.kept")
            path.rename(kept)


def _put(new: Path, place: Path, aside: Path) -> None:
    """`new`, where there is one, takes the place; what was there goes aside."""
    if new.exists() and place.exists() and exchange(new.absolute(), place.absolute()):
        new.rename(aside)
        return
    if place.exists():
        place.rename(aside)
    if new.exists():
        new.rename(place)


def _all_made(folder: Path) -> bool:
    """Such a folder may have been made before there was a record."""
    return folder.is_dir() and not folder.is_symlink() and any(folder.rglob(MANIFEST)) and not _of_others(folder)


def _of_others(folder: Path) -> list[Path]:
    """Files and links that neither an export nor what it shipped wrote, and none of an artefact's own."""
    made: set[Path] = set()
    for path in folder.rglob(MANIFEST):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["kind"] in _KINDS:
                made |= {path, *(path.parent / name for name in found["files"])}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path not in made
        and (path.is_file() or path.is_symlink())
        and not any(part.startswith(_BY_PRODUCTS) for part in path.relative_to(folder).parts)
        and path.suffix != ".cache"
    ]
