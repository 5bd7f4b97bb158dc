import copy
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from distill import training
from distill.data.dataset import Split
from distill.objectives.kd import kd_loss
from distill.outputs import StudentOutput
from distill.strategies.coached import Coached
from distill.strategies.virtual_step import untouched
from distill.strategy import Step
from distill.teachers import load_teacher
from distill.teachers.section import TeacherSection
from distill.teachers.strategy_section import CoachedSection, GenericSection
from distill.teachers.teacher import NetworkTeacher
from profiles.errors import InputError, Interrupted
from profiles.section import Section
from tests.distill.coached_cases import Coaching, Looking, bytes_of, clean, exact, gradient
from tests.distill.distributed_coaching import CASES, coached
from tests.distill.test_training import Reads
from tests.distill.test_virtual_step import equal
from tests.distill.training_cases import Case, StopAfter, dataset

ROOT = Path(__file__).parents[2]
CONV = Case("kd", arch="conv-w8-d1-k3", data=dataset(60)).with_(batch_size=12)
TEXT = Case("kd", data=dataset(60, tokens=True), views=1, arch="text-w16-d1-h2").with_(batch_size=12)


def moved(coached: Coached, build: Coaching) -> bool:
    fresh = build.build().learner
    pairs = zip(coached.learner.parameters_that_learn(), fresh.parameters_that_learn(), strict=True)
    return all(not torch.equal(a, b) for a, b in pairs)


# -- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("derivative", ["finite_difference", "jvp"])
@pytest.mark.parametrize("strategy", ["online", "meta", "lgtm"])
@pytest.mark.parametrize(
    ("case", "teacher"),
    [
        pytest.param(CONV, "conv-w12-d1-k3", id="conv"),
        pytest.param(TEXT, "text-w24-d1-h2", id="text"),
        pytest.param(replace(TEXT, arch="textc-w16-d1-k3"), "text-w24-d1-h2", id="textc"),
    ],
)
def test_teacher_and_student_of_every_family_learn(
    case: Case, teacher: str, strategy: Any, derivative: Any, tmp_path: Path
) -> None:
    if strategy == "online" and derivative == "jvp":
        derivative = "finite_difference"  # without influence there is no derivative to take
    coaching = Coaching(strategy, CoachedSection(derivative=derivative), case.with_(epochs=1), teacher_arch=teacher)
    result, _, coached = coaching.run(tmp_path / "student")
    assert moved(coached, coaching)
    buffers = dict(coached.learner.network.named_buffers())
    assert all(equal(value, buffers[name]) for name, value in coaching.build().learner.network.named_buffers())
    assert not any(child.training for child in coached.learner.network.modules())
    (record,) = result.history
    assert 0 <= record["validation/teacher_top1"] <= 1
    assert all(np.isfinite(value) for value in record.values())
    assert ("coached/influence" in record) == (strategy != "online")
    assert ("coached/ground_truth" in record) == (strategy != "meta")
    assert ("coached/helpful_samples" in record) == (strategy != "online")
    assert ("coached/influence_ratio" in record) == (strategy == "lgtm")
    assert ("coached/unweighted_influence_ratio" in record) == (strategy == "lgtm")


def test_a_coached_training_learns_and_keeps_its_teacher(tmp_path: Path) -> None:
    case = Case("kd", arch="conv-w8-d1-k3").with_(epochs=8, learning_rate=0.02)
    result, _, coached = Coaching(case=case, teacher_arch="conv-w12-d1-k3", learning_rate=0.01).run(
        tmp_path / "student"
    )
    assert result.metric.value > 0.6
    first, last = result.history[0], result.history[-1]
    assert last["validation/teacher_top1"] > max(0.6, first["validation/teacher_top1"])
    assert last["coached/ground_truth"] < first["coached/ground_truth"]
    assert first["coached/influence_ratio"] == pytest.approx(0.1, rel=1e-5)
    kept = load_file(tmp_path / "student/teacher.safetensors")
    assert equal(kept, dict(coached.learner.network.state_dict()))


