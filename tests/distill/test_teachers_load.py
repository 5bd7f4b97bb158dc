"""Teachers of every kind: real files in, frozen outputs out, and an explanation for what does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.data import Dataset, InputSpec, Split
from distill.outputs import TeacherOutput
from distill.students import build_student
from distill.students.section import StudentSection
from distill.teachers import ModuleTeacher, Teacher, TeacherBatch, load_teacher
from distill.teachers.from_transformers import pool
from distill.teachers.section import TeacherSection
from distill.teachers.single_logit import is_single_logit, two_logits
from distill.teachers.teacher import NetworkTeacher
from profiles.errors import EdgestillError, InputError
from profiles.progress import Silent

WORDS = ("good", "bad", "film", "a", "very", "the", "plot", "acting")
COUNTS = {"train": 10, "validation": 4, "test": 3}


def images(classes: int = 4) -> Dataset:
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        pixels = generator.integers(0, 256, (count, 1, 16, 16), dtype=np.uint8)
        return Split(pixels, generator.integers(0, classes, count))

    return Dataset(
        name="images",
        task="multiclass",
        classes=tuple("abcdefgh"[:classes]),
        input=InputSpec("image", (1, 16, 16), (0.4,), (0.25,)),
        train=split(COUNTS["train"]),
        validation=split(COUNTS["validation"]),
        test=split(COUNTS["test"]),
        key="images",
    )


def texts() -> Dataset:
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        rows = tuple(" ".join(generator.choice(WORDS, generator.integers(1, 7))) for _ in range(count))
        return Split(generator.integers(0, 9, (count, 8)), generator.integers(0, 2, count), texts=rows)

    return Dataset(
        name="texts",
        task="multiclass",
        classes=("neg", "pos"),
        input=InputSpec("tokens", (8,), vocabulary=9),
        train=split(COUNTS["train"]),
        validation=split(COUNTS["validation"]),
        test=split(COUNTS["test"]),
        key="texts",
    )


def ask(teacher: Teacher, data: Dataset, split: Any = "train", rows: Any = (0, 3, 7)) -> TeacherOutput:
    chosen = np.array(rows, dtype=np.int64)
    return teacher.outputs(TeacherBatch(torch.from_numpy(data.split(split).inputs[chosen]), split, chosen))


def load(folder: Path, data: Dataset, **keys: Any) -> Teacher:
    return load_teacher(TeacherSection(**keys), data, base=folder, allow_code=True)


class Notes(Silent):
    """A progress that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def load_single(folder: Path, data: Dataset, **keys: Any) -> Teacher:
    """The teacher of one logit, which says for which class it is taken."""
    progress = Notes()
    teacher = load_teacher(TeacherSection(**keys), data, base=folder, allow_code=True, progress=progress)
    assert (teacher.num_logits, teacher.single_logit) == (2, True)
    assert f'one logit: taken for class "{data.classes[1]}"' in progress.notes[0]
    return teacher


# --- module ---------------------------------------------------------------------------------------------------------


def test_a_trained_module_is_frozen_and_its_head_known() -> None:
    data = images()
    module = build_student(StudentSection(), data.input, 4, arch="conv-w8-d1-k3", seed=0, base=Path())
    teacher = ModuleTeacher(module.train())
    teacher.assert_frozen()
    before = teacher.fingerprint()
    found = ask(teacher, data)
    assert found.embedding is not None
    assert found.logits is not None
    assert (teacher.embedding_dim, teacher.num_logits) == (found.embedding.shape[1], 4)
    assert not found.logits.requires_grad
    assert teacher.head_weight is not None
    assert teacher.head_bias is not None
    torch.testing.assert_close(found.embedding @ teacher.head_weight.T + teacher.head_bias, found.logits)
    assert teacher.fingerprint() == before
    module.head.weight.requires_grad_(True)
    with pytest.raises(EdgestillError, match=r"head\.weight"):
        teacher.assert_frozen()


# --- array ----------------------------------------------------------------------------------------------------------


