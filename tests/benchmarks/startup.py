"""Time of `edgestill --help` against that of an empty Typer app, as medians of interleaved rounds.

    python tests/benchmarks/startup.py [ROUNDS]

Prints both medians, their spread and the ratio; the aim is at most 1.5. Both run as console scripts do: a new
interpreter, the app's module imported, help printed to a pipe.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_EMPTY = '''
import typer

app = typer.Typer()


@app.callback()
def callback() -> None:
    """An app that does nothing."""


app(prog_name="empty")
'''
_OURS = "import sys; from cli.app import main; main()"


def _seconds(command: list[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    return time.perf_counter() - start


def main(rounds: int = 21) -> None:
    """Prints the comparison."""
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "empty.py"
        script.write_text(_EMPTY)
        commands = {"empty Typer app": [sys.executable, str(script)], "edgestill": [sys.executable, "-c", _OURS]}
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(3):  # fills the disk cache and writes the byte code
            for command in commands.values():
                _seconds(command, root)
        for _ in range(rounds):
            for name, command in commands.items():
                times[name].append(_seconds(command, root))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:16} {medians[name] * 1e3:6.1f} ms   {min(values) * 1e3:.1f} to {max(values) * 1e3:.1f}")
    print(f"ratio {medians['edgestill'] / medians['empty Typer app']:.2f} ({rounds} rounds; aim: at most 1.5)")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
