"""What README shows for continuous integration works as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.profiles.test_runtime_onnxruntime import save_model

ROOT = Path(__file__).resolve().parents[2]
QUICK = "--max-seconds 0.5"


def steps() -> list[str]:
    """The commands of the workflow in README, in order."""
    (block,) = re.findall(r"```yaml\n(on: pull_request\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    # a YAML 1.1 reader takes the key "on" for a truth value
    (job,) = yaml.safe_load(block)["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_installs_edgestill_before_it_is_used() -> None:
    install, *uses = steps()
    pip = next(shlex.split(line) for line in install.splitlines() if "pip install" in line)
    constraints, package = pip[pip.index("-c") + 1], pip[-1]
    assert constraints == f"{package}/constraints.txt"
    assert (ROOT / "constraints.txt").is_file()
    assert 'name = "edgestill"' in (ROOT / "pyproject.toml").read_text()
    assert "GITHUB_PATH" in install
    assert [shlex.split(command)[:2] for command in uses] == [["edgestill", "bench"], ["edgestill", "compare"]]


def test_the_workflows_commands_measure_and_compare_a_model(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "edgestill"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m cli.app "$@"\n')
    program.chmod(0o755)
    save_model(tmp_path / "model.onnx")
    summary = tmp_path / "summary.md"
    environment = os.environ | {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(summary),
    }

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-e", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    _, bench, compare = steps()
    done = run(bench.replace("bench model.onnx", f"bench model.onnx {QUICK}"))
    assert done.returncode == 0, done.stderr
    shutil.copy(tmp_path / "after.json", tmp_path / "before.json")
    done = run(compare)
    # 4: the machine was so busy that the latency moved
    assert done.returncode in (0, 4), done.stderr
    assert "latency" in summary.read_text()