def test_stored_arrays_come_back_row_by_row(tmp_path: Path) -> None:
    data, generator = images(), np.random.default_rng(2)
    embeddings = {name: generator.normal(size=(count, 5)).astype(np.float32) for name, count in COUNTS.items()}
    logits = {name: generator.normal(size=(count, 4)) for name, count in COUNTS.items()}
    from safetensors.numpy import save_file

    save_file(embeddings, tmp_path / "embeddings.safetensors")
    np.savez(tmp_path / "logits.npz", **logits)
    teacher = load(tmp_path, data, kind="array", embeddings="embeddings.safetensors", logits="logits.npz")
    assert (teacher.embedding_dim, teacher.num_logits, teacher.sees_views) == (5, 4, False)
    assert teacher.splits == ("train", "validation", "test")
    for split in COUNTS:
        found = ask(teacher, data, split, (2, 0))
        np.testing.assert_allclose(found.embedding, embeddings[split][[2, 0]])
        np.testing.assert_allclose(found.logits, logits[split][[2, 0]], rtol=1e-6)


def test_one_file_per_split_and_float16_files_are_read(tmp_path: Path) -> None:
    data = images()
    for name, count in COUNTS.items():
        np.save(tmp_path / f"{name}.npy", np.full((count, 3), 2.5, dtype=np.float16))
    keys = {"embeddings": "train.npy", "validation_embeddings": "validation.npy"}
    teacher = load(tmp_path, data, kind="array", **keys)
    assert teacher.splits == ("train", "validation")
    assert teacher.num_logits is None
    found = ask(teacher, data, "validation", (1, 2))
    assert found.embedding is not None
    assert found.embedding.dtype == torch.float32
    other = load(tmp_path, data, kind="array", embeddings="train.npy")
    assert other.key != teacher.key


def test_one_row_per_sample_of_the_source_serves_every_split_that_was_made_of_it(tmp_path: Path) -> None:
    everything = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.save(tmp_path / "all.npy", everything)
    rows = np.random.default_rng(1).permutation(20)
    data = images()
    splits = {
        name: dataclasses.replace(data.split(name), rows=rows[start : start + len(data.split(name))])
        for name, start in (("train", 0), ("validation", 10), ("test", 14))
    }
    splits = {name: dataclasses.replace(split, source="train", source_size=20) for name, split in splits.items()}
    teacher = load(tmp_path, dataclasses.replace(data, **splits), kind="array", embeddings="all.npy")
    assert teacher.splits == ("train", "validation", "test")
    for name, split in splits.items():
        expected = everything[split.rows[[0, 1]]]
        np.testing.assert_array_equal(ask(teacher, data, name, (0, 1)).embedding, expected)


def _spoiled(value: float) -> np.ndarray[Any, Any]:
    array = np.zeros((10, 5), dtype=np.float32)
    array[6, 2] = value
    array[8, 0] = value
    return array


