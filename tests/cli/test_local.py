"""Targets that are measured on this machine in a runtime of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cli.pipeline import Run
from cli.pipeline.local import file_of, local_runtime, outputs_of
from cli.recipe import load_recipe
from cli.report.schema import load_report
from export import Candidate
from profiles.device import TargetSection, resolve_target
from profiles.errors import InputError
from profiles.measure import load_measurement
from profiles.measure_section import MeasureSection
from profiles.runtimes import has_nvidia_gpu, usable
from tests.profiles.test_runtime_onnxruntime import images, reference, save_model

needs_openvino = pytest.mark.skipif(not usable("openvino").ok, reason=usable("openvino").found)
no_gpu = pytest.mark.skipif(has_nvidia_gpu(), reason="what a machine without a GPU says")

RECIPE = """
name = "runtimes"
objective = "supervised"

[data]
source = "npz"
path = "tiny.npz"

[train]
epochs = 4
batch_size = 16

[export]
calibration_samples = 16
parity_samples = 16
qat = "never"

[measure]
max_samples = 64
max_seconds = 0.3
warmup_seconds = 0.3
energy_seconds = 0

[[target]]
name = "intel"
runtime = "openvino"
arch = "conv-w8-d1-k3"
precision = "fp32"
percentile = 50
latency_ms = 500.0

[[target]]
name = "no-gpu"
runtime = "onnxruntime-cuda"
arch = "conv-w8-d1-k3"
precision = "fp32"
latency_ms = 500.0
"""


def target(**keys: object) -> object:
    return resolve_target(TargetSection(name="t", **keys), base=Path())  # type: ignore[arg-type]


@needs_openvino
@no_gpu
def test_a_run_measures_and_scores_each_target_in_its_runtime(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 2
    # dark and bright ones, which INT8 tells apart as well: nothing has to be searched
    pictures = (generator.integers(0, 96, (120, 8, 8)) + 150 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", images=pictures, labels=labels)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    out = tmp_path / "out"
    Run(load_recipe(str(recipe)), out).report()
    rows = {row.name: row for row in load_report(out / "report.json").targets}
    intel, nothing = rows["intel"], rows["no-gpu"]
    assert intel.latency is not None
    assert (intel.latency.runtime, intel.latency.options["performance_hint"]) == ("openvino", "latency")
    assert intel.metric is not None
    assert intel.metric.on == "artifact in its runtime"
    assert intel.peak_memory_mib is not None
    assert load_measurement(out / "measurements" / "intel" / "fp32.json").measurement.runtime == "openvino"
    assert nothing.latency is None
    assert {limit.verdict for limit in nothing.limits if limit.name == "latency_ms"} == {"not measured"}
    assert any(
        'not run: the runtime "onnxruntime-cuda" cannot be used on this machine' in line and "no NVIDIA GPU" in line
        for line in nothing.why
    )
    assert json.loads((out / "bundles" / "intel" / "manifest.json").read_text())


@needs_openvino
def test_outputs_in_a_runtime_are_those_of_all_rows(tmp_path: Path) -> None:
    file = save_model(tmp_path / "m.onnx")
    candidate = Candidate.model_construct(name="fp32", precision="fp32", file=file)
    assert file_of(candidate, "openvino", 1) == file
    found = outputs_of(candidate, "openvino", {"image": images(300)}, 1, MeasureSection())["logits"]
    np.testing.assert_allclose(found, reference(images(300)), rtol=1e-4, atol=1e-3)


def test_a_target_is_measured_with_its_own_runtime_else_the_stacks() -> None:
    assert local_runtime(target()).runtime == "onnxruntime"  # type: ignore[arg-type]
    if usable("openvino").ok:
        assert local_runtime(target(runtime="openvino")).runtime == "openvino"  # type: ignore[arg-type]


@no_gpu
def test_why_a_target_is_not_measured_here_is_said() -> None:
    runtime, reason = local_runtime(target(device="rtx-4060-laptop"))  # type: ignore[arg-type]
    assert runtime is None
    assert reason.startswith("this machine is no ")
    runtime, reason = local_runtime(target(runtime="onnxruntime-tensorrt"))  # type: ignore[arg-type]
    assert runtime is None
    assert 'the runtime "onnxruntime-tensorrt" cannot be used' in reason


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"runtime": "openvno"}, 'no runtime "openvno"'),
        ({"runtime": "torch"}, "torch.export.save"),
        ({"runtime": "tensorrt"}, "an engine of its own stack"),
        ({"runtime": "tensorrt", "device": "rtx-4060-laptop", "stack": None}, "an engine of its own stack"),
    ],
)
def test_a_runtime_that_does_not_run_what_is_exported_is_refused(keys: dict[str, str | None], message: str) -> None:
    with pytest.raises(InputError) as caught:
        target(**keys)
    assert message in caught.value.message
    assert str(caught.value.where).endswith(".runtime")
    assert "openvino" in str(caught.value.fix)
