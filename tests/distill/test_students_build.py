"""Students: right shapes, reproducible weights, padding that changes nothing, and graphs that export."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.data import InputSpec
from distill.networks import Normalize
from distill.students import Student, build_student, default_arch, load_student, save_student
from distill.students.section import StudentSection
from profiles.errors import InputError

IMAGES = InputSpec("image", (1, 28, 28), (0.286,), (0.353,))
COLOUR = InputSpec("image", (3, 224, 224), (0.48, 0.45, 0.4), (0.22, 0.22, 0.23))
ROOT = Path(__file__).parents[2]
TOKENS = InputSpec("tokens", (12,), vocabulary=40, pad_id=0)


def example(spec: InputSpec, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if spec.kind == "image":
        return torch.randint(0, 256, (count, *spec.shape), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, spec.vocabulary, (count, *spec.shape), generator=generator)
    lengths = torch.randint(1, spec.shape[0] + 1, (count, 1), generator=generator)
    return torch.where(torch.arange(spec.shape[0]) < lengths, tokens, spec.pad_id)


def build(arch: str, spec: InputSpec, *, seed: int = 0, head_size: int = 5) -> Student:
    return build_student(StudentSection(), spec, head_size, arch=arch, seed=seed, base=Path())


class Logits(nn.Module):
    """What export sees: inputs -> logits."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x).head  # type: ignore[no-any-return]


def export_and_compare(student: Student, spec: InputSpec, file: Path) -> Any:
    """Exports with a dynamic batch and compares at batch sizes 1, 2 and 5; returns the graph."""
    import onnx
    import onnxruntime as ort

    model = Logits(student).eval()
    torch.onnx.export(
        model,
        (example(spec, 2),),
        str(file),
        input_names=[spec.name],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        opset_version=20,
        external_data=False,
        verbose=False,
    )
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        x = example(spec, count, seed=count)
        with torch.no_grad():
            expected = model(x).numpy()
        (found,) = session.run(["logits"], {spec.name: x.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    return onnx.load(str(file)).graph


@pytest.mark.parametrize(
    ("arch", "spec", "embedding"),
    [
        ("conv-w8-d1-k3", IMAGES, 32),
        ("conv-w8-d2-k5", IMAGES, 32),
        ("convi-w8-d2-k3", IMAGES, 32),
        ("conv-w8-d1-k3", COLOUR, 64),
        ("convi-w4-d1-k7", COLOUR, 32),
        ("conv-w4-d1-k3", InputSpec("image", (1, 8, 8), (0.5,), (0.3,)), 8),
        ("conv-w4-d1-k3", InputSpec("image", (3, 20, 50), (0.5,) * 3, (0.3,) * 3), 32),
        ("text-w32-d2-h4", TOKENS, 32),
        ("textc-w32-d2-k5", TOKENS, 32),
    ],
)
def test_embedding_and_head_have_the_promised_shapes(arch: str, spec: InputSpec, embedding: int) -> None:
    student = build(arch, spec)
    out = student(example(spec, 3))
    assert (student.arch, student.embedding_dim, student.head_size) == (arch, embedding, 5)
    assert out.embedding.shape == (3, embedding)
    assert out.head.shape == (3, 5)
    assert out.head.dtype == torch.float32
    out.head.sum().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_the_narrowest_student_trains_on_images_in_channels_last_order() -> None:
    # in a process of its own: what this guards against writes past the end of its memory
    code = (
        "import torch; from tests.distill.test_students_build import IMAGES, build, example\n"
        "student = build('conv-w4-d1-k3', IMAGES).to(memory_format=torch.channels_last)\n"
        "x = example(IMAGES, 64).contiguous(memory_format=torch.channels_last)\n"
        "for _ in range(20): student(x).head.square().sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_narrowest_student_gives_the_same_with_and_without_gradients() -> None:
    student, x = build("conv-w4-d2-k5", IMAGES).eval(), example(IMAGES, 8)
    with torch.no_grad():
        expected = student(x)
    torch.testing.assert_close(student(x).head, expected.head, atol=1e-6, rtol=1e-5)


def test_normalisation_is_the_first_layer_and_follows_the_spec() -> None:
    layer = Normalize((0.5, 0.25, 0.1), (0.2, 0.5, 0.0))
    x = example(InputSpec("image", (3, 4, 4)), 2)
    expected = x.double() / 255 - torch.tensor([0.5, 0.25, 0.1]).double().view(1, 3, 1, 1)
    expected /= torch.tensor([0.2, 0.5, 1.0]).double().view(1, 3, 1, 1)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert layer(channels_last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("arch", "spec"), [("conv-w8-d1-k3", IMAGES), ("text-w32-d1-h2", TOKENS)])
def test_weights_depend_on_the_seed_alone_and_the_global_generator_is_untouched(arch: str, spec: InputSpec) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(arch, spec, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    same, other = build(arch, spec, seed=3), build(arch, spec, seed=4)
    for a, b in zip(first.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("arch", ["text-w32-d2-h4", "textc-w32-d2-k5"])
def test_padding_changes_nothing(arch: str) -> None:
    student = build(arch, TOKENS).eval()
    short = InputSpec("tokens", (7,), vocabulary=40)
    tokens = example(short, 4)
    padded = torch.nn.functional.pad(tokens, (0, 5), value=0)
    with torch.no_grad():
        whole = student(padded).embedding
        student.body.positions.data = student.body.positions.data[:7]
        torch.testing.assert_close(student(tokens).embedding, whole, atol=1e-5, rtol=1e-5)


def test_a_text_of_padding_alone_gives_finite_output() -> None:
    student = build("text-w32-d2-h4", TOKENS)
    out = student(torch.zeros(2, 12, dtype=torch.int64))
    assert torch.equal(out.embedding, torch.zeros_like(out.embedding))
    out.head.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("arch", "spec"),
    [("conv-w8-d1-k3", IMAGES), ("convi-w8-d1-k3", IMAGES), ("text-w32-d1-h2", TOKENS), ("textc-w32-d1-k5", TOKENS)],
)
def test_every_family_exports_with_a_dynamic_batch(arch: str, spec: InputSpec, tmp_path: Path) -> None:
    graph = export_and_compare(build(arch, spec), spec, tmp_path / "student.onnx")
    operators = {node.op_type for node in graph.node}
    assert "BatchNormalization" not in operators or "textc" in arch  # folded into the convolutions
    assert "Gemm" in operators


class PretrainedNet(nn.Module):
    """A user's network: three float channels, a Linear called `classifier` at the end."""

    def __init__(self, hidden: int = 12, after: str = "nothing") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, hidden, 3, stride=4)
        self.classifier = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(hidden), nn.Linear(hidden, 1000))
        self.after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.classifier(self.conv(x).relu())
        return out.softmax(-1) if self.after == "softmax" else out


USER_CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, hidden=12, softmax=False):
        super().__init__()
        self.conv = nn.Conv2d(3, hidden, 3, stride=4)
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(hidden, 100))
        self.softmax = softmax

    def forward(self, x):
        out = self.classifier(self.conv(x).relu().mean((2, 3)))
        return out.softmax(-1) if self.softmax else out