@pytest.mark.parametrize(
    ("array", "key", "says"),
    [
        (np.zeros((9, 5)), "embeddings", "has 9 rows, the train split has 10 samples"),
        (_spoiled(float("nan")), "embeddings", "first bad row: 6 (counted from 0), value nan"),
        (_spoiled(float("-inf")), "embeddings", "first bad row: 6 (counted from 0), value -inf"),
        (np.zeros((10, 5, 2)), "embeddings", "shape (10, 5, 2)"),
        (np.zeros(10), "embeddings", "shape (10,)"),
        (np.full((10, 5), "x"), "embeddings", "not a table of numbers"),
        (np.zeros((10, 5)), "logits", "has 5 columns, the data set has 4 classes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, array: np.ndarray[Any, Any], key: str, says: str) -> None:
    np.save(tmp_path / "outputs.npy", array)
    with pytest.raises(InputError) as caught:
        load(tmp_path, images(), kind="array", **{key: "outputs.npy"})
    assert says in str(caught.value)
    assert "outputs.npy" in str(caught.value)
    assert caught.value.where == f"teacher.{key}"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", np.zeros((10, 5)))
    np.savez(tmp_path / "odd.npz", a=np.zeros((10, 5)), b=np.zeros((10, 5)))
    content = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(content[:150])
    (tmp_path / "short.safetensors").write_bytes(content[:20])
    (tmp_path / "table.csv").write_text("1,2")
    for name, says in (
        ("absent.npy", "no such file"),
        ("short.npy", "cannot read"),
        ("short.safetensors", "cannot read"),
        ("odd.npz", 'no array called "train"'),
        ("table.csv", "unknown kind"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            load(tmp_path, images(), kind="array", embeddings=name)
        assert name in str(caught.value)
    with pytest.raises(InputError, match="embeddings of the training split are missing"):
        load(tmp_path, images(), kind="array", logits="good.npy", validation_embeddings="good.npy")
    np.save(tmp_path / "validation.npy", np.zeros((4, 6)))
    with pytest.raises(InputError, match="has 6 columns, the training split's have 5"):
        load(tmp_path, images(), kind="array", embeddings="good.npy", validation_embeddings="validation.npy")


def test_one_logit_of_two_classes_becomes_two() -> None:
    z = torch.tensor([-3.0, 0.0, 0.5, 100.0])
    expected = torch.tensor([[0, -3.0], [0, 0], [0, 0.5], [0, 100]])
    for shape in ((4,), (4, 1)):
        torch.testing.assert_close(two_logits(z.reshape(shape)), expected)
    torch.testing.assert_close(two_logits(z).softmax(1)[:, 1], z.sigmoid())
    assert two_logits(z.half()).dtype == torch.float16
    two, three = images(classes=2), images(classes=3)
    for shape, data, single in (
        ((4, 1), two, True),
        ((4,), two, True),
        ((4, 2), two, False),
        ((), two, False),
        ((4, 1, 1), two, False),
        ((4, 1), three, False),
        ((4, 1), dataclasses.replace(two, task="multilabel"), False),
    ):
        assert is_single_logit(shape, data) is single


@pytest.mark.parametrize("vector", [False, True], ids=["column", "vector"])
def test_a_stored_single_logit_speaks_for_the_second_class(tmp_path: Path, vector: bool) -> None:
    data, generator = images(classes=2), np.random.default_rng(2)
    logits = {name: generator.normal(size=(count, 1)).astype(np.float32) for name, count in COUNTS.items()}
    np.savez(tmp_path / "z.npz", **{name: z[:, 0] if vector else z for name, z in logits.items()})
    teacher = load_single(tmp_path, data, kind="array", logits="z.npz")
    for split, z in logits.items():
        found = ask(teacher, data, split, (2, 0)).logits
        np.testing.assert_array_equal(found, np.concatenate([np.zeros((2, 1)), z[[2, 0]]], 1))
    # numbers of another type, and one file for the samples of all splits
    rows = np.random.default_rng(1).permutation(20)
    splits = {
        name: dataclasses.replace(
            data.split(name), rows=rows[start : start + COUNTS[name]], source="train", source_size=20
        )
        for name, start in (("train", 0), ("validation", 10), ("test", 14))
    }
    np.save(tmp_path / "all.npy", np.arange(20) if vector else np.arange(20).reshape(20, 1))
    teacher = load_single(tmp_path, dataclasses.replace(data, **splits), kind="array", logits="all.npy")
    for name, split in splits.items():
        found = ask(teacher, data, name, (0, 2)).logits
        np.testing.assert_array_equal(found, [[0, split.rows[0]], [0, split.rows[2]]])


def test_one_column_is_one_label_where_there_are_several_and_no_class_of_three(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.ones((10, 1)))
    np.save(tmp_path / "two.npy", np.ones((4, 2)))
    keys = {"kind": "array", "logits": "z.npy"}
    two = images(classes=2)
    with pytest.raises(InputError, match="has 1 columns, the data set has 3 classes"):
        load(tmp_path, images(classes=3), **keys)
    with pytest.raises(InputError, match="has 1 columns, the data set has 2 classes"):
        load(tmp_path, dataclasses.replace(two, task="multilabel"), **keys)
    with pytest.raises(InputError, match="has 2 columns, the training split's have 1"):
        load(tmp_path, two, **keys, validation_logits="two.npy")
    label = load(tmp_path, dataclasses.replace(two, task="multilabel", classes=("a",)), **keys)
    assert (label.num_logits, label.single_logit) == (1, False)
    embedding = load(tmp_path, two, kind="array", embeddings="z.npy")
    assert (embedding.embedding_dim, embedding.num_logits, embedding.single_logit) == (1, None, False)


# --- torch ----------------------------------------------------------------------------------------------------------

USER_CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=4, channels=3, squeeze=False):
        super().__init__()
        self.squeeze = squeeze
        self.conv = nn.Conv2d(channels, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, classes)

    def forward(self, x):
        output = self.fc(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))
        return output.squeeze(1) if self.squeeze else output
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"teacher_net_{tmp_path.name}"  # a name of its own, so that no test sees another's module
    (tmp_path / f"{name}.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{name}:Net"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_users_torch_teacher_gives_the_heads_input_and_output(tmp_path: Path, factory: str, suffix: str) -> None:
    import importlib

    module, _, name = factory.partition(":")
    network: nn.Module = getattr(importlib.import_module(module), name)()
    if suffix == ".pth":
        torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    else:
        from safetensors.torch import save_file

        save_file(network.state_dict(), tmp_path / "weights.safetensors")
    keys = {"kind": "torch", "factory": factory, "weights": f"weights{suffix}", "input_channels": 3}
    data = images()
    teacher = load(tmp_path, data, **keys, normalization="imagenet", input_size=24)
    found = ask(teacher, data)

    network.eval()
    pixels = torch.from_numpy(data.train.inputs[[0, 3, 7]]).float().expand(-1, 3, -1, -1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    resized = nn.functional.interpolate((pixels - mean) / std, size=(24, 24), mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(found.logits, network(resized), atol=1e-5, rtol=1e-5)
    assert found.embedding is not None
    assert teacher.head_weight is not None
    assert teacher.head_bias is not None
    torch.testing.assert_close(found.embedding @ teacher.head_weight.T + teacher.head_bias, found.logits)
    # two instances do not disturb each other
    other = load(tmp_path, data, kind="torch", factory=factory, input_channels=3, embedding_layer="conv")
    assert other.embedding_dim == 6
    assert other.key != teacher.key
    torch.testing.assert_close(ask(teacher, data).embedding, found.embedding)


def test_a_torch_teacher_of_another_task_gives_embeddings_alone(tmp_path: Path, factory: str) -> None:
    keys = {"kind": "torch", "factory": factory, "input_channels": 3}
    other_task = load(tmp_path, images(), **keys, kwargs={"classes": 7})
    assert (other_task.embedding_dim, other_task.num_logits, other_task.head_weight) == (6, None, None)
    left_out = load(tmp_path, images(), **keys, classification=False)
    assert (left_out.num_logits, ask(left_out, images()).logits) == (None, None)
    with pytest.raises(InputError, match="the data set has 4 classes"):
        load(tmp_path, images(), **keys, kwargs={"classes": 7}, classification=True)


@pytest.mark.parametrize("squeeze", [False, True], ids=["column", "vector"])
def test_a_torch_teachers_single_logit_and_head_are_those_of_two_classes(
    tmp_path: Path, factory: str, squeeze: bool
) -> None:
    data = images(classes=2)
    keys = {"kind": "torch", "factory": factory, "input_channels": 3, "kwargs": {"classes": 1, "squeeze": squeeze}}
    teacher = load_single(tmp_path, data, **keys)
    load_single(tmp_path, data, **keys, classification=True)
    found = ask(teacher, data)
    assert found.embedding is not None
    assert found.logits is not None
    assert isinstance(teacher, NetworkTeacher)
    network: Any = dict(teacher.network.named_children())["network"]
    z = found.embedding @ network.fc.weight.T + network.fc.bias
    torch.testing.assert_close(found.logits, torch.cat([torch.zeros(3, 1), z], 1))
    assert teacher.head_weight is not None
    assert teacher.head_bias is not None
    assert (teacher.head_weight.shape, teacher.head_bias.shape) == ((2, 6), (2,))
    assert not teacher.head_weight[0].any()
    assert teacher.head_bias[0] == 0
    torch.testing.assert_close(found.embedding @ teacher.head_weight.T + teacher.head_bias, found.logits)
    left_out = load(tmp_path, data, **keys, classification=False)
    assert (left_out.num_logits, left_out.single_logit, left_out.head_weight) == (None, False, None)
    several = load(tmp_path, dataclasses.replace(data, task="multilabel"), **keys)
    assert (several.num_logits, several.single_logit, several.head_weight) == (None, False, None)
    # where the output is no logit, a cache has other contents
    assert several.fingerprint() == teacher.fingerprint()
    assert several.key != teacher.key


def test_a_linear_that_is_not_the_output_is_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"two_linears_{tmp_path.name}"
    layers = "nn.Flatten(), nn.Linear(256, 6), nn.ReLU(), nn.Linear(6, classes)"
    (tmp_path / f"{name}.py").write_text(
        f"from torch import nn\n\ndef net(classes):\n    return nn.Sequential({layers})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for classes in (1, 2):
        teacher = load(
            tmp_path, images(classes=2), kind="torch", factory=f"{name}:net", kwargs={"classes": classes}, head="1"
        )
        assert (teacher.embedding_dim, teacher.num_logits, teacher.head_weight) == (256, 2, None)


def test_a_factory_without_weights_depends_on_the_seed_alone(tmp_path: Path, factory: str) -> None:
    section = TeacherSection(kind="torch", factory=factory, input_channels=3)
    keys = [load_teacher(section, images(), base=tmp_path, seed=s, allow_code=True).key for s in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_torch_teachers_that_do_not_fit_are_explained(tmp_path: Path, factory: str) -> None:
    torch.save({"fc.weight": torch.zeros(4, 6)}, tmp_path / "part.pth")
    good: dict[str, Any] = {"kind": "torch", "factory": factory, "input_channels": 3}
    for changes, says in (
        ({"weights": "part.pth"}, "part.pth do not fit"),
        ({"weights": "absent.pth"}, "no such weights file"),
        ({"embedding_layer": "convv"}, 'did you mean "conv"'),
        ({"head": "conv"}, "not a Linear"),
        ({"input_channels": None}, "does not run on this data"),
    ):
        with pytest.raises(InputError) as caught:
            load(tmp_path, images(), **(good | changes))
        assert says in str(caught.value)


# --- onnx -----------------------------------------------------------------------------------------------------------


class TwoOutputs(nn.Module):
    """Inputs -> (embedding, logits); `pixels` says whether it takes raw uint8, `vector` drops the logits' dimension."""

    def __init__(self, channels: int, pixels: bool, classes: int = 4, vector: bool = False) -> None:
        super().__init__()
        self.conv, self.fc, self.pixels = nn.Conv2d(channels, 6, 3, stride=2), nn.Linear(6, classes), pixels
        self.vector = vector

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.float() / 255 if self.pixels else x
        embedding = self.conv(x).relu().mean((2, 3))
        logits = self.fc(embedding)
        return embedding, logits.squeeze(1) if self.vector else logits


def export(network: nn.Module, example: torch.Tensor, file: Path, *, dynamic: bool = True) -> None:
    torch.onnx.export(
        network.eval(),
        (example,),
        str(file),
        input_names=["x"],
        output_names=["embedding", "logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic else None,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic-batch", "batch-of-two"])
def test_an_onnx_teacher_is_scaled_as_its_graph_wants(tmp_path: Path, dynamic: bool) -> None:
    torch.manual_seed(0)
    network, data = TwoOutputs(3, pixels=False), images()
    export(network, torch.zeros(2, 3, 24, 24), tmp_path / "t.onnx", dynamic=dynamic)
    keys = {"kind": "onnx", "file": "t.onnx", "output": "logits", "embedding_output": "embedding"}
    teacher = load(tmp_path, data, **keys, mean=(0.5,), std=(0.5,))
    assert (teacher.embedding_dim, teacher.num_logits) == (6, 4)
    found = ask(teacher, data, rows=(0, 3, 7))  # three rows also fill up a fixed batch of two
    pixels = (torch.from_numpy(data.train.inputs[[0, 3, 7]]).float() / 255 - 0.5) / 0.5
    resized = nn.functional.interpolate(pixels.expand(-1, 3, -1, -1), size=(24, 24), mode="bilinear")
    with torch.no_grad():
        embedding, logits = network(resized)
    torch.testing.assert_close(found.embedding, embedding, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.logits, logits, atol=1e-4, rtol=1e-4)


def test_an_onnx_teacher_of_raw_pixels_gets_raw_pixels(tmp_path: Path) -> None:
    network, data = TwoOutputs(1, pixels=True), images()
    export(network, torch.zeros(2, 1, 16, 16, dtype=torch.uint8), tmp_path / "t.onnx")
    teacher = load(tmp_path, data, kind="onnx", file="t.onnx", embedding_output="embedding")
    assert teacher.num_logits is None
    with torch.no_grad():
        expected = network(torch.from_numpy(data.train.inputs[[0, 3, 7]]))[0]
    torch.testing.assert_close(ask(teacher, data).embedding, expected, atol=1e-4, rtol=1e-4)

    for changes, says in (
        ({"embedding_output": "embeding"}, 'did you mean "embedding"'),
        ({"file": "absent.onnx"}, "no such file"),
        ({"file": "broken.onnx"}, "not an ONNX file, or damaged"),
    ):
        (tmp_path / "broken.onnx").write_bytes((tmp_path / "t.onnx").read_bytes()[:200])
        with pytest.raises(InputError, match=says):
            load(tmp_path, data, **({"kind": "onnx", "file": "t.onnx", "embedding_output": "embedding"} | changes))
    with pytest.raises(InputError, match="4 logits, the data set has 3 classes"):
        load(tmp_path, images(classes=3), kind="onnx", file="t.onnx", output="logits")
    with pytest.raises(InputError, match="does not fit the data"):
        load(tmp_path, texts(), kind="onnx", file="t.onnx", output="logits")


@pytest.mark.parametrize("vector", [False, True], ids=["column", "vector"])
def test_an_onnx_teachers_single_logit_speaks_for_the_second_class(tmp_path: Path, vector: bool) -> None:
    torch.manual_seed(0)
    network, data = TwoOutputs(1, pixels=True, classes=1, vector=vector), images(classes=2)
    export(network, torch.zeros(2, 1, 16, 16, dtype=torch.uint8), tmp_path / "t.onnx")
    keys = {"kind": "onnx", "file": "t.onnx", "output": "logits", "embedding_output": "embedding"}
    teacher = load_single(tmp_path, data, **keys)
    found = ask(teacher, data)
    with torch.no_grad():
        embedding, z = network(torch.from_numpy(data.train.inputs[[0, 3, 7]]))
    torch.testing.assert_close(found.embedding, embedding, atol=1e-4, rtol=1e-4)
    expected = torch.stack([torch.zeros(3), z.reshape(3)], 1)
    torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="shape" if vector else "1 logits, the data set has 3 classes"):
        load(tmp_path, images(classes=3), **keys)


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT classifier with its own word tokenizer, as save_pretrained writes it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=2,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_a_transformer_reads_the_raw_texts_with_its_own_tokenizer(bert: Path, pooling: str) -> None:
    import transformers

    data = texts()
    teacher = load(bert.parent, data, kind="transformers", model=bert.name, pooling=pooling)
    assert (teacher.embedding_dim, teacher.num_logits, teacher.sees_views) == (16, None, False)
    found = ask(teacher, data, "validation", (2, 0, 3)).embedding
    model = transformers.AutoModel.from_pretrained(bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    assert data.validation.texts is not None
    for row, embedding in zip((2, 0, 3), found, strict=True):  # one by one: nothing is padded
        with torch.no_grad():
            hidden = model(**tokenizer([data.validation.texts[row]], return_tensors="pt")).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "last": hidden[-1]}[pooling]
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)


def test_a_classifiers_logits_are_taken_when_asked_for(bert: Path) -> None:
    import transformers

    data = texts()
    teacher = load(bert.parent, data, kind="transformers", model=bert.name, classification=True)
    assert teacher.num_logits == 2
    assert data.train.texts is not None
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(bert)([data.train.texts[3]], return_tensors="pt")
    with torch.no_grad():
        expected = model(**encoded).logits
    torch.testing.assert_close(ask(teacher, data, rows=(3,)).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_classifier_of_one_label_speaks_for_the_second_class(bert: Path, tmp_path: Path) -> None:
    import shutil

    import transformers

    shutil.copytree(bert, tmp_path / "one")
    torch.manual_seed(1)
    config = transformers.AutoConfig.from_pretrained(bert, num_labels=1)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "one")
    data = texts()
    keys = {"kind": "transformers", "model": "one", "classification": True}
    teacher = load_single(tmp_path, data, **keys)
    assert data.test.texts is not None
    encoded = transformers.AutoTokenizer.from_pretrained(bert)([data.test.texts[1]], return_tensors="pt")
    with torch.no_grad():
        z = model(**encoded).logits
    assert z.shape == (1, 1)
    found = ask(teacher, data, "test", (1,)).logits
    torch.testing.assert_close(found, torch.tensor([[0.0, z.item()]]), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="1 labels, the data set has 3 classes"):
        load(tmp_path, dataclasses.replace(data, classes=("a", "b", "c")), **keys)


def test_an_image_transformer_uses_its_processors_size_and_scaling(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import json

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "vit")
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        "size": {"height": 32, "width": 32},
    }
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    data = images()
    teacher = load(tmp_path, data, kind="transformers", model="vit", pooling="cls")
    assert teacher.sees_views
    pixels = torch.from_numpy(data.train.inputs[[0, 3, 7]]).float().expand(-1, 3, -1, -1) / 255
    scaled = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    resized = nn.functional.interpolate(scaled, size=(32, 32), mode="bilinear")
    with torch.no_grad():
        expected = model(pixel_values=resized).last_hidden_state[:, 0]
    torch.testing.assert_close(ask(teacher, data).embedding, expected, atol=1e-4, rtol=1e-4)


def test_transformers_that_do_not_fit_are_explained(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot load"):
        load(bert.parent, texts(), kind="transformers", model="no-such/model")
    with pytest.raises(InputError, match="no such folder"):
        load(bert.parent, texts(), kind="transformers", model="./absent")
    data = texts()
    with pytest.raises(InputError, match="no texts"):
        load(bert.parent, replace(data, train=replace(data.train, texts=None)), kind="transformers", model=bert.name)
    three = replace(data, classes=("a", "b", "c"))
    with pytest.raises(InputError, match="2 labels, the data set has 3 classes"):
        load(bert.parent, three, kind="transformers", model=bert.name, classification=True)


def test_pooling_ignores_padding_on_either_side() -> None:
    hidden = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    junk = torch.full((1, 2, 4), 99.0)
    for name in ("mean", "cls", "max", "last"):
        right = pool(torch.cat([hidden, junk], 1), torch.tensor([[1, 1, 1, 0, 0]]), name)  # type: ignore[arg-type]
        left = pool(torch.cat([junk, hidden], 1), torch.tensor([[0, 0, 1, 1, 1]]), name)  # type: ignore[arg-type]
        torch.testing.assert_close(right, pool(hidden, None, name))  # type: ignore[arg-type]
        torch.testing.assert_close(left, right)
    maps = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(pool(maps, None, "mean"), maps.mean((2, 3)))
