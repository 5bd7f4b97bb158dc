"""Two runs compared: what changed, whether that is more than noise, and whether a gate lets it through.

Units as in the report: metrics are fractions, times milliseconds, sizes MiB, energies millijoules. A change is the
second run (B) minus the first (A).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, Literal, NamedTuple

import numpy as np
from pydantic import Field

from cli.report.gate import Gate, Quantity, higher_is_better
from cli.report.predictions import Stored
from cli.report.schema import EnergyValue, LatencyValue, MetricValue, Part
from cli.report.sides import Figures, Side, common_rows, latency_identity, unlike
from cli.report.verdict import RowVerdict, exit_status
from cli.report.words import percentile_title
from profiles import statistics
from profiles.errors import InputError
from profiles.metrics import difference, primary_metric

SCHEMA_VERSION: Final = 1
CONFIDENCE: Final = 0.95
"""Of all decisions of one comparison together."""

Outcome = Literal["better", "worse", "same", "noise", "unknown", "refused", "not measured"]
"""same: equal figures. noise: the interval holds both directions. unknown: no interval could be had. refused: the two
are not comparable. not measured: one of them, or both, have no figure."""


class Change(Part):
    """One quantity of one row, from A to B."""

    quantity: Quantity
    title: str
    """With the percentile of a latency: "p99"."""
    a: float | None = None
    b: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    """low, high: the interval of the difference, in its unit."""
    relative: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None
    """The same as fractions of A: 0.05 is 5 % more."""
    confidence: float | None = None
    """Of the interval; None where there is none, or the figures are exact."""
    how: str = ""
    """What the interval was made from."""
    outcome: Outcome
    reason: str = ""
    gate: str | None = None
    """What is let through: "+5%"; None without a gate."""
    verdict: RowVerdict | None = None
    """Of the gate: pass, fail, inconclusive, or not measured."""


class ComparedRow(Part):
    """One target, or one measured file."""

    name: str
    shipped: bool
    """False for a precision that was tried, and not shipped in both runs: it is shown, and no gate decides on it."""
    arch_a: str = ""
    arch_b: str = ""
    precision_a: str = ""
    precision_b: str = ""
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()


class ComparedRun(Part):
    """One of the two."""

    path: str
    name: str = ""
    created: str = ""
    versions: dict[str, str] = Field(default_factory=dict)


class Comparison(Part):
    """What `edgestill compare --json` prints."""

    schema_version: Literal[1] = SCHEMA_VERSION
    a: ComparedRun
    b: ComparedRun
    metric: str = ""
    gates: tuple[str, ...] = ()
    confidence: float = CONFIDENCE
    """Of all decisions together: with 0.95, 1 in 20 comparisons of equal runs may claim a difference. Less where only
    the bounds of the reports are there, and these are less sure."""
    decisions: int
    """How many intervals share the error probability."""
    rows: tuple[ComparedRow, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    exit_status: int


_MEMORY_MIB, _MEMORY_SHARE = 0.5, 0.01
"""Peaks of one file in eight fresh processes were within 0.18 of 67 MiB; the larger of these is taken for no change."""


class Interval(NamedTuple):
    """Ends of a difference and of the relative change; None where unknown."""

    low: float | None
    high: float | None
    relative_low: float | None
    relative_high: float | None
    confidence: float
    how: str


class _Judged(NamedTuple):
    verdict: RowVerdict


def compare(a: Side, b: Side, gates: Sequence[Gate] = (), *, show_all: bool = False) -> Comparison:
    """B against A, row by row.

    Args:
        a: the run to compare with.
        b: the run that may have become better or worse.
        gates: what is let through; they decide on shipped files, or on all rows where nothing was shipped.
        show_all: also the precisions that were tried and not shipped.

    Raises:
        InputError: no row in common, or nothing but sizes can be compared.
    """
    pairs, only_a, only_b = common_rows(a, b)
    if not pairs:
        raise InputError(
            "the two have no target in common",
            where=f"{a.path} and {b.path}",
            evidence=f"{', '.join(only_a) or 'none'}; {', '.join(only_b) or 'none'}",
            fix="compare runs of one recipe, or two measured files",
        )
    some_shipped = any(pair.shipped for pair in pairs)
    pairs = [pair for pair in pairs if pair.shipped or show_all or not some_shipped]
    gated = {gate.quantity: gate for gate in gates}
    planned = [_Planned(pair.a, pair.b, gated if pair.shipped or not some_shipped else {}, a, b) for pair in pairs]
    decisions = max(1, sum(plan.decisions(bool(gates)) for plan in planned))
    confidence = statistics.look_confidence(CONFIDENCE, decisions)
    rows = tuple(
        ComparedRow(
            name=pair.name,
            shipped=pair.shipped,
            arch_a=pair.a.arch,
            arch_b=pair.b.arch,
            precision_a=pair.a.precision,
            precision_b=pair.b.precision,
            changes=plan.changes(confidence),
            notes=plan.notes(),
        )
        for pair, plan in zip(pairs, planned, strict=True)
    )
    _refuse_strangers(rows, a, b)
    deciding = [change for row in rows for change in row.changes if change.gate is not None or not gates]
    wrong = sum(1 - change.confidence for change in deciding if change.confidence is not None)
    verdicts = [_Judged(change.verdict) for row in rows for change in row.changes if change.verdict is not None]
    if gates and only_a:
        verdicts.append(_Judged("inconclusive"))
    return Comparison(
        a=ComparedRun(path=a.path, name=a.name, created=a.created, versions=a.versions),
        b=ComparedRun(path=b.path, name=b.name, created=b.created, versions=b.versions),
        metric=a.metric,
        gates=tuple(str(gate) for gate in gates),
        confidence=min(CONFIDENCE, max(0.0, math.floor(round(1000 * (1 - wrong), 6)) / 1000)),
        decisions=decisions,
        rows=rows,
        only_a=tuple(only_a),
        only_b=tuple(only_b),
        exit_status=exit_status(verdicts),
    )


def _refuse_strangers(rows: Sequence[ComparedRow], a: Side, b: Side) -> None:
    """Two runs of which nothing but a file's size can be compared are a wrong input."""
    changes = [change for row in rows for change in row.changes if change.quantity != "size"]
    refused = [change for change in changes if change.outcome == "refused"]
    if refused and all(change.outcome in ("refused", "not measured") for change in changes):
        reasons = dict.fromkeys(f"{change.title}: {change.reason}" for change in refused)
        raise InputError(
            "the two are not comparable",
            where=f"{a.path} and {b.path}",
            evidence="; ".join(reasons),
            fix="measure both on one device, with one runtime and the same settings and test data",
        )


