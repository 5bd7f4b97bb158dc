from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import training
from distill.exploration.section import ExploreSection
from tests.distill.exploration_cases import Exploring, Swapping, texts_dataset
from tests.distill.test_exploration import some_unlabelled
from tests.distill.test_generated import built
from tests.distill.training_cases import Case, same_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU (torch.cuda.is_available() is false)"),
]


def strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on, a step that waits for the device raises."""
    step = training.Run._step

    def strict(self: Any, *rows: torch.Tensor) -> None:
        first = self.epoch == 0 and self.step_in_epoch == 0  # lazy initialisation of libraries may wait once
        torch.cuda.set_sync_debug_mode("default" if first else "error")
        try:
            step(self, *rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training.Run, "_step", strict)


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": "random"},
        {"kind": "random", "filter": "confidence", "threshold": 0.3},
        {"kind": "gradient", "steps": 2, "filter": "agreement"},
        {"kind": "reconstructed", "match": "objective"},
        {"kind": "augmented"},
        {"kind": "real", "around": "both"},
        {"kind": "random", "versions": 2},
    ],
)
def test_no_step_waits_for_the_gpu(keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Exploring(ExploreSection.model_validate(keys))
    case = replace(case, unlabelled=some_unlabelled(case.data))
    if "versions" in keys:
        case = replace(case, generated=built(case, tmp_path / "set", device="cuda"))
    exploration = case.build()
    strictly(monkeypatch)
    result, _, _ = case.run(tmp_path / "student", device="cuda", exploration=exploration)
    assert "explore/divergence" in result.history[-1]
    assert all(ready.inputs.is_cuda for ready in exploration.seen)


def test_refilled_texts_reach_the_gpu(tmp_path: Path) -> None:
    section = ExploreSection.model_validate({"kind": "random", "generator": {"kind": "masked-lm", "model": "here"}})
    case = Case("kd", data=texts_dataset(tmp_path), views=1)
    _, _, exploration = Exploring(section, case, texts=Swapping(["a", "b"])).run(tmp_path / "s", device="cuda")
    assert all(ready.inputs.is_cuda for ready in exploration.seen)


def test_draws_are_those_of_the_cpu(tmp_path: Path) -> None:
    seen = {}
    for device in ("cpu", "cuda"):
        case = Exploring(ExploreSection(kind="random", weight=0.0))
        seen[device] = case.run(tmp_path / device, device=device)[2].seen[0].inputs.cpu().int()
    assert (seen["cpu"] - seen["cuda"]).abs().max() <= 1


def test_with_weight_zero_the_student_is_that_of_kd_bit_for_bit(tmp_path: Path) -> None:
    case = Exploring(ExploreSection(kind="gradient", weight=0.0))
    _, net, _ = case.run(tmp_path / "explored", device="cuda")
    plain, objective = case.student()
    case.train(plain, objective, tmp_path / "plain", None, device="cuda")
    assert same_weights(net, plain)


def test_the_picture_is_drawn_with_a_teacher_on_the_gpu(tmp_path: Path) -> None:
    case = Exploring(ExploreSection(kind="gradient"))
    _, net, exploration = case.run(tmp_path / "s", device="cuda")
    exploration.picture(tmp_path / "explored.png", net, case.student()[1])
    assert (tmp_path / "explored.png").stat().st_size > 0
    assert not next(net.parameters()).is_cuda
