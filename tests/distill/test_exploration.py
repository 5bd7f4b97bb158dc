import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from distill.data.dataset import Dataset
from distill.data.text import encode, load_tokenizer
from distill.data.unlabelled import Unlabelled
from distill.distribution import Processes
from distill.exploration.explore import (
    _Ready,
    _without_dropped,
    check_exploration,
    check_keep_rates,
    kept,
    leaving_statistics,
)
from distill.exploration.further import Maker, Pool
from distill.exploration.pictures import one_per_class
from distill.exploration.section import ExploreSection, least_kept, starved_classes
from distill.exploration.space import Draws, ascend, divergence, radius
from distill.networks import fingerprint
from distill.objectives.compose import build_objective
from distill.objectives.kd import binary_kd_loss, kd_loss
from distill.objectives.section import CRDSection, FitNetSection, KDSection, LELPSection, SupervisedSection
from distill.outputs import TeacherOutput
from distill.strategies.coached import Coached
from distill.strategy import Step, Together
from distill.students import Student
from distill.teachers.live import live_teacher
from distill.teachers.section import TeacherKind
from distill.teachers.strategy_section import CoachedSection
from distill.teachers.teacher import ModuleTeacher, Teacher, TeacherBatch
from distill.training import Run, read_result, train
from profiles.errors import EdgestillError, InputError
from tests.distill.coached_cases import DoubleTeacher, Smooth
from tests.distill.exploration_cases import PCA, Exploring, Looking, Swapping, decisive, stopped, texts_dataset
from tests.distill.training_cases import Case, cache, dataset, same_weights, student

KINDS = ["random", "gradient", "reconstructed", "augmented", "real"]


class Embeds(ModuleTeacher):
    """A teacher of embeddings alone, of ten dimensions."""

    def __init__(self) -> None:
        super().__init__(student(7))
        self.num_logits = None

    def compute(self, batch: TeacherBatch) -> TeacherOutput:
        embedding = super().compute(batch).embedding
        assert embedding is not None
        return TeacherOutput(embedding[:, :10], None)


class Ten(ModuleTeacher):
    """Embeddings of ten dimensions, which objectives were built for."""

    def compute(self, batch: TeacherBatch) -> TeacherOutput:
        told = super().compute(batch)
        assert told.embedding is not None
        return TeacherOutput(told.embedding[:, :10], told.logits)


class Closed(ModuleTeacher):
    """A teacher that computes without a graph."""

    @torch.no_grad()
    def compute(self, batch: TeacherBatch) -> TeacherOutput:
        return super().compute(batch)


def short(**keys: Any) -> Exploring:
    """One epoch of an exploration of these keys, of kind random unless they say otherwise."""
    return Exploring(ExploreSection.model_validate({"kind": "random", **keys}), Case("kd").with_(epochs=1))


def some_unlabelled(data: Dataset, count: int = 40) -> Unlabelled:
    """Other samples of the same patterns."""
    return Unlabelled(np.array(data.validation.inputs[:count]), None, "unlabelled", "more")


def made_by(
    kind: str, generator: PCA | None = None, judge: Callable[[Tensor], Tensor] | None = None, **keys: Any
) -> tuple[Tensor, Any]:
    """Real images, and what one kind makes of them."""
    data = dataset()
    section = ExploreSection.model_validate({"kind": kind, **keys})
    maker = Maker(section, data, generator or PCA(data.train.inputs), torch.device("cpu"), 0)
    seeds = Pool("train", data, None, device=torch.device("cpu")).take(np.arange(24))
    return seeds.inputs, maker.make(seeds, Draws(0, 5), step=5, judge=judge)


# -- what is made -----------------------------------------------------------------------------------------------------


def test_without_a_radius_random_exploration_is_the_reconstruction() -> None:
    generator = PCA(dataset().train.inputs)
    real, made = made_by("random", generator, sigma=0.0)
    assert torch.equal(made.inputs, generator.decode(generator.encode(real)).round().to(torch.uint8))
    assert torch.equal(made.inputs, made_by("reconstructed")[1].inputs)
    assert not torch.equal(made.inputs, made_by("random", sigma=0.5)[1].inputs)


def test_controls_make_what_they_say() -> None:
    real, made = made_by("real")
    assert torch.equal(made.inputs, real)
    strong = made_by("augmented")[1].inputs
    assert strong.dtype == torch.uint8
    assert ((strong.float() - real.float()).abs().mean((1, 2, 3)) > 5).all()
    assert torch.equal(strong, made_by("augmented")[1].inputs)


