import errno
import json
import math
import os
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill import training
from distill.data.section import AugmentSection
from distill.objectives.embedding_compression import EmbeddingCompression
from distill.objectives.section import describe_objectives
from distill.train_section import TrainSection
from distill.training import evaluate_logits, learning_rate, read_result
from profiles.artifact import verify
from profiles.errors import EdgestillError, InputError, Interrupted
from profiles.metrics import evaluate
from tests.distill.training_cases import OBJECTIVES, Case, StopAfter, cache, dataset, same_weights

MULTILABEL = [entry.kind for entry in describe_objectives() if "multilabel" in entry.tasks]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_a_student_that_has_learned(objective: dict[str, Any], tmp_path: Path) -> None:
    case = Case(objective).with_(epochs=12, learning_rate=0.02)
    result, net, composed = case.run(tmp_path / "student")
    assert result.metric.value > 0.6
    assert result.metric.n == 48
    logits = evaluate_logits(net, composed, case.data.validation, device="cpu")
    assert logits.shape == (48, 4)
    assert logits.dtype == np.float32
    assert evaluate("multiclass", logits, case.data.validation.labels).value == pytest.approx(result.metric.value)


@pytest.mark.parametrize("objective", MULTILABEL)
def test_several_labels_with_unknown_ones_train_too(objective: str, tmp_path: Path) -> None:
    case = Case(objective, data=dataset(task="multilabel")).with_(
        epochs=6, learning_rate=0.02, class_weights="balanced"
    )
    result, _, _ = case.run(tmp_path / "student")
    assert result.metric.name == "mAP"
    assert result.metric.value > 0.6
    assert result.metric.low <= result.metric.value <= result.metric.high


def test_tokens_train_too(tmp_path: Path) -> None:
    case = Case("ec", data=dataset(tokens=True), views=1).with_(epochs=6, learning_rate=0.05)
    assert case.run(tmp_path / "student")[0].metric.value > 0.6


