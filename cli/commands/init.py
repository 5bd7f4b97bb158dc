"""`edgestill init`: a commented recipe for the user's own data, by asking or from options."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli import complete, console
from cli.commands.shared import examples

if TYPE_CHECKING:
    from cli.new_recipe import Task
    from cli.own_data import OwnData

app = typer.Typer()

_TEACHER_QUESTION = (
    "Teacher: train (a wide network on your labels first), none, array:embeddings.npy, transformers:owner/model, "
    "onnx:teacher.onnx, torch:package.module:factory"
)
_TEACHER_HELP = "train (a wide network on your labels first), none, array, transformers, onnx or torch; see above."


@app.command(
    epilog=examples(
        "edgestill init",
        "edgestill init --yes --data photos --device raspberry-pi-5 --latency-ms 20",
        "edgestill init --yes --data reviews.csv --teacher transformers:owner/model --out reviews.toml",
    )
)
def init(
    *,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="A folder with a folder of images per class, a csv, jsonl, parquet or npz file, or a data set's name.",
        ),
    ] = None,
    task: Annotated[
        Literal["multiclass", "multilabel"] | None,
        typer.Option("--task", help="multiclass: one class per sample; multilabel: several labels, or none."),
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", metavar="KIND[:VALUE]", help=_TEACHER_HELP)] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="NAME",
            help="The device that it is for, see: edgestill devices. Repeatable.",
            autocompletion=complete.devices,
        ),
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option("--latency-ms", help="Milliseconds that one answer may take.")
    ] = None,
    memory_mib: Annotated[float | None, typer.Option("--memory-mib", help="Memory that may be used, in MiB.")] = None,
    file_size_mib: Annotated[
        float | None, typer.Option("--file-size-mib", help="Size that the model file may have, in MiB.")
    ] = None,
    metric_floor: Annotated[
        float | None, typer.Option("--metric-floor", help="Accuracy that must be reached, 0 to 1.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("recipe.toml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; defaults for what is not given.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a recipe for your own data, with a comment at every key.

    It asks for what the options do not say. The file is written whole or not at all.

    A teacher that you have is named as KIND:VALUE: array:embeddings.npy (outputs that you computed),
    transformers:owner/model, onnx:teacher.onnx, torch:package.module:factory.
    """
    from cli.new_recipe import Limits, choose_teacher, slug, write
    from cli.own_data import look_at
    from profiles.artifact import explain_os_errors, write_text
    from profiles.device import THIS_MACHINE, load_device
    from profiles.errors import InputError

    ask = _Ask(yes)
    if out.exists() and not force:
        raise InputError(f"{out} exists already", where="--out", fix="another --out, or --force to replace it")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent}", where="--out", fix=f"mkdir -p {out.parent}")
    place = ask.text("Your data: folder, file or name", data, "fashion-mnist-small")
    found = look_at(place, _catalogue())
    ask.say(f"  {found.seen}")
    base = out.resolve().parent
    several = (
        ask.choice("Has a sample one class or several labels?", task, ("multiclass", "multilabel")) == "multilabel"
    )
    chosen_task: Task = "multilabel" if several else "multiclass"
    found = _with_columns(found, chosen_task, ask)
    chosen_teacher = choose_teacher(ask.text(_TEACHER_QUESTION, teacher, "train"), base=base)
    names = device or [
        word.strip()
        for word in ask.text("Devices, separated by commas (edgestill devices lists them)", None, THIS_MACHINE).split(
            ","
        )
    ]
    devices = [(name, load_device(name, where="--device")) for name in names]
    limits = Limits(
        latency_ms=ask.figure("Milliseconds that one answer may take (empty: no limit)", latency_ms),
        memory_mib=memory_mib,
        file_size_mib=file_size_mib,
        metric_floor=ask.figure("Accuracy that must be reached, 0 to 1 (empty: no limit)", metric_floor),
    )
    text = write(
        name=slug(out.stem if found.path is None or out.stem != "recipe" else found.path.stem),
        data=found,
        task=chosen_task,
        teacher=chosen_teacher,
        devices=devices,
        limits=limits,
        base=base,
    )
    with explain_os_errors(out):
        write_text(out, text)
    console.emit(f"wrote {out}\nwhat it would do: edgestill run {out} --dry-run\nstart it:         edgestill run {out}")


class _Ask:
    """Asks on standard error, unless the option was given or `--yes` takes every default."""

    def __init__(self, yes: bool) -> None:
        self._yes = yes

    def say(self, text: str) -> None:
        if not self._yes:
            sys.stderr.write(text + "\n")

    def text(self, question: str, given: str | None, default: str | None) -> str:
        """`given`, the answer, or `default`; a default of None must be answered."""
        if given is not None:
            return given
        if self._yes:
            if default is None:
                from profiles.errors import InputError

                raise InputError(f"cannot guess: {question}", where="edgestill init --yes", fix="run it without --yes")
            return default
        # not typer.prompt: that one leaves a blank on standard output for every question
        sys.stderr.write(question + (f" [{default}]: " if default else ": "))
        sys.stderr.flush()
        try:
            answer = input().strip()
        except EOFError as error:
            from profiles.errors import InputError

            raise InputError(
                "init asks questions, and nobody is there to answer",
                where="standard input",
                fix="edgestill init --yes --data PATH --device NAME",
            ) from error
        if not answer and default is None:
            return self.text(question, given, default)
        return answer or str(default)

    def choice(self, question: str, given: str | None, options: tuple[str, ...]) -> str:
        """One of `options`; the first is the default."""
        from profiles.errors import InputError, nearest

        answer = self.text(f"{question} ({', '.join(options)})", given, options[0])
        if answer not in options:
            raise InputError(f'"{answer}" is none of the answers', where=question, fix=nearest(answer, list(options)))
        return answer

    def figure(self, question: str, given: float | None) -> float | None:
        """A number, or None for no limit."""
        from profiles.errors import InputError

        if given is not None or self._yes:
            return given
        answer = self.text(question, None, "").strip()
        if not answer:
            return None
        try:
            return float(answer)
        except ValueError as error:
            raise InputError(f'"{answer}" is not a number', where=question, fix="such as 10 or 0.9") from error


def _catalogue() -> dict[str, str]:
    from distill.data.catalogue import list_catalogue

    return {entry.name: entry.kind for entry in list_catalogue()}


def _with_columns(found: OwnData, task: Task, ask: _Ask) -> OwnData:
    """Asks for the columns that could not be told from their names."""
    if "/" in found.source:
        return replace(found, named_texts=ask.choice("What does it hold?", None, ("images", "texts")) == "texts")
    if found.source not in ("csv", "jsonl", "parquet", "npz"):
        return found
    listed = ", ".join(found.columns)
    if found.image_column is None and found.text_column is None:
        kind = "images" if found.source == "npz" else ask.choice("What does it hold?", None, ("images", "texts"))
        column = _one_of(found, ask.text(f"Which of these holds the {kind}: {listed}", None, None))
        found = (
            replace(found, text_column=column)
            if kind == "texts"
            else replace(found, image_column=column, image_size=128)
        )
    # without a label column, a table of several labels is taken to have one column for each class
    if found.label_column is None and (task == "multiclass" or found.source == "npz"):
        column = _one_of(found, ask.text(f"Which of these holds the labels: {listed}", None, None))
        found = replace(found, label_column=column)
    return found


def _one_of(found: OwnData, answer: str) -> str:
    from profiles.errors import InputError, nearest

    if answer not in found.columns:
        raise InputError(
            f'there is no column "{answer}"', where=str(found.path), fix=nearest(answer, list(found.columns))
        )
    return answer
