import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distill.distributed_exploration import CASES

ROOT = Path(__file__).parents[2]


def torchrun(cases: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.distill.distributed_exploration", ",".join(cases), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )


def inputs_of(rank: dict[str, Any]) -> list[set[tuple[int, ...]]]:
    """The further inputs of every step."""
    return [{tuple(image) for image in step} for step in rank["inputs"]]


@pytest.mark.slow
def test_two_processes_explore_their_own_shares_and_end_with_one_student(tmp_path: Path) -> None:
    done = torchrun(list(CASES), tmp_path)
    assert done.returncode == 0, done.stderr
    for name, case in CASES.items():
        ranks = [json.loads((tmp_path / f"{name}-rank{rank}.json").read_text()) for rank in range(2)]
        assert ranks[0]["state"] == ranks[1]["state"], name
        for ours, theirs in zip(*map(inputs_of, ranks), strict=True):
            assert len(ours) == len(theirs) == 8
            assert not ours & theirs
        _, net, exploration = case.run(tmp_path / "alone" / name)
        if name in ("random", "gradient"):
            continue
        together = [ours | theirs for ours, theirs in zip(*map(inputs_of, ranks), strict=True)]
        assert together == [
            {tuple(image) for image in ready.inputs.flatten(1).tolist()} for ready in exploration.seen
        ], name
        for key, value in net.state_dict().items():
            expected = value.flatten().tolist()
            assert ranks[0]["state"][key] == pytest.approx(expected, rel=1e-3, abs=1e-4), (name, key)