def smooth_networks() -> tuple[PCA, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Generator, teacher's and student's logits of pixels, in float64 and without kinks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = Student("double", Smooth(), 5, 4).double().eval()
    teacher = DoubleTeacher()

    def told(pixels: Tensor) -> Tensor:
        logits = teacher.compute(TeacherBatch(pixels, "train", np.zeros(len(pixels), np.int64))).logits
        assert logits is not None
        return logits

    return PCA(dataset().train.inputs, dtype=torch.float64), told, lambda pixels: net(pixels).head


def test_autograd_through_decoder_teacher_and_student_agrees_with_finite_differences() -> None:
    generator, told, found = smooth_networks()

    def climbed(latents: Tensor) -> Tensor:
        pixels = generator.decode(latents)
        return divergence(told(pixels), found(pixels), multilabel=False)

    # towards the mean: no pixel is clipped at 0 or 255, where the decoder has a kink
    start = 0.3 * generator.encode(torch.from_numpy(dataset().train.inputs[:6]))
    place = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(climbed(place).sum(), place)
    numeric = torch.zeros_like(start)
    for axis in range(start.shape[1]):
        change = torch.zeros_like(start)
        change[:, axis] = 1e-3
        numeric[:, axis] = (climbed(start + change) - climbed(start - change)) / 2e-3
    assert gradient.norm(dim=1).min() > 1e-6
    assert torch.allclose(gradient, numeric, rtol=1e-6, atol=1e-10)


def test_one_small_gradient_step_increases_the_divergence_more_than_a_random_one() -> None:
    generator, told, found = smooth_networks()

    def judge(pixels: Tensor) -> Tensor:
        return divergence(told(pixels), found(pixels), multilabel=False)

    asked: list[Tensor] = []

    def keeping(pixels: Tensor) -> Tensor:
        asked.append(pixels.detach())
        return judge(pixels)

    data = dataset()
    section = ExploreSection(kind="gradient", sigma=0.01)
    maker = Maker(section, data, generator, torch.device("cpu"), 0)
    seeds = Pool("train", data, None, device=torch.device("cpu")).take(np.arange(24))
    # rounding to pixels would hide so small a step
    latents = generator.encode(seeds.inputs)
    before = maker.make(seeds, Draws(0, 0), step=0, judge=keeping).before
    assert before is not None
    assert torch.allclose(asked[0], generator.decode(latents))
    assert torch.allclose(before, judge(asked[0]))

    ends = ascend(latents, generator.latent_std, radius(0.01, 5), 1, lambda z: judge(generator.decode(z))).latents
    gained = judge(generator.decode(ends)) - before
    assert (gained > 0).all()
    other = latents + Draws(0, 0).offsets(24, generator.latent_std, 0.01)
    assert gained.mean() > (judge(generator.decode(other)) - before).abs().mean()
    assert ((ends - latents) / generator.latent_std).norm(dim=1).numpy() == pytest.approx(radius(0.01, 5))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_student_that_equals_its_teacher_is_not_explored_away_from_the_seeds(steps: int, tmp_path: Path) -> None:
    exploring = short(kind="gradient", steps=steps)
    teacher = ModuleTeacher(exploring.student()[0])  # the student starts with the same weights
    seen = []

    def watch(exploration: Looking, step: Step, done: bool) -> None:
        if done and step.number == 0:
            chosen = exploration._orders.chosen(0, exploration._share)
            seen.append((exploration._ready.inputs, exploration.pool.take(chosen).inputs))

    exploration = exploring.build(teacher=teacher)
    exploration.watch = watch
    exploring.run(tmp_path / "s", exploration=exploration)
    (made, real), generator = seen[0], PCA(exploring.data.train.inputs)
    assert torch.equal(made, generator.decode(generator.encode(real)).round().to(torch.uint8))
    assert all(torch.isfinite(value).all() for value in exploration.seen[-1].told)


def test_gradient_exploration_finds_more_disagreement_than_random_exploration_at_the_same_radius(
    tmp_path: Path,
) -> None:
    found = {}
    for kind in ("random", "gradient"):
        result, _, _ = short(kind=kind, weight=0.0).run(tmp_path / kind)
        found[kind] = result.history[0]
    assert found["gradient"]["explore/divergence"] > found["random"]["explore/divergence"]
    assert found["gradient"]["explore/gain"] > 0
    assert "explore/gain" not in found["random"]


# -- no trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_exploring_changes_no_weight_buffer_gradient_mode_or_generator(kind: str, tmp_path: Path) -> None:
    """With a live teacher, whose parameters want gradients, BatchNorm and dropout in both networks."""
    exploring = short(kind=kind, filter="agreement")
    teacher = ModuleTeacher(student(7)).live()
    states: list[Any] = []

    def watch(exploration: Looking, step: Step, done: bool) -> None:
        run = exploration.run
        networks = [run.student, teacher.network, run.objective]
        networks += [exploration.generator.network] if exploration.generator is not None else []
        states.append(
            (
                [fingerprint(network) for network in networks],
                [p.grad is None for network in networks for p in network.parameters()],
                [layer.training for network in networks for layer in network.modules()],
                torch.get_rng_state().tolist(),
                repr(np.random.get_state()),
            )
        )

    exploration = exploring.build(teacher=teacher)
    exploration.watch = watch
    exploring.run(tmp_path / "s", exploration=exploration)
    assert len(states) == 12
    assert all(before == after for before, after in zip(states[::2], states[1::2], strict=True))
    assert states[0][2].count(True) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_with_weight_zero_the_student_is_that_of_kd_bit_for_bit(kind: str, tmp_path: Path) -> None:
    exploring = Exploring(ExploreSection.model_validate({"kind": kind, "weight": 0.0}))
    assert any(isinstance(layer, nn.Dropout) for layer in exploring.student()[0].modules())
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in exploring.student()[0].modules())
    result, net, exploration = exploring.run(tmp_path / "explored")
    assert same_weights(net, exploring.plain(tmp_path / "plain"))
    assert len(exploration.seen) == 12
    assert "explore/divergence" in result.history[-1]
    assert not any(name.startswith("loss/explore") for name in result.history[-1])