@pytest.mark.parametrize("objective", ["kd", "dist", "mse"])
def test_several_labels_with_unknown_ones_are_coached_too(objective: str, tmp_path: Path) -> None:
    case = Case(objective, data=dataset(task="multilabel"), norm=False).with_(class_weights="balanced", epochs=1)
    coaching = Coaching(case=case)
    result, _, coached = coaching.run(tmp_path / "student")
    assert result.history[0]["validation/teacher_mAP"] > 0
    assert "coached/helpful_samples" not in result.history[0]
    assert moved(coached, coaching)


@pytest.mark.parametrize("derivative", ["finite_difference", "jvp"])
def test_bf16_passes_of_the_student_leave_the_influence_in_float32(derivative: str, tmp_path: Path) -> None:
    coaching = Coaching(case=CONV.with_(precision="bf16", epochs=1), teacher_arch="conv-w12-d1-k3")
    kinds: set[torch.dtype] = set()

    def look(coached: Looking, step: Step) -> None:
        kinds.update(found.dtype for found in coached.influence(step))

    result, _, coached = coaching.with_(derivative=derivative).run(tmp_path / "student", look)
    assert result.precision == "bf16"
    assert kinds == {torch.float32}
    assert np.isfinite(result.history[0]["coached/influence"])
    assert moved(coached, coaching)


def test_the_teacher_descends_labels_and_the_students_say(tmp_path: Path) -> None:
    """One step of a learning rate so small that AdamW's is a step along the sign of the gradient."""
    coaching = replace(exact(), strategy="online", learning_rate=1e-6).with_(weight_decay=0.0)

    def look(coached: Looking, step: Step) -> None:
        told = coached._logits(step)
        said = coached.run.student(step.inputs).head.detach()
        labels = coached.run.data.labels[step.rows]
        wanted = 0.6 * torch.nn.functional.cross_entropy(told, labels) + 0.4 * kd_loss(told, said, 1.0)
        weights = coached.learner.parameters_that_learn()
        slopes = torch.autograd.grad(wanted, weights)
        before = [w.detach().clone() for w in weights]
        Coached.before_step(coached, step)
        for weight, old, slope in zip(weights, before, slopes, strict=True):
            assert torch.allclose(weight, old - 1e-6 * slope / (slope.abs() + 1e-8), atol=1e-12)
        coached.look = lambda *_: None

    coaching.run(tmp_path / "student", look)


# -- what both networks see -------------------------------------------------------------------------------------------


def test_both_learn_from_augmented_inputs_and_clean_ones_judge(tmp_path: Path) -> None:
    """Every pass of either network in the second epoch, whose views are not those of the first."""
    passes: list[tuple[str, bool, Tensor]] = []

    def look(coached: Looking, step: Step) -> None:
        if step.epoch != 1:
            return
        clean_rows = clean(coached, step.host_rows)
        assert not torch.equal(step.inputs, clean_rows)
        assert not torch.equal(step.inputs, coached.run.data.inputs(step.rows, step.host_rows, 0))
        hooks = [
            module.register_forward_pre_hook(
                lambda module, given, who=who: passes.append((who, module.training, given[0].clone()))
            )
            for who, module in (("student", coached.run.student), ("teacher", coached.learner.network))
        ]
        passes.clear()
        Coached.before_step(coached, step)
        coached.teacher(step)
        for hook in hooks:
            hook.remove()
        judging = clean(coached, coached.held_out_batch(step.number)[1])
        wanted = [
            ("teacher", False, step.inputs),
            ("student", True, step.inputs),
            ("student", False, judging),
            ("student", False, step.inputs),  # there and back along the direction
            ("student", False, step.inputs),
            ("teacher", False, step.inputs),
        ]
        assert [found[:2] for found in passes] == [each[:2] for each in wanted]
        assert all(torch.equal(found[2], each[2]) for found, each in zip(passes, wanted, strict=True))

    Coaching(case=Case("kd")).run(tmp_path / "student", look)
    assert passes


