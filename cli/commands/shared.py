"""What several commands say in the same words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.")]

UNKNOWN = "not known"


def examples(*lines: str) -> str:
    """The epilog of a command: one example per line."""
    return "\n".join(["Examples:", *(f"  {line}" for line in lines)])


def number(value: float | None, unit: str = "") -> str:
    """`8.1 TFLOPS`, `0.154 TFLOPS`, or that it is not known."""
    return UNKNOWN if value is None else f"{value:,.4g}{' ' if unit else ''}{unit}"


def plain_table(headers: Sequence[str], rows: Iterable[Sequence[str]], right: tuple[int, ...] = ()) -> Table:
    """A table without frame. Cells are printed as they are, without markup; the first column, a name, is never broken.

    Args:
        headers: one per column.
        rows: one text per column.
        right: positions of the columns that hold figures.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for position, header in enumerate(headers):
        justify: Literal["left", "right"] = "right" if position in right else "left"
        table.add_column(header, justify=justify, overflow="fold", no_wrap=position == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def facts(rows: list[tuple[str, Any]]) -> Table:
    """Two columns: name and value; values are printed as they are, without markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(str(value)))
    return table


def write_file(file: Path, text: str) -> None:
    """Writes a text for the user and says so; "-" is standard output.

    Raises:
        InputError: the folder does not exist.
        EdgestillError: the file cannot be written.
    """
    from cli import console
    from profiles.artifact import explain_os_errors, write_text
    from profiles.errors import InputError

    if str(file) == "-":
        console.emit(text)
        return
    if not file.parent.is_dir():
        raise InputError(f"there is no folder {file.parent}", where=str(file), fix=f"mkdir -p {file.parent}")
    with explain_os_errors(file):
        write_text(file, text)
    console.make_progress().note(f"wrote {file}")
