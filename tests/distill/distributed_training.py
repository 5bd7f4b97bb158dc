"""Distributed trainings for test_training_distributed.py: `torchrun ... -m` this, with cases and folder."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from profiles.errors import Interrupted
from tests.distill.training_cases import Case, StopAfter

CASES = {
    "kd": Case("kd", norm=False),
    "ec": Case("ec", norm=False).with_(ema=0.9, grad_clip=1.0, checkpoint_every=2),
    "conv": Case("ec", arch="conv-w8-d1-k3").with_(epochs=3),
    # SGD: a projection's bias is cancelled by the next BatchNorm, and AdamW would scale its rounding errors up to steps
    "inverted": Case("kd", arch="convi-w8-d1-k3").with_(ema=0.9, optimizer="sgd"),
    "mix": Case(
        [{"kind": "kd"}, {"kind": "ec", "transform": "mlp", "distance": "cosine", "dimension": 5}], norm=False
    ).with_(hard_weight=0.3, mixup=0.0, epochs=3),
    "crd": Case("crd", norm=False),
    "rkd": Case("rkd", norm=False),
    "lelp": Case({"kind": "lelp", "subclasses_per_class": 4}, norm=False),
    "subclass": Case("subclass", norm=False),
    "uneven": Case("kd", norm=False).with_(batch_size=15),
}


def _timeout() -> timedelta:
    """How long a collective of the process group waits."""
    group = torch.distributed.distributed_c10d._get_default_group()
    patience: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return patience


def layers(net: nn.Module) -> list[str]:
    """Type of every layer."""
    return [type(layer).__name__ for layer in net.modules()]


def main(names: list[str], folder: Path, stop_after: int) -> None:
    """Trains one case after the other, and lets every rank write what it ended with.

    stop_after: steps after which Ctrl-C is pressed, on rank 1 alone; 0: never.
    """
    press = stop_after if os.environ["RANK"] == "1" else 0
    try:
        for name in names:
            _, net, objective = CASES[name].run(folder / name, StopAfter(press) if press else None)
            state = {**net.state_dict(), **{f"objective.{key}": value for key, value in objective.state_dict().items()}}
            file = folder / f"{name}-rank{torch.distributed.get_rank()}.json"
            found = {
                "state": {key: value.flatten().tolist() for key, value in state.items()},
                "layers": layers(net),
                "timeout_hours": _timeout().total_seconds() / 3600,
            }
            file.write_text(json.dumps(found))
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_status)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1].split(","), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
