"""The atomic folder: every artefact is a folder with a manifest, written whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from pydantic import BaseModel, ValidationError

from profiles.errors import EdgestillError, InputError
from profiles.section import Section

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_HERE, _SWAP = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2."""
_VERSIONED = ("edgestill", "torch", "onnx", "onnxruntime", "numpy")


class Manifest(Section):
    """What an artefact is and what it was made from."""

    schema_version: int = SCHEMA_VERSION
    kind: str
    key: str
    """Hash of everything that the artefact was made from; see `content_key`."""
    created: str
    versions: dict[str, str]
    files: dict[str, str]
    """SHA-256 of every file, by its path inside the folder."""
    info: dict[str, Any]
    """Facts that readers want without opening the files."""


def content_key(*parts: Any) -> str:
    """A hash (32 hexadecimal digits) of plain values, pydantic models, paths' texts and arrays, stable across runs."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(_plain(part), sort_keys=True, separators=(",", ":")).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, np.ndarray):
        return {"array": array_hash(value)}
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"cannot hash a {type(value).__name__}")


def array_hash(array: np.ndarray[Any, Any]) -> str:
    """SHA-256 of dtype, shape and content."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path, kind: str) -> Manifest:
    """The manifest of `folder`.

    Raises:
        InputError: no artefact there, a damaged manifest, another kind, or one that a newer edgestill wrote.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"no {kind} in {folder}", where=str(folder), fix="a finished one holds a manifest.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(raw, dict) and raw.get("schema_version", 0) > SCHEMA_VERSION:
            raise InputError(
                f"{folder} was written by a newer edgestill",
                where=str(path),
                evidence=f"schema version {raw['schema_version']}, this edgestill reads up to {SCHEMA_VERSION}",
                fix="pip install --upgrade edgestill",
            )
        manifest = Manifest.model_validate(raw)
    except (ValueError, ValidationError) as error:
        raise InputError(
            "damaged manifest",
            where=str(path),
            evidence=str(error).splitlines()[0],
            fix=f"delete {folder}; it is made anew",
        ) from error
    if manifest.kind != kind:
        raise InputError(f"{folder} holds a {manifest.kind}, not a {kind}", where=str(path))
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts or not is_inside(folder / name, folder):
            raise InputError(
                f"the manifest names a file outside of its {kind}",
                where=str(path),
                evidence=f'"{name}" leads to {(folder / name).resolve()}',
                fix=f"delete {folder}; it is made anew",
            )
    return manifest


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with its links followed, lies below `folder`."""
    try:
        return path.resolve().is_relative_to(folder.resolve()) and path.resolve() != folder.resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, a null character
        return False


def open_array(folder: Path, manifest: Manifest, name: str, *, title: str) -> np.ndarray[Any, Any] | None:
    """The array `<name>.npy` of a finished artefact, memory-mapped; None where the artefact has no such file.

    Args:
        title: of the artefact, for the message: "teacher cache".

    Raises:
        InputError: it cannot be read.
    """
    path = folder / f"{name}.npy"
    if path.name not in manifest.files:
        return None
    try:
        opened: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"damaged {title}: {path.name}",
            where=str(path),
            evidence=str(error),
            fix=f"delete {folder}; it is made anew",
        ) from error
    return opened


def current(folder: Path, kind: str, key: str, *, whole: bool = False) -> Manifest | None:
    """The manifest when `folder` holds a finished artefact made from exactly `key`, else None.

    Args:
        whole: hash every file; else those alone that were written after the manifest.

    Raises:
        InputError: a file changed after it was written.
    """
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(folder, kind)
    except InputError:
        return None
    if manifest.key != key or any(not (folder / name).is_file() for name in manifest.files):
        return None
    finished = (folder / MANIFEST).stat().st_mtime_ns
    for name in manifest.files:
        if whole or (folder / name).stat().st_mtime_ns > finished:
            _check_hash(folder, manifest, name)
    return manifest


def verify(folder: Path, kind: str) -> Manifest:
    """Like `read_manifest`, and every file's hash is checked.

    Raises:
        InputError: as `read_manifest`, or a file is missing or changed.
    """
    manifest = read_manifest(folder, kind)
    for name in manifest.files:
        _check_hash(folder, manifest, name)
    return manifest


def _check_hash(folder: Path, manifest: Manifest, name: str) -> None:
    path = folder / name
    if not path.is_file():
        state, evidence = "is missing", None
    elif (found := file_hash(path)) != manifest.files[name]:
        state = "changed after it was written"
        evidence = f"SHA-256 {found[:12]}..., the manifest says {manifest.files[name][:12]}..."
    else:
        return
    again = "make or copy the bundle again" if manifest.kind == "bundle" else "run the same command again"
    raise InputError(f"{name} {state}", where=str(path), evidence=evidence, fix=f"delete {folder} and {again}")


@contextmanager
def create(folder: Path, kind: str, key: str, info: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yields an empty temporary folder; on a clean exit it becomes `folder`, whole, with its manifest.

    What `folder` held before stays until the new artefact is complete. `info` may be filled until the block ends.

    Raises:
        EdgestillError: the disk is full or the place cannot be written; nothing half-written is left.
    """
    with explain_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        with explain_os_errors(folder):
            files = {
                str(path.relative_to(temporary)): file_hash(path)
                for path in sorted(temporary.rglob("*"))
                if path.is_file()
            }
            manifest = Manifest(
                kind=kind,
                key=key,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                versions=tool_versions(),
                files=files,
                info=info or {},
            )
            for name in files:
                _sync(temporary / name)
            write_text(temporary / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
            temporary.chmod(0o755)
            _replace_folder(temporary, folder)
    except OSError as error:
        _raise_explained(error, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def explain_os_errors(place: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission into an EdgestillError that names `place`; other OSErrors pass."""
    try:
        yield
    except OSError as error:
        _raise_explained(error, place)


def _raise_explained(error: OSError, place: Path) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise EdgestillError(
            "the disk is full",
            where=str(place),
            evidence=str(error),
            fix="free some space; the same command goes on where it stopped",
        ) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EFBIG):
        raise EdgestillError(
            f"cannot write to {place}",
            where=str(place),
            evidence=str(error),
            fix="name another place, for example with --out",
        ) from error
    raise error


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all (temporary file, synced, renamed)."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def tool_versions() -> dict[str, str]:
    """Versions of edgestill and of the libraries that decide an artefact's content, as far as they are installed."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(new: Path, final: Path) -> bool:
    """Lets two folders swap their names in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # a C library without it
        return False
    return bool(rename(_HERE, os.fsencode(new), _HERE, os.fsencode(final), _SWAP) == 0)


def _replace_folder(new: Path, final: Path) -> None:
    """Puts `new` in the place of `final`.

    An old `final` gets the name of `new`, which the caller removes: whatever stops this process, one of the two is
    there. Where names cannot be swapped, the old one is moved aside first.
    """
    if final.exists() and exchange(new.absolute(), final.absolute()):
        return
    if final.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
        final.rename(aside / final.name)
        try:
            new.rename(final)
        except OSError:
            (aside / final.name).rename(final)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    else:
        new.rename(final)
