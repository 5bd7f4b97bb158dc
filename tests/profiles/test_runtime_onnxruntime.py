from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from profiles import measure as m
from profiles.device import TargetSection
from profiles.errors import EdgestillError, InputError
from profiles.measure_section import MeasureSection
from profiles.runtimes import WallClock, available, get_runtime
from profiles.runtimes.onnxruntime import OnnxRuntimeSession, fixed_batch, random_inputs, run_model

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(4, 1, 3, 3)).astype(np.float32)
HEAD = RNG.normal(size=(4, 3)).astype(np.float32)


def save_model(
    path: Path, batch: int | str = "batch", *, opset: int = 20, height: int | str = 8, scale: float = 1.0
) -> Path:
    """uint8 image (batch, 1, height, 8) -> convolution, mean, head -> logits (batch, 3)."""
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "kernel"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["h"]),
        helper.make_node("Mul", ["h", "scale"], ["logits"]),
    ]
    constants = {"kernel": KERNEL, "head": HEAD, "scale": np.array(scale, np.float32)}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, 1, height, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), str(path))
    return path


def reference(images: Array) -> Array:
    windows = np.lib.stride_tricks.sliding_window_view(images.astype(np.float64)[:, 0], (3, 3), axis=(1, 2))
    means = np.einsum("nhwij,kij->nkhw", windows, KERNEL[:, 0]).mean((2, 3))
    return np.asarray(means @ HEAD)


def images(rows: int) -> Array:
    return np.random.default_rng(1).integers(0, 256, (rows, 1, 8, 8), dtype=np.uint8)


@pytest.mark.parametrize("batch", ["batch", 1, 4])
def test_all_rows_go_through_whatever_batch_the_graph_takes(tmp_path: Path, batch: int | str) -> None:
    x = images(11)
    found = run_model(save_model(tmp_path / "m.onnx", batch), {"image": x}, batch_size=5, threads=1)
    assert found["logits"].shape == (11, 3)
    np.testing.assert_allclose(found["logits"], reference(x), rtol=1e-4, atol=1e-3)


def test_a_query_gives_the_outputs_of_its_own_inputs_on_both_clocks(tmp_path: Path) -> None:
    session = OnnxRuntimeSession(save_model(tmp_path / "m.onnx"), 1)
    kept = []
    for rows in (1, 1, 3):  # another shape binds anew
        x = images(rows + 1)[1:]
        timed = session.query({"image": x}, WallClock())
        np.testing.assert_allclose(timed.outputs["logits"], reference(x), rtol=1e-4, atol=1e-3)
        assert 0 < timed.compute_ns < timed.end_to_end_ns
        kept.append((x, timed.outputs["logits"]))
    for x, logits in kept:
        # outputs belong to the host: a later query does not overwrite them
        np.testing.assert_allclose(logits, reference(x), rtol=1e-4, atol=1e-3)


def test_the_thread_count_is_recorded(tmp_path: Path) -> None:
    session = get_runtime("onnxruntime").load(save_model(tmp_path / "m.onnx"), threads=2)
    assert session.options["intra_op_threads"] == 2
    assert session.options["providers"] == ["CPUExecutionProvider"]


@pytest.mark.parametrize("content", [None, b"", b"hello\n", b"\x08\x0a\x12\x01"])
def test_what_is_no_model_is_an_input_error_that_names_the_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        run_model(path, {"image": images(1)})
    assert caught.value.where == str(path)


def test_a_truncated_model_is_an_input_error(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="damaged"):
        run_model(path, {"image": images(1)})


