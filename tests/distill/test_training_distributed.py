import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.distribution import _GlobalBatchNorm
from distill.training import read_result
from tests.distill.distributed_training import CASES, layers

ROOT = Path(__file__).parents[2]


def torchrun(case: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.distill.distributed_training", case, str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def group_of_one() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}]
)
@pytest.mark.parametrize(("layer", "shape"), [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm2d, (4, 3, 5, 5))])
def test_global_batch_norm_is_batch_norm(layer: type, shape: Any, options: Any, group_of_one: None) -> None:
    generator = torch.Generator().manual_seed(0)
    plain, shared = layer(3, **options).double(), layer(3, **options).double()
    ours = _GlobalBatchNorm(shared, 0, 1)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for _ in range(2):
        x = 2 * torch.randn(*shape, generator=generator, dtype=torch.float64) + 5
        weights = torch.randn(*shape, generator=generator, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(given) for norm, given in zip((plain, ours), inputs, strict=True)]
        for output in outputs:
            (output.square() * weights).sum().backward()
        assert torch.allclose(*outputs)
        assert torch.allclose(*(given.grad for given in inputs if given.grad is not None))
    for (name, value), mine in zip(plain.state_dict().items(), shared.state_dict().values(), strict=True):
        assert torch.allclose(value, mine), name
    for a, b in zip(plain.parameters(), shared.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad)
    assert torch.allclose(plain.eval()(x), ours.eval()(x))


@pytest.mark.slow
def test_two_ranks_get_the_loss_curve_of_one_process(tmp_path: Path) -> None:
    """The same global batch: objective parameters, batch-coupled distances and BatchNorm's statistics included."""
    cases = ["kd", "ec", "mix", "conv", "inverted", "crd", "rkd", "lelp", "subclass"]
    done = torchrun(",".join(cases), tmp_path / "together")
    assert done.returncode == 0, done.stderr
    for case in cases:
        alone, net, objective = CASES[case].run(tmp_path / "alone" / case)
        together = read_result(tmp_path / "together" / case)
        assert together.processes == 2
        assert together.best_epoch == alone.best_epoch
        for one, two in zip(alone.history, together.history, strict=True):
            for name in one.keys() - {"samples_per_second"}:
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (case, name)
        ranks = [json.loads((tmp_path / f"together/{case}-rank{rank}.json").read_text()) for rank in range(2)]
        assert ranks[0] == ranks[1]
        assert ranks[0]["layers"] == layers(net)  # nothing of the synchronised layers is left in the student
        assert ranks[0]["timeout_hours"] == 6  # the main process may build a cache for long while the others wait
        state = {**net.state_dict(), **{f"objective.{name}": value for name, value in objective.state_dict().items()}}
        for name, value in state.items():
            assert ranks[0]["state"][name] == pytest.approx(value.flatten().tolist(), rel=1e-3, abs=1e-4), (case, name)


@pytest.mark.slow
def test_ranks_of_which_one_is_interrupted_agree_on_a_checkpoint_and_go_on(tmp_path: Path) -> None:
    """The signal comes in an epoch that ends without a checkpoint of its own."""
    alone, _, _ = CASES["ec"].run(tmp_path / "alone")
    stopped = torchrun("ec", tmp_path / "together", "3")
    assert stopped.returncode != 0
    assert (tmp_path / "together/ec.partial/checkpoint.pt").is_file(), stopped.stderr
    assert not (tmp_path / "together/ec").exists()
    done = torchrun("ec", tmp_path / "together")
    assert done.returncode == 0, done.stderr
    together = read_result(tmp_path / "together/ec")
    assert [r["loss"] for r in together.history] == pytest.approx([r["loss"] for r in alone.history], rel=1e-4)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    done = torchrun("uneven", tmp_path / "together")
    assert done.returncode != 0
    assert "cannot be shared by 2 processes" in done.stderr
    assert "batch_size = 14" in done.stderr