def test_the_artefact_holds_weights_metrics_and_settings(tmp_path: Path) -> None:
    result, net, _ = Case("ec").run(tmp_path / "student")
    manifest = verify(tmp_path / "student", "student")
    assert set(manifest.files) == {"student.safetensors", "objective.safetensors", "metrics.jsonl", "train.json"}
    assert manifest.info["arch"] == "toy"
    assert read_result(tmp_path / "student") == result
    lines = [json.loads(line) for line in (tmp_path / "student/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"loss/ground_truth", "loss/embedding_compression/distance", "validation/top1"} <= set(lines[0])
    assert lines[0]["embedding_compression/effective_rank"] > 1
    assert not (tmp_path / "student.partial").exists()
    # the exported student holds nothing of the objective
    assert not any("transform" in name for name in net.state_dict())
    assert not net.training


@pytest.mark.parametrize(("min_steps", "epochs"), [(None, 2), (1, 2), (12, 2), (13, 3), (60, 10)])
def test_a_small_split_gets_the_epochs_that_its_steps_need(min_steps: int | None, epochs: int, tmp_path: Path) -> None:
    result, _, _ = Case("kd").with_(min_steps=min_steps).run(tmp_path / "student")
    assert result.epochs == len(result.history) == epochs
    assert TrainSection(min_steps=5, batch_size=128).resolved(20).epochs == 30  # a split smaller than a batch


@pytest.mark.parametrize(
    ("validations", "looked"), [(None, [1, 2, 3, 4, 5]), (2, [3, 5]), (3, [2, 4, 5]), (1, [5]), (9, [1, 2, 3, 4, 5])]
)
def test_validation_is_looked_at_as_often_as_asked(validations: int | None, looked: list[int], tmp_path: Path) -> None:
    result, net, composed = (case := Case("kd").with_(epochs=5, validations=validations)).run(tmp_path / "student")
    found = [int(record["epoch"]) for record in result.history if "validation/top1" in record]
    assert found == looked
    assert result.best_epoch in looked
    assert len(result.history) == 5
    logits = evaluate_logits(net, composed, case.data.validation, device="cpu")
    assert evaluate("multiclass", logits, case.data.validation.labels).value == pytest.approx(result.metric.value)


def test_a_finished_training_is_loaded_and_not_done_again(tmp_path: Path) -> None:
    case = Case("ec")
    first, net, objective = case.run(tmp_path / "student")
    again, same_net, same_objective = case.run(tmp_path / "student", progress=StopAfter(1))
    assert again == first
    assert same_weights(net, same_net)
    assert same_weights(objective, same_objective)


@pytest.mark.parametrize(
    "change",
    [{"section": TrainSection(epochs=1, batch_size=16)}, {"seed": 1}, {"augmentation": AugmentSection(views=2)}],
)
def test_other_settings_train_anew(change: dict[str, Any], tmp_path: Path) -> None:
    Case().run(tmp_path / "student")
    with pytest.raises(Interrupted):
        replace(Case(), **change).run(tmp_path / "student", progress=StopAfter(1))


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not(tmp_path: Path) -> None:
    first, same = (Case("ec").run(tmp_path / name)[1] for name in ("a", "b"))
    assert same_weights(first, same)
    other = Case("ec", seed=1).run(tmp_path / "c")[1]
    assert not same_weights(first, other)


FULL = {"ema": 0.9, "grad_clip": 1.0, "label_smoothing": 0.1, "class_weights": "balanced", "optimizer": "sgd"}


@pytest.mark.parametrize("stop_after", [3, 6, 9])
@pytest.mark.parametrize(
    ("objective", "keys"),
    [("kd", {"mixup": 0.4}), ("ec", FULL), ([{"kind": "kd"}, {"kind": "ec"}], {"hard_weight": 0.3})],
)
def test_an_interrupted_training_ends_bit_for_bit_like_an_uninterrupted_one(
    objective: Any, keys: dict[str, Any], stop_after: int, tmp_path: Path
) -> None:
    case = Case(objective).with_(**keys)
    whole, net, composed = case.run(tmp_path / "whole")
    with pytest.raises(Interrupted) as stopped:
        case.run(tmp_path / "parts", progress=StopAfter(stop_after))
    assert stopped.value.exit_status == 130
    assert not (tmp_path / "parts").exists()
    # torch's own generators do not matter
    torch.manual_seed(stop_after)
    progress = StopAfter(0)
    resumed, other, other_composed = case.run(tmp_path / "parts", progress=progress)
    assert "resumed" in progress.notes[0]
    assert same_weights(net, other)
    assert same_weights(composed, other_composed)
    assert resumed.metric == whole.metric
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history]


def test_ctrl_c_leaves_the_signals_as_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        Case().run(tmp_path / "student", progress=StopAfter(2))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_checkpoint_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Case().run(tmp_path / "student", progress=StopAfter(3))
    progress = StopAfter(0)
    result, net, _ = Case(seed=1).run(tmp_path / "student", progress=progress)
    assert "starting anew" in progress.notes[0]
    assert same_weights(net, Case(seed=1).run(tmp_path / "fresh")[1])
    assert len(result.history) == 2


@pytest.mark.parametrize("kept", [0, 100, 2000])
def test_a_truncated_checkpoint_is_named_with_a_way_out(kept: int, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Case().run(tmp_path / "student", progress=StopAfter(3))
    file = tmp_path / "student.partial/checkpoint.pt"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="damaged checkpoint") as error:
        Case().run(tmp_path / "student")
    assert error.value.where == str(file)
    assert "delete" in str(error.value.fix)


def test_a_full_disk_is_named_and_the_older_checkpoint_stays(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(Interrupted):
        Case().run(tmp_path / "student", progress=StopAfter(3))
    file = tmp_path / "student.partial/checkpoint.pt"
    before = file.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EdgestillError, match="disk is full"):
        Case().run(tmp_path / "student")
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == []


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values read out of tensors, and shapes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.NAMES:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_step_reads_a_value_back(objective: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    counts: list[list[str]] = []
    step = training.Run._step

    def counted(self: Any, *rows: torch.Tensor) -> None:
        with Reads() as reads:
            step(self, *rows)
        counts.append(reads.found)

    monkeypatch.setattr(training.Run, "_step", counted)
    keys: dict[str, Any] = {"ema": 0.9, "grad_clip": 1.0, "class_weights": "balanced"}
    Case(objective).with_(**keys).run(tmp_path / "student")
    assert len(counts) == 12
    assert counts == [[]] * 12


def test_a_loss_that_is_no_number_stops_and_names_term_and_steps(tmp_path: Path) -> None:
    data = dataset()
    teacher = cache(data, 2)
    assert teacher.train_logits is not None
    teacher.train_logits[:, 40] = np.inf
    with pytest.raises(EdgestillError, match="kd") as error:
        Case("kd").run(tmp_path / "student", teacher=teacher)
    assert error.value.where == "epoch 1, steps 1 to 6"
    assert "ground_truth" in str(error.value.evidence)


def test_teacher_outputs_that_change_under_the_training_are_noticed(tmp_path: Path) -> None:
    teacher = cache(dataset(), 2)
    assert teacher.train_embedding is not None
    embedding = teacher.train_embedding

    class Meddling(StopAfter):
        def advance(self, amount: int = 1, note: str = "") -> None:
            embedding[0, 0, 0] += 1

    with pytest.raises(EdgestillError, match="changed during training"):
        Case("ec").run(tmp_path / "student", teacher=teacher, progress=Meddling(0))


def test_teacher_outputs_stay_bitwise_the_same(tmp_path: Path) -> None:
    teacher = cache(dataset(), 2)
    assert teacher.train_embedding is not None
    before = teacher.train_embedding.copy()
    Case("ec").run(tmp_path / "student", teacher=teacher)
    assert np.array_equal(before, teacher.train_embedding)


def test_a_live_teacher_that_moves_is_noticed(tmp_path: Path) -> None:
    hashes = iter(["before", "after"])
    with pytest.raises(EdgestillError, match="frozen teacher changed"):
        Case().run(tmp_path / "student", teacher_fingerprint=lambda: next(hashes))


def test_ec_without_distance_is_the_plain_student(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"grad_clip": 0.5, "ema": 0.9}
    plain = Case("supervised").with_(**keys).run(tmp_path / "plain")[1]
    ec = Case([{"kind": "ec", "lam": 0.0}]).with_(**keys).run(tmp_path / "ec")[1]
    assert same_weights(plain, ec)


def test_a_cache_of_other_data_or_views_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="other data"):
        Case().run(tmp_path / "student", teacher=cache(dataset(rows=64), 2))
    with pytest.raises(InputError, match="another augmentation"):
        Case().run(tmp_path / "student", teacher=cache(dataset(), 3))


def test_one_cached_view_serves_every_view(tmp_path: Path) -> None:
    assert Case(views=1).run(tmp_path / "student")[0].metric.value > 0


@pytest.mark.parametrize("objective", ["ec", "distance_correlation"])
def test_mixup_is_refused_for_embeddings_and_for_tokens(objective: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        Case(objective).with_(mixup=0.2).run(tmp_path / "student")
    assert error.value.where == "train.mixup"
    with pytest.raises(InputError, match="mixup needs images"):
        Case("kd", data=dataset(tokens=True), views=1).with_(mixup=0.2).run(tmp_path / "student")


def test_class_weights_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        Case().with_(class_weights=(1.0, 2.0)).run(tmp_path / "student")
    assert error.value.where == "train.class_weights"


def test_validation_chooses_the_epoch_and_the_test_split_is_never_read(tmp_path: Path) -> None:
    data = dataset()
    poisoned = replace(data, test=replace(data.test, inputs=None, labels=None))
    result, _, _ = Case("kd", data=poisoned).with_(epochs=5, learning_rate=0.02).run(tmp_path / "student")
    values = [record["validation/top1"] for record in result.history]
    assert result.metric.value == max(values)
    assert values[result.best_epoch - 1] == max(values)


def test_the_moving_average_is_what_is_kept(tmp_path: Path) -> None:
    plain = Case("kd").run(tmp_path / "plain")[1]
    averaged = Case("kd").with_(ema=0.9).run(tmp_path / "averaged")[1]
    assert not same_weights(plain, averaged)


def test_bf16_trains_with_float32_losses(tmp_path: Path) -> None:
    result, net, _ = Case("ec").with_(precision="bf16", epochs=12, learning_rate=0.05).run(tmp_path / "student")
    assert result.precision == "bf16"
    assert result.metric.value > 0.8
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_tensorboard_writes_events_that_can_be_read(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result, _, _ = Case("kd").with_(tensorboard=True).run(tmp_path / "student")
    events = accumulator.EventAccumulator(str(tmp_path / "student/tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss/kd")] == pytest.approx(
        [record["loss/kd"] for record in result.history]
    )


def test_events_of_a_discarded_training_are_not_in_the_new_artefact(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(Interrupted):
        Case("kd", seed=1).with_(tensorboard=True, epochs=5).run(tmp_path / "student", progress=StopAfter(20))
    assert list((tmp_path / "student.partial/tensorboard").iterdir())
    result, _, _ = Case("kd").with_(tensorboard=True).run(tmp_path / "student")
    assert len(list((tmp_path / "student/tensorboard").iterdir())) == 1
    events = accumulator.EventAccumulator(str(tmp_path / "student/tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss/kd")] == pytest.approx(
        [record["loss/kd"] for record in result.history]
    )


def test_events_of_a_resumed_training_are_one_curve(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    case = Case("kd").with_(tensorboard=True, epochs=3)
    with pytest.raises(Interrupted):
        case.run(tmp_path / "student", progress=StopAfter(8))
    result, _, _ = case.run(tmp_path / "student")
    events = accumulator.EventAccumulator(str(tmp_path / "student/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/kd")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss/kd")] == pytest.approx(
        [record["loss/kd"] for record in result.history]
    )


def test_the_time_of_fitting_an_objective_is_part_of_the_training_time(tmp_path: Path, monkeypatch) -> None:
    fit = EmbeddingCompression._fit

    def slow(self: Any, *arguments: Any) -> None:
        time.sleep(0.7)
        fit(self, *arguments)

    case = Case("ec")
    quick = case.run(tmp_path / "quick")[0].seconds
    monkeypatch.setattr(EmbeddingCompression, "_fit", slow)
    # stopped and resumed: fitted once, counted once
    with pytest.raises(Interrupted):
        case.run(tmp_path / "slow", progress=StopAfter(3))
    assert 0.7 < case.run(tmp_path / "slow")[0].seconds < 1.4 + quick


def test_a_batch_larger_than_the_data_is_the_whole_data(tmp_path: Path) -> None:
    result, _, _ = Case("kd").with_(batch_size=1000).run(tmp_path / "student")
    assert len(result.history) == 2


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_the_schedule_warms_up_to_the_peak_and_ends_low(schedule: Any) -> None:
    section = TrainSection(schedule=schedule, learning_rate=0.1)
    rates = [learning_rate(section, step, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(0.1)
    assert rates[0] < 0.01
    assert rates[-1] == pytest.approx(0.1) if schedule == "constant" else rates[-1] < 1e-4
    peak = rates.index(max(rates))
    assert all(a <= b for a, b in pairwise(rates[: peak + 1]))
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)


def test_mixup_of_soft_targets_is_the_mixture_of_two_losses() -> None:
    """Cross-entropy and KL are affine in the target up to a constant: the gradients agree exactly."""
    from distill.objectives.kd import kd_loss

    generator = torch.Generator().manual_seed(0)
    z, a, b = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    z.requires_grad_()
    (two,) = torch.autograd.grad(0.3 * kd_loss(z, a, 4.0) + 0.7 * kd_loss(z, b, 4.0), z)
    target = 0.3 * (a / 4).softmax(1) + 0.7 * (b / 4).softmax(1)
    one = 16 * torch.nn.functional.kl_div((z / 4).log_softmax(1), target, reduction="batchmean")
    assert torch.allclose(two, torch.autograd.grad(one, z)[0], atol=1e-12)


def test_the_plain_student_needs_no_teacher(tmp_path: Path) -> None:
    assert Case("supervised").run(tmp_path / "student", teacher=None)[0].metric.n == 48
