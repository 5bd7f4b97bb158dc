"""Which of a target's candidates is shipped: the fastest one that keeps the metric. Decided on validation data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from export.floor import Floor
from profiles.device import TargetSection
from profiles.metrics import Metric


class Faster(Protocol):
    """Milliseconds of one candidate minus another's, with the interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@dataclass(frozen=True)
class Option:
    """One candidate as the choice sees it. `expected_ms`: the device's roofline bound, None when a fact is missing."""

    name: str
    validation: Metric
    size_bytes: int
    expected_ms: float | None = None
    measured_ms: float | None = None


@dataclass(frozen=True)
class Choice:
    """`name` is shipped. `rejected` says why each other one is not; `why` says it in the order of the decision."""

    name: str
    rejected: dict[str, str]
    why: tuple[str, ...]


def choose(
    options: list[Option], section: TargetSection, fp32: Metric, differences: dict[tuple[str, str], Faster]
) -> Choice:
    """The fastest option that keeps the metric; FP32 when none does.

    Args:
        options: at least one.
        section: the target's limits; `metric_floor` and `max_metric_drop` decide what "keeps" means.
        fp32: metric of the FP32 candidate on the validation split.
        differences: (a, b) -> median milliseconds of a minus b, measured interleaved; empty where nothing ran.
    """
    rejected: dict[str, str] = {}
    keeping = []
    for option in options:
        problem = _loses_metric(option, section, fp32)
        if problem is None:
            keeping.append(option)
        else:
            rejected[option.name] = problem
    if not keeping:
        # then it is not the precision that misses it, so the graph that changes least is the one to look at
        most_accurate = max(options, key=lambda option: option.validation.value)
        best = next((option for option in options if option.name == "fp32"), most_accurate)
        rejected.pop(best.name)
        return Choice(best.name, rejected, (f"{best.name}: no precision reaches the metric that is asked for",))
    if any(option.measured_ms is not None for option in keeping):
        return _fastest_measured(keeping, rejected, differences)
    return _fastest_expected(keeping, rejected)


def floor_of(section: TargetSection) -> Floor:
    """What the target asks of the metric."""
    return Floor(metric_floor=section.metric_floor, max_metric_drop=section.max_metric_drop)


def _loses_metric(option: Option, section: TargetSection, fp32: Metric) -> str | None:
    value, points = option.validation.value, (option.validation.value - fp32.value) * 100
    if value >= floor_of(section).lowest(fp32.value):
        return None
    if section.metric_floor is not None and value < section.metric_floor:
        return f"{value:.1%} on validation, floor {section.metric_floor:.1%}"
    if section.max_metric_drop is not None:
        return f"{points:+.1f} pt against fp32 on validation, allowed {-section.max_metric_drop * 100:.1f}"
    return f"{points:+.1f} pt against fp32 on validation; less than 99 % of its {fp32.name} is kept"


def _fastest_measured(
    keeping: list[Option], rejected: dict[str, str], differences: dict[tuple[str, str], Faster]
) -> Choice:
    """Starts from the most accurate one; another takes its place only when it is faster beyond the noise."""
    rejected |= {option.name: "was not measured" for option in keeping if option.measured_ms is None}
    ranked = sorted(
        ((option, option.measured_ms) for option in keeping if option.measured_ms is not None),
        key=lambda entry: (-entry[0].validation.value, entry[0].size_bytes),
    )
    best, best_ms = ranked[0]
    why: list[str] = []
    for option, option_ms in ranked[1:]:
        difference = differences.get((option.name, best.name))
        # the difference is of the time in which both were sampled; when the medians of all samples point the other way,
        # the machine changed meanwhile, and nothing is known
        faster = difference is not None and difference.high < 0 and option_ms < best_ms
        slower = difference is not None and difference.low > 0 and option_ms > best_ms
        share = abs(difference.value) / best_ms if difference is not None else 0.0
        points = (option.validation.value - best.validation.value) * 100
        if faster:
            rejected[best.name] = f"{option.name} is {share:.0%} faster in the median and keeps the metric"
            why.append(
                f"{option.name}, not {best.name}: {share:.0%} faster in the median, {points:+.1f} pt on validation"
            )
            best, best_ms = option, option_ms
        else:
            found = f"{share:.0%} slower than {best.name} in the median" if slower else f"not faster than {best.name}"
            rejected[option.name] = found
            why.append(f"{best.name}, not {option.name}: {option.name} is {rejected[option.name]}")
    return Choice(best.name, rejected, tuple(why))


def _fastest_expected(keeping: list[Option], rejected: dict[str, str]) -> Choice:
    """Nothing ran on the device, so its peak figures decide; the smaller file where they are alike or not known."""
    known = all(option.expected_ms is not None for option in keeping)
    best = min(keeping, key=lambda option: ((option.expected_ms or 0.0) if known else 0.0, option.size_bytes))
    others = [option for option in keeping if option is not best]
    by = "by the device's peaks" if known else "by file size, as not all of the device's peaks are known"
    for option in others:
        rejected[option.name] = f"{best.name} was preferred {by}; nothing was measured"
    if not others:
        return Choice(best.name, rejected, ())
    reason = f"{best.name}, not {' or '.join(option.name for option in others)}: {by}, not measured"
    return Choice(best.name, rejected, (reason,))