def test_with_a_weight_the_student_is_another(tmp_path: Path) -> None:
    exploring = short(weight=1.0)
    assert not same_weights(exploring.run(tmp_path / "explored")[1], exploring.plain(tmp_path / "plain"))


def test_running_statistics_are_those_of_real_data(tmp_path: Path) -> None:
    """With a learning rate of next to nothing they would else be drawn to the further inputs' brightness."""
    exploring = replace(short(kind="augmented"), case=Case("kd").with_(epochs=1, learning_rate=1e-12))
    plain, explored = exploring.plain(tmp_path / "plain"), exploring.run(tmp_path / "explored")[1]
    for (name, a), b in zip(plain.named_buffers(), explored.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5), name
    assert sum(1 for _ in plain.buffers()) == 3


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None), nn.SyncBatchNorm(3)])
def test_layers_normalise_with_the_batch_and_keep_their_statistics(layer: nn.Module) -> None:
    x = 5 + 2 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    if isinstance(layer, nn.SyncBatchNorm):
        layer = layer.train(False)  # runs on GPUs alone; in eval mode nothing of it may change
    before = copy.deepcopy(layer.state_dict())
    with leaving_statistics(layer):
        found = layer(x)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())
    assert layer.track_running_stats
    if layer.training:
        assert torch.allclose(found, (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt(), atol=1e-5)
        layer(x)
        assert layer.state_dict()["num_batches_tracked"] == 1
    else:
        assert torch.allclose(found, x / (1 + 1e-5) ** 0.5, atol=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "random"},
        {"kind": "gradient", "steps": 2},
        {"kind": "augmented", "filter": "confidence", "threshold": 0.3},
    ],
)
def test_an_interrupted_training_ends_with_the_same_bits_and_figures(keys: dict[str, Any], tmp_path: Path) -> None:
    exploring = Exploring(ExploreSection.model_validate(keys))
    whole, net, _ = exploring.run(tmp_path / "whole")
    stopped(exploring, tmp_path / "parts", 4)
    parts, again, _ = exploring.run(tmp_path / "parts")
    assert same_weights(net, again)
    for a, b in zip(whole.history, parts.history, strict=True):
        assert {k: v for k, v in a.items() if k != "samples_per_second"} == {
            k: v for k, v in b.items() if k != "samples_per_second"
        }


# -- what is learned --------------------------------------------------------------------------------------------------


def term_by_hand(
    exploration: Looking, step: Step, loss: Callable[[Tensor, Tensor, float], Tensor], rows: Tensor | None = None
) -> Tensor:
    """The loss of a step's further inputs in train mode, of a copy of the student. `rows`: those that count."""
    ready = exploration._ready
    net = copy.deepcopy(exploration.run.student).train()
    assert ready.told.logits is not None
    inputs, told = (value if rows is None else value[rows] for value in (ready.inputs, ready.told.logits))
    return loss(net(inputs).head, told, exploration.tau).detach()


class Comparing(Looking):
    """Compares the terms of every step with those computed by hand."""

    loss: Any = staticmethod(kd_loss)
    compared = 0

    def terms(self, step: Step, output: Any) -> dict[str, Tensor]:
        found = super().terms(step, output)
        rows = None
        if self._ready.keep is not None:
            chosen = torch.nonzero(self._ready.keep).flatten()
            rows = chosen[torch.arange(len(self._ready.keep)) % len(chosen)] if len(chosen) else None
        expected = self.section.weight * term_by_hand(self, step, self.loss, rows)
        if self._ready.keep is not None and not self._ready.keep.any():
            expected = torch.zeros(())
        assert found.keys() == {"explore/kd"}
        assert found["explore/kd"].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
        self.compared += 1
        return found


def compared(exploring: Exploring, folder: Path, **options: Any) -> Comparing:
    exploration = Comparing(
        exploring.section,
        options.pop("teacher", None) or exploring.teacher(),
        exploring.data,
        generator=exploring.generator(),
        **options,
    )
    if exploring.data.task == "multilabel":
        exploration.loss = binary_kd_loss
    exploring.run(folder, exploration=exploration)
    assert exploration.compared == len(exploration.seen) > 0
    return exploration


NO_DROPOUT = Case("kd", norm=False).with_(epochs=1)


@pytest.mark.parametrize(
    ("keys", "options", "tau"),
    [({}, {}, 1.0), ({"tau": 3.0}, {"tau": 4.0}, 3.0), ({"weight": 0.7}, {"tau": 4.0}, 4.0)],
)
def test_the_term_is_weight_times_kd_on_the_further_inputs(
    keys: dict[str, Any], options: dict[str, Any], tau: float, tmp_path: Path
) -> None:
    exploring = replace(short(**keys), case=NO_DROPOUT)
    exploration = compared(exploring, tmp_path / "s", **options)
    assert exploration.tau == tau
    told = exploration.seen[0].told.logits
    expected = exploring.teacher().outputs(TeacherBatch(exploration.seen[0].inputs, "train", np.zeros(16, np.int64)))
    assert expected.logits is not None
    assert torch.equal(told, expected.logits)


def test_with_several_labels_the_term_is_the_binary_kl(tmp_path: Path) -> None:
    exploring = replace(short(kind="gradient"), case=replace(NO_DROPOUT, data=dataset(task="multilabel")))
    compared(exploring, tmp_path / "s")


