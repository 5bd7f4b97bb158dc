"""`edgestill init`: what it recognises, what it writes, and that it never destroys a file."""

from __future__ import annotations

import io
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cli.own_data import look_at
from cli.pipeline.exploration import check_explored
from cli.recipe import load_recipe
from profiles.errors import InputError
from tests.cli.cli_runner import Result, edgestill


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), size: tuple[int, int] = (28, 28)) -> Path:
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(3):
            pixels = rng.integers(0, 255, (size[1] + index * (size[1] > 28), size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def init(*options: str) -> Result:
    return edgestill("init", "--yes", *options)


def test_an_image_folder_becomes_a_recipe_for_every_device(here: Path) -> None:
    images(here / "my photos!", size=(60, 50))
    result = init(
        *("--data", "my photos!", "--device", "raspberry-pi-5", "--device", "jetson-orin-nano", "--device"),
        *("raspberry-pi-5", "--latency-ms", "20", "--metric-floor", "0.8"),
    )
    assert result.status == 0, result.err
    recipe = load_recipe("recipe.toml").recipe
    assert recipe.name == "my-photos"
    assert (recipe.data.source, recipe.data.path, recipe.data.image_size) == ("imagefolder", "my photos!", 128)
    assert [target.name for target in recipe.target] == ["raspberry-pi-5", "jetson-orin-nano", "raspberry-pi-5-3"]
    assert {target.latency_ms for target in recipe.target} == {20.0}
    assert {target.metric_floor for target in recipe.target} == {0.8}
    assert "edgestill run recipe.toml" in result.out


def test_every_key_has_a_comment_above_it(here: Path) -> None:
    images(here / "photos")
    init("--data", "photos", "--device", "jetson-orin-nano")
    lines = Path("recipe.toml").read_text().splitlines()
    for previous, line in pairwise(lines):
        key = line.removeprefix("# ").partition(" = ")[0]
        if " = " in line and key.isidentifier() and not line.startswith("# '"):
            assert previous.startswith("# "), line
            assert " = " not in previous, line
    assert tomllib.loads(switched_on(lines))["target"][0]["memory_mib"] == 500.0


def switched_on(lines: list[str]) -> str:
    """The recipe with every key and table that is only shown."""
    shown = (" = " in line or line.startswith("# [") for line in lines)
    return "\n".join(line.removeprefix("# ") if on else line for line, on in zip(lines, shown, strict=True))


@pytest.mark.parametrize(("data", "kind"), [("photos", "random"), ("a.csv", "real")])
def test_what_is_for_few_labels_is_shown_and_valid(here: Path, data: str, kind: str) -> None:
    images(here / "photos", size=(60, 50))
    Path("a.csv").write_text("text,label\nhello,x\nhi,y\n")
    init("--data", data)
    assert load_recipe("recipe.toml").recipe.explore.kind == "none"
    Path("all.toml").write_text(switched_on(Path("recipe.toml").read_text().splitlines()))
    recipe = load_recipe("all.toml").recipe
    check_explored(recipe)
    assert recipe.explore.kind == kind
    assert recipe.data.unlabelled is not None
    assert recipe.data.imbalance == "exp:100"


def test_a_teacher_that_cannot_be_asked_is_shown_no_exploration(here: Path) -> None:
    init("--teacher", "none")
    assert "[explore]\n" not in Path("recipe.toml").read_text()


TABLES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "a.csv",
        "text,label,split\nhello,x,train\n",
        {"text_column": "text", "label_column": "label", "split_column": "split"},
    ),
    ("a.jsonl", '{"image": "1.png", "class": "x"}\n', {"image_column": "image", "label_column": "class"}),
]


@pytest.mark.parametrize(("name", "content", "expected"), TABLES, ids=[entry[0] for entry in TABLES])
def test_the_columns_of_a_table_are_recognised(here: Path, name: str, content: str, expected: dict[str, Any]) -> None:
    (here / name).write_text(content)
    assert init("--data", name).status == 0
    data = load_recipe("recipe.toml").recipe.data
    assert data.source == Path(name).suffix[1:]
    assert {key: getattr(data, key) for key in expected} == expected


def test_texts_get_a_text_student(here: Path) -> None:
    (here / "a.csv").write_text("review,label\nfine,1\n")
    init("--data", "a.csv")
    assert load_recipe("recipe.toml").recipe.student.family == "text"


def test_parquet_and_npz_are_recognised(here: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"sentence": ["a"], "label": [0]}), here / "a.parquet")
    assert (look_at("a.parquet").source, look_at("a.parquet").text_column) == ("parquet", "sentence")
    np.savez(here / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(2, np.int64))
    assert init("--data", "a.npz").status == 0
    assert load_recipe("recipe.toml").recipe.data.source == "npz"


def test_one_column_per_class_is_taken_for_several_labels(here: Path) -> None:
    (here / "a.csv").write_text("image,red,round,soft\n1.png,0,1,1\n")
    assert init("--data", "a.csv", "--task", "multilabel").status == 0
    assert load_recipe("recipe.toml").recipe.data.label_columns == ("red", "round", "soft")


