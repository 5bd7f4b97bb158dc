import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from distill import training
from distill.data.dataset import Dataset, InputSpec
from distill.distribution import start
from distill.objectives.compose import build_objective, head_size
from distill.objectives.section import ObjectiveSections
from distill.outputs import StudentOutput
from distill.strategies.generic import Generic, load_supernet
from distill.strategy import Step
from distill.students import Student, build_student, load_student
from distill.students.arch import parse_arch
from distill.students.conv import ConvNet
from distill.students.section import StudentSection
from distill.students.text import TextNet
from distill.teachers import ModuleTeacher, build_cache
from distill.teachers.strategy_section import GenericSection
from distill.training import Run, evaluate_logits, train
from export.onnx import export_graph
from export.parity import open_session, run_session
from profiles.artifact import verify
from profiles.errors import InputError, Interrupted
from profiles.progress import Silent
from tests.distill.distributed_generic import POOLS, conditioned
from tests.distill.test_training import Reads
from tests.distill.training_cases import Case, StopAfter, dataset, same_weights

ROOT = Path(__file__).parents[2]
TEACHER = "conv-w12-d1-k3"
POOL = ("conv-w4-d1-k3", "conv-w4-d2-k3", "conv-w8-d1-k3", "conv-w8-d2-k3")
TEXT_TEACHER = "text-w32-d3-h4"
TEXT_POOL = ("text-w16-d1-h2", "text-w16-d2-h4", "text-w24-d2-h2")


def large(data: Dataset) -> Dataset:
    """Every pixel three times: 24 px give three stages, hence two boundaries."""
    train_split = replace(data.train, inputs=data.train.inputs.repeat(3, 2).repeat(3, 3))
    spec = InputSpec("image", (3, 24, 24), data.input.mean, data.input.std)
    return replace(data, train=train_split, input=spec, key=data.key + "-large")


def generic(words: tuple[str, ...], teacher: str, data: Dataset, kind: type[Generic] = Generic, **keys: Any) -> Any:
    return kind(GenericSection(**keys), [parse_arch(word) for word in words], parse_arch(teacher), data, seed=0)


def case(data: Dataset | None = None, arch: str = TEACHER) -> Case:
    data = data or dataset()
    return Case("supervised", data=data, arch=arch, views=1 if data.input.kind == "tokens" else 2)


class Recorded(Generic):
    """Notes what was drawn, and whether anything but the training forward pass meets a hook."""

    def __init__(self, *arguments: Any, **keys: Any) -> None:
        super().__init__(*arguments, **keys)
        self.sequence: list[list[int]] = []
        self.steps: list[Step] = []

    def before_step(self, step: Step) -> None:
        super().before_step(step)
        self.sequence.append(self._drawn.tolist())
        self.steps.append(step)

    def validation(self) -> dict[str, float]:
        assert hooks(self.run.student) == 0
        return {}


class Logits(nn.Module):
    """What is exported of a teacher."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x).head
        return logits


def hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


# -- one step against the whole loss, written down and differentiated at once -----------------------------------------


def begin(of: Case, strategy: Generic, folder: Path) -> Run:
    """A training before its first step, in float64."""
    net, objective, _ = of.build()
    section = of.section.resolved(len(of.data.train))
    processes = start("cpu", section.batch_size)
    run = Run(
        net, objective, of.data, None, section, of.augmentation, folder / "net", "key", 0, 0, processes, strategy, None
    )
    run.resume(Silent())
    run.student.double().train()
    strategy.supernet.double()
    return run


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def step_gradients(run: Run) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Those of teacher and pool when the loop's optimiser is told to step."""
    found: list[dict[str, Tensor | None]] = []
    run.optimizer.step = lambda: found.extend(map(gradients, (run.student, run.strategy.supernet)))  # type: ignore
    rows = torch.arange(16)
    run._step(rows, rows)
    return found[0], found[1]


