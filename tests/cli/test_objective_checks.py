"""What an objective cannot do with this teacher is refused before any teacher is trained or cached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from cli.pipeline import Run
from cli.recipe import load_recipe
from distill.data.make_fashion_mnist_small import PACKAGED
from distill.objectives.section import ObjectiveSections, check_subclasses, check_teacher
from distill.students import build_student
from distill.teachers.section import TeacherSection
from profiles.errors import InputError
from tests.cli.cli_runner import edgestill

RECIPE = """
name = "small"
objective = {objective}

[data]
source = "npz"
path = "{data}.npz"

[data.augment]
crop = 1
views = 1

[teacher]
{teacher}

[train]
epochs = 1
hard_weight = 0.5

[[target]]
name = "rtx"
device = "rtx-4060-laptop"
arch = "conv-w8-d1-k3"
"""
TRAINED = 'arch = "conv-w12-d1-k3"\nepochs = 1'
STORED = 'kind = "array"\nembeddings = "embedding.npy"'
STORED_DIM = 12
READ = TypeAdapter(ObjectiveSections).validate_python
FROZEN = '{kind = "ec", schedule = "frozen", fit_epochs = 1'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes, the same without labels, and a frozen teacher's embeddings."""
    folder = tmp_path_factory.mktemp("clothes")
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:300], stored["train_labels"][:300]
    np.savez_compressed(folder / "three.npz", images=images, labels=labels % 3)
    np.savez_compressed(folder / "unlabelled.npz", images=images)
    random = np.random.default_rng(0)
    embedding = images.reshape(300, -1) @ random.normal(size=(784, STORED_DIM)).astype(np.float32)
    np.save(folder / "embedding.npy", embedding)
    np.save(folder / "narrow.npy", embedding[:, :2])
    return folder


def write(folder: Path, objective: str, *, data: str = "three", teacher: str = TRAINED) -> Path:
    path = folder / "small.toml"
    path.write_text(RECIPE.format(objective=objective, data=data, teacher=teacher))
    return path


def open_run(folder: Path, out: Path, objective: str, teacher: str = TRAINED) -> Run:
    return Run(load_recipe(str(write(folder, objective, teacher=teacher))), out)


def dimension(folder: Path, out: Path, arch: str) -> int:
    """The size of that network's embedding."""
    run = open_run(folder, out, '"kd"')
    student = run.recipe.student
    return build_student(student, run.dataset.input, 3, arch=arch, seed=0, base=run.loaded.base).embedding_dim


def lelp(subclasses: int, options: str = "") -> str:
    return f'{{kind = "lelp", subclasses_per_class = {subclasses}{options}}}'


NULL = ", null_space = false"
ON = ', on = "compressed"'


@pytest.mark.parametrize(
    ("before", "options", "teacher", "size", "taken"),
    [
        ("", "", TRAINED, "conv-w12-d1-k3", 2),
        ("", NULL, TRAINED, "conv-w12-d1-k3", 0),
        ("", "", STORED, STORED_DIM, 2),
        ("", NULL, STORED, STORED_DIM, 0),
        ('{kind = "fitnet"}, ', ', projection = "random"', STORED, STORED_DIM, 2),
        (FROZEN + ", dimension = 5}, ", ON, TRAINED, 5, 2),
        (FROZEN + ", dimension = 5}, ", ON + NULL, STORED, 5, 0),
        (FROZEN + "}, ", ON, TRAINED, "conv-w8-d1-k3", 2),
    ],
)
def test_subclasses_that_the_embedding_has_no_directions_for_are_refused_first(
    folder: Path, tmp_path: Path, before: str, options: str, teacher: str, size: int | str, taken: int
) -> None:
    size = size if isinstance(size, int) else dimension(folder, tmp_path / "size", size)
    largest = size - taken
    path = write(folder, f"[{before}{lelp(largest + 1, options)}]", teacher=teacher)
    result = edgestill("-q", "run", str(path), "--out", str(tmp_path / "run"))
    assert result.status == 2
    message = " ".join(result.err.split())
    assert f"objective[{1 if before else 0}].subclasses_per_class" in message
    assert f"has {size} dimensions" in message
    assert ("of which the head of 3 classes takes 2" in message) == bool(taken)
    assert f"subclasses_per_class = {largest} or fewer" in message
    made = [each.name for each in (tmp_path / "run").iterdir()]
    assert not [name for name in made if name.startswith(("teacher", "cache", "students"))]
    # the largest that it names is not refused
    open_run(folder, tmp_path / "run", f"[{before}{lelp(largest, options)}]", teacher).check()


def test_an_embedding_that_the_head_reads_all_of_has_no_subclasses(folder: Path, tmp_path: Path) -> None:
    narrow = STORED.replace("embedding.npy", "narrow.npy")
    result = edgestill("-q", "run", str(write(folder, f"[{lelp(1)}]", teacher=narrow)), "--out", str(tmp_path / "run"))
    assert result.status == 2
    assert "null_space = false" in result.err
    open_run(folder, tmp_path / "run", f"[{lelp(2, NULL)}]", narrow).check()


