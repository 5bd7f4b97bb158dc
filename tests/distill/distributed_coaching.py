"""Coached teachers for test_strategy_coached.py: `torchrun ... -m` this, with a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from distill.teachers.strategy_section import CoachedSection
from tests.distill.coached_cases import Coaching
from tests.distill.training_cases import Case, dataset

# no BatchNorm and no dropout anywhere: two processes compute what one does; DIST couples the samples of a batch
TEXT = Case("dist", data=dataset(80, tokens=True), views=1, arch="text-w16-d1-h2")
CASES = {
    "lgtm": Coaching(
        section=CoachedSection(influence="preconditioned", derivative="jvp", held_out_batch_size=8),
        case=TEXT.with_(grad_clip=1.0),
        teacher_arch="text-w24-d1-h2",
        wide=True,
    ),
    "online": Coaching("online", case=TEXT, teacher_arch="text-w24-d1-h2", wide=True),
}


def coached(name: str, folder: Path) -> dict[str, object]:
    """Trains one student; everything that must be equal in all processes."""
    result, student, strategy = CASES[name].run(folder / name)
    history = [{key: value for key, value in each.items() if key != "samples_per_second"} for each in result.history]
    return {"student": student.state_dict(), "teacher": strategy.learner.network.state_dict(), "history": history}


def main(folder: Path) -> None:
    """Lets every rank write what it ended with."""
    try:
        for name in CASES:
            found = coached(name, folder)
            torch.save(found, folder / f"{name}-rank{torch.distributed.get_rank()}.pt")
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
