"""`edgestill distill`: only the training."""

from __future__ import annotations

import typer

from cli.commands.options import AllowCode, Out, RunArgument, Set
from cli.commands.shared import JsonOption, examples

app = typer.Typer()


@app.command(
    epilog=examples(
        "edgestill distill shelf.toml", "torchrun --standalone --nproc-per-node 2 -m cli.app distill shelf.toml"
    )
)
def distill(
    run: RunArgument, out: Out = None, overrides: Set = None, allow_code: AllowCode = False, as_json: JsonOption = False
) -> None:
    """Train the teacher, cache its outputs, and train every student of a run. Resumable."""
    from cli import console
    from cli.commands.runs import open_folder_or_recipe

    opened = open_folder_or_recipe(run, out, overrides, allow_code=allow_code)
    trained = opened.distill()
    if not opened.is_main:
        return
    rows = [
        {
            "student": arch,
            "metric": student.result.metric.name,
            "validation": student.result.metric.value,
            "best_epoch": student.result.best_epoch,
            "seconds": student.result.seconds,
            "folder": str(opened.folder / "students" / arch),
        }
        for arch, student in trained.items()
    ]
    if as_json:
        console.emit_json({"run": str(opened.folder), "students": rows})
        return
    for row in rows:
        console.emit(
            f"{row['student']}  {row['metric']} {row['validation']:.1%} on validation (epoch {row['best_epoch']}), "
            f"{row['folder']}"
        )
    console.emit(f"next: edgestill export {opened.folder}")
