from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.data.dataset import Dataset
from distill.outputs import StudentOutput, TeacherOutput
from distill.strategy import Step, Strategy, Together
from distill.training import Run
from profiles.errors import EdgestillError, InputError, Interrupted
from tests.distill.training_cases import Case, StopAfter, same_weights


class Spy(Strategy):
    """Notes the moments at which the loop asks."""

    mixup = True
    key = "spy"

    def __init__(self) -> None:
        self.moments: list[str] = []
        self.steps: list[Step] = []

    def start(self, run: Run) -> None:
        self.run = run
        self.moments.append("start")

    def before_step(self, step: Step) -> None:
        self.moments.append("before")
        self.steps.append(step)
        torch.rand(7)  # must not change the student's dropout

    def teacher(self, step: Step) -> TeacherOutput | None:
        self.moments.append("teacher")
        return None

    def terms(self, step: Step, output: StudentOutput) -> dict[str, Tensor]:
        self.moments.append("terms")
        return {}

    def after_step(self, step: Step) -> None:
        self.moments.append("after")

    def logs(self) -> dict[str, float]:
        self.moments.append("logs")
        return {"spy/figure": 7.0}

    def validation(self) -> dict[str, float]:
        self.moments.append("validation")
        return {"validation/spy": 8.0}

    def save(self, folder: Path) -> None:
        self.moments.append("save")
        (folder / "spy.txt").write_text("kept")


class Beside(Strategy):
    """A scale that trains with the student, and a count of steps."""

    key = "beside"

    def __init__(self) -> None:
        self.scale = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.scale.weight.fill_(1.0)
        self.steps = 0

    def modules(self) -> list[nn.Module]:
        return [self.scale]

    def terms(self, step: Step, output: StudentOutput) -> dict[str, Tensor]:
        scaled = self.scale(output.head.mean(1, keepdim=True))
        return {"beside": (scaled - 2).square().mean()}

    def after_step(self, step: Step) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_the_loop_asks_in_the_order_that_the_protocol_promises(tmp_path: Path) -> None:
    spy = Spy()
    result, _, _ = Case("kd").run(tmp_path / "student", strategy=spy)
    step = ["before", "teacher", "terms", "after"]
    assert spy.moments == ["start", *([*step * 6, "logs", "validation"] * 2), "save"]
    assert [each.number for each in spy.steps] == list(range(12))
    assert [each.epoch for each in spy.steps] == [0] * 6 + [1] * 6
    assert result.history[0]["spy/figure"] == 7.0
    assert result.history[1]["validation/spy"] == 8.0
    assert (tmp_path / "student/spy.txt").read_text() == "kept"


def test_a_strategy_that_does_nothing_changes_no_weight_but_is_another_training(tmp_path: Path) -> None:
    _, plain, _ = Case("kd").run(tmp_path / "plain")
    _, asked, _ = Case("kd").run(tmp_path / "asked", strategy=Spy())
    assert same_weights(plain, asked)
    with pytest.raises(Interrupted):  # trains, instead of loading
        Case("kd").run(tmp_path / "plain", strategy=Spy(), progress=StopAfter(1))


def test_a_step_shows_the_batch_that_is_trained_on(tmp_path: Path) -> None:
    spy = Spy()
    case = Case("kd")
    case.run(tmp_path / "student", strategy=spy)
    first, last = spy.steps[0], spy.steps[-1]
    assert first.inputs.shape == (16, 3, 8, 8)
    assert torch.equal(first.rows, first.host_rows)
    assert torch.equal(first.share, first.rows)
    assert sorted(torch.cat([step.rows for step in spy.steps[:6]]).tolist()) == list(range(96))
    assert last.learning_rate < first.learning_rate
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(case.data.train.labels)[first.rows]
    assert torch.allclose(first.truth(logits), nn.functional.cross_entropy(logits, labels))


def test_the_truth_of_a_mixed_batch_is_the_mixture_of_its_labels(tmp_path: Path) -> None:
    spy = Spy()
    case = Case("kd").with_(mixup=0.4)
    case.run(tmp_path / "student", strategy=spy)
    step = spy.steps[0]
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(case.data.train.labels)[step.rows]
    kept = np.random.default_rng((0, 0)).beta(0.4, 0.4)
    own, other = (nn.functional.cross_entropy(logits, each) for each in (labels, labels.flip(0)))
    assert torch.allclose(step.truth(logits), kept * own + (1 - kept) * other)


