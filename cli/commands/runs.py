"""What the commands that work on a run have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cli import console
from profiles.errors import InputError

if TYPE_CHECKING:
    from cli.pipeline import Run
    from cli.report.schema import Report


def open_run(
    recipe: str, out: Path | None, overrides: list[str] | None, *, allow_code: bool, strict: bool = False
) -> Run:
    """The run of a recipe; a mistake in the recipe is told before anything heavy is imported."""
    from cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    folder = out or Path("runs") / loaded.recipe.name
    from cli.pipeline import Run

    return Run(loaded, folder, progress=console.make_progress(), allow_code=allow_code, strict=strict)


def open_folder_or_recipe(
    run: str, out: Path | None, overrides: list[str] | None, *, allow_code: bool, strict: bool = False
) -> Run:
    """The run in a run folder (its recipe was stored there), or that of a recipe."""
    folder = Path(run)
    stored = folder / "recipe.toml"
    if not folder.is_dir():
        return open_run(run, out, overrides, allow_code=allow_code, strict=strict)
    if not stored.is_file():
        raise InputError(
            f"{folder} is not a run folder", where=run, evidence="it has no recipe.toml", fix="edgestill run RECIPE"
        )
    if out is not None:
        raise InputError(
            "--out goes with a recipe, not with a run folder", where="--out", fix=f"leave it out; {folder} is used"
        )
    from dataclasses import replace

    from cli.recipe import load_recipe

    loaded = load_recipe(str(stored), overrides or ())
    origin = folder / "origin.json"
    if origin.is_file():
        facts = json.loads(origin.read_text(encoding="utf-8"))
        loaded = replace(loaded, base=Path(facts["base"]), origin=facts["recipe"])
    from cli.pipeline import Run

    return Run(loaded, folder, progress=console.make_progress(), allow_code=allow_code, strict=strict)


def show_report(report: Report, *, as_json: bool, show_all: bool) -> None:
    """The report on standard output, as text that fits the terminal or as JSON."""
    if as_json:
        console.emit_json(report)
        return
    from cli.report.terminal import print_report

    print_report(report, show_all=show_all)
