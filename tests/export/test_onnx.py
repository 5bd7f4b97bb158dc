from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export.onnx import choose_opset, export_graph, graph_opset, lower_opset
from export.parity import open_session, run_session, run_torch
from profiles.errors import EdgestillError, InputError
from tests.export.conftest import device_and_stack
from tests.export.models import TinyText, samples, trained


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batch_is_dynamic(fp32_graph: Path, batch: int) -> None:
    images = {"image": samples(batch, 3)[0]}
    found = run_session(open_session(fp32_graph), images, batch)
    np.testing.assert_allclose(found, run_torch(trained(), images), atol=1e-5)


def test_graph_takes_uint8_pixels_gives_logits_and_says_what_it_is(fp32_graph: Path) -> None:
    model = onnx.load(str(fp32_graph))
    assert model.graph.input[0].name == "image"
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [entry.name for entry in model.graph.output] == ["logits"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["labels"] == '["a", "b"]'
    assert metadata["resize"] == "stretch"
    assert "edgestill" in metadata


def test_graph_holds_no_path_of_this_machine(fp32_graph: Path) -> None:
    assert b".py" not in fp32_graph.read_bytes()


def test_exporter_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    export_graph(TinyText().eval(), {"tokens": tokens}, tmp_path / "text.onnx", opset=20)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("opset", [13, 17])
def test_older_opsets_compute_the_same(tmp_path: Path, opset: int) -> None:
    model = trained(nn.Hardswish)
    images = samples(4, 3)[0]
    path = tmp_path / "old.onnx"
    export_graph(model, {"image": torch.from_numpy(images)}, path, opset=opset, max_ir=7)
    written = onnx.load(str(path))
    assert graph_opset(written) == opset
    assert written.ir_version <= 7
    found = run_session(open_session(path), {"image": images}, 4)
    np.testing.assert_allclose(found, run_torch(model, {"image": images}), atol=1e-4)


def test_operator_that_an_older_opset_lacks_is_refused() -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4])
    node = onnx.helper.make_node("LayerNormalization", ["x", "s"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 4])
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    with pytest.raises(EdgestillError, match="LayerNormalization does not exist in opset 13"):
        lower_opset(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), 13)


def test_opset_follows_the_stack() -> None:
    _, jetpack4 = device_and_stack("jetson-nano")
    _, jetpack6 = device_and_stack("jetson-orin-nano")
    assert choose_opset(None, jetpack4) == jetpack4.max_opset
    assert choose_opset(None, jetpack6) == 20
    with pytest.raises(InputError, match="opset 25 is too new") as caught:
        choose_opset(25, jetpack6)
    assert f"reads up to opset {jetpack6.max_opset}" in str(caught.value)


def test_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="training mode"):
        export_graph(TinyText(), {"tokens": torch.zeros(2, 12, dtype=torch.int64)}, tmp_path / "x.onnx", opset=20)


def test_model_that_depends_on_values_says_so(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(EdgestillError, match="cannot be exported"):
        export_graph(Branching().eval(), {"x": torch.ones(2, 3)}, tmp_path / "x.onnx", opset=20)
