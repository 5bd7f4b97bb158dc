"""Runs, dry runs and studies whose students explore: generators, fixed sets, and what is shared and used again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cli.pipeline import Run
from cli.pipeline.exploration import left_over
from cli.pipeline.study import Study
from cli.recipe import load_recipe
from cli.report.schema import load_report
from distill.data.section import UnlabelledSection
from distill.data.unlabelled import open_unlabelled
from distill.exploration.generated import open_generated
from distill.exploration.make import make_image_generator
from profiles.artifact import MANIFEST, verify
from profiles.errors import InputError, Interrupted
from tests.cli.cli_runner import edgestill
from tests.cli.exploration_cases import VAE, explored, films, make_all
from tests.cli.strategy_cases import SMALL, TRAINED, WIDE, target
from tests.cli.test_pipeline_strategies import _Stop, open_run, when

RANDOM = 'kind = "random"\nsigma = 0.5\nbatch_size = 16\n' + VAE
GRADIENT = 'kind = "gradient"\nsigma = 0.5\nbatch_size = 16\n' + VAE
FIXED = 'kind = "random"\nsigma = 0.5\nversions = 2\n' + VAE
REAL = 'kind = "real"\nbatch_size = 16\n'
BOTH = target("small", SMALL) + target("wide", WIDE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clothes")
    make_all(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe without exploration, trained: what explored students are compared with."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    open_run(explored(folder, 'kind = "none"\n'), out).distill()
    return out


@pytest.fixture(scope="module")
def random(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole way with kind random, from the command line, for two students."""
    out = tmp_path_factory.mktemp("runs") / "random"
    result = edgestill("-q", "run", explored(folder, RANDOM, targets=BOTH), "--out", str(out))
    assert result.status == 0, result.err
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "student.safetensors")
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def last_record(folder: Path) -> dict[str, float]:
    record: dict[str, float] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return record


# -- what a run makes -------------------------------------------------------------------------------------------------


def test_the_generator_is_made_once_and_the_picture_shows_three_radii(random: Path) -> None:
    report = load_report(random / "report.json")
    names = [stage.name for stage in report.stages]
    assert names.count("generator (vae)") == 1
    assert {f"student {arch} (random)" for arch in (SMALL, WIDE)} <= set(names)
    verify(random / "generator", "generator")
    verify(random / "explored", "explored")
    for name in ("generator/reconstructions.png", "generator/samples.png", "explored/explored.png"):
        assert np.asarray(Image.open(random / name)).std() > 0
    assert any(str(random / "explored" / "explored.png") in note for note in report.notes)
    assert any(note.startswith("explores: random, sigma 0.5, around the training samples") for note in report.notes)
    told = report.exploration
    assert told is not None
    assert (told.kind, told.sigma, [student.arch for student in told.students]) == ("random", 0.5, [SMALL, WIDE])
    assert all(student.divergence is not None for student in told.students)


def test_only_distilled_students_explore(random: Path, plain: Path) -> None:
    assert "loss/explore/kd" in last_record(random / "students" / SMALL)
    for other in ("teacher", f"students/{SMALL}--supervised"):
        assert not [name for name in last_record(random / other) if "explore" in name]
        assert same(weights(random / other), weights(plain / other))
    assert not same(weights(random / "students" / SMALL), weights(plain / "students" / SMALL))


def test_the_same_again_makes_nothing(folder: Path, random: Path) -> None:
    run = open_run(explored(folder, RANDOM, targets=BOTH), random)
    run.distill()
    assert all(stage.cached for stage in run.stages)
    assert any("explored samples at three radii" in note for note in run.notes)


def test_other_settings_of_the_exploration_train_the_students_alone_anew(
    folder: Path, random: Path, plain: Path
) -> None:
    """And without exploration the students are those of a run that never explored."""
    shared = ("data", "teacher", "cache", "generator", f"students/{SMALL}--supervised")
    stamps = [when(random / part) for part in shared]
    before = weights(random / "students" / SMALL)
    recipe = explored(folder, RANDOM, targets=BOTH)
    wider = Run(load_recipe(recipe, ["explore.sigma=2"]), random)
    assert wider.recipe.explore.sigma == 2
    wider.student(SMALL)
    assert not same(weights(random / "students" / SMALL), before)
    climbing = open_run(explored(folder, GRADIENT, targets=BOTH), random)
    climbing.student(SMALL)
    assert "explore/gain" in last_record(random / "students" / SMALL)
    assert [when(random / part) for part in shared] == stamps
    off = open_run(explored(folder, 'kind = "none"\n', targets=BOTH), random)
    off.student(SMALL)
    assert same(weights(random / "students" / SMALL), weights(plain / "students" / SMALL))
    assert [when(random / part) for part in shared] == stamps


