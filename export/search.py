"""INT8 that keeps the metric: what is tried when plain INT8 does not, in the order of what it costs the device.

The other calibrations, cross-layer equalisation and bias correction leave every node in INT8; then the nodes that cost
the most are left in float. It stops at the first that keeps the metric.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export.candidate import PlanStep
from export.equalise import correct_biases, equalise
from export.mixed import Unit, leave_float, pools, rescue, share_in_int8, units_of
from export.onnx import weights_bytes
from export.precision import Quantization, Quantizer
from export.section import ExportSection
from export.sensitivity import Sensitivity, measure
from profiles.errors import EdgestillError
from profiles.metrics import Metric

METHODS = ("minmax", "entropy", "percentile")
MOSTLY = 0.5
"""Share of the multiply-adds from which on a mixed graph counts as INT8; below it, training is worth its time."""
LEAST = 0.2
"""With a smaller share than this in INT8, a mixed graph has lost what INT8 is for."""
_QUESTIONS = 24
"""Graphs that the rescue may ask about: each is made and scored on the whole validation split."""
_MOST_POOLS = 4
"""Sets of nodes that the rescue starts from at most."""
_MOST_NAMED = 4


@dataclass(frozen=True)
class Verdict:
    """What a graph is worth on the held-out data.

    value: its metric; without one, 1 - `error`. error: see `parity.spread_error`; None: the metric decides. agreement:
    share of equal decisions; None where there are none.
    """

    value: float
    keeps: bool
    metric: Metric | None
    error: float | None = None
    agreement: float | None = None


@dataclass
class Judge:
    """How the search asks about a graph.

    verdict: of a graph. logits: of a graph on the parity samples. reference: the float model's. change: of the task
    metric for such logits, see `sensitivity.measure`.
    """

    verdict: Callable[[onnx.ModelProto], Verdict]
    logits: Callable[[onnx.ModelProto], NDArray[np.float32]]
    reference: NDArray[np.float32]
    change: Callable[[NDArray[np.float32]], float]


@dataclass(frozen=True)
class Outcome:
    """The best graph with every node in INT8, and one with some in float when that was needed.

    described: how `full` was made. keeps: whether `full` keeps the metric. mixed: keeps it; None: not needed, or it
    does not keep it either. share: of the multiply-adds that are in INT8 in `mixed`. floating: what it leaves in float.
    """

    full: onnx.ModelProto
    described: str
    keeps: bool
    steps: tuple[PlanStep, ...]
    mixed: onnx.ModelProto | None = None
    share: float = 1.0
    floating: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """An outcome as its artefact holds it. mixed: whether there is such a graph."""

    folder: Path
    described: str
    keeps: bool
    mixed: bool
    share: float
    floating: tuple[str, ...]


@dataclass
class _Best:
    quantizer: Quantizer
    method: str
    model: onnx.ModelProto
    verdict: Verdict
    described: str


class Search:
    """One search, for a target whose plain INT8 does not keep the metric."""

    def __init__(
        self,
        source: Path,
        calibration: Mapping[str, NDArray[Any]],
        form: Quantization,
        section: ExportSection,
        judge: Judge,
    ) -> None:
        self.source, self.calibration, self.form, self.section, self.judge = source, calibration, form, section, judge
        self.steps: list[PlanStep] = []

    def run(self) -> Outcome:
        """Searches until a graph keeps the metric.

        Raises:
            EdgestillError: the quantiser fails.
        """
        started = time.perf_counter()
        quantizer = Quantizer(self.source, self.calibration, self.form, self.section.calibration_percentile)
        first = self.section.calibration_method
        model = quantizer.quantized(first)
        best = _Best(quantizer, first, model, self.judge.verdict(model), f"{first} ranges")
        if best.verdict.keeps:
            return self._found(best)
        for method in METHODS:
            if method != first:
                best = self._calibrated(best, method, started)
                if best.verdict.keeps:
                    return self._found(best)
                started = time.perf_counter()
        for attempt in (self._equalised, self._corrected):
            best = attempt(best)
            if best.verdict.keeps:
                return self._found(best)
        return self._mixed(best)

    def _found(self, best: _Best, **mixed: Any) -> Outcome:
        return Outcome(best.model, best.described, best.verdict.keeps, tuple(self.steps), **mixed)

    def _calibrated(self, best: _Best, method: str, started: float) -> _Best:
        try:
            model = best.quantizer.quantized(method)
        except EdgestillError as error:
            self._note(f"int8 {method}", None, None, started, note=error.evidence or error.message)
            return best
        return self._better(best, _Best(best.quantizer, method, model, best.verdict, f"{method} ranges"), started)

    def _equalised(self, best: _Best) -> _Best:
        """Channels scaled across layers, then calibrated anew by the best method so far."""
        started = time.perf_counter()
        found = equalise(best.quantizer.prepared, self.calibration)
        stopped = ""
        if found.stopped:
            operators = ", ".join(sorted(found.stopped))
            stopped = f"; {sum(found.stopped.values())} were not: no scale is taken through {operators}"
        if not found.groups:
            note = f"no two layers whose channels can be scaled{stopped}"
            self._note("int8 equalised", None, None, started, note=note)
            return best
        quantizer = best.quantizer.of(found.model)
        model = quantizer.quantized(best.method)
        tried = _Best(quantizer, best.method, model, best.verdict, f"{best.described}, equalised")
        return self._better(best, tried, started, note=f"{found.groups} groups of channels scaled{stopped}")

    def _corrected(self, best: _Best) -> _Best:
        """Biases that take the mean errors back."""
        started = time.perf_counter()
        changed, count = correct_biases(best.quantizer.prepared, best.model, self.calibration)
        if not count:
            self._note("int8 biases corrected", None, None, started, note="no layer has a bias of its own")
            return best
        quantizer = best.quantizer.of(changed, keep_ranges=True)
        model = quantizer.quantized(best.method)
        tried = _Best(quantizer, best.method, model, best.verdict, f"{best.described}, biases corrected")
        return self._better(best, tried, started, note=f"{count} biases")

    def _better(self, best: _Best, tried: _Best, started: float, note: str = "") -> _Best:
        verdict = self.judge.verdict(tried.model)
        tried.verdict = verdict
        name = f"int8 {tried.described.removesuffix(' ranges').replace(' ranges, ', ', ')}"
        self._note(name, verdict, tried.model, started, note=note)
        return tried if verdict.keeps or verdict.value > best.verdict.value else best

    def _mixed(self, best: _Best) -> Outcome:
        """The fewest nodes in float that keep the metric, the most sensitive ones first."""
        started = time.perf_counter()
        units = units_of(best.quantizer)
        ranked = measure(best.quantizer, best.model, units, self.judge.logits, self.judge.reference, self.judge.change)
        self._note("sensitivity", None, None, started, note=_worst(ranked))
        started = time.perf_counter()
        asked: dict[frozenset[Unit], tuple[onnx.ModelProto, Verdict]] = {}

        def keeps(chosen: frozenset[Unit]) -> bool:
            if not chosen:
                return best.verdict.keeps
            model = leave_float(best.model, best.quantizer, frozenset(name for unit in chosen for name in unit.nodes))
            asked[chosen] = (model, self.judge.verdict(model))
            return asked[chosen][1].keeps

        order = [entry.unit for entry in ranked]
        tried = pools(units, order, LEAST)[:_MOST_POOLS]
        pool = next((pool for pool in tried if keeps(frozenset(pool))), None)
        if pool is None:
            share = max((1 - share_in_int8(units, each) for each in tried), default=0.0)
            note = f"does not even with up to {share:.0%} of the multiply-adds in float ({len(tried)} sets of nodes)"
            self._note("int8-mixed", None, None, started, keeps=False, note=note)
            return self._found(best)
        chosen = rescue(pool, keeps, limit=_QUESTIONS)
        model, verdict = asked[chosen]
        floating = tuple(str(unit) for unit in units if unit in chosen)
        share = share_in_int8(units, list(chosen))
        shown = ", ".join(floating[:_MOST_NAMED]) + (" ..." if len(floating) > _MOST_NAMED else "")
        note = f"{len(floating)} of {len(units)} nodes in float ({shown}); {share:.0%} of the multiply-adds in INT8"
        self._note("int8-mixed", verdict, model, started, note=note)
        return self._found(best, mixed=model, share=share, floating=floating)

    def _note(
        self,
        name: str,
        verdict: Verdict | None,
        model: onnx.ModelProto | None,
        started: float,
        *,
        keeps: bool | None = None,
        note: str = "",
    ) -> None:
        self.steps.append(
            PlanStep(
                name=name,
                metric=verdict.metric if verdict is not None else None,
                agreement=verdict.agreement if verdict is not None else None,
                size_bytes=weights_bytes(model) if model is not None else None,
                seconds=round(time.perf_counter() - started, 2),
                keeps=verdict.keeps if verdict is not None else keeps,
                note="; ".join(part for part in (_error(verdict), note) if part),
            )
        )


def _error(verdict: Verdict | None) -> str:
    error = verdict.error if verdict is not None else None
    return f"error {error:.2g} of the outputs' spread" if error is not None else ""


def _worst(ranked: list[Sensitivity]) -> str:
    worst = [f"{entry.unit} {entry.change * 100:+.1f} pt, error {entry.error:.2g}" for entry in ranked[:_MOST_NAMED]]
    return f"{len(ranked)} nodes, each alone in INT8; worst: " + "; ".join(worst)