class _Planned:
    """One row, before it is known over how many decisions the error probability is split."""

    def __init__(self, a: Figures, b: Figures, gates: dict[Quantity, Gate], side_a: Side, side_b: Side) -> None:
        self.a, self.b, self.gates = a, b, gates
        self.latency_unlike, self.unrecorded = unlike(latency_identity(a), latency_identity(b))
        self.data_unlike = _other_data(a, b, side_a, side_b)
        self.task = side_a.task
        self.metric_name = side_a.metric

    def decisions(self, only_gated: bool) -> int:
        """Intervals that decide something."""
        a, b = self.a, self.b
        there: dict[Quantity, bool] = {
            "latency": a.latency is not None and b.latency is not None and not self.latency_unlike,
            "metric": a.metric is not None and b.metric is not None and not self.data_unlike,
            "energy": _known(a.energy) and _known(b.energy) and not self.latency_unlike,
        }
        return sum(known for name, known in there.items() if not only_gated or name in self.gates)

    def changes(self, confidence: float) -> tuple[Change, ...]:
        """Every quantity that one of the two has, or that a gate asks for."""
        found = [
            self._latency(confidence),
            self._metric(confidence),
            self._plain("size", self.a.size_mib, self.b.size_mib, "", "exact"),
            self._memory(),
            self._energy(confidence),
        ]
        return tuple(
            change
            for change in found
            if change.outcome != "not measured" or {change.a, change.b} != {None} or change.quantity in self.gates
        )

    def notes(self) -> tuple[str, ...]:
        """What a reader must know beside the figures."""
        a, b = self.a, self.b
        said_a, said_b = ([*([each.error] if each.error else []), *each.warnings] for each in (a, b))
        notes = [f"A and B: {note}" for note in said_a if note in said_b]
        notes += [f"A: {note}" for note in said_a if note not in said_b]
        notes += [f"B: {note}" for note in said_b if note not in said_a]
        if a.latency is not None and b.latency is not None:
            if a.host and b.host and a.host != b.host:
                notes.append(f"measured on two machines of one kind: {a.host} and {b.host}")
            if self.unrecorded and not self.latency_unlike:
                notes.append(f"recorded in one of the two only: {', '.join(self.unrecorded)}")
            sizes = [list(each.latency.input_shapes.values()) for each in (a, b) if each.latency is not None]
            if all(sizes) and sizes[0] != sizes[1]:
                notes.append("the inputs differ in shape")
        if a.metric is not None and b.metric is not None and a.metric.on != b.metric.on:
            notes.append(f"metric of A: {a.metric.on}; of B: {b.metric.on}")
        return tuple(notes)

    def _latency(self, confidence: float) -> Change:
        a, b = self.a.latency, self.b.latency
        shown = a if a is not None else b
        title = percentile_title(shown.percentile) if shown is not None else "latency"
        points = (a.point if a is not None else None, b.point if b is not None else None)
        if a is None or b is None:
            return self._finish("latency", title, points, None)
        if self.latency_unlike:
            return self._finish("latency", title, points, None, refused="; ".join(self.latency_unlike))
        unsettled = [name for name, each in (("A", a), ("B", b)) if not each.stable]
        if unsettled:
            return self._finish(
                "latency", title, points, None, unknown=f"{' and '.join(unsettled)} never became stable"
            )
        interval = latency_interval(self.a, self.b, confidence)
        few = [f"{name} has {each.samples:,}" for name, each in (("A", a), ("B", b))]
        unknown = f"too few samples to bound {title} so surely: {', '.join(few)}" if interval.low is None else ""
        return self._finish("latency", title, points, interval, unknown=unknown)

    def _metric(self, confidence: float) -> Change:
        a, b, title = self.a.metric, self.b.metric, self.metric_name or "metric"
        values = (a.value if a is not None else None, b.value if b is not None else None)
        if a is None or b is None:
            return self._finish("metric", title, values, None)
        if self.data_unlike:
            return self._finish("metric", title, values, None, refused=self.data_unlike)
        interval = metric_interval(a, b, self.a.predictions, self.b.predictions, self.task, confidence)
        return self._finish("metric", title, values, interval)

    def _memory(self) -> Change:
        a, b = self.a, self.b
        values = (a.memory_mib, b.memory_mib)
        if None not in values and self.latency_unlike:
            return self._finish("memory", "memory", values, None, refused="; ".join(self.latency_unlike))
        if None not in values and a.memory_how != b.memory_how:
            how = f"read in two ways: {a.memory_how}; {b.memory_how}"
            return self._finish("memory", "memory", values, None, refused=how)
        tolerance = 0.0 if a.memory_mib is None else max(_MEMORY_MIB, _MEMORY_SHARE * a.memory_mib)
        how = f"one reading each; {tolerance:.2g} MiB is what readings of one file differ by"
        return self._plain("memory", *values, a.memory_how, how, tolerance)

    def _energy(self, confidence: float) -> Change:
        a, b = self.a.energy, self.b.energy
        values = (a.value if a is not None else None, b.value if b is not None else None)
        if a is None or b is None or not _known(a) or not _known(b):
            reason = next((each.how for each in (a, b) if each is not None and each.value is None), "")
            return self._finish("energy", "energy", values, None, missing=reason)
        unalike = [*self.latency_unlike, *([f"read from {a.how} and {b.how}"] if a.how != b.how else [])]
        if unalike:
            return self._finish("energy", "energy", values, None, refused="; ".join(unalike))
        interval = _independent(_of_energy(a, confidence), _of_energy(b, confidence), confidence, "both intervals")
        unknown = "no interval was recorded" if interval.low is None else ""
        return self._finish("energy", "energy", values, interval, unknown=unknown)

    def _plain(
        self, quantity: Quantity, a: float | None, b: float | None, missing: str, how: str, tolerance: float = 0.0
    ) -> Change:
        if a is None or b is None:
            return self._finish(quantity, quantity, (a, b), None, missing=missing)
        tolerance = tolerance if a != b else 0.0
        low, high = b - a - tolerance, b - a + tolerance
        shares = (low / a, high / a) if a else (None, None)
        return self._finish(quantity, quantity, (a, b), Interval(low, high, shares[0], shares[1], 1.0, how))

    def _finish(
        self,
        quantity: Quantity,
        title: str,
        values: tuple[float | None, float | None],
        interval: Interval | None,
        *,
        refused: str = "",
        unknown: str = "",
        missing: str = "",
    ) -> Change:
        """The change with its outcome and, where there is a gate, its verdict."""
        a, b = values
        gate = self.gates.get(quantity)
        known = interval is not None and interval.low is not None and interval.high is not None
        outcome: Outcome
        verdict: RowVerdict | None = None
        reason = refused or unknown
        if refused:
            outcome = "refused"
        elif interval is None and not unknown:
            outcome = "not measured"
            lacking = [name for name, value in (("A", a), ("B", b)) if value is None]
            reason = missing or f"not measured in {' and '.join(lacking)}"
        elif not known:
            outcome = "unknown"
        else:
            assert interval is not None
            outcome = _outcome(quantity, interval)
        if gate is not None and outcome == "not measured" and a is None and b is None:
            verdict = "not measured"
        elif gate is not None and not known:
            verdict = "inconclusive"
        elif gate is not None and interval is not None:
            ends = gate_ends(gate, interval)
            verdict = "inconclusive" if ends is None else gate.decide(*ends)
            if ends is None:
                reason = "A is 0, so a percentage of it says nothing"
        plain = interval is not None and interval.confidence == 1.0
        shown = a is not None and b is not None and not refused
        return Change(
            quantity=quantity,
            title=title,
            a=a,
            b=b,
            difference=b - a if shown and a is not None and b is not None else None,
            low=interval.low if interval is not None else None,
            high=interval.high if interval is not None else None,
            relative=b / a - 1 if shown and a and b is not None else None,
            relative_low=interval.relative_low if interval is not None else None,
            relative_high=interval.relative_high if interval is not None else None,
            confidence=None if interval is None or plain else interval.confidence,
            how=interval.how if interval is not None else "",
            outcome=outcome,
            reason=reason,
            gate=gate.limit if gate is not None else None,
            verdict=verdict,
        )


