"""Devices and samples that the export's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export import Plan, plan
from export.onnx import export_graph
from profiles.device import Device, Stack, load_device
from profiles.metrics import Difference, Metric, difference, evaluate
from profiles.runtimes.onnxruntime import run_model
from tests.export.models import calibration, samples, trained


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def device_and_stack(name: str, stack: str | None = None) -> tuple[Device, Stack]:
    device = load_device(name)
    return device, next(entry for entry in device.stacks if stack is None or entry.name == stack)


IMAGES, LABELS = samples(300, 2)


def score(path: Path) -> Metric:
    return evaluate("multiclass", run_model(path, {"image": IMAGES}, threads=1)["logits"], LABELS)


def paired(a: NDArray[Any], b: NDArray[Any], rows: NDArray[np.int64]) -> Difference:
    return difference("multiclass", a, b, LABELS[rows])


def plan_for(name: str, folder: Path, stack: str | None = None, **options: Any) -> Plan:
    """A plan of the trained model for a device of the catalogue."""
    device, chosen = device_and_stack(name, stack)
    options = {
        "model": trained(),
        "held_out": IMAGES,
        "calibration": calibration(),
        "model_key": "tiny",
        "score": score,
        "difference": paired,
    } | options
    return plan(options.pop("model"), device=device, stack=chosen, folder=folder, **options)


@pytest.fixture(scope="session")
def cpu_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_for("this-machine", tmp_path_factory.mktemp("cpu"), batch=5)


@pytest.fixture(scope="session")
def rtx_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")
    return plan_for("rtx-4060-laptop", tmp_path_factory.mktemp("rtx"), batch=4)


@pytest.fixture(scope="session")
def fp32_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model's FP32 graph."""
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    images = torch.from_numpy(samples(2, 0)[0])
    export_graph(trained(), {"image": images}, path, opset=20, metadata={"labels": ["a", "b"], "resize": "stretch"})
    return path
