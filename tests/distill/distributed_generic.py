"""Generic teachers for test_strategy_generic.py: `torchrun ... -m` this, with a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from distill.strategies.generic import Generic
from distill.students.arch import parse_arch
from distill.teachers.strategy_section import GenericSection
from tests.distill.training_cases import Case, dataset

POOLS = {
    "conv": (Case("supervised", arch="conv-w12-d1-k3"), ("conv-w4-d1-k3", "conv-w8-d1-k3", "conv-w8-d2-k3")),
    # no BatchNorm anywhere: two processes compute what one does
    "text": (
        Case("supervised", data=dataset(tokens=True), views=1, arch="text-w32-d3-h4"),
        ("text-w16-d1-h2", "text-w16-d2-h4", "text-w24-d2-h2"),
    ),
}


def conditioned(name: str, folder: Path) -> dict[str, object]:
    """Trains one teacher with a learned distribution; everything that must be equal in all processes."""
    case, words = POOLS[name]
    assert case.arch is not None
    section = GenericSection(distribution="easy", paths=3, entropy=0.0)
    archs = [parse_arch(word) for word in words]
    strategy = Generic(section, archs, parse_arch(case.arch), case.data, seed=0)
    result, net, _ = case.run(folder / name, strategy=strategy, teacher=None)
    history = [{key: value for key, value in each.items() if key != "samples_per_second"} for each in result.history]
    return {
        "teacher": dict(net.state_dict()),
        "supernet": {key: value.detach() for key, value in strategy.supernet.named_parameters()},
        "sampler": strategy.sampler.state_dict(),
        "sampled": strategy.sampled,
        "history": history,
    }


def main(folder: Path) -> None:
    """Lets every rank write what it ended with."""
    try:
        for name in POOLS:
            found = conditioned(name, folder)
            torch.save(found, folder / f"{name}-rank{torch.distributed.get_rank()}.pt")
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