def gate_ends(gate: Gate, interval: Interval) -> tuple[float, float] | None:
    """The interval in the gate's unit; None where there is none."""
    if gate.relative:
        low, high = interval.relative_low, interval.relative_high
    else:
        scale = 100 if gate.quantity == "metric" else 1
        low = None if interval.low is None else interval.low * scale
        high = None if interval.high is None else interval.high * scale
    return None if low is None or high is None else (low, high)


def _outcome(quantity: Quantity, interval: Interval) -> Outcome:
    assert interval.low is not None
    assert interval.high is not None
    if interval.low == interval.high == 0:
        return "same"
    if interval.low <= 0 <= interval.high:
        return "noise"
    return "better" if (interval.low > 0) == higher_is_better(quantity) else "worse"


def latency_interval(a: Figures, b: Figures, confidence: float) -> Interval:
    """How much the asked percentile changed: from the bounds of both, so it holds for any distribution.

    Each end needs two bounds to hold at once, one of each run, so each bound may be wrong with a quarter of the error
    probability. Where the samples are stored, the bounds are made from them, with the dependence of neighbouring
    queries; else they are those of the reports, with the confidence that those have. The error is further split over
    the looks at which sampling could have ended, or, of stored bounds, adds up over them. What differs between two runs
    of one model on one machine, but not within either, is in no interval.
    """
    assert a.latency is not None
    assert b.latency is not None
    samples_a, samples_b = a.samples(), b.samples()
    if samples_a is not None and samples_b is not None:
        each = (1 - confidence) / 4
        bounds_a, bounds_b = (
            statistics.percentile_bounds(samples, a.latency.percentile, 1 - each / max(looks, 1))
            for samples, looks in ((samples_a, a.looks), (samples_b, b.looks))
        )
        how = f"order statistics of {len(samples_a):,} and {len(samples_b):,} samples"
    else:
        bounds_a, bounds_b = _stored_bounds(a.latency), _stored_bounds(b.latency)
        # as sure as the reports are, whatever was asked
        wrong = sum((1 - each.confidence) * each.planned_looks for each in (a.latency, b.latency))
        confidence = max(0.0, 1 - 2 * wrong)
        how = "the bounds of both"
    (low_a, high_a), (low_b, high_b) = bounds_a, bounds_b
    if low_a is None or high_a is None or low_b is None or high_b is None or low_a <= 0:
        return Interval(None, None, None, None, confidence, how)
    return Interval(low_b - high_a, high_b - low_a, low_b / high_a - 1, high_b / low_a - 1, confidence, how)