def test_only_the_rows_that_a_strategy_names_are_trained_on(tmp_path: Path) -> None:
    kept = np.arange(1, 96, 2)

    class Half(Spy):
        def rows(self, dataset: Dataset, seed: int) -> Any:
            return kept

    spy = Half()
    Case("kd").with_(min_steps=12).run(tmp_path / "student", strategy=spy)
    assert len(spy.steps) == 12  # 48 rows are 3 steps an epoch, so 4 epochs
    assert sorted(torch.cat([step.rows for step in spy.steps[:3]]).tolist()) == kept.tolist()


def test_outputs_of_a_strategys_teacher_replace_the_cache(tmp_path: Path) -> None:
    class Told(Spy):
        def teacher(self, step: Step) -> TeacherOutput | None:
            return TeacherOutput(None, torch.zeros(len(step.rows), 4))

    told, _, _ = Case("kd").with_(hard_weight=0.0).run(tmp_path / "told", strategy=Told(), teacher=None)
    cached, _, _ = Case("kd").with_(hard_weight=0.0).run(tmp_path / "cached")
    assert told.metric.value < cached.metric.value


def test_modules_beside_the_network_train_with_it_and_come_back_after_an_interruption(tmp_path: Path) -> None:
    whole = Beside()
    result, net, _ = Case("kd").run(tmp_path / "whole", strategy=whole)
    assert "loss/beside" in result.history[0]
    assert whole.scale.weight.item() != 1.0
    with pytest.raises(Interrupted):
        Case("kd").run(tmp_path / "parts", strategy=Beside(), progress=StopAfter(8))
    resumed = Beside()
    _, other, _ = Case("kd").run(tmp_path / "parts", strategy=resumed)
    assert resumed.steps == whole.steps == 12
    assert torch.equal(resumed.scale.weight, whole.scale.weight)
    assert same_weights(net, other)


def test_a_loss_that_is_no_number_names_the_strategys_remedy_too(tmp_path: Path) -> None:
    class Broken(Spy):
        remedy = "; or less of it"

        def terms(self, step: Step, output: StudentOutput) -> dict[str, Tensor]:
            return {"broken": output.head.sum() * float("nan")}

    with pytest.raises(EdgestillError, match="broken") as error:
        Case("kd").run(tmp_path / "student", strategy=Broken())
    assert str(error.value.fix).endswith("train.grad_clip = 1.0; or less of it")


def test_mixup_is_refused_where_a_strategy_cannot_have_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        Case("kd").with_(mixup=0.4).run(tmp_path / "student", strategy=Beside())
    assert error.value.where == "train.mixup"
    assert not (tmp_path / "student.partial").exists()


def test_two_strategies_together_are_each_asked_as_if_alone(tmp_path: Path) -> None:
    spy, beside = Spy(), Beside()
    result, _, _ = Case("kd").run(tmp_path / "both", strategy=Together(spy, beside))
    alone = Spy()
    Case("kd").run(tmp_path / "alone", strategy=alone)
    assert spy.moments == alone.moments
    assert result.history[0]["spy/figure"] == 7.0
    assert "loss/beside" in result.history[0]
    assert beside.scale.weight.item() != 1.0
    assert (tmp_path / "both/spy.txt").read_text() == "kept"


def test_together_means_that_every_one_must_allow_mixup() -> None:
    assert Together(Spy(), Spy()).mixup
    assert not Together(Spy(), Beside()).mixup


def test_the_state_of_two_strategies_comes_back_after_an_interruption(tmp_path: Path) -> None:
    whole, first, second = Beside(), Beside(), Beside()
    _, net, _ = Case("kd").run(tmp_path / "whole", strategy=Together(Spy(), whole))
    with pytest.raises(Interrupted):
        Case("kd").run(tmp_path / "parts", strategy=Together(Spy(), first), progress=StopAfter(8))
    _, other, _ = Case("kd").run(tmp_path / "parts", strategy=Together(Spy(), second))
    assert second.steps == whole.steps == 12
    assert same_weights(net, other)


def test_the_first_of_two_strategies_that_gives_a_teacher_or_rows_counts(tmp_path: Path) -> None:
    class Told(Spy):
        def __init__(self, value: float, rows: Any) -> None:
            super().__init__()
            self.value, self.kept = value, rows

        def rows(self, dataset: Dataset, seed: int) -> Any:
            return self.kept

        def teacher(self, step: Step) -> TeacherOutput | None:
            super().teacher(step)
            return TeacherOutput(None, torch.full((len(step.rows), 4), self.value))

    both = Together(Spy(), Told(1.0, np.arange(32)), Told(2.0, np.arange(64)))
    assert both.rows(Case("kd").data, 0) is not None
    assert len(both.rows(Case("kd").data, 0)) == 32
    found = both.teacher(Step(0, 0, *[torch.arange(3)] * 5, 0.1, lambda logits: logits))
    assert found is not None
    assert found.logits is not None
    assert float(found.logits[0, 0]) == 1.0
