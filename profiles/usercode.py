"""Loading a user's own class or function by dotted path, without letting a recipe run code unasked."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiles.errors import InputError, nearest


def load_factory(path: str, *, base: Path, where: str, allow_code: bool) -> Callable[..., Any]:
    """The object that `package.module:name` names.

    Args:
        path: dotted path, `package.module:name`.
        base: folder of the recipe; appended to the *end* of `sys.path`, so that a user's `export.py` never hides ours.
        where: the recipe key or option that held the path, for the message.
        allow_code: a recipe may come from anybody, so a path out of a recipe needs the user's `--allow-code`.

    Raises:
        InputError: malformed path, code not allowed, module or name missing, or a module that fails to import.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise InputError(f'"{path}" is not a dotted path', where=where, fix='write it as "package.module:factory"')
    if not allow_code:
        raise InputError(
            f'the recipe wants to run code of yours: "{path}"',
            where=where,
            evidence="a recipe may come from somebody else, so code is only imported when you say so",
            fix="add --allow-code if you trust it",
        )
    folder = str(base.resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f'cannot import "{module_name}"',
            where=where,
            evidence=str(error),
            fix=f"install it into this environment, or put it into {folder}",
        ) from error
    except Exception as error:
        raise InputError(
            f'"{module_name}" fails while it is imported',
            where=where,
            evidence=f"{type(error).__name__}: {error}",
            fix=f'python -c "import {module_name}" shows the whole traceback',
        ) from error
    if not hasattr(module, name):
        public = [entry for entry in vars(module) if not entry.startswith("_")]
        raise InputError(f'"{module_name}" has no "{name}"', where=where, fix=nearest(name, public))
    found = getattr(module, name)
    if not callable(found):
        raise InputError(
            f'"{path}" is not callable', where=where, fix="name a class or a function that returns a module"
        )
    return found  # type: ignore[no-any-return]