def no_module():
    return 3
"""


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_net_{tmp_path.name}"  # a name of its own, so that no test sees another's module
    (tmp_path / f"{name}.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_without_family_and_arch_the_data_decides_and_a_wrong_family_is_refused() -> None:
    student = build_student(StudentSection(), TOKENS, 3, seed=0, base=Path())
    assert student.arch == default_arch("text", "medium", TOKENS)
    assert student(example(TOKENS, 2)).head.shape == (2, 3)
    with pytest.raises(InputError, match="reads images") as caught:
        build_student(StudentSection(family="conv", arch="text-w64-d2-h4"), TOKENS, 3, seed=0, base=Path())
    assert caught.value.where == "student.family"


def torch_student(section: StudentSection, base: Path, *, seed: int = 0) -> Student:
    return build_student(section, IMAGES, 10, seed=seed, base=base, allow_code=True)


def test_a_users_network_becomes_a_student_that_exports(tmp_path: Path, user_code: str) -> None:
    section = StudentSection(
        kind="torch",
        factory=f"{user_code}:Net",
        kwargs={"hidden": 16},
        normalization="imagenet",
        input_channels=3,
        input_size=32,
    )
    student = torch_student(section, tmp_path)
    assert (student.arch, student.embedding_dim, student.head_size) == ("torch-Net", 16, 10)
    out = student(example(IMAGES, 3))
    assert out.embedding.shape == (3, 16)
    assert student.training
    assert torch.equal(student.head.weight, torch_student(section, tmp_path).head.weight)
    graph = export_and_compare(student, IMAGES, tmp_path / "student.onnx")
    assert {"Conv", "Gemm"} <= {node.op_type for node in graph.node}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_initial_weights_are_loaded_and_the_old_head_is_not_needed(tmp_path: Path, user_code: str, suffix: str) -> None:
    section = StudentSection(kind="torch", factory=f"{user_code}:Net", input_channels=3, head="classifier.1")
    state = {"conv.weight": torch.full((12, 3, 3, 3), 0.5), "conv.bias": torch.zeros(12)}
    file = tmp_path / f"init{suffix}"
    if suffix == ".pth":
        torch.save(state, file)
    else:
        from safetensors.torch import save_file

        save_file(state, file)
    student = torch_student(section.model_copy(update={"weights": file.name}), tmp_path)
    assert torch.equal(student.body.network.conv.weight, state["conv.weight"])

    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(InputError, match=f"init{suffix}"):
        torch_student(section.model_copy(update={"weights": file.name}), tmp_path)


def test_weights_that_do_not_fit_name_the_first_offender(tmp_path: Path, user_code: str) -> None:
    torch.save({"conv.weight": torch.zeros(5, 3, 3, 3), "other": torch.zeros(1)}, tmp_path / "init.pth")
    section = StudentSection(kind="torch", factory=f"{user_code}:Net", input_channels=3, weights="init.pth")
    with pytest.raises(
        InputError, match=r"conv\.bias.*other.*conv\.weight: file \(5, 3, 3, 3\), model \(12, 3, 3, 3\)"
    ):
        torch_student(section, tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, user_code: str) -> None:
    torch.save(PretrainedNet(), tmp_path / "model.pth")  # a whole model, not a state dict
    section = StudentSection(kind="torch", factory=f"{user_code}:Net", input_channels=3, weights="model.pth")
    with pytest.raises(InputError, match=r"model\.pth"):
        torch_student(section, tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kwargs": {"softmax": True}}, "is not the last layer"),
        ({"head": "classifier.0"}, "is a Dropout, not a Linear"),
        ({"head": "classifer.1"}, 'did you mean "classifier.1"'),
        ({"kwargs": {"nonsense": 1}}, "nonsense"),
        ({"input_channels": None}, "does not run on this data"),
        ({"mean": (0.1, 0.2), "std": (1.0, 1.0)}, "2 values, the network's input has 3 channels"),
    ],
)
def test_a_users_network_that_cannot_be_a_student_is_explained(
    tmp_path: Path, user_code: str, changes: dict[str, Any], says: str
) -> None:
    section = StudentSection(kind="torch", factory=f"{user_code}:Net", input_channels=3)
    with pytest.raises(InputError) as caught:
        torch_student(section.model_copy(update=changes), tmp_path)
    assert says in str(caught.value)


def test_code_of_a_recipe_runs_only_when_allowed_and_must_give_a_module(tmp_path: Path, user_code: str) -> None:
    section = StudentSection(kind="torch", factory=f"{user_code}:Net", input_channels=3)
    with pytest.raises(InputError, match="allow-code"):
        build_student(section, IMAGES, 10, seed=0, base=tmp_path)
    with pytest.raises(InputError, match=r"not a torch\.nn\.Module"):
        torch_student(StudentSection(kind="torch", factory=f"{user_code}:no_module"), tmp_path)


def test_saved_students_load_bit_for_bit_and_damaged_files_are_named(tmp_path: Path) -> None:
    student, other = build("conv-w8-d1-k3", IMAGES, seed=1).eval(), build("conv-w8-d1-k3", IMAGES, seed=2).eval()
    file = tmp_path / "student.safetensors"
    save_student(student, file)
    load_student(other, file)
    x = example(IMAGES, 2)
    assert torch.equal(student(x).head, other(x).head)

    with pytest.raises(InputError, match="do not fit"):
        load_student(build("conv-w12-d1-k3", IMAGES), file)
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"\xff" * 64, b""):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"student\.safetensors"):
            load_student(other, file)
    with pytest.raises(InputError, match="no such"):
        load_student(other, tmp_path / "absent.safetensors")


def test_an_architecture_for_another_kind_of_input_is_refused() -> None:
    with pytest.raises(InputError, match="reads texts"):
        build("text-w32-d1-h2", IMAGES)