def test_the_labels_of_the_seeds_are_never_read(tmp_path: Path) -> None:
    """Other labels of the training split, which nothing else reads: the same further inputs, the same student."""
    case = Case("kd").with_(hard_weight=0.0, epochs=1)
    data = case.data
    other = replace(data, train=replace(data.train, labels=(data.train.labels + 1) % 4))
    teacher_outputs = cache(data, 2)
    found: list[tuple[Student, list[Any]]] = []
    for labels in (data, other):
        exploring = Exploring(ExploreSection(kind="gradient", filter="agreement"), replace(case, data=labels))
        exploration, (net, _) = exploring.build(), exploring.student()
        objective = build_objective((KDSection(),), data, teacher_outputs, student_dim=12, hard_weight=0.0)
        train(
            net,
            objective,
            labels,
            teacher_outputs,
            case.section,
            case.augmentation,
            tmp_path / str(len(found)),
            device="cpu",
            strategy=exploration,
        )
        found.append((net, exploration.seen))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert same_weights(found[0][0], found[1][0])


def test_every_step_has_its_own_inputs_around_clean_seeds(tmp_path: Path) -> None:
    _, _, exploration = short(kind="real", batch_size=24).run(tmp_path / "s")
    train = torch.from_numpy(dataset().train.inputs)
    seen = torch.cat([ready.inputs for ready in exploration.seen[:4]])
    assert len(seen) == len(train)  # 24 in each of four steps: every training sample once, and none of them augmented
    assert sorted(seen.flatten(1).sum(1).tolist()) == sorted(train.flatten(1).sum(1).tolist())


def test_a_fitting_objective_is_matched_on_further_inputs_without_the_ground_truth(tmp_path: Path) -> None:
    exploring = replace(
        short(match="objective", weight=0.5),
        case=Case([{"kind": "fitnet"}, {"kind": "kd", "tau": 2.0}], norm=False).with_(epochs=1, hard_weight=0.5),
    )

    class ByHand(Looking):
        def terms(self, step: Step, output: Any) -> dict[str, Tensor]:
            found = super().terms(step, output)
            own, logits = self.run.student(self._ready.inputs), self._ready.told.logits
            assert logits is not None
            fitnet, kd = self.run.objective.objectives
            expected = {
                "explore/fitnet": 0.5 * fitnet(own, self._ready.told, None)["fitnet"],
                "explore/kd": 0.5 * 0.5 * kd_loss(own.head, logits, 2.0),
            }
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert found[name].item() == pytest.approx(value.item(), rel=1e-5)
            assert isinstance(kd, nn.Module)
            return found

    teacher = Ten(student(7))
    exploration = ByHand(exploring.section, teacher, exploring.data, generator=exploring.generator())
    result, _, _ = exploring.run(tmp_path / "s", exploration=exploration)
    assert result.history[0]["loss/explore/fitnet"] > 0


def test_objectives_that_couple_samples_or_set_the_head_are_matched_too(tmp_path: Path) -> None:
    sections: list[dict[str, Any]] = [
        {"kind": "lelp", "subclasses_per_class": 4},
        {"kind": "ec", "transform": "mlp", "distance": "distance_correlation"},
    ]
    for section in sections:
        exploring = replace(short(match="objective"), case=Case(section).with_(epochs=1))

        result, _, _ = exploring.run(tmp_path / section["kind"], exploration=exploring.build(teacher=Ten(student(7))))
        terms = {name: value for name, value in result.history[0].items() if name.startswith("loss/explore/")}
        assert len(terms) == 2
        assert all(math.isfinite(value) for value in terms.values())


def test_a_teacher_of_embeddings_alone_is_matched_by_the_objective(tmp_path: Path) -> None:
    exploring = replace(short(), case=Case("fitnet").with_(epochs=1))
    result, _, exploration = exploring.run(tmp_path / "s", exploration=exploring.build(teacher=Embeds()))
    assert exploration.match == "objective"
    assert result.history[0]["loss/explore/fitnet"] > 0
    assert "explore/divergence" not in result.history[0]


def test_subclass_logits_are_read_as_those_of_their_classes(tmp_path: Path) -> None:
    teacher = ModuleTeacher(decisive(head=8))
    exploring = short(filter="confidence", threshold=0.3)
    _, _, exploration = exploring.run(tmp_path / "s", exploration=exploring.build(teacher=teacher, subclasses=2))
    ready = exploration.seen[0]
    plain = ready.told.logits.view(16, 4, 2).logsumexp(2)
    assert ready.told.logits.shape == (16, 8)
    assert torch.equal(ready.keep, plain.softmax(1).amax(1) >= 0.3)


# -- where it starts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("around", "expected"), [("train", 96), ("unlabelled", 40), ("both", 136)])
def test_seeds_come_from_where_they_are_asked_for(around: str, expected: int, tmp_path: Path) -> None:
    data = dataset()
    more = some_unlabelled(data)
    exploring = replace(short(kind="real", around=around, batch_size=68), unlabelled=more)
    _, _, exploration = exploring.run(tmp_path / "s")
    assert len(exploration.pool) == expected
    known = {"train": data.train.inputs, "unlabelled": more.inputs}
    known["both"] = np.concatenate([data.train.inputs, more.inputs])
    sums = set(known[around].reshape(expected, -1).sum(1).tolist())
    seen = [set(ready.inputs.flatten(1).long().sum(1).tolist()) for ready in exploration.seen]
    assert set().union(*seen) == sums


