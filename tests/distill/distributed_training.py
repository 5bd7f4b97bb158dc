"""Distributed trainings for test_training_distributed.py: `torchrun ... -m` this, with cases and folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from profiles.errors import Interrupted
from tests.distill.training_cases import Case, StopAfter

CASES = {
    "kd": Case("kd", norm=False),
    "ec": Case("ec", norm=False).with_(ema=0.9, grad_clip=1.0),
    "mix": Case(
        [{"kind": "kd"}, {"kind": "ec", "transform": "mlp", "distance": "cosine", "dimension": 5}], norm=False
    ).with_(hard_weight=0.3, mixup=0.0, epochs=3),
    "uneven": Case("kd", norm=False).with_(batch_size=15),
}


def main(names: list[str], folder: Path, stop_after: int) -> None:
    """Trains one case after the other, and lets every rank write what it ended with."""
    try:
        for name in names:
            _, net, objective = CASES[name].run(folder / name, StopAfter(stop_after) if stop_after else None)
            state = {**net.state_dict(), **{f"objective.{key}": value for key, value in objective.state_dict().items()}}
            file = folder / f"{name}-rank{torch.distributed.get_rank()}.json"
            file.write_text(json.dumps({key: value.flatten().tolist() for key, value in state.items()}))
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_status)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1].split(","), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
