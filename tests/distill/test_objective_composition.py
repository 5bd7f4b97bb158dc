import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from distill.data.dataset import Dataset, InputSpec, Split, Task
from distill.data.section import AugmentSection
from distill.objectives import compose
from distill.objectives.base import Objective
from distill.objectives.compose import build_objective, head_size
from distill.objectives.kd import kd_loss
from distill.objectives.section import (
    EmbeddingCompressionSection,
    KDSection,
    LELPSection,
    ObjectiveSections,
    RKDSection,
    SubclassSection,
    SupervisedSection,
    check_data,
    check_mixup,
    check_needs,
    describe_objectives,
    resolve_hard_weight,
)
from distill.outputs import StudentOutput, TeacherOutput
from distill.train_section import TrainSection
from profiles.errors import InputError, Interrupted
from tests.distill.objective_cases import batch, random
from tests.distill.training_cases import Case, StopAfter, same_weights

READ = TypeAdapter(ObjectiveSections).validate_python
LABELS = np.array([0, 1, 2, 0])
SPLIT = Split(np.zeros((4, 1, 4, 4), np.uint8), LABELS)
DATA = Dataset("toy", "multiclass", ("a", "b", "c"), InputSpec("image", (1, 4, 4)), SPLIT, SPLIT, SPLIT, "key")


def cache(embedding: int | None = 8, logits: int | None = 3) -> Any:
    return SimpleNamespace(
        key="cache",
        views=1,
        train_embedding=None if embedding is None else np.zeros((1, 4, embedding), np.float32),
        train_logits=None if logits is None else np.zeros((1, 4, logits), np.float32),
    )


def test_a_name_alone_is_the_published_mix() -> None:
    assert READ("ec") == (EmbeddingCompressionSection(),)
    assert READ([{"kind": "kd", "weight": 0.5}, "ec"]) == (KDSection(weight=0.5), EmbeddingCompressionSection())


@pytest.mark.parametrize(("value", "message"), [("kdd", 'did you mean "kd"'), ([], "at least one"), ([{}], "a kind")])
def test_what_is_no_objective_is_refused_with_a_hint(value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        READ(value)


def test_sections_survive_a_round_trip_through_json() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ObjectiveSections)
    sections = READ(["ec", {"kind": "kd", "tau": 2.0}])
    assert adapter.validate_json(adapter.dump_json(sections)) == sections


def test_the_ground_truth_weight_is_the_methods_own_unless_given() -> None:
    published = {entry.kind: 1.0 for entry in describe_objectives()}
    published |= {"kd": 0.1, "mse": 0.1, "embedding": 0.1, "embedding_compression": 0.3, "lelp": 0.0}
    assert {kind: resolve_hard_weight(READ(kind), None) for kind in published} == published
    assert resolve_hard_weight(READ("kd"), 0.5) == 0.5


def test_several_objectives_need_a_ground_truth_weight() -> None:
    with pytest.raises(InputError) as error:
        build_objective(READ(["kd", "ec"]), DATA, cache(), student_dim=6)
    assert error.value.where == "train.hard_weight"
    assert build_objective(READ(["kd", "ec"]), DATA, cache(), student_dim=6, hard_weight=0.2).hard_weight == 0.2


@pytest.mark.parametrize(
    ("kind", "teacher", "missing"),
    [
        *((kind, cache(logits=None), "logits") for kind in ("kd", "dkd", "dist", "embedding")),
        *((kind, cache(embedding=None), "embeddings") for kind in ("ec", "embedding", "fitnet", "vid", "rkd", "crd")),
        *((kind, cache(embedding=None), "embeddings") for kind in ("lelp", "subclass", "distance_correlation")),
        ("kd", None, "logits"),
    ],
)
def test_a_teacher_without_what_the_objective_needs_is_refused(kind: str, teacher: Any, missing: str) -> None:
    with pytest.raises(InputError, match=f"no {missing}") as error:
        build_objective(READ(["supervised", kind]), DATA, teacher, student_dim=6, hard_weight=1.0)
    assert error.value.where == "objective[1].kind"


def test_needs_are_checked_before_there_is_a_teacher() -> None:
    check_needs(READ("kd"), frozenset({"labels", "logits"}))
    with pytest.raises(InputError, match="no logits"):
        check_needs(READ("kd"), frozenset({"labels", "embedding"}))


def test_logits_of_another_task_are_refused() -> None:
    for kind in ("kd", "dkd", "dist", "embedding"):
        with pytest.raises(InputError, match="1000 classes, the data 3"):
            build_objective(READ(kind), DATA, cache(logits=1000), student_dim=6)
    build_objective(READ("ec"), DATA, cache(logits=1000), student_dim=6)


