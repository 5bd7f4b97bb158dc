"""Every limit of a target becomes PASS, FAIL, INCONCLUSIVE or NOT MEASURED, with the interval that decided it."""

from __future__ import annotations

from typing import cast, get_args

from cli.report.schema import LimitName, LimitVerdict
from cli.report.verdict import Verdict
from distill.students.choose import Miss
from profiles.device import TargetSection
from profiles.measurement import Measurement
from profiles.metrics import Difference, Metric

NOT_HERE = "the device is not this machine, and nothing ran on it"
NOT_MADE = "no student was made for it"
HOW_KNOWN = {
    "measured": "measured with fresh weights",
    "calibrated": "predicted by the device's calibration",
    "assumed": "expected, by an assumed efficiency",
    "bound": "at least",
}
"""How a cost is known before anything is trained."""


def judge(
    section: TargetSection,
    *,
    measurement: Measurement | None,
    size_mib: float,
    metric: Metric | None,
    drop: Difference | None,
    on_device: bool,
) -> tuple[LimitVerdict, ...]:
    """The verdicts of the limits that the target sets, in the recipe's order.

    Args:
        section: the target's table.
        measurement: of the chosen artefact on the device; None where it did not run there.
        size_mib: the model file's size in MiB.
        metric: the artefact's metric on the test split, a fraction.
        drop: the artefact's metric minus the FP32 student's on the same samples.
        on_device: whether `metric` and `drop` come from the target's own runtime; what ONNX Runtime computed here can
            not pass a limit of another device.
    """
    verdicts: list[LimitVerdict] = []
    if section.latency_ms is not None:
        verdicts.append(_latency(section.latency_ms, measurement))
    if section.memory_mib is not None:
        peak = measurement.memory.peak_mib if measurement is not None else None
        reason = NOT_HERE if measurement is None else "" if peak is not None else measurement.memory.how
        if measurement is not None and peak is not None:
            reason = "; ".join(measurement.mismatches)
        verdicts.append(
            LimitVerdict(
                name="memory_mib",
                limit=section.memory_mib,
                value=peak,
                verdict=_memory(peak, section.memory_mib, measurement),
                reason=reason,
            )
        )
    if section.file_size_mib is not None:
        verdict: Verdict = "pass" if size_mib <= section.file_size_mib else "fail"
        verdicts.append(
            LimitVerdict(name="file_size_mib", limit=section.file_size_mib, value=size_mib, verdict=verdict)
        )
    if section.energy_mj is not None:
        verdicts.append(_energy(section.energy_mj, measurement))
    if section.metric_floor is not None:
        verdicts.append(_floor(section.metric_floor, metric, on_device))
    if section.max_metric_drop is not None:
        verdicts.append(_drop(section.max_metric_drop, drop, on_device))
    return tuple(verdicts)


def missed(section: TargetSection, miss: Miss) -> tuple[LimitVerdict, ...]:
    """The verdicts of limits that no member of a pool meets, by the one that comes nearest; nothing was trained.

    What an assumption alone excludes was not measured: it may be wrong by more than the excess.
    """
    over = {excess.limit: excess for excess in miss.excesses}
    verdicts = []
    for name in get_args(LimitName):
        limit = getattr(section, name)
        if name in over:
            source = over[name].source
            reason = f"{miss.option}, {HOW_KNOWN[source]}"
            verdict: Verdict = "fail"
            if source == "assumed":
                verdict, reason = "not measured", f"{miss.option} would exceed it, by an assumed efficiency"
            verdicts.append(
                LimitVerdict(name=name, limit=limit, value=over[name].needs, verdict=verdict, reason=reason)
            )
        elif limit is not None:
            verdicts.append(
                LimitVerdict(name=cast(LimitName, name), limit=limit, verdict="not measured", reason=NOT_MADE)
            )
    return tuple(verdicts)


