"""`edgestill compare`: two runs, what changed between them, and whether it is more than noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import complete, console
from cli.commands.shared import JsonOption, examples, write_file

app = typer.Typer()

_METAVAR = "RUN|FILE.json"


@app.command(
    epilog=examples(
        "edgestill compare runs/before runs/after",
        "edgestill compare main.json branch.json --gate latency=+5%,metric=-0.3pt --markdown comment.md",
    )
)
def compare(
    a: Annotated[
        Path,
        typer.Argument(
            metavar=_METAVAR,
            help="What to compare with: a run folder, a report.json, or the output of bench --json.",
            autocompletion=complete.runs,
        ),
    ],
    b: Annotated[
        Path,
        typer.Argument(metavar=_METAVAR, help="What may have changed, likewise.", autocompletion=complete.runs),
    ],
    *,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="QUANTITY=CHANGE,...",
            help="The worst change that is let through: latency=+5%, metric=-0.3pt, size, memory, energy.",
        ),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Also precisions that were tried and not shipped.")] = False,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help='Write a table for a pull request; "-": print it.')
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two runs, target by target: latency, metric, file size, memory, energy, each with its interval.

    A difference is called better or worse only where its interval leaves no other choice. What is not comparable
    (another device, clock, batch, runtime, option, or other test data) is refused with the reason.

    Exit status: 0 every gate is kept or there is none, 3 one is not, 4 one is not decided, 2 wrong or incomparable
    input.
    """
    from cli.report.compare import compare as compare_sides
    from cli.report.compare_text import comparison_markdown, print_comparison
    from cli.report.gate import parse_gates
    from cli.report.sides import load_side
    from profiles.errors import InputError

    if as_json and markdown is not None and str(markdown) == "-":
        raise InputError(
            "only one thing can go to standard output", where="--json and --markdown", fix="name a file for the table"
        )
    gates = parse_gates(",".join(gate)) if gate else ()
    found = compare_sides(load_side(a), load_side(b), gates, show_all=show_all)
    if markdown is not None:
        write_file(markdown, comparison_markdown(found))
    if as_json:
        console.emit_json(found)
    elif markdown is None:
        print_comparison(found)
    raise typer.Exit(found.exit_status)
