"""Which precision is shipped."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cli.pipeline.choose import Option, choose
from profiles.device import TargetSection
from profiles.metrics import Metric


@dataclass(frozen=True)
class Gap:
    value: float
    low: float
    high: float


def metric(value: float) -> Metric:
    return Metric(name="top1", value=value, low=value - 0.01, high=value + 0.01, n=2000, method="Wilson")


def option(
    name: str, value: float, *, measured: float | None = None, expected: float | None = None, size: int = 1
) -> Option:
    return Option(name, metric(value), size, expected_ms=expected, measured_ms=measured)


ANY = TargetSection(name="a")
FP32 = metric(0.90)


def test_the_faster_one_that_keeps_the_metric_is_chosen() -> None:
    options = [option("fp32", 0.90, measured=1.0), option("int8", 0.895, measured=0.6)]
    choice = choose(options, ANY, FP32, {("int8", "fp32"): Gap(-0.4, -0.41, -0.39)})
    assert choice.name == "int8"
    assert "40% faster" in choice.why[0]
    assert "fp32" in choice.rejected


def test_int8_that_is_slower_is_not_chosen_and_that_is_said() -> None:
    options = [option("fp32", 0.90, measured=1.0), option("int8", 0.90, measured=1.3, size=2)]
    choice = choose(options, ANY, FP32, {("int8", "fp32"): Gap(0.3, 0.2, 0.4)})
    assert choice.name == "fp32"
    assert "30% slower" in choice.rejected["int8"]


def test_a_gain_within_the_noise_does_not_cost_accuracy() -> None:
    options = [option("fp32", 0.90, measured=1.0), option("int8", 0.895, measured=0.98)]
    assert choose(options, ANY, FP32, {("int8", "fp32"): Gap(-0.02, -0.05, 0.01)}).name == "fp32"


@pytest.mark.parametrize("gap", [Gap(-0.02, -0.03, -0.01), Gap(0.02, 0.01, 0.03)])
def test_a_difference_that_all_samples_contradict_decides_nothing(gap: Gap) -> None:
    slower_over_all = gap.value < 0
    int8 = option("int8", 0.895, measured=1.14 if slower_over_all else 0.88)
    choice = choose([option("fp32", 0.90, measured=1.0), int8], ANY, FP32, {("int8", "fp32"): gap})
    assert choice.name == "fp32"
    assert choice.rejected["int8"] == "not faster than fp32"


def test_how_much_faster_is_said_by_what_was_measured_interleaved() -> None:
    options = [option("fp32", 0.90, measured=1.0), option("int8", 0.895, measured=0.6)]
    choice = choose(options, ANY, FP32, {("int8", "fp32"): Gap(-0.3, -0.31, -0.29)})
    assert "30% faster" in choice.why[0]


def test_without_a_floor_one_hundredth_of_the_metric_may_be_lost() -> None:
    gap = {("int8", "fp32"): Gap(-0.5, -0.6, -0.4)}
    collapsed = [option("fp32", 0.90, measured=1.0), option("int8", 0.88, measured=0.5)]
    choice = choose(collapsed, ANY, FP32, gap)
    assert choice.name == "fp32"
    assert "99 %" in choice.rejected["int8"]


@pytest.mark.parametrize(
    ("limits", "name"),
    [({"metric_floor": 0.85}, "int8"), ({"max_metric_drop": 0.01}, "fp32"), ({"max_metric_drop": 0.05}, "int8")],
)
def test_the_targets_own_limits_decide_what_keeping_means(limits: dict[str, float], name: str) -> None:
    options = [option("fp32", 0.90, measured=1.0), option("int8", 0.87, measured=0.5)]
    section = TargetSection(name="a", **limits)  # type: ignore[arg-type]
    assert choose(options, section, FP32, {("int8", "fp32"): Gap(-0.5, -0.6, -0.4)}).name == name


def test_when_nothing_keeps_the_metric_fp32_is_shipped_and_fails_its_limit() -> None:
    options = [option("fp32", 0.90, measured=0.5), option("int8", 0.91, measured=0.9)]
    choice = choose(options, TargetSection(name="a", metric_floor=0.95), FP32, {})
    assert choice.name == "fp32"
    assert "no precision reaches the metric" in choice.why[0]


def test_what_was_not_measured_is_not_shipped_before_what_was() -> None:
    options = [option("fp32", 0.90), option("int8", 0.895, measured=0.6)]
    choice = choose(options, ANY, FP32, {})
    assert choice.name == "int8"
    assert choice.rejected == {"fp32": "was not measured"}


def test_a_peak_that_is_not_known_is_not_the_fastest() -> None:
    options = [
        option("fp32", 0.90, expected=1.0, size=3),
        option("fp16", 0.90, expected=0.3),
        option("int8", 0.90, size=2),
    ]
    choice = choose(options, ANY, FP32, {})
    assert choice.name == "fp16"
    assert "not all of the device's peaks are known" in choice.why[0]


def test_where_nothing_ran_the_lower_bound_decides_and_is_called_what_it_is() -> None:
    options = [
        option("fp32", 0.90, expected=1.0),
        option("fp16", 0.90, expected=0.3),
        option("int8", 0.90, expected=0.2),
    ]
    choice = choose(options, ANY, FP32, {})
    assert choice.name == "int8"
    assert "not measured" in choice.why[0]
