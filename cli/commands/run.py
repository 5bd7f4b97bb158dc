"""`edgestill run`: the whole way, from data to the report."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.commands.options import AllowCode, LockClocks, On, Out, RecipeArgument, Set, Strict
from cli.commands.shared import JsonOption, examples

app = typer.Typer()


@app.command(
    epilog=examples(
        "edgestill run quickstart",
        "edgestill run shelf.toml --set train.epochs=5 --out runs/short",
        "edgestill run shelf.toml --on line3-orin=nvidia@10.0.0.7",
    )
)
def run(
    recipe: RecipeArgument,
    out: Out = None,
    overrides: Set = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show the resolved recipe, what is cached, and the time and disk it would take."
        ),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also show every student and file, and why it was not chosen.")
    ] = False,
    require_measured: Annotated[
        bool, typer.Option("--require-measured", help="Exit 4 when a target was not measured on its device.")
    ] = False,
    on: On = None,
    lock_clocks: LockClocks = False,
    strict: Strict = False,
    allow_code: AllowCode = False,
    as_json: JsonOption = False,
) -> None:
    """The whole way: data, teacher, students, exports, measurement, report. Resumable: the same command goes on.

    With --on, targets are measured on their devices over ssh: an agent works there in one folder and removes it.

    With [student] pool = "conv" and a limit per target, the students are chosen for their devices.

    Exit status: 0 nothing failed, 1 edgestill could not do it, 2 wrong input, 3 a limit failed, 4 inconclusive,
    130 interrupted.
    """
    from cli import console
    from cli.commands.runs import open_run, show_report

    opened = open_run(recipe, out, overrides, allow_code=allow_code, strict=strict)
    opened.measure_on(on or [], lock_clocks=lock_clocks)
    if dry_run:
        from cli.pipeline.estimate import estimate, render

        found = estimate(opened)
        if as_json:
            console.emit_json(found)
        else:
            console.emit(render(found, opened))
        return
    if not opened.is_main:
        opened.distill()  # under torchrun, the other processes only help training
        return
    report = opened.report(require_measured=require_measured)
    show_report(report, as_json=as_json, show_all=explain)
    raise typer.Exit(report.exit_status)