def outputs() -> tuple[StudentOutput, TeacherOutput]:
    s = random(4, 6, seed=1, dtype=torch.float32)
    return StudentOutput(s, s[:, :3]), TeacherOutput(
        random(4, 8, seed=2, dtype=torch.float32), random(4, 3, seed=3, dtype=torch.float32)
    )


def test_a_mix_has_the_terms_of_its_members_and_no_ground_truth() -> None:
    mix = build_objective(READ(["kd", "ec", "supervised"]), DATA, cache(), student_dim=6, hard_weight=0.2)
    terms = mix(*outputs(), batch(torch.from_numpy(LABELS)))
    assert set(terms) == {"kd", "embedding_compression/distance", "embedding_compression/task"}
    student, teacher = outputs()
    assert teacher.logits is not None
    assert float(terms["kd"]) == pytest.approx(0.8 * float(kd_loss(student.head, teacher.logits, 4.0)))


def test_two_objectives_of_one_kind_keep_both_terms() -> None:
    mix = build_objective(READ(["kd", {"kind": "kd", "tau": 1}]), DATA, cache(), student_dim=6, hard_weight=0.2)
    assert set(mix(*outputs(), batch(torch.from_numpy(LABELS)))) == {"objective[0]/kd", "objective[1]/kd"}


