"""Every student that can be built exports, in every form of graph, to ONNX Runtime, OpenVINO and TensorRT-RTX.

    pytest tests/export/test_matrix.py -n 0 -v        the table, one line per cell

A cell passes when the reader computes what PyTorch computes (TensorRT-RTX: when it builds the engine). What a reader
does not take is listed in REFUSED with the reason, and must be refused for that reason.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from distill.data.text import encode, train_tokenizer
from distill.objectives.compose import head_size
from distill.objectives.section import AnyObjective, ObjectiveSections
from export import Candidate, Plan, parity, tensorrt, write_bundle
from profiles.errors import EdgestillError
from profiles.opening import open_bundle
from tests.export.conftest import device_and_stack
from tests.export.matrix_cases import (
    FORMS,
    FURTHER,
    KINDS,
    ROWS,
    WITH_FURTHER,
    Array,
    fixed,
    forms_of,
    make,
    samples,
    student,
)

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 8e-2}
EIGHT_BITS = 0.25
"""Relative error. The students are untrained: their logits lie close together, and eight bits cost more than usual."""

TENSORRT_QDQ = "TensorRT takes symmetric activations and biases in float only"
TURING = "TensorRT-RTX 1.7 computes in FP16 only on Turing"
REFUSED = {
    ("bf16", "onnxruntime"): ("cannot load the graph.*NOT_IMPLEMENTED", "no BF16 kernels on a CPU"),
    ("fp8", "onnxruntime"): ("cannot load the graph", "no FP8 kernels on a CPU"),
    ("int8 u8s8", "rtx 8.9 dynamic"): ("cannot parse the graph", TENSORRT_QDQ),
    ("int8 s8s8", "rtx 8.9 dynamic"): ("cannot parse the graph", TENSORRT_QDQ),
    **{(form, "rtx 7.5"): ("cannot build an engine for compute capability 7.5", TURING)
       for form in ("fp32", "int8 symmetric", "bf16", "fp8")},
}  # fmt: skip
"""(form, reader): what the reader says, and why that is right."""
ONLY_READ = {
    (
        "int8, rest fp16",
        "openvino",
    ): "a form for TensorRT: OpenVINO 2026.4's INT8 kernels stop the process on FP16 scales"
}
"""(form, reader): why the reader reads the graph and does not compute it."""
READERS = ("onnxruntime", "openvino", "rtx 8.9 dynamic", "rtx 12.0 static", "rtx 7.5")
STATIC_ENGINES = ("fp32", "int8, rest fp16")
"""Forms that are built for a fixed batch, too."""


def cells() -> list[Any]:
    """(student, form, reader), with what is expected in the name."""
    found = []
    for kind, form, reader in itertools.product(KINDS, (*FORMS, *FURTHER), READERS):
        turing = reader == "rtx 7.5" and kind in WITH_FURTHER and not form.startswith(("int8 u", "int8 s8"))
        static = reader == "rtx 12.0 static" and form in STATIC_ENGINES
        if form not in forms_of(kind) or not (turing or static or reader in READERS[:3]):
            continue
        expected = "passes"
        if refused := REFUSED.get((form, reader)):
            expected = f"refused: {refused[1]}"
        elif reason := ONLY_READ.get((form, reader)):
            expected = f"read, not computed: {reason}"
        found.append(pytest.param(kind, form, reader, id=f"{kind} | {form} | {reader} | {expected}"))
    return found


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Every form's file of a student, each student exported once."""

    @cache
    def made(kind: str) -> dict[str, Path]:
        torch.set_num_threads(1)
        return make(kind, tmp_path_factory.mktemp("matrix"))

    return made


@cache
def reference(kind: str) -> Array:
    return parity.run_torch(student(kind), inputs(kind))


def inputs(kind: str) -> dict[str, Array]:
    spec = KINDS[kind].spec
    return {spec.name: samples(spec)}


@pytest.mark.parametrize(("kind", "form", "reader"), cells())
def test_matrix(kind: str, form: str, reader: str, graphs: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    read = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}.get(reader, build)
    refused = REFUSED.get((form, reader))
    if refused is not None:
        with pytest.raises(EdgestillError) as caught:
            read(kind, form, reader, graphs(kind)[form], tmp_path)
        assert re.search(refused[0], " ".join(str(caught.value).split()))
        return
    read(kind, form, reader, graphs(kind)[form], tmp_path)


def compare(kind: str, form: str, found: Array) -> None:
    assert found.shape == reference(kind).shape
    assert parity.relative_error(reference(kind), found)[1] < TOLERANCE.get(form, EIGHT_BITS)


