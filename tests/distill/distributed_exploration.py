"""Distributed explorations for test_exploration_distributed.py: `torchrun ... -m` this, with cases and folder."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill.exploration.section import ExploreSection
from tests.distill.exploration_cases import Exploring
from tests.distill.training_cases import Case


def _case(section: dict[str, Any], objective: Any = "kd", **keys: Any) -> Exploring:
    return Exploring(ExploreSection.model_validate(section), Case(objective, norm=False, **keys))


CASES = {
    # nothing is drawn: two processes are one
    "real": _case({"kind": "real"}),
    "coupled": _case(
        {"kind": "real", "match": "objective"},
        [{"kind": "rkd"}, {"kind": "kd"}],
    ),
    "conv": _case({"kind": "reconstructed"}, arch="conv-w8-d1-k3"),
    # every process has draws of its own
    "random": _case({"kind": "random"}),
    "gradient": _case({"kind": "gradient", "filter": "agreement"}, arch="conv-w8-d1-k3"),
}
CASES["coupled"] = replace(CASES["coupled"], case=CASES["coupled"].case.with_(hard_weight=0.5))


def main(names: list[str], folder: Path) -> None:
    """Trains one case after the other, and lets every rank write what it ended with."""
    try:
        for name in names:
            _, net, exploration = CASES[name].run(folder / name)
            file = folder / f"{name}-rank{torch.distributed.get_rank()}.json"
            found = {
                "state": {key: value.flatten().tolist() for key, value in net.state_dict().items()},
                "inputs": [ready.inputs.flatten(1).tolist() for ready in exploration.seen],
            }
            file.write_text(json.dumps(found))
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1].split(","), Path(sys.argv[2]))
