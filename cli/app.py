"""The `edgestill` command: finds the command, runs it, and turns every failure into a message and an exit status.

Starting must be quick, so this module imports Typer and nothing heavier; a command's module is imported when it is
the one that was asked for. Help and tab completion of the command names read the table below.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from cli import console
from profiles.errors import EdgestillError, InputError, Interrupted


@dataclass(frozen=True)
class LazyCommand:
    """Where a command is: `module` holds `app`, a `typer.Typer` with one command, or with several for a group."""

    module: str
    help_line: str


COMMANDS: dict[str, LazyCommand] = {
    "run": LazyCommand("cli.commands.run", "The whole way: from data to students, exported, measured and reported."),
    "init": LazyCommand("cli.commands.init", "Write a commented recipe for your own data."),
    "distill": LazyCommand("cli.commands.distill", "Only train the students of a run."),
    "export": LazyCommand("cli.commands.export", "Only export: a run's students, or a model of yours."),
    "check": LazyCommand("cli.commands.check", "What a device would refuse in any ONNX file, before building."),
    "bench": LazyCommand("cli.commands.bench", "Only measure: a run's exports, or any ONNX file, on this machine."),
    "study": LazyCommand("cli.commands.study", "Which method is best on your data, with intervals."),
    "report": LazyCommand("cli.commands.report", "Print a run's report, or write it as HTML, CSV, Markdown or JSON."),
    "compare": LazyCommand("cli.commands.compare", "What changed between two runs, and whether it is more than noise."),
    "devices": LazyCommand("cli.commands.devices", "The known devices: their facts, and how to add your own."),
    "methods": LazyCommand("cli.commands.methods", "The ways to distil: what each one needs, costs and is good for."),
    "data": LazyCommand("cli.commands.data", "The data sets that come along or can be fetched."),
    "doctor": LazyCommand("cli.commands.doctor", "What this machine can do, and what to install for the rest."),
}


class LazyGroup(TyperGroup):
    """The root group: lists commands from the table, imports a command's module when it is resolved."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, entry in COMMANDS.items():
            self.commands[name] = TyperCommand(name=name, help=entry.help_line)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Replaces the stand-in of the wanted command by the real one; run, help and completion all pass here."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = _load(args[0])
            _tidy_help(self.commands[args[0]], ctx)
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help page."""
        _tidy_help(self, ctx)
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """A Ctrl-C while the command runs becomes our own error, before Typer turns it into a silent exit."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _interrupted() from error


def _load(name: str) -> Any:
    from importlib import import_module

    command = typer.main.get_command(import_module(COMMANDS[name].module).app)
    command.name = name
    completion = ("install_completion", "show_completion")  # belong to the root alone
    command.params = [option for option in command.params if option.name not in completion]
    return command


def _tidy_help(command: Any, ctx: Any) -> None:
    """Makes help texts read as they were meant.

    Typer takes `[word]` for markup and drops it, breaks paragraphs where the source breaks its lines, and prints
    `<bool>` beside a flag, as if a value had to follow.
    """
    command.epilog = _without_markup(command.epilog)
    command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", _without_markup(command.help) or "")
    for option in [*command.params, command.get_help_option(ctx)]:
        option.help = _without_markup(option.help)
        if getattr(option, "is_flag", False) and option.metavar is None:
            option.metavar = ""
    for inner in getattr(command, "commands", {}).values():
        _tidy_help(inner, ctx)


def _without_markup(text: str | None) -> str | None:
    return None if text is None else re.sub(r"(?<!\\)\[(?=[a-zA-Z#/@])", r"\[", text)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("edgestill")
        except PackageNotFoundError:
            found = "from a source folder, not installed"
        sys.stdout.write(f"edgestill {found}\n")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="One teacher in, the best student for every device out: distilled, exported, verified and measured.",
    epilog="Start here: edgestill run quickstart",
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show inner steps and libraries' warnings.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    console.configure(console.Settings(quiet=quiet, verbose=verbose, debug=debug))
    if not (verbose or debug):
        import warnings

        warnings.simplefilter("ignore")


_ANYWHERE = ("-q", "--quiet", "-v", "--verbose", "--debug")


def _global_options_first(arguments: Sequence[str]) -> list[str]:
    """`edgestill run x --debug` is `edgestill --debug run x`; what follows `--` is left alone."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    ours = [word for word in arguments[:end] if word in _ANYWHERE]
    return [*ours, *(word for word in arguments[:end] if word not in _ANYWHERE), *arguments[end:]]


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Always raises SystemExit.

    Exit status: 0 done; 1 edgestill could not do it; 2 wrong usage or input; 130 interrupted; a command's own status
    (3 a limit failed, 4 inconclusive) through `typer.Exit`.
    """
    # PyTorch's OpenMP threads spin for milliseconds at every barrier. Where another program takes one of two cores,
    # that makes training 5 to 20 times slower; short spinning costs a few percent at most where the cores are idle.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead of ending the run
    sys.exit(_run(_global_options_first(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    console.configure(console.Settings(debug="--debug" in arguments))
    try:
        try:
            status = typer.main.get_command(app).main(arguments, prog_name="edgestill", standalone_mode=False)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        found = _explain(error)
        try:
            sys.stdout.flush()
        except OSError:
            _silence_stdout()
        return found
    return status if isinstance(status, int) else 0


def _explain(error: BaseException) -> int:
    """Prints what went wrong and returns the exit status."""
    known = _known(error)
    if console.settings().debug and not _is_usage_error(error):
        from traceback import print_exception

        print_exception(error)
    if known is not None:
        if known.message:
            console.print_error(known)
        return known.exit_status
    console.print_error(
        EdgestillError(
            f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}",
            fix=None if console.settings().debug else "run again with --debug for the traceback",
        )
    )
    return 1


def _known(error: BaseException) -> EdgestillError | None:
    """The message of an error that we know how to explain, else None."""
    if isinstance(error, EdgestillError):
        return error
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return _interrupted()
    if _is_usage_error(error):
        return _usage_error(error)
    if any(_says_disk_full(link) for link in _chain(error)):
        places = (link.filename for link in _chain(error) if isinstance(link, OSError) and link.filename)
        place = next((str(name) for name in places), None)
        return EdgestillError(
            "the disk is full",
            where=place,
            evidence=" ".join(str(error).split()),
            fix="free some space; the same command goes on where it stopped",
        )
    return None


def _interrupted() -> Interrupted:
    return Interrupted("interrupted; the same command goes on")


def _is_usage_error(error: BaseException) -> bool:
    # By its shape: depending on the version, Typer raises Click's class or a vendored copy of it.
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _usage_error(error: Any) -> InputError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "edgestill"
    # NoArgsIsHelp carries the help text, which is already printed.
    message = "" if type(error).__name__ == "NoArgsIsHelpError" else error.format_message()
    return InputError(message, where=command, fix=f"{command} --help")


def _says_disk_full(error: BaseException) -> bool:
    # Libraries written in Rust and C++ (safetensors, torch) only pass the system's text on.
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _silence_stdout() -> None:
    """The reader is gone (`| head`), or the disk full: Python's own flush at exit must not fail a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