def _stored_bounds(latency: LatencyValue) -> tuple[float | None, float | None]:
    return latency.lower_bound, latency.upper_bound


def metric_interval(
    a: MetricValue, b: MetricValue, kept_a: Stored | None, kept_b: Stored | None, task: str, confidence: float
) -> Interval:
    """How much the metric changed: over the same samples where both runs kept their predictions, else from both
    intervals as if the samples were different ones, which is wider.
    """
    if kept_a is None or kept_b is None or not _same_samples(kept_a, kept_b):
        return _independent(_of_metric(a, confidence), _of_metric(b, confidence), confidence, "both intervals")
    n = len(kept_a.predictions.labels)
    first, second = kept_a.predictions, kept_b.predictions
    # one file may answer differently on two devices
    if kept_a.model_key == kept_b.model_key and np.array_equal(first.answers, second.answers):
        return Interval(0.0, 0.0, 0.0, 0.0, 1.0, "the same file and answers")
    if primary_metric(task) == "top1":
        right_a, right_b = first.answers == first.labels, second.answers == second.labels
        only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        low, high = statistics.paired_shares(only_a, only_b, n, confidence)
        how = f"paired on {n:,} samples: {only_a:,} right in A alone, {only_b:,} in B alone"
    else:
        found = difference(task, second.answers, first.answers, first.labels, first.mask, confidence=confidence)
        low, high = found.low, found.high
        how = f"paired bootstrap over {n:,} samples"
    return _interval(low, high, a.value, confidence, how)


