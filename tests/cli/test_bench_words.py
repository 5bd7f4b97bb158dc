"""What `edgestill bench` says of a measurement beside its figures."""

from __future__ import annotations

import numpy as np
import pytest

from cli.pipeline.bench import describe
from profiles import measure as m
from profiles.device import TargetSection
from profiles.measure_section import MeasureSection
from profiles.measurement import Measurement
from tests.profiles.test_runtime_onnxruntime import images, save_model


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    return m.measure(
        {"m": save_model(tmp_path_factory.mktemp("model") / "m.onnx")},
        {"image": images(2)},
        TargetSection(name="t", percentile=50),
        MeasureSection(max_seconds=0.1, max_samples=64, warmup_seconds=0.1, energy_seconds=0),
        fresh_process=False,
    )["m"].measurement


def test_nodes_on_another_provider_and_a_refused_graph_are_said(found: Measurement) -> None:
    assert "nodes by provider" not in describe(found)
    nodes = {"CUDAExecutionProvider": 31, "CPUExecutionProvider": 2}
    options = {**found.options, "nodes": nodes, "cuda_graph": "refused: nodes on the CPU"}
    said = describe(found.model_copy(update={"options": options}))
    assert "nodes by provider: CUDAExecutionProvider 31, CPUExecutionProvider 2" in said
    assert "CUDA graph refused: nodes on the CPU" in said
    alone = {**options, "nodes": {"CUDAExecutionProvider": 33}}
    assert "nodes by provider" not in describe(found.model_copy(update={"options": alone}))


def test_an_unstable_latency_has_no_figure_but_what_the_samples_were(found: Measurement) -> None:
    spells = np.full(2000, 1_000_000)
    spells[500:600] = 5_000_000
    latency = m.describe(spells.tolist(), "end_to_end", 99.0, 0.99)
    assert not latency.stable
    assert latency.value is None
    said = describe(found.model_copy(update={"end_to_end": latency, "stable": False}))
    assert "p99 UNSTABLE, no figure: 2,000 runs between 1.000 and 5.000 ms, half of them within 1.000" in said