def test_beside_a_coached_teacher_only_rows_that_are_trained_on_are_seeds_and_the_teacher_is_asked_as_it_is(
    tmp_path: Path,
) -> None:
    exploring = short(kind="real")
    teacher = live_teacher(exploring.teacher(), None, exploring.data)
    coached = Coached(
        "lgtm", CoachedSection(), teacher, exploring.data, held_out=0.25, learning_rate=0.05, start_key="start"
    )
    exploration = exploring.build(teacher=teacher)
    first = copy.deepcopy(teacher)
    net, objective = exploring.student()
    exploring.train(net, objective, tmp_path / "s", Together(coached, exploration), coached=True)
    held = coached._held_out(exploring.data, 0)
    assert len(exploration.pool) == 96 - len(held)
    trained = np.setdiff1d(np.arange(96), held)
    seen = {image.numpy().tobytes() for ready in exploration.seen for image in ready.inputs}
    assert not {image.tobytes() for image in exploring.data.train.inputs[held]} & seen
    assert {image.tobytes() for image in exploring.data.train.inputs[trained]} >= seen
    ready = exploration.seen[-1]
    then = first.outputs(TeacherBatch(ready.inputs, "train", np.zeros(len(ready.inputs), np.int64)))
    assert then.logits is not None
    assert not torch.allclose(ready.told.logits, then.logits)


# -- texts ------------------------------------------------------------------------------------------------------------


class Reading(ModuleTeacher):
    """Keeps the texts that it is asked about."""

    def __init__(self) -> None:
        super().__init__(student(7, tokens=True))
        self.read: list[tuple[str, ...] | None] = []

    def compute(self, batch: TeacherBatch) -> TeacherOutput:
        self.read.append(batch.texts)
        return super().compute(batch)


def test_texts_are_refilled_tokenised_for_the_student_and_read_by_the_teacher(tmp_path: Path) -> None:
    data = texts_dataset(tmp_path)
    assert data.train.texts is not None
    words = sorted({word for text in data.train.texts for word in text.split()})
    section = ExploreSection.model_validate({"kind": "random", "generator": {"kind": "masked-lm", "model": "here"}})
    exploring = Exploring(section, Case("kd", data=data, views=1).with_(epochs=1), texts=Swapping(words))
    teacher = Reading()
    _, net, exploration = exploring.run(tmp_path / "s", exploration=exploring.build(teacher=teacher))
    assert data.tokenizer is not None
    tokenizer = load_tokenizer(data.tokenizer)
    asked = teacher.read[-len(exploration.seen) :]
    for texts, ready in zip(asked, exploration.seen, strict=True):
        assert texts is not None
        assert np.array_equal(ready.inputs.numpy(), encode(tokenizer, texts, 6))
    assert asked[0] != asked[1]
    real = set(data.train.texts)
    assert any(text not in real for texts in asked for text in texts or ())
    unweighted = exploring.with_(weight=0.0)
    assert same_weights(unweighted.run(tmp_path / "zero")[1], exploring.plain(tmp_path / "plain"))
    assert not same_weights(net, exploring.plain(tmp_path / "plain"))


def test_real_texts_reach_the_teacher_as_texts(tmp_path: Path) -> None:
    data = texts_dataset(tmp_path)
    teacher = Reading()
    exploring = Exploring(ExploreSection(kind="real"), Case("kd", data=data, views=1).with_(epochs=1))
    exploring.run(tmp_path / "s", exploration=exploring.build(teacher=teacher))
    assert set(teacher.read[0] or ()) <= set(data.train.texts or ())


# -- filters ----------------------------------------------------------------------------------------------------------


def test_filters_keep_what_they_say() -> None:
    told = torch.tensor([[3.0, 0.0], [0.1, 0.0], [0.0, 2.0]])
    keep, classes = kept(ExploreSection(kind="random", filter="confidence", threshold=0.6), told, None)
    assert keep.tolist() == [True, False, True]
    assert classes.tolist() == [0, 0, 1]
    agreed = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    keep, classes = kept(ExploreSection(kind="random", filter="agreement"), told, agreed)
    assert keep.tolist() == [False, True, True]
    assert classes.tolist() == [1, 0, 1]


