"""`edgestill study`: which method is best on one's own data, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.commands.options import AllowCode, RecipeArgument, Set
from cli.commands.shared import JsonOption, examples, write_file

app = typer.Typer()


@app.command(
    epilog=examples(
        "edgestill study quickstart --vary objective=supervised,kd,ec --seeds 5",
        "edgestill study shelf.toml --vary objective=supervised,kd --vary data.train_size=500,2000",
        "edgestill study shelf.toml --vary objective=supervised,kd --tune 20",
        "edgestill study shelf.toml --vary teacher.strategy=frozen,online,lgtm",
        "edgestill study shelf.toml --vary 'objective=kd,{kind=\"kd\",tau=1.0}' --control kd",
    )
)
def study(
    recipe: RecipeArgument,
    *,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=V1,V2",
            help="A key of the recipe and its values; objective and teacher.strategy are the method. Repeatable.",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="Trainings of every combination.  [default: 5]", show_default=False)
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            "--control",
            metavar="METHOD",
            help="What the others are compared with.  [default: supervised, else the first]",
            show_default=False,
        ),
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            "--tune",
            metavar="TRIALS",
            help="First tune every method with so many trainings each, on the validation split; needs Optuna.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Trainings at the same time, sharing the cores.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", help="The study's folder.  [default: runs/NAME-study]", show_default=False)
    ] = None,
    overrides: Set = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write one row per training.")] = None,
    keep_students: Annotated[
        bool, typer.Option("--keep-students", help="Keep the weights of every trained student.")
    ] = False,
    replace_others: Annotated[
        bool, typer.Option("--replace", help="Make anew what the folder holds with other settings.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the trainings, which are done, and the time for the rest.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: JsonOption = False,
) -> None:
    """Train every combination of methods and settings with several seeds, and say which method is better.

    One teacher and one cache serve all trainings, unless teacher.strategy says otherwise. Resumable: the same command
    goes on, and with more seeds or values it trains only what is missing. A training set larger than the recipe's own
    data.train_size changes the teacher: that wants another folder, or --replace. --tune searches what `edgestill
    methods NAME` says, but keeps what you changed or vary. Exit status: 0 done, 1 a training failed, 2 wrong input,
    130 interrupted.
    """
    from cli import console
    from cli.recipe import load_recipe
    from cli.study_grid import build_grid
    from profiles.errors import InputError

    if as_json and csv is not None and str(csv) == "-":
        raise InputError("only one thing can go to standard output", where="--json and --csv", fix="--csv FILE")
    if csv is not None and str(csv) != "-" and not csv.absolute().parent.is_dir():
        raise InputError(f"no folder {csv.parent}", where="--csv", fix="a file in a folder that exists")
    loaded = load_recipe(recipe, overrides or ())
    build_grid(loaded, vary=vary or (), seeds=seeds, control=control)  # mistakes are told before anything heavy loads
    trials = loaded.recipe.study.tune if tune is None else tune
    if trials is not None:
        from cli.search import check_trials

        check_trials(trials)
    folder = out or Path("runs") / f"{loaded.recipe.name}-study"
    from cli.pipeline.study import Study

    opened = Study(
        loaded,
        folder,
        seeds=seeds,
        vary=vary or (),
        control=control,
        jobs=jobs,
        progress=console.make_progress(),
        allow_code=allow_code,
        keep_students=keep_students,
        replace_others=replace_others,
        tune=trials,
    )
    if dry_run:
        from cli.pipeline.study_plan import plan_study, render_plan

        planned = plan_study(opened)
        if as_json:
            console.emit_json(planned)
        else:
            console.emit(render_plan(planned))
        return
    report = opened.run()
    if csv is not None:
        from cli.report.study import to_csv

        write_file(csv, to_csv(report))
    if as_json:
        console.emit_json(report)
    elif str(csv) != "-":
        from cli.report.study import print_study

        print_study(report)
    raise typer.Exit(report.exit_status)