def test_weight_zero_is_distillation_to_the_bit(folder: Path, plain: Path, tmp_path: Path) -> None:
    run = open_run(explored(folder, "weight = 0.0\n" + GRADIENT), tmp_path / "run")
    run.student(SMALL)
    assert same(weights(tmp_path / "run" / "students" / SMALL), weights(plain / "students" / SMALL))
    assert "explore/divergence" in last_record(tmp_path / "run" / "students" / SMALL)


def test_a_fixed_set_is_made_once_for_all_students(folder: Path, tmp_path: Path) -> None:
    recipe, out = explored(folder, FIXED, targets=BOTH), tmp_path / "run"
    run = open_run(recipe, out)
    run.distill()
    assert [stage.cached for stage in run.stages if stage.name == "generated"] == [False]
    found = open_generated(out / "generated")
    assert found.inputs.shape == (2, len(run.dataset.train), *run.dataset.input.shape)
    assert found.logits is not None
    stamp = when(out / "generated")
    # what is learned from it is none of its business
    again = Run(load_recipe(recipe, ["explore.weight=2", "explore.tau=3"]), out)
    again.student(SMALL)
    assert when(out / "generated") == stamp
    assert not next(stage for stage in again.stages if stage.name.startswith("student")).cached


def test_the_live_teacher_is_the_one_that_the_objective_has(folder: Path, tmp_path: Path) -> None:
    """The teacher of the subclass objective has six logits for three classes; the further inputs are told by three."""
    run = open_run(explored(folder, GRADIENT, '{kind = "subclass", subclasses_per_class = 2}'), tmp_path / "run")
    run.student(SMALL)
    exploration = run.exploration_for(SMALL)
    assert exploration is not None
    assert exploration.subclasses == 2
    assert exploration.labeller.num_logits == 6
    assert exploration.labeller.key == run.start_for(run.recipe.objective, SMALL).key
    assert not (tmp_path / "run" / "teacher").exists()
    assert "loss/explore/kd" in last_record(tmp_path / "run" / "students" / SMALL)


def test_a_teacher_that_learns_along_labels_the_further_inputs_as_it_is_then(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = open_run(explored(folder, REAL, teacher='strategy = "online"'), out)
    trained = run.distill()[SMALL]
    assert f"student {SMALL} (online, real)" in [stage.name for stage in run.stages]
    assert (trained.strategy, trained.exploration) == ("online", "real")
    record = trained.result.history[-1]
    assert record["loss/explore/kd"] > 0
    assert "validation/teacher_top1" in record
    assert (out / "students" / SMALL / "teacher.safetensors").is_file()


def test_a_picture_that_is_missing_is_drawn_with_the_teacher_that_taught(folder: Path, tmp_path: Path) -> None:
    """Although the student is loaded, and with it no teacher had to learn."""
    out = tmp_path / "run"
    recipe = explored(folder, GRADIENT, teacher='strategy = "online"\n[teacher.coached]\nlearning_rate = 0.03\n')
    open_run(recipe, out).student(SMALL)
    drawn = (out / "explored" / "explored.png").read_bytes()
    shutil.rmtree(out / "explored")
    again = open_run(recipe, out)
    again.student(SMALL)
    assert next(stage for stage in again.stages if stage.name.startswith("student")).cached
    assert (out / "explored" / "explored.png").read_bytes() == drawn


def test_labels_alone_on_the_data_and_a_teacher_on_the_further_inputs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = edgestill("-q", "run", explored(folder, REAL, '"supervised"'), "--out", str(out))
    assert result.status == 0, result.err
    report = load_report(out / "report.json")
    assert {"teacher", "no teacher"} == {row.role for row in report.references}
    (bought,) = report.bought
    assert not same(weights(out / "students" / SMALL), weights(out / "students" / f"{SMALL}--supervised"))
    terms = last_record(out / "students" / SMALL)
    assert {name for name in terms if name.startswith("loss/")} == {"loss/ground_truth", "loss/explore/kd"}
    assert bought.objective == "supervised"


@pytest.mark.parametrize(("stopped", "artefact"), [("generator", "generator"), ("student", f"students/{SMALL}")])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, stopped: str, artefact: str
) -> None:
    recipe = load_recipe(explored(folder, RANDOM.replace("epochs = 1", "epochs = 2"), epochs=2))
    title = "generator (VAE)" if stopped == "generator" else stopped
    with pytest.raises(Interrupted):
        Run(recipe, tmp_path / "stopped", progress=_Stop(title, 4)).student(SMALL)
    assert (tmp_path / "stopped" / f"{artefact}.partial").is_dir()
    for name in ("stopped", "whole"):
        Run(recipe, tmp_path / name).student(SMALL)
    for part in ("generator", f"students/{SMALL}"):
        for file in (tmp_path / "whole" / part).glob("*.safetensors"):
            assert same(load_file(file), load_file(tmp_path / "stopped" / part / file.name))