@pytest.mark.parametrize("strategy", ["online", "meta", "lgtm"])
def test_what_the_student_says_to_its_teacher_is_what_it_says_in_the_step_that_follows(
    strategy: Any, tmp_path: Path
) -> None:
    """To the bit, from a student with dropout and BatchNorm."""
    said: list[Tensor] = []

    class Noting(Looking):
        def _terms(self, step: Step, told: Tensor, student: Tensor) -> dict[str, Tensor]:
            said.append(student.clone())
            with torch.no_grad(), untouched(self.run.student):
                assert not torch.allclose(student, self.run.student.eval()(step.inputs).head, atol=1e-3)
            return super()._terms(step, told, student)

        def terms(self, step: Step, output: StudentOutput) -> dict[str, Tensor]:
            assert torch.equal(said[-1], output.head)
            return {}

    Coaching(strategy, case=Case("kd").with_(epochs=1), kind=Noting).run(tmp_path / "student")
    assert len(said) > 3


# -- what a step leaves behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["online", "meta", "lgtm"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_teachers_step_leaves_the_students_training_as_it_was(
    optimizer: str, strategy: Any, tmp_path: Path
) -> None:
    """To the bit: weights, BatchNorm's buffers, modes, gradients, optimiser; a student with dropout."""
    seen: list[int] = []

    def state(run: training.Run) -> Any:
        grads = [p.grad for p in run.student.parameters()]
        modes = [module.training for module in run.student.modules()]
        return copy.deepcopy((run.student.state_dict(), run.optimizer.state_dict(), grads, modes))

    def look(coached: Looking, step: Step) -> None:
        before = state(coached.run)
        Coached.before_step(coached, step)
        assert equal(state(coached.run), before)
        seen.append(step.number)

    case = Case("kd").with_(optimizer=optimizer, epochs=1, grad_clip=0.5)
    Coaching(strategy, case=case).run(tmp_path / "student", look)
    assert seen == list(range(4))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_virtual_step_is_the_step_that_follows(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that stands still: held-out samples judge at the weights that come next, dropout included."""
    judged: list[dict[str, Tensor]] = []
    real: list[dict[str, Tensor]] = []
    held_out_gradient = Coached._held_out_gradient

    def noted(self: Coached, step: Step) -> Any:
        judged.append({name: p.detach().clone() for name, p in self.run.student.named_parameters()})
        return held_out_gradient(self, step)

    monkeypatch.setattr(Coached, "_held_out_gradient", noted)
    monkeypatch.setattr(
        Coached,
        "after_step",
        lambda self, step: real.append({n: p.detach().clone() for n, p in self.run.student.named_parameters()}),
    )
    case = Case("kd").with_(optimizer=optimizer, epochs=1, grad_clip=0.5)
    Coaching(case=case, learning_rate=0.0).with_(weight_decay=0.0).run(tmp_path / "student")
    assert len(judged) == 4
    assert equal(judged, real)


def test_no_step_reads_a_value_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[list[str]] = []
    step = training.Run._step

    def counted(self: Any, *rows: Tensor) -> None:
        with Reads() as reads:
            step(self, *rows)
        counts.append(reads.found)

    monkeypatch.setattr(training.Run, "_step", counted)
    for number, derivative in enumerate(("finite_difference", "jvp")):
        coaching = Coaching(case=CONV.with_(grad_clip=1.0, epochs=1), teacher_arch="conv-w12-d1-k3")
        coaching.with_(derivative=derivative, influence="preconditioned").run(tmp_path / str(number))
    assert len(counts) == 8
    assert counts == [[]] * 8


# -- how much the influence counts ------------------------------------------------------------------------------------


def test_no_influence_is_online_to_the_bit(tmp_path: Path) -> None:
    lgtm, online = Coaching().with_(lambda_inf=0), Coaching("online")
    results = [coaching.run(tmp_path / coaching.strategy)[0] for coaching in (lgtm, online)]
    assert bytes_of(tmp_path / "lgtm") == bytes_of(tmp_path / "online")
    for one, two in zip(*(result.history for result in results), strict=True):
        assert {**one, "samples_per_second": 0} == {**two, "samples_per_second": 0}
    # and a little influence is not
    Coaching().with_(lambda_inf=1e-2).run(tmp_path / "other")
    assert bytes_of(tmp_path / "other") != bytes_of(tmp_path / "online")


@pytest.mark.parametrize("form", [0.7, "bilevel", "official", "ratio:0.25"])
@pytest.mark.parametrize("strategy", ["lgtm", "meta"])
def test_every_weight_of_the_influence_is_what_it_says(strategy: Any, form: Any, tmp_path: Path) -> None:
    """The gradient with which the teacher's optimiser steps, against its parts."""
    if strategy == "meta":
        form = "bilevel"  # meta has no other
    coaching = replace(exact(), strategy=strategy).with_(**({"lambda_inf": form} if strategy == "lgtm" else {}))

    def look(coached: Looking, step: Step) -> None:
        if step.number != 2:
            return
        weights = coached.learner.parameters_that_learn()
        up = gradient(coached, step)
        told = coached._logits(step)
        said = coached.run.student(step.inputs).head.detach()
        terms = coached._terms(step, told, said)
        others = [torch.zeros_like(w) for w in weights]
        if terms:
            others = list(torch.autograd.grad(sum(terms.values()), weights))  # type: ignore[arg-type]

        def size(tensors: list[Tensor]) -> float:
            return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())

        weight = {
            0.7: 0.7,
            "bilevel": step.learning_rate,
            "official": coached.learning_rate * step.learning_rate / coached.run.section.peak_learning_rate,
            "ratio:0.25": 0.25 * size(others) / size(up),
        }[form]
        given: list[Tensor] = []
        coached.optimizer.register_step_pre_hook(
            lambda *_: given.extend(w.grad.clone() for w in weights if w.grad is not None)
        )
        Coached.before_step(coached, step)
        for found, other, j in zip(given, others, up, strict=True):
            assert torch.allclose(found, other - weight * j, rtol=1e-8, atol=1e-14)
        coached.look = lambda *_: None

    result, _, _ = coaching.run(tmp_path / "student", look)
    for record in result.history if strategy == "lgtm" else ():
        wanted = {0.7: 0.7, "bilevel": 0.05, "official": coaching.learning_rate}  # the schedule is constant
        unweighted = record["coached/unweighted_influence_ratio"]
        ratio = 0.25 if form == "ratio:0.25" else wanted[form] * unweighted
        assert record["coached/influence_ratio"] == pytest.approx(ratio)


