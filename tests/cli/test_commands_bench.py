"""`edgestill bench` on files: runtimes, sweeps, cores, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profiles.runtimes import usable
from tests.cli.cli_runner import edgestill
from tests.profiles.test_runtime_onnxruntime import save_model

QUICK = ("--percentile", "50", "--max-seconds", "0.1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "m.onnx")


@pytest.mark.skipif(not usable("openvino").ok, reason=usable("openvino").found)
def test_the_runtime_and_its_options_are_part_of_the_measurement(model: Path) -> None:
    result = edgestill("-q", "bench", str(model), "--runtime", "openvino", "--idle-gap-ms", "0.5", "--json", *QUICK)
    assert result.status in (0, 4), result.err
    found = json.loads(result.out)["measurement"]
    assert (found["runtime"], found["options"]["streams"], found["options"]["idle_gap_ms"]) == ("openvino", 1, 0.5)
    assert found["memory"]["peak_mib"], found["memory"]["how"]
    assert found["energy"]["millijoules"] is not None or found["energy"]["how"]


def test_energy_is_never_0_when_it_is_not_known(model: Path) -> None:
    result = edgestill("-q", "bench", str(model), "--graph-optimization", "basic", *QUICK)
    assert result.status in (0, 4), result.err
    assert "energy n/a: " in result.out or " mJ per query" in result.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--runtime", "onnxrutime"), 'did you mean "onnxruntime'),
        (("--affinity", "first"), "--affinity 0,1"),
        (("--affinity", "4096"), "may not be used here"),
        (("--graph-optimization", "most"), "extended"),
        (("--shape", "imag:1x3x8x8"), 'no input "imag"'),
        (("--shape", "image:4x3x8x8"), "--batch 4"),
    ],
)
def test_what_does_not_exist_is_refused(model: Path, options: tuple[str, ...], says: str) -> None:
    result = edgestill("bench", str(model), *options)
    assert result.status == 2
    assert says in " ".join(result.err.split())


def test_a_runtime_is_not_chosen_for_a_whole_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('name = "a"\n')
    result = edgestill("bench", str(tmp_path), "--runtime", "openvino")
    assert result.status == 2
    assert "--runtime" in result.err