def test_unlabelled_inputs_of_their_own_are_explored_around(folder: Path, tmp_path: Path) -> None:
    data = '[data.unlabelled]\nsource = "npz"\npath = "more.npz"\n'
    run = open_run(explored(folder, RANDOM + 'around = "unlabelled"\n', data=data), tmp_path / "run")
    run.student(SMALL)
    names = [stage.name for stage in run.stages]
    assert names.index("unlabelled") < names.index("generator (vae)") < names.index(f"student {SMALL} (random)")
    found = run.explorer.unlabelled
    assert found is not None
    assert len(found) == 60
    verify(tmp_path / "run" / "unlabelled", "unlabelled data")
    # the generator learned from all of them, and from the training split
    alone = open_run(explored(folder, RANDOM), tmp_path / "alone")
    generators = [each.explorer.generator(each.recipe.explore) for each in (run, alone)]
    assert None not in generators
    assert len({each.key for each in generators if each is not None}) == 2


def test_texts_are_refilled_by_a_masked_language_model(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import BertWordPieceTokenizer

    raw = BertWordPieceTokenizer(lowercase=True)
    texts = (folder / "films.csv").read_text().splitlines()
    raw.train_from_iterator(texts, vocab_size=90, min_frequency=1, show_progress=False)
    transformers.BertTokenizerFast(tokenizer_object=raw._tokenizer).save_pretrained(folder / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=raw.get_vocab_size(), max_position_embeddings=24, **sizes)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(folder / "bert")
    recipe, out = films(folder, 'kind = "random"\ngenerator = {model = "bert"}'), tmp_path / "run"
    run = open_run(recipe, out)
    run.distill()
    assert "generator (masked-lm)" in [stage.name for stage in run.stages]
    assert any(str(out / "generator" / "examples.txt") in note for note in run.notes)
    assert not (out / "explored").exists()
    assert "loss/explore/kd" in last_record(next((out / "students").glob("text-w16-d1-h2")))
    again = open_run(recipe, out)
    again.distill()
    assert all(stage.cached for stage in again.stages)


def test_two_processes_make_everything_once(folder: Path, tmp_path: Path) -> None:
    recipe, out = explored(folder, FIXED), tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "cli.app", "distill", recipe, "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((out / "students" / SMALL / MANIFEST).read_text())
    assert manifest["info"]["result"]["processes"] == 2
    for part, kind in (("generator", "generator"), ("generated", "generated"), ("explored", "explored")):
        verify(out / part, kind)


# -- dry runs ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_is_explored_and_what_is_there(folder: Path, tmp_path: Path) -> None:
    recipe, out = explored(folder, FIXED), tmp_path / "run"

    def told(*more: str) -> dict[str, dict[str, float]]:
        result = edgestill("-q", "run", recipe, "--out", str(out), "--dry-run", "--json", *more)
        assert result.status == 0, result.err
        found = json.loads(result.out)
        assert found["explores"].startswith("random, sigma ")
        return {stage["name"]: stage for stage in found["stages"]}

    names = ["generator (vae)", "generated", f"student {SMALL} (random)"]
    before = told()
    assert not any(before[name]["finished"] or before[name]["seconds"] is None for name in names)
    assert not out.exists()
    run = open_run(recipe, out)
    run.distill()
    # the files of the fixed set have headers besides
    files = sum(file.stat().st_size for file in (out / "generated").glob("*.npy")) / 2**20
    assert before["generated"]["disk_mib"] == pytest.approx(files, abs=0.1)
    assert all(told()[name]["finished"] for name in names)
    other = told("--set", "explore.sigma=0.7")
    assert [bool(other[name]["finished"]) for name in names] == [True, False, False]
    shown = edgestill("-q", "run", recipe, "--out", str(out), "--dry-run")
    assert "explores: random, sigma 0.5, around the training samples, 2 versions of each, made once" in shown.out


@pytest.mark.parametrize(
    ("explore", "teacher", "kind", "known"),
    [
        (GRADIENT, "", TRAINED, True),
        (REAL, 'strategy = "online"', TRAINED, True),
        (REAL, "", 'kind = "torch"\nfactory = "strategy_teacher:make"\nkwargs = {outputs = 3}\n', False),
    ],
    ids=["gradient", "coached", "given"],
)
def test_a_dry_run_times_real_steps_with_exploration(
    folder: Path,
    tmp_path: Path,
    explore: str,
    teacher: str,
    kind: str,
    known: bool,
) -> None:
    recipe = explored(folder, explore, teacher=teacher, kind=kind)
    asked = ["-q", "run", recipe, "--out", str(tmp_path / "never"), "--dry-run", "--json", "--allow-code"]
    result = edgestill(*asked)
    assert result.status == 0, result.err
    stages = {stage["name"]: stage["seconds"] for stage in json.loads(result.out)["stages"]}
    (student,) = (name for name in stages if name.startswith("student"))
    assert (stages[student] is not None) == known
    assert not (tmp_path / "never").exists()


# -- studies ----------------------------------------------------------------------------------------------------------


def test_a_study_compares_explorations_with_one_generator(folder: Path, tmp_path: Path) -> None:
    vary = {"objective": ["supervised", "kd"], "explore.kind": ["none", "random", "gradient"]}
    recipe = explored(folder, RANDOM)
    study = Study(load_recipe(recipe), tmp_path / "study", vary=vary, seeds=1)
    report = study.run()
    assert report.exit_status == 0
    assert list(report.methods) == ["supervised", "kd", "kd (random)", "kd (gradient)"]
    base = tmp_path / "study" / "base"
    assert [path.name for path in sorted(base.iterdir()) if path.name.startswith("gener")] == ["generator"]
    terms = {cell.combination.method: cell.read().terms for cell in study.cells}
    exploring = {method: any(name.startswith("explore/") for name in found) for method, found in terms.items()}
    assert exploring == {"supervised": False, "kd": False, "kd (random)": True, "kd (gradient)": True}
    assert any(note.startswith("kd (random): explores, random, sigma 0.5") for note in report.notes)
    # a cell that does not explore has the key that it has in a study which knows of none
    alone = Study(
        load_recipe(explored(folder, "", name="alone")), tmp_path / "alone", vary={"objective": ["kd"]}, seeds=1
    )
    (job,) = alone.prepare()
    own = [each.key for each in study.prepare() if each.cell.combination.method == "kd"]
    assert own == [job.key]
    stamps = [when(cell.folder) for cell in study.cells]
    again = Study(load_recipe(recipe), tmp_path / "study", vary=vary, seeds=1)
    assert len(again.finished()) == len(again.cells)
    again.run()
    assert [when(cell.folder) for cell in again.cells] == stamps


@pytest.mark.parametrize("most", [None, 90], ids=["all", "90"])
def test_cells_of_a_study_share_fixed_sets_and_take_what_their_part_leaves_over(
    folder: Path, tmp_path: Path, most: int | None
) -> None:
    data = "" if most is None else f"train_size = {most}\n"
    explore = FIXED.replace("versions = 2", "versions = 1") + 'around = "both"\n'
    loaded = load_recipe(explored(folder, explore, data=data + "[data.unlabelled]\nrest = true\n"))
    study = Study(loaded, tmp_path / "study", vary={"data.train_size": [60, 80]}, seeds=2)
    report = study.run()
    assert report.exit_status == 0, report.failed
    base, run = tmp_path / "study" / "base", study.base(study.grid.combinations[0])
    # whatever a part leaves over is explored around, so all of them explore around the same inputs
    left = 0 if most is None else len(open_unlabelled(base / "unlabelled"))
    total = len(run.dataset.train) + left
    assert left == (0 if most is None else 168 - 90)
    sets = [open_generated(path) for path in sorted(base.glob("generated*"))]
    assert [found.inputs.shape[:2] for found in sets] == [(1, total), (1, total)]
    assert any("the same part of the training samples" in note for note in report.notes)
    # every part and what it leaves over are all inputs, so one generator serves both
    assert [path.name for path in sorted(base.glob("generator*"))] == ["generator"]


@pytest.mark.parametrize("fixed", [False, True], ids=["every step", "fixed"])
def test_a_generator_of_a_study_learns_from_the_part_that_its_students_learn_on(
    folder: Path, tmp_path: Path, fixed: bool
) -> None:
    """One per part, for all seeds and all students of it."""
    asked = {"explore.kind": ["random", "reconstructed"], "data.train_size": [60, 80, 168]}
    explore = RANDOM + "versions = 1\n" * fixed
    study = Study(load_recipe(explored(folder, explore)), tmp_path / "study", vary=asked, seeds=2)
    jobs = study.prepare()
    base, run = tmp_path / "study" / "base", study.base(study.grid.combinations[0])
    found = {path.name: path for path in base.glob("generator*")}
    assert set(found) == {"generator", "generator-of-60", "generator-of-80"}
    used = {job.rows: {other.explored.generator for other in jobs if other.rows == job.rows} for job in jobs}  # type: ignore[union-attr]
    assert used == {None: {found["generator"]}, 60: {found["generator-of-60"]}, 80: {found["generator-of-80"]}}
    part = next(job.explored.rows for job in jobs if job.rows == 60 and job.explored is not None)
    alone = make_image_generator(
        run.recipe.explore.generator,
        np.array(run.dataset.train.inputs[part]),
        run.dataset.input,
        tmp_path / "alone",
        seed=0,
        base=tmp_path,
    )
    (weights,) = found["generator-of-60"].glob("*.safetensors")
    assert same(load_file(weights), alone.network.state_dict())
    stamps = {name: when(path) for name, path in found.items()}
    report = study.run()
    assert report.exit_status == 0, report.failed
    assert {name: when(path) for name, path in found.items()} == stamps
    assert any("learns from the same part of the training samples" in note for note in report.notes)


def test_unlabelled_inputs_of_their_own_are_for_the_generators_of_all_parts(folder: Path, tmp_path: Path) -> None:
    data = '[data.unlabelled]\nsource = "npz"\npath = "more.npz"\n'
    recipe = load_recipe(explored(folder, RANDOM, data=data))
    study = Study(recipe, tmp_path / "study", vary={"data.train_size": [60, 80]}, seeds=1)
    jobs = study.prepare()
    run = study.base(study.grid.combinations[0])
    unlabelled = run.explorer.unlabelled
    assert unlabelled is not None
    part = next(job.explored.rows for job in jobs if job.rows == 60 and job.explored is not None)
    alone = make_image_generator(
        run.recipe.explore.generator,
        np.concatenate([run.dataset.train.inputs[part], unlabelled.inputs]),
        run.dataset.input,
        tmp_path / "alone",
        seed=0,
        base=tmp_path,
    )
    (weights,) = (run.folder / "generator-of-60").glob("*.safetensors")
    assert same(load_file(weights), alone.network.state_dict())


def test_what_a_part_leaves_over_is_the_rest_of_the_split_without_what_is_judged_on(
    folder: Path, tmp_path: Path
) -> None:
    run = open_run(explored(folder, REAL), tmp_path / "run")
    whole = run.dataset
    section = run.recipe.data.model_copy(update={"unlabelled": UnlabelledSection(rest=True)})
    rows = np.arange(0, len(whole.train), 2)
    found = left_over(section, whole, None, rows)
    assert np.array_equal(found.inputs, whole.train.inputs[1::2])
    assert found.key != left_over(section, whole, None, rows[1:]).key
    with pytest.raises(InputError, match="nothing of the training samples"):
        left_over(section, whole, None, None)


@pytest.mark.parametrize("explore", [REAL + 'around = "both"\n', RANDOM], ids=["around", "generator"])
def test_a_number_of_left_over_inputs_needs_a_rest_of_the_whole_split(
    folder: Path, tmp_path: Path, explore: str
) -> None:
    """The number is drawn once, so sizes of a study cannot each leave it over; told before a teacher is trained."""
    recipe = explored(folder, explore, data="[data.unlabelled]\nrest = true\nsize = 20\n")
    study = Study(load_recipe(recipe), tmp_path / "study", vary={"data.train_size": [60, 80]}, seeds=1)
    with pytest.raises(InputError, match=r"data\.unlabelled\.size from what its largest") as caught:
        study.prepare()
    assert caught.value.where == "data.unlabelled.size"
    assert "leave size out" in str(caught.value.fix)
    assert not (tmp_path / "study" / "base" / "teacher").exists()