def forward(net: Student, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """Features behind every stage or block, and logits, without a hook."""
    body, features = net.body, []
    if isinstance(body, ConvNet):
        x = body.stem(body.normalize(inputs))
        for stage in body.stages:
            x = stage(x)
            features.append(x)
        return features, net.head(body.pool(x).flatten(1))
    assert isinstance(body, TextNet)
    x, real = body.tokens(inputs) + body.positions, body.real(inputs)
    for block in body.blocks:
        x = block(x, real)
        features.append(x)
    return features, net.head((body.norm(x) * real).sum(1) / real.sum(1).clamp(min=1))


def divergence(p: Tensor, q: Tensor, tau: float, multilabel: bool) -> Tensor:
    """tau^2 KL(p || q) of logits."""
    if multilabel:
        a, b = (z.div(tau).sigmoid() for z in (p, q))
        return tau**2 * (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()).mean()
    a, b = (z.div(tau).softmax(1) for z in (p, q))
    return tau**2 * (a * (a / b).log()).sum(1).mean()


def whole_loss(run: Run, strategy: Recorded) -> Tensor:
    step, section = strategy.steps[-1], strategy.section
    features, logits = forward(run.student, step.inputs)
    body = run.student.body
    real = body.real(step.inputs) if isinstance(body, TextNet) else None
    total = step.truth(logits)
    for index in strategy.sequence[-1]:
        arch = strategy.archs[index]
        outputs = [strategy.supernet.branch(arch, i, f, real) for i, f in enumerate(features[:-1])]
        if section.inherit:
            outputs.append(strategy.supernet.path(arch, step.inputs).head)
        for z in outputs:
            kl = divergence(z, logits, section.tau, run.dataset.task == "multilabel")
            weighted = section.ce_weight * step.truth(z) + section.kl_weight * kl
            total = total + weighted / len(outputs) / len(strategy.sequence[-1])
    return total


JOINT = {
    "two boundaries": (large(dataset()), TEACHER, POOL, {}),
    "temperature and weights": (large(dataset()), TEACHER, POOL, {"tau": 2.5, "ce_weight": 0.3, "kl_weight": 1.7}),
    "many draws": (dataset(), TEACHER, POOL, {"paths": 7}),
    "inherited": (large(dataset()), TEACHER, POOL, {"inherit": True}),
    "one student": (large(dataset()), TEACHER, POOL[3:], {}),
    "several labels": (dataset(task="multilabel"), TEACHER, POOL, {}),
    "texts": (dataset(tokens=True), TEXT_TEACHER, TEXT_POOL, {}),
    "inherited texts": (dataset(tokens=True), TEXT_TEACHER, TEXT_POOL, {"inherit": True}),
    "convolutional texts": (dataset(tokens=True), TEXT_TEACHER, ("textc-w16-d1-k3", "textc-w24-d2-k5"), {}),
}


@pytest.mark.parametrize(("name", "mixup"), [*((name, None) for name in JOINT), *((n, 0.4) for n in list(JOINT)[:6])])
def test_a_step_has_the_gradient_of_the_whole_loss(name: str, mixup: float | None, tmp_path: Path) -> None:
    data, teacher, words, keys = JOINT[name]
    strategy = generic(words, teacher, data, Recorded, **keys)
    run = begin(case(data, teacher).with_(mixup=mixup), strategy, tmp_path)
    found = step_gradients(run)
    assert run.window is not None
    loss = whole_loss(run, strategy)
    assert float(run.window.sum()) == pytest.approx(float(loss.detach()), rel=1e-10)
    run.student.zero_grad()
    strategy.supernet.zero_grad()
    loss.backward()
    for mine, expected in zip(found, (gradients(run.student), gradients(strategy.supernet)), strict=True):
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            other = mine[key]
            if value is None or other is None:
                assert value is other, key
            else:
                assert torch.allclose(other, value, rtol=1e-8, atol=1e-10), key


@pytest.mark.parametrize("boundary", [0, 1])
def test_a_branch_reaches_the_teachers_stages_up_to_its_boundary(boundary: int, tmp_path: Path) -> None:
    data = large(dataset())
    strategy = generic(POOL, TEACHER, data, Recorded)
    run = begin(case(data), strategy, tmp_path)
    step_gradients(run)
    step = strategy.steps[-1]
    run.student.zero_grad()
    features, _ = forward(run.student, step.inputs)
    step.truth(strategy.supernet.branch(strategy.archs[0], boundary, features[boundary])).backward()
    reached = {name.split(".")[2] for name, g in gradients(run.student).items() if "stages" in name and g is not None}
    assert reached == {str(stage) for stage in range(boundary + 1)}
    assert run.student.head.weight.grad is None


def test_labels_alone_condition_nothing_behind_the_last_boundary(tmp_path: Path) -> None:
    """Without the divergence, the last stage and the head learn as in a plain teacher, the stages before do not."""
    data = large(dataset())
    plain = generic(POOL, TEACHER, data, ce_weight=0.0, kl_weight=0.0)
    conditioned_by_labels = generic(POOL, TEACHER, data, kl_weight=0.0)
    before, after = (
        step_gradients(begin(case(data), strategy, tmp_path))[0] for strategy in (plain, conditioned_by_labels)
    )
    for name in before:
        a, b = before[name], after[name]
        assert a is not None
        assert b is not None
        assert torch.equal(a, b) == name.startswith(("body.stages.2", "head")), name


def always(word: str, words: tuple[str, ...], run: Run) -> None:
    """Lets the distribution draw one member only."""
    strategy = run.strategy
    assert isinstance(strategy, Generic)
    arch = parse_arch(word)
    chosen = [getattr(arch, name) == value for name, value in strategy.sampler.choices]
    with torch.no_grad():
        strategy.sampler.phi.copy_(torch.tensor(chosen) * 1000.0)


def test_only_what_was_sampled_gets_a_gradient(tmp_path: Path) -> None:
    data = large(dataset())
    strategy = generic(POOL, TEACHER, data, distribution="easy")
    run = begin(case(data), strategy, tmp_path)
    always("conv-w4-d1-k3", POOL, run)
    _, pool = step_gradients(run)
    assert strategy.sampled == [2, 0, 0, 0]
    for stage in (1, 2):
        width = 4 * 2**stage
        kernel = pool[f"shared.body.stages.{stage}.0.second.0.weight"]
        assert kernel is not None
        assert kernel.shape[:2] == (2 * width, 2 * width)
        assert (kernel[:width, :width] != 0).any()
        assert not kernel[width:].any()
        assert not kernel[:, width:].any()
        assert pool[f"shared.body.stages.{stage}.1.first.0.weight"] is None
    adapter = pool["adapters.0.0.weight"]
    assert adapter is not None
    assert adapter[:4].any()
    assert not adapter[4:].any()
    # branches start behind the first boundary; the shared network's own beginning has no say
    assert pool["shared.body.stem.0.0.weight"] is None


def test_the_distribution_is_told_what_each_draw_cost(tmp_path: Path) -> None:
    """Draws in their order, an architecture that was drawn twice with the same loss twice."""
    data = large(dataset())
    strategy = generic(POOL, TEACHER, data, Recorded, distribution="hard", paths=7)
    run = begin(case(data), strategy, tmp_path)
    told: list[tuple[list[int], list[float]]] = []
    strategy.sampler.update = lambda indices, losses: told.append((indices.tolist(), losses.tolist()))
    step_gradients(run)
    step = strategy.steps[-1]
    features, logits = forward(run.student, step.inputs)
    expected = {}
    for index in set(strategy.sequence[-1]):
        outputs = [strategy.supernet.branch(strategy.archs[index], i, f) for i, f in enumerate(features[:-1])]
        losses = [step.truth(z) + 3 * divergence(z, logits, 1.0, False) for z in outputs]
        expected[index] = float(torch.stack(losses).mean().detach())
    assert 1 < len(expected) < 7
    assert len(set(expected.values())) == len(expected)
    ((indices, found),) = told
    assert indices == strategy.sequence[-1]
    assert found == pytest.approx([expected[index] for index in indices], rel=1e-10)


class Alive:
    """Counts the bytes that autograd keeps for backward passes, and their peak."""

    now = peak = 0

    def hold(self, value: Tensor) -> Any:
        size = value.numel() * value.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        counter = self

        class Held:
            def __del__(self) -> None:
                counter.now -= size

        held = Held()
        held.value = value  # type: ignore[attr-defined]
        return held


def peak_of_a_step(paths: int, words: tuple[str, ...], folder: Path) -> int:
    strategy = generic(words, TEACHER, dataset(), paths=paths)
    run = begin(case(), strategy, folder)
    alive = Alive()
    with torch.autograd.graph.saved_tensors_hooks(alive.hold, lambda held: held.value):
        step_gradients(run)
    assert sum(count > 0 for count in strategy.sampled) == len(words)
    return alive.peak


def test_many_paths_need_no_more_memory_than_the_largest(tmp_path: Path) -> None:
    largest = peak_of_a_step(1, POOL[3:], tmp_path)
    assert peak_of_a_step(1, POOL[:1], tmp_path) < largest
    # but for a few scalars; all four at once would need a third more
    assert peak_of_a_step(16, POOL, tmp_path) < 1.001 * largest


def test_with_inheritance_the_pool_learns_from_the_input_on(tmp_path: Path) -> None:
    strategy = generic(POOL, TEACHER, dataset(), inherit=True)
    _, pool = step_gradients(begin(case(), strategy, tmp_path))
    stem = pool["shared.body.stem.0.0.weight"]
    assert stem is not None
    assert stem.any()


# -- whole trainings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"grad_clip": 0.5, "ema": 0.9, "mixup": 0.4}])
@pytest.mark.parametrize(("data", "teacher", "words"), [(None, TEACHER, POOL), (1, TEXT_TEACHER, TEXT_POOL)])
def test_without_weight_the_teacher_is_a_plain_one_bit_for_bit(
    data: int | None, teacher: str, words: tuple[str, ...], keys: dict[str, Any], tmp_path: Path
) -> None:
    of = case(dataset(tokens=bool(data)), teacher).with_(**{**keys, **({"mixup": None} if data else {})})
    plain = of.run(tmp_path / "plain", teacher=None)[1]
    strategy = generic(words, teacher, of.data, ce_weight=0.0, kl_weight=0.0)
    assert same_weights(plain, of.run(tmp_path / "generic", strategy=strategy, teacher=None)[1])
    weighted = of.run(tmp_path / "weighted", strategy=generic(words, teacher, of.data), teacher=None)[1]
    assert not same_weights(plain, weighted)


@pytest.mark.parametrize("stop_after", [3, 6, 9])
def test_an_interrupted_training_ends_bit_for_bit_like_an_uninterrupted_one(stop_after: int, tmp_path: Path) -> None:
    of = case()
    keys = {"distribution": "easy", "paths": 3, "inherit": True}
    whole = generic(POOL, TEACHER, of.data, Recorded, **keys)
    _, net, _ = of.run(tmp_path / "whole", strategy=whole, teacher=None)
    first = generic(POOL, TEACHER, of.data, Recorded, **keys)
    with pytest.raises(Interrupted):
        of.run(tmp_path / "parts", strategy=first, teacher=None, progress=StopAfter(stop_after))
    torch.manual_seed(stop_after)
    second = generic(POOL, TEACHER, of.data, Recorded, **keys)
    _, other, _ = of.run(tmp_path / "parts", strategy=second, teacher=None)
    assert first.sequence + second.sequence == whole.sequence
    assert len(first.sequence) == stop_after
    assert same_weights(net, other)
    assert same_weights(whole.supernet, second.supernet)
    assert second.sampled == whole.sampled
    a, b = whole.sampler.state_dict(), second.sampler.state_dict()
    assert a["phi"].any()
    assert torch.equal(a["phi"], b["phi"])
    for name, value in a["optimizer"]["state"][0].items():
        assert torch.equal(value, b["optimizer"]["state"][0][name]), name


def test_a_pool_of_one_is_sftn_whatever_the_sampler_is_told(tmp_path: Path) -> None:
    of = case()
    plain = generic(POOL[:1], TEACHER, of.data, Recorded)
    told = generic(POOL[:1], TEACHER, of.data, Recorded, distribution="hard", paths=4)
    result, net, _ = of.run(tmp_path / "plain", strategy=plain, teacher=None)
    assert same_weights(net, of.run(tmp_path / "told", strategy=told, teacher=None)[1])
    assert plain.sequence == told.sequence == [[0]] * 12
    assert not told.sampler.state_dict()["optimizer"]["state"]
    assert not any("probability" in name or "entropy" in name for name in result.history[0])


LEARNED = {"distribution": "easy", "entropy": 0.5, "sampler_learning_rate": 0.2}


@pytest.mark.parametrize(
    ("words", "keys", "other"),
    [
        (POOL, {}, {"entropy": 0.5, "sampler_learning_rate": 0.2}),
        (POOL[:1], {}, {"paths": 7, **LEARNED}),
        (POOL, {"kl_weight": 0.0}, {"kl_weight": 0.0, "tau": 4.0}),
        (POOL, {}, {"archs": POOL, "within_limits": False}),
    ],
)
def test_a_setting_that_decides_nothing_trains_no_teacher_anew(
    words: tuple[str, ...], keys: dict[str, Any], other: dict[str, Any]
) -> None:
    data = dataset()
    assert generic(words, TEACHER, data, **keys).key == generic(words, TEACHER, data, **other).key


@pytest.mark.parametrize(
    ("words", "keys", "other"),
    [
        (POOL, {}, {"paths": 3}),
        (POOL, {}, {"distribution": "easy"}),
        (POOL, LEARNED, {**LEARNED, "distribution": "hard"}),
        (POOL, LEARNED, {**LEARNED, "entropy": 0.1}),
        (POOL, LEARNED, {**LEARNED, "sampler_learning_rate": 0.1}),
        *((words, {}, {key: 0.7}) for words in (POOL, POOL[:1]) for key in ("ce_weight", "kl_weight", "tau")),
        (POOL[:1], {}, {"inherit": True}),
    ],
)
def test_a_setting_that_decides_the_weights_trains_a_teacher_anew(
    words: tuple[str, ...], keys: dict[str, Any], other: dict[str, Any]
) -> None:
    data = dataset()
    assert generic(words, TEACHER, data, **keys).key != generic(words, TEACHER, data, **other).key


def test_the_artefact_keeps_the_pool_and_the_metrics_show_what_was_learned(tmp_path: Path) -> None:
    of = case()
    strategy = generic(POOL, TEACHER, of.data, distribution="hard", paths=2, sampler_learning_rate=0.2)
    result, _, _ = of.run(tmp_path / "teacher", strategy=strategy, teacher=None)
    manifest = verify(tmp_path / "teacher", "student")
    assert {"supernet.safetensors", "pool.json"} <= set(manifest.files)
    pool = json.loads((tmp_path / "teacher/pool.json").read_text())
    assert pool["teacher"] == TEACHER
    assert pool["distribution"] == "hard"
    assert [entry["arch"] for entry in pool["archs"]] == list(POOL)
    assert sum(entry["sampled"] for entry in pool["archs"]) == 12 * 2
    assert sum(entry["probability"] for entry in pool["archs"]) == pytest.approx(1)
    assert len({entry["probability"] for entry in pool["archs"]}) == 4
    last = result.history[-1]
    assert last["loss"] == pytest.approx(last["loss/ground_truth"] + last["loss/generic/ce"] + last["loss/generic/kl"])
    assert 0 < last["generic/entropy"] < np.log(4)
    assert last["generic/probability/width4"] + last["generic/probability/width8"] == pytest.approx(1)
    restored = load_supernet(tmp_path / "teacher", of.data.input, 4)
    assert not restored.training
    assert same_weights(restored, strategy.supernet)
    student = restored.standalone(parse_arch(POOL[2])).eval()
    inputs = torch.from_numpy(of.data.validation.inputs)
    assert torch.allclose(student(inputs).head, restored.path(parse_arch(POOL[2]), inputs).head, atol=1e-6)


def test_a_finished_teacher_is_loaded_and_another_pool_trains_anew(tmp_path: Path) -> None:
    of = case()
    _, net, _ = of.run(tmp_path / "teacher", strategy=generic(POOL, TEACHER, of.data), teacher=None)
    _, again, _ = of.run(
        tmp_path / "teacher", strategy=generic(POOL, TEACHER, of.data), teacher=None, progress=StopAfter(1)
    )
    assert same_weights(net, again)
    for other in (generic(POOL[:2], TEACHER, of.data), generic(POOL, TEACHER, of.data, tau=2.0)):
        with pytest.raises(Interrupted):
            of.run(tmp_path / "teacher", strategy=other, teacher=None, progress=StopAfter(1))


def test_the_finished_teacher_is_an_ordinary_network(tmp_path: Path) -> None:
    of = case()
    strategy = generic(POOL, TEACHER, of.data, Recorded)
    _, net, _ = of.run(tmp_path / "teacher", strategy=strategy, teacher=None)
    assert hooks(net) == 0
    assert strategy._features == {}
    bare = build_student(StudentSection(arch=TEACHER), of.data.input, 4, seed=5, base=Path())
    load_student(bare, tmp_path / "teacher/student.safetensors")
    bare.eval()
    inputs = torch.from_numpy(of.data.validation.inputs)
    expected: StudentOutput = net(inputs)
    for other in (bare, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(inputs).head, expected.head)
    export_graph(Logits(net).eval(), {"input": inputs[:2]}, tmp_path / "graph.onnx", opset=17)
    session = open_session(tmp_path / "graph.onnx")
    found = run_session(session, {"input": inputs.numpy()}, 16)
    np.testing.assert_allclose(found, expected.head.detach().numpy(), atol=1e-4)


def test_a_step_that_draws_uniformly_reads_no_value_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    step = training.Run._step

    def counted(self: Any, *rows: Tensor) -> None:
        with Reads() as seen:
            step(self, *rows)
        counts.append(len(seen.found))

    monkeypatch.setattr(training.Run, "_step", counted)
    of = case()
    of.run(tmp_path / "teacher", strategy=generic(POOL, TEACHER, of.data), teacher=None)
    assert counts == [0] * 12


@pytest.mark.parametrize(
    ("data", "teacher", "words", "keys"),
    [
        (dataset(), TEACHER, POOL, {"precision": "bf16"}),
        (dataset(task="multilabel"), TEACHER, POOL, {"class_weights": "balanced"}),
        (dataset(tokens=True), TEXT_TEACHER, TEXT_POOL, {}),
        (dataset(), TEACHER, POOL, {"mixup": 0.2, "label_smoothing": 0.1}),
    ],
    ids=["bf16", "multilabel", "text", "mixup"],
)
def test_teachers_of_all_kinds_learn_and_their_pool_learns_with_them(
    data: Dataset, teacher: str, words: tuple[str, ...], keys: dict[str, Any], tmp_path: Path
) -> None:
    of = case(data, teacher).with_(epochs=6, learning_rate=0.01, **keys)
    result, _, _ = of.run(tmp_path / "teacher", strategy=generic(words, teacher, data), teacher=None)
    assert result.metric.value > 0.6
    first, last = result.history[0], result.history[-1]
    assert last["loss/generic/ce"] < 0.8 * first["loss/generic/ce"]


@pytest.mark.parametrize("words", [POOL, POOL[:1]], ids=["gtn", "sftn"])
def test_students_learn_from_a_conditioned_teacher(words: tuple[str, ...], tmp_path: Path) -> None:
    of = case().with_(epochs=5, learning_rate=0.02)
    _, net, _ = of.run(tmp_path / "teacher", strategy=generic(words, TEACHER, of.data), teacher=None)
    teacher = ModuleTeacher(net)
    cache = build_cache(teacher, of.data, of.augmentation, tmp_path / "cache", seed=0)
    for objective in ({"kind": "kd"}, {"kind": "lelp", "subclasses_per_class": 3}):
        sections = TypeAdapter(ObjectiveSections).validate_python(objective)
        head = head_size(sections, 4)
        student = build_student(StudentSection(arch="conv-w8-d1-k3"), of.data.input, head, seed=1, base=Path())
        composed = build_objective(
            sections, of.data, cache, student_dim=student.embedding_dim, hard_weight=of.section.hard_weight, seed=0
        )
        folder = tmp_path / objective["kind"]
        result = train(
            student,
            composed,
            of.data,
            cache,
            of.section.model_copy(update={"epochs": 8}),
            of.augmentation,
            folder,
            device="cpu",
            teacher_fingerprint=teacher.fingerprint,
        )
        assert result.metric.value > 0.6
        assert evaluate_logits(student, composed, of.data.validation, device="cpu").shape == (48, 4)


# -- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "teacher", "tokens", "keys", "where"),
    [
        ((), TEACHER, False, {}, "teacher.generic"),
        (TEXT_POOL, TEACHER, False, {}, "teacher.generic.archs"),
        (TEXT_POOL, "text-w32-d1-h4", True, {}, "teacher.arch"),
        (POOL, TEACHER, False, {"distribution": "easy", "paths": 1}, "teacher.generic.paths"),
    ],
)
def test_pools_and_teachers_that_do_not_fit_are_refused(
    words: tuple[str, ...], teacher: str, tokens: bool, keys: dict[str, Any], where: str
) -> None:
    with pytest.raises(InputError) as error:
        generic(words, teacher, dataset(tokens=tokens), **keys)
    assert error.value.where == where
    assert error.value.fix