def run_onnxruntime(kind: str, form: str, reader: str, graph: Path, folder: Path) -> None:
    # its integer kernels are meant for its own form; the others are computed as they are written
    own = "int8" not in form or form == "int8 u8s8"
    compare(kind, form, parity.run_session(parity.open_session(graph, fuse_quantized=own), inputs(kind), 5))
    static = parity.open_session(fixed(graph, 4, folder / "static.onnx"), fuse_quantized=own)
    assert static.get_inputs()[0].shape[0] == 4
    compare(kind, form, parity.run_session(static, inputs(kind), 4))


@cache
def openvino_core() -> Any:
    return pytest.importorskip("openvino", reason="openvino is not installed (extra dev)").Core()


def run_openvino(kind: str, form: str, reader: str, graph: Path, folder: Path) -> None:
    core = openvino_core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    if form in ("int8 s8s8", "int8 symmetric"):
        # without VNNI two products of eight-bit weights may saturate its sixteen-bit sums: compute as it is written
        options["LP_TRANSFORMS_MODE"] = "NO"
    (array,) = inputs(kind).values()

    def computed(path: Path, batch: int) -> Array:
        model = core.compile_model(str(path), "CPU", options)
        return np.concatenate([model(array[start : start + batch])[0] for start in range(0, ROWS, batch)])

    if (form, reader) in ONLY_READ:
        assert core.read_model(str(graph)).outputs[0].partial_shape[1].get_length() == 3
        return
    compare(kind, form, computed(graph, 5))
    if form in ("fp32", "int8 u8s8"):
        compare(kind, form, computed(fixed(graph, 4, folder / "static.onnx"), 4))


def build(kind: str, form: str, reader: str, graph: Path, folder: Path) -> None:
    adapter = tensorrt.load_adapter(rtx=True)
    if adapter is None:
        pytest.skip("tensorrt-rtx is not installed (extra tensorrt-rtx)")
    capability = reader.split()[1]
    batch = (1, 2, 4) if reader.endswith("dynamic") else (1, 1, 1)
    engine = tensorrt.build_engine(
        adapter, graph, folder / "engine", capability=capability, batch=batch, precision=form
    )
    assert engine.size_bytes > 5_000


def test_objectives_leave_nothing_but_class_logits_in_the_graph() -> None:
    larger = set()
    for section in get_args(AnyObjective):
        kind = section.model_fields["kind"].default
        if head_size(TypeAdapter(ObjectiveSections).validate_python(kind), 3) != 3:
            larger.add(kind)
    # what these add is in the matrix; the projectors of all others stay with the objective
    assert larger == {"lelp", "subclass"}
    head = torch.zeros(2, 3)
    for name in KINDS:
        if "head" not in name:
            assert student(name).objective.class_logits(head) is head
        assert reference(name).shape == (ROWS, 3)


@pytest.mark.parametrize("kind", ["text", "textc"])
def test_texts_bring_their_tokenizer(kind: str, graphs: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    texts = ["one small step", "a b a b", "one a step b small"]
    tokenizer = train_tokenizer(texts * 4, KINDS[kind].spec.vocabulary)
    tokens = encode(tokenizer, texts, 10)
    tokenizer.enable_padding(length=10, pad_id=0, pad_token="[PAD]")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    candidate = Candidate(name="int8", precision="int8", file=_model(graphs(kind)["int8 u8s8"], tmp_path))
    plan = Plan(
        folder=tmp_path, device=device.name, stack=stack.name, dialect=stack.dialect, opset=20, input_name="tokens",
        input_dtype="int64", input_shape=(10,), batch=1, calibration_sha256=None, candidates=(candidate,), seconds=0,
    )  # fmt: skip
    preprocessing = {"kind": "tokens", "length": 10, "pad_id": 0, "vocabulary": 40}
    bundle = write_bundle(
        tmp_path / "bundle", plan, candidate, name="texts", device=device, stack=stack, golden=tokens[:1],
        labels=("a", "b", "c"), preprocessing=preprocessing, tokenizer=tmp_path / "tokenizer.json",
    )  # fmt: skip
    assert {"tokenizer.json", "model.onnx"} <= set(open_bundle(bundle).files)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    found = subprocess.run(
        [sys.executable, str(bundle / "infer.py"), str(tmp_path / "texts.txt"), "--top", "1"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    expected = parity.run_session(parity.open_session(bundle / "model.onnx"), {"tokens": tokens}, 3).argmax(1)
    assert [line.split()[0] for line in found.stdout.splitlines()] == ["abc"[row] for row in expected]


def _model(graph: Path, folder: Path) -> Path:
    """The graph under the name that a plan gives it."""
    target = folder / "model.onnx"
    target.write_bytes(graph.read_bytes())
    return target
