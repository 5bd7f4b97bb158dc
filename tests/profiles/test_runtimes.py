"""The runtimes beside ONNX Runtime's CPU provider: what runs here gives the same numbers, what does not says why."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from profiles import measure as m
from profiles.device import TargetSection
from profiles.errors import EdgestillError, InputError
from profiles.measure_section import MeasureSection
from profiles.runtimes import (
    RuntimeOptions,
    WallClock,
    available,
    get_runtime,
    has_nvidia_gpu,
    providers,
    run_error,
    tensorrt,
    usable,
)
from tests.profiles.test_runtime_onnxruntime import images, reference, save_model

no_gpu = pytest.mark.skipif(has_nvidia_gpu(), reason="what a machine without a GPU says")
needs_openvino = pytest.mark.skipif(not usable("openvino").ok, reason=usable("openvino").found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "m.onnx")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    path = tmp_path_factory.mktemp("programs") / "m.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(1, 1, 8, 8),)), str(path))
    return path


@needs_openvino
def test_openvino_gives_the_numbers_and_the_names_of_the_file(model: Path) -> None:
    session = get_runtime("openvino").load(model, threads=1)
    assert [spec.name for spec in session.outputs] == ["logits"]
    kept = []
    for rows in (1, 1, 3):
        x = images(rows + 1)[1:]
        timed = session.query({"image": x}, WallClock())
        np.testing.assert_allclose(timed.outputs["logits"], reference(x), rtol=1e-4, atol=1e-3)
        assert 0 < timed.compute_ns < timed.end_to_end_ns
        kept.append((x, timed.outputs["logits"]))
    for x, logits in kept:
        np.testing.assert_allclose(logits, reference(x), rtol=1e-4, atol=1e-3)
    assert session.options["intra_op_threads"] == 1
    session.close()


@needs_openvino
def test_openvino_refuses_what_is_no_model_and_inputs_that_changed_their_name(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"hello")
    with pytest.raises(InputError, match="not a model") as caught:
        get_runtime("openvino").load(broken, threads=1)
    assert caught.value.where == str(broken)
    with pytest.raises(InputError, match="not those of the model") as caught:
        get_runtime("openvino").load(model, threads=1).query({"picture": images(1)}, WallClock())
    assert "given: picture; the model takes: image" in str(caught.value.evidence)


@needs_openvino
def test_a_model_is_measured_in_openvino(model: Path) -> None:
    found = m.measure(
        {"fp32": model},
        {"image": images(4)},
        TargetSection(name="t", percentile=50),
        MeasureSection(max_seconds=0.2, warmup_seconds=0.2),
        runtime=get_runtime("openvino"),
        fresh_process=False,
    )["fp32"].measurement
    assert found.runtime == "openvino"
    assert found.options["performance_hint"] == "latency"
    assert found.compute.p50 is not None


def test_pytorch_runs_an_exported_program(program: Path) -> None:
    import torch

    x = np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype(np.float32)
    session = get_runtime("torch").load(program, threads=1)
    (given,) = session.inputs
    timed = session.query({given.name: x}, WallClock())
    expected = torch.export.load(str(program)).module()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(next(iter(timed.outputs.values())), expected, rtol=1e-5)
    assert 0 < timed.compute_ns < timed.end_to_end_ns
    assert session.options["mode"] == "eager"
    with pytest.raises(InputError, match="not those of the model"):
        session.query({"other": x}, WallClock())


@pytest.mark.slow
@pytest.mark.skipif(not usable("torch-compiled").ok, reason=usable("torch-compiled").found)
def test_a_compiled_program_gives_the_numbers_of_the_eager_one(program: Path) -> None:
    x = np.ones((1, 1, 8, 8), np.float32)
    found = []
    for name in ("torch", "torch-compiled"):
        session = get_runtime(name).load(program, threads=1)
        found.append(next(iter(session.query({session.inputs[0].name: x}, WallClock()).outputs.values())))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_pytorch_says_that_it_runs_no_onnx_file(model: Path) -> None:
    with pytest.raises(InputError, match=r"torch\.export\.save") as caught:
        get_runtime("torch").load(model, threads=1)
    assert "ONNX Runtime" in str(caught.value.fix)


@no_gpu
@pytest.mark.parametrize("name", [name for name in available() if "tensorrt" in name or "cuda" in name])
def test_a_runtime_without_its_gpu_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InputError, match="cannot be used on this machine") as caught:
        get_runtime(name)
    assert "no NVIDIA GPU" in str(caught.value.evidence)


@pytest.mark.skipif(find_spec("onnxruntime_ep_openvino") is None, reason="onnxruntime-ep-openvino is not installed")
def test_a_plugin_provider_is_asked_which_devices_it_serves(model: Path) -> None:
    found = usable("onnxruntime-openvino")
    if not found.ok:
        # the plugin serves Intel's devices; on others it is to say so
        assert "finds no device" in found.found
        with pytest.raises(InputError, match="cannot be used on this machine"):
            get_runtime("onnxruntime-openvino")
        return
    session = get_runtime("onnxruntime-openvino").load(model, threads=1)
    x = images(2)
    np.testing.assert_allclose(session.query({"image": x}, WallClock()).outputs["logits"], reference(x), rtol=1e-3)


def test_a_provider_that_is_not_there_is_no_silent_fallback(model: Path) -> None:
    runtime = providers.make("onnxruntime-cuda", RuntimeOptions())
    if "CUDAExecutionProvider" in __import__("onnxruntime").get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EdgestillError):
        runtime.load(model, threads=1)


@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-bindings is not installed")
def test_every_cuda_call_exists_in_the_bindings() -> None:
    names = set(re.findall(r"cuda\.(cuda[A-Z]\w+)", Path(tensorrt.__file__).read_text()))
    assert len(names) > 15
    assert [name for name in names if not hasattr(import_module("cuda.bindings.runtime"), name)] == []


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_every_tensorrt_call_exists_in_the_module() -> None:
    trt: Any = import_module("tensorrt_rtx")
    source = Path(tensorrt.__file__).read_text()
    for kind, holder in (("_engine", trt.ICudaEngine), ("_context", trt.IExecutionContext)):
        names = set(re.findall(rf"{kind}\.(\w+)\(", source))
        assert names
        assert [name for name in names if not hasattr(holder, name)] == []


@pytest.mark.parametrize("level", ["all", "none"])
def test_the_graph_level_is_set_and_recorded(model: Path, level: str) -> None:
    session = get_runtime("onnxruntime", RuntimeOptions(graph_optimization=level)).load(model, threads=1)  # type: ignore[arg-type]
    assert session.options["graph_optimization"] == level
    x = images(1)
    np.testing.assert_allclose(
        session.query({"image": x}, WallClock()).outputs["logits"], reference(x), rtol=1e-4, atol=1e-3
    )


def test_a_lack_of_memory_is_told_apart(tmp_path: Path) -> None:
    # ONNX Runtime itself asked for 4 TB
    graph = helper.make_graph(
        [
            helper.make_node("Expand", ["x", "shape"], ["wide"]),
            helper.make_node("ReduceSum", ["wide"], ["y"], keepdims=0),
        ],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )
    path = tmp_path / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    session = get_runtime("onnxruntime").load(path, threads=1)
    with pytest.raises(EdgestillError, match="not enough memory") as caught:
        session.query({"x": np.ones(1, np.float32), "shape": np.array([2**40])}, WallClock())
    assert caught.value.where == str(path)
    assert "smaller batch" in str(caught.value.fix)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "cudaErrorMemoryAllocation: out of memory",
        "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 4096",
    ],
)
def test_a_gpu_without_memory_is_told_apart(text: str) -> None:
    assert "not enough memory" in run_error(RuntimeError(text), "PyTorch", Path("m.pt2")).message
    assert (
        run_error(RuntimeError("illegal instruction"), "PyTorch", Path("m.pt2")).message
        == "PyTorch failed on the model"
    )