@pytest.mark.parametrize("name", ["fashion-mnist-small", "movie-snippets", "owner/some-data"])
def test_a_catalogue_or_hub_name_is_a_source(name: str) -> None:
    assert init("--data", name).status == 0
    recipe = load_recipe("recipe.toml").recipe
    assert recipe.data.source == name
    assert recipe.student.family == ("text" if name == "movie-snippets" else "conv")


def test_small_images_of_one_size_keep_it(here: Path) -> None:
    assert look_at(str(images(here / "small"))).image_size is None
    assert look_at(str(images(here / "large", size=(300, 200)))).image_size == 128


def test_split_folders_are_looked_into(here: Path) -> None:
    images(here / "photos" / "train", classes=("a", "b", "c"))
    images(here / "photos" / "test", classes=("a", "b", "c"))
    assert "3 folders of images: a, b, c" in look_at("photos").seen


@pytest.mark.parametrize(
    ("teacher", "objective"),
    [
        ("train", "kd"),
        ("none", "supervised"),
        ("array:embeddings.npy", "embedding_compression"),
        ("transformers:owner/model", "embedding_compression"),
        ("torch:timm:create_model", "embedding_compression"),
        ("onnx:teacher.onnx", "embedding_compression"),
    ],
)
def test_every_teacher_gets_a_recipe_that_loads(here: Path, teacher: str, objective: str) -> None:
    import onnx
    from onnx import TensorProto, helper

    np.save(here / "embeddings.npy", np.zeros((3, 4), np.float32))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["features"])], "g", [value], [features])
    onnx.save(helper.make_model(graph), here / "teacher.onnx")
    result = init("--teacher", teacher)
    assert result.status == 0, result.err
    recipe = load_recipe("recipe.toml").recipe
    assert recipe.teacher.kind == teacher.partition(":")[0]
    assert recipe.objective[0].kind == objective
    if recipe.teacher.kind == "onnx":
        assert recipe.teacher.embedding_output == "features"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "nowhere"], "there is no nowhere"),
        (["--teacher", "trian"], 'did you mean "train"?'),
        (["--teacher", "array"], "--teacher array:embeddings.npy"),
        (["--teacher", "array:missing.npy"], "there is no file missing.npy"),
        (["--device", "jetson-orin-nan"], "jetson-orin-nano"),
        (["--latency-ms", "-3"], "latency_ms"),
        (["--metric-floor", "80"], "metric_floor"),
        (["--out", "no/such/folder/a.toml"], "mkdir"),
        (["--task", "regression"], "multiclass"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_explained_and_nothing_is_written(here: Path, options: list[str], said: str) -> None:
    result = init(*options)
    assert result.status == 2
    assert said in result.err
    assert list(here.iterdir()) == []


def test_unusable_data_is_explained(here: Path) -> None:
    (here / "notes.txt").write_text("hello")
    (here / "bad.npz").write_text("not an archive")
    (here / "empty").mkdir()
    images(here / "one", classes=("only",))
    for place, said in (
        ("notes.txt", "no known kind"),
        ("bad.npz", "cannot read"),
        ("empty", "holds no data"),
        ("one", "all images are in one class"),
    ):
        with pytest.raises(InputError, match=said):
            look_at(place)


def test_an_existing_file_is_kept_unless_forced(here: Path) -> None:
    Path("recipe.toml").write_text("mine")
    result = init()
    assert result.status == 2
    assert "--force" in result.err
    assert Path("recipe.toml").read_text() == "mine"
    assert init("--force").status == 0
    assert load_recipe("recipe.toml").recipe.data.source == "fashion-mnist-small"


def test_it_asks_for_what_the_options_do_not_say(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "a.csv").write_text("picture,kind\n1.png,x\n")
    answers = ["a.csv", "", "images", "picture", "kind", "none", "raspberry-pi-5, t4", "15", "0.5"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(answers) + "\n"))
    result = edgestill("init")
    assert result.status == 0, result.err
    assert result.out.startswith("wrote recipe.toml")
    recipe = load_recipe("recipe.toml").recipe
    assert (recipe.data.image_column, recipe.data.label_column) == ("picture", "kind")
    assert [target.device for target in recipe.target] == ["raspberry-pi-5", "t4"]
    assert result.err.count("Which of these holds the images: picture, kind") == 1
    assert [(target.latency_ms, target.metric_floor) for target in recipe.target] == [(15.0, 0.5)] * 2


def test_an_answer_that_is_none_of_the_choices_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nmultilable\n"))
    result = edgestill("init")
    assert result.status == 2
    assert 'did you mean "multilabel"?' in result.err
    assert list(here.iterdir()) == []


def test_without_anybody_to_answer_it_names_the_unattended_form(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    result = edgestill("init")
    assert result.status == 2
    assert "--yes" in result.err
    assert list(here.iterdir()) == []


def test_the_recipe_is_relative_to_its_own_folder(here: Path) -> None:
    images(here / "project" / "photos")
    assert init("--data", "project/photos", "--out", "project/a.toml").status == 0
    assert load_recipe("project/a.toml").recipe.data.path == "photos"
    images(here / "elsewhere")
    assert init("--data", "elsewhere", "--out", "project/b.toml").status == 0
    assert load_recipe("project/b.toml").recipe.data.path == str((here / "elsewhere").resolve())
