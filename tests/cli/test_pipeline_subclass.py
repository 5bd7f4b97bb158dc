"""Runs whose teacher is chosen by the objective, and what is refused before any teacher is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cli.app import main
from cli.pipeline import Run
from cli.pipeline.run import FROZEN_NOTE
from cli.pipeline.teachers import Variant
from cli.recipe import load_recipe
from cli.report.schema import load_report
from distill.data.make_fashion_mnist_small import PACKAGED
from distill.objectives.section import KDSection, SubclassSection, SupervisedSection
from distill.teachers import SubclassCache
from profiles.artifact import verify
from profiles.errors import InputError

RECIPE = """
name = "small"
{objective}

[data]
source = "npz"
path = "{data}.npz"

[data.augment]
crop = 1
views = {views}

[teacher]
{teacher}

[train]
epochs = 2
batch_size = 64
{train}

[export]
calibration_samples = 64
parity_samples = 64

[[target]]
name = "rtx"
device = "rtx-4060-laptop"
arch = "conv-w8-d1-k3"
"""
TRAINED = 'arch = "conv-w12-d1-k3"\nepochs = 2'
SUBCLASS = 'objective = [{kind = "subclass", subclasses_per_class = 2}]'
ARCH = "conv-w8-d1-k3"
TEACHER = "teacher--subclass-2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images with three classes, two, and three labels; and outputs of a frozen teacher for them."""
    folder = tmp_path_factory.mktemp("clothes")
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:400], stored["train_labels"][:400]
    np.savez_compressed(folder / "three.npz", images=images, labels=labels % 3)
    np.savez_compressed(folder / "two.npz", images=images, labels=labels % 2)
    several = np.stack([labels % 2, labels % 3 == 0, labels > 4], 1).astype(np.uint8)
    np.savez_compressed(folder / "labels.npz", images=images, labels=several)
    random = np.random.default_rng(0)
    np.save(folder / "embedding.npy", images.reshape(400, -1) @ random.normal(size=(784, 12)).astype(np.float32))
    np.save(folder / "logits.npy", random.normal(size=(400, 3)).astype(np.float32))
    np.save(folder / "four.npy", random.normal(size=(400, 4)).astype(np.float32))
    return folder


def write(
    folder: Path,
    objective: str = SUBCLASS,
    *,
    data: str = "three",
    teacher: str = TRAINED,
    train: str = "",
    views: int = 2,
) -> str:
    path = folder / "small.toml"
    path.write_text(RECIPE.format(objective=objective, data=data, teacher=teacher, train=train, views=views))
    return str(path)


