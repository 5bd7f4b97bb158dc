import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from distill.data.dataset import Dataset, InputSpec, Split
from distill.objectives import compose
from distill.objectives.base import Objective
from distill.objectives.compose import build_objective, head_size
from distill.objectives.kd import kd_loss
from distill.objectives.section import (
    EmbeddingCompressionSection,
    KDSection,
    ObjectiveSections,
    SupervisedSection,
    check_mixup,
    check_needs,
    describe_objectives,
    resolve_hard_weight,
)
from distill.outputs import StudentOutput, TeacherOutput
from profiles.errors import InputError
from tests.distill.objective_cases import batch, random

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
    published = {"supervised": 1.0, "kd": 0.1, "ec": 0.3, "distance_correlation": 1.0, "cosine_difference": 1.0}
    assert {kind: resolve_hard_weight(READ(kind), None) for kind in published} == published
    assert resolve_hard_weight(READ("kd"), 0.5) == 0.5


def test_several_objectives_need_a_ground_truth_weight() -> None:
    with pytest.raises(InputError) as error:
        build_objective(READ(["kd", "ec"]), DATA, cache(), student_dim=6)
    assert error.value.where == "train.hard_weight"
    assert build_objective(READ(["kd", "ec"]), DATA, cache(), student_dim=6, hard_weight=0.2).hard_weight == 0.2


@pytest.mark.parametrize(
    ("kind", "teacher", "missing"),
    [("kd", cache(logits=None), "logits"), ("ec", cache(embedding=None), "embeddings"), ("kd", None, "logits")],
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
    with pytest.raises(InputError, match="1000 classes, the data 3"):
        build_objective(READ("kd"), DATA, cache(logits=1000), student_dim=6)
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


@pytest.mark.parametrize("kind", ["ec", "distance_correlation", "cosine_difference"])
def test_mixup_is_refused_where_mixed_embeddings_would_be_wrong(kind: str) -> None:
    with pytest.raises(InputError) as error:
        build_objective(READ(kind), DATA, cache(), student_dim=6).check_mixup(0.2)
    assert error.value.where == "train.mixup"
    build_objective(READ("kd"), DATA, cache(), student_dim=6).check_mixup(0.2)


def test_mixup_is_checked_before_there_is_a_teacher() -> None:
    with pytest.raises(InputError, match='objective "embedding_compression"'):
        check_mixup((*READ("kd"), *READ("ec")), 0.2)
    check_mixup(READ("ec"), 0.0)
    check_mixup(READ("kd"), 0.2)


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
