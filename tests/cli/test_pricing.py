"""What the members of a pool cost before anything is trained: on this machine, by its calibration, and on paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cli.pipeline import Run
from cli.pipeline.pricing import Figures, Pricing, Spread, cost_of
from cli.recipe import load_recipe
from distill.students.arch import parse_arch
from distill.students.choose import nearest_miss
from distill.students.pool import Limits
from profiles.calibration import PRIOR_EFFICIENCY
from profiles.device import TargetSection, detect
from profiles.errors import EdgestillError, InputError
from profiles.measure import describe
from profiles.measurement import Scope
from tests.cli.budget_cases import FITS_ALL, RATIOS, SMALL, WIDE, calibrate, make_data, target, write_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pricing")
    make_data(folder)
    return folder


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path / "config"))


def pricing_of(place: Path, folder: Path, targets: str, **changes: str) -> Pricing:
    run = Run(load_recipe(str(write_recipe(place, targets, **changes))), folder)  # type: ignore[arg-type]
    assert run.budgets is not None
    return run.budgets.pricing


# -- files for devices that are not attached --------------------------------------------------------------------------


def conv_file(file: Path, types: tuple[str, ...]) -> Path:
    """Convolutions of equal work one after the other: "int8" between roundings, "fp16" or "fp32" as they are."""
    nodes, constants, value = [], [], "x"
    for position, kind in enumerate(types):
        float_type = np.float32 if kind == "fp32" else np.float16
        weights = np.ones((64, 64, 3, 3), np.int8 if kind == "int8" else float_type)
        constants.append(numpy_helper.from_array(weights, f"w{position}"))
        read, filters = value, f"w{position}"
        if kind == "int8":
            constants.append(numpy_helper.from_array(np.array(0.1, np.float16), f"s{position}"))
            constants.append(numpy_helper.from_array(np.array(0, np.int8), f"z{position}"))
            scale = [f"s{position}", f"z{position}"]
            nodes.append(helper.make_node("QuantizeLinear", [value, *scale], [f"q{position}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{position}", *scale], [f"d{position}"]))
            nodes.append(helper.make_node("DequantizeLinear", [filters, *scale], [f"dw{position}"]))
            read, filters = f"d{position}", f"dw{position}"
        value = f"y{position}"
        nodes.append(helper.make_node("Conv", [read, filters], [value], pads=[1, 1, 1, 1]))
    graph_type = TensorProto.FLOAT if "fp32" in types else TensorProto.FLOAT16
    shape = ["batch", 64, 32, 32]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", graph_type, shape)],
        [helper.make_tensor_value_info(value, graph_type, shape)],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(file))
    return file


def test_a_file_that_is_int8_in_part_is_priced_node_by_node(place: Path, tmp_path: Path) -> None:
    pricing = pricing_of(place, tmp_path / "run", target("rtx", FITS_ALL, device="rtx-4060-laptop", precision="auto"))
    device = pricing.targets[0]
    bounds = {}
    for types in (("int8",) * 2, ("int8", "fp16"), ("fp16",) * 2):
        found = pricing.priced_file(device, parse_arch(SMALL), conv_file(tmp_path / "a.onnx", types), "int8")
        assert found is not None
        assert found.source == "assumed"
        assert found.latency_bound_ms is not None
        assert found.latency_ms is not None
        launches = 2 * pricing.overhead_ms(device)
        assert found.latency_ms == pytest.approx(found.latency_bound_ms / PRIOR_EFFICIENCY + launches)
        bounds[types] = found.latency_bound_ms
    whole, part, half = bounds.values()
    assert whole < part < half
    assert part == pytest.approx((whole + half) / 2)


def test_a_file_of_an_attached_target_is_for_the_measurement(place: Path, tmp_path: Path) -> None:
    pricing = pricing_of(place, tmp_path / "run", target("here", FITS_ALL))
    file = conv_file(tmp_path / "a.onnx", ("fp32",))
    assert pricing.priced_file(pricing.targets[0], parse_arch(WIDE), file, "fp32") is None


# -- by the calibration of this machine -------------------------------------------------------------------------------

POOL = '["conv-w4-d1-k3", "conv-w8-d1-k3", "conv-w12-d1-k3", "conv-w16-d1-k3", "conv-w20-d1-k3", "conv-w24-d1-k3"]'


def here(latency_ms: float, percentile: str = "99", more: str = "") -> str:
    return target("here", latency_ms, more=more).replace("percentile = 50", f"percentile = {percentile}")


def test_a_member_that_nobody_looked_at_is_never_the_nearest(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.pipeline.pricing._TOGETHER", 2)
    calibrate(detect().stacks[0].runtime_version)
    pricing = pricing_of(place, tmp_path / "run", here(0.006, "99.9"), pool=POOL)
    budgets = pricing.run.budgets
    assert budgets is not None
    fits, found = budgets.priced()
    rejected = found["here"]
    assert fits["here"] == ()
    assert [each.option.cost.is_cut_off for each in rejected] == [False] * 2 + [True] * 4
    seen, cut = rejected[:2], rejected[2:]
    most = max(each.option.cost.latency_ms or 0.0 for each in seen)
    assert {each.option.cost.latency_bound_ms for each in cut} == {most}, "as much as what it holds whole"
    miss = nearest_miss(rejected, Limits(latency_ms=0.006))
    assert miss is not None
    assert str(miss.option.arch) == SMALL
    assert any("no calibration tells p99.9" in note for note in pricing.run.notes)
    assert pricing.missing(budgets.pool) == 0


@pytest.mark.parametrize(
    ("percentile", "scope", "expected"),
    [(50, "end_to_end", 1.1), (99, "end_to_end", 1.5), (99.9, "end_to_end", 1.5), (95, "compute", 0.9 * 1.4)],
)
def test_every_percentile_and_clock_has_its_own_ratio(percentile: float, scope: Scope, expected: float) -> None:
    figures = Figures(
        precision="fp32",
        file_mib=1.0,
        memory_mib=None,
        bound_ms=None,
        predicted_ms={"end_to_end": 1.0, "compute": 0.9},
        ratios=RATIOS,
    )
    section = TargetSection(name="here", percentile=percentile, latency_scope=scope)
    cost = cost_of(figures, section, tail=9.0)
    assert (cost.latency_ms, cost.source) == (pytest.approx(expected), "calibrated")


@pytest.mark.parametrize(
    ("more", "recipe", "words"),
    [("batch = 4", "", "calibrated for batch 1, not 4"), ("", "threads = 2", "for 1 thread(s), not 2")],
)
def test_a_calibration_for_other_queries_is_told_and_not_used(
    place: Path, tmp_path: Path, more: str, recipe: str, words: str
) -> None:
    calibrate(detect().stacks[0].runtime_version)
    path = write_recipe(place, target("here", FITS_ALL, more=more))
    path.write_text(path.read_text().replace("[measure]", f"[measure]\n{recipe}"))
    run = Run(load_recipe(str(path)), tmp_path / "run")
    assert run.budgets is not None
    run.budgets.check_recipe()
    assert run.budgets.pricing.calibration(run.targets[0]) is None
    assert run.budgets.pricing.calibration(run.targets[0]) is None
    assert [words in note for note in run.notes] == [True]


def test_a_stale_calibration_names_its_file_and_what_replaces_it(place: Path, tmp_path: Path) -> None:
    calibrate("1.0.0")
    pricing = pricing_of(place, tmp_path / "run", target("here", FITS_ALL))
    with pytest.raises(InputError) as caught:
        pricing.calibration(pricing.targets[0])
    assert Path(caught.value.where or "").is_file()
    assert caught.value.fix == "edgestill devices calibrate, which replaces it"


# -- by measuring ------------------------------------------------------------------------------------------------------


def test_what_a_noisy_machine_measured_is_priced_again_by_the_next_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.pipeline.pricing._SECONDS", 0.05)
    monkeypatch.setattr("profiles.measure.warnings_of", lambda *_: ("the machine was busy",))
    archs = [parse_arch(SMALL)]
    first = pricing_of(place, tmp_path / "run", target("here", FITS_ALL))
    assert first.costs(archs)["here"][archs[0]]["fp32"].source == "measured"
    assert first.missing(archs) == 0, "within this run, it is known"
    assert any("prices them again" in note for note in first.run.notes)
    again = pricing_of(place, tmp_path / "run", target("here", FITS_ALL))
    assert again.missing(archs) == 1
    again.run.strict = True
    with pytest.raises(EdgestillError, match="--strict"):
        again.costs(archs)


def test_latencies_that_did_not_settle_exclude_by_their_fastest_query_alone() -> None:
    samples = [1_000_000] * 5 + [13_500_000] * 200
    seen = describe(samples, "compute", 99.0, 0.99)
    section = TargetSection(name="here", latency_ms=2.0, latency_scope="compute")

    def cost(*, settled: bool) -> float | None:
        spread = Spread.of(seen, settled=settled)
        figures = Figures(precision="fp32", file_mib=1, memory_mib=None, bound_ms=None, clocks={"compute": spread})
        return cost_of(figures, section, 1.0).latency_ms

    assert cost(settled=True) == pytest.approx(13.5)
    assert cost(settled=False) == pytest.approx(1.0)


# -- on paper ----------------------------------------------------------------------------------------------------------


def test_a_gpu_takes_a_launch_for_every_layer_and_no_calibration_tells_its_efficiency(
    place: Path, tmp_path: Path
) -> None:
    device = detect()
    calibrate(device.stacks[0].runtime_version, efficiency={"fp32": 0.25, "int8": 0.06})
    pricing = pricing_of(
        place,
        tmp_path / "run",
        target("rtx", FITS_ALL, device="rtx-4060-laptop") + target("pi", FITS_ALL, device="raspberry-pi-5"),
    )
    gpu, board = pricing.targets
    assert pricing.efficiency(gpu) == (PRIOR_EFFICIENCY, "a prior; no calibration tells a GPU's")
    assert pricing.efficiency(board) == (0.25, "what calibrated devices reach in FP32")
    assert pricing.efficiency(board, "int8")[0] == 0.06
    small, deep = (pricing.paper(parse_arch(word), gpu)["fp32"] for word in (SMALL, "conv-w4-d3-k3"))
    assert (small.latency_ms or 0) > 2 * pricing.overhead_ms(gpu)
    assert (deep.latency_ms or 0) >= (small.latency_ms or 0) + 2 * pricing.overhead_ms(gpu)
