"""`edgestill check`: what a device would refuse in an ONNX file, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import complete, console
from cli.commands.shared import JsonOption, examples, plain_table

if TYPE_CHECKING:
    from export.preflight import Finding
    from export.preflight.examine import Examination
    from profiles.device import Device, Stack

app = typer.Typer()

_WIDEST = 100
_REFUSED = 3


@app.command(
    epilog=examples(
        "edgestill check model.onnx --device jetson-orin-nano",
        "edgestill check model.onnx --device jetson-agx-orin --stack jetpack-5.1",
        "edgestill check model.onnx --device rtx-4060-laptop --batch 8 --json",
        "edgestill check --rules",
    )
)
def check(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE.onnx|BUNDLE", help="Any ONNX file, or a bundle.", show_default=False),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", help="A device's name, or a .toml file.", autocompletion=complete.devices),
    ] = "this-machine",
    stack: Annotated[
        str | None,
        typer.Option("--stack", help="The software on it.  [default: the newest known]", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=2**31 - 1, help="Samples per query.")] = 1,
    rules: Annotated[bool, typer.Option("--rules", help="List what is checked, and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check an ONNX file against a device: operators, types, shapes, precisions, memory. Nothing is built or measured.

    Every refusal names the fact that it rests on and what would be right. Where ONNX Runtime or TensorRT-RTX is
    installed, it is asked as well, and its answer is labelled as its own.

    Exit status: 0 nothing is refused, 3 something is, 2 the file is no ONNX model.
    """
    from profiles.errors import InputError

    if rules:
        _print_rules(as_json)
        return
    if file is None:
        raise InputError("no file to check", where="FILE.onnx", fix="edgestill check model.onnx --device NAME")
    from export.preflight.examine import examine
    from profiles.artifact import MANIFEST
    from profiles.device import load_device
    from profiles.opening import open_bundle

    target = load_device(device)
    if (file / MANIFEST).is_file():
        file = file / open_bundle(file).info["model"]
    found = examine(file, target, _stack(target, stack), batch=batch)
    if as_json:
        console.emit_json({**found.model_dump(mode="json"), "refused": found.refused})
    else:
        _print(found, target)
    raise typer.Exit(_REFUSED if found.refused else 0)


def _stack(device: Device, name: str | None) -> Stack:
    from profiles.errors import InputError, nearest

    if name is None:
        return device.stacks[0]
    names = [entry.name for entry in device.stacks]
    if name not in names:
        raise InputError(
            f'{device.name} has no stack "{name}"',
            where="--stack",
            evidence="known: " + ", ".join(names),
            fix=nearest(name, names),
        )
    return device.stacks[names.index(name)]


def _print_rules(as_json: bool) -> None:
    from export.preflight import RULES

    entries = list(RULES.values())
    if as_json:
        console.emit_json([{"id": rule.id, "title": rule.title, "runtimes": list(rule.runtimes)} for rule in entries])
        return
    every = max(len(rule.runtimes) for rule in entries)
    rows = [
        (rule.id, rule.title, "any" if len(rule.runtimes) == every else ", ".join(rule.runtimes)) for rule in entries
    ]
    console.emit(plain_table(("Rule", "What passes", "Runtime"), rows))


def _print(found: Examination, device: Device) -> None:
    _line(f"{found.file} on {device.title}, {found.stack} ({found.runtime}), batch {found.batch}", style="bold")
    memory = found.memory
    low, high = _size(memory.activations_at_least), _size(memory.activations_unfused)
    _line(
        f"opset {found.opset}, IR version {found.ir_version}, {found.nodes:,} nodes, "
        f"{', '.join(name.upper() for name in found.precisions) or 'no real numbers'}; "
        f"{_size(memory.weights)} of weights, {low} to {high} of activations"
        + (f", {_size(memory.device)} of memory" if memory.device is not None else ""),
        indent=2,
    )
    for entry in found.findings:
        _print_finding(entry)
    if found.findings or found.evidence:
        console.emit("")
    for answer in found.evidence:
        _line(f"{answer.tool}: {answer.verdict}" + (f" ({answer.detail})" if answer.detail else ""))
    refused = sum(entry.level == "refused" for entry in found.findings)
    notes = len(found.findings) - refused
    counts = f"{found.rules} rules checked, {notes} {'note' if notes == 1 else 'notes'}"
    if refused:
        _line(f"refused: {refused} {'reason' if refused == 1 else 'reasons'} ({counts})", style="bold red")
    else:
        _line(f"nothing refused ({counts})", style="bold green")


def _print_finding(entry: Finding) -> None:
    console.emit("")
    _line(f"{entry.level}: {entry.message} [{entry.rule}]", style="red" if entry.level == "refused" else "yellow")
    _line(entry.fact, indent=4)
    if entry.fix:
        _line(f"fix: {entry.fix}", indent=4)


def _line(text: str, *, indent: int = 0, style: str = "") -> None:
    """Text wrapped to the terminal, every line indented; what a file says about itself is never markup."""
    from textwrap import wrap

    from rich.text import Text

    width = min(console.stdout().width, _WIDEST)
    for part in wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent, break_on_hyphens=False):
        console.stdout().print(Text(part, style=style), soft_wrap=True)


def _size(count: int) -> str:
    """`3.2 MiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