def test_a_teacher_of_one_block_can_still_hand_on_its_weights(tmp_path: Path) -> None:
    of = case(dataset(tokens=True), "text-w32-d1-h4")
    strategy = generic(TEXT_POOL, "text-w32-d1-h4", of.data, inherit=True)
    result, _, _ = of.run(tmp_path / "teacher", strategy=strategy, teacher=None)
    assert result.history[0]["loss/generic/ce"] > 0


def test_a_network_without_stages_is_refused_before_training(tmp_path: Path) -> None:
    of = Case("supervised")
    with pytest.raises(InputError) as error:
        of.run(tmp_path / "teacher", strategy=generic(POOL, TEACHER, of.data), teacher=None)
    assert error.value.where == "teacher.strategy"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"teacher": "conv-w12-d1-k3", "archs": [{}]}'])
def test_a_damaged_pool_is_named_with_a_way_out(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "pool.json").write_text(text)
    with pytest.raises(InputError) as error:
        load_supernet(tmp_path, dataset().input, 4)
    assert error.value.where == str(tmp_path / "pool.json")
    assert "delete" in str(error.value.fix)


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_draw_the_same_paths_and_end_with_the_same_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.distill.distributed_generic", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in POOLS:
        one, two = (torch.load(tmp_path / f"{name}-rank{rank}.pt", weights_only=True) for rank in range(2))
        for part in ("teacher", "supernet"):
            assert one[part].keys() == two[part].keys()
            for key, value in one[part].items():
                assert torch.equal(value, two[part][key]), (name, part, key)
        assert torch.equal(one["sampler"]["phi"], two["sampler"]["phi"])
        assert one["sampler"]["phi"].any()
        assert one["sampled"] == two["sampled"]
        assert one["history"] == two["history"]
    alone = conditioned("text", tmp_path / "alone")
    together = torch.load(tmp_path / "text-rank0.pt", weights_only=True)
    for a, b in zip(alone["history"], together["history"], strict=True):  # type: ignore[call-overload]
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