def _memory(peak: float | None, limit: float, measurement: Measurement | None) -> Verdict:
    if peak is None:
        return "not measured"
    if measurement is not None and measurement.mismatches:
        return "inconclusive"
    return "pass" if peak <= limit else "fail"


def _latency(limit: float, measurement: Measurement | None) -> LimitVerdict:
    if measurement is None:
        return LimitVerdict(name="latency_ms", limit=limit, verdict="not measured", reason=NOT_HERE)
    asked = measurement.asked
    verdict: Verdict = measurement.verdict or "inconclusive"
    reason = ""
    if measurement.mismatches:
        verdict, reason = "inconclusive", "; ".join(measurement.mismatches)
    elif not measurement.stable:
        # The bounds suppose that samples come from one distribution. Where the latency moved that is not so, and the
        # measurement decided by what holds for every single sample.
        reason = f"unstable; every run was {'within' if verdict == 'pass' else 'over'} the limit"
        if verdict == "inconclusive":
            reason = "; ".join(measurement.warnings)
    elif verdict == "inconclusive":
        enough = asked.upper_bound is not None
        reason = "the limit lies inside the interval" if enough else "too few runs to bound this percentile"
        reason = f"{reason} after {asked.samples:,} runs"
    return LimitVerdict(
        name="latency_ms",
        limit=limit,
        value=asked.value,
        low=asked.lower_bound,
        high=asked.upper_bound,
        verdict=verdict,
        reason=reason,
    )


def _energy(limit: float, measurement: Measurement | None) -> LimitVerdict:
    energy = measurement.energy if measurement is not None else None
    if energy is None or energy.millijoules is None or energy.low is None or energy.high is None:
        reason = NOT_HERE if measurement is None else energy.how if energy is not None else "energy was not looked at"
        return LimitVerdict(name="energy_mj", limit=limit, verdict="not measured", reason=reason)
    verdict: Verdict = "pass" if energy.high <= limit else "fail" if energy.low > limit else "inconclusive"
    reason = "the limit lies inside the interval; raise measure.energy_seconds" if verdict == "inconclusive" else ""
    if measurement is not None and measurement.mismatches:
        verdict, reason = "inconclusive", "; ".join(measurement.mismatches)
    return LimitVerdict(
        name="energy_mj",
        limit=limit,
        value=energy.millijoules,
        low=energy.low,
        high=energy.high,
        verdict=verdict,
        reason=reason,
    )


def _floor(floor: float, metric: Metric | None, on_device: bool) -> LimitVerdict:
    if metric is None:
        return LimitVerdict(name="metric_floor", limit=floor, verdict="not measured", reason="no metric was computed")
    verdict: Verdict = "pass" if metric.low >= floor else "fail" if metric.high < floor else "inconclusive"
    reason = (
        "the floor lies inside the 95 % interval; more test samples would decide" if verdict == "inconclusive" else ""
    )
    if not on_device:
        verdict, reason = "not measured", "computed by ONNX Runtime here, not on the device"
    return LimitVerdict(
        name="metric_floor",
        limit=floor,
        value=metric.value,
        low=metric.low,
        high=metric.high,
        verdict=verdict,
        reason=reason,
    )


def _drop(limit: float, drop: Difference | None, on_device: bool) -> LimitVerdict:
    if drop is None:
        return LimitVerdict(
            name="max_metric_drop", limit=limit, verdict="not measured", reason="no metric was computed"
        )
    value, low, high = 0.0 - drop.value, 0.0 - drop.high, 0.0 - drop.low  # never -0.0
    verdict: Verdict = "pass" if high <= limit else "fail" if low > limit else "inconclusive"
    reason = (
        "the limit lies inside the 95 % interval; more test samples would decide" if verdict == "inconclusive" else ""
    )
    if not on_device:
        verdict, reason = "not measured", "computed by ONNX Runtime here, not on the device"
    return LimitVerdict(
        name="max_metric_drop", limit=limit, value=value, low=low, high=high, verdict=verdict, reason=reason
    )