def test_random_subclasses_need_no_directions(folder: Path, tmp_path: Path) -> None:
    random = lelp(20, ', subclasses = "random"')
    open_run(folder, tmp_path / "run", f"[{random}]", STORED).check()


def test_a_study_refuses_them_too(folder: Path, tmp_path: Path) -> None:
    text = write(folder, '"kd"', teacher=STORED).read_text()
    path = folder / "study.toml"
    for objective, key in (
        (f"[{lelp(11)}]", "objective[0].subclasses_per_class"),
        (f"[{FROZEN}}}, {lelp(200, ON)}]", "objective[1].subclasses_per_class"),
    ):
        path.write_text(text.replace('objective = "kd"', f"objective = {objective}"))
        asked = ("study", str(path), "--vary", "train.learning_rate=0.1,0.2", "--seeds", "1")
        result = edgestill("-q", *asked, "--out", str(tmp_path / "study"))
        assert result.status == 2
        assert key in result.err
        assert not list((tmp_path / "study").rglob("cache*"))


def test_the_sizes_are_asked_for_only_where_they_matter() -> None:
    def never() -> int:
        raise AssertionError

    compressed = {"kind": "lelp", "on": "compressed", "subclasses_per_class": 9}
    for sections in ("kd", "subclass", [{"kind": "lelp", "subclasses": "random"}]):
        check_subclasses(READ(sections), 3, never)
    sections = READ([compressed, {"kind": "ec", "schedule": "frozen"}])
    check_subclasses(sections, 3, never)
    check_subclasses(sections, 3, never, 11)
    with pytest.raises(InputError) as caught:
        check_subclasses(sections, 3, never, 10)
    assert caught.value.fix == "subclasses_per_class = 8 or fewer"


STILL = ["lelp", "subclass", [{"kind": "ec", "schedule": "frozen"}], [{"kind": "lelp", "subclasses": "random"}]]
LISTENING = ["kd", "dkd", "dist", "mse", "supervised+kd"]
UNHEARD = ["supervised", "crd", "fitnet", "kd+fitnet", [{"kind": "ec", "schedule": "joint"}], [{"kind": "ec"}]]


def test_what_is_fitted_once_needs_a_teacher_that_stands_still() -> None:
    for sections in map(READ, STILL):
        check_teacher(sections, moves=False)
        with pytest.raises(InputError, match=f'"{sections[0].kind}" needs a teacher that stands still') as caught:
            check_teacher((*READ("kd"), *sections), moves=True)
        assert caught.value.where == "objective[1].kind"
        assert caught.value.fix is not None
        assert "strategy" in caught.value.fix
    for sections in map(READ, LISTENING):
        check_teacher(sections, moves=True)
    for sections in map(READ, UNHEARD):
        with pytest.raises(InputError, match=r"compares embeddings|no objective listens") as caught:
            check_teacher(sections, moves=True)
        assert "frozen" in (caught.value.fix or "")


def test_a_run_asks_whether_its_teacher_moves(folder: Path, tmp_path: Path) -> None:
    run = open_run(folder, tmp_path / "run", '"lelp"')
    run.check_objectives(run.recipe.objective)
    assert not run.recipe.teacher.moves
    moving = run.recipe.teacher.model_copy(update={"strategy": "online"})
    assert isinstance(moving, TeacherSection)
    assert moving.moves
    run.recipe = run.recipe.model_copy(update={"teacher": moving})
    with pytest.raises(InputError, match="stands still") as caught:
        run.check_objectives(run.recipe.objective)
    assert caught.value.where == "objective[0].kind"


def test_data_without_labels_names_the_recipe_key(folder: Path, tmp_path: Path) -> None:
    path = write(folder, '"lelp"', data="unlabelled")
    result = edgestill("-q", "run", str(path), "--out", str(tmp_path / "npz"))
    assert result.status == 2
    assert "data.label_column" in result.err
    assert "unlabelled.npz" in result.err
    (folder / "texts.csv").write_text("text\n" + "a good film\na bad film\n" * 20)
    text = path.read_text().replace('"npz"', '"csv"').replace("unlabelled.npz", "texts.csv")
    text = text.replace('arch = "conv-w8-d1-k3"\n', "").replace('arch = "conv-w12-d1-k3"\n', "")
    path.write_text(text.replace("[data.augment]\ncrop = 1\nviews = 1\n", ""))
    result = edgestill("-q", "run", str(path), "--out", str(tmp_path / "csv"))
    assert result.status == 2
    assert "data.label_column" in result.err
    assert "texts.csv" in result.err
    assert not [each for out in ("npz", "csv") for each in (tmp_path / out).glob("teacher*")]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["objective=kd+lelp"], "train.hard_weight"),
        (['objective={kind="crd",negatives=100000}'], "objective[0].negatives"),
        (['objective={kind="lelp",subclasses_per_class=500}'], "objective[0].subclasses_per_class"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(overrides: list[str], key: str, tmp_path: Path) -> None:
    settings = [part for override in overrides for part in ("--set", override)]
    result = edgestill("run", "quickstart", "--dry-run", *settings, "--out", str(tmp_path / "run"))
    assert result.status == 2
    assert key in result.err
    assert not (tmp_path / "run").exists()
