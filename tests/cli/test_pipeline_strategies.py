"""Runs, dry runs and studies whose teacher learns: conditioned on students, or along with each of them."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cli.pipeline import Run
from cli.pipeline.pool_cost import limits_of, pool_cost
from cli.pipeline.run import Trained
from cli.pipeline.study import Study
from cli.pipeline.teachers import inherit
from cli.recipe import load_recipe
from cli.report.schema import load_report
from distill.objectives.section import KDSection, SupervisedSection
from distill.strategies.generic import load_supernet
from distill.students import build_student, parse_arch
from distill.students.arch import Arch
from distill.students.conv import ConvNet
from distill.students.section import StudentSection
from distill.training import read_result
from export.onnx import export_graph
from profiles.artifact import MANIFEST, verify
from profiles.device import TargetSection, resolve_target
from profiles.errors import InputError, Interrupted
from profiles.predict import node_costs, roofline
from profiles.progress import Silent, Task
from tests.cli.cli_runner import edgestill
from tests.cli.strategy_cases import SMALL, TRAINED, WIDE, make_data, target, write

GENERIC = 'strategy = "generic"\ngeneric = {widths = [4, 8], kernels = [3], depths = [1], paths = 1}'
SFTN = 'strategy = "sftn"'
LGTM = 'strategy = "lgtm"'
BOTH = target("small", SMALL) + target("wide", WIDE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clothes")
    make_data(folder)
    return folder


def open_run(recipe: str, out: Path, *, allow_code: bool = False) -> Run:
    return Run(load_recipe(recipe), out, allow_code=allow_code)


def made(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if path.is_dir()}


def when(folder: Path) -> int:
    return (folder / MANIFEST).stat().st_mtime_ns


# -- conditioned teachers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generic(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students of one generic teacher, and a whole run for the target of one of them."""
    out = tmp_path_factory.mktemp("runs") / "generic"
    open_run(write(folder, GENERIC, targets=BOTH), out).distill()
    result = edgestill("-q", "run", write(folder, GENERIC), "--out", str(out))
    assert result.status == 0, result.err
    assert "teacher (generic): trained once for a pool of 2 students" in " ".join(result.out.split())
    return out


