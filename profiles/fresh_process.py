"""A model in a process that does nothing else: its time to start, its memory, and whether it hangs or crashes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from profiles.errors import EdgestillError
from profiles.measurement import Memory
from profiles.runtimes import RuntimeOptions
from profiles.runtimes.stages import HUNG, LOADING, QUERYING

Array = np.ndarray[Any, Any]
LOAD_SECONDS = 300.0
"""After so long, loading a model hangs: TensorRT builds an engine meanwhile."""
_TRIES = 2


class HangError(EdgestillError):
    """A runtime that did not come back."""


class Started(NamedTuple):
    """What a fresh process that loads one model and runs it told."""

    load_ms: float | None
    first_inference_ms: float | None
    memory: Memory

    @classmethod
    def unknown(cls, reason: str) -> Started:
        """No figures, and why."""
        return cls(None, None, Memory(peak_mib=None, before_load_mib=None, how=f"n/a: {reason}"))

    @classmethod
    def not_probed(cls) -> Started:
        """Nobody asked."""
        return cls.unknown("no fresh process was asked for")


def probe(
    runtime_name: str,
    model: Path,
    inputs: Mapping[str, Array],
    threads: int,
    *,
    options: RuntimeOptions | None = None,
    timeout_seconds: float = 60.0,
) -> Started:
    """Load time, first inference and peak memory, from a process that does nothing else.

    Raises:
        EdgestillError: the process hung or crashed, so that the model should not be loaded anywhere else; with its name
            and what it did. Other failures are told by `Started.memory.how`.
    """
    root = str(Path(__file__).resolve().parent.parent)
    # -P keeps the working folder, which may hold a `profiles` of the user's, off the path
    code = (
        f"import sys; sys.path.append({root!r}); "
        "from profiles.runtimes.probe import main; sys.exit(main(*sys.argv[1:]))"
    )
    chosen = json.dumps(asdict(options or RuntimeOptions()))
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        stored = Path(folder) / "inputs.npz"
        arrays: dict[str, Any] = dict(inputs)
        np.savez(stored, **arrays)
        asked = [runtime_name, chosen, str(model), str(stored), str(threads)]
        command = [sys.executable, "-P", "-c", code, *asked, str(LOAD_SECONDS), str(timeout_seconds)]
        for _ in range(_TRIES):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=4 * LOAD_SECONDS, check=False)
            except subprocess.TimeoutExpired:
                return Started.unknown(f"the fresh process took more than {4 * LOAD_SECONDS:.0f} s")
            except OSError as error:
                return Started.unknown(f"the fresh process failed: {error}")
            ended = time.monotonic()
            lines = done.stdout.strip().splitlines()
            stage, _, since = lines[-1].partition(" ") if lines else ("", "", "")
            hung = HUNG in done.stderr and stage in (LOADING, QUERYING)
            loading = stage == LOADING
            allowed = LOAD_SECONDS if loading else timeout_seconds
            # a machine that slept, or a process that was stopped meanwhile, took far longer: once more
            if not hung or ended - float(since) < 1.5 * allowed + 1:
                break
    if hung:
        raise HangError(
            f"{runtime_name} hangs on the model {'while it is loaded' if loading else 'in its first queries'}",
            where=str(model),
            evidence=f"no answer within {allowed:g} s, in a process of its own, which was ended",
            fix="another runtime or version; raise measure.timeout_seconds if one query may take that long",
        )
    if done.returncode < 0:
        raise EdgestillError(
            f"{runtime_name} crashed on the model, in a process of its own",
            where=str(model),
            evidence=f"{signal.Signals(-done.returncode).name} while {stage or 'starting'}",
            fix="another runtime or version; SIGKILL is usually the system being out of memory",
        )
    try:
        found = json.loads(lines[-1])
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return Started.unknown(f"the fresh process failed: {last[0]}")
    if "error" in found:
        return Started.unknown(found["error"])
    memory = Memory(peak_mib=found["peak_mib"], before_load_mib=found["before_load_mib"], how=found["how"])
    return Started(found["load_ms"], found["first_inference_ms"], memory)