def test_parameters_are_a_function_of_the_seed_and_the_global_generator_stays() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, same, other = (build_objective(READ("ec"), DATA, cache(), student_dim=6, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    weights = [mix.state_dict()["objectives.0.transform.weight"] for mix in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


class DoublingHead(Objective):
    """Two outputs per class, summed in pairs: the smallest objective that changes the head."""

    @staticmethod
    def head_size(section: Any, classes: int) -> int:
        return 2 * classes

    def class_logits(self, head: Tensor) -> Tensor:
        return head.unflatten(1, (-1, 2)).logsumexp(2)

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Any) -> dict[str, Tensor]:
        return {"doubled": student.head.square().mean()}


def test_one_objective_may_change_the_head_and_the_others_read_its_class_logits(monkeypatch) -> None:
    monkeypatch.setitem(compose._MODULES, "supervised", DoublingHead)
    sections = (SupervisedSection(), KDSection())
    assert head_size(sections, 3) == 6
    mix = build_objective(sections, DATA, cache(), student_dim=6, hard_weight=0.0)
    student, teacher = outputs()
    wide = StudentOutput(student.embedding, student.embedding)
    terms = mix(wide, teacher, batch(torch.from_numpy(LABELS)))
    assert teacher.logits is not None
    assert float(terms["doubled"]) == pytest.approx(float(wide.head.square().mean()))
    assert float(terms["kd"]) == pytest.approx(float(kd_loss(mix.class_logits(wide.head), teacher.logits, 4.0)))


def test_two_objectives_that_change_the_head_are_refused(monkeypatch) -> None:
    monkeypatch.setitem(compose._MODULES, "supervised", DoublingHead)
    with pytest.raises(InputError, match="size of the student's head"):
        head_size((SupervisedSection(), SupervisedSection()), 3)


@pytest.mark.parametrize("pair", ["kd+lelp+subclass", "kd+subclass+lelp", "kd+lelp+lelp"])
def test_two_objectives_that_split_classes_are_refused(pair: str) -> None:
    with pytest.raises(InputError, match="size of the student's head") as error:
        head_size(READ(pair), 3)
    assert error.value.where == "objective[2].kind"
    assert error.value.evidence == pair.removeprefix("kd+").replace("+", " and ")
    assert head_size((KDSection(), LELPSection(subclasses_per_class=4)), 3) == 12
    assert head_size((SubclassSection(subclasses_per_class=2), KDSection()), 3) == 6


@pytest.mark.parametrize("kind", ["ec", "distance_correlation", "cosine_difference", "dkd", "dist"])
def test_mixup_is_refused_where_it_would_be_wrong(kind: str) -> None:
    with pytest.raises(InputError) as error:
        build_objective(READ(kind), DATA, cache(), student_dim=6).check_mixup(0.2)
    assert error.value.where == "train.mixup"
    build_objective(READ("kd"), DATA, cache(), student_dim=6).check_mixup(0.2)


def test_mixup_is_checked_before_there_is_a_teacher() -> None:
    with pytest.raises(InputError, match='objective "embedding_compression"') as error:
        check_mixup((*READ("kd"), *READ("ec")), 0.2)
    assert "embedding of a mixed image" in error.value.evidence
    with pytest.raises(InputError, match='objective "dkd"') as error:
        check_mixup(READ("kd+dkd"), 0.2)
    assert "loss for mixed targets" in error.value.evidence
    check_mixup(READ("ec"), 0.0)
    check_mixup(READ("kd"), 0.2)


def test_a_string_joined_by_plus_is_several_objectives() -> None:
    assert READ("kd+rkd") == (KDSection(), RKDSection())
    assert READ("ec+lelp+ec") == (EmbeddingCompressionSection(), LELPSection(), EmbeddingCompressionSection())
    with pytest.raises(InputError) as error:
        build_objective(READ("kd+dist"), DATA, cache(), student_dim=6)
    assert error.value.where == "train.hard_weight"
    mix = build_objective(READ("kd+dist"), DATA, cache(), student_dim=6, hard_weight=0.5)
    assert set(mix(*outputs(), batch(torch.from_numpy(LABELS)))) == {"kd", "dist/classes", "dist/samples"}


@pytest.mark.parametrize(("value", "message"), [("kd+rkdd", 'did you mean "rkd"'), ("kd+", 'no objective ""')])
def test_a_part_of_a_joined_string_that_is_no_objective_is_refused(value: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        READ(value)


# -- what the data cannot serve ----------------------------------------------------------------------------------------


def labelled(task: Task = "multiclass", classes: int = 3, rows: int = 4) -> Dataset:
    labels = np.zeros(rows, np.int64) if task == "multiclass" else np.zeros((rows, classes), np.uint8)
    split = Split(np.zeros((rows, 1, 4, 4), np.uint8), labels)
    spec = InputSpec("image", (1, 4, 4))
    return Dataset("toy", task, tuple(str(k) for k in range(classes)), spec, split, split, split, "key")


@pytest.mark.parametrize("kind", ["dkd", "lelp", "subclass"])
def test_objectives_that_need_classes_which_exclude_each_other_refuse_several_labels(kind: str) -> None:
    with pytest.raises(InputError, match=f'"{kind}" is not defined for several labels') as error:
        build_objective(READ(f"kd+{kind}"), labelled("multilabel"), cache(), student_dim=6, hard_weight=0.5)
    assert error.value.where == "objective[1].kind"
    assert "multilabel" in error.value.evidence
    for other in error.value.fix.removeprefix("one of: ").split(", "):
        check_data(READ(other), "multilabel", 3, 4)


def test_all_other_objectives_are_defined_for_several_labels() -> None:
    for entry in describe_objectives():
        assert ("multilabel" in entry.tasks) == (entry.kind not in {"dkd", "lelp", "subclass"})
        if "multilabel" in entry.tasks:
            check_data(READ(entry.kind), "multilabel", 3, 100)


@pytest.mark.parametrize("kind", ["dkd", "dist"])
@pytest.mark.parametrize("classes", [1, 2])
def test_objectives_that_compare_the_other_classes_refuse_two(kind: str, classes: int) -> None:
    with pytest.raises(InputError, match=f"more than two classes, and there are {classes}") as error:
        build_objective(
            READ(f"kd+{kind}"), labelled(classes=classes), cache(logits=classes), student_dim=6, hard_weight=0.5
        )
    assert error.value.where == "objective[1].kind"
    check_data(READ("kd+lelp"), "multiclass", 2, 100)
    check_data(READ(kind), "multiclass", 3, 100)


def test_two_labels_that_a_sample_may_both_have_are_refused_without_naming_what_needs_one() -> None:
    with pytest.raises(InputError, match="more than two classes") as error:
        check_data(READ("dist"), "multilabel", 2, 100)
    assert error.value.fix == '"kd"'


def test_every_other_objective_takes_two_classes() -> None:
    for entry in describe_objectives():
        if entry.kind not in {"dkd", "dist"}:
            check_data(READ(entry.kind), "multiclass", 2, 100)


def test_more_negatives_than_other_samples_are_refused() -> None:
    sections = READ(["kd", {"kind": "crd", "negatives": 4}])
    with pytest.raises(InputError, match="4 negatives") as error:
        build_objective(sections, DATA, cache(), student_dim=6, hard_weight=0.5)
    assert error.value.where == "objective[1].negatives"
    assert error.value.fix.startswith("negatives = 3 or fewer")
    check_data(READ([{"kind": "crd", "negatives": 3}]), "multiclass", 3, 4)
    check_data(READ("crd"), "multiclass", 3, 4)


@pytest.mark.parametrize("kind", ["lelp", "subclass"])
@pytest.mark.parametrize("subclasses", [4, 5, 1000])
def test_more_subclasses_than_training_samples_are_refused(kind: str, subclasses: int) -> None:
    sections = READ(["kd", {"kind": kind, "subclasses_per_class": subclasses}])
    with pytest.raises(InputError, match=f"{subclasses} subclasses per class") as error:
        build_objective(sections, DATA, cache(), student_dim=6, hard_weight=0.5)
    assert error.value.where == "objective[1].subclasses_per_class"
    assert error.value.fix == "subclasses_per_class = 3 or fewer"
    check_data(READ([{"kind": kind, "subclasses_per_class": 3}]), "multiclass", 3, 4)


COMPRESSED = {"kind": "lelp", "on": "compressed", "subclasses_per_class": 2}
FROZEN = {"kind": "ec", "schedule": "frozen"}


@pytest.mark.parametrize("others", [[], ["kd"], [FROZEN, FROZEN]])
def test_lelp_on_a_compressed_embedding_needs_one_transform(others: list[Any]) -> None:
    with pytest.raises(InputError, match="needs one objective") as error:
        build_objective(READ([*others, COMPRESSED]), DATA, cache(), student_dim=6, hard_weight=0.5)
    assert error.value.where == f"objective[{len(others)}].on"


@pytest.mark.parametrize("schedule", ["joint", "warmup"])
def test_lelp_on_a_compressed_embedding_needs_a_transform_that_stands_still(schedule: str) -> None:
    sections = READ(["kd", COMPRESSED, {"kind": "ec", "schedule": schedule}])
    with pytest.raises(InputError, match="stands still") as error:
        build_objective(sections, DATA, cache(), student_dim=6, hard_weight=0.5)
    assert error.value.where == "objective[2].schedule"
    assert schedule in error.value.evidence
    check_data(READ(["kd", COMPRESSED, FROZEN]), "multiclass", 3, 4)
    check_data(READ(["ec", {**COMPRESSED, "on": "embedding"}]), "multiclass", 3, 4)


# -- weight schedules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "factors"),
    [
        ({}, {0.0: 1, 0.5: 1, 1.0: 1}),
        ({"weight_schedule": "warm-up"}, {0.0: 0, 0.05: 0.5, 0.1: 1, 0.5: 1, 1.0: 1}),
        ({"weight_schedule": "warm-up", "weight_share": 0.4}, {0.0: 0, 0.1: 0.25, 0.4: 1, 1.0: 1}),
        ({"weight_schedule": "warm-up", "weight_share": 1}, {0.0: 0, 0.25: 0.25, 1.0: 1}),
        ({"weight_schedule": "decay"}, {0.0: 1, 0.25: 0.75, 0.5: 0.5, 1.0: 0}),
        ({"weight_schedule": "decay", "weight_share": 0.5}, {0.0: 1, 0.5: 1, 0.75: 0.5, 1.0: 0}),
    ],
)
def test_a_weight_schedule_rises_or_falls_linearly_over_its_share(keys: Any, factors: dict[float, float]) -> None:
    section = KDSection(**keys)
    assert {progress: section.factor(progress) for progress in factors} == pytest.approx(factors)


@settings(deadline=None)
@given(
    schedule=st.sampled_from(["warm-up", "decay"]),
    share=st.none() | st.floats(0, 1, exclude_min=True),
    points=st.lists(st.floats(0, 1), min_size=2).map(sorted),
)
def test_a_weight_schedule_stays_within_0_and_1_and_never_turns(
    schedule: Any, share: float | None, points: list[float]
) -> None:
    section = KDSection(weight_schedule=schedule, weight_share=share)
    factors = [section.factor(point) for point in points]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors == sorted(factors, reverse=schedule == "decay")
    ends = {"constant": (1, 1), "warm-up": (0, 1), "decay": (1, 0)}
    assert (section.factor(0.0), section.factor(1.0)) == ends[schedule]


@pytest.mark.parametrize("keys", [{"weight_schedule": "cosine"}, {"weight_share": 0}, {"weight_share": 1.1}])
def test_what_is_no_weight_schedule_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(keys))):
        READ([{"kind": "kd", **keys}])


