"""What `edgestill bench` says of a measurement beside its figures."""

from __future__ import annotations

from pathlib import Path

from cli.pipeline.bench import describe
from profiles import measure as m
from profiles.device import TargetSection
from profiles.measure_section import MeasureSection
from tests.profiles.test_runtime_onnxruntime import images, save_model


def test_nodes_on_another_provider_and_a_refused_graph_are_said(tmp_path: Path) -> None:
    found = m.measure(
        {"m": save_model(tmp_path / "m.onnx")},
        {"image": images(2)},
        TargetSection(name="t", percentile=50),
        MeasureSection(max_seconds=0.1, max_samples=64, warmup_seconds=0.1, energy_seconds=0),
        fresh_process=False,
    )["m"].measurement
    assert "nodes by provider" not in describe(found)
    nodes = {"CUDAExecutionProvider": 31, "CPUExecutionProvider": 2}
    options = {**found.options, "nodes": nodes, "cuda_graph": "refused: nodes on the CPU"}
    said = describe(found.model_copy(update={"options": options}))
    assert "nodes by provider: CUDAExecutionProvider 31, CPUExecutionProvider 2" in said
    assert "CUDA graph refused: nodes on the CPU" in said
    alone = {**options, "nodes": {"CUDAExecutionProvider": 33}}
    assert "nodes by provider" not in describe(found.model_copy(update={"options": alone}))
