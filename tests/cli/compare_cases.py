"""Measurements and runs on disk for the comparison's tests: one real measurement, and others with samples of a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from cli.report.predictions import PREDICTIONS, Predictions, save_predictions
from cli.report.schema import CandidateRow, LatencyValue, MetricValue, TargetRow, to_json
from profiles import metrics
from profiles.measure import Samples, describe, save_measurement
from profiles.measurement import Measurement
from tests.cli.report_example import example, line3_orin

TEST_KEY = "the same test data"


def tiny_model(path: Path, width: int = 8) -> Path:
    """A matrix product and a rectifier."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor("w", TensorProto.FLOAT, [width, width], np.eye(width).reshape(-1))],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), str(path))
    return path


def with_samples(measurement: Measurement, milliseconds: np.ndarray, **changes: object) -> tuple[Measurement, Samples]:
    """The measurement as these samples (N,) would have made it, on both clocks."""
    samples = Samples(*[(milliseconds * 1e6).astype(np.int64)] * 2)
    asked = measurement.asked
    latencies = {
        scope: describe(samples.end_to_end_ns, scope, asked.percentile, 0.99) for scope in ("compute", "end_to_end")
    }
    fields = {"looks": 1, "stable": True, "warnings": ()} | latencies | changes
    return measurement.model_copy(update=fields), samples


def write_run(
    folder: Path,
    measurement: Measurement,
    milliseconds: np.ndarray,
    correct: np.ndarray,
    *,
    predictions: bool = True,
    size_mib: float = 0.9,
    model_key: str | None = None,
    **changes: object,
) -> Path:
    """A run folder with one target: its report, samples and predictions, as `edgestill run` leaves them.

    Args:
        folder: made.
        measurement: what the samples are put into.
        milliseconds: (N,) latencies.
        correct: bool (M,), which test samples the model has right.
        predictions: whether they are kept.
        size_mib: of the model file.
        model_key: hash of the model file; default: of its answers.
        changes: fields of the measurement.
    """
    folder.mkdir(parents=True)
    labels = np.arange(correct.size) % 3
    logits = np.eye(3)[np.where(correct, labels, (labels + 1) % 3)]
    measured, samples = with_samples(measurement, milliseconds, name="int8", **changes)
    save_measurement(folder / "measurements" / "line3-orin", measured, samples)
    if predictions:
        save_predictions(
            folder / PREDICTIONS / "line3-orin",
            Predictions.of("multiclass", logits, labels, None),
            test_key=TEST_KEY,
            model_key=str(correct.tobytes()) if model_key is None else model_key,
        )
    metric = MetricValue.of(metrics.evaluate("multiclass", logits, labels))
    latency = LatencyValue.of(measured)
    row: TargetRow = line3_orin().model_copy(
        update={
            "metric": metric,
            "latency": latency,
            "size_mib": size_mib,
            "peak_memory_mib": measured.memory.peak_mib,
            "limits": (),
            "environment": measurement.environment,
            "candidates": (
                CandidateRow(precision="fp32", size_mib=3.1, metric=metric, latency=latency),
                CandidateRow(precision="int8", size_mib=size_mib, metric=metric, latency=latency, chosen=True),
            ),
        }
    )
    report = example((row,), n_test=int(correct.size))
    data = report.data.model_copy(update={"test_key": TEST_KEY})
    (folder / "report.json").write_text(to_json(report.model_copy(update={"data": data})), encoding="utf-8")
    return folder
