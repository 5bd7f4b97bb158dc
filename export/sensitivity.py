"""How much each quantised node costs: measured, with that node alone in INT8 and everything else in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from export.mixed import Unit, leave_float
from export.precision import Quantizer


@dataclass(frozen=True)
class Sensitivity:
    """What quantising one unit alone does to the outputs of the held-out samples.

    error: root mean square of the logits' difference over that of the reference. change: of the task metric (without
    one, minus the error against the outputs' spread); negative where it costs something.
    """

    unit: Unit
    error: float
    change: float


def measure(
    quantizer: Quantizer,
    quantized: onnx.ModelProto,
    units: Sequence[Unit],
    run: Callable[[onnx.ModelProto], NDArray[np.float32]],
    reference: NDArray[np.float32],
    change: Callable[[NDArray[np.float32]], float],
) -> list[Sensitivity]:
    """Every unit, the one that costs the most first: by the task metric, then by the outputs' error.

    Each is quantised alone rather than left out alone: where two of them ruin the outputs, leaving out one shows
    nothing.

    Args:
        quantized: as `quantizer.quantized` gave it.
        run: a graph's logits (N, C) on the held-out samples.
        reference: those of the float model.
        change: of the task metric, for logits of the same samples.
    """
    every = frozenset(quantizer.nodes)
    scale = max(float(np.sqrt(np.mean(np.square(reference, dtype=np.float64)))), 1e-30)
    found = []
    for unit in units:
        logits = run(leave_float(quantized, quantizer, every - unit.nodes))
        if np.isfinite(logits).all():
            off = float(np.sqrt(np.mean(np.square(logits.astype(np.float64) - reference)))) / scale
            found.append(Sensitivity(unit, off, change(logits)))
        else:
            found.append(Sensitivity(unit, float("inf"), -1.0))
    return sorted(found, key=lambda entry: (entry.change, -entry.error))
