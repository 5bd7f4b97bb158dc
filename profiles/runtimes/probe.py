"""The fresh process: loads one model, runs it, and says how long that took and how much memory.

Started by `profiles.measure` as a process of its own, so that neither torch nor another model is counted; it imports
nothing that running a model does not need.
"""

from __future__ import annotations

import faulthandler
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from profiles import agent
from profiles.errors import EdgestillError
from profiles.runtimes import RuntimeOptions, WallClock, get_runtime, on_gpu
from profiles.runtimes.stages import LOADING, QUERYING

_QUERIES = 20
_SECONDS = 2.0


def main(runtime_name: str, options: str, model: str, inputs_file: str, threads: str, load: str, query: str) -> int:
    """Prints what it does next, a line each, and last a JSON document: load_ms, first_inference_ms, before_load_mib,
    peak_mib, how; or error. See `Memory`.

    Args:
        runtime_name: of the runtime.
        options: its `RuntimeOptions` as JSON.
        model: the file.
        inputs_file: one query, an .npz file.
        threads: inside an operator.
        load: seconds after which loading counts as hanging; the process then ends itself.
        query: the same for one query.
    """
    with np.load(inputs_file) as stored:
        inputs = dict(stored)
    clock = WallClock()
    # before the runtime is imported: where CPU and GPU share the memory, its libraries count
    watch = agent.MemoryWatch()
    try:
        runtime = get_runtime(runtime_name, RuntimeOptions(**json.loads(options)))
        before = _resident("VmRSS")
        _watch(LOADING, float(load))
        start = clock.now()
        session = runtime.load(Path(model), threads=int(threads))
        loaded = clock.now()
        _watch(QUERYING, float(query))
        asked = clock.now()
        session.query(inputs, clock)
        first = clock.now()
        end = time.monotonic() + _SECONDS
        for _ in range(_QUERIES):
            _watch(QUERYING, float(query))
            session.query(inputs, clock)
            if time.monotonic() > end:
                break
        faulthandler.cancel_dump_traceback_later()
        there = watch.close()
    except EdgestillError as error:
        print(json.dumps({"error": f"{error.message} ({error.evidence})"}))  # noqa: T201
        return 1
    found = {
        "load_ms": (loaded - start) / 1e6,
        "first_inference_ms": (first - asked) / 1e6,
        "before_load_mib": before,
        **(_peak_on_gpu(there) if on_gpu(runtime_name, session.options) else _peak()),
    }
    print(json.dumps(found))  # noqa: T201
    return 0


def _watch(stage: str, seconds: float) -> None:
    """Says what comes next, and when; faulthandler ends the process if it takes longer, whatever holds the GIL."""
    print(stage, time.monotonic(), flush=True)  # noqa: T201
    faulthandler.dump_traceback_later(seconds, exit=True)


def _peak_on_gpu(found: dict[str, Any]) -> dict[str, float | str | None]:
    """What `MemoryWatch` saw: the limit of a model on a GPU is about the GPU's memory; the host's is told beside it."""
    beside = _peak()
    how = str(found["gpu_how"])
    if not found["unified"] and isinstance(beside["peak_mib"], float):
        how += f"; beside it {beside['peak_mib']:.0f} MiB of the host ({str(beside['how']).split(' ', 1)[0]})"
    return {"peak_mib": found.get("gpu_mib"), "how": how}


def _peak() -> dict[str, float | str | None]:
    peak = _resident("VmHWM")
    if peak is not None:
        return {"peak_mib": peak, "how": "VmHWM of a fresh process with Python, NumPy and the runtime"}
    try:
        import resource
    except ImportError:
        return {"peak_mib": None, "how": "n/a: this system tells neither VmHWM nor ru_maxrss"}
    unit = 2**20 if sys.platform == "darwin" else 2**10  # getrusage(2): bytes on macOS, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"peak_mib": peak, "how": "ru_maxrss of a fresh process with Python, NumPy and the runtime"}


def _resident(field: str) -> float | None:
    """A memory field of this process in MiB (proc(5)), or None where there is no /proc."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) / 1024 if match else None
