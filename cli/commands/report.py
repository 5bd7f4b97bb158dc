"""`edgestill report`: a finished run's result again, on the screen or as a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import complete, console
from cli.commands.shared import JsonOption, examples, write_file

if TYPE_CHECKING:
    from cli.report.schema import Report

app = typer.Typer()

_FILE = "FILE"


@app.command(
    epilog=examples(
        "edgestill report runs/quickstart",
        "edgestill report runs/quickstart --html report.html",
        "edgestill report runs/quickstart --csv - | column -t -s,",
    )
)
def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run folder, such as runs/quickstart, or a report.json.", autocompletion=complete.runs
        ),
    ],
    *,
    html: Annotated[Path | None, typer.Option("--html", metavar=_FILE, help="Write one page for a browser.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar=_FILE, help="Write a table for a spreadsheet.")] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar=_FILE, help="Write a table for a text or a pull request.")
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", "--explain", help="Also every candidate, limit and stage.")
    ] = False,
    exit_status: Annotated[
        bool, typer.Option("--exit-status", help="Exit as the run did: 3 a limit failed, 4 inconclusive.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a run's or a study's report, or write it as a file; "-" as FILE is standard output.

    Nothing is computed again: report.json in the run folder is the only source; --html
    takes the run's pictures with it.
    """
    from cli.report.html import to_html
    from cli.report.schema import load_report
    from cli.report.tables import to_csv, to_markdown
    from cli.report.terminal import print_report
    from profiles.errors import InputError

    folder = run.parent if run.suffix == ".json" else run
    writers: list[tuple[str, Path, Callable[[Report], str]]] = [
        (option, file, write)
        for option, file, write in (
            ("--html", html, partial(to_html, folder=folder)),
            ("--csv", csv, to_csv),
            ("--markdown", markdown, to_markdown),
        )
        if file is not None
    ]
    to_stdout = [option for option, file, _ in writers if str(file) == "-"] + ["--json"] * as_json
    if len(to_stdout) > 1:
        raise InputError(
            "only one thing can go to standard output", where=" and ".join(to_stdout), fix="name a file for the others"
        )
    study = run if run.name == "study.json" else run / "study.json"
    if study.is_file() and not (run / "report.json").is_file():
        _show_study(study, html or markdown, "--html" if html else "--markdown", csv, as_json)
        return
    found = load_report(run if run.suffix == ".json" else run / "report.json")
    for _, file, write in writers:
        write_file(file, write(found))
    if as_json:
        console.emit_json(found)
    elif not writers:
        print_report(found, show_all=show_all)
    if exit_status:
        raise typer.Exit(found.exit_status)


def _show_study(path: Path, page: Path | None, option: str, csv: Path | None, as_json: bool) -> None:
    """What `edgestill study` printed."""
    from cli.report.study import print_study, to_csv
    from cli.report.study_schema import load_study
    from profiles.errors import InputError

    if page is not None:
        raise InputError("a study has a table, JSON and CSV", where=option, fix="--json or --csv FILE")
    found = load_study(path)
    if csv is not None:
        write_file(csv, to_csv(found))
    if as_json:
        console.emit_json(found)
    elif csv is None:
        print_study(found)