def _same_samples(a: Stored, b: Stored) -> bool:
    return a.test_key == b.test_key and np.array_equal(a.predictions.labels, b.predictions.labels)


class _Spread(NamedTuple):
    """A value and how far its interval goes down and up; None where no interval is known."""

    value: float
    down: float | None
    up: float | None


def _of_metric(metric: MetricValue, confidence: float) -> _Spread:
    """At another confidence: anew for a share of right answers, else by the widths of a normal distribution."""
    if metric.method.startswith("Wilson"):
        low, high = statistics.wilson(round(metric.value * metric.n), metric.n, confidence)
        return _Spread(metric.value, metric.value - low, high - metric.value)
    scale = _widening(metric.confidence, confidence)
    return _Spread(metric.value, (metric.value - metric.low) * scale, (metric.high - metric.value) * scale)


def _of_energy(energy: EnergyValue, confidence: float) -> _Spread:
    assert energy.value is not None
    if energy.low is None or energy.high is None:
        return _Spread(energy.value, None, None)
    scale = _widening(energy.confidence, confidence)
    return _Spread(energy.value, (energy.value - energy.low) * scale, (energy.high - energy.value) * scale)


def _widening(stored: float, wanted: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf((1 + wanted) / 2) / normal.inv_cdf((1 + stored) / 2)


def _independent(a: _Spread, b: _Spread, confidence: float, how: str) -> Interval:
    """The difference of two independent estimates from their own intervals (Newcombe, 1998; Zou and Donner, 2008)."""
    if a.down is None or a.up is None or b.down is None or b.up is None:
        return Interval(None, None, None, None, confidence, how)
    value = b.value - a.value
    low, high = value - math.hypot(b.down, a.up), value + math.hypot(b.up, a.down)
    return _interval(low, high, a.value, confidence, how)


def _interval(low: float, high: float, base: float, confidence: float, how: str) -> Interval:
    """With the relative change, where the first figure is more than nothing."""
    if base <= 0:
        return Interval(low, high, None, None, confidence, how)
    return Interval(low, high, low / base, high / base, confidence, how)


def _known(energy: EnergyValue | None) -> bool:
    return energy is not None and energy.value is not None


def _other_data(a: Figures, b: Figures, side_a: Side, side_b: Side) -> str:
    """Why the metrics are of different things; empty where they are not, as far as the reports tell."""
    for title, first, second in (
        ("metric", side_a.metric, side_b.metric),
        ("task", side_a.task, side_b.task),
        ("split", a.split, b.split),
    ):
        if first != second:
            return f"other {title}: {first or 'none'} and {second or 'none'}"
    if a.split == "test" and side_a.test_key and side_b.test_key:
        return "" if side_a.test_key == side_b.test_key else "other test data"
    for title, ours, theirs in (("classes", side_a.labels, side_b.labels), ("data", side_a.data, side_b.data)):
        if ours != theirs:
            return f"other {title}"
    if a.metric is not None and b.metric is not None and a.metric.n != b.metric.n:
        return f"other {a.split} data: {a.metric.n:,} and {b.metric.n:,} samples"
    return ""
