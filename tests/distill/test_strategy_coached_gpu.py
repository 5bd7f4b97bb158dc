from pathlib import Path
from typing import Any

import pytest
import torch

from distill import training
from tests.distill.coached_cases import Coaching
from tests.distill.test_strategy_coached import CONV, TEXT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU (torch.cuda.is_available() is false)"),
]


@pytest.mark.parametrize("keys", [{}, {"influence": "preconditioned", "derivative": "jvp"}])
@pytest.mark.parametrize("strategy", ["online", "meta", "lgtm"])
@pytest.mark.parametrize(("case", "teacher"), [(CONV, "conv-w12-d1-k3"), (TEXT, "text-w24-d1-h2")])
def test_no_step_waits_for_the_gpu(
    case: Any, teacher: str, strategy: Any, keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.Run._step

    def strict(self: Any, *rows: torch.Tensor) -> None:
        first = self.epoch == 0 and self.step_in_epoch == 0  # lazy initialisation of libraries may wait once
        torch.cuda.set_sync_debug_mode("default" if first else "error")
        try:
            step(self, *rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training.Run, "_step", strict)
    coaching = Coaching(strategy, case=case.with_(grad_clip=1.0), teacher_arch=teacher)
    if strategy != "online":
        coaching = coaching.with_(**keys)
    result, _, _ = coaching.run(tmp_path / "student", device="cuda")
    assert "validation/teacher_top1" in result.history[-1]
