"""Every kind of student, in every form of graph, for every reader: what is made once, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import nn

from cli.pipeline.run import Deployable, Trained
from distill.data.dataset import Dataset, InputSpec, Split
from distill.objectives.compose import build_objective, head_size
from distill.objectives.section import ObjectiveSections
from distill.students import build_student
from distill.students.section import StudentSection
from export.onnx import export_graph, save
from export.precision import Quantizer, quantization_for, to_bf16, to_fp8, to_fp16
from tests.export.conftest import device_and_stack

Array = NDArray[Any]
ROWS = 24
IMAGE = InputSpec("image", (1, 12, 12), (0.4,), (0.2,))
TOKENS = InputSpec("tokens", (10,), vocabulary=40, pad_id=0)


class Foreign(nn.Module):
    """A network of a user's: three channels, another size, its own activation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(24, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(image))


def foreign() -> nn.Module:
    """The factory of a recipe's `kind = "torch"`."""
    return Foreign()


@dataclass(frozen=True)
class Kind:
    """How a student is made. `arch`: one word; None: a user's network."""

    spec: InputSpec
    arch: str | None
    objective: Any
    task: str = "multiclass"


KINDS = {
    "conv": Kind(IMAGE, "conv-w4-d1-k3", "kd"),
    "convi, multi-label": Kind(IMAGE, "convi-w4-d1-k3", "ec", "multilabel"),
    "conv, LELP head": Kind(IMAGE, "conv-w4-d1-k5", {"kind": "lelp", "subclasses_per_class": 2, "tau": 2.0}),
    "conv, subclass head": Kind(IMAGE, "conv-w4-d1-k3", {"kind": "subclass", "subclasses_per_class": 2}),
    "torch": Kind(IMAGE, None, "kd"),
    "text": Kind(TOKENS, "text-w16-d1-h2", "kd"),
    "textc": Kind(TOKENS, "textc-w16-d1-k3", "fitnet"),
}


@cache
def samples(spec: InputSpec) -> Array:
    """Random pixels, or tokens with padding behind them."""
    rng = np.random.default_rng(0)
    if spec.kind == "image":
        return rng.integers(0, 256, (ROWS, *spec.shape), dtype=np.uint8)
    tokens = rng.integers(1, spec.vocabulary, (ROWS, *spec.shape))
    tokens[np.arange(spec.shape[0]) >= rng.integers(3, spec.shape[0] + 1, (ROWS, 1))] = 0
    return tokens


@cache
def student(name: str) -> Deployable:
    """An untrained student with its objective, as the pipeline exports it."""
    kind = KINDS[name]
    labels: Array = np.arange(ROWS) % 3
    if kind.task == "multilabel":
        labels = (np.random.default_rng(1).random((ROWS, 3)) < 0.4).astype(np.uint8)
    split = Split(samples(kind.spec), labels)
    data = Dataset("matrix", cast(Any, kind.task), ("a", "b", "c"), kind.spec, split, split, split, "matrix")
    told = np.random.default_rng(2).standard_normal
    subclasses = 2 if isinstance(kind.objective, dict) and kind.objective["kind"] == "subclass" else 1
    teacher: Any = SimpleNamespace(
        key="t", views=1, train_embedding=told((1, ROWS, 20)), train_logits=told((1, ROWS, 3 * subclasses)),
        head_weight=None, head_bias=None, **({"subclasses": subclasses} if subclasses > 1 else {}),
    )  # fmt: skip
    sections = TypeAdapter(ObjectiveSections).validate_python(kind.objective)
    section = StudentSection()
    if kind.arch is None:
        section = StudentSection(
            kind="torch", factory="tests.export.matrix_cases:foreign", input_channels=3, input_size=16
        )
    built = build_student(
        section, kind.spec, head_size(sections, 3), arch=kind.arch, seed=0, base=Path(), allow_code=True
    )
    objective = build_objective(sections, data, teacher, student_dim=built.embedding_dim)
    return Deployable(Trained(built, objective, cast(Any, None), "", "")).eval()


FORMS = ("fp32", "fp16", "int8 u8s8", "int8, rest fp16")
"""What every student is made in: INT8 for x86 processors, and for TensorRT."""
FURTHER = ("int8 s8s8", "int8 symmetric", "bf16", "fp8")
"""INT8 for Arm processors, INT8 for TensorRT with an FP32 remainder, and what newer GPUs have."""
WITH_FURTHER = ("conv", "text")
"""Students that are made in those, too: one of each kind of data."""


def forms_of(name: str) -> tuple[str, ...]:
    """The forms that a student is made in."""
    return (*FORMS, *FURTHER) if name in WITH_FURTHER else FORMS


def make(name: str, folder: Path) -> dict[str, Path]:
    """Every form's file of a student."""
    kind = KINDS[name]
    array = samples(kind.spec)
    base = folder / "fp32.onnx"
    export_graph(student(name), {kind.spec.name: torch.from_numpy(array[:2])}, base, opset=20)
    calibration = {kind.spec.name: array[:16]}
    x86, x86_stack = device_and_stack("this-machine")
    forms = {
        "int8 u8s8": quantization_for(x86, x86_stack.model_copy(update={"dialect": "qdq-u8s8"})),
        "int8 s8s8": quantization_for(*device_and_stack("raspberry-pi-5")),
        "int8 symmetric": quantization_for(*device_and_stack("rtx-4060-laptop")),
    }
    found: dict[str, Path] = {"fp32": base}

    @cache
    def quantizer(form: str) -> Quantizer:
        return Quantizer(base, calibration, forms[form], 99.99)

    def half(path: Path) -> None:
        to_fp16(base, path)

    def quantised(form: str) -> Callable[[Path], None]:
        return lambda path: save(quantizer(form).quantized("minmax"), path)

    def rest_in_half(path: Path) -> None:
        quantised("int8 symmetric")(folder / "symmetric.onnx")
        to_fp16(folder / "symmetric.onnx", path)

    def eight_bit_floats(path: Path) -> None:
        symmetric = quantizer("int8 symmetric")
        save(to_fp8(symmetric.quantized("minmax"), symmetric.prepared), path)

    makers: dict[str, Callable[[Path], None]] = {
        "fp16": half,
        "bf16": lambda path: to_bf16(base, path),
        **{form: quantised(form) for form in forms},
        "int8, rest fp16": rest_in_half,
        "fp8": eight_bit_floats,
    }
    for form, maker in makers.items():
        if form not in forms_of(name):
            continue
        path = folder / f"{form.replace(', ', '-').replace(' ', '-')}.onnx"
        maker(path)
        found[form] = path
    return found


def fixed(path: Path, batch: int, target: Path) -> Path:
    """The graph with a static batch."""
    model = onnx.load(str(path))
    for entry in (*model.graph.input, *model.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    target.write_bytes(model.SerializeToString())
    return target