def test_the_figures_of_the_influence_are_means_over_the_steps(tmp_path: Path) -> None:
    """Recomputed sample by sample: the softmax outputs' difference along the change of the student's logits."""
    helpful: list[float] = []
    ratios: list[float] = []

    def look(coached: Looking, step: Step) -> None:
        told, said, change, value = coached.influence(step)
        pairs = zip(said.softmax(1), told.detach().softmax(1), change, strict=True)
        helpful.append(float(np.mean([float((s - t) @ u) > 0 for s, t, u in pairs])))
        weights = coached.learner.parameters_that_learn()
        parts = value, sum(coached._terms(step, told, said).values())
        sizes = [
            torch.cat([g.flatten() for g in torch.autograd.grad(part, weights, retain_graph=True)]).norm().item()  # type: ignore[arg-type]
            for part in parts
        ]
        ratios.append(sizes[0] / sizes[1])

    result, _, _ = exact(hard_weight=0.3).run(tmp_path / "student", look)
    steps = len(helpful) // 2
    for record, first in zip(result.history, (0, steps), strict=True):
        assert record["coached/helpful_samples"] == pytest.approx(np.mean(helpful[first : first + steps]))
        assert record["coached/unweighted_influence_ratio"] == pytest.approx(np.mean(ratios[first : first + steps]))
    assert 0 < np.mean(helpful) < 1
    assert len(set(helpful)) > 2


def test_the_teachers_learning_rate_follows_the_students_schedule(tmp_path: Path) -> None:
    rates: list[tuple[float, float]] = []

    def look(coached: Looking, step: Step) -> None:
        Coached.before_step(coached, step)
        rates.append((coached.optimizer.param_groups[0]["lr"], step.learning_rate))

    coaching = Coaching(learning_rate=3e-5)
    coaching.run(tmp_path / "student", look)
    peak = coaching.case.section.peak_learning_rate
    assert [own for own, _ in rates] == pytest.approx([3e-5 * student / peak for _, student in rates])
    assert len({own for own, _ in rates}) > 5


