"""ONNX Runtime's other providers, as far as a machine without their devices shows it: sessions here are the CPU's."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from profiles.errors import EdgestillError, InputError
from profiles.measure_section import MeasureSection
from profiles.runtimes import RuntimeOptions, WallClock, providers
from profiles.runtimes.onnxruntime import session_settings
from profiles.sweep import sweep
from tests.profiles.test_runtime_onnxruntime import images, reference, save_model

# what ONNX Runtime 1.31 says of a graph with nodes on the CPU (inference_session.cc)
REFUSAL = (
    "This session cannot use the graph capture feature as requested by the user as all the graph nodes have not been "
    "assigned to CUDAExecutionProvider"
)
CPU = providers._Kind("CPUExecutionProvider", "", on_cuda=True)


class Recording(providers._HostSession):
    """A session as that of a GPU's provider is made and used; what computes is the real CPU provider."""

    refuses = False
    breaks = False

    def __init__(self, model: Path, kind: providers._Kind = CPU, *, cuda_graph: bool = True) -> None:
        self.made: list[bool] = []
        super().__init__(model, 1, RuntimeOptions(cuda_graph=cuda_graph), kind)

    def _created(self, model: Path, threads: int | None, options: RuntimeOptions, *, cuda_graph: bool) -> Any:
        if cuda_graph and self.refuses:
            raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {REFUSAL}")
        self.made.append(cuda_graph)
        settings = session_settings(threads, options)
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])

    def _query(self, inputs: Any, clock: Any) -> Any:
        if self.breaks and self._graph is True:
            raise EdgestillError("failed on the model", evidence="operation not permitted when stream is capturing")
        return super()._query(inputs, clock)


class Refusing(Recording):
    refuses = True


class Breaking(Recording):
    breaks = True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "m.onnx")


def outputs(session: Recording, rows: int) -> None:
    found = session.query({"image": images(rows)}, WallClock()).outputs["logits"]
    np.testing.assert_allclose(found, reference(images(rows)), rtol=1e-4, atol=1e-3)


def test_with_a_cuda_graph_every_shape_has_a_session_of_its_own(model: Path) -> None:
    session = Recording(model)
    for rows in (1, 1, 2, 2, 1):
        outputs(session, rows)
    assert session.made == [True, True, True]
    assert session.options["cuda_graph"] is True
    assert session.options["provider_options"]["enable_cuda_graph"] == "1"


def test_without_a_cuda_graph_one_session_takes_all_shapes(model: Path) -> None:
    session = Recording(model, cuda_graph=False)
    for rows in (1, 2, 1):
        outputs(session, rows)
    assert session.made == [False]
    assert session.options["cuda_graph"] is False


def test_a_sweep_over_batches_replays_no_graph_of_another_batch(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recording] = []

    class Runtime:
        name, version = "onnxruntime-cuda", "1"

        def load(self, model: Path, *, threads: int | None) -> Recording:
            made.append(Recording(model))
            return made[-1]

    monkeypatch.setattr("profiles.sweep._SECONDS", 0.01)
    section = MeasureSection(warmup_seconds=0.05)
    found = sweep(model, {"image": images(4)}, section, batches=(1, 2, 4), runtime=Runtime())
    assert [point.batch for point in found.points] == [1, 2, 4]
    assert made[0].made == [True, True, True]


def test_a_graph_that_is_refused_is_run_without_and_the_reason_recorded(model: Path) -> None:
    session = Refusing(model)
    outputs(session, 1)
    outputs(session, 3)
    assert session.made == [False], "and once it was refused, one session takes all shapes"
    assert session.options["cuda_graph"] == f"refused: [ONNXRuntimeError] : 1 : FAIL : {REFUSAL}"[:209]
    assert session.options["provider_options"]["enable_cuda_graph"] == "0"


def test_a_recording_that_fails_in_the_first_query_is_run_without(model: Path) -> None:
    session = Breaking(model)
    outputs(session, 1)
    assert session.made == [True, False]
    assert session.options["cuda_graph"] == "refused: operation not permitted when stream is capturing"
    with pytest.raises(InputError, match="not those of the model"):
        session.query({"picture": images(1)}, WallClock())


def test_a_model_that_does_not_load_at_all_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"hello")
    with pytest.raises(EdgestillError, match="failed on the model") as caught:
        Recording(broken)
    assert caught.value.where == str(broken)


def test_the_nodes_of_each_provider_are_recorded_and_none_is_no_fallback(model: Path) -> None:
    session = Recording(model)
    (count,) = session.options["nodes"].values()
    assert count >= 1
    assert set(session.options["nodes"]) == {"CPUExecutionProvider"}
    with pytest.raises(EdgestillError, match="fell back to CPUExecutionProvider"):
        Recording(model, providers._KINDS["onnxruntime-cuda"])


def test_the_providers_own_version_is_told_with_that_of_onnx_runtime() -> None:
    assert providers.provider_version("onnxruntime-cuda").startswith(ort.__version__)
    if find_spec("onnxruntime_ep_openvino") is not None:
        plugin = f"onnxruntime-ep-openvino {version('onnxruntime-ep-openvino')}"
        assert providers.make("onnxruntime-openvino", RuntimeOptions()).version == f"{ort.__version__}, {plugin}"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_provider_is_usable_only_where_its_library_finds_what_it_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the providers' libraries as onnxruntime-gpu ships them: they link TensorRT's, which is another package's
    (tmp_path / "empty.c").write_text("int nothing(void) { return 0; }\n")

    def library(name: str, *options: str) -> None:
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", name, "empty.c", *options], cwd=tmp_path, check=True, capture_output=True
        )

    library("libnvinfer.so.10", "-Wl,-soname,libnvinfer.so.10")
    library("libonnxruntime_providers_shared.so")
    library("libonnxruntime_providers_tensorrt.so", "-Wl,--no-as-needed", "-L.", "-l:libnvinfer.so.10")
    library("libonnxruntime_providers_cuda.so")
    assert providers.library_error("CUDAExecutionProvider", tmp_path) is None
    found = providers.library_error("TensorrtExecutionProvider", tmp_path)
    assert found is not None
    assert found.startswith("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "cuda_version", "12.8")
    monkeypatch.setattr(providers, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(providers, "library_error", lambda provider: found)
    told = providers.usable("onnxruntime-tensorrt")
    assert not told.ok
    assert "its library does not load: libnvinfer.so.10" in told.found
    assert told.fix == 'pip install "onnxruntime-gpu[cuda,cudnn]" "tensorrt-cu12<11"'
