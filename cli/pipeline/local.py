"""What a target's files are run with on this machine, and the outputs that they give there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from export.candidate import Candidate
from export.tensorrt import is_this_gpu
from profiles.device import ENGINE_RUNTIMES, Target
from profiles.measure import runtime_options
from profiles.measure_section import MeasureSection
from profiles.runtimes import WallClock, get_runtime, has_nvidia_gpu, usable

Array = np.ndarray[Any, Any]
_ROWS = 256


class Local(NamedTuple):
    """The runtime that a target is measured with here; None where it is not, and why."""

    runtime: str | None
    reason: str = ""


def local_runtime(target: Target) -> Local:
    """That of `target.runtime`, else that of the target's stack, where this machine is the device and has it."""
    wanted = target.section.runtime or target.stack.runtime
    title = target.device.title
    here = target.is_this_machine or (target.device.kind == "gpu" and has_nvidia_gpu() and is_this_gpu(target.device))
    if not here:
        return Local(None, f"this machine is no {title}; run --on {target.name}=HOST measures it there over ssh")
    if wanted == "onnxruntime" and target.device.kind == "gpu" and not target.is_this_machine:
        return Local(None, f'ONNX Runtime computes on the processor here, not on {title}; runtime = "onnxruntime-cuda"')
    found = usable(wanted)
    if not found.ok:
        fix = f" ({found.fix})" if found.fix else ""
        return Local(None, f'the runtime "{wanted}" cannot be used on this machine: {found.found}{fix}')
    return Local(wanted)


def file_of(candidate: Candidate, runtime: str, batch: int) -> Path | None:
    """The file of a candidate that the runtime runs: an engine for TensorRT, the graph for all others; None without."""
    if runtime not in ENGINE_RUNTIMES:
        return candidate.file
    engine = candidate.static_engine if batch == 1 and candidate.static_engine is not None else candidate.engine
    return engine.file if engine is not None else None


def outputs_of(
    candidate: Candidate, runtime: str, inputs: Mapping[str, Array], batch: int, section: MeasureSection
) -> dict[str, Array]:
    """All rows of `inputs` through a candidate in its runtime on this machine; by output name, (N, ...).

    Args:
        candidate: with the file that the runtime runs.
        runtime: as `local_runtime` told.
        inputs: by name, (N, ...).
        batch: the target's: an engine takes no more.
        section: threads and options.

    Raises:
        EdgestillError: the runtime cannot load or run it.
    """
    file = file_of(candidate, runtime, batch)
    assert file is not None
    step = batch if runtime in ENGINE_RUNTIMES else _ROWS
    total = len(next(iter(inputs.values())))
    session, clock = get_runtime(runtime, runtime_options(section)).load(file, threads=section.threads), WallClock()
    collected: dict[str, list[Array]] = {}
    try:
        for start in range(0, total, step):
            # the last query is filled up, so that all have one shape
            rows = np.minimum(np.arange(start, start + step), total - 1)
            given = {name: np.ascontiguousarray(array[rows]) for name, array in inputs.items()}
            for name, output in session.query(given, clock).outputs.items():
                collected.setdefault(name, []).append(output[: total - start].copy())
    finally:
        session.close()
    return {name: np.concatenate(parts) for name, parts in collected.items()}
