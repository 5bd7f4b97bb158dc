"""What several commands say in the same words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.")]

UNKNOWN = "not known"


def examples(*lines: str) -> str:
    """The epilog of a command: one example per line. Typer reads brackets as markup, so they are escaped."""
    return "\n".join(["Examples:", *(f"  {line}".replace("[", "\\[") for line in lines)])


def number(value: float | None, unit: str = "") -> str:
    """`8.1 TFLOPS`, `0.154 TFLOPS`, or that it is not known."""
    return UNKNOWN if value is None else f"{value:,.4g}{' ' if unit else ''}{unit}"


def plain_table(*headers: str, right: tuple[int, ...] = ()) -> Table:
    """A table without frame; `right`: positions of columns with figures. The first column, a name, is never broken."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for position, header in enumerate(headers):
        table.add_column(
            header, justify="right" if position in right else "left", overflow="fold", no_wrap=position == 0
        )
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
