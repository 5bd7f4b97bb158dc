"""Fits of known truths, what makes a calibration stale, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.calibration import (
    LAYERS,
    Calibration,
    Observation,
    Times,
    assumed_efficiency,
    busy,
    calibrations_folder,
    find_calibration,
    fit,
    fit_times,
    graph_milliseconds,
    held_out,
    launch_overhead_ms,
    node_microseconds,
    observe,
    predict,
    save_calibration,
    stale,
    usable,
)
from profiles.device import detect, load_device
from profiles.errors import InputError
from profiles.runtimes.onnxruntime import random_inputs
from profiles.timing_model import PricedNode
from tests.profiles.test_measure import COPY_NS, MS, Latency, SyntheticClock, SyntheticRuntime
from tests.profiles.test_timing_model import conv_model

TRUE = {"conv": {"nodes": 2.0, "products": 1e-3, "bytes": 4e-4}, "gemm": {"nodes": 1.0, "products": 5e-4}}
"""Microseconds under the profiler."""
QUERY, NODE, CONSTANT, WORK = 12.0, 0.5, 0.4, 0.9
"""Of a plain run: per query and node, and the shares of the profiled constants and work."""


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path / "config"))


def node(kind: str, *, timed: bool = True, **work: float) -> PricedNode:
    quantities = {"nodes": 1.0, **work}
    time = sum(TRUE.get(kind, {}).get(name, 0.0) * value for name, value in quantities.items())
    return PricedNode(
        kind=kind,
        operator=kind.title(),
        work=quantities,
        moved=100.0 + work.get("bytes", 0.0),
        microseconds=time if timed and time else None,
    )


def observation(
    name: str, seed: int, *, precision: str = "fp32", family: str = "conv", spread: float = 0.01
) -> Observation:
    draw = np.random.default_rng(seed)
    nodes = [
        node("conv", products=float(draw.integers(1e3, 1e5)), bytes=float(draw.integers(1e3, 1e5)))
        for _ in range(draw.integers(2, 9))
    ]
    nodes += [node("gemm", products=float(draw.integers(1e3, 1e5))) for _ in range(draw.integers(1, 6))]
    constant = sum(TRUE[one.kind]["nodes"] for one in nodes)
    work = sum((one.microseconds or 0.0) for one in nodes) - constant
    p50 = (QUERY + NODE * len(nodes) + CONSTANT * constant + WORK * work) / 1e3
    weights, activations = float(draw.uniform(0, 9)), float(draw.uniform(0, 3))
    return Observation.model_validate(
        {
            "model": name,
            "family": family,
            "precision": precision,
            "nodes": nodes,
            "p50_ms": p50,
            "whole_ms": {
                "end_to_end": {"50": p50 * 1.1, "90": p50 * 1.15, "99": p50 * 1.2},
                "compute": {"50": (p50 - 0.004) * 1.3},
            },
            "compute_p50_ms": p50 - 0.004,
            "spread": spread,
            "weight_mib": weights,
            "activation_mib": activations,
            "file_mib": weights,
            "peak_mib": 60 + 2 * weights + activations,
        }
    )


@pytest.fixture
def observations() -> list[Observation]:
    return [
        observation(f"arch-{seed}", seed + 100 * (precision == "int8"), precision=precision)
        for seed in range(14)
        for precision in ("fp32", "int8")
    ]


@pytest.fixture
def calibration(observations: list[Observation]) -> Calibration:
    device = detect()
    return fit(observations, device=device, stack=device.stacks[0], threads=1, efficiency={"fp32": 0.2, "int8": 0.06})


def test_known_times_are_recovered(observations: list[Observation]) -> None:
    times = fit_times([one for one in observations if one.precision == "fp32"])
    assert times.kinds["conv"]["products"] == pytest.approx(WORK * TRUE["conv"]["products"], rel=1e-3)
    assert times.kinds["conv"]["bytes"] == pytest.approx(WORK * TRUE["conv"]["bytes"], rel=1e-3)
    assert times.kinds["gemm"]["products"] == pytest.approx(WORK * TRUE["gemm"]["products"], rel=1e-3)
    unseen = observation("unseen", 999)
    assert graph_milliseconds(unseen.nodes, times) == pytest.approx(unseen.p50_ms, rel=1e-3)


def test_a_few_interrupted_models_do_not_move_the_fit(observations: list[Observation]) -> None:
    found = [one for one in observations if one.precision == "fp32"]
    found[3] = found[3].model_copy(update={"p50_ms": 3 * found[3].p50_ms})
    unseen = observation("unseen", 999)
    assert graph_milliseconds(unseen.nodes, fit_times(found)) == pytest.approx(unseen.p50_ms, rel=0.05)


def test_no_architecture_is_predicted_by_a_fit_that_saw_it() -> None:
    found = [observation(f"arch-{seed}", seed) for seed in range(6)]
    # its own measurement would pull the prediction up; the others know nothing of it
    slow = found[0].model_copy(update={"p50_ms": 2 * found[0].p50_ms})
    predicted, measured = held_out([slow, *found[1:]], folds=6)
    position = int(np.argmax(measured == slow.p50_ms))
    assert predicted[position] == pytest.approx(found[0].p50_ms, rel=0.01)


def test_layers_are_in_every_fit_and_never_held_out(observations: list[Observation]) -> None:
    layers = [
        one.model_copy(update={"family": LAYERS, "model": f"layers {i}"}) for i, one in enumerate(observations[:4])
    ]
    predicted, _ = held_out([*observations[:8:2], *layers])
    assert len(predicted) == 4


def test_the_calibration_tells_its_errors_and_how_it_was_made(calibration: Calibration) -> None:
    assert set(calibration.held_out) == {"fp32", "int8"}
    assert all(entry.models == 14 and entry.median_error < 0.01 for entry in calibration.held_out.values())
    assert calibration.held_out["fp32"].rank_correlation == pytest.approx(1)
    assert calibration.ratios["end_to_end"] == pytest.approx({"50": 1.1, "90": 1.15, "99": 1.2})
    assert calibration.ratios["compute"] == pytest.approx({"50": 1.3})
    assert calibration.copying_ms == pytest.approx(0.004)
    assert calibration.memory["process"] == pytest.approx(60, rel=1e-3)
    assert calibration.versions["onnxruntime"] == calibration.runtime_version


def test_a_fit_needs_timed_nodes_and_two_architectures() -> None:
    one = observation("a", 1)
    with pytest.raises(ValueError, match="timed"):
        fit_times([one.model_copy(update={"nodes": (node("conv", timed=False, products=1.0),)})])
    with pytest.raises(ValueError, match="two architectures"):
        held_out([one])


work = st.fixed_dictionaries({"products": st.floats(0, 1e9), "bytes": st.floats(0, 1e9)})


@given(
    first=st.lists(work, max_size=5), second=st.lists(work, max_size=5), kind=st.sampled_from(("conv", "never seen"))
)
def test_prices_are_additive_and_never_negative(
    first: list[dict[str, float]], second: list[dict[str, float]], kind: str
) -> None:
    times = Times(query=3.0, kinds=TRUE, other={"nodes": 1.0, "bytes": 1e-4})
    a, b = ([node(kind, timed=False, **entry) for entry in part] for part in (first, second))
    assert all(node_microseconds(one, times) >= 0 for one in a)
    apart = graph_milliseconds(a, times) + graph_milliseconds(b, times) - times.query / 1e3
    assert graph_milliseconds([*a, *b], times) == pytest.approx(apart)


@given(small=work, factor=st.floats(1, 100))
def test_more_work_never_costs_less(small: dict[str, float], factor: float) -> None:
    times = Times(query=3.0, kinds=TRUE, other={"nodes": 1.0, "bytes": 1e-4})
    large = {name: factor * value for name, value in small.items()}
    less, more = (node_microseconds(node("conv", timed=False, **entry), times) for entry in (small, large))
    assert less <= more


def test_a_busy_machine_is_told_with_its_numbers() -> None:
    quiet = [observation(str(seed), seed, spread=0.02) for seed in range(9)]
    assert busy(quiet) is None
    assert busy([*quiet[:4], *(one.model_copy(update={"spread": 0.4}) for one in quiet[4:])]) is not None
    reason = busy([one.model_copy(update={"spread": 0.4}) for one in quiet])
    assert reason is not None
    assert "40%" in reason
    assert "10%" in reason
    slowed = busy([one.model_copy(update={"undisturbed": 0.05}) for one in quiet])
    assert slowed is not None
    assert "95%" in slowed


def test_what_is_stored_is_found_again(calibration: Calibration) -> None:
    device = detect()
    stack = device.stacks[0]
    assert find_calibration(device, stack, threads=1) is None
    place = save_calibration(calibration)
    assert place.parent == calibrations_folder()
    found = find_calibration(device, stack, threads=1)
    assert found == calibration
    assert stale(calibration, device, stack, 1) is None
    assert usable(calibration, device, stack, 1) is calibration
    assert find_calibration(load_device("raspberry-pi-5"), stack, threads=1) is None


def test_a_damaged_file_is_as_if_it_were_not_there(calibration: Calibration) -> None:
    device = detect()
    save_calibration(calibration).write_text("{", encoding="utf-8")
    assert find_calibration(device, device.stacks[0], threads=1) is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("runtime_version", "1.0.0", "onnxruntime version: calibrated with 1.0.0"),
        ("processor", "another, 8 cores", "processor: calibrated with another"),
        ("threads", 4, "number of threads: calibrated with 4, now 1"),
        ("form", 0, "rules by which work is counted: calibrated with form 0"),
    ],
)
def test_another_stack_is_refused_with_the_reason(
    calibration: Calibration, field: str, value: str | int, words: str
) -> None:
    device = detect()
    other = calibration.model_copy(update={field: value})
    place = save_calibration(other)
    found = find_calibration(device, device.stacks[0], threads=1)
    assert found == other, "it is told that it is stale, not that there is none"
    with pytest.raises(InputError, match="out of date") as caught:
        usable(other, device, device.stacks[0], 1)
    assert words in (caught.value.evidence or "")
    assert caught.value.where == str(place)
    assert caught.value.fix == "edgestill devices calibrate, which replaces it"


def test_the_calibration_of_the_same_threads_is_preferred(calibration: Calibration) -> None:
    device = detect()
    save_calibration(calibration.model_copy(update={"threads": 2}))
    save_calibration(calibration)
    found = find_calibration(device, device.stacks[0], threads=2)
    assert found is not None
    assert found.threads == 2


def test_a_graph_is_predicted_and_what_is_guessed_is_named(tmp_path: Path, calibration: Calibration) -> None:
    model = conv_model(tmp_path)
    found = predict(model, calibration, precision="fp32")
    assert 0 < found.overhead_ms < found.p50_ms
    assert found.p99_ms == pytest.approx(1.2 * found.p50_ms)
    assert found.compute_ms < found.p50_ms
    assert found.memory_mib is not None
    assert found.memory_mib > 59
    assert "Conv" in found.guessed, "the made-up calibration has other classes than the runtime"
    assert predict(model, calibration, precision="fp32", batch=64).p50_ms > found.p50_ms


def test_a_precision_that_was_not_calibrated_is_refused(tmp_path: Path, calibration: Calibration) -> None:
    single = calibration.model_copy(update={"times": {"fp32": calibration.times["fp32"]}})
    with pytest.raises(InputError, match="no INT8"):
        predict(conv_model(tmp_path), single, precision="int8")


def test_overhead_and_efficiency_come_from_calibrations_or_are_stated(calibration: Calibration) -> None:
    assert launch_overhead_ms(detect(), calibration) == pytest.approx(QUERY / 1e3, rel=0.05)
    assert launch_overhead_ms(load_device("rtx-4060-laptop"), None) > launch_overhead_ms(detect(), None) > 0
    assert assumed_efficiency("fp32") is None
    save_calibration(calibration)
    assert (assumed_efficiency("fp32"), assumed_efficiency("int8")) == (0.2, 0.06)


def test_a_calibration_that_is_out_of_date_tells_no_efficiency(calibration: Calibration) -> None:
    save_calibration(calibration.model_copy(update={"runtime_version": "1.0.0"}))
    assert assumed_efficiency("fp32") is None


def test_models_are_measured_in_turns(tmp_path: Path) -> None:
    files = {}
    for name, side in (("small", 5), ("large", 17)):
        (tmp_path / name).mkdir()
        files[name] = conv_model(tmp_path / name, side=side)
    inputs = {name: random_inputs(file, 4) for name, file in files.items()}
    found = observe(files, inputs, threads=1, seconds=1.0, queries=32)
    assert all(entry["samples"] in (32, 64, 96, 128) for entry in found.values()), "again where the core was disturbed"
    assert all("99" not in entry["whole_ms"]["end_to_end"] for entry in found.values()), "so few queries tell no p99"
    assert all(0 < entry["compute_p50_ms"] <= entry["p50_ms"] for entry in found.values())


FAST_AND_SLOW = {"fast": 0.3, "slow": 0.9}
"""Milliseconds of a query on an undisturbed core."""


class SharedCore(SyntheticClock):
    """A core whose other thread takes half of its speed for 7 of every `period` milliseconds; telling the time takes 5
    microseconds."""

    def __init__(self, period: float) -> None:
        super().__init__()
        self.period = period

    def slow(self) -> float:
        return 2.0 if self.ns / 1e6 % self.period < 7 else 1.0

    def now(self) -> int:
        self.ns += int(5000 * self.slow())
        return self.ns


@pytest.mark.parametrize(("period", "share"), [(10.0, 0.4), (70.0, 0.9), (20.0, 0.65)])
def test_medians_are_those_of_the_queries_during_which_the_core_was_undisturbed(period: float, share: float) -> None:
    clock = SharedCore(period)

    def latency(ms: float) -> Latency:
        return lambda index, now: ms * MS * clock.slow()

    runtime = SyntheticRuntime({name: latency(ms) for name, ms in FAST_AND_SLOW.items()})
    found = observe(
        {name: Path(f"{name}.onnx") for name in FAST_AND_SLOW},
        {name: {"image": np.zeros((4, 2), np.uint8)} for name in FAST_AND_SLOW},
        threads=1,
        runtime=runtime,
        clock=clock,
    )
    for name, ms in FAST_AND_SLOW.items():
        assert found[name]["p50_ms"] == pytest.approx(ms + COPY_NS / MS, abs=1e-6)
        assert found[name]["undisturbed"] == pytest.approx(share, abs=0.2)
        assert found[name]["spread"] == 0
    if share < 0.5:
        assert all(entry["whole_ms"]["end_to_end"]["50"] > 1.2 * entry["p50_ms"] for entry in found.values())


def test_measuring_ends_at_its_deadline_with_every_model_measured() -> None:
    clock = SharedCore(7.5)  # hardly ever undisturbed, so that every pass would be wanted
    runtime = SyntheticRuntime({"a": lambda index, now: 30 * MS, "b": lambda index, now: 30 * MS})
    began = clock.now()
    found = observe(
        {name: Path(f"{name}.onnx") for name in "ab"},
        {name: {"image": np.zeros((4, 2), np.uint8)} for name in "ab"},
        threads=1,
        seconds=4.0,
        most_seconds=3.0,
        runtime=runtime,
        clock=clock,
    )
    assert (clock.now() - began) / 1e9 < 4.0
    assert all(entry["samples"] > 8 for entry in found.values())


def test_medians_of_long_queries_lie_between_those_of_an_undisturbed_core_and_of_all_queries() -> None:
    clock, milliseconds = SharedCore(30.0), 20.0

    def latency(index: int, now: int) -> float:
        left, at = milliseconds, now / 1e6
        while left > 0:  # phase by phase: half the speed for 7 of every 30 milliseconds
            place = at % 30
            end, speed = (7.0, 0.5) if place < 7 else (30.0, 1.0)
            step = min(left / speed, end - place)
            left, at = left - step * speed, at + max(step, 1e-6)
        return (at - now / 1e6) * MS

    found = observe(
        {"long": Path("long.onnx")},
        {"long": {"image": np.zeros((4, 2), np.uint8)}},
        threads=1,
        runtime=SyntheticRuntime({"long": latency}),
        clock=clock,
    )["long"]
    assert milliseconds <= found["p50_ms"] <= found["whole_ms"]["end_to_end"]["50"] + 1e-6