@pytest.mark.parametrize("keys", [{"filter": "confidence", "threshold": 0.3}, {"filter": "agreement"}])
def test_dropped_inputs_are_replaced_and_keep_rates_are_those_of_the_epoch(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    exploring = replace(short(kind="augmented", **keys), case=replace(NO_DROPOUT, seed=1))
    exploration = compared(exploring, tmp_path / "s")
    (record,) = read_history(tmp_path / "s")
    keep = torch.cat([ready.keep for ready in exploration.seen])
    assert 0.05 < keep.float().mean() < 1
    assert record["explore/kept"] == pytest.approx(keep.float().mean().item())
    if keys["filter"] == "confidence":
        called = torch.cat([ready.told.logits.argmax(1) for ready in exploration.seen])
        for index, name in enumerate("abcd"):
            here = keep[called == index].float()
            assert record.get(f"explore/kept/{name}") == (pytest.approx(here.mean().item()) if len(here) else None)


def read_history(folder: Path) -> tuple[dict[str, float], ...]:
    return read_result(folder).history


def test_a_step_of_which_nothing_is_left_teaches_nothing() -> None:
    inputs = torch.arange(4 * 3).view(4, 3)
    told = TeacherOutput(None, torch.arange(8.0).view(4, 2))

    def left(keep: list[bool]) -> tuple[list[int], list[float], float]:
        ready = _Ready(inputs, told, torch.tensor(keep), torch.tensor(True))
        found, logits, factor = _without_dropped(ready)
        assert logits.logits is not None
        assert factor is not None
        return (found[:, 0] // 3).tolist(), (logits.logits[:, 0] / 2).tolist(), factor.item()

    assert left([True, False, True, False]) == ([0, 2, 0, 2], [0, 2, 0, 2], 1.0)
    assert left([False, False, False, True]) == ([3, 3, 3, 3], [3, 3, 3, 3], 1.0)
    assert left([True, True, True, False]) == ([0, 1, 2, 0], [0, 1, 2, 0], 1.0)
    assert left([False] * 4)[2] == 0.0


# -- bad input --------------------------------------------------------------------------------------------------------


def test_nan_from_decode_stops_before_the_training(tmp_path: Path) -> None:
    for kind in ("random", "gradient", "reconstructed"):
        exploring = short(kind=kind)
        generator = PCA(exploring.data.train.inputs)
        generator.calls_until_nan = 0
        with pytest.raises(InputError, match="decodes values that are not finite") as caught:
            exploring.run(tmp_path / kind, exploration=exploring.build(generator=generator))
        assert caught.value.where == "explore.generator"
        assert not (tmp_path / f"{kind}.partial").exists()


@pytest.mark.parametrize("kind", ["random", "gradient"])
def test_nan_from_decode_later_stops_the_training_and_names_the_term(kind: str, tmp_path: Path) -> None:
    exploring = short(kind=kind)
    generator = PCA(exploring.data.train.inputs)
    generator.calls_until_nan = 5
    with pytest.raises(EdgestillError, match="not a number any more: explore/kd") as caught:
        exploring.run(tmp_path / kind, exploration=exploring.build(generator=generator))
    assert "explore.sigma below 0.5" in str(caught.value.fix)
    assert "another generator" in str(caught.value.fix)


def test_nan_from_decode_is_found_although_nothing_is_learned_from_it(tmp_path: Path) -> None:
    exploring = short(weight=0.0)
    generator = PCA(exploring.data.train.inputs)
    generator.calls_until_nan = 5
    with pytest.raises(EdgestillError, match="decodes values that are not finite"):
        exploring.run(tmp_path / "s", exploration=exploring.build(generator=generator))


@pytest.mark.parametrize("kind", ["random", "gradient"])
def test_a_generator_of_another_shape_is_refused(kind: str, tmp_path: Path) -> None:
    class Small(PCA):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents)[:, :, :4, :4]

    exploring = short(kind=kind)
    small = Small(exploring.data.train.inputs)
    with pytest.raises(InputError, match=r"decodes \(3, 4, 4\), the images are \(3, 8, 8\)"):
        exploring.run(tmp_path / "s", exploration=exploring.build(generator=small))


def test_a_radius_at_which_the_filter_keeps_too_little_stops_with_the_rates(tmp_path: Path) -> None:
    exploring = short(filter="confidence", threshold=0.99, sigma=4.0)
    with pytest.raises(InputError, match=r"keeps 0\.0 % of the first inputs that were made \(96\)") as caught:
        exploring.run(tmp_path / "s")
    assert caught.value.where == "explore.filter"
    assert " 0.0 %" in str(caught.value.evidence)
    assert "explore.sigma = 2" in str(caught.value.fix)
    assert "explore.threshold below 0.99" in str(caught.value.fix)
    assert 'explore.filter = "none"' in str(caught.value.fix)


def test_keep_rates_per_class_are_told_and_judged() -> None:
    section = ExploreSection(kind="random", filter="agreement", sigma=3.0)
    names = ("cat", "dog", "owl")
    assert check_keep_rates(section, names, [10, 0, 30], [5, 0, 15], "of") == {
        "explore/kept": 0.5,
        "explore/kept/cat": 0.5,
        "explore/kept/owl": 0.5,
    }
    with pytest.raises(InputError, match=r"keeps 4\.0 % of this") as caught:
        check_keep_rates(section, names, [60, 0, 40], [0, 0, 4], "of this")
    assert caught.value.evidence == "kept per class: cat 0.0 %, owl 10.0 %"
    assert caught.value.fix == 'explore.sigma = 1.5, or explore.filter = "none"'


@pytest.mark.parametrize("filtered", [True, False])
def test_what_a_filter_keeps_is_said_once(filtered: bool, tmp_path: Path) -> None:
    section = ExploreSection(kind="random", filter="agreement" if filtered else "none")
    exploring = Exploring(section, Case("kd").with_(epochs=3))
    said: list[str] = []
    result, _, _ = exploring.run(tmp_path / "s", exploration=exploring.build(say=said.append))
    assert len(said) == filtered
    if filtered:
        kept = result.history[0]["explore/kept"]
        assert said[0].startswith(f"explore.filter keeps {100 * kept:.0f} % of the further inputs, least of ")


def test_classes_that_a_filter_leaves_nothing_of_are_named() -> None:
    rates = {"cat": 0.0, "dog": 0.049, "owl": 0.05, "bee": 0.9}
    assert least_kept(rates) == "least of cat: 0 %, dog: 5 %, owl: 5 %"
    assert starved_classes(rates) == "less than 5 % is kept of cat, dog, too little to learn from"
    assert starved_classes({"cat": 0.05}) == ""
    many = starved_classes({f"c{number}": 0.0 for number in range(20)})
    assert "c7 and 12 more," in many
    assert "c8" not in many


def test_an_epoch_that_keeps_too_little_stops(tmp_path: Path) -> None:
    """The teacher becomes unsure only after the first look."""

    class Unsure(ModuleTeacher):
        calls = 0

        def compute(self, batch: TeacherBatch) -> TeacherOutput:
            self.calls += 1
            told = super().compute(batch)
            assert told.logits is not None
            return TeacherOutput(told.embedding, told.logits * (0.0 if self.calls > 1 else 1e3))

    exploring = short(filter="confidence", threshold=0.5)
    with pytest.raises(InputError, match=r"keeps 0\.0 % of this epoch's"):
        exploring.run(tmp_path / "s", exploration=exploring.build(teacher=Unsure(student(7))))


def test_gradient_needs_a_teacher_with_a_graph(tmp_path: Path) -> None:
    exploring = short(kind="gradient")
    with pytest.raises(InputError, match="passes none") as caught:
        exploring.run(tmp_path / "s", exploration=exploring.build(teacher=Closed(student(7))))
    assert "no graph" in str(caught.value.evidence)
    assert 'kind = "random"' in str(caught.value.fix)
    result, _, _ = short().run(tmp_path / "r", exploration=short().build(teacher=Closed(student(7))))
    assert result.epochs == 1


def test_gradient_needs_a_decoder_with_a_graph(tmp_path: Path) -> None:
    class Opaque(PCA):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents.detach())

    exploring = short(kind="gradient")
    with pytest.raises(InputError, match="decoder's gradient") as caught:
        exploring.run(tmp_path / "s", exploration=exploring.build(generator=Opaque(exploring.data.train.inputs)))
    assert caught.value.where == "explore.generator"
    result, _, _ = short().run(tmp_path / "r", exploration=short().build(generator=Opaque(exploring.data.train.inputs)))
    assert result.epochs == 1


