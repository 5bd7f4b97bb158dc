"""Runs a command line in this process, as a user would type it."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from cli.app import main


class Result(NamedTuple):
    """What a command left."""

    status: int
    out: str
    err: str


def edgestill(*arguments: str) -> Result:
    """Exit status, standard output and standard error of `edgestill ARGUMENTS`."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main(list(arguments))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
    return Result(status, out.getvalue(), err.getvalue())
