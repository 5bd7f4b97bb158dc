"""Options that several commands share, so that they mean and say the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import complete

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, or the name of a built-in one.", autocompletion=complete.recipes
    ),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart; or a recipe.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run folder.  [default: runs/NAME]", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, e.g. train.epochs=3. Repeatable."),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse to measure on a machine that is busy, throttled or does not settle.")
]
On = Annotated[
    list[str] | None,
    typer.Option(
        "--on",
        metavar="[TARGET=]HOST",
        help="Measure on a machine that ssh reaches; HOST alone for a file, TARGET=HOST for a run. Repeatable.",
    ),
]
LockClocks = Annotated[
    bool,
    typer.Option("--lock-clocks", help="Run jetson_clocks on the device (sudo), and restore the clocks at the end."),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Import the Python code that the recipe names by dotted path.")
]
