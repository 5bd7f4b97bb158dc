"""`edgestill check`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest

from cli import complete
from export.preflight import RULES
from tests.cli.cli_runner import edgestill
from tests.export.preflight_cases import external, foreign, node, product, relu, typed


@pytest.fixture(autouse=True)
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def written(folder: Path, model: onnx.ModelProto, name: str = "model.onnx") -> str:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return str(path)


def test_a_graph_that_everything_takes_ends_with_0(tmp_path: Path) -> None:
    result = edgestill("check", written(tmp_path, relu()))
    assert result.status == 0, result.err
    assert "nothing refused" in result.out
    assert "here: takes it" in result.out  # ONNX Runtime was asked


def test_a_refusal_names_rule_fact_and_fix_and_ends_with_3(tmp_path: Path) -> None:
    result = edgestill("check", written(tmp_path, relu(opset=21, ir=10)), "--device", "jetson-orin-nano")
    assert result.status == 3
    words = " ".join(result.out.split())
    assert "refused: the graph is too new for jetpack-6.2 [opset]" in words
    assert "opset 21; tensorrt 10.3.0 reads up to 20 (JetPack 6.2 release notes" in words
    assert "fix: export in opset 20" in words


def test_the_rtx_parser_is_labelled_as_what_it_is(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")
    file = written(tmp_path, foreign("Mine", "my.domain"))
    document = json.loads(edgestill("check", file, "--device", "jetson-orin-nano", "--json").out)
    answer = document["evidence"][0]
    assert re.fullmatch(r"the parser of TensorRT-RTX [\d.]+, not TensorRT 10\.3\.0", answer["tool"])
    assert answer["verdict"] == "refuses it"
    assert "Plugin not found" in answer["detail"]
    assert not answer["decides"]


def test_what_the_stacks_own_runtime_refuses_is_refused(tmp_path: Path) -> None:
    model = typed(onnx.TensorProto.STRING, "StringNormalizer")
    model.graph.node[0].attribute.extend([onnx.helper.make_attribute("locale", "no_such_locale")])
    result = edgestill("check", written(tmp_path, model), "--json")
    document = json.loads(result.out)
    tool = [found for found in document["findings"] if found["rule"] == "tool"]
    assert (result.status, document["refused"]) == ((3, True) if tool else (0, False))
    assert document["evidence"][0]["verdict"] == ("refuses it" if tool else "takes it")


def test_the_stack_and_the_batch_decide(tmp_path: Path) -> None:
    file = written(tmp_path, typed(onnx.TensorProto.FLOAT, "Relu", opset=19, ir=9))
    assert edgestill("check", file, "--device", "jetson-orin-nano", "--stack", "jetpack-6.2").status == 0
    assert edgestill("check", file, "--device", "jetson-orin-nano", "--stack", "jetpack-5.1").status == 3
    assert edgestill("check", file, "--device", "raspberry-pi-5", "--batch", "4").status == 3


def test_json_is_one_document_with_memory_and_findings(tmp_path: Path) -> None:
    result = edgestill("check", written(tmp_path, product(2)), "--device", "raspberry-pi-5", "--json")
    document = json.loads(result.out)
    assert document["schema_version"] == 1
    assert document["memory"]["weights"] == 4 * 1024 * 1024
    assert document["memory"]["activations_at_least"] == 2 * 2 * 1024 * 4
    assert document["precisions"] == ["fp32"]
    assert all(found["fact"] and found["rule"] for found in document["findings"])


def test_text_fits_80_columns_and_is_ascii(tmp_path: Path) -> None:
    model = relu(opset=27, inputs={"x": (onnx.TensorProto.FLOAT, ["n", 3, "height", "width"])})
    result = edgestill("check", written(tmp_path, model), "--device", "jetson-agx-orin", "--batch", "8")
    lines = result.out.replace(str(tmp_path), "").splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in result.out
    assert edgestill("check", "--rules").out.isascii()


def test_names_in_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    model = relu()
    model.graph.node.insert(0, node("Unique", "x", "u"))
    model.graph.node[0].name = "\x1b[2Jevil[red]\n" + "a" * 5000
    out = edgestill("check", written(tmp_path, model), "--device", "jetson-orin-nano").out
    assert "\x1b" not in out
    assert "?[2Jevil[red]?" in out
    assert len(out) < 3000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04 something", "a zip archive"),
        (b"\xff" * 64, "not an ONNX file, or damaged"),
        (relu().SerializeToString()[:-20], "not an ONNX file, or damaged"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "holds no graph"),
        (b'{"a": 1}', "not an ONNX file"),
    ],
    ids=["empty", "zip", "noise", "cut", "no-graph", "json"],
)
def test_what_is_no_model_is_said_without_a_traceback(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "odd.onnx"
    file.write_bytes(content)
    result = edgestill("check", str(file), "--device", "jetson-orin-nano")
    assert result.status == 2
    assert said in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


def test_a_missing_file_a_folder_a_huge_file_and_no_file_end_with_2(tmp_path: Path) -> None:
    assert edgestill("check", str(tmp_path / "gone.onnx")).status == 2
    assert edgestill("check", str(tmp_path)).status == 2
    assert edgestill("check").status == 2
    huge = tmp_path / "huge.onnx"
    with huge.open("wb") as stream:
        stream.truncate(2**31 + 5)  # no blocks are written
    result = edgestill("check", str(huge))
    assert result.status == 2
    assert "save_as_external_data" in result.err


def test_unknown_devices_and_stacks_suggest_the_nearest(tmp_path: Path) -> None:
    file = written(tmp_path, relu())
    device = edgestill("check", file, "--device", "jetson-orin-nan")
    assert (device.status, "jetson-orin-nano" in device.err) == (2, True)
    stack = edgestill("check", file, "--device", "jetson-orin-nano", "--stack", "jetpack-6.3")
    assert (stack.status, "jetpack-6.2" in stack.err) == (2, True)
    assert edgestill("check", file, "--batch", "0").status == 2


def test_no_tool_is_asked_about_data_outside_of_the_folder(tmp_path: Path) -> None:
    result = edgestill("check", written(tmp_path, external("../secret")), "--json")
    document = json.loads(result.out)
    assert result.status == 3
    assert [found["rule"] for found in document["findings"] if found["level"] == "refused"] == ["external-data-outside"]
    assert document["evidence"][0]["verdict"] == "not asked"


def test_rules_lists_every_rule() -> None:
    listed = json.loads(edgestill("check", "--rules", "--json").out)
    assert [entry["id"] for entry in listed] == list(RULES)
    assert all(entry["title"] and entry["runtimes"] for entry in listed)


def test_help_has_examples_and_devices_complete() -> None:
    assert "edgestill check model.onnx --device jetson-orin-nano" in edgestill("check", "--help").out
    assert "jetson-orin-nano" in complete.devices("jetson-orin-n")