@pytest.mark.parametrize("progress", [0.0, 0.03, 0.6, 1.0])
def test_a_schedule_multiplies_the_terms_of_its_own_objective_alone(progress: float) -> None:
    plain = READ(["ec", "kd", "dist"])
    moving = READ([{"kind": "ec", "weight_schedule": "decay"}, "kd", {"kind": "dist", "weight_schedule": "warm-up"}])
    at = batch(torch.from_numpy(LABELS))._replace(progress=progress)
    constant, scheduled = (
        build_objective(sections, DATA, cache(), student_dim=6, hard_weight=0.2)(*outputs(), at)
        for sections in (plain, moving)
    )
    factors = {"embedding_compression": 1 - progress, "kd": 1.0, "dist": min(1.0, progress / 0.1)}
    expected = {name: factors[name.split("/")[0]] * term.item() for name, term in constant.items()}
    assert {name: term.item() for name, term in scheduled.items()} == pytest.approx(expected)


class Recorder(Objective):
    """Keeps the progress that each step was at."""

    def __init__(self, section: Any, shapes: Any) -> None:
        super().__init__(section, shapes)
        self.seen: list[float] = []

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Any) -> dict[str, Tensor]:
        self.seen.append(batch.progress)
        return {}


def test_training_says_at_every_step_which_share_of_it_is_done(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(compose._MODULES, "supervised", Recorder)
    case = Case(objective="supervised", section=TrainSection(epochs=3, batch_size=24))
    _, _, objective = case.run(tmp_path / "run")
    assert objective.objectives[0].seen == pytest.approx([step / 12 for step in range(12)])


def test_training_logs_the_terms_as_the_schedules_weigh_them(tmp_path: Path) -> None:
    # one step per epoch and a student that stands still: only the schedules move the terms
    case = Case(
        objective=[
            {"kind": "kd"},
            {"kind": "dist", "weight_schedule": "decay"},
            {"kind": "dkd", "weight_share": 0.5},
        ],
        section=TrainSection(epochs=4, batch_size=96, learning_rate=1e-12, hard_weight=0.5),
        augmentation=AugmentSection(views=1),
        norm=False,
        views=1,
    )
    history = case.run(tmp_path / "run")[0].history

    def relative(term: str, reference: float) -> list[float]:
        return [record[f"loss/{term}"] / reference for record in history]

    assert relative("kd", history[0]["loss/kd"]) == pytest.approx([1, 1, 1, 1], rel=1e-4)
    assert relative("dist/classes", history[0]["loss/dist/classes"]) == pytest.approx([1, 0.75, 0.5, 0.25], rel=1e-4)
    assert relative("dkd/rest", history[-1]["loss/dkd/rest"]) == pytest.approx([0, 0.5, 1, 1], rel=1e-4)


def test_a_resumed_training_goes_on_where_the_schedule_was(tmp_path: Path) -> None:
    case = Case(
        objective=[{"kind": "kd", "weight_schedule": "decay"}, "dkd"],
        section=TrainSection(epochs=3, batch_size=24, hard_weight=0.5),
    )
    _, whole, _ = case.run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        case.run(tmp_path / "parts", StopAfter(5))
    _, resumed, _ = case.run(tmp_path / "parts")
    assert same_weights(whole, resumed)


def test_every_objective_is_described_by_its_own_fields() -> None:
    described = {entry.kind: entry for entry in describe_objectives()}
    assert set(described) == set(compose._MODULES)
    assert described["supervised"].control
    assert described["embedding_compression"].aliases == ("ec",)
    assert [p.default for p in described["kd"].parameters if p.name == "tau"] == [4.0]
    for entry in described.values():
        assert entry.source
        assert all(parameter.meaning for parameter in entry.parameters)


def test_reading_a_recipe_loads_no_torch() -> None:
    code = "import sys, distill.objectives.section, distill.train_section; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"kind": "kd", "weight_share": 0.2}, '"weight_share" changes nothing with weight_schedule = "constant"'),
        ({"kind": "supervised", "weight": 0.5}, "train.hard_weight"),
        ({"kind": "supervised", "weight_schedule": "decay"}, "train.hard_weight"),
        ({"kind": "lelp", "subclasses": "random", "rotation": False}, 'belongs to "projection"'),
        ({"kind": "ec", "hidden": 8}, 'belongs to "mlp"'),
        ({"kind": "ec", "schedule": "frozen", "warmup_epochs": 5}, 'belongs to "warmup"'),
        ({"kind": "ec", "distance": "cosine", "biased": True}, 'belongs to "distance_correlation"'),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(says)):
        READ(table)


def test_a_setting_that_its_neighbour_gives_a_meaning_is_taken() -> None:
    (dkd,) = READ({"kind": "dkd", "weight_share": 0.2})
    assert dkd.factor(0.1) == 0.5
    assert READ({"kind": "ec", "transform": "mlp", "hidden": 8})[0].hidden == 8