class Stored(Teacher):
    """Outputs for the samples of the data alone."""

    kind: ClassVar[TeacherKind] = "array"
    runs_live = False
    num_logits = 4

    def fingerprint(self) -> str:
        return "stored"

    def outputs(self, batch: TeacherBatch) -> TeacherOutput:
        return TeacherOutput(None, torch.zeros(len(batch.rows), 4))


class Graph(Stored):
    """Runs on any input, without a gradient."""

    kind = "onnx"
    runs_live = True


def test_what_the_loaded_teacher_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be asked about further inputs"):
        short().build(teacher=Stored(None))
    with pytest.raises(InputError, match="passes none"):
        short(kind="gradient").build(teacher=Graph(None))
    for keys in ({"kind": "gradient"}, {"match": "kd"}, {"filter": "confidence"}):
        with pytest.raises(InputError, match="no logits for the 4 classes"):
            short(**keys).build(teacher=Embeds())
    with pytest.raises(InputError, match="this one learns") as caught:
        short(versions=2).build(teacher=ModuleTeacher(student(7)).live())
    assert caught.value.where == "explore.versions"


def test_a_missing_or_wrong_generator_is_refused(tmp_path: Path) -> None:
    for generator in (None, Swapping(["a"])):
        exploring = short()
        with pytest.raises(InputError, match="needs a generator"):
            exploring.run(tmp_path / "s", exploration=exploring.build(generator=generator))


def test_objectives_without_labels_from_the_teacher_are_refused(tmp_path: Path) -> None:
    exploring = replace(short(), case=Case("ec").with_(epochs=1))
    with pytest.raises(InputError, match='"embedding_compression" needs labels'):
        exploring.run(tmp_path / "s", exploration=exploring.build(teacher=Embeds()))


def checked(**changes: Any) -> None:
    """`check_exploration` of a sound recipe with some changes."""
    facts: dict[str, Any] = {
        "kind": "image",
        "task": "multiclass",
        "objectives": (KDSection(),),
        "teacher_kind": "train",
        "has_unlabelled": False,
    }
    facts |= {name: changes.pop(name) for name in list(changes) if name in facts and name != "kind"}
    facts["kind"] = changes.pop("inputs", "image")
    check_exploration(ExploreSection.model_validate({"kind": "random", **changes}), **facts)


