"""`edgestill export`: only the export, of a run's students or of any PyTorch model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.commands.options import AllowCode, Out, Set
from cli.commands.shared import JsonOption, examples

app = typer.Typer()


@app.command(
    epilog=examples(
        "edgestill export runs/quickstart",
        'edgestill export --model torch.nn:Linear --kwargs \'{"in_features": 8, "out_features": 3}\' '
        "--example 1x8 --out linear",
        "edgestill export --model my_models:bert --example input_ids:1x64:int64 --example attention_mask:1x64:int64 "
        "--samples texts.npz --precision int8 --out bert",
    )
)
def export(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run folder, or a recipe.")] = None,
    out: Out = None,
    overrides: Set = None,
    allow_code: AllowCode = False,
    model: Annotated[
        str | None, typer.Option("--model", help="package.module:factory of a model that was not distilled here.")
    ] = None,
    kwargs: Annotated[str | None, typer.Option("--kwargs", help="Arguments of the factory, as a JSON object.")] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Weights: .safetensors, or a .pth state dict.")
    ] = None,
    example: Annotated[
        list[str] | None,
        typer.Option(
            "--example",
            metavar="[NAME:]SHAPE[:TYPE]",
            help="One input, e.g. image:1x3x224x224:uint8; a dynamic size has a name: 1xlength=64. Repeatable.",
        ),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", help=".npz with real inputs by name; needed for INT8.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="The device that it is for.")] = "this-machine",
    stack: Annotated[
        str | None, typer.Option("--stack", help="The device's stack.  [default: the newest known]")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision", help="auto, fp32, fp16, bf16, int8 or fp8; with --model. Repeatable.  [default: auto]"
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, max=65536, help="Samples per query.  [default: the example's]")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", help="The output to export, of several.  [default: logits, or the first]"),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="The classes' names, one per line: the output is one score for each."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a run's students for every target, verified; or, with --model, any PyTorch model.

    With --model, --set changes keys of [export], e.g. --set export.opset=18.
    """
    from cli import console
    from profiles.errors import InputError

    if (run is None) == (model is None):
        raise InputError(
            "name a run, or a model with --model", where="edgestill export", fix="edgestill export runs/quickstart"
        )
    given = {
        "--kwargs": kwargs, "--weights": weights, "--example": example, "--samples": samples, "--stack": stack,
        "--precision": precision, "--batch": batch, "--output": output,
        "--labels": labels,
        "--device": None if device == "this-machine" else device,
    }  # fmt: skip
    for option, value in given.items():
        if model is None and value is not None:
            raise InputError(
                "this option is for a model of your own", where=option, fix="--model package.module:factory"
            )
    if model is not None:
        from cli.pipeline.foreign import ForeignModel, export_foreign

        plan, bundles = export_foreign(
            ForeignModel(
                model,
                kwargs,
                weights,
                tuple(example or ()),
                samples,
                output,
                tuple(precision or ("auto",)),
                batch,
                labels,
            ),
            device=device,
            stack=stack,
            out=out,
            progress=console.make_progress(),
            overrides=overrides or (),
        )
        if as_json:
            console.emit_json({"plan": plan, "bundles": bundles})
            return
        for line in [*describe_candidates(plan, notes=True), *describe_steps(plan)]:
            console.emit(line)
        for bundle in bundles:
            console.emit(f"bundle  {bundle}")
        here = bundles and device == "this-machine"
        console.emit(f"next: edgestill bench {bundles[0]}" if here else f"next: copy a bundle to {plan.device}")
        return
    from cli.commands.runs import open_folder_or_recipe

    assert run is not None
    opened = open_folder_or_recipe(run, out, overrides, allow_code=allow_code)
    plans = opened.export()
    if not opened.is_main:
        return
    if as_json:
        console.emit_json(plans)
        return
    for name, found in plans.items():
        console.emit(f"{name}  ({found.device}, {found.stack}, opset {found.opset})")
        for line in [*describe_candidates(found), *describe_steps(found)]:
            console.emit(f"  {line}")
    console.emit(f"next: edgestill bench {opened.folder}, or edgestill run {opened.folder / 'recipe.toml'}")


def describe_candidates(plan: object, *, notes: bool = False) -> list[str]:
    """One line per candidate: name, size, metric, parity, engine or the reason why it is refused.

    Args:
        notes: also what computes, and what was noted about the graph.
    """
    from export import Plan

    assert isinstance(plan, Plan)
    lines = []
    for candidate in plan.candidates:
        if candidate.refused is not None:
            lines.append(f"{candidate.name:<10} refused: {candidate.refused}")
            continue
        parts = [f"{(candidate.size_bytes or 0) / 2**20:6.2f} MiB"]
        if candidate.validation is not None:
            parts.append(f"{candidate.validation.name} {candidate.validation.value:.1%} on validation")
        if candidate.parity:
            worst = max(candidate.parity, key=lambda rung: rung.relative)
            parts.append(f"relative error {worst.relative:.1e}")
            if worst.agreement is not None:
                parts.append(f"{worst.agreement:.1%} same decisions")
            elif worst.spread_error is not None:
                parts.append(f"{worst.spread_error:.1%} of the outputs' spread")
        if candidate.engine is not None:
            parts.append(f"engine by {candidate.engine.builder}")
        parts += [note for note in (candidate.parsed_by, candidate.engine_note) if note]
        lines.append(f"{candidate.name:<10} {', '.join(parts)}")
        if notes:
            said = [candidate.compute_precision] if candidate.compute_precision else []
            lines += [f"           {note}" for note in (*said, *candidate.notes)]
    return lines


def describe_steps(plan: object) -> list[str]:
    """What each step of the precision planner bought, one line each; empty where the ordinary graphs were enough."""
    from export import Plan

    assert isinstance(plan, Plan)
    ordinary = {candidate.name for candidate in plan.candidates}
    if all(step.name in ordinary for step in plan.steps):
        return []
    floor = f" (to keep: {plan.lowest_metric:.1%})" if plan.lowest_metric is not None else ""
    lines = [f"what each step bought{floor}:"]
    for step in plan.steps:
        parts = [f"{step.metric.name} {step.metric.value:.1%}"] if step.metric is not None else []
        parts += [f"{step.size_bytes / 2**20:.2f} MiB"] if step.size_bytes is not None else []
        parts += [f"{step.seconds:.1f} s"] if step.seconds is not None else []
        parts += {True: ["keeps it"], False: ["does not keep it"], None: []}[step.keeps]
        lines.append(f"  {step.name:<28} {', '.join([*parts, *([step.note] if step.note else [])])}")
    return lines
