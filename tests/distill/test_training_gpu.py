from pathlib import Path
from typing import Any

import pytest
import torch

from distill import training
from tests.distill.training_cases import OBJECTIVES, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU (torch.cuda.is_available() is false)"),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loop_learns_in_bf16_on_the_gpu(objective: dict[str, Any], tmp_path: Path) -> None:
    case = Case(objective).with_(epochs=12, learning_rate=0.02, ema=0.9, grad_clip=1.0)
    result, net, _ = case.run(tmp_path / "student", device="cuda")
    assert result.precision == ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32")
    assert result.metric.value > 0.6
    assert all(value.device.type == "cpu" for value in net.state_dict().values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_step_waits_for_the_gpu(objective: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = training.Run._step

    def strict(self: Any, *rows: torch.Tensor) -> None:
        first = self.epoch == 0 and self.step_in_epoch == 0  # lazy initialisation of libraries may wait once
        torch.cuda.set_sync_debug_mode("default" if first else "error")
        try:
            step(self, *rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training.Run, "_step", strict)
    keys: dict[str, Any] = {"ema": 0.9, "grad_clip": 1.0}
    Case(objective).with_(**keys).run(tmp_path / "student", device="cuda")


def test_a_compiled_student_learns_the_same_task(tmp_path: Path) -> None:
    result, _, _ = (
        Case("kd").with_(epochs=12, learning_rate=0.02, compile=True).run(tmp_path / "student", device="cuda")
    )
    assert result.metric.value > 0.6


def test_data_that_does_not_fit_is_copied_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = Case("ec").run(tmp_path / "resident", device="cuda")[0]
    monkeypatch.setattr("distill.resident._budget", lambda _device: 0.0)
    copied = Case("ec").run(tmp_path / "copied", device="cuda")[0]
    assert [r["loss"] for r in copied.history] == pytest.approx([r["loss"] for r in resident.history], rel=1e-3)