MASKED = {"kind": "masked-lm", "model": "folder"}


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"teacher_kind": "array"}, "teacher.kind", "cannot be asked"),
        ({"teacher_kind": "none"}, "teacher.kind", "cannot be asked"),
        ({"kind": "gradient", "teacher_kind": "onnx"}, "explore.kind", "passes none"),
        ({"around": "both"}, "explore.around", "no unlabelled inputs"),
        ({"kind": "gradient", "inputs": "tokens"}, "explore.kind", "tokens are discrete"),
        ({"kind": "augmented", "inputs": "tokens"}, "explore.kind", "belongs to images"),
        ({"kind": "reconstructed", "inputs": "tokens"}, "explore.kind", "belongs to images"),
        ({"inputs": "tokens"}, "explore.generator.model", "none is named"),
        ({"inputs": "tokens", "generator": {"kind": "vae"}}, "explore.generator.kind", "makes images"),
        ({"inputs": "tokens", "generator": MASKED, "sigma": 2.0}, "explore.sigma", "no radius"),
        ({"generator": MASKED}, "explore.generator.kind", "makes texts"),
        ({"filter": "confidence", "task": "multilabel"}, "explore.filter", "no likeliest class"),
        ({"match": "objective", "objectives": (CRDSection(),)}, "explore.match", "place in the training split"),
        (
            {"match": "objective", "objectives": (LELPSection(subclasses="random"),)},
            "explore.match",
            "place in the training split",
        ),
        ({"match": "objective", "objectives": (SupervisedSection(),)}, "explore.match", "all of them are supervised"),
    ],
)
def test_what_the_recipe_tells_cannot_work_is_refused(changes: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        checked(**changes)
    assert caught.value.where == where
    assert caught.value.fix


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": "none", "teacher_kind": "array"},
        {"kind": "gradient", "teacher_kind": "torch"},
        {"teacher_kind": "onnx"},
        {"around": "unlabelled", "has_unlabelled": True},
        {"inputs": "tokens", "generator": MASKED},
        {"kind": "real", "inputs": "tokens"},
        {"task": "multilabel"},
        {"match": "objective", "objectives": (FitNetSection(), SupervisedSection())},
        {"match": "kd", "objectives": (CRDSection(),)},
        {"match": "objective", "objectives": (LELPSection(),)},
    ],
)
def test_what_works_passes(changes: dict[str, Any]) -> None:
    checked(**changes)


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_the_key_holds_all_that_decides_the_weights() -> None:
    data = dataset()
    sections: list[dict[str, Any]] = [
        {}, {"sigma": 2.0}, {"weight": 0.5}, {"tau": 2.0}, {"filter": "agreement"}, {"batch_size": 8},
        {"kind": "gradient"}, {"kind": "gradient", "steps": 2}, {"match": "objective"},
    ]  # fmt: skip
    keys = [str(short(**section).build().key) for section in sections]
    keys.append(str(short().build(tau=4.0).key))
    keys.append(str(short().build(teacher=ModuleTeacher(student(8))).key))
    keys.append(str(short().build(generator=PCA(data.train.inputs, 3)).key))
    keys.append(str(short().build(unlabelled=some_unlabelled(data)).key))
    assert len(set(keys)) == len(keys)
    assert keys[0] == str(short().build().key)


def test_mixup_and_several_views_go_along_with_it(tmp_path: Path) -> None:
    exploring = short()
    mixed = replace(exploring, case=exploring.case.with_(mixup=0.4))
    result, _, _ = mixed.run(tmp_path / "s")
    assert math.isfinite(result.history[0]["loss"])


@pytest.mark.parametrize("kind", ["random", "gradient"])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_picture_shows_real_images_above_what_becomes_of_them(kind: str, task: Any, tmp_path: Path) -> None:
    exploring = Exploring(ExploreSection.model_validate({"kind": kind}), Case("kd", data=dataset(task=task)))
    net, objective = exploring.student()
    net.train()
    before = fingerprint(net)
    exploring.build().picture(tmp_path / "explored.png", net, objective)
    with Image.open(tmp_path / "explored.png") as picture:
        shown = np.asarray(picture.convert("RGB"))
    # 8 columns and 4 rows of images of 8 pixels, enlarged to at least 64
    assert shown.shape[0] > 4 * 64
    assert shown.shape[1] > 8 * 64
    labels, names = exploring.data.train.labels, exploring.data.classes
    row = 0 if task == "multilabel" else one_per_class(labels, names).rows[0]
    first = np.repeat(np.repeat(exploring.data.train.inputs[row].transpose(1, 2, 0), 8, 0), 8, 1)
    spans = np.lib.stride_tricks.sliding_window_view(shown[:90], (64, 64, 3))[:, :, 0]
    assert any((spans[y, x] == first).all() for y, x in np.argwhere((shown[:27, :-63] == first[0, 0]).all(2)))
    assert fingerprint(net) == before


@pytest.mark.parametrize(("keys", "section", "world"), [({"batch_size": 3}, {}, 2), ({}, {"batch_size": 1}, 1)])
def test_a_share_of_one_input_is_refused(
    keys: dict[str, Any], section: dict[str, Any], world: int, tmp_path: Path
) -> None:
    """Whether the exploration says so, or `train`, from which it takes its own."""
    exploring = short(**keys)
    case = replace(exploring.case, section=exploring.case.section.model_copy(update=section))
    exploring = replace(exploring, case=case)
    exploration = exploring.build()

    class Several(Processes):
        pass

    Several.world = world

    def start(run: Run) -> None:
        run.processes = Several(run.device)
        Looking.start(exploration, run)

    exploration.start = start  # type: ignore[method-assign]
    with pytest.raises(InputError, match="a single further input has no statistics") as caught:
        exploring.run(tmp_path / "s", exploration=exploration)
    assert caught.value.where == "explore.batch_size"
    assert f"= {2 * world} or more" in str(caught.value.fix)
