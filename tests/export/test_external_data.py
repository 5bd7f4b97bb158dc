"""Weights that lie beside the graph: written from a size on, converted, parsed, measured, hashed and shipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import export.onnx
from cli.pipeline.bench import BenchOptions, bench_file
from export import Plan, parity, tensorrt, write_bundle
from export.onnx import data_file, is_large, write
from export.precision import Quantizer, quantization_for, to_bf16, to_fp16
from export.preflight.examine import examine
from profiles.artifact import verify
from profiles.errors import InputError
from profiles.opening import open_bundle, open_graph, stored_apart
from profiles.progress import Silent
from profiles.runtimes.onnxruntime import run_model
from tests.export.conftest import IMAGES, device_and_stack, plan_for
from tests.export.models import calibration


@pytest.fixture(scope="module", autouse=True)
def small_graphs_count_as_large() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.onnx, "LARGE_BYTES", 2048)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("large")


@pytest.fixture(scope="module")
def cpu(folder: Path) -> Plan:
    return plan_for("this-machine", folder, score=None, difference=None)


@pytest.fixture(scope="module")
def tensorrt_plan(folder: Path, cpu: Plan) -> Plan:
    return plan_for("rtx-4060-laptop", folder, score=None, difference=None, precisions=("fp32", "fp16", "int8"))


@pytest.fixture(scope="module")
def bundle(cpu: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    device, stack = device_and_stack("this-machine")
    place = tmp_path_factory.mktemp("bundles") / "large"
    return write_bundle(place, cpu, cpu["fp32"], name="large", device=device, stack=stack, golden=IMAGES[:1])


def test_every_precision_keeps_its_weights_beside_the_graph(cpu: Plan, tensorrt_plan: Plan) -> None:
    assert {entry.name for entry in (*cpu.usable, *tensorrt_plan.usable)} == {
        "fp32", "int8", "fp16", "int8-fp16", "int8-fp32",
    }  # fmt: skip
    for candidate in (*cpu.usable, *tensorrt_plan.usable):
        assert candidate.file is not None
        beside = data_file(candidate.file)
        assert {entry.place for entry in stored_apart(onnx.load(candidate.file, load_external_data=False))} == {
            beside.name
        }
        assert candidate.size_bytes == candidate.file.stat().st_size + beside.stat().st_size
        # the artefact knows the hashes of both, and holds nothing that was on the way
        files = set(verify(candidate.file.parent, "graph").files)
        scored = {"scored.onnx", "scored.onnx.data"} if candidate.scored_file else set()
        assert files == {"model.onnx", "model.onnx.data"} | scored


def test_rtx_reads_weights_beside_the_graph(tensorrt_plan: Plan) -> None:
    if tensorrt.load_adapter(rtx=True) is None:
        pytest.skip("tensorrt-rtx is not installed (extra tensorrt-rtx)")
    assert all(candidate.engine is not None for candidate in tensorrt_plan.usable)


def test_other_weights_are_another_candidate(cpu: Plan, tmp_path: Path) -> None:
    found = plan_for("this-machine", tmp_path, score=None, difference=None, precisions=("fp32",))
    assert found["fp32"].sha256 == cpu["fp32"].sha256
    file = found["fp32"].file
    assert file is not None
    content = bytearray(data_file(file).read_bytes())
    content[0] ^= 1
    data_file(file).write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx\.data changed after it was written"):
        plan_for("this-machine", tmp_path, score=None, difference=None, precisions=("fp32",))


def test_bundle_ships_and_hashes_all_files(bundle: Path) -> None:
    assert {"model.onnx", "model.onnx.data"} <= set(open_bundle(bundle).files)
    assert is_large(onnx.load(bundle / "model.onnx", load_external_data=False))


def test_runtime_and_check_read_them_and_bench_names_what_is_missing(bundle: Path, tmp_path: Path) -> None:
    options = BenchOptions.checked(
        device="this-machine", batch=1, threads=1, percentile=50, latency_ms=None, scope="end_to_end", seconds=0.1,
        shapes=(), sweep=False, strict=False,
    )  # fmt: skip
    device, stack = device_and_stack("this-machine")
    assert run_model(bundle / "model.onnx", {"image": IMAGES[:2]})["logits"].shape == (2, 4)
    assert not examine(bundle / "model.onnx", device, stack).refused
    shutil.copyfile(bundle / "model.onnx", tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r'external data "model\.onnx\.data" is missing') as caught:
        bench_file(tmp_path / "model.onnx", options, Silent())
    assert caught.value.fix == "copy model.onnx.data beside model.onnx, from where that came from"
    assert [found.rule for found in examine(tmp_path / "model.onnx", device, stack).findings if found.fix][:1] == [
        "external-data-missing"
    ]


def test_what_inspects_and_converts_a_graph_reads_them(cpu: Plan, tmp_path: Path) -> None:
    graph = cpu["fp32"].file
    assert graph is not None
    samples = {"image": IMAGES[:4]}
    expected = parity.run_session(parity.open_session(graph), samples, 4)
    to_bf16(graph, tmp_path / "bf16.onnx")
    parity.emulate_half(tmp_path / "bf16.onnx", tmp_path / "bf16.onnx", half=onnx.TensorProto.BFLOAT16)
    rounded = parity.run_session(parity.open_session(tmp_path / "bf16.onnx"), samples, 4)
    assert parity.relative_error(expected, rounded)[1] < 0.1
    to_fp16(graph, tmp_path / "fp16.onnx")
    assert data_file(tmp_path / "fp16.onnx").stat().st_size < data_file(graph).stat().st_size
    values = parity.graph_values(graph, samples)
    np.testing.assert_allclose(values["logits"], expected, rtol=1e-5, atol=1e-5)
    assert parity.first_divergence(values, graph, samples, 1e-3) is None


def test_a_model_stays_whole_when_it_is_written(cpu: Plan, tmp_path: Path) -> None:
    device, stack = device_and_stack("rtx-4060-laptop")
    graph = cpu["fp32"].file
    assert graph is not None
    quantizer = Quantizer(graph, {"image": calibration()[:16]}, quantization_for(device, stack), 99.9)
    quantizer.ranges("minmax")
    assert stored_apart(quantizer.prepared) == []
    for _ in range(2):  # written over itself, the data does not grow
        write(quantizer.prepared, tmp_path / "again.onnx")
    assert stored_apart(quantizer.prepared) == []
    assert data_file(tmp_path / "again.onnx").stat().st_size < 2 * data_file(graph).stat().st_size


@pytest.mark.slow
def test_a_graph_of_more_than_2_gib_is_checked_opened_and_run(tmp_path: Path) -> None:
    """A real file, sparse: only its last row is stored on the disk."""
    rows, width = 2**21, 288
    table = onnx.TensorProto(name="table", data_type=onnx.TensorProto.FLOAT, dims=[rows, width])
    table.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "table.data"), ("offset", "0"), ("length", str(4 * rows * width))):
        table.external_data.add(key=key, value=value)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "row"], ["logits"])],
        "large",
        [onnx.helper.make_tensor_value_info("row", onnx.TensorProto.INT64, ["n"])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", width])],
        [table],
    )
    path = tmp_path / "large.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    last = np.linspace(1, 7e4, width, dtype=np.float32)
    with (tmp_path / "table.data").open("wb") as file:
        file.truncate(4 * rows * width)
        file.seek(4 * (rows - 1) * width)
        file.write(last.tobytes())
    device, stack = device_and_stack("jetson-agx-orin")
    (stored,) = stored_apart(open_graph(path))
    assert stored.end > 2**31
    seen = examine(path, device, stack)
    assert seen.memory.weights > 2**31
    assert [entry.rule for entry in seen.findings if entry.rule.startswith(("weights", "fp16-over"))] == [
        "fp16-overflow"
    ]
    found = run_model(path, {"row": np.array([0, rows - 1])})["logits"]
    np.testing.assert_array_equal(found, [np.zeros(width), last])