def test_weight_decay_is_on_matrices_alone() -> None:
    coaching = Coaching(case=CONV, teacher_arch="conv-w12-d1-k3")
    decays: dict[int, float] = {}

    class Stop(Exception):
        pass

    def look(coached: Looking, step: Step) -> None:
        for group in coached.optimizer.param_groups:
            decays.update({p.dim(): group["weight_decay"] for p in group["params"]})
        raise Stop

    with pytest.raises(Stop):
        coaching.run(Path("unused"), look)
    assert decays == {4: 0.01, 2: 0.01, 1: 0.0}


# -- held-out samples -------------------------------------------------------------------------------------------------


def test_nobody_trains_on_what_is_held_out_and_every_pass_sees_it_once(tmp_path: Path) -> None:
    trained: set[int] = set()
    judged: list[list[int]] = []

    def look(coached: Looking, step: Step) -> None:
        trained.update(step.host_rows.tolist())
        judged.append(coached.held_out_batch(step.number)[1].tolist())

    coaching = Coaching(held_out=0.25).with_(held_out_batch_size=8)  # 24 of 96 rows, 3 batches a pass
    _, _, coached = coaching.run(tmp_path / "student", look)
    held = set(coached.held.tolist())
    assert len(held) == 24
    assert not held & trained
    assert trained | held == set(range(96))
    for first in range(0, len(judged) - 2, 3):
        assert sorted(chain(*judged[first : first + 3])) == sorted(held)
    assert any(a != b for a, b in pairwise(judged[::3]))


def test_held_out_inputs_are_not_augmented(tmp_path: Path) -> None:
    def look(coached: Looking, step: Step) -> None:
        rows, host_rows = coached.held_out_batch(step.number)
        clean = coached.run.data.clean_inputs(rows, host_rows)
        assert np.array_equal(clean.numpy(), coached.dataset.train.inputs[host_rows.numpy()])
        assert clean.is_contiguous(memory_format=torch.channels_last)

    Coaching().run(tmp_path / "student", look)


@pytest.mark.parametrize(
    ("strategy", "share", "rows"), [("online", None, 96), ("online", 0.25, 72), ("lgtm", 0.25, 72)]
)
def test_what_is_held_out_is_left_out_of_training_whether_it_judges_or_not(
    strategy: Any, share: float | None, rows: int
) -> None:
    coached = Coaching(strategy, held_out=share).with_(lambda_inf=0).build()
    found = coached.rows(dataset(), 0)
    assert rows == (96 if found is None else len(found))


def test_a_strategy_that_judges_needs_something_held_out() -> None:
    with pytest.raises(InputError, match="held out") as error:
        Coaching("meta", held_out=None).build()
    assert error.value.where == "teacher.coached.held_out"


def test_a_share_that_leaves_a_class_empty_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leaves class") as error:
        Coaching(held_out=0.02).run(tmp_path / "student")
    assert error.value.where == "teacher.coached.held_out"
    assert not (tmp_path / "student.partial").exists()


# -- a transformer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    """Two layers, four classes, a word per token of the toy data set."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *(f"w{i}" for i in range(16))))}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(tmp_path / "bert")
    config = transformers.BertConfig(
        vocab_size=18, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, pad_token_id=0, num_labels=4,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def worded(split: Split) -> Split:
    return replace(split, texts=tuple(" ".join(f"w{token}" for token in row) for row in split.inputs))


def test_a_transformers_last_layer_learns_beside_the_student_and_goes_on_to_the_bit(
    tiny_bert: Path, tmp_path: Path
) -> None:
    data = dataset(48, tokens=True)
    data = replace(data, **{name: worded(data.split(name)) for name in ("train", "validation", "test")})  # type: ignore[arg-type]

    def given() -> NetworkTeacher:
        section = TeacherSection(kind="transformers", model=tiny_bert.name, classification=True)
        found = load_teacher(section, data, base=tiny_bert.parent)
        assert isinstance(found, NetworkTeacher)
        return found

    case = replace(Case("kd", data=data, views=1), section=Case().section.model_copy(update={"batch_size": 12}))
    coaching = Coaching(case=case, given=given, layers=1)
    fresh = coaching.build().learner
    learning = {name for name, p in fresh.network.named_parameters() if p.requires_grad}
    assert {name for name in learning if ".layer." in name} == {name for name in learning if ".layer.1." in name}
    whole, _, _ = coaching.run(tmp_path / "whole")
    kept = load_file(tmp_path / "whole/teacher.safetensors")
    for name, before in fresh.network.state_dict().items():
        # an attention's bias of the keys moves no output
        if "key.bias" not in name:
            assert torch.equal(before, kept[name]) == (name not in learning), name
    assert np.isfinite(whole.history[-1]["coached/influence"])
    with pytest.raises(Interrupted):
        coaching.run(tmp_path / "parts", progress=StopAfter(4))  # inside the second epoch
    coaching.run(tmp_path / "parts")
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "parts")