def edgestill(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder."""
    out = tmp_path_factory.mktemp("runs") / "small"
    assert edgestill("-q", "run", write(folder), "--out", str(out)) == 0
    return out


def test_only_the_teacher_with_subclasses_is_trained(finished: Path) -> None:
    made = {path.name for path in finished.iterdir() if path.is_dir()}
    assert {TEACHER, "cache--subclass-2"} <= made
    assert not made & {"teacher", "cache"}
    for name, kind in ((TEACHER, "student"), ("cache--subclass-2", "teacher cache")):
        verify(finished / name, kind)
    assert np.load(finished / "cache--subclass-2" / "train_logits.npy", mmap_mode="r").shape[2] == 6
    losses = json.loads((finished / TEACHER / "metrics.jsonl").read_text().splitlines()[-1])
    assert losses["loss/subclass/auxiliary"] < 0
    assert losses["loss/ground_truth"] > 0


def test_the_report_shows_the_teacher_that_taught_and_the_plain_twin(finished: Path) -> None:
    report = load_report(finished / "report.json")
    teacher, plain = report.references
    assert teacher.role == "teacher"
    assert teacher.arch == "conv-w12-d1-k3"
    assert teacher.metric is not None
    assert teacher.note == "trained again, with 2 subclasses per class"
    assert plain.role == "no teacher"
    assert [run.role for run in report.training] == ["teacher", "student", "no teacher"]
    assert [run.objective for run in report.training] == ["subclass", "subclass", "supervised"]
    assert report.bought[0].objective == "subclass"
    assert (finished / "students" / f"{ARCH}--supervised").is_dir()
    assert [stage.name for stage in report.stages][1:3] == [
        "teacher (2 subclasses per class) conv-w12-d1-k3",
        "teacher cache",
    ]
    assert not [note for note in report.notes if "head" in note]


def test_class_logits_are_inside_the_graph_that_ships(finished: Path, folder: Path) -> None:
    run = Run(load_recipe(write(folder)), finished)
    trained = run.student(ARCH)
    assert trained.student.head_size == 6
    found = run.plan(run.targets[0])
    file = found["fp32"].file
    assert file is not None
    outputs, expected = run.outputs(file, run.dataset.test), run.test_logits(trained)
    assert outputs.shape == (len(run.dataset.test), 3)
    np.testing.assert_allclose(outputs, expected, atol=1e-3)
    plain = run.plain_student(ARCH)
    assert plain is not None
    assert plain.student.head_size == 3


def test_a_second_run_trains_nothing_again(finished: Path, folder: Path) -> None:
    trained = [
        path / "manifest.json"
        for path in (finished / TEACHER, finished / "cache--subclass-2", finished / "students" / ARCH)
    ]
    before = [path.stat().st_mtime_ns for path in trained]
    report = Run(load_recipe(write(folder)), finished).report()
    assert all(
        stage.cached for stage in report.stages if stage.name.startswith(("data", "teacher", "student", "plain"))
    )
    assert before == [path.stat().st_mtime_ns for path in trained]


def test_the_students_settings_leave_the_teacher_alone(finished: Path, folder: Path) -> None:
    run = Run(load_recipe(write(folder)), finished)
    sections = (SubclassSection(subclasses_per_class=2, tau=3.0, weight=0.5),)
    cache = run.cache_for(sections)
    assert isinstance(cache, SubclassCache)
    assert cache.subclasses == 2
    assert cache is run.cache_for((*sections, KDSection()))
    assert all(stage.cached for stage in run.stages)
    fingerprint = run.teacher_fingerprint_for(sections)
    assert fingerprint is not None
    assert fingerprint() == fingerprint()
    assert run.cache_for((SupervisedSection(),)) is None
    assert run.teacher_fingerprint_for((SupervisedSection(),)) is None


def test_every_teachers_settings_have_a_folder() -> None:
    sections = [
        None,
        SubclassSection(),
        SubclassSection(subclasses_per_class=4),
        SubclassSection(aux_weight=0.5),
        SubclassSection(aux_temperature=0.5),
        SubclassSection(aux_weight=0.5, aux_temperature=2.0),
    ]
    names = [Variant(section).folder for section in sections]
    assert len(set(names)) == len(names)
    assert names[:3] == ["teacher", "teacher--subclass-8", "teacher--subclass-4"]
    assert Variant(SubclassSection(tau=3.0)).folder == Variant(SubclassSection()).folder


def test_an_objective_beside_it_learns_from_the_same_teacher(finished: Path, folder: Path) -> None:
    objective = SUBCLASS.replace("}]", '}, {kind = "kd"}]')
    loaded = load_recipe(write(folder, objective, train="hard_weight = 0.5"))
    run = Run(loaded, finished)
    trained = run.student(ARCH)
    assert trained.objective_name == "subclass+kd"
    assert {"loss/subclass", "loss/kd"} <= set(trained.result.history[-1])
    assert not (finished / "teacher").exists()


def test_a_dry_run_counts_the_teacher_that_would_be_trained(
    finished: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edgestill("-q", "run", write(folder), "--out", str(tmp_path / "never"), "--dry-run", "--json") == 0
    stages = {stage["name"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    teacher = stages["teacher (2 subclasses per class) conv-w12-d1-k3"]
    assert teacher["seconds"] > 0
    assert not teacher["finished"]
    assert "teacher conv-w12-d1-k3" not in stages
    assert not (tmp_path / "never").exists()
    supervised = write(folder, 'objective = "supervised"')
    assert edgestill("-q", "run", supervised, "--out", str(tmp_path / "never"), "--dry-run", "--json") == 0
    names = [stage["name"] for stage in json.loads(capsys.readouterr().out)["stages"]]
    assert not [name for name in names if name.startswith("teacher")]


def test_a_dry_run_on_the_finished_folder_has_nothing_left(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = finished / "recipe.toml"
    kept = stored.read_text()
    assert edgestill("-q", "run", str(stored), "--out", str(finished), "--dry-run", "--json") == 0
    stages = {stage["name"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["teacher (2 subclasses per class) conv-w12-d1-k3"]["finished"]
    assert stages["teacher cache"]["finished"]
    assert stored.read_text() == kept


def test_a_frozen_teacher_gets_a_new_head_and_the_report_says_so(folder: Path, tmp_path: Path) -> None:
    recipe = write(folder, teacher='kind = "array"\nembeddings = "embedding.npy"', views=1)
    assert edgestill("-q", "run", recipe, "--out", str(tmp_path / "run")) == 0
    report = load_report(tmp_path / "run" / "report.json")
    assert FROZEN_NOTE in report.notes
    assert "only its head was retrained" in report.references[0].note
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(("teacher", "cache--"))]
    run = Run(load_recipe(recipe), tmp_path / "run")
    trained = run.student(ARCH)
    assert set(trained.objective.state_dict()) == {"objectives.0.head_weight", "objectives.0.head_bias"}
    found = run.plan(run.targets[0])
    assert found["fp32"].file is not None
    assert run.outputs(found["fp32"].file, run.dataset.test).shape[1] == 3
    assert b"head_weight" not in found["fp32"].file.read_bytes()


def test_a_supervised_run_trains_no_teacher(folder: Path, tmp_path: Path) -> None:
    recipe = write(folder, 'objective = "supervised"')
    assert edgestill("-q", "distill", recipe, "--out", str(tmp_path / "run")) == 0
    assert not (tmp_path / "run" / "teacher").exists()
    assert (tmp_path / "run" / "students" / ARCH).is_dir()


LOGITS = 'kind = "array"\nlogits = "logits.npy"'
FOUR = 'kind = "array"\nlogits = "four.npy"'
NONE = 'kind = "none"'


@pytest.mark.parametrize(
    ("objective", "data", "teacher", "key", "words"),
    [
        ("lelp", "three", LOGITS, "objective[0].kind", "no embeddings"),
        ("lelp", "three", NONE, "objective[0].kind", "no embeddings"),
        ("subclass", "three", LOGITS, "objective[0].kind", "no embeddings"),
        ("kd", "three", NONE, "objective[0].kind", "no logits"),
        ("kd", "three", FOUR, "teacher.logits", "4 columns"),
        ('[{kind = "crd", negatives = 5000}]', "three", TRAINED, "objective[0].negatives", "5,000"),
        ("lelp+subclass", "three", TRAINED, "objective[1].kind", "head"),
        ("supervised+lelp+lelp", "three", TRAINED, "objective[2].kind", "head"),
        ("subclass+subclass", "three", TRAINED, "objective[1].kind", "head"),
        ("lelp", "labels", TRAINED, "objective[0].kind", "several labels"),
        ("subclass", "labels", TRAINED, "objective[0].kind", "several labels"),
        ("dkd", "two", TRAINED, "objective[0].kind", "more than two classes"),
        ("dist", "two", TRAINED, "objective[0].kind", "more than two classes"),
        ('[{kind = "lelp", subclasses_per_class = 5000}]', "three", TRAINED, "subclasses_per_class", "5000"),
        ('[{kind = "lelp", on = "compressed"}]', "three", TRAINED, "objective[0].on", "ec"),
        (
            '[{kind = "ec"}, {kind = "lelp", on = "compressed"}]',
            "three",
            TRAINED,
            "objective[0].schedule",
            "stands still",
        ),
    ],
)
def test_objectives_that_cannot_work_are_refused_before_a_teacher_is_trained(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    objective: str,
    data: str,
    teacher: str,
    key: str,
    words: str,
) -> None:
    text = objective if objective.startswith("[") else f'"{objective}"'
    views = 1 if "array" in teacher else 2
    recipe = write(folder, f"objective = {text}", data=data, teacher=teacher, train="hard_weight = 0.5", views=views)
    if data == "labels":
        path = Path(recipe)
        path.write_text(path.read_text().replace("[data]\n", '[data]\ntask = "multilabel"\n'))
    out = tmp_path / "run"
    assert edgestill("-q", "run", recipe, "--out", str(out)) == 2
    message = capsys.readouterr().err
    assert key in message
    assert words in message
    assert not [path.name for path in out.iterdir() if path.name.startswith(("teacher", "cache", "students"))]


def test_a_study_gets_the_same_refusals_from_the_cache(folder: Path, tmp_path: Path) -> None:
    run = Run(load_recipe(write(folder, 'objective = "supervised"', teacher=NONE)), tmp_path / "run")
    with pytest.raises(InputError, match="no embeddings") as caught:
        run.cache_for((SubclassSection(),))
    assert caught.value.where == "objective[0].kind"


def test_a_teacher_that_moves_is_an_invalid_value(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(folder, 'objective = "lelp"', teacher='strategy = "lgtm"')
    assert edgestill("-q", "run", recipe, "--out", str(tmp_path / "run")) == 2
    message = capsys.readouterr().err
    assert "teacher.strategy" in message
    assert "frozen" in message
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(("teacher", "students"))]
