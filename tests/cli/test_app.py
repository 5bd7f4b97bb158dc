"""The entry point: exit statuses, messages, global options, completion."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import typer

from cli import app as entry
from cli import console
from profiles.errors import EdgestillError, InputError, Interrupted

Register = Callable[[Callable[[], None]], None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Adds a command called `probe` that runs the given function."""

    def add(function: Callable[[], None]) -> None:
        module = ModuleType("probe_command")
        module.app = typer.Typer()  # type: ignore[attr-defined]
        module.app.command()(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setitem(entry.COMMANDS, "probe", entry.LazyCommand("probe_command", "Only in this test."))

    return add


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        entry.main(list(arguments))
    return end.value.code if isinstance(end.value.code, int) else 0


def fails_with(error: BaseException) -> Callable[[], None]:
    def probe() -> None:
        raise error

    return probe


def nested_disk_full() -> None:
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights.safetensors")
    except OSError as error:
        raise RuntimeError("could not save") from error


def rust_disk_full() -> None:
    raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("wrong", where="a.toml", evidence="line 3", fix="epochs = 3"), 2, "error: wrong"),
        (EdgestillError("could not"), 1, "error: could not"),
        (Interrupted("stopped here"), 130, "stopped here"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
        (RuntimeError("a [bold] surprise\nin two lines"), 1, "RuntimeError: a [bold] surprise in two lines"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_an_error_becomes_a_message_and_a_status(
    register: Register, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    register(fails_with(error))
    assert run("probe") == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_an_error_says_what_where_evidence_and_fix(register: Register, capsys: pytest.CaptureFixture[str]) -> None:
    long_fix = "edgestill run " + "a" * 150 + ".toml"
    register(fails_with(InputError("wrong", where="a.toml, train.epoch", evidence="epoch = 3\nline 2", fix=long_fix)))
    run("probe")
    assert capsys.readouterr().err.splitlines() == [
        "error: wrong",
        "  where: a.toml, train.epoch",
        "  evidence: epoch = 3",
        "    line 2",
        f"  fix: {long_fix}",
    ]


@pytest.mark.parametrize("function", [nested_disk_full, rust_disk_full])
def test_a_full_disk_is_named_wherever_it_shows(
    register: Register, capsys: pytest.CaptureFixture[str], function: Callable[[], None]
) -> None:
    def probe() -> None:
        function()

    register(probe)
    assert run("probe") == 1
    assert "error: the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback_without_values(
    register: Register, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    def probe() -> None:
        password = "hunter" + str(1 + 1)
        raise RuntimeError("boom" if password else "")

    register(probe)
    assert run(*(["--debug", "probe"] if where == "before" else ["probe", "--debug"])) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in probe" in err
    assert "hunter2" not in err
    assert "--debug" not in err


def test_global_options_work_after_the_command_but_not_after_a_double_dash(register: Register) -> None:
    seen: list[console.Settings] = []

    def probe() -> None:
        seen.append(console.settings())

    register(probe)
    assert run("probe", "-q", "--verbose") == 0
    assert seen == [console.Settings(quiet=True, verbose=True)]
    assert run("probe", "--", "-q") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "Did you mean 'run'"),
        (["report"], "Missing argument 'RUN'"),
        (["doctor", "--jsn"], "--jsn"),
        (["doctor", "surplus"], "surplus"),
    ],
)
def test_wrong_usage_exits_2_and_points_to_the_help(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "--help" in err


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    out, err = capsys.readouterr()
    assert all(name in out for name in entry.COMMANDS)
    assert "error" not in err


def test_flags_do_not_look_as_if_a_value_followed(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["devices", "add", "--help"]):
        assert run(*arguments) == 0
        assert "<bool>" not in capsys.readouterr().out


def test_brackets_in_help_texts_are_printed(register: Register, capsys: pytest.CaptureFixture[str]) -> None:
    def probe(where: Annotated[str, typer.Option(help="Where.  [NAME:]PORT [0-9]", metavar="X")] = "") -> None:
        """Goes to [bold] places."""

    register(probe)
    assert run("probe", "--help") == 0
    out = capsys.readouterr().out
    assert "Goes to [bold] places." in out
    assert "[NAME:]PORT [0-9]" in out


@pytest.mark.parametrize("name", sorted(entry.COMMANDS))
def test_the_help_line_of_the_table_exists_for_every_command(name: str) -> None:
    assert entry.COMMANDS[name].module.startswith("cli.commands.")
    assert entry.COMMANDS[name].help_line.endswith(".")


def test_json_has_no_nan() -> None:
    import io
    from contextlib import redirect_stdout

    with redirect_stdout(io.StringIO()) as out:
        console.emit_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": frozenset({"y", "x"}), "d": None})
    assert json.loads(out.getvalue()) == {"a": None, "b": [None, 1.5], "c": ["x", "y"], "d": None}


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from cli.app import main; main()", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=120
    )


def complete(words: str, **environment: str) -> list[str]:
    last = len(words.split(" ")) - 1
    variables: dict[str, Any] = {"_EDGESTILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(last)}
    done = script(**variables, **environment)
    assert done.stderr == ""
    return done.stdout.split()


def test_completion_knows_commands_devices_recipes_and_data_sets(tmp_path: Any) -> None:
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / "jetson-of-mine.toml").touch()
    assert complete("edgestill de") == ["devices"]
    assert complete("edgestill devices sh") == ["show"]
    found = complete("edgestill devices show jetson-o", EDGESTILL_CONFIG=str(tmp_path))
    assert {"jetson-orin-nano", "jetson-of-mine"} <= set(found)
    assert "movie-snippets" in complete("edgestill data fetch mo")
    assert "kd" in complete("edgestill methods k")
    assert "--html" in complete("edgestill report --ht")


def test_the_completion_script_is_printed() -> None:
    done = script("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0
    assert "_EDGESTILL_COMPLETE" in done.stdout


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    command = [sys.executable, "-c", "from cli.app import main; main()", "devices", "list", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `| head` does
        err = process.stderr.read()
    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_ends_with_130_and_one_line(tmp_path: Any) -> None:
    # a shell without job control starts what runs in its background with Ctrl-C ignored, and children inherit that
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from cli.app import main; main()"
    command = [sys.executable, "-c", code, "init", "--out", str(tmp_path / "a.toml")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.read(1) == "Y"  # the first question: it waits for an answer now
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert err.endswith("interrupted; the same command goes on\n")
    assert "error" not in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_named() -> None:
    command = [sys.executable, "-c", "from cli.app import main; main()", "data", "--json"]
    # buffered, as people have it: then what is left is written when Python ends
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert "Exception ignored" not in done.stderr


def test_colour_and_width_follow_the_environment() -> None:
    done = script("devices", COLUMNS="60", NO_COLOR="1")
    assert "\x1b" not in done.stdout
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 60