# -- what a recipe may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, 0.0, float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("section", "name"),
    [
        (CoachedSection, "learning_rate"),
        (CoachedSection, "weight_decay"),
        (GenericSection, "sampler_learning_rate"),
        (GenericSection, "tau"),
        (GenericSection, "entropy"),
        (GenericSection, "ce_weight"),
        (GenericSection, "kl_weight"),
    ],
)
def test_rates_and_weights_are_finite_and_not_negative(section: type[Section], name: str, value: float) -> None:
    if value == 0 and name in ("weight_decay", "entropy", "ce_weight", "kl_weight"):
        assert getattr(section.model_validate({name: value}), name) == 0
        return
    with pytest.raises(ValidationError, match=name):
        section.model_validate({name: value})


def test_a_coached_teachers_learning_rate_is_a_number_or_auto() -> None:
    assert [CoachedSection(learning_rate=rate).learning_rate for rate in ("auto", 3e-5)] == ["auto", 3e-5]
    with pytest.raises(ValidationError):
        CoachedSection.model_validate({"learning_rate": "automatic"})


# -- again and on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"influence": "preconditioned", "derivative": "jvp"}])
def test_an_interrupted_training_ends_with_the_same_weights(keys: dict[str, Any], tmp_path: Path) -> None:
    """Student, teacher, the teacher's optimiser, held-out order and figures, to the bit."""
    coaching = replace(Coaching(case=Case("kd").with_(epochs=3)), held_out=0.25).with_(held_out_batch_size=8, **keys)
    order: dict[str, list[Any]] = {"whole": [], "parts": []}

    def noting(name: str) -> Any:
        def look(coached: Looking, step: Step) -> None:
            order[name].append((step.number, coached.held_out_batch(step.number)[1].tolist()))

        return look

    whole, _, one = coaching.run(tmp_path / "whole", noting("whole"))
    for steps in (4, 2):  # at the end of an epoch, and inside one
        with pytest.raises(Interrupted):
            coaching.run(tmp_path / "parts", noting("parts"), StopAfter(steps))
    parts, _, two = coaching.run(tmp_path / "parts", noting("parts"))
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "parts")
    assert order["whole"] == order["parts"]
    assert equal(one.optimizer.state_dict(), two.optimizer.state_dict())
    for a, b in zip(whole.history, parts.history, strict=True):
        assert {**a, "samples_per_second": 0} == {**b, "samples_per_second": 0}


def test_a_finished_training_is_not_made_again_and_other_settings_are(tmp_path: Path) -> None:
    steps: list[int] = []

    def look(coached: Looking, step: Step) -> None:
        steps.append(step.number)

    for coaching, done in (
        (Coaching(), 8),
        (Coaching(), 8),
        (Coaching().with_(influence="preconditioned"), 16),
        (Coaching(learning_rate=2e-3).with_(influence="preconditioned"), 24),
        (replace(Coaching(learning_rate=2e-3), strategy="meta"), 32),
    ):
        coaching.run(tmp_path / "student", look)
        assert len(steps) == done


# -- many processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_coach_like_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.distill.distributed_coaching", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in CASES:
        ranks: list[Any] = [torch.load(tmp_path / f"{name}-rank{rank}.pt", weights_only=True) for rank in range(2)]
        assert equal(ranks[0], ranks[1])
        alone: Any = coached(name, tmp_path / "alone")
        for one, two in zip(alone["history"], ranks[0]["history"], strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
        for part in ("student", "teacher"):
            for key, value in alone[part].items():
                assert torch.allclose(ranks[0][part][key], value, rtol=1e-4, atol=1e-6), (name, key)