def test_a_model_that_this_runtime_cannot_load_names_file_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nobody.knows")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([node], "graph", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nobody.knows", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    with pytest.raises(EdgestillError) as caught:
        run_model(path, {"x": np.ones(1, np.float32)})
    assert caught.value.where == str(path)
    assert "nobody.knows" in str(caught.value.evidence)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"picture": images(1)}, "not those of the model"),
        ({"image": images(1).astype(np.float32)}, "float32, the model takes uint8"),
        ({"image": images(1)[:, :, :, :4]}, "another shape"),
        ({"image": images(1)[:0]}, "at least one"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_refused(
    tmp_path: Path, inputs: dict[str, Array], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_model(save_model(tmp_path / "m.onnx"), inputs)


def test_random_inputs_have_the_batch_and_types_of_the_graph(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx")
    found = random_inputs(path, 3)
    assert found["image"].shape == (3, 1, 8, 8)
    assert found["image"].dtype == np.uint8
    np.testing.assert_array_equal(found["image"], random_inputs(path, 3)["image"])
    run_model(path, found)


def test_random_inputs_want_a_shape_where_the_graph_leaves_it_open(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", height="height")
    with pytest.raises(InputError, match="dynamic dimension") as caught:
        random_inputs(path)
    assert "image:1x1x224x8" in str(caught.value.fix)
    assert random_inputs(path, shapes={"image": (2, 1, 5, 8)})["image"].shape == (2, 1, 5, 8)
    with pytest.raises(InputError, match="another shape"):
        random_inputs(path, shapes={"image": (2, 3, 5, 8)})
    with pytest.raises(InputError, match='no input "picture"'):
        random_inputs(path, shapes={"picture": (1,)})


def test_a_frozen_batch_is_found_and_held_to(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", 4)
    assert fixed_batch(OnnxRuntimeSession(path, 1).inputs) == 4
    with pytest.raises(InputError, match="batch 4 only"):
        random_inputs(path, 1)


def test_an_unknown_runtime_is_refused() -> None:
    assert {"onnxruntime", "openvino", "tensorrt", "torch"} <= set(available())
    with pytest.raises(InputError, match="cannot measure"):
        get_runtime("onnxrutime")


def test_a_model_is_measured_with_memory_and_load_time_of_a_fresh_process(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx")
    target = TargetSection(name="t", latency_ms=1000, percentile=90)
    section = MeasureSection(max_seconds=2, warmup_seconds=1)
    found = m.measure({"fp32": path}, {"image": images(20)}, target, section)["fp32"].measurement
    assert found.verdict == "pass"
    assert found.end_to_end.mean > found.compute.mean > 0
    assert found.load_ms is not None
    assert found.load_ms > 0
    assert found.first_inference_ms is not None
    assert found.memory.peak_mib is not None, found.memory.how
    # Python, NumPy and ONNX Runtime take some 50 MiB, torch alone 200
    assert 20 < found.memory.peak_mib < 150
    assert found.file_size_mib == path.stat().st_size / 2**20
    assert found.input_shapes == {"image": (1, 1, 8, 8)}
    assert found.environment["cores"] == os.cpu_count()
    assert found.runtime_version


def test_not_a_number_out_of_a_real_model_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx", scale=float("nan"))
    target = TargetSection(name="t")
    with pytest.raises(EdgestillError, match="not finite") as caught:
        m.measure({"fp32": path}, {"image": images(2)}, target, MeasureSection(), fresh_process=False)
    assert caught.value.where == str(path)


def test_an_fp16_graph_on_a_cpu_is_labelled_by_what_is_computed(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx")
    half = onnx.load(str(path))
    for tensor in half.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    half.graph.node[0].attribute[0].i = TensorProto.FLOAT16
    half.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(half, str(tmp_path / "half.onnx"))
    candidates = {"fp32": path, "fp16": tmp_path / "half.onnx"}
    section = MeasureSection(max_seconds=0.1, warmup_seconds=0.1)
    found = m.measure(candidates, {"image": images(2)}, TargetSection(name="t"), section, fresh_process=False)
    assert found["fp16"].measurement.graph_precision == "fp16"
    assert found["fp16"].measurement.compute_precision == "fp32 (fp16 graph on a CPU)"
    assert found["fp32"].measurement.compute_precision == "fp32"


def test_external_data_counts_in_size_and_hash(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx")
    before = m.model_hash(path)
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="m.data", size_threshold=0)
    assert m.model_files(path) == [path, tmp_path / "m.data"]
    inside = m.model_hash(path)
    data = bytearray((tmp_path / "m.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "m.data").write_bytes(data)
    assert len({before, inside, m.model_hash(path)}) == 3


def test_the_fresh_process_ignores_a_profiles_folder_of_the_users(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m.onnx")
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "__init__.py").write_text("raise SystemExit('hijacked')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nimport numpy as np\nfrom profiles.fresh_process import probe\n"
        f"found = probe('onnxruntime', Path({str(path)!r}), {{'image': np.zeros((1, 1, 8, 8), np.uint8)}}, 1)\n"
        "print(found.memory.how)\nassert found.load_ms is not None\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


def test_importing_the_light_modules_does_not_import_a_runtime() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import profiles.measurement, profiles.measure_section, profiles.runtimes\n"
        "assert not {'numpy', 'onnxruntime', 'onnx', 'scipy', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
