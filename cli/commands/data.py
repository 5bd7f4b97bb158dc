"""`edgestill data`: the data sets that recipes can name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import complete, console
from cli.commands.shared import JsonOption, examples, facts, plain_table

if TYPE_CHECKING:
    from distill.data.catalogue import CatalogueEntry

app = typer.Typer(
    invoke_without_command=True,
    help="The data sets that recipes can name. For your own data: edgestill init.",
    epilog=examples("edgestill data", "edgestill data show movie-snippets", "edgestill data fetch fashion-mnist"),
)

NameArgument = Annotated[
    str, typer.Argument(help="A data set's name, see: edgestill data.", autocompletion=complete.data_sets)
]


@app.callback()
def data(context: typer.Context, as_json: JsonOption = False) -> None:
    if context.invoked_subcommand is None:
        _print_list(as_json)


@app.command("list", epilog=examples("edgestill data list", "edgestill data list --json"))
def list_(as_json: JsonOption = False) -> None:
    """List the data sets, and which of them are on this machine."""
    _print_list(as_json)


@app.command(epilog=examples("edgestill data show fashion-mnist-small"))
def show(name: NameArgument, as_json: JsonOption = False) -> None:
    """Print what a data set holds, its licence, and how to cite it."""
    from distill.data.catalogue import entry_of

    entry = entry_of(name)
    if as_json:
        console.emit_json(_plain(entry))
        return
    place = place_of(entry.name)
    console.emit(f"{entry.name}: {entry.title}")
    console.emit(
        facts(
            [
                ("in a recipe", f'[data] source = "{entry.name}"'),
                ("task", f"{entry.task}, {len(entry.classes)} classes: {', '.join(entry.classes)}"),
                ("samples", ", ".join(f"{count:,} {split}" for split, count in entry.samples.items())),
                ("one sample", f"{entry.shape} ({entry.kind})"),
                ("size", f"{entry.size_mib:g} MiB"),
                ("comes from", entry.obtained_from),
                ("here", str(place) if place else f"no; edgestill data fetch {entry.name}"),
                ("licence", entry.licence),
                ("cite", entry.citation),
                ("homepage", entry.homepage),
            ]
        )
    )


@app.command(epilog=examples("edgestill data fetch movie-snippets"))
def fetch(name: NameArgument, as_json: JsonOption = False) -> None:
    """Bring a data set to this machine and check that it is the published one.

    What is there already is only checked. It goes to $EDGESTILL_CACHE, by default ~/.cache/edgestill.
    """
    from distill.data.catalogue import fetch as fetch_data

    place = fetch_data(name, progress=console.make_progress())
    if as_json:
        console.emit_json({"name": name, "place": str(place)})
    else:
        console.emit(f'{name} is in {place}\nuse it in a recipe: [data] source = "{name}"')


def _print_list(as_json: bool) -> None:
    from distill.data.catalogue import list_catalogue

    entries = list_catalogue()
    if as_json:
        console.emit_json([_plain(entry) for entry in entries])
        return
    rows = [
        (
            entry.name,
            entry.title,
            f"{sum(entry.samples.values()):,}",
            str(len(entry.classes)),
            f"{entry.size_mib:g}",
            "yes" if place_of(entry.name) else "fetch",
        )
        for entry in entries
    ]
    console.emit(plain_table(("Data set", "What it is", "Samples", "Classes", "MiB", "Here"), rows, right=(2, 3, 4)))
    console.emit("licence and source: edgestill data show NAME    your own data: edgestill init")


def _plain(entry: CatalogueEntry) -> dict[str, Any]:
    place = place_of(entry.name)
    return {**entry.model_dump(mode="json"), "place": None if place is None else str(place)}


def place_of(name: str) -> Path | None:
    """Where a data set is on this machine, or None when it must be fetched first."""
    from distill.data.catalogue import cache_folder
    from distill.data.make_fashion_mnist_small import PACKAGED
    from profiles.artifact import MANIFEST

    if name == "fashion-mnist-small":
        return PACKAGED
    folder = cache_folder() / name
    return folder if (folder / MANIFEST).is_file() else None