def test_one_generic_teacher_and_one_cache_serve_all_students(generic: Path) -> None:
    assert {"teacher--generic", "cache--generic"} <= made(generic)
    assert not made(generic) & {"teacher", "cache"}
    verify(generic / "teacher--generic", "student")
    pool = json.loads((generic / "teacher--generic" / "pool.json").read_text())
    assert [entry["arch"] for entry in pool["archs"]] == [SMALL, WIDE]
    last = json.loads((generic / "teacher--generic" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss/generic/kl"] > 0
    report = load_report(generic / "report.json")
    assert [(stage.name, stage.cached) for stage in report.stages[1:4]] == [
        ("teacher (generic, 2 students) conv-w12-d1-k3", True),
        ("teacher cache", True),
        (f"student {SMALL}", True),
    ]


def test_the_report_names_the_strategy(generic: Path) -> None:
    report = load_report(generic / "report.json")
    teacher = report.references[0]
    assert teacher.title == "teacher (generic)"
    assert teacher.metric is not None
    assert teacher.note == "trained once for a pool of 2 students"
    assert [run.title for run in report.training[:2]] == ["teacher (generic)", "student (generic)"]
    page = generic / "page.html"
    assert edgestill("report", str(generic), "--html", str(page)).status == 0
    assert "teacher (generic)" in page.read_text()


def test_a_second_run_trains_no_teacher_again(generic: Path, folder: Path) -> None:
    parts = ["teacher--generic", "cache--generic", f"students/{SMALL}", f"students/{WIDE}"]
    before = [when(generic / part) for part in parts]
    run = open_run(write(folder, GENERIC, targets=BOTH), generic)
    run.distill()
    assert all(stage.cached for stage in run.stages)
    assert [when(generic / part) for part in parts] == before


def test_lelp_learns_from_a_conditioned_teacher(generic: Path, folder: Path, tmp_path: Path) -> None:
    objective = '[{kind = "lelp", subclasses_per_class = 2}]'
    run = open_run(write(folder, GENERIC, objective, targets=BOTH, name="lelp"), generic)
    trained = run.student(SMALL)
    assert run.stages[1].cached
    assert losses(trained) > 0
    own = open_run(write(folder, SFTN, objective, name="lelp"), tmp_path / "run")
    assert losses(own.student(SMALL)) > 0


def losses(trained: Trained) -> float:
    """What LELP's terms add up to in the last epoch."""
    return sum(value for name, value in trained.result.history[-1].items() if name.startswith("loss/lelp"))


def test_every_architecture_has_a_student_friendly_teacher_of_its_own(folder: Path, tmp_path: Path) -> None:
    run = open_run(write(folder, SFTN, targets=BOTH), tmp_path / "run")
    run.distill()
    assert {f"{what}--sftn-{arch}" for what in ("teacher", "cache") for arch in (SMALL, WIDE)} <= made(tmp_path / "run")
    rows = [row for row in run.references() if row.role == "teacher"]
    assert [row.note for row in rows] == [f"trained for student {arch}" for arch in (SMALL, WIDE)]
    caches = [run.cache_for((KDSection(),), arch) for arch in (SMALL, WIDE)]
    assert caches[0] is not None
    assert caches[1] is not None
    assert caches[0].key != caches[1].key


def test_one_student_friendly_teacher_can_serve_all(folder: Path, tmp_path: Path) -> None:
    run = open_run(write(folder, f'{SFTN}\ngeneric = {{archs = ["{SMALL}"]}}', targets=BOTH), tmp_path / "run")
    assert run.cache_for((KDSection(),), SMALL) is run.cache_for((KDSection(),), WIDE)
    assert run.stages[1].name == f"teacher (sftn, {SMALL}) conv-w12-d1-k3"
    assert run.cache_for((SupervisedSection(),), SMALL) is None


def test_students_start_from_the_pools_weights(folder: Path, tmp_path: Path) -> None:
    teacher = GENERIC.replace("paths = 1", "paths = 1, inherit = true")
    outside = "conv-w16-d1-k3"
    run = open_run(write(folder, teacher, targets=BOTH + target("outside", outside)), tmp_path / "run")
    place = run.shared_weights(run.recipe.objective, SMALL)
    assert place == tmp_path / "run" / f"start--generic--{SMALL}"
    verify(place, "start")
    dataset = run.dataset
    student = build_student(StudentSection(), dataset.input, 3, arch=SMALL, seed=7, base=folder)
    inherit(student, place)
    source = load_supernet(tmp_path / "run" / "teacher--generic", dataset.input, 3).standalone(parse_arch(SMALL))
    for name, value in source.state_dict().items():
        # statistics are not those of all members together
        same = torch.equal(student.state_dict()[name], value)
        assert same == ("running" not in name), name
    split = build_student(StudentSection(), dataset.input, 6, arch=SMALL, seed=7, base=folder)
    head = split.head.weight.clone()
    inherit(split, place)
    assert torch.equal(split.head.weight, head)
    for ours, theirs in zip(split.body.parameters(), source.body.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    warm = run.student(SMALL)
    assert run.shared_weights(run.recipe.objective, outside) is None
    assert any(f"{outside} is not in the teacher's pool" in note for note in run.notes)
    # the same teacher, and a student that starts afresh
    cold = open_run(write(folder, teacher, targets=BOTH, name="cold"), tmp_path / "run")
    cold.shared_weights = lambda sections, arch: None  # type: ignore[method-assign]
    assert cold.student(SMALL).key != warm.key


def test_a_student_from_the_pool_has_statistics_of_its_own_and_its_start_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(folder, GENERIC.replace("paths = 1", "paths = 1, inherit = true"))
    run = open_run(recipe, tmp_path / "run")
    place = run.shared_weights(run.recipe.objective, SMALL)
    assert place is not None
    student = build_student(StudentSection(), run.dataset.input, 3, arch=SMALL, seed=7, base=folder)
    inherit(student, place)
    body = student.body.eval()
    assert isinstance(body, ConvNet)
    stem = body.stem[0]
    assert isinstance(stem, torch.nn.Sequential)
    # 168 samples are two batches of 84, so the mean of their means is that of all
    inputs = torch.from_numpy(np.array(run.dataset.train.inputs))
    with torch.no_grad():
        found = stem[0](body.normalize(inputs)).double()
    torch.testing.assert_close(stem[1].running_mean.double(), found.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stem[1].running_var.double(), found.var((0, 2, 3)), rtol=0.05, atol=0)
    with torch.no_grad():
        logits = student.eval()(torch.from_numpy(np.array(run.dataset.validation.inputs))).head
    right = (logits.argmax(1).numpy() == run.dataset.validation.labels).mean()
    told = f"{SMALL} starts from the pool: top-1 {right:.1%} on validation before its own training"
    assert run.notes[-1] == told
    trained = run.student(SMALL)
    # sums in another order must not make another start, which would be another training
    monkeypatch.setattr("distill.students.supernet.Supernet.recalibrate", lambda *_: pytest.fail("made again"))
    again = open_run(recipe, tmp_path / "run")
    assert again.student(SMALL).key == trained.key
    assert [stage.cached for stage in again.stages] == [True] * 4
    assert again.notes[-1] == told


def test_another_pool_is_another_start(folder: Path, tmp_path: Path) -> None:
    stamps = []
    for weight in ("1.0", "2.0"):
        teacher = GENERIC.replace("paths = 1", f"paths = 1, inherit = true, kl_weight = {weight}")
        run = open_run(write(folder, teacher), tmp_path / "run")
        place = run.shared_weights(run.recipe.objective, SMALL)
        assert place is not None
        stamps.append(verify(place, "start").files)
    assert stamps[0] != stamps[1]


def test_the_pool_holds_what_some_target_can_carry(folder: Path, tmp_path: Path) -> None:
    teacher = 'strategy = "generic"\ngeneric = {widths = [4, 8, 16], kernels = [3], depths = [1]}'
    tight = target("tight", SMALL, "file_size_mib = 0.1\n")
    run = open_run(write(folder, teacher, targets=tight), tmp_path / "run")
    assert [str(arch) for arch in run.pool] == [SMALL, WIDE]
    assert any("tight: file_size_mib 0.1 excludes 1 of 3" in note for note in run.notes)
    # a target without limits carries everything
    both = open_run(write(folder, teacher, targets=tight + target("free", SMALL)), tmp_path / "run")
    assert len(both.pool) == 3
    assert limits_of(both.targets) == {}
    unasked = teacher.replace("}", ", within_limits = false}")
    assert len(open_run(write(folder, unasked, targets=tight), tmp_path / "run").pool) == 3


def test_a_pool_that_nobody_named_holds_every_targets_student(folder: Path, tmp_path: Path) -> None:
    odd = "conv-w20-d3-k3"
    targets = target("one", SMALL) + target("two", odd)
    run = open_run(write(folder, 'strategy = "generic"', targets=targets), tmp_path / "run")
    words = [str(arch) for arch in run.pool]
    assert {SMALL, odd} < set(words)
    assert len(words) == len(set(words))
    assert run.notes == [f"the teacher's pool: {', '.join(words)}"]
    named = write(
        folder, 'strategy = "generic"\ngeneric = {widths = [4, 8], kernels = [3], depths = [1]}', targets=targets
    )
    told = open_run(named, tmp_path / "run")
    assert [str(arch) for arch in told.pool] == [SMALL, WIDE]
    assert told.notes[-1].startswith(f"not in the teacher's pool: {odd}; it teaches them all the same")


@pytest.mark.parametrize("device", ["t4", "jetson-orin-nano"])
def test_no_cost_of_an_architecture_is_above_that_of_its_exported_graph(
    folder: Path, tmp_path: Path, device: str, exported: tuple[Arch, Path]
) -> None:
    arch, file = exported
    run = open_run(write(folder, ""), tmp_path / "run")
    section = TargetSection(name="there", device=device, batch=2, precision="fp32")
    there = resolve_target(section, base=folder, where="target[0]")

    def build(arch: Arch) -> object:
        return build_student(StudentSection(), run.dataset.input, 3, arch=str(arch), seed=0, base=folder)

    cost = pool_cost((there,), run.dataset.input, build)(arch)["there"]  # type: ignore[arg-type]
    bound = roofline(file, there.device, "fp32", 2, there.power_mode).bound_ms
    nodes = node_costs(file, 2)
    assert bound is not None
    assert cost.latency_bound_ms is not None
    assert cost.file_mib is not None
    assert cost.memory_mib is not None
    assert 0.98 * bound <= cost.latency_bound_ms <= bound
    size = file.stat().st_size / 2**20
    assert 0.8 * size <= cost.file_mib <= size
    held = (sum(node.weight_bytes for node in nodes) + max(node.activation_bytes for node in nodes)) / 2**20
    assert 0.5 * held <= cost.memory_mib <= held
    anything = resolve_target(section.model_copy(update={"precision": "auto"}), base=folder, where="target[0]")
    least = pool_cost((anything,), run.dataset.input, build)(arch)["there"]  # type: ignore[arg-type]
    assert least.latency_bound_ms is not None
    assert least.file_mib is not None
    assert least.latency_bound_ms < cost.latency_bound_ms
    assert least.file_mib < cost.file_mib


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Arch, Path]:
    """A student and its FP32 graph."""
    place = tmp_path_factory.mktemp("graph")
    spec = open_run(write(folder, ""), place / "run").dataset.input
    student = build_student(StudentSection(), spec, 3, arch="conv-w16-d2-k3", seed=0, base=folder).eval()
    model = torch.nn.Sequential(student.body, student.head).eval()
    example = torch.zeros(2, *spec.shape, dtype=torch.uint8)
    export_graph(model, {"x": example}, place / "model.onnx", opset=17)
    return parse_arch("conv-w16-d2-k3"), place / "model.onnx"


# -- coached teachers -------------------------------------------------------------------------------------------------


def test_switching_the_strategy_keeps_the_teacher_that_learned_the_labels(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    frozen = open_run(write(folder, ""), out)
    before = frozen.student(SMALL)
    stamps = [when(out / part) for part in ("teacher", "cache")]
    coached = open_run(write(folder, LGTM), out)
    trained = coached.distill()[SMALL]
    assert [when(out / part) for part in ("teacher", "cache")] == stamps
    assert trained.key != before.key
    assert trained.strategy == "lgtm"
    assert f"student {SMALL} (lgtm)" in [stage.name for stage in coached.stages]
    record = trained.result.history[-1]
    assert 0 <= record["validation/teacher_top1"] <= 1
    assert "coached/influence_ratio" in record
    start = load_file(out / "teacher" / "student.safetensors")
    learned = load_file(out / "students" / SMALL / "teacher.safetensors")
    assert any(not torch.equal(start[name], learned[name]) for name in start if name in learned)
    row = coached.references()[0]
    assert row.title == "teacher (lgtm)"
    assert row.metric is not None
    assert f"{SMALL}'s {record['validation/teacher_top1']:.1%}" in row.note
    started = read_result(out / "teacher").metric.value
    assert f"(on validation: {started:.1%} at the start, {SMALL}'s" in row.note
    again = open_run(write(folder, LGTM), out)
    again.distill()
    assert all(stage.cached for stage in again.stages)
    # other strategies are other trainings, and the frozen student comes back as it was
    assert open_run(write(folder, 'strategy = "online"'), out).student(SMALL).key not in (trained.key, before.key)
    assert open_run(write(folder, ""), out).student(SMALL).key == before.key
    assert [when(out / part) for part in ("teacher", "cache")] == stamps


def test_a_teacher_of_embeddings_alone_gets_a_head_and_can_be_listened_to(folder: Path, tmp_path: Path) -> None:
    kind = 'kind = "torch"\nfactory = "strategy_teacher:make"\n'
    run = open_run(write(folder, 'strategy = "meta"', kind=kind), tmp_path / "run", allow_code=True)
    trained = run.distill()[SMALL]
    assert trained.result.history[-1]["loss/kd"] > 0
    assert (tmp_path / "run" / "students" / SMALL / "teacher.safetensors").is_file()
    row = run.references()[0]
    assert row.metric is None
    assert "gives no class logits" in row.note
    with pytest.raises(InputError, match="no logits"):
        open_run(write(folder, "", kind=kind), tmp_path / "run", allow_code=True).student(SMALL)


class _Stop(Silent):
    """A user who presses Ctrl-C after so many batches of the task of that title."""

    def __init__(self, title: str, batches: int) -> None:
        self.title, self.batches = title, batches

    @contextmanager
    def task(self, title: str, total: int | None, unit: str = "samples") -> Iterator[Task]:
        with super().task(title, total, unit) as task:
            yield self if title.startswith(self.title) else task

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.batches -= 1
        if not self.batches:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("teacher", "stopped", "artefact"),
    [(GENERIC, "teacher", "teacher--generic"), (LGTM, "student", f"students/{SMALL}")],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    folder: Path, tmp_path: Path, teacher: str, stopped: str, artefact: str
) -> None:
    recipe = load_recipe(write(folder, teacher, epochs=2, kind=TRAINED.replace("epochs = 1", "epochs = 2")))
    with pytest.raises(Interrupted):
        Run(recipe, tmp_path / "stopped", progress=_Stop(stopped, 4)).student(SMALL)
    assert (tmp_path / "stopped" / f"{artefact}.partial").is_dir()
    weights = []
    for name in ("stopped", "whole"):
        Run(recipe, tmp_path / name).student(SMALL)
        found: dict[tuple[str, str, str], torch.Tensor] = {}
        for part in (artefact, f"students/{SMALL}"):
            for file in (tmp_path / name / part).glob("*.safetensors"):
                found |= {(part, file.name, key): value for key, value in load_file(file).items()}
        weights.append(found)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


# -- dry runs ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_times_real_steps_of_the_strategy(folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "never")

    def stages(teacher: str) -> dict[str, dict[str, float]]:
        result = edgestill("-q", "run", write(folder, teacher, targets=BOTH), "--out", out, "--dry-run", "--json")
        assert result.status == 0, result.err
        return {stage["name"]: stage for stage in json.loads(result.out)["stages"]}

    conditioned = stages(GENERIC)
    assert "teacher (generic, 2 students) conv-w12-d1-k3" in conditioned
    own = stages(SFTN)
    assert [name for name in own if name.startswith("teacher (sftn")] == [
        f"teacher (sftn, {arch}) conv-w12-d1-k3" for arch in (SMALL, WIDE)
    ]
    coached = stages(LGTM)
    assert {"teacher conv-w12-d1-k3", f"student {SMALL} (lgtm)", f"plain student {SMALL}"} <= set(coached)
    assert not (tmp_path / "never").exists()


def test_a_dry_run_knows_that_a_coached_teacher_starts_from_the_trained_one(folder: Path, tmp_path: Path) -> None:
    run = open_run(write(folder, ""), tmp_path / "run")
    run.distill()
    recipe = write(folder, LGTM)
    result = edgestill("-q", "run", recipe, "--out", str(tmp_path / "run"), "--dry-run", "--json")
    done = {stage["name"]: stage["finished"] for stage in json.loads(result.out)["stages"]}
    assert done["teacher conv-w12-d1-k3"]
    assert done["teacher cache"]
    assert not done[f"student {SMALL} (lgtm)"]
    given = write(folder, LGTM, kind='kind = "torch"\nfactory = "strategy_teacher:make"\nclassification = true\n')
    result = edgestill("-q", "run", given, "--out", str(tmp_path / "new"), "--dry-run", "--json", "--allow-code")
    seconds = {stage["name"]: stage["seconds"] for stage in json.loads(result.out)["stages"]}
    assert seconds[f"student {SMALL} (lgtm)"] is None


# -- studies ----------------------------------------------------------------------------------------------------------


def test_a_study_compares_strategies_and_trains_each_as_it_is_called(folder: Path, tmp_path: Path) -> None:
    """Two processes train; strategies are methods, and all coached ones share the frozen one's teacher and cache."""
    vary = {"objective": ["supervised", "kd"], "teacher.strategy": ["frozen", "online", "lgtm"]}
    recipe = load_recipe(write(folder, ""))
    study = Study(recipe, tmp_path / "study", vary=vary, seeds=1, jobs=2, keep_students=True)
    report = study.run()
    assert report.exit_status == 0
    names = ["supervised", "kd (frozen)", "kd (online)", "kd (lgtm)"]
    assert list(report.methods) == names
    assert [path.name for path in tmp_path.joinpath("study").glob("base*")] == ["base"]
    assert not (tmp_path / "study" / "base" / "teacher--generic").exists()
    results = {cell.combination.method: (cell, cell.read()) for cell in study.cells}
    for name in names[:2]:
        cell, result = results[name]
        assert not [term for term in result.terms if "coached" in term or "teacher" in term]
        assert not (cell.folder / "student" / "teacher.safetensors").exists()
    for name in names[2:]:
        cell, result = results[name]
        assert "validation/teacher_top1" in result.terms
        assert (cell.folder / "student" / "teacher.safetensors").is_file()
    assert "coached/influence" in results["kd (lgtm)"][1].terms
    assert "coached/influence" not in results["kd (online)"][1].terms
    assert results["kd (lgtm)"][1].train_samples == results["kd (frozen)"][1].train_samples
    logits = [np.array(results[name][0].logits()) for name in names]
    assert not any(np.array_equal(a, b) for i, a in enumerate(logits) for b in logits[:i])
    (teacher,) = report.teachers
    assert teacher.methods == tuple(names[1:])
    assert any("learns along with every student" in note for note in report.notes)
    # the same again has nothing to do, and one more strategy trains only what is new
    keys = [cell.folder for cell in study.cells]
    before = [when(place) for place in keys]
    more = {"objective": ["kd"], "teacher.strategy": ["frozen", "lgtm", "generic"]}
    again = Study(load_recipe(write(folder, "")), tmp_path / "study", vary=more, seeds=1, keep_students=True)
    found = again.run()
    assert [when(place) for place in keys] == before
    assert [row.method for row in found.blocks[0].rows] == ["kd (frozen)", "kd (lgtm)", "kd (generic)"]
    assert any(teacher.conditioned_on == "a pool of 9 students" for teacher in found.teachers)
    (other,) = (tmp_path / "study").glob("base-*")
    assert (other / "teacher--generic" / "pool.json").is_file()


def test_a_study_refuses_a_strategy_before_training(folder: Path, tmp_path: Path) -> None:
    asked = ["--vary", "objective=kd,lelp", "--vary", "teacher.strategy=frozen,lgtm", "--seeds", "1"]
    result = edgestill("-q", "study", write(folder, ""), *asked, "--out", str(tmp_path / "study"))
    assert result.status == 2
    assert "lelp (lgtm)" in result.err
    assert "stands still" in result.err
    assert not (tmp_path / "study" / "cells").exists()
    held = write(folder, "", name="few")
    asked = ["--vary", "teacher.strategy=lgtm", "--vary", "data.train_size=30", "--seeds", "1"]
    result = edgestill("-q", "study", held, *asked, "--out", str(tmp_path / "few"))
    assert result.status == 2
    assert "teacher.coached.held_out" in result.err


@pytest.mark.parametrize(
    ("kind", "strategy", "objective", "words"),
    [
        (
            'kind = "array"\nlogits = "nowhere.npy"\n',
            "lgtm",
            "kd",
            "kd (lgtm): strategy .* stored outputs do not learn",
        ),
        ('kind = "torch"\nfactory = "nowhere:make"\n', "generic", "kd", "no stage boundaries"),
        (TRAINED, "online", "lelp", "stands still"),
        (TRAINED, "generic", "subclass", "two heads"),
    ],
)
def test_a_studys_dry_run_refuses_a_strategy_without_data(
    folder: Path, tmp_path: Path, kind: str, strategy: str, objective: str, words: str
) -> None:
    recipe = Path(write(folder, "", kind=kind, views=1, name="dry"))
    recipe.write_text(recipe.read_text().replace("three.npz", "nowhere.npz"))
    asked = ["--vary", f"objective=supervised,{objective}", "--vary", f"teacher.strategy=frozen,{strategy}"]
    result = edgestill("-q", "study", str(recipe), *asked, "--out", str(tmp_path / "study"), "--dry-run")
    assert result.status == 2, result.err
    assert re.search(words.replace("(", r"\(").replace(")", r"\)"), " ".join(result.err.split()))
    # the labels alone ask no teacher
    allowed = ["--vary", "objective=supervised", "--set", f"teacher.strategy={strategy}", "--dry-run"]
    assert edgestill("-q", "study", str(recipe), *allowed, "--out", str(tmp_path / "study")).status == 0


def test_a_study_has_a_generic_teacher_for_every_kind_of_students(folder: Path, tmp_path: Path) -> None:
    """The recipe's own student is of kind conv, one of the varied ones is not; the teacher is too costly to train."""
    archs = ["conv-w8-d2-k3", "convi-w8-d1-k3", "convi-w20-d1-k3"]

    def opened(*archs: str, teacher: str = 'strategy = "generic"') -> Study:
        recipe = load_recipe(write(folder, teacher))
        return Study(recipe, tmp_path / "study", vary={"objective": ["kd"], "student.arch": archs}, seeds=1)

    study = opened(*archs)
    own, *others = [study.base(combination) for combination in study.grid.combinations]
    assert own.folder.name == "base"
    assert others[0] is others[1] is not own
    assert {str(arch).split("-")[0] for arch in own.pool} == {"conv"}
    assert {str(arch).split("-")[0] for arch in others[0].pool} == {"convi"}
    # the recipe's own student is a member, and what else a study compares changes neither pool
    assert SMALL in map(str, own.pool)
    assert "convi-w8-d1-k3" in map(str, others[0].pool)
    alone = opened("convi-w20-d1-k3")
    (base,) = [alone.base(combination) for combination in alone.grid.combinations]
    assert (base.folder, base.pool) == (others[0].folder, others[0].pool)
    # a pool that is named, and a teacher of another strategy, serve all of them
    for teacher in ('strategy = "generic"\ngeneric = {archs = ["conv-w8-d1-k3"]}', ""):
        study = opened(*archs, teacher=teacher)
        assert len({id(study.base(combination)) for combination in study.grid.combinations}) == 1


def test_a_study_tells_which_students_are_in_no_pool(folder: Path, tmp_path: Path) -> None:
    vary = {"teacher.strategy": ["frozen", "generic"], "student.arch": [WIDE, "conv-w20-d1-k3"]}
    recipe = load_recipe(write(folder, "", train="hard_weight = 0.5"))
    study = Study(recipe, tmp_path / "study", vary=vary, seeds=1)
    report = study.run()
    assert report.exit_status == 0
    told = [note for note in report.notes if "pool" in note]
    assert told == ["conv-w20-d1-k3 is not in the pool of its generic teacher, which was not conditioned on it"]


def test_a_study_with_a_students_start_from_the_pool_keys_it(folder: Path, tmp_path: Path) -> None:
    table = GENERIC.replace("paths = 1", "paths = 1, inherit = true")
    keys = []
    for name, teacher in (("warm", table), ("cold", GENERIC)):
        study = Study(
            load_recipe(write(folder, teacher, name=name)), tmp_path / name, vary={"objective": ["kd"]}, seeds=1
        )
        (job,) = study.prepare()
        keys.append((job.shared is not None, job.key))
        study.run()
        before = when(job.cell.folder)
        again = Study(study.loaded, study.folder, vary={"objective": ["kd"]}, seeds=1)
        again.run()
        assert when(job.cell.folder) == before
    assert keys[0][0]
    assert not keys[1][0]
    assert keys[0][1] != keys[1][1]
