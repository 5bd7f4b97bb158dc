"""Models that hang, crash, changed their inputs or give NaN, in the real runtime: named, and the rest is measured."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from profiles import measure as m
from profiles.device import TargetSection
from profiles.errors import EdgestillError
from profiles.fresh_process import HangError, probe
from profiles.measure_section import MeasureSection
from tests.profiles.test_runtime_onnxruntime import images, save_model


def endless(path: Path) -> Path:
    """A valid graph whose loop does not end within any time that somebody waits."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("Add", ["value", "value"], ["twice"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("twice", TensorProto.FLOAT, []),
        ],
    )
    constants = {"turns": np.array(2**62), "yes": np.array(True), "start": np.array(1.0, np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["turns", "yes", "start"], ["end"], body=body),
            helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["x", "end"], ["logits"]),
        ],
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def renamed(path: Path) -> Path:
    model = onnx.load(str(save_model(path)))
    model.graph.input[0].name = model.graph.node[0].input[0] = "picture"
    onnx.save(model, str(path))
    return path


def test_each_bad_model_is_told_apart_and_the_good_one_is_measured(tmp_path: Path) -> None:
    candidates = {
        "good": save_model(tmp_path / "good.onnx"),
        "endless": endless(tmp_path / "endless.onnx"),
        "renamed": renamed(tmp_path / "renamed.onnx"),
        "nan": save_model(tmp_path / "nan.onnx", scale=float("nan")),
    }
    failures: dict[str, EdgestillError] = {}
    found = m.measure(
        candidates,
        {"image": images(2)},
        TargetSection(name="t", percentile=50),
        MeasureSection(max_seconds=0.1, warmup_seconds=0.1, timeout_seconds=1.5, energy_seconds=0),
        failures=failures,
    )
    assert list(found) == ["good"]
    assert isinstance(failures["endless"], HangError)
    assert "onnxruntime hangs on the model in its first queries" in failures["endless"].message
    assert "1.5 s" in str(failures["endless"].evidence)
    assert "given: image; the model takes: picture" in str(failures["renamed"].evidence)
    assert "not finite" in failures["nan"].message
    assert [error.where for error in failures.values()] == [
        str(candidates[name]) for name in ("endless", "renamed", "nan")
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_runtime_that_crashes_takes_only_its_own_process_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the interpreter is ended as a runtime that touches memory of others would end it
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    with pytest.raises(EdgestillError, match="crashed") as caught:
        probe("onnxruntime", save_model(tmp_path / "m.onnx"), {"image": images(1)}, 1)
    assert "SIGSEGV while starting" in str(caught.value.evidence)
