"""Limits become verdicts."""

from __future__ import annotations

import pytest

from cli.pipeline.limits import judge
from cli.pipeline.run import refuse_unquiet
from profiles.device import TargetSection
from profiles.errors import EdgestillError
from profiles.measurement import Energy, Latency, Measurement
from profiles.metrics import Difference, Metric


def metric(value: float, half: float = 0.01) -> Metric:
    return Metric(name="top1", value=value, low=value - half, high=value + half, n=2000, method="Wilson")


def drop(value: float, half: float = 0.002) -> Difference:
    return Difference(value=-value, low=-value - half, high=-value + half, n=2000, method="bootstrap")


def verdicts(
    section: TargetSection, *, value: float = 0.9, lost: float = 0.0, size: float = 1.0, on_device: bool = True
) -> dict[str, str]:
    found = judge(section, measurement=None, size_mib=size, metric=metric(value), drop=drop(lost), on_device=on_device)
    return {limit.name: limit.verdict for limit in found}


@pytest.mark.parametrize(("value", "expected"), [(0.90, "pass"), (0.855, "inconclusive"), (0.80, "fail")])
def test_a_floor_inside_the_interval_is_inconclusive(value: float, expected: str) -> None:
    assert verdicts(TargetSection(name="a", metric_floor=0.85), value=value) == {"metric_floor": expected}


@pytest.mark.parametrize(("lost", "expected"), [(0.0, "pass"), (0.0095, "inconclusive"), (0.02, "fail")])
def test_a_drop_is_judged_by_its_paired_interval(lost: float, expected: str) -> None:
    assert verdicts(TargetSection(name="a", max_metric_drop=0.01), lost=lost) == {"max_metric_drop": expected}


def test_what_onnx_runtime_computed_here_cannot_pass_a_limit_of_another_device() -> None:
    section = TargetSection(name="a", metric_floor=0.1, max_metric_drop=0.9, latency_ms=5, memory_mib=5)
    assert set(verdicts(section, on_device=False).values()) == {"not measured"}


@pytest.mark.parametrize(("size", "expected"), [(1.0, "pass"), (2.5, "fail")])
def test_a_file_size_is_known_without_the_device(size: float, expected: str) -> None:
    section = TargetSection(name="a", file_size_mib=2)
    assert verdicts(section, size=size, on_device=False) == {"file_size_mib": expected}


def latency(samples: list[float], *, stable: bool, verdict: str = "inconclusive") -> Measurement:
    clock = Latency(
        scope="end_to_end",
        samples=1000,
        mean=sum(samples) / len(samples),
        minimum=min(samples),
        maximum=max(samples),
        p50=None,
        p90=None,
        p95=None,
        p99=None,
        p99_9=None,
        percentile=99,
        value=max(samples),
        upper_bound=max(samples),
        lower_bound=min(samples),
        bound_confidence=0.99,
        outliers=0,
        lag1=None,
    )
    return Measurement.model_construct(
        end_to_end=clock,
        compute=clock,
        scope="end_to_end",
        stable=stable,
        verdict=verdict,
        warnings=("drifted",),
    )


@pytest.mark.parametrize(
    ("samples", "expected", "said"),
    [
        ([1.0, 2.0], "pass", "every run was within the limit"),
        ([11.0, 12.0], "fail", "every run was over the limit"),
        ([1.0, 12.0], "inconclusive", "drifted"),
    ],
)
def test_what_never_settled_is_judged_as_it_was_measured(samples: list[float], expected: str, said: str) -> None:
    (verdict,) = judge(
        TargetSection(name="a", latency_ms=10),
        measurement=latency(samples, stable=False, verdict=expected),
        size_mib=1,
        metric=None,
        drop=None,
        on_device=True,
    )
    assert verdict.verdict == expected
    assert said in verdict.reason


@pytest.mark.parametrize(
    ("millijoules", "expected"), [(9.0, "pass"), (10.0, "inconclusive"), (12.0, "fail"), (None, "not measured")]
)
def test_an_energy_limit_is_judged_by_its_interval(millijoules: float | None, expected: str) -> None:
    energy = Energy(millijoules=None, how="this machine tells no energy")
    if millijoules is not None:
        energy = Energy(millijoules=millijoules, low=millijoules - 0.5, high=millijoules + 0.5, how="RAPL package-0")
    (verdict,) = judge(
        TargetSection(name="a", energy_mj=10),
        measurement=latency([1.0], stable=True).model_copy(update={"energy": energy}),
        size_mib=1,
        metric=None,
        drop=None,
        on_device=True,
    )
    assert verdict.verdict == expected
    assert (verdict.reason == "this machine tells no energy") == (millijoules is None)


def test_strict_refuses_what_has_a_warning() -> None:
    refuse_unquiet([])
    with pytest.raises(EdgestillError, match="strict") as caught:
        refuse_unquiet([latency([1.0], stable=False)])
    assert caught.value.evidence == "drifted"


def test_a_target_without_limits_has_no_verdicts() -> None:
    assert verdicts(TargetSection(name="a")) == {}
